/*
 * Prints a growing number and both clocks to the console, again and again:
 *
 *     sequence N monotonic_ns M wall_ns W
 *
 * After a takeover, whoever reads the console sees whether a number is missing or came
 * twice, and how long the guest stood still. A clock that goes back is a bug in the
 * restoring of the guest, so it is looked for between the lines as well:
 *
 *     clock: BACKWARDS monotonic by D ns
 *
 * Both clocks are also left in memory, where they can be compared with a clock outside.
 */
#include "state.h"
#include <inttypes.h>

#define LOOK_EVERY_MS 10

static struct state *state;

static int64_t look(clockid_t clock, const char *name, volatile int64_t *seen)
{
    int64_t last = *seen, now = clock_ns(clock);

    *seen = now;

    if (now < last) {
        state->clock_backwards++;
        printf("clock: BACKWARDS %s by %" PRId64 " ns\n", name, last - now);
    }
    return now;
}

int main(int argc, char **argv)
{
    int64_t printed = 0;

    state = open_state();
    state->magic = STATE_MAGIC;
    state->sequence_interval_ms = argc > 1 ? strtoull(argv[1], NULL, 10) : 100;
    setvbuf(stdout, NULL, _IOLBF, 1024);

    for (;;) {
        int64_t interval_ms = state->sequence_interval_ms;
        int64_t monotonic = look(CLOCK_MONOTONIC, "monotonic", &state->monotonic_ns);
        int64_t wall = look(CLOCK_REALTIME, "wall", &state->wall_ns);
        int64_t left_ms;

        /* 0 switches the lines off; the clocks are still watched. */
        left_ms = interval_ms - (monotonic - printed) / 1000000;
        if (interval_ms > 0 && left_ms <= 0) {
            state->sequence++;
            printf("sequence %" PRIu64 " monotonic_ns %" PRId64 " wall_ns %" PRId64 "\n",
                   state->sequence, monotonic, wall);
            printed = monotonic;
            left_ms = interval_ms;
        }
        sleep_ms(interval_ms > 0 && left_ms < LOOK_EVERY_MS ? left_ms : LOOK_EVERY_MS);
    }
}
