/*
 * Writes to memory pages at a set rate, and proves that memory is whole.
 *
 *     dirtier PAGES_PER_SECOND PAGES random|sequential
 *
 * Every page carries the same stamp in four places: page number, generation and a
 * checksum of both. Before a page is written again, all four are compared with what was
 * written last, which is kept apart from the pages. So a page of which only a part was
 * restored, a page of another time, and a page in the place of another all show:
 *
 *     dirtier: MISMATCH page N place P have PAGE/GENERATION want PAGE/GENERATION
 *
 * Rate, pages and pattern can be changed while it runs, see state.h.
 */
#include "state.h"
#include <inttypes.h>
#include <string.h>

#define PLACES 4
#define SLICE_MS 10
#define MOST_LINES 20       /* a broken memory must not flood the console */

struct stamp {
    uint64_t page;
    uint64_t generation;
    uint64_t checksum;
};

static const unsigned places[PLACES] = { 0, 1360, 2720, PAGE_SIZE - sizeof(struct stamp) };

static struct state *state;
static char *area;
static uint64_t *generations;   /* of each page: what must be found in it */

static struct stamp stamp_of(uint64_t page, uint64_t generation)
{
    uint64_t mixed = (page + 1) * 0x9e3779b97f4a7c15ULL ^ (generation + 1) * 0xc2b2ae3d27d4eb4fULL;

    return (struct stamp){ page, generation, mixed ^ mixed >> 29 };
}

static void verify_page(uint64_t page)
{
    struct stamp want = stamp_of(page, generations[page]);

    for (int i = 0; i < PLACES; i++) {
        struct stamp *have = (struct stamp *)(area + page * PAGE_SIZE + places[i]);

        if (memcmp(have, &want, sizeof(want)) == 0)
            continue;
        if (state->mismatches++ < MOST_LINES)
            printf("dirtier: MISMATCH page %" PRIu64 " place %d have %" PRIu64 "/%" PRIu64
                   " want %" PRIu64 "/%" PRIu64 "\n", page, i, have->page,
                   have->generation, want.page, want.generation);
    }
    state->pages_verified++;
}

static void write_page(uint64_t page, uint64_t generation)
{
    struct stamp stamp = stamp_of(page, generation);

    generations[page] = generation;
    for (int i = 0; i < PLACES; i++)
        memcpy(area + page * PAGE_SIZE + places[i], &stamp, sizeof(stamp));
    state->pages_written++;
}

static void *allocate(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        perror("dirtier: memory");
        exit(1);
    }
    return memory;
}

static void resize(uint64_t pages)
{
    if (state->pages) {
        munmap(area, state->pages * PAGE_SIZE);
        munmap(generations, state->pages * sizeof(*generations));
    }
    area = allocate(pages * PAGE_SIZE);
    generations = allocate(pages * sizeof(*generations));
    for (uint64_t page = 0; page < pages; page++)
        write_page(page, 1);
    state->pages = pages;
}

int main(int argc, char **argv)
{
    uint64_t next = 0, generation = 1, random = 88172645463325252ULL;
    int64_t last;
    double due = 0;

    state = open_state();
    setvbuf(stdout, NULL, _IOLBF, 1024);
    state->wanted_pages = argc > 2 ? strtoull(argv[2], NULL, 10) : 256;
    state->wanted_random = argc > 3 && strcmp(argv[3], "random") == 0;
    state->wanted_pages_per_second = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    if (state->wanted_pages < 1 || state->wanted_pages > most_pages()) {
        printf("dirtier: ftd.dirty_pages=%" PRIu64 " must be between 1 and %" PRIu64 ", using 256\n",
               state->wanted_pages, most_pages());
        state->wanted_pages = 256;
    }

    last = clock_ns(CLOCK_MONOTONIC);
    for (;;) {
        int64_t now = clock_ns(CLOCK_MONOTONIC);
        uint64_t rate = state->wanted_pages_per_second;
        double passed = (now - last) / 1e9;

        if (state->wanted_pages != state->pages) {
            resize(state->wanted_pages);
            next = 0;
        }
        if (state->verify_asked != state->verify_done) {
            uint64_t asked = state->verify_asked;

            for (uint64_t page = 0; page < state->pages; page++)
                verify_page(page);
            state->verify_done = asked;
        }

        /*
         * Time that was lost, because the guest stood still or the machine is too
         * slow for the rate, is not made up for: no bursts.
         */
        last = now;
        if (passed < 0 || passed > 0.1)
            passed = 0.1;
        due = rate ? due + passed * rate : 0;
        if (due > rate * 0.1)
            due = rate * 0.1;
        for (; due >= 1; due--) {
            uint64_t page = next;

            if (state->wanted_random) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                page = random % state->pages;
            } else {
                next = (next + 1) % state->pages;
            }
            verify_page(page);
            write_page(page, ++generation);
        }
        sleep_ms(SLICE_MS);
    }
}
