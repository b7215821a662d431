"""The comparison of the disks of both sides, block for block, while the guest writes to them.

No pause is longer for it, and no write waits. For each piece of a disk:

    read it here ── until the running epoch is committed ── the backup's digests, as of an epoch E
                                  repeat over what was read what the journals up to E say ── compare

What was read holds all requests of the epochs before, whose journals were closed with their requests made,
and any part of the requests of the epochs that ran meanwhile. Repeating the journals of these, in order, and
those up to E, makes of it the disk at the end of epoch E, exactly; and so has the backup's to be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from ftd import log
from ftd.disk import BLOCK, CHUNK, Image, digest, zero_digest
from ftd.disksync import Questions
from ftd.errors import HostError, LinkError, friendly
from ftd.frame import Bytes, journal_in
from ftd.journal import Journal, Request, RequestKind
from ftd.messages import MAX_DIFFERENCES, DiskDifference, DiskVerifyResult

_log = log.get(__name__)

MOST_CHUNKS = 64
"""Chunks of a piece; the most that a question may ask for."""
MOST_DATA = 8 * CHUNK
"""Bytes of a piece that are no hole: so much is read at once, here and there."""
AT_ONCE = 3
"""Pieces that are compared at the same time: each waits for two epochs or so."""
ASK_AGAIN_SECONDS = 0.005


@dataclass
class _Piece:
    """Chunks of a disk that are being compared."""

    disk: int
    offsets: list[int]
    # What they held here, with what was written since as far as it was repeated; None for a hole.
    contents: dict[int, bytearray | None] = field(default_factory=dict)
    # Requests that are to be repeated, cut to chunks: (epoch, offset of the chunk, request).
    written: list[tuple[int, int, Request]] = field(default_factory=list)


class DiskVerifier:
    """Compares the backup's disks with `images`, in the order of the disks' numbers. For the event loop.

    epoch() is the one that the guest is in, or the one before; wait_committed(epoch) returns when that is.
    `on_journal` has to be told of every journal that is closed, from when `run` is called until it returns.
    """

    def __init__(
        self,
        images: Sequence[Image],
        questions: Questions,
        *,
        epoch: Callable[[], int],
        wait_committed: Callable[[int], Awaitable[None]],
    ) -> None:
        self._images = images
        self._questions = questions
        self._epoch = epoch
        self._wait_committed = wait_committed
        self._pieces: list[_Piece] = []  # that are being compared
        self._newest = self._blocks = self._differing = 0
        self._differences: list[DiskDifference] = []

    def on_journal(self, epoch: int, journal: Journal) -> None:
        """Note what the guest wrote to the pieces that are being compared."""
        for piece in self._pieces:
            first, wanted = piece.offsets[0], set(piece.offsets)
            for request in journal.within(piece.disk, first, piece.offsets[-1] + CHUNK - first):
                end = request.offset + request.length
                for chunk in range(request.offset // CHUNK * CHUNK, end, CHUNK):
                    if chunk in wanted:
                        piece.written.append((epoch, chunk, _cut(request, chunk, end)))

    async def run(self, chunks: Sequence[Iterable[int]] | None = None) -> DiskVerifyResult:
        """Compare all blocks, or those of some chunks of each disk, given by their numbers. Once.

        Raises HostError if a disk cannot be read, LinkError for an answer that is none, and what the
        callbacks raise.
        """
        pieces = self._split(chunks or [range(-(-image.size // CHUNK)) for image in self._images])
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(self._work(pieces))
        except* Exception as failures:
            raise failures.exceptions[0] from None
        self._differences.sort(key=lambda one: (one.disk, one.block))
        return DiskVerifyResult(
            epoch=self._newest,
            ok=not self._differing,
            blocks=self._blocks,
            differing=self._differing,
            differences=self._differences[:MAX_DIFFERENCES],
        )

    def _split(self, chunks: Sequence[Iterable[int]]) -> Iterator[_Piece]:
        """Make pieces of all chunks, none with more data than can be kept in memory."""
        for disk, numbers in enumerate(chunks):
            piece, data = _Piece(disk, []), 0
            for number in sorted(numbers):
                piece.offsets.append(number * CHUNK)
                data += 0 if self._images[disk].is_hole(number * CHUNK, CHUNK) else CHUNK
                if data >= MOST_DATA or len(piece.offsets) == MOST_CHUNKS:
                    yield piece
                    piece, data = _Piece(disk, []), 0
            if piece.offsets:
                yield piece

    async def _work(self, pieces: Iterator[_Piece]) -> None:
        for piece in pieces:
            self._pieces.append(piece)
            try:
                await self._compare(piece)
            finally:
                self._pieces.remove(piece)

    async def _compare(self, piece: _Piece) -> None:
        image = self._images[piece.disk]
        await asyncio.to_thread(self._read, piece)
        # QEMU may have begun one more than is known here.
        newest = self._epoch() + 1
        epoch, theirs = await self._ask(piece, piece.offsets, CHUNK, newest)
        mine = await asyncio.to_thread(self._digests, piece, piece.offsets, CHUNK, epoch)
        self._blocks += sum(-(-min(CHUNK, image.size - offset) // BLOCK) for offset in piece.offsets)
        differing = [offset for at, offset in enumerate(piece.offsets) if mine[at] != theirs[at]]
        if differing:
            epoch, theirs = await self._ask(piece, differing, BLOCK, epoch)
            mine = await asyncio.to_thread(self._digests, piece, differing, BLOCK, epoch)
            blocks = [block for offset in differing for block in _blocks(offset, image.size)]
            wrong = [block for at, block in enumerate(blocks) if mine[at] != theirs[at]]
            # The guest may have written over all of it meanwhile, which does not make it right.
            wrong = wrong or [differing[0] // BLOCK]
            self._differing += len(wrong)
            self._differences += [
                DiskDifference(disk=image.name, block=block) for block in wrong[:MAX_DIFFERENCES]
            ]
        self._newest = max(self._newest, epoch)

    def _read(self, piece: _Piece) -> None:
        image = self._images[piece.disk]
        for offset in piece.offsets:
            size = min(CHUNK, image.size - offset)
            hole = image.is_hole(offset, size)
            piece.contents[offset] = None if hole else bytearray(image.read(offset, size))

    async def _ask(
        self, piece: _Piece, offsets: list[int], size: Literal[4096, 1048576], epoch: int
    ) -> tuple[int, list[bytes]]:
        """Return the backup's digests as of that epoch, or a later one."""
        image = self._images[piece.disk]
        await self._wait_committed(epoch)
        while True:
            told, digests = await self._questions.ask(piece.disk, offsets, CHUNK, size)
            if told >= epoch:
                break
            await asyncio.sleep(ASK_AGAIN_SECONDS)  # it is committed, and not applied yet
        expected = sum(-(-min(CHUNK, image.size - offset) // size) for offset in offsets)
        if len(digests) != expected:
            raise LinkError(
                f"the backup sent {len(digests)} digests of disk {image.name}: expected {expected}"
            )
        return told, digests

    def _digests(
        self, piece: _Piece, offsets: list[int], size: Literal[4096, 1048576], epoch: int
    ) -> list[bytes]:
        """Return the digests of what the chunks hold at the end of an epoch; in a thread."""
        image, seed = self._images[piece.disk], self._questions.seed
        # The event loop adds to the list: what it adds is of later epochs.
        until = next((at for at, one in enumerate(piece.written) if one[0] > epoch), len(piece.written))
        for _, offset, request in piece.written[:until]:
            content = piece.contents[offset]
            if content is None:
                content = piece.contents[offset] = bytearray(min(CHUNK, image.size - offset))
            at = request.offset - offset
            data = request.data if request.kind is RequestKind.DATA else bytes(request.length)
            content[at : at + request.length] = data
        del piece.written[:until]
        found = []
        for offset in offsets:
            content = piece.contents[offset]
            length = min(CHUNK, image.size - offset)
            for at in range(0, length, size):
                if content is None:
                    found.append(zero_digest(min(size, length - at), seed))
                else:
                    found.append(digest(memoryview(content)[at : at + size], seed))
        return found


def _cut(request: Request, chunk: int, end: int) -> Request:
    """Return a copy of what a request, which ends at `end`, writes to a chunk."""
    first, last = max(request.offset, chunk), min(end, chunk + CHUNK)
    data = bytes(request.data[first - request.offset : last - request.offset])
    return Request(request.disk, request.kind, first, last - first, data)


def _blocks(chunk: int, size: int) -> range:
    """Return the numbers of the blocks of a chunk."""
    return range(chunk // BLOCK, -(-min(chunk + CHUNK, size) // BLOCK))


class DiskChecks:
    """Comparisons of the disks of a protected guest, one at a time. Made and used in the event loop.

    `whole` compares all of the disks; `changed`, what was written since that was last asked for. remember:
    whether that will be asked for, which costs a look at every journal. on_result is told of each result.
    """

    def __init__(
        self,
        images: Sequence[Image],
        questions: Questions,
        *,
        epoch: Callable[[], int],
        wait_committed: Callable[[int], Awaitable[None]],
        remember: bool,
        on_result: Callable[[DiskVerifyResult], Awaitable[None]],
    ) -> None:
        self._images = images
        self._make = partial(DiskVerifier, images, questions, epoch=epoch, wait_committed=wait_committed)
        self._on_result = on_result
        self._remember = remember
        self._verifier: DiskVerifier | None = None
        self._written: list[set[int]] = [set() for _ in images]  # chunks, since the last look at them
        self._wanted = asyncio.Event()
        self._asked: list[asyncio.Future[DiskVerifyResult]] = []
        self._closed: Exception | None = None  # why nothing is compared any more

    def on_slot(self, epoch: int, slot: Bytes) -> None:
        """Has to be told of every slot with a journal in it."""
        if self._remember or self._verifier is not None:
            self.on_journal(epoch, journal_in(slot))

    def on_journal(self, epoch: int, journal: Journal) -> None:
        """Take up a journal; see `on_slot`."""
        if self._verifier is not None:
            self._verifier.on_journal(epoch, journal)
        if self._remember:
            for disk, chunks in enumerate(self._written):
                chunks.update(journal.places(disk, CHUNK))

    def changed(self) -> None:
        """Have those chunks compared that were written to, if nothing is being compared already."""
        if self._verifier is None:
            self._wanted.set()

    async def whole(self) -> DiskVerifyResult:
        """Compare all of the disks. Raises what `close` is told, if that comes first or came before."""
        if self._closed is not None:
            raise self._closed
        result: asyncio.Future[DiskVerifyResult] = asyncio.get_running_loop().create_future()
        self._asked.append(result)
        self._wanted.set()
        return await result

    async def run(self) -> None:
        """Compare what is asked for, until cancelled. Raises LinkError, and what the callbacks raise.

        A disk that cannot be read is not compared, and protection goes on: the guest will say if it needs it.
        """
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            asked, self._asked = self._asked, []
            written, self._written = self._written, [set() for _ in self._images]
            if not asked and not any(written):
                continue
            try:
                self._verifier = self._make()
                result = await self._verifier.run(None if asked else written)
            except HostError as error:
                _log.error("the disks are not compared", reason=friendly(error))
                _fail(asked, error)
                continue
            except BaseException:
                self._asked += asked
                raise
            finally:
                self._verifier = None
            for one in asked:
                if not one.done():
                    one.set_result(result)
            await self._on_result(result)

    def close(self, error: Exception) -> None:
        """Tell whoever waits, or asks from now on, that nothing comes any more."""
        self._closed = error
        _fail(self._asked, error)


def _fail(asked: Sequence[asyncio.Future[DiskVerifyResult]], error: Exception) -> None:
    for one in asked:
        if not one.done():
            one.set_exception(error)
            one.exception()  # somebody may have stopped waiting
