/*
 * How fast a disk is, again and again: sequential writes, writes in random places, and such
 * each of which is made durable; one request at a time, with O_DIRECT, for half a second each. And small writes
 * with rests between them, of which only the time of the writes counts: what a write takes where nothing is busy.
 *
 *     diskbench DEVICE
 *
 *     bench WORKLOAD COUNT NANOSECONDS
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 4096, LARGE = 256 << 10, REST = 4000000 /* ns */ };

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void run(int device, uint64_t size, char *buffer, const char *name, uint64_t length, int random, int sync,
                long rest)
{
    static uint64_t state = 88172645463325252ULL;
    struct timespec pause = {.tv_nsec = rest};
    int64_t start = now(), began, end, took = 0;
    uint64_t count = 0, at = 0;

    do {
        if (rest)
            nanosleep(&pause, NULL);
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        at = random ? state % (size / length) * length : (at + length) % (size - size % length);
        memcpy(buffer, &state, sizeof(state));
        began = now();
        if (pwrite(device, buffer, length, at) != (ssize_t)length || (sync && fdatasync(device)))
            printf("ftd-guest: diskbench: a write failed\n");
        count++;
        end = now();
        took += end - began;
    } while (end - start < 500000000LL);
    printf("bench %s %llu %lld\n", name, (unsigned long long)count, (long long)took);
}

int main(int count, char **words)
{
    int device = count == 2 ? open(words[1], O_RDWR | O_DIRECT) : -1;
    char *buffer = NULL;
    uint64_t size;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (device < 0 || ioctl(device, BLKGETSIZE64, &size) < 0 || posix_memalign((void **)&buffer, 4096, LARGE)) {
        printf("ftd-guest: diskbench: no such disk\n");
        return 1;
    }
    memset(buffer, 'x', LARGE);
    for (;;) {
        run(device, size, buffer, "sequential-write", LARGE, 0, 0, 0);
        run(device, size, buffer, "random-write", SMALL, 1, 0, 0);
        run(device, size, buffer, "fsync", SMALL, 1, 1, 0);
        run(device, size, buffer, "paced-write", SMALL, 1, 0, REST);
    }
}
