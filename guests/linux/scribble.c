/*
 * Writes to a disk as a guest does that has no manners: many requests at once, of odd sizes,
 * overlapping, with discards and flushes in between, and with no regard to any file system.
 *
 *     scribble DEVICE THREADS        sectors of a block device, with O_DIRECT
 *     scribble FOLDER THREADS        files of a mounted file system, without fsync
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SECTOR = 512, LARGEST = 3 << 20 };

static const char *target;
static int device = -1;
static uint64_t device_size;

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void scribble_device(uint64_t *random, char *buffer)
{
    /* Half of it in one place, so that requests meet. */
    uint64_t span = next_random(random) % 2 ? device_size / SECTOR : 2048;
    uint64_t size = SECTOR * (1 + next_random(random) % (next_random(random) % 64 ? 32 : LARGEST / SECTOR));
    uint64_t at = next_random(random) % span * SECTOR;
    uint64_t range[2];

    if (at + size > device_size)
        size = device_size - at;
    range[0] = at;
    range[1] = size;
    switch (next_random(random) % 16) {
    case 0:
        ioctl(device, BLKDISCARD, range);
        break;
    case 1:
        ioctl(device, BLKZEROOUT, range);
        break;
    case 2:
        fdatasync(device);
        break;
    default:
        for (uint64_t i = 0; i < size; i += 8)
            *(uint64_t *)(buffer + i) = *random + i;
        if (pwrite(device, buffer, size, at) < 0)
            perror("ftd-guest: scribble");
    }
}

static void scribble_files(uint64_t *random, char *buffer)
{
    char name[256], other[256];
    uint64_t size = 1 + next_random(random) % 20000;
    int file;

    snprintf(name, sizeof(name), "%s/loose-%d", target, (int)(next_random(random) % 200));
    snprintf(other, sizeof(other), "%s/moved-%d", target, (int)(next_random(random) % 200));
    switch (next_random(random) % 8) {
    case 0:
        unlink(name);
        break;
    case 1:
        rename(name, other);
        break;
    case 2:
        unlink(other);
        break;
    default:
        memset(buffer, 'a' + size % 26, size);
        file = open(name, O_CREAT | O_WRONLY | (size % 2 ? O_APPEND : O_TRUNC), 0644);
        if (file >= 0) {
            if (lseek(file, 0, SEEK_END) < (1 << 18) && write(file, buffer, size) < 0)
                perror("ftd-guest: scribble");
            close(file);
        }
    }
    usleep(1000);
}

static void *work(void *argument)
{
    uint64_t random = 0x9e3779b97f4a7c15 * ((uintptr_t)argument + 1);
    char *buffer = NULL;

    if (posix_memalign((void **)&buffer, 4096, LARGEST + SECTOR))
        return NULL;
    for (;;) {
        if (device >= 0)
            scribble_device(&random, buffer);
        else
            scribble_files(&random, buffer);
    }
}

int main(int count, char **words)
{
    struct stat about;
    pthread_t thread;
    int threads = count > 2 ? atoi(words[2]) : 1;

    if (count < 2 || stat(words[1], &about) < 0) {
        fprintf(stderr, "ftd-guest: scribble: no such target\n");
        return 1;
    }
    target = words[1];
    if (S_ISBLK(about.st_mode)) {
        device = open(target, O_RDWR | O_DIRECT);
        if (device < 0 || ioctl(device, BLKGETSIZE64, &device_size) < 0) {
            perror("ftd-guest: scribble");
            return 1;
        }
    }
    for (intptr_t i = 1; i < threads; i++)
        pthread_create(&thread, NULL, work, (void *)i);
    work(0);
    return 0;
}
