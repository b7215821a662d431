"""The receiver's two threads: what one has handed over is the other's, at once."""

import asyncio
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from unit.frame_builder import GENERATION, RAM, Spec, random_stream

from ftd import receiver
from ftd.disk import Copies
from ftd.errors import FrameError, HostError, LinkError
from ftd.frame import PartBufferPool
from ftd.journal import Journal
from ftd.link import Session
from ftd.receiver import Committed, Receiver
from ftd.shadow import Shadow


class Swift(queue.SimpleQueue[Any]):
    """A queue whose taker is always the quicker one: `put` returns when it has done with what was put."""

    def __init__(self) -> None:
        self._idle = receiver.threading.Semaphore(0)

    def get(self, *_: Any) -> Any:
        self._idle.release()
        return super().get()

    def put(self, item: Any, *_: Any) -> None:
        assert self._idle.acquire(timeout=10)
        super().put(item)
        if item is not None:
            assert self._idle.acquire(timeout=10)
            self._idle.release()


class Wire:
    """A session over which these parts come, and then no more."""

    def __init__(self, specs: list[Spec], end: Exception | None = None) -> None:
        self._parts = [spec.wire() for spec in specs]
        self._end = end or LinkError("the end")
        self.said: list[Any] = []

    def receive_part(self, allocate: Any) -> memoryview:
        if not self._parts:
            raise self._end
        part = self._parts.pop(0)
        view: memoryview = allocate(len(part))
        view[:] = part
        return view

    def post(self, message: Any) -> None:
        self.said.append(message)


Failed = list[tuple[str, bool]]


@pytest.fixture
def shadow(tmp_path: Path) -> Iterator[Shadow]:
    memory = tmp_path / "ram"
    memory.write_bytes(bytes(RAM.max_length))
    made = Shadow({RAM.name: memory}, generation=GENERATION)
    made.begin_sync(GENERATION)
    yield made
    made.close()


def receiving(
    wire: Wire,
    shadow: Shadow,
    pool: PartBufferPool,
    committed: list[Committed],
    failed: Failed,
    copies: Copies,
) -> Receiver:
    return Receiver(
        cast(Session, wire),
        shadow,
        pool,
        generation=GENERATION,
        memory_limit=1 << 30,
        on_committed=committed.append,
        on_received=lambda size: None,
        on_verified=lambda result: None,
        on_failed=lambda reason, disk: failed.append((reason, disk)),
        on_applied=lambda epoch, seconds: None,
        copies=copies,
    )


@pytest.mark.parametrize("seed", range(3))
async def test_a_frame_that_is_applied_at_once_is_counted_all_the_same(
    seed: int, shadow: Shadow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "queue", SimpleNamespace(SimpleQueue=Swift))
    specs, states = random_stream(seed)
    wire, pool = Wire(specs), PartBufferPool(64 << 20)
    committed: list[Committed] = []
    failed: Failed = []
    await receiving(wire, shadow, pool, committed, failed, Copies([])).drain()
    await asyncio.sleep(0)  # what the threads have called is called
    assert failed == []
    assert [frame.epoch for frame in committed] == list(states)
    assert [message.epoch for message in wire.said] == list(states)
    assert pool.lent == 0
    assert (tmp_path / "ram").read_bytes() == states[committed[-1].epoch][RAM.name]


async def test_what_was_acknowledged_is_applied_though_something_else_is_refused_meanwhile(
    shadow: Shadow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stalls fills the buffers, until the receiver has no room: the primary may die just then."""
    specs, states = random_stream(0)
    stalls, apply = threading.Event(), Shadow.apply

    def slow(self: Shadow, frame: Any) -> None:
        assert stalls.wait(10)
        apply(self, frame)

    monkeypatch.setattr(Shadow, "apply", slow)
    wire = Wire(specs, FrameError("size of the part is 9: expected at most 0"))
    pool = PartBufferPool(64 << 20)
    failed: Failed = []
    one = receiving(wire, shadow, pool, [], failed, Copies([]))
    async with asyncio.timeout(10):
        while not failed:  # noqa: ASYNC110 - the other thread says it
            await asyncio.sleep(0.001)
    assert failed == [("a frame was refused: size of the part is 9: expected at most 0", False)]
    stalls.set()
    await one.drain()
    assert shadow.committed_epoch == wire.said[-1].epoch == max(states)
    assert shadow.takeover_refusal() is None
    assert (tmp_path / "ram").read_bytes() == states[max(states)][RAM.name]
    assert pool.lent == 0


class Broken(Copies):
    """Disks that take so many journals and then no more."""

    def __init__(self, journals: int, error: Exception) -> None:
        super().__init__([])
        self._left = journals
        self._error = error

    def apply(self, journal: Journal) -> bool:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().apply(journal)


@pytest.mark.parametrize(
    ("error", "why", "disk"),
    [
        (HostError("disk vda (/d): full"), "disk vda (/d): full", True),
        (IndexError("none"), "applying failed: IndexError: none", False),
    ],
)
async def test_what_cannot_be_applied_poisons_the_shadow_whatever_it_is(
    shadow: Shadow, error: Exception, why: str, disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not somebody looks at failures any more; and nothing that follows is acknowledged."""
    monkeypatch.setattr(receiver, "queue", SimpleNamespace(SimpleQueue=Swift))
    specs, states = random_stream(0)
    wire, pool = Wire(specs), PartBufferPool(64 << 20)
    failed: Failed = []
    journals = sum(spec.epoch == min(states) for spec in specs)
    await receiving(wire, shadow, pool, [], failed, Broken(journals, error)).drain()
    await asyncio.sleep(0)
    assert [message.epoch for message in wire.said] == [min(states), min(states) + 1]
    assert shadow.committed_epoch == min(states)
    assert shadow.takeover_refusal() == why
    assert failed[0] == (why, disk)
    assert pool.lent == 0


async def test_an_older_epoch_than_the_last_acknowledged_is_never_started(
    shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its frame came to be lost."""
    specs, states = random_stream(0)
    apply = Receiver._apply

    def forgetful(self: Receiver, item: Any) -> Any:
        return item if getattr(item, "epoch", 0) == max(states) else apply(self, item)

    monkeypatch.setattr(Receiver, "_apply", forgetful)
    await receiving(Wire(specs), shadow, PartBufferPool(64 << 20), [], [], Copies([])).drain()
    last = max(states)
    assert shadow.takeover_refusal() == (
        f"epoch {last} was acknowledged, and only epoch {last - 1} is applied: the guest would forget what "
        "it has said"
    )
    shadow.begin_sync(GENERATION + 1)
    assert "no epoch was committed" in (shadow.takeover_refusal() or "")
