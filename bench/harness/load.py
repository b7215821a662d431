"""Loads the Linux guest's counter, and measures what its clients see. Runs in the client's namespace.

    load.py ADDRESS [PORT]

A process of its own that needs nothing but Python, and little of it: one loop over raw sockets that counts
answers where they arrive. Each line on standard input is one order, a JSON object, and is answered with one:

    {"order": "latency", "seconds": S, "think": T}   one request at a time on one connection, and between an
                                                     answer and the next request a random time from 0 to T
    {"order": "throughput", "seconds": S, "warm": W} all connections, each with WINDOW requests under way;
                                                     the first W seconds do not count
    {"order": "ceiling", "seconds": S}               the same against a server that does nothing: what this
                                                     process could take
    {"order": "counter"}                             the guest's counter, which must have grown by `answered`

All connections stay open from order to order, over the beginning and the end of protection.
"""

import contextlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
from typing import Any

CONNECTIONS = 16
# What is held until the end of an epoch has to be less than what may be under way, or clients wait for
# answers and the guest for requests: 4096 under way are 40,000 a second with epochs of 100 ms.
WINDOW = 256
CEILING_WARM_S = 0.1
PATIENCE_S = 60.0
TRY_S = 1.0

REQUEST = b"POST /increment HTTP/1.1\r\nHost: guest\r\n\r\n"
# As long as those of the guest.
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 7\r\n"
    b"Connection: keep-alive\r\n\r\n100000\n"
)
END_OF_HEAD = b"\r\n\r\n"


def connect(address: str, port: int) -> socket.socket:
    """A connection; waits until the guest is up."""
    given_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            made = socket.create_connection((address, port), TRY_S)
        except OSError:
            if time.monotonic() > given_up:
                raise
            time.sleep(0.05)
            continue
        made.settimeout(PATIENCE_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made


def ask(connection: socket.socket, request: bytes) -> bytes:
    """The body of one answer."""
    connection.sendall(request)
    answer = b""
    while True:
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the guest closed a connection")
        answer += part
        head, end, body = answer.partition(END_OF_HEAD)
        if end:
            length = int(head.partition(b"Content-Length: ")[2].split(b"\r", 1)[0])
            if len(body) >= length:
                if not head.startswith(b"HTTP/1.1 200 "):
                    raise ValueError(f"the guest answered {head!r}")
                return body


def latency(connection: socket.socket, seconds: float, think: float) -> dict[str, Any]:
    """Times in seconds, one for each request."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(random.uniform(0, think))
        start = time.monotonic_ns()
        ask(connection, REQUEST)
        times.append((time.monotonic_ns() - start) / 1e9)
    return {"answered": len(times), "times": times}


def throughput(connections: list[socket.socket], seconds: float, warm: float) -> dict[str, Any]:
    """Requests per second, from the last answers before the warm-up was over to the last ones of all.

    Answers come in bursts, one for each epoch: so both ends of what is measured are ends of a burst.
    """
    waiting = {each.fileno(): each for each in connections}
    under_way = dict.fromkeys(waiting, WINDOW)
    rest = dict.fromkeys(waiting, b"")
    epoll = select.epoll()
    for descriptor, connection in waiting.items():
        connection.setblocking(False)
        epoll.register(descriptor, select.EPOLLIN)
        connection.send(REQUEST * WINDOW)
    began = time.monotonic()
    counts, end, given_up = began + warm, began + warm + seconds, began + warm + seconds + PATIENCE_S
    answered = first = last = 0
    first_at = last_at = began
    busy = time.process_time()
    while any(under_way.values()):
        for descriptor, _ in epoll.poll(1.0):
            data = waiting[descriptor].recv(1 << 18)
            if not data:
                raise ConnectionError("the guest closed a connection")
            now = time.monotonic()
            data = rest[descriptor] + data
            count = data.count(END_OF_HEAD)
            rest[descriptor] = data[-len(END_OF_HEAD) + 1 :]
            answered += count
            if now < end:
                waiting[descriptor].send(REQUEST * count)
                last, last_at = answered, now
                if now < counts:
                    first, first_at = answered, now
            else:
                under_way[descriptor] -= count
        if time.monotonic() > given_up:
            raise TimeoutError("the guest does not answer")
    for connection in connections:
        connection.settimeout(PATIENCE_S)
    return {
        "answered": answered,
        "requests_per_s": (last - first) / (last_at - first_at) if last_at > first_at else 0.0,
        "client_cpu": (time.process_time() - busy) / (time.monotonic() - began),
    }


def serve(listening: socket.socket) -> None:
    """Answer whatever comes, without looking at it."""
    epoll = select.epoll()
    epoll.register(listening, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    rest: dict[int, int] = {}
    while True:
        for descriptor, _ in epoll.poll():
            if descriptor == listening.fileno():
                made, _ = listening.accept()
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[made.fileno()], rest[made.fileno()] = made, 0
                epoll.register(made, select.EPOLLIN)
                continue
            size = len(connections[descriptor].recv(1 << 18))
            if not size:
                return
            count, rest[descriptor] = divmod(rest[descriptor] + size, len(REQUEST))
            connections[descriptor].sendall(ANSWER * count)


def ceiling(seconds: float) -> dict[str, Any]:
    """The same load, on a server of this host."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                serve(listening)
            os._exit(0)
        try:
            connections = [connect(*listening.getsockname()) for _ in range(CONNECTIONS)]
            try:
                return throughput(connections, seconds, CEILING_WARM_S)
            finally:
                for connection in connections:
                    connection.close()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main() -> None:
    address, port = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 80
    single, *many = [connect(address, port) for _ in range(1 + CONNECTIONS)]
    print(json.dumps({"connected": len(many)}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        match order.pop("order"):
            case "latency":
                result = latency(single, **order)
            case "throughput":
                result = throughput(many, **order)
            case "ceiling":
                result = ceiling(**order)
            case "counter":
                result = {"counter": int(ask(single, b"GET /counter HTTP/1.1\r\nHost: guest\r\n\r\n"))}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        sys.exit(1)
