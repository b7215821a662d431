/*
 * A service that writes every line it is told into a database before it answers:
 *
 *     ledger FILE PORT
 *
 *     put WORKER NUMBER    -> ok                 the row is committed, and durable
 *     has WORKER           -> COUNT HIGHEST      rows of that worker
 *     check                -> ok ROWS, or what PRAGMA integrity_check says
 *
 * One process, one connection to the database; clients are served one line after the other.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CLIENTS = 64, LINE = 256 };

struct client {
    char line[LINE];
    size_t have;
};

static sqlite3 *base;

static void fail(const char *what)
{
    printf("ftd-guest: ledger: %s: %s\n", what, base ? sqlite3_errmsg(base) : strerror(errno));
    exit(1);
}

static void run(const char *sql)
{
    if (sqlite3_exec(base, sql, NULL, NULL, NULL) != SQLITE_OK)
        fail(sql);
}

static int first_row(void *out, int columns, char **values, char **names)
{
    (void)names;
    snprintf(out, LINE, "%s%s%s", values[0] ? values[0] : "0", columns > 1 ? " " : "",
             columns > 1 ? (values[1] ? values[1] : "-1") : "");
    return 0;
}

static void answer(const char *line, char *out)
{
    char sql[LINE], text[LINE] = "", *error = NULL;
    long worker, number;

    if (sscanf(line, "put %ld %ld", &worker, &number) == 2) {
        snprintf(sql, sizeof(sql), "INSERT INTO entries VALUES (%ld, %ld, hex(randomblob(200)))", worker, number);
        if (sqlite3_exec(base, sql, NULL, NULL, &error) == SQLITE_OK)
            snprintf(text, sizeof(text), "ok");
    } else if (sscanf(line, "has %ld", &worker) == 1) {
        snprintf(sql, sizeof(sql), "SELECT count(*), max(number) FROM entries WHERE worker = %ld", worker);
        sqlite3_exec(base, sql, first_row, text, &error);
    } else if (!strcmp(line, "check")) {
        sqlite3_exec(base, "PRAGMA integrity_check(1)", first_row, text, &error);
        if (!error && !strcmp(text, "ok")) {
            char rows[LINE];

            sqlite3_exec(base, "SELECT count(*) FROM entries NOT INDEXED", first_row, rows, &error);
            snprintf(text, sizeof(text), "ok %.200s", rows);
        }
    } else {
        snprintf(text, sizeof(text), "error: not understood");
    }
    snprintf(out, LINE, "%s%.200s\n", error ? "error: " : "", error ? error : text);
    sqlite3_free(error);
}

static int serve(int connection, struct client *client)
{
    ssize_t got = read(connection, client->line + client->have, LINE - 1 - client->have);
    char out[LINE], *end;

    if (got <= 0)
        return -1;
    client->have += got;
    client->line[client->have] = 0;
    while ((end = strchr(client->line, '\n'))) {
        *end = 0;
        answer(client->line, out);
        if (write(connection, out, strlen(out)) < 0)
            return -1;
        client->have -= end + 1 - client->line;
        memmove(client->line, end + 1, client->have + 1);
    }
    return client->have < LINE - 1 ? 0 : -1;
}

int main(int count, char **words)
{
    static struct client clients[CLIENTS];
    struct pollfd polled[CLIENTS + 1];
    struct sockaddr_in address = {.sin_family = AF_INET};
    int used = 0, on = 1, listener;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (count != 3) {
        fprintf(stderr, "usage: ledger FILE PORT\n");
        return 2;
    }
    if (sqlite3_open(words[1], &base) != SQLITE_OK)
        fail(words[1]);
    run("PRAGMA journal_mode = DELETE");
    /* FULL does not make it durable that the journal is gone: a power cut would undo the last transaction. */
    run("PRAGMA synchronous = EXTRA");
    run("CREATE TABLE IF NOT EXISTS entries (worker INTEGER, number INTEGER, filler TEXT, PRIMARY KEY (worker, number))");

    listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    address.sin_port = htons(atoi(words[2]));
    if (listener < 0 || bind(listener, (void *)&address, sizeof(address)) < 0 || listen(listener, 16) < 0)
        fail("cannot listen");
    printf("ftd-guest: ledger on port %s\n", words[2]);
    polled[0] = (struct pollfd){.fd = listener, .events = POLLIN};
    for (;;) {
        if (poll(polled, used + 1, -1) < 0)
            continue;
        for (int i = used; i > 0; i--) {
            if (polled[i].revents && serve(polled[i].fd, &clients[i - 1]) < 0) {
                close(polled[i].fd);
                polled[i] = polled[used];
                clients[i - 1] = clients[used - 1];
                used--;
            }
        }
        if (polled[0].revents && used < CLIENTS) {
            int connection = accept(listener, NULL, NULL);

            if (connection >= 0) {
                setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
                clients[used].have = 0;
                polled[++used] = (struct pollfd){.fd = connection, .events = POLLIN};
            }
        }
    }
}
