"""Clients of the Linux guest: they count, and write down everything that they see.

    python -m testbed.client count ADDRESS --history FILE    HTTP increments over keep-alive connections
    python -m testbed.client stream ADDRESS --history FILE   numbered lines over one TCP connection
    python -m testbed.client udp ADDRESS --history FILE      datagrams
    python -m testbed.client ping ADDRESS --history FILE     ICMP echo requests; needs root
    python -m testbed.client all ADDRESS --history FOLDER    all of these in one process, each with its file

Each runs until SIGTERM or SIGINT (or --duration), and ends once the requests in flight are answered or timed
out. CounterClient runs one of these inside the client's namespace, as a process of its own: so what it
measures does not depend on how busy the test is.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import aiohttp

from testbed.history import History, Kind, Request, Sample, read_samples
from testbed.hosts import GUEST_ADDRESS, Node, TestbedError
from testbed.namespaces import http_session

HTTP_PORT = 80
ECHO_PORT = 7000
# TCP sends again after 0.2, 0.4, 0.8 … s: within this a takeover is over, and an answer comes or never will.
REQUEST_TIMEOUT_S = 30.0


class HttpError(Exception):
    """The answer is not what the guest's service says."""


class Connection:
    """One keep-alive HTTP connection. By hand, because a library would hide resets by asking again."""

    def __init__(self, address: str, port: int) -> None:
        self._address, self._port = address, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.number = 0

    async def ask(self, method: str, target: str) -> str:
        """Ask on the connection there is, or on a new one after an error."""
        if self._writer is None:
            self.number += 1
            self._reader, self._writer = await asyncio.open_connection(self._address, self._port)
        assert self._reader is not None
        self._writer.write(f"{method} {target} HTTP/1.1\r\nHost: guest\r\nContent-Length: 0\r\n\r\n".encode())
        await self._writer.drain()
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
        }
        body = (await self._reader.readexactly(int(headers["content-length"]))).decode()
        if head[0].split()[1] != "200":
            raise HttpError(f"{head[0]}: {body.strip()}")
        if headers.get("connection", "").lower() == "close":
            self.abandon()
        return body

    def abandon(self) -> None:
        """Forget the connection; the next question opens a new one."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


def _error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def count(
    worker: int,
    address: str,
    port: int,
    out: TextIO,
    stop: asyncio.Event,
    *,
    interval_s: float,
    reconnect: bool,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> None:
    """One client: request after request until `stop`; ends at the first error unless it may reconnect."""
    connection = Connection(address, port)
    while not stop.is_set():
        start = time.monotonic_ns()
        value = error = None
        try:
            async with asyncio.timeout(timeout_s):
                value = int(await connection.ask("POST", "/increment"))
        except (OSError, EOFError, TimeoutError, ValueError, HttpError) as raised:
            error = _error(raised)
            connection.abandon()
        kind: Kind = "increment"
        made = Request(kind, worker, connection.number, start, time.monotonic_ns(), value, error)
        out.write(made.line() + "\n")
        if error is not None and not reconnect:
            return
        if interval_s or error is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(interval_s, 0.05 if error else 0.0))
    connection.abandon()


async def stream(
    address: str,
    port: int,
    out: TextIO,
    stop: asyncio.Event,
    *,
    interval_s: float,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> None:
    """Numbered lines over one connection; ends at the first error."""
    reader, writer = await asyncio.open_connection(address, port)
    number = 0
    while not stop.is_set():
        number += 1
        start = time.monotonic_ns()
        value = error = None
        try:
            async with asyncio.timeout(timeout_s):
                writer.write(f"line-{number}\n".encode())
                await writer.drain()
                text, _, told = (await reader.readuntil(b"\n")).decode().strip().rpartition(" ")
            if text != f"line-{number}":
                raise ValueError(f"answer to another line: {text}")
            value = int(told)
        except (OSError, EOFError, TimeoutError, ValueError) as raised:
            error = _error(raised)
        out.write(Sample("stream", number, start, time.monotonic_ns(), value, error).line() + "\n")
        if error is not None:
            return
        await asyncio.sleep(interval_s)
    writer.transport.abort()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.sent: dict[str, int] = {}

    def datagram_received(self, data: bytes, addr: object) -> None:
        now = time.monotonic_ns()
        text, _, told = data.decode(errors="replace").rpartition(" ")
        if (start := self.sent.pop(text, None)) is not None:
            self.out.write(Sample("udp", int(text), start, now, int(told)).line() + "\n")

    def error_received(self, exc: Exception) -> None:
        """No route for a moment: a datagram that is lost, like others."""


async def udp(address: str, port: int, out: TextIO, stop: asyncio.Event, *, interval_s: float) -> None:
    """Datagrams at an interval; those never answered are not recorded."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: _Datagrams(out), remote_addr=(address, port)
    )
    number = 0
    while not stop.is_set():
        number += 1
        protocol.sent[str(number)] = time.monotonic_ns()
        transport.sendto(str(number).encode())
        await asyncio.sleep(interval_s)
    transport.close()


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


async def ping(address: str, out: TextIO, stop: asyncio.Event, *, interval_s: float) -> None:
    """Echo requests at an interval; those never answered are not recorded."""
    loop = asyncio.get_running_loop()
    own = os.getpid() & 0xFFFF
    sent: dict[int, int] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.setblocking(False)
        raw.connect((address, 0))

        def read() -> None:
            packet = raw.recv(2048)
            now = time.monotonic_ns()
            # After the IP header, which has 20 bytes here: type, code, checksum, identifier, number, data.
            kind, _, _, identifier, _, number = struct.unpack_from("!BBHHHQ", packet, 20)
            if kind == 0 and identifier == own and (start := sent.pop(number, None)) is not None:
                out.write(Sample("ping", number, start, now, number).line() + "\n")

        loop.add_reader(raw, read)
        number = 0
        while not stop.is_set():
            number += 1
            sent[number] = time.monotonic_ns()
            body = struct.pack("!HHQ", own, number & 0xFFFF, number)
            packet = struct.pack("!BBH", 8, 0, _checksum(b"\x08\x00\x00\x00" + body)) + body
            with contextlib.suppress(OSError):  # no route for a moment: one that is lost, like others
                raw.send(packet)
            await asyncio.sleep(interval_s)
        loop.remove_reader(raw)


async def _main(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.duration:
        loop.call_later(options.duration, stop.set)
    history = Path(options.history or "/dev/stdout")
    if options.probe == "all":
        await _all(options, history, stop)
        return
    with history.open("w", buffering=1) as out:  # noqa: ASYNC230
        port = options.port or (HTTP_PORT if options.probe == "count" else ECHO_PORT)
        if options.probe == "count":
            workers = (
                count(
                    worker,
                    options.address,
                    port,
                    out,
                    stop,
                    interval_s=options.interval,
                    reconnect=options.reconnect,
                    timeout_s=options.timeout,
                )
                for worker in range(options.connections)
            )
            await asyncio.gather(*workers)
            return
        interval_s = options.interval or 0.005
        match options.probe:
            case "stream":
                await stream(
                    options.address, port, out, stop, interval_s=interval_s, timeout_s=options.timeout
                )
            case "udp":
                await udp(options.address, port, out, stop, interval_s=interval_s)
            case "ping":
                await ping(options.address, out, stop, interval_s=interval_s)


# Gentle: for hours, beside daemons and guests that share the processors.
ALL_INTERVALS_S = {"count": 0.02, "stream": 0.02, "udp": 0.02, "ping": 0.05}


async def _all(options: argparse.Namespace, folder: Path, stop: asyncio.Event) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240
    address, timeout_s = options.address, options.timeout
    with contextlib.ExitStack() as stack:
        out = {
            probe: stack.enter_context((folder / probe).open("w", buffering=1)) for probe in ALL_INTERVALS_S
        }
        await asyncio.gather(
            *(
                count(
                    worker,
                    address,
                    HTTP_PORT,
                    out["count"],
                    stop,
                    interval_s=ALL_INTERVALS_S["count"],
                    reconnect=options.reconnect,
                    timeout_s=timeout_s,
                )
                for worker in range(options.connections)
            ),
            stream(
                address,
                ECHO_PORT,
                out["stream"],
                stop,
                interval_s=ALL_INTERVALS_S["stream"],
                timeout_s=timeout_s,
            ),
            udp(address, ECHO_PORT, out["udp"], stop, interval_s=ALL_INTERVALS_S["udp"]),
            ping(address, out["ping"], stop, interval_s=ALL_INTERVALS_S["ping"]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="testbed.client", description="Counts through the guest.")
    parser.add_argument("probe", choices=("count", "stream", "udp", "ping", "all"))
    parser.add_argument("address")
    parser.add_argument("--port", type=int, help="default: 80 to count, else 7000")
    parser.add_argument("--history", help="file for the JSON lines; default: standard output")
    parser.add_argument("--connections", type=int, default=1, help="how many count at once")
    parser.add_argument(
        "--interval", type=float, default=0.0, help="seconds from an answer to the next request"
    )
    parser.add_argument("--duration", type=float, default=0.0, help="seconds; default: until a signal")
    parser.add_argument("--timeout", type=float, default=REQUEST_TIMEOUT_S, help="seconds for an answer")
    parser.add_argument("--reconnect", action="store_true", help="go on after an error, on a new connection")
    asyncio.run(_main(parser.parse_args()))


class CounterClient:
    """Runs `testbed.client` in a node's namespace."""

    module = "testbed.client"

    def __init__(
        self,
        node: Node,
        history: Path,
        *,
        address: str = GUEST_ADDRESS,
        probe: str = "count",
        connections: int = 1,
        interval_s: float = 0.0,
        reconnect: bool = False,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self.node, self.path, self.address, self.probe = node, history, address, probe
        self._arguments = [probe, address, "--history", str(history), "--connections", str(connections)]
        self._arguments += [
            "--interval",
            str(interval_s),
            "--timeout",
            str(timeout_s),
            *(["--reconnect"] if reconnect else []),
        ]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start counting."""
        folder = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": folder}
        argv = [sys.executable, "-m", self.module, *self._arguments]
        self._process = await self.node.run(argv, env=environment)

    async def stop(self, timeout_s: float = REQUEST_TIMEOUT_S + 5) -> None:
        """Let it finish what is in flight, and end it."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            self._process.kill()
            raise TestbedError(f"the client does not end within {timeout_s:g} s") from None

    def history(self) -> History:
        """What it recorded so far, if it counts."""
        return History.read(self.path) if self.path.exists() else History(())

    def samples(self) -> list[Sample]:
        """What it recorded so far, if it does not count but streams, sends datagrams or pings."""
        return read_samples(self.path) if self.path.exists() else []

    def _recorded(self) -> Sequence[Request | Sample]:
        return self.history().requests if self.probe == "count" else self.samples()

    async def wait_answers(self, count: int, timeout_s: float, *, after_ns: int = 0) -> None:
        """Wait until so many answers came to requests that began after `after_ns`."""
        deadline = time.monotonic() + timeout_s
        while True:
            recorded = self._recorded()
            if sum(each.value is not None and each.start_ns > after_ns for each in recorded) >= count:
                return
            if self._process is None or self._process.returncode is not None:
                errors = [each.error for each in recorded if each.error is not None]
                raise TestbedError(f"the client ({self.probe}) has ended: {errors[-1:]}")
            if time.monotonic() > deadline:
                raise TestbedError(
                    f"the guest at {self.address} gave fewer than {count} answers to {self.probe} "
                    f"in {timeout_s:g} s"
                )
            await asyncio.sleep(0.05)


async def read_counter(node: Node, address: str = GUEST_ADDRESS, timeout_s: float = REQUEST_TIMEOUT_S) -> int:
    """The guest's counter, asked on a new connection; retried until the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            async with (
                http_session(node.namespace, 3.0) as session,
                session.get(f"http://{address}/counter") as answer,
            ):
                return int(await answer.text())
        except (OSError, TimeoutError, aiohttp.ClientError) as error:
            if time.monotonic() > deadline:
                raise TestbedError(f"the guest at {address} does not answer: {_error(error)}") from error
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
