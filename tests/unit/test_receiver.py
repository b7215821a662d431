"""The receiver's two threads: what one has handed over is the other's, at once."""

import asyncio
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from unit.frame_builder import GENERATION, RAM, Spec, random_stream

from ftd import receiver
from ftd.disk import Copies
from ftd.errors import LinkError
from ftd.frame import PartBufferPool
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

    def __init__(self, specs: list[Spec]) -> None:
        self._parts = [spec.wire() for spec in specs]
        self.said: list[Any] = []

    def receive_part(self, allocate: Any) -> memoryview:
        if not self._parts:
            raise LinkError("the end")
        part = self._parts.pop(0)
        view: memoryview = allocate(len(part))
        view[:] = part
        return view

    def post(self, message: Any) -> None:
        self.said.append(message)


@pytest.mark.parametrize("seed", range(3))
async def test_a_frame_that_is_applied_at_once_is_counted_all_the_same(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "queue", SimpleNamespace(SimpleQueue=Swift))
    specs, states = random_stream(seed)
    memory = tmp_path / "ram"
    memory.write_bytes(bytes(RAM.max_length))
    shadow = Shadow({RAM.name: memory}, generation=GENERATION)
    shadow.begin_sync(GENERATION)
    wire, pool = Wire(specs), PartBufferPool(64 << 20)
    committed: list[Committed] = []
    failed: list[str] = []
    one = Receiver(
        cast(Session, wire),
        shadow,
        pool,
        generation=GENERATION,
        memory_limit=1 << 30,
        on_committed=committed.append,
        on_received=lambda size: None,
        on_verified=lambda result: None,
        on_failed=lambda reason, disk: failed.append(reason),
        on_applied=lambda epoch, seconds: None,
        copies=Copies([]),
    )
    await one.drain()
    await asyncio.sleep(0)  # what the threads have called is called
    assert failed == []
    assert [frame.epoch for frame in committed] == list(states)
    assert [message.epoch for message in wire.said] == list(states)
    assert pool.lent == 0
    assert memory.read_bytes() == states[committed[-1].epoch][RAM.name]
    shadow.close()
