/*
 * Knows what is on a disk: it remembers what it wrote to each of its sectors, reads a sector
 * before it writes to it again, and complains when it finds what it has not written yet
 * (a disk from the future) or what it wrote earlier (one from the past).
 *
 *     witness DEVICE
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SECTOR = 512, SECTORS = 64 };

static uint64_t written[SECTORS];

int main(int count, char **words)
{
    int device = count == 2 ? open(words[1], O_RDWR | O_DIRECT) : -1;
    uint64_t *buffer = NULL, number = 0, complaints = 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (device < 0 || posix_memalign((void **)&buffer, 4096, SECTOR)) {
        printf("ftd-guest: witness: no such disk\n");
        return 1;
    }
    memset(buffer, 0, SECTOR);
    for (int i = 0; i < SECTORS; i++)
        if (pwrite(device, buffer, SECTOR, i * SECTOR) != SECTOR)
            printf("ftd-guest: witness: a write failed\n");
    printf("ftd-guest: witness\n");
    for (;;) {
        int sector = number++ % SECTORS;

        if (pread(device, buffer, SECTOR, sector * SECTOR) != SECTOR)
            printf("ftd-guest: witness: a read failed\n");
        if (buffer[0] != written[sector] && complaints++ < 20)
            printf("ftd-guest: witness MISMATCH: sector %d has %llu, not %llu\n", sector,
                   (unsigned long long)buffer[0], (unsigned long long)written[sector]);
        written[sector] = buffer[0] = number;
        if (pwrite(device, buffer, SECTOR, sector * SECTOR) != SECTOR)
            printf("ftd-guest: witness: a write failed\n");
        if (number % 2000 == 0)
            printf("ftd-guest: witness %llu\n", (unsigned long long)number);
    }
}
