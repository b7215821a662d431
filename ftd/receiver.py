"""The receiver: the two threads that turn bytes from the primary into the shadow.

    receiver thread    receive a part → verify → whole frame? → check → acknowledge ─┐ queue
    applier thread                                apply → verify digests → free ◄────┘

A frame is acknowledged when it is held wholly in memory, verified, and known to fit (rule S4). It is applied
after that, in order. The queue between the threads is bounded by the receive buffers: a backup that applies
too slowly stops to read, and TCP slows the primary down.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ftd import log
from ftd.assembly import Frame, FrameAssembler
from ftd.channel import prefer_this_thread
from ftd.errors import FrameError, FtdError, friendly
from ftd.frame import PAGE_SIZE, Part, PartBuffer, PartBufferPool
from ftd.link import Session
from ftd.messages import MAX_DIFFERENCES, Ack, Difference, VerifyResult
from ftd.shadow import Shadow

_log = log.get(__name__)


@dataclass(frozen=True)
class Committed:
    """A frame was acknowledged. first: it completed the copy. size: bytes."""

    epoch: int
    size: int
    first: bool


class Receiver:
    """Receives one session into one shadow. Made in the event loop.

    Called in the event loop: `on_committed` for each acknowledged frame, `on_received(bytes)` for each part,
    `on_verified` for each comparison, `on_failed(reason)` once if what came cannot be used; it is the caller
    that ends the session then.
    """

    def __init__(
        self,
        session: Session,
        shadow: Shadow,
        pool: PartBufferPool,
        *,
        generation: int,
        memory_limit: int,
        on_committed: Callable[[Committed], None],
        on_received: Callable[[int], None],
        on_verified: Callable[[VerifyResult], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._session = session
        self._shadow = shadow
        self._pool = pool
        # Parts of an incomplete frame come out of the pool as well: leave room for the next one.
        self._assembler = FrameAssembler(generation, limit=pool.limit * 3 // 4, memory_limit=memory_limit)
        self._on_committed = on_committed
        self._on_received = on_received
        self._on_verified = on_verified
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Frame | Part | None] = queue.SimpleQueue()
        self._failed = False
        self._threads = [
            threading.Thread(target=self._receive, name="ftd-receiver", daemon=True),
            threading.Thread(target=self._apply_all, name="ftd-applier", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    async def drain(self) -> None:
        """Return when all that was acknowledged is applied. The session must have ended."""
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    # ---- receiver thread ----------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                self._receive_one()
        except FrameError as error:
            self._fail(f"a frame was refused: {error}")
        except FtdError as error:
            _log.debug("receiver ends", reason=friendly(error))
        except Exception as error:
            self._fail(f"receiving failed: {friendly(error)}")
        finally:
            self._assembler.close()
            self._queue.put(None)

    def _receive_one(self) -> None:
        lent: list[PartBuffer] = []

        def allocate(length: int) -> memoryview:
            lent.append(self._pool.acquire(length))
            return lent[-1].view

        try:
            view = self._session.receive_part(allocate)
        except BaseException:
            for buffer in lent:
                buffer.release()
            raise
        size = len(view)
        part = Part.from_wire(view, on_release=lent[0].release)
        del view
        syncing = self._assembler.syncing
        result = self._assembler.feed(part)
        if isinstance(result, Frame):
            self._shadow.check(result)
            self._session.post(
                Ack(
                    generation=result.generation,
                    epoch=result.epoch,
                    part_count=len(result.parts),
                    bytes=result.nbytes,
                )
            )
            # In this order: a takeover that begins now waits for the queue, and finds the frame there.
            self._queue.put(result)
            self._call(self._on_committed, Committed(result.epoch, result.nbytes, syncing))
            if syncing:
                prefer_this_thread()  # from now on the primary's clients wait for what this thread does
        elif result is not None:
            self._queue.put(result)
        # Last: it wakes the event loop, which then competes with this thread for the interpreter.
        self._call(self._on_received, size)

    # ---- applier thread -----------------------------------------------------------------------------------

    def _apply_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if not self._failed:
                    self._apply(item)
            except Exception as error:
                # The shadow is poisoned, and refuses takeover.
                self._fail(f"applying failed: {friendly(error)}")
            finally:
                item.release()

    def _apply(self, item: Frame | Part) -> None:
        if isinstance(item, Part):
            self._shadow.apply_live(item)
            return
        self._shadow.apply(item)
        if not item.digests.size:
            return
        differences = self._shadow.verify(item, limit=MAX_DIFFERENCES)
        if differences:
            first = differences[0]
            self._shadow.poison(
                f"after epoch {item.epoch} its memory differs from the guest's "
                f"in {len(differences)} pages, first page {first.page} of block {first.block}"
            )
        pages = sum(block.used_length // PAGE_SIZE for block in item.blocks)
        result = VerifyResult(
            epoch=item.epoch,
            ok=not differences,
            pages=pages,
            differing=len(differences),
            differences=[Difference(block=d.block, page=d.page) for d in differences],
        )
        self._session.post(result)
        self._call(self._on_verified, result)

    # ---- both ---------------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._call(self._on_failed, reason)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the daemon is on its way out
            _log.debug("nobody left to tell", what=getattr(function, "__name__", "callback"))
