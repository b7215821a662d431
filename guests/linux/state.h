/*
 * What the guest's programs tell each other: one page of memory, a file in /run that
 * each of them maps. Every field has one writer; the others only read it.
 */
#ifndef STATE_H
#define STATE_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE_SIZE 4096
#define STATE_FILE "/run/ftd-state"
#define STATE_MAGIC 0x736b636f6c632d66ULL      /* "f-clocks" in memory */

struct state {
    /*
     * Written by sequence: what its clocks said when it looked last.  First in the page,
     * after a magic number, for those who look at the guest's memory from outside.
     */
    volatile uint64_t magic;
    volatile int64_t monotonic_ns;
    volatile int64_t wall_ns;

    /* Wishes to the dirtier: written by it at the start, then by counter. */
    volatile uint64_t wanted_pages_per_second;
    volatile uint64_t wanted_pages;
    volatile uint64_t wanted_random;
    volatile uint64_t verify_asked;

    /* Wishes to the flooder: a new number in flood_asked starts a flood, none wanted ends it. */
    volatile uint64_t flood_asked;
    volatile uint64_t flood_wanted;
    volatile uint64_t flood_bytes;
    volatile uint32_t flood_address;        /* as in struct in_addr */
    volatile uint16_t flood_port;           /* in network order */

    /* Written by flooder. */
    volatile uint64_t flood_done;
    volatile uint64_t flood_sent;
    volatile uint64_t flood_errors;

    /* Written by dirtier. */
    volatile uint64_t pages;
    volatile uint64_t pages_written;
    volatile uint64_t pages_verified;
    volatile uint64_t mismatches;
    volatile uint64_t verify_done;

    /* Written by sequence, but for the interval, which counter may change. */
    volatile uint64_t sequence_interval_ms;
    volatile uint64_t sequence;
    volatile uint64_t clock_backwards;
};

static inline struct state *open_state(void)
{
    int file = open(STATE_FILE, O_RDWR | O_CREAT, 0600);
    struct state *state;

    if (file < 0 || ftruncate(file, PAGE_SIZE) < 0) {
        perror("ftd-guest: " STATE_FILE);
        exit(1);
    }
    state = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (state == MAP_FAILED) {
        perror("ftd-guest: mapping " STATE_FILE);
        exit(1);
    }
    close(file);
    return state;
}

static inline int64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Relative on purpose: a deadline could be far away after a clock jumped. */
static inline void sleep_ms(int64_t ms)
{
    struct timespec time = { ms / 1000, ms % 1000 * 1000000 };

    nanosleep(&time, NULL);
}

/* The most pages that may be asked for: three quarters of the memory. */
static inline uint64_t most_pages(void)
{
    return (uint64_t)sysconf(_SC_PHYS_PAGES) / 4 * 3;
}

#endif
