"""Putting parts in order: what makes a stream of parts a sequence of whole frames.

    sync                                       protected
    live 0, live 1, … live k                   (live 0 … )   checkpoint n … checkpoint m, complete
      each handed out at once                    held          held                         -> Frame N+1
    checkpoint k+1 …, complete -> Frame E

Within an epoch, parts are numbered from 0 without a gap, live ones first. Live parts carry the epoch that
will close them. During a sync they are handed out at once, since the shadow is not a VM yet and cannot be
taken over before the sync's checkpoint. Later they are the beginning of the next frame and are held back with
it: half a frame never touches the shadow.

A sync lists every page of every block at least once, the zero ones too. That is checked, because nothing else
would tell that its beginning was lost: the frame after it looks just like a sync that needed no live parts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ftd.errors import FrameError
from ftd.frame import Block, Kind, Part, U64Array, split_entries

MEMORY_LIMIT = 1 << 40
"""Bytes of guest memory that are accepted when the caller names no limit."""


# Of the receive buffers, so much may be taken by a frame that is not whole: the rest is for what comes next.
SHARE_OF_BUFFERS = 3, 4
# Receive buffers beyond what the primary may have in flight: parts that are being applied, the first copy.
SPARE_BUFFERS = 512 << 20


def receive_limits(memory: int, in_flight: int) -> tuple[int, int]:
    """Return how many bytes of receive buffers there may be, and how many are kept for the next frame.

    memory: bytes of all blocks of the guest; in_flight: bytes that the primary may have under way.

    A frame is applied wholly or not at all, so it must fit whatever the guest did: it may have written to all
    of its memory in one epoch, and a ring that overflowed says so as well. If such a frame were refused, the
    copy that follows would end with one like it, and so on for ever. Beside the pages there are their
    names and digests (16 bytes for each), what was sent of them early, device state and requests to disks.
    """
    usual = in_flight + SPARE_BUFFERS
    part, whole = SHARE_OF_BUFFERS
    return usual + (memory + memory // 64) * whole // part, usual


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole, verified frame: what one checkpoint produced.

    `parts` are in order; where two name the same page, the later one holds.
    """

    generation: int
    epoch: int
    parts: tuple[Part, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block table at the checkpoint: that of the last part."""
        return self.parts[-1].blocks

    @property
    def device(self) -> memoryview:
        """The device state stream."""
        return self.parts[-1].device

    @property
    def digests(self) -> U64Array:
        """One XXH3-64 for each page, in the order of `blocks`, shape (n,); empty without digests."""
        return self.parts[-1].digests

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in wire form."""
        return sum(part.nbytes for part in self.parts)

    def release(self) -> None:
        """Give all receive buffers back: after the frame was applied, and verified if it carries digests."""
        for part in self.parts:
            part.release()


class FrameAssembler:
    """Accepts the parts of one session in order, and hands out whole frames. Used by one thread at a time.

    A part belongs to the assembler from `feed` on. After an error nothing more is accepted: which bytes of
    the stream are still good is then a guess. The session ends, and the next one begins with a sync and a new
    assembler.

    `after`: the stream goes on after that epoch, which an earlier one has committed, instead of with a sync.
    `limit` bounds the bytes of an incomplete frame. It must be less than the limit of the receive buffers, or
    a frame waits for buffers that only its own completion would free. `memory_limit` bounds the bytes of all
    blocks: during a sync, one byte is kept for each page.
    """

    def __init__(
        self, generation: int, *, limit: int, memory_limit: int = MEMORY_LIMIT, after: int | None = None
    ) -> None:
        self.generation = generation
        self.limit = limit
        self.last_epoch: int | None = after
        """Epoch of the last whole frame; None while syncing."""
        self._epoch: int | None = None
        self._next_part = 0
        self._checkpoint_begun = False
        self._held: list[Part] = []
        self._held_bytes = 0
        self._broken: str | None = None
        self._memory_limit = memory_limit
        self._covered: dict[str, npt.NDArray[np.bool_]] = {}  # during a sync: which pages were listed

    @property
    def syncing(self) -> bool:
        """Whether the frame that completes the sync is still to come."""
        return self.last_epoch is None

    @property
    def held_bytes(self) -> int:
        """Bytes of the parts of the incomplete frame."""
        return self._held_bytes

    def feed(self, part: Part) -> Frame | Part | None:
        """Take the next part, verify it, and return what it makes possible.

        A Frame when the part completes one. The part itself when it is a live part of a sync: apply it, then
        release it. None when it is held until its frame is complete. Raises FrameError; all parts held are
        released then.
        """
        try:
            self._check_order(part)
            part.verify()
            if self.syncing:
                self._cover(part)
        except FrameError as error:
            self._broken = self._broken or str(error)
            part.release()
            self.close()
            raise
        self._epoch = part.header.epoch
        self._next_part = part.header.part + 1
        if part.header.kind is Kind.LIVE and self.syncing:
            return part
        self._checkpoint_begun = part.header.kind is Kind.CHECKPOINT
        self._held.append(part)
        self._held_bytes += part.nbytes
        if not part.header.complete:
            return None
        frame = Frame(self.generation, part.header.epoch, tuple(self._held))
        self.last_epoch = part.header.epoch
        self._covered = {}
        self._start_over()
        return frame

    def close(self) -> None:
        """Drop the incomplete frame, and release its parts. The assembler accepts nothing afterwards."""
        self._broken = self._broken or "the session was closed"
        for part in self._held:
            part.release()
        self._start_over()

    def _start_over(self) -> None:
        self._epoch = None
        self._next_part = 0
        self._checkpoint_begun = False
        self._held = []
        self._held_bytes = 0

    def _check_order(self, part: Part) -> None:
        header = part.header
        what = f"part {header.part} of epoch {header.epoch}"
        if self._broken is not None:
            raise FrameError(f"{what} comes too late: expected a new sync after: {self._broken}")
        if header.generation != self.generation:
            raise FrameError(
                f"{what}: generation is {header.generation}: expected {self.generation}, the session's"
            )
        if header.epoch == self.last_epoch:
            raise FrameError(
                f"{what} follows the part that completed the epoch: expected epoch {header.epoch + 1}"
            )
        epoch = self.last_epoch + 1 if self.last_epoch is not None else self._epoch
        # Without a frame and without a part before it, the sync may begin at any epoch.
        if epoch is not None and header.epoch != epoch:
            raise FrameError(f"{what}: epoch is {header.epoch}: expected {epoch}")
        if header.part != self._next_part:
            raise FrameError(f"{what}: part is {header.part}: expected {self._next_part}")
        if self._checkpoint_begun and header.kind is not Kind.CHECKPOINT:
            raise FrameError(f"{what}: kind is {header.kind} (live): expected 2, the checkpoint has begun")
        if header.kind is Kind.CHECKPOINT and header.complete and not header.section("device").size:
            raise FrameError(
                f"{what}: size of device is 0: expected the device state, the part completes a checkpoint"
            )
        total = self._held_bytes + part.nbytes
        if total > self.limit and not (header.kind is Kind.LIVE and self.syncing):
            raise FrameError(
                f"{what}: size of the frame is {total} so far: expected at most {self.limit} bytes"
            )

    def _cover(self, part: Part) -> None:
        total = sum(block.used_length for block in part.blocks)
        if total > self._memory_limit:
            raise FrameError(f"block table: memory is {total} bytes: expected at most {self._memory_limit}")
        for block in part.blocks:
            known = self._covered.get(block.name)
            if known is None or len(known) != block.pages:
                # A new block, or one that was resized. What it gained was never listed.
                self._covered[block.name] = np.zeros(block.pages, dtype=np.bool_)
                if known is not None:
                    self._covered[block.name][: len(known)] = known[: block.pages]
        for entries in (part.pages, part.zeros):
            index, pages = split_entries(entries)
            for number in np.unique(index).tolist():
                self._covered[part.blocks[number].name][pages[index == number]] = True
        if not part.header.complete:
            return
        for block in part.blocks:
            covered = self._covered[block.name]
            if not covered.all():
                raise FrameError(
                    f"sync to epoch {part.header.epoch}: {int((~covered).sum())} of {block.pages} pages"
                    f" of block {block.name} were never sent, the first is {int(covered.argmin())}:"
                    f" expected every page"
                )
