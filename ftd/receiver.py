"""The receiver: the two threads that turn bytes from the primary into the shadow.

    receiver thread    receive a part → verify → whole frame? → check → acknowledge ─┐ queue
    applier thread                                apply → verify digests → free ◄────┘

A frame is acknowledged when it is held wholly in memory, verified, and known to fit (rule S4). It is applied
after that, in order, whatever comes after it: a frame that is refused ends the session, and no more. Only if
applying itself fails is the rest left out, and the shadow is poisoned then. The queue between the threads is
bounded by the receive buffers: a backup that applies too slowly stops to read, and TCP slows the primary
down.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ftd import disksync, log
from ftd.assembly import SHARE_OF_BUFFERS, Frame, FrameAssembler
from ftd.channel import prefer_this_thread
from ftd.disk import Copies
from ftd.errors import FrameError, FtdError, HostError, friendly
from ftd.frame import PAGE_SIZE, Part, PartBuffer, PartBufferPool
from ftd.journal import Journal, is_chunks, parse_chunks
from ftd.link import Session
from ftd.messages import (
    MAX_DIFFERENCES,
    Ack,
    Difference,
    DiskDigestsWanted,
    VerifyResult,
)
from ftd.shadow import Shadow

_log = log.get(__name__)


@dataclass(frozen=True)
class Committed:
    """A frame was acknowledged. first: it completed the copy. size: bytes; requests: to its disks."""

    epoch: int
    size: int
    first: bool
    requests: int
    journal_bytes: int


@dataclass(frozen=True)
class _Chunks:
    """Pieces of disks, during a copy."""

    journal: Journal
    buffer: PartBuffer

    def release(self) -> None:
        self.buffer.release()


@dataclass(frozen=True)
class _Question:
    """What the primary wants to know of a disk, once all that came before is applied."""

    wanted: DiskDigestsWanted

    def release(self) -> None:
        """Nothing was lent."""


class Receiver:
    """Receives one session into one shadow. Made in the event loop.

    Called in the event loop: `on_committed` for each acknowledged frame, `on_received(bytes)` for each part,
    `on_verified` for each comparison, `on_applied(epoch, seconds)` when a frame was applied so long after its
    acknowledgement, `on_failed(reason, disk)` once if what came cannot be used; it is the caller that ends
    the session then. disk: whether it is this host's disk that failed.
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
        on_verified: Callable[[VerifyResult], object],
        on_failed: Callable[[str, bool], None],
        on_applied: Callable[[int, float], None],
        copies: Copies,
        replicate: Literal["committed", "early", "never"] = "committed",
        after: int | None = None,
    ) -> None:
        """after: the epoch that the shadow is equal to, if the session goes on from there."""
        self._session = session
        self._shadow = shadow
        self._pool = pool
        # Parts of an incomplete frame come out of the pool as well: leave room for the next one.
        part, whole = SHARE_OF_BUFFERS
        self._assembler = FrameAssembler(
            generation, limit=pool.limit * part // whole, memory_limit=memory_limit, after=after
        )
        self._on_committed = on_committed
        self._on_received = on_received
        self._on_verified = on_verified
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._on_applied = on_applied
        self._generation = generation
        self._copies = copies
        self._sizes = copies.sizes
        self._replicate = replicate
        self._late: Frame | None = None  # for tests: a frame whose disks are applied and whose memory is not
        self._acknowledged: dict[int, float] = {}  # when frames were, monotonic; until they are applied
        self._queue: queue.SimpleQueue[Frame | Part | _Chunks | _Question | None] = queue.SimpleQueue()
        self._spoiled = False  # the applier's: something could not be applied, nor can what comes after it
        self._threads = [
            threading.Thread(target=self._receive, name="ftd-receiver", daemon=True),
            threading.Thread(target=self._apply_all, name="ftd-applier", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, wanted: DiskDigestsWanted) -> None:
        """Have the primary's question answered."""
        self._queue.put(_Question(wanted))

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
        syncing = self._assembler.syncing
        if is_chunks(view):
            self._receive_chunks(view, lent[0], syncing)
            self._call(self._on_received, size)
            return
        part = Part.from_wire(view, on_release=lent[0].release)
        del view
        result = self._assembler.feed(part)
        if isinstance(result, Frame):
            self._shadow.check(result)
            for each in result.parts:
                each.journal.check(self._sizes)
            if self._spoiled:
                result.release()
                raise FrameError("what came before it could not be applied: it is not acknowledged")
            self._acknowledged[result.epoch] = time.monotonic()
            if self._replicate != "early":  # which leaves the memory behind on purpose
                self._shadow.acknowledge(result.epoch)
            self._session.post(
                Ack(
                    generation=result.generation,
                    epoch=result.epoch,
                    part_count=len(result.parts),
                    bytes=result.nbytes,
                )
            )
            committed = Committed(
                result.epoch,
                result.nbytes,
                syncing,
                sum(len(each.journal) for each in result.parts),
                sum(each.journal.nbytes for each in result.parts),
            )
            # In this order: a takeover that begins now waits for the queue, and finds the frame there. From
            # then on the frame is the applier's, which may be done with it before the next line.
            self._queue.put(result)
            self._call(self._on_committed, committed)
            if syncing:
                prefer_this_thread()  # from now on the primary's clients wait for what this thread does
        elif result is not None:
            result.journal.check(self._sizes)
            self._queue.put(result)
        # Last: it wakes the event loop, which then competes with this thread for the interpreter.
        self._call(self._on_received, size)

    def _receive_chunks(self, view: memoryview, buffer: PartBuffer, syncing: bool) -> None:
        if not syncing:
            buffer.release()
            raise FrameError("pieces of disks came while the shadow is complete: expected frames only")
        try:
            journal = parse_chunks(view, self._generation)
            journal.check(self._sizes)
        except FrameError:
            buffer.release()
            raise
        self._queue.put(_Chunks(journal, buffer))

    # ---- applier thread -----------------------------------------------------------------------------------

    def _apply_all(self) -> None:
        while (item := self._queue.get()) is not None:
            finished: Frame | Part | _Chunks | _Question | None = item
            try:
                if not self._spoiled:
                    finished = self._apply(item)
            except HostError as error:
                self._spoil(friendly(error), disk=True)
            except Exception as error:
                self._spoil(f"applying failed: {friendly(error)}")
            finally:
                if finished is not None:
                    finished.release()
        if self._late is not None:
            self._late.release()

    def _spoil(self, reason: str, *, disk: bool = False) -> None:
        self._spoiled = True
        self._shadow.poison(reason)
        self._fail(reason, disk=disk)

    def _apply(self, item: Frame | Part | _Chunks | _Question) -> Frame | Part | _Chunks | _Question | None:
        """Apply what came, and return what is done with."""
        if isinstance(item, _Question):
            # Somebody may wait for what comes after it, in order to take over.
            if self._session.lost is None:
                epoch = self._shadow.committed_epoch or 0
                self._session.post(disksync.answer(item.wanted, self._copies.images, epoch))
        elif isinstance(item, _Chunks):
            self._copies.apply(item.journal)
        elif isinstance(item, Part):
            self._shadow.apply_live(item)
            self._copies.apply(item.journal)
        else:
            if self._replicate != "never":
                for part in item.parts:
                    self._copies.apply(part.journal)
            if self._replicate == "early" and self._shadow.committed_epoch is not None:
                before, self._late = self._late, item
                if before is None:
                    return None
                item = before
            self._apply_frame(item)
        return item

    def _apply_frame(self, item: Frame) -> None:
        self._shadow.apply(item)
        at = self._acknowledged.pop(item.epoch, None)
        if at is not None:
            self._call(self._on_applied, item.epoch, time.monotonic() - at)
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

    def _fail(self, reason: str, *, disk: bool = False) -> None:
        self._call(self._on_failed, reason, disk)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the daemon is on its way out
            _log.debug("nobody left to tell", what=getattr(function, "__name__", "callback"))
