/*
 * The service that tests talk to. All its state is in memory, so every answer proves
 * that memory, network and time of the guest survived.
 *
 *   HTTP, port 80       see requests[] below, and guests/README.md
 *   TCP,  port 7000     a line "TEXT\n" is answered with "TEXT N\n"; N counts the lines of
 *                       this connection from 1, so a lost or doubled line shows
 *   UDP,  port 7000     a datagram is answered with itself, a space and the counter
 *
 * One thread and one epoll loop: answers are given in the order of the counter.
 */
#define _GNU_SOURCE
#include "state.h"
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/reboot.h>
#include <sys/socket.h>

#define HTTP_PORT 80
#define ECHO_PORT 7000
#define IN_SIZE 8192
#define OUT_SIZE 16384
#define ANSWER_SIZE 2048            /* no single answer is longer */
#define MOST_BODY (1 << 20)
#define LAST_ANSWER_MS 500          /* for the answer to leave before the guest ends */

enum kind { HTTP_LISTENER, ECHO_LISTENER, ECHO_DATAGRAMS, HTTP, ECHO };

struct connection {
    enum kind kind;
    int socket;
    bool closing;                   /* close once everything is sent */
    bool ended;                     /* the client will send nothing more */
    uint64_t lines;                 /* of the echo service */
    size_t body_left;               /* of an HTTP request, not looked at */
    size_t in_length, out_length;
    char in[IN_SIZE + 1];
    char out[OUT_SIZE];
};

static struct state *state;
static int loop;
static uint64_t counter;
static uint64_t connections, requests_answered, echo_lines, datagrams;
static int64_t started_ns;
static void (*last_act)(void);      /* what /poweroff and its like asked for */
static int64_t asked_ns;            /* and when */

/* ---- HTTP requests ---- */

/* The answer to a request that is being handled. */
struct answer {
    int status;
    const char *type;
    char body[ANSWER_SIZE - 256];
};

static void answer(struct answer *answer, int status, const char *format, ...)
{
    va_list values;

    va_start(values, format);
    answer->status = status;
    vsnprintf(answer->body, sizeof(answer->body), format, values);
    va_end(values);
}

/*
 * Takes "name=number" out of a query. Returns false, with the answer filled in, when
 * there is a value and it is not a number between least and most.
 */
static bool number(char *query, const char *name, uint64_t least, uint64_t most,
                   volatile uint64_t *value, struct answer *reply)
{
    size_t length = strlen(name);

    for (char *at = query; at && *at; at = strchr(at, '&')) {
        char *end;
        uint64_t found;

        at += *at == '&';
        if (strncmp(at, name, length) != 0 || at[length] != '=')
            continue;
        errno = 0;
        found = strtoull(at + length + 1, &end, 10);
        if (at[length + 1] < '0' || at[length + 1] > '9' || (*end && *end != '&') ||
            errno || found < least || found > most) {
            answer(reply, 400, "%s must be a number between %" PRIu64 " and %" PRIu64 "\n",
                   name, least, most);
            return false;
        }
        *value = found;
        break;
    }
    return true;
}

static void do_index(char *query, struct answer *reply)
{
    (void)query;
    answer(reply, 200, "ftd test guest: /counter /increment /status /dirtier /verify "
           "/sequence /flood, POST /poweroff /reboot /panic\n");
}

static void do_counter(char *query, struct answer *reply)
{
    (void)query;
    answer(reply, 200, "%" PRIu64 "\n", counter);
}

static void do_increment(char *query, struct answer *reply)
{
    (void)query;
    answer(reply, 200, "%" PRIu64 "\n", ++counter);
}

static void do_status(char *query, struct answer *reply)
{
    (void)query;
    reply->type = "application/json";
    answer(reply, 200,
           "{\"counter\": %" PRIu64 ", \"sequence\": %" PRIu64 ", \"uptime_s\": %.3f, "
           "\"monotonic_ns\": %" PRId64 ", \"wall_ns\": %" PRId64 ", "
           "\"clock_backwards\": %" PRIu64 ", \"sequence_interval_ms\": %" PRIu64 ", "
           "\"connections\": %" PRIu64 ", \"requests\": %" PRIu64 ", "
           "\"echo_lines\": %" PRIu64 ", \"datagrams\": %" PRIu64 ", "
           "\"dirty_pages_per_second\": %" PRIu64 ", \"dirty_pages\": %" PRIu64 ", "
           "\"dirty_pattern\": \"%s\", \"dirty_written\": %" PRIu64 ", "
           "\"dirty_verified\": %" PRIu64 ", \"dirty_mismatches\": %" PRIu64 ", "
           "\"verify_asked\": %" PRIu64 ", \"verify_done\": %" PRIu64 ", "
           "\"flood_asked\": %" PRIu64 ", \"flood_done\": %" PRIu64 ", "
           "\"flood_sent\": %" PRIu64 ", \"flood_errors\": %" PRIu64 "}\n",
           counter, state->sequence, (clock_ns(CLOCK_MONOTONIC) - started_ns) / 1e9,
           clock_ns(CLOCK_MONOTONIC), clock_ns(CLOCK_REALTIME),
           state->clock_backwards, state->sequence_interval_ms,
           connections, requests_answered, echo_lines, datagrams,
           state->wanted_pages_per_second, state->pages,
           state->wanted_random ? "random" : "sequential", state->pages_written,
           state->pages_verified, state->mismatches,
           state->verify_asked, state->verify_done,
           state->flood_asked, state->flood_done, state->flood_sent, state->flood_errors);
}

static void do_dirtier(char *query, struct answer *reply)
{
    uint64_t rate = state->wanted_pages_per_second, pages = state->wanted_pages;
    char *pattern = strstr(query, "pattern=");

    if (!number(query, "pages_per_second", 0, 100000000, &rate, reply) ||
        !number(query, "pages", 1, most_pages(), &pages, reply))
        return;
    if (pattern) {
        pattern += strlen("pattern=");
        pattern[strcspn(pattern, "&")] = '\0';
        if (strcmp(pattern, "random") != 0 && strcmp(pattern, "sequential") != 0) {
            answer(reply, 400, "pattern must be random or sequential\n");
            return;
        }
        state->wanted_random = strcmp(pattern, "random") == 0;
    }
    state->wanted_pages = pages;
    state->wanted_pages_per_second = rate;
    answer(reply, 200, "pages_per_second=%" PRIu64 " pages=%" PRIu64 " pattern=%s\n", rate,
           pages, state->wanted_random ? "random" : "sequential");
}

static void do_verify(char *query, struct answer *reply)
{
    (void)query;
    answer(reply, 200, "%" PRIu64 "\n", ++state->verify_asked);
}

static void do_flood(char *query, struct answer *reply)
{
    uint64_t datagrams = 0, bytes = 1400, port = 7001;
    char *to = strstr(query, "to=");
    char text[16] = "";
    struct in_addr address;

    if (!number(query, "datagrams", 0, UINT64_MAX, &datagrams, reply) ||
        !number(query, "bytes", 8, 1472, &bytes, reply) ||
        !number(query, "port", 1, 65535, &port, reply))
        return;
    if (datagrams && (!to || sscanf(to, "to=%15[0-9.]", text) != 1 || inet_aton(text, &address) == 0)) {
        answer(reply, 400, "to must be the IPv4 address that is flooded\n");
        return;
    }
    if (datagrams) {
        state->flood_address = address.s_addr;
        state->flood_port = htons(port);
        state->flood_bytes = bytes;
    }
    state->flood_wanted = datagrams;
    if (datagrams)
        state->flood_asked++;
    answer(reply, 200, "%" PRIu64 "\n", state->flood_asked);
}

static void do_sequence(char *query, struct answer *reply)
{
    if (number(query, "interval_ms", 0, 3600000, &state->sequence_interval_ms, reply))
        answer(reply, 200, "sequence=%" PRIu64 " interval_ms=%" PRIu64 "\n",
               state->sequence, state->sequence_interval_ms);
}

static void power_off(void)
{
    sync();
    reboot(RB_POWER_OFF);
}

static void restart(void)
{
    sync();
    reboot(RB_AUTOBOOT);
}

static void crash(void)
{
    int trigger = open("/proc/sysrq-trigger", O_WRONLY);

    if (trigger < 0 || write(trigger, "c", 1) < 0)
        perror("counter: /proc/sysrq-trigger");
}

static void end_with(void (*act)(void))
{
    last_act = act;
    asked_ns = clock_ns(CLOCK_MONOTONIC);
}

static void do_poweroff(char *query, struct answer *reply)
{
    (void)query;
    end_with(power_off);
    answer(reply, 200, "powering off\n");
}

static void do_reboot(char *query, struct answer *reply)
{
    (void)query;
    end_with(restart);
    answer(reply, 200, "rebooting\n");
}

static void do_panic(char *query, struct answer *reply)
{
    (void)query;
    end_with(crash);
    answer(reply, 200, "crashing the kernel\n");
}

static const struct request {
    const char *path;
    bool post_only;                 /* a crawler's GET must not end the guest */
    void (*handle)(char *query, struct answer *reply);
} requests[] = {
    { "/", false, do_index },
    { "/counter", false, do_counter },
    { "/increment", false, do_increment },
    { "/status", false, do_status },
    { "/dirtier", false, do_dirtier },
    { "/verify", false, do_verify },
    { "/sequence", false, do_sequence },
    { "/flood", false, do_flood },
    { "/poweroff", true, do_poweroff },
    { "/reboot", true, do_reboot },
    { "/panic", true, do_panic },
};

static void handle_request(const char *method, char *target, struct answer *reply)
{
    char *query = strchr(target, '?');
    bool post = strcmp(method, "POST") == 0;

    if (query)
        *query++ = '\0';
    else
        query = target + strlen(target);

    for (size_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++) {
        if (strcmp(target, requests[i].path) != 0)
            continue;
        if (!post && (requests[i].post_only || strcmp(method, "GET") != 0))
            answer(reply, 405, "%s wants %s\n", target, requests[i].post_only ? "POST" : "GET or POST");
        else
            requests[i].handle(query, reply);
        return;
    }
    answer(reply, 404, "there is no %s here\n", target);
}

static const char *reason(int status)
{
    switch (status) {
    case 200: return "OK";
    case 400: return "Bad Request";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 413: return "Content Too Large";
    default: return "Request Header Fields Too Large";
    }
}

static void send_answer(struct connection *client, const struct answer *reply)
{
    client->out_length += snprintf(client->out + client->out_length, OUT_SIZE - client->out_length,
        "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nConnection: %s\r\n\r\n%s",
        reply->status, reason(reply->status), reply->type, strlen(reply->body),
        client->closing ? "close" : "keep-alive", reply->body);
    requests_answered++;
}

/* The value of a header line, or NULL. The name is given with its colon. */
static char *header(char *lines, const char *name)
{
    for (char *line = strstr(lines, "\r\n"); line; line = strstr(line, "\r\n")) {
        line += 2;
        if (strncasecmp(line, name, strlen(name)) == 0)
            return line + strlen(name) + strspn(line + strlen(name), " \t");
    }
    return NULL;
}

/* Handles one request out of the input. Returns how many bytes it took, 0 for none yet. */
static size_t take_http(struct connection *client)
{
    struct answer reply = { .type = "text/plain" };
    char method[16], target[1024], version[16];
    char *end, *value;
    size_t taken;

    if (client->body_left) {
        taken = client->body_left < client->in_length ? client->body_left : client->in_length;
        client->body_left -= taken;
        return taken;
    }

    client->in[client->in_length] = '\0';
    end = strstr(client->in, "\r\n\r\n");
    if (!end) {
        /* A zero byte would hide the end of the header for ever. */
        if (client->in_length < IN_SIZE && !memchr(client->in, '\0', client->in_length))
            return 0;
        client->closing = true;
        answer(&reply, 431, "the header is longer than %d bytes, or not text\n", IN_SIZE);
        send_answer(client, &reply);
        return client->in_length;
    }
    end[2] = '\0';
    taken = end + 4 - client->in;

    if (sscanf(client->in, "%15s %1023s %15s", method, target, version) != 3 ||
        strncmp(version, "HTTP/1.", 7) != 0 || header(client->in, "Transfer-Encoding:")) {
        client->closing = true;
        answer(&reply, 400, "only plain HTTP/1.0 and HTTP/1.1 requests are understood\n");
        send_answer(client, &reply);
        return taken;
    }
    value = header(client->in, "Content-Length:");
    if (value)
        client->body_left = strtoul(value, NULL, 10);
    value = header(client->in, "Connection:");
    if (strcmp(version, "HTTP/1.0") == 0)
        client->closing = !value || strncasecmp(value, "keep-alive", 10) != 0;
    else if (value && strncasecmp(value, "close", 5) == 0)
        client->closing = true;

    if (client->body_left > MOST_BODY) {
        client->closing = true;
        answer(&reply, 413, "a request body may have %d bytes\n", MOST_BODY);
    } else {
        handle_request(method, target, &reply);
    }
    send_answer(client, &reply);
    return taken;
}

/* ---- echo ---- */

static size_t take_echo(struct connection *client)
{
    char *end = memchr(client->in, '\n', client->in_length);
    size_t length;

    if (!end) {
        client->closing = client->in_length > 1000;
        return 0;
    }
    length = end - client->in;
    if (length > 1000) {
        client->closing = true;
        return 0;
    }
    memcpy(client->out + client->out_length, client->in, length);
    client->out_length += length;
    client->out_length += sprintf(client->out + client->out_length, " %" PRIu64 "\n", ++client->lines);
    echo_lines++;
    return length + 1;
}

static void answer_datagrams(int socket)
{
    char data[2048];
    struct sockaddr_in sender;
    socklen_t sender_size = sizeof(sender);
    ssize_t length;

    while ((length = recvfrom(socket, data, sizeof(data) - 32, 0,
                              (struct sockaddr *)&sender, &sender_size)) >= 0) {
        while (length > 0 && data[length - 1] == '\n')
            length--;
        length += sprintf(data + length, " %" PRIu64 "\n", counter);
        sendto(socket, data, length, 0, (struct sockaddr *)&sender, sender_size);
        datagrams++;
        sender_size = sizeof(sender);
    }
}

/* ---- connections ---- */

static void watch(struct connection *client, int operation, uint32_t events)
{
    struct epoll_event event = { .events = events, .data.ptr = client };

    epoll_ctl(loop, operation, client->socket, &event);
}

static struct connection *add(enum kind kind, int socket)
{
    struct connection *client = calloc(1, sizeof(*client));

    if (!client) {
        close(socket);
        return NULL;
    }
    client->kind = kind;
    client->socket = socket;
    watch(client, EPOLL_CTL_ADD, EPOLLIN);
    return client;
}

static void accept_all(const struct connection *listener)
{
    int socket, on = 1;

    while ((socket = accept4(listener->socket, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
        if (add(listener->kind == HTTP_LISTENER ? HTTP : ECHO, socket))
            connections++;
    }
}

/* Answers what has arrived, as far as there is room for answers. */
static void take_all(struct connection *client)
{
    while (client->in_length && !client->closing && client->out_length + ANSWER_SIZE <= OUT_SIZE) {
        size_t taken = client->kind == HTTP ? take_http(client) : take_echo(client);

        if (!taken)
            break;
        client->in_length -= taken;
        memmove(client->in, client->in + taken, client->in_length);
    }
}

/* Returns false when the connection is of no more use. */
static bool send_all(struct connection *client)
{
    while (client->out_length) {
        ssize_t sent = send(client->socket, client->out, client->out_length, MSG_NOSIGNAL);

        if (sent < 0)
            return errno == EAGAIN;
        client->out_length -= sent;
        memmove(client->out, client->out + sent, client->out_length);
    }
    return true;
}

static void serve(struct connection *client)
{
    bool alive = true;

    if (!client->ended && client->in_length < IN_SIZE) {
        ssize_t got = recv(client->socket, client->in + client->in_length,
                           IN_SIZE - client->in_length, 0);

        if (got > 0)
            client->in_length += got;
        else if (got == 0)
            client->ended = true;
        else
            alive = errno == EAGAIN;
    }
    /* Sending makes room for the answers to requests that are already here. */
    while (alive) {
        size_t before = client->in_length;

        take_all(client);
        alive = send_all(client);
        if (client->in_length == before || client->out_length)
            break;
    }
    if (!alive || (!client->out_length && (client->closing || client->ended))) {
        close(client->socket);
        connections--;
        free(client);
        return;
    }
    /* A client that does not fetch its answers is not listened to. */
    watch(client, EPOLL_CTL_MOD, client->out_length ? EPOLLOUT : EPOLLIN);
}

static int open_port(int type, int port)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    int on = 1;
    int opened = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    setsockopt(opened, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (opened < 0 || bind(opened, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        (type == SOCK_STREAM && listen(opened, 1024) < 0)) {
        printf("counter: port %d: %s\n", port, strerror(errno));
        exit(1);
    }
    return opened;
}

int main(void)
{
    struct epoll_event events[64];

    state = open_state();
    started_ns = clock_ns(CLOCK_MONOTONIC);
    loop = epoll_create1(EPOLL_CLOEXEC);
    add(HTTP_LISTENER, open_port(SOCK_STREAM, HTTP_PORT));
    add(ECHO_LISTENER, open_port(SOCK_STREAM, ECHO_PORT));
    add(ECHO_DATAGRAMS, open_port(SOCK_DGRAM, ECHO_PORT));
    puts("ftd-guest: ready");
    fflush(stdout);

    for (;;) {
        int ready = epoll_wait(loop, events, 64, last_act ? LAST_ANSWER_MS : -1);

        if (last_act && clock_ns(CLOCK_MONOTONIC) - asked_ns >= LAST_ANSWER_MS * 1000000LL)
            last_act();
        for (int i = 0; i < ready; i++) {
            struct connection *source = events[i].data.ptr;

            switch (source->kind) {
            case HTTP_LISTENER:
            case ECHO_LISTENER:
                accept_all(source);
                break;
            case ECHO_DATAGRAMS:
                answer_datagrams(source->socket);
                break;
            default:
                serve(source);
            }
        }
    }
}
