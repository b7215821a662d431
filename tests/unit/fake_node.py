"""A node that is only a status: what the HTTP side and the command line talk to in their tests."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ftd import http
from ftd.metrics import Metrics
from ftd.state import PairState
from ftd.status import (
    Done,
    EpochStatus,
    OutputStatus,
    PauseStatus,
    PeerFlight,
    PeerStatus,
    QemuStatus,
    Status,
    SyncStatus,
    TakeoverStatus,
    VerifyReport,
)

PROTECTED = Status(
    node="alpha",
    version="1.2.3",
    role="primary",
    state=PairState.PROTECTED,
    reason="first epoch committed",
    state_seconds=12.5,
    uptime=3700.0,
    generation=7,
    epoch=EpochStatus(current=42, committed=41, begun=42, length=0.05, configured=0.02, stretch=2.5),
    sync=SyncStatus(progress=1.0, seconds=3.25),
    in_flight_bytes=3 * 1024 * 1024,
    peer=PeerStatus(address="10.0.0.2", connected=True, heartbeat_age=0.012),
    output=OutputStatus(holding=True, held_packets=3, held_bytes=2048),
    pause=PauseStatus(count=1000, p50=0.0008, p99=0.0021),
    qemu=QemuStatus(pid=4711, version="10.0.13", accelerator="kvm", tracker="generic", running=True),
    takeover=TakeoverStatus(
        at="2026-01-02T03:04:05Z", trigger="silence", epoch=9, detection=0.3, activation=0.02, total=0.32
    ),
    last_verify=VerifyReport(epoch=40, ok=True, pages=65536),
    warnings=["no arbiter [red]really[/red]"],
)


class FakeNode:
    """Implements StatusSource; tests set what it says. `verification` is returned, or raised."""

    def __init__(self, status: Status = PROTECTED) -> None:
        self.now = status
        self.unhealthy: str | None = None
        self.verification: VerifyReport | Exception = VerifyReport(epoch=42, ok=True, pages=65536)
        self.flight: PeerFlight | Exception = PeerFlight(node="beta", lines="")
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.begun = asyncio.Event()
        self.wait_for: asyncio.Event | None = None

    def status(self) -> Status:
        return self.now

    def why_unhealthy(self) -> str | None:
        return self.unhealthy

    async def verify(self) -> VerifyReport:
        self.begun.set()
        if self.wait_for is not None:
            await self.wait_for.wait()
        if isinstance(self.verification, Exception):
            raise self.verification
        return self.verification

    async def peer_flight(self) -> PeerFlight:
        if isinstance(self.flight, Exception):
            raise self.flight
        return self.flight

    async def control(self, action: str, arguments: Mapping[str, Any]) -> Done:
        if isinstance(self.verification, Exception):
            raise self.verification
        self.asked.append((action, dict(arguments)))
        return Done(detail=f"{action} is done")


@contextmanager
def serving(node: FakeNode) -> Iterator[str]:
    """Serves the node from a thread, for programs that are run from outside; yields its URL."""
    ready = threading.Event()
    urls: list[str] = []
    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        server = await http.serve(http.create_app(node, Metrics()), "127.0.0.1", 0)
        stop = asyncio.Event()
        stops.append((asyncio.get_running_loop(), stop))
        urls.append(f"http://127.0.0.1:{server.port}")
        ready.set()
        await stop.wait()
        await server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield urls[0]
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
