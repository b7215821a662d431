/*
 * Sends datagrams as fast as the kernel takes them, when it is asked to: each begins with
 * its number, from 0, as eight bytes in network order, so whoever receives them sees what
 * is missing. The socket waits when there is no room, so the guest itself loses none.
 */
#include "state.h"
#include <arpa/inet.h>
#include <endian.h>
#include <string.h>
#include <sys/socket.h>

#define LOOK_EVERY_MS 50
#define MOST_BYTES 1472                 /* of one datagram in one packet */

static void flood(struct state *state, int sender)
{
    struct sockaddr_in to = {
        .sin_family = AF_INET,
        .sin_addr.s_addr = state->flood_address,
        .sin_port = state->flood_port,
    };
    char data[MOST_BYTES] = "";
    uint64_t bytes = state->flood_bytes < MOST_BYTES ? state->flood_bytes : MOST_BYTES;

    state->flood_sent = state->flood_errors = 0;
    /* Looked at again each time, since a smaller wish ends it. */
    while (state->flood_sent < state->flood_wanted) {
        uint64_t number = htobe64(state->flood_sent);

        memcpy(data, &number, sizeof(number));
        if (sendto(sender, data, bytes, 0, (struct sockaddr *)&to, sizeof(to)) < 0) {
            state->flood_errors++;
            sleep_ms(LOOK_EVERY_MS);
            continue;
        }
        state->flood_sent++;
    }
}

int main(void)
{
    struct state *state = open_state();
    int sender = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (sender < 0) {
        perror("flooder: socket");
        return 1;
    }
    for (;;) {
        uint64_t asked = state->flood_asked;

        if (state->flood_done == asked) {
            sleep_ms(LOOK_EVERY_MS);
            continue;
        }
        flood(state, sender);
        state->flood_done = asked;
    }
}
