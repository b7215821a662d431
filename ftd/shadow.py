"""The shadow: the memory of the VM on the backup, always equal to the last committed epoch.

RAM lives in files that the stopped QEMU maps as well; what is written here is what it will run on. Blocks
that are in no file (video memory, ROMs, ACPI tables) are kept in arrays, the *extras*, and go to QEMU at
takeover together with the device state, in one load image.

    begin_sync ──> syncing ── apply_live … ── apply ──> epoch E ── apply ──> epoch E + 1 …
                                                           └─ any failure ──> poisoned, until begin_sync

A frame is applied wholly or not at all: first everything is checked and every target is worked out, then
bytes are written. Nothing is written for a frame that is refused. If writing itself fails, the memory is that
of no epoch, and the shadow is poisoned: it refuses takeover, with the reason. The same holds for a frame that
is refused after it was acknowledged: the guest's output up to it is out, so going back to the epoch before it
would be wrong. Nor is an older epoch than the last one that was acknowledged started, whatever has become of
the frames in between. Call `check` before acknowledging, and `apply` will have nothing to refuse.

How pages are copied was chosen by measuring 4096 pages of 4 KiB into tmpfs (median, two cores, memcpy 2.4
ms):

    pages                random      runs of 8    consecutive
    view('V4096')        3.1 ms      2.5 ms       2.3 ms
    rows of 512 uint64   3.3 ms      2.7 ms       2.6 ms
    rows of 4096 uint8   3.6 ms      2.8 ms       2.6 ms
    one slice per run    8.4 ms      3.4 ms       2.6 ms

So each page is one item of 4096 bytes, and numpy scatters them by index, without the GIL.
"""

import contextlib
import mmap
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ftd import digest
from ftd.assembly import Frame
from ftd.errors import FrameError, HostError, TakeoverRefused
from ftd.frame import PAGE_SIZE, Block, ByteArray, Kind, Part, U64Array, encode_slot, entry, split_entries

PageArray = npt.NDArray[np.void]
"""One item for each page: dtype V4096."""
IndexArray = npt.NDArray[np.int64]

EXTRAS_LIMIT = 1 << 30
"""Bytes that the blocks outside the RAM files may have together, when the caller names no limit."""

_ZERO_PAGE: PageArray = np.zeros(1, dtype=f"V{PAGE_SIZE}")


@dataclass(frozen=True, slots=True)
class Difference:
    """A page whose content on the backup is not what it was on the primary."""

    block: str
    page: int


class _MemoryFile:
    """A RAM file, mapped for reading and writing."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                f"memory file {path} of block {name}: cannot be opened: {error.strerror}"
            ) from error
        try:
            about = os.fstat(self.fd)
            if not stat.S_ISREG(about.st_mode):
                raise HostError(f"memory file {path} of block {name}: is not a regular file")
            if about.st_size == 0 or about.st_size % PAGE_SIZE:
                raise HostError(
                    f"memory file {path} of block {name}: size is {about.st_size}:"
                    f" expected a multiple of {PAGE_SIZE}"
                )
            self.size = about.st_size
            self._map = mmap.mmap(self.fd, self.size)
        except OSError as error:
            os.close(self.fd)
            raise HostError(
                f"memory file {path} of block {name}: cannot be mapped: {error.strerror}"
            ) from error
        except HostError:
            os.close(self.fd)
            raise
        self.memory: ByteArray = np.frombuffer(self._map, dtype=np.uint8)

    def with_data(self, pages: IndexArray) -> IndexArray:
        """Return those of `pages` (ascending) that are not in a hole of the file.

        Asks the kernel no oftener than there are runs of pages, or pieces of data between holes, whichever
        are fewer.
        """
        if not pages.size:
            return pages
        cuts = np.flatnonzero(np.diff(pages) != 1) + 1
        starts = pages[np.concatenate(([0], cuts))].tolist()
        ends = (pages[np.concatenate((cuts - 1, [len(pages) - 1]))] + 1).tolist()
        firsts: list[int] = []
        lasts: list[int] = []
        data, hole = -1, -1  # the piece of data asked for last: pages data .. hole - 1
        for start, end in zip(starts, ends, strict=True):
            at = start
            while at < end:
                if at >= hole:
                    data, hole = digest.next_data(self.fd, at, self.size // PAGE_SIZE)
                if data >= end:
                    break
                firsts.append(max(at, data))
                at = min(end, hole)
                lasts.append(at)
        # All ranges at once: the position in the result, shifted by what each range has to be shifted.
        lengths = np.array(lasts, dtype=np.int64) - np.array(firsts, dtype=np.int64)
        before = np.cumsum(lengths) - lengths
        shifts: IndexArray = np.repeat(np.array(firsts, dtype=np.int64) - before, lengths)
        return shifts + np.arange(len(shifts), dtype=np.int64)

    def close(self) -> None:
        self.memory = np.empty(0, dtype=np.uint8)
        # If somebody still looks at the memory, the mapping goes when they do.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)


@dataclass(slots=True)
class _Extra:
    """A block outside the RAM files. `memory` has its maximal length; beyond the used length it is zero."""

    memory: ByteArray
    used_length: int


@dataclass(slots=True)
class _Step:
    """What one part does to one block, worked out before anything is written."""

    target: PageArray
    file: _MemoryFile | None
    pages: IndexArray
    data: PageArray
    zeros: IndexArray


@dataclass(slots=True)
class _Plan:
    """What a frame does. `extras`: the blocks outside the files as they will be, new ones included."""

    extras: dict[str, _Extra] = field(default_factory=dict)
    tables: list[tuple[tuple[Block, ...], list[_Step]]] = field(default_factory=list)


class Shadow:
    """The shadow of one VM. `memory_files` names, for each RAM block that is in a file, the file.

    Every method may be called from any thread; those that take long (`apply`, `apply_live`, `verify`,
    `load_image`) belong in a thread of their own, and exclude each other. They let go of the GIL while they
    work.

    Raises HostError when a file cannot be opened and mapped.
    """

    def __init__(
        self, memory_files: Mapping[str, Path], *, generation: int = 0, extras_limit: int = EXTRAS_LIMIT
    ):
        self._lock = threading.Lock()  # guards the memory and everything below
        self._files: dict[str, _MemoryFile] = {}
        self._extras: dict[str, _Extra] = {}
        self._extras_limit = extras_limit
        self._blocks: tuple[Block, ...] = ()
        self._device = b""
        self._generation = generation
        self._committed_epoch: int | None = None
        self._acknowledged: int | None = None
        self._applying: int | None = None
        self._poison: str | None = None
        self._closed = False
        try:
            for name, path in memory_files.items():
                self._files[name] = _MemoryFile(name, Path(path))
        except HostError:
            self.close()
            raise

    @property
    def generation(self) -> int:
        """The generation whose frames are accepted."""
        return self._generation

    @property
    def committed_epoch(self) -> int | None:
        """The epoch that the memory is equal to; None during a sync, before its checkpoint was applied."""
        return self._committed_epoch

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block table of the last applied frame."""
        return self._blocks

    @property
    def device(self) -> bytes:
        """The device state of the last applied frame."""
        return self._device

    def memory(self, block: str) -> ByteArray:
        """Return the memory of a block, read-only, in its used length. Raises KeyError for an unknown block.

        Not a copy: it changes with the next frame. Looking at a hole of a RAM file fills it with zero pages.
        """
        file = self._files.get(block)
        if file is not None:
            view = file.memory.view()
        else:
            extra = self._extras[block]
            view = extra.memory[: extra.used_length]
        view.flags.writeable = False
        return view

    def begin_sync(self, generation: int) -> None:
        """Begin anew: forget epoch, device state and extras, and accept frames of `generation` from now on.

        The sync lists every page of every block, those that are zero as well; so what the RAM files hold may
        stay.
        """
        with self._lock:
            self._generation = generation
            self._committed_epoch = None
            self._acknowledged = None
            self._poison = None
            self._extras = {}
            self._blocks = ()
            self._device = b""

    def check(self, frame: Frame) -> None:
        """Raise FrameError if `apply` would refuse the frame for what it holds; touch nothing.

        Belongs before the acknowledgement. Does not wait for a frame that is being applied, and the answer is
        good for a frame that will be applied after others: nothing is checked that those can change, save
        that the first frame after a sync fixes the set of blocks.
        """
        if frame.generation != self._generation:
            raise FrameError(
                f"frame of epoch {frame.epoch}: generation is {frame.generation}: expected {self._generation}"
            )
        # Without the lock: _write replaces the table of extras and never changes it.
        self._plan(frame.parts)

    def apply_live(self, part: Part) -> None:
        """Apply one live part of a sync. The part may be released afterwards.

        Raises FrameError, before anything is touched, when it does not fit or no sync is under way.
        """
        with self._lock:
            what = f"live part {part.header.part} of epoch {part.header.epoch}"
            if part.header.kind is not Kind.LIVE:
                raise FrameError(f"{what}: kind is {part.header.kind} (checkpoint): expected 1 (live)")
            if self._committed_epoch is not None:
                raise FrameError(
                    f"{what}: expected only during a sync, but epoch {self._committed_epoch} is committed"
                )
            if part.header.generation != self._generation:
                raise FrameError(
                    f"{what}: generation is {part.header.generation}: expected {self._generation}"
                )
            if self._poison is not None:
                raise FrameError(f"{what}: expected a new sync, since {self._poison}")
            plan = self._plan((part,))
            self._applying = part.header.epoch
            try:
                self._write(plan)
            except BaseException as error:
                self._poison = f"applying {what} failed half way: {error}"
                raise
            finally:
                self._applying = None

    def apply(self, frame: Frame) -> None:
        """Make the memory equal to the frame's epoch. The frame may be released afterwards.

        Raises FrameError, before anything is touched, when the frame does not fit. A frame that was applied
        already is refused, and no more than that; after any other failure the shadow is poisoned until the
        next sync.
        """
        with self._lock:
            what = f"frame of epoch {frame.epoch}"
            if frame.generation != self._generation:
                raise FrameError(f"{what}: generation is {frame.generation}: expected {self._generation}")
            if self._committed_epoch is not None and frame.epoch <= self._committed_epoch:
                raise FrameError(
                    f"{what}: epoch {self._committed_epoch} is applied: expected {self._committed_epoch + 1}"
                )
            if self._poison is not None:
                raise FrameError(f"{what}: expected a new sync, since {self._poison}")
            try:
                if self._committed_epoch is not None and frame.epoch != self._committed_epoch + 1:
                    raise FrameError(f"{what}: epoch is {frame.epoch}: expected {self._committed_epoch + 1}")
                plan = self._plan(frame.parts)
                device = bytes(frame.device)
                self._applying = frame.epoch
                self._write(plan)
            except BaseException as error:
                self._poison = f"applying the {what} failed: {error}"
                raise
            finally:
                self._applying = None
            self._blocks = frame.blocks
            self._device = device
            self._committed_epoch = frame.epoch

    def acknowledge(self, epoch: int) -> None:
        """Refuse takeover until this epoch is applied: what the guest said in it is about to be let out."""
        self._acknowledged = epoch

    def poison(self, reason: str) -> None:
        """Refuse takeover from now on, for this reason, until the next sync: the memory is known bad."""
        self._poison = reason

    def takeover_refusal(self) -> str | None:
        """Return why this shadow may not be started, or None if it may. Does not wait."""
        if self._closed:
            return "the shadow is closed"
        if self._poison is not None:
            return self._poison
        if self._applying is not None:
            return f"epoch {self._applying} is being applied"
        if self._committed_epoch is None:
            return "the first sync is not complete: no epoch was committed"
        if self._acknowledged is not None and self._committed_epoch < self._acknowledged:
            return (
                f"epoch {self._acknowledged} was acknowledged, and only epoch {self._committed_epoch} "
                "is applied: the guest would forget what it has said"
            )
        return None

    def load_image(self) -> int:
        """Return a memfd for `x-ft-load`: the device state and every page of the extras, in slot layout.

        Zero pages are listed in `zeros`: a QEMU that has just started holds its own ROMs and tables there.
        The caller owns the descriptor. Waits for a frame that is being applied. Raises TakeoverRefused with
        the reason, and HostError when there is no memory file to be had.
        """
        with self._lock:
            refusal = self.takeover_refusal()
            if refusal is not None:
                raise TakeoverRefused(f"takeover refused: {refusal}")
            pages: list[U64Array] = [np.empty(0, dtype=np.uint64)]
            zeros: list[U64Array] = [np.empty(0, dtype=np.uint64)]
            data: list[ByteArray] = [np.empty((0, PAGE_SIZE), dtype=np.uint8)]
            for index, block in enumerate(self._blocks):
                if block.shared_file:
                    continue
                rows = self._extras[block.name].memory[: block.used_length].reshape(-1, PAGE_SIZE)
                used = rows.view(np.uint64).any(axis=1)
                first = np.uint64(entry(index, 0))
                pages.append(np.flatnonzero(used).astype(np.uint64) + first)
                zeros.append(np.flatnonzero(~used).astype(np.uint64) + first)
                data.append(rows[used])
            return _image(
                self._generation,
                self._committed_epoch or 0,
                self._blocks,
                np.concatenate(pages),
                np.concatenate(zeros),
                np.concatenate(data),
                self._device,
            )

    def restore(self, image: int, generation: int, epoch: int) -> None:
        """Be what `load_image` of an earlier Shadow says, whose RAM files are as it left them.

        Raises FrameError if the image is of another epoch, or OSError if it cannot be mapped; this one holds
        no epoch then.
        """
        part = Part.from_slot(memoryview(mmap.mmap(image, 0, access=mmap.ACCESS_READ)))
        try:
            part.verify()
            header = part.header
            if (header.generation, header.epoch) != (generation, epoch):
                raise FrameError(
                    f"load image: is of epoch {header.epoch} in generation {header.generation}: "
                    f"expected {epoch} in {generation}"
                )
            self.begin_sync(generation)
            self.apply(Frame(generation, epoch, (part,)))
        finally:
            part.release()

    def verify(self, frame: Frame, *, limit: int = 1024) -> list[Difference]:
        """Compare the whole memory with the digests of `frame`, the frame applied last; return what differs.

        At most `limit` differences. About 0.3 s for each GiB that is not a hole; holes of a RAM file cost
        nothing and stay holes. For a thread: other threads get a turn every fraction of a millisecond. Raises
        FrameError when the frame carries no digests, or is not the one that the memory is equal to.
        """
        with self._lock:
            if self._committed_epoch != frame.epoch or frame.generation != self._generation:
                raise FrameError(
                    f"frame of epoch {frame.epoch}: expected the last applied, {self._committed_epoch}"
                )
            if not frame.digests.size:
                raise FrameError(
                    f"frame of epoch {frame.epoch}: count of digests is 0: expected a checkpoint with digests"
                )
            differences: list[Difference] = []
            start = 0
            for block in frame.blocks:
                expected = frame.digests[start : start + block.pages]
                start += block.pages
                for page in self._differing(block, expected):
                    differences.append(Difference(block.name, page))
                    if len(differences) >= limit:
                        return differences
            return differences

    def close(self) -> None:
        """Let go of the memory files. At the second call, nothing."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files = {}
            self._extras = {}

    def _differing(self, block: Block, expected: U64Array) -> list[int]:
        file = self._files.get(block.name)
        if file is None:
            return _numbers(digest.differing_pages(self._extras[block.name].memory, expected))
        hole = np.ones(len(expected), dtype=np.bool_)
        found: list[IndexArray] = []
        first, last = digest.next_data(file.fd, 0, len(expected))
        while first < len(expected):
            hole[first:last] = False
            memory = file.memory[first * PAGE_SIZE : last * PAGE_SIZE]
            found.append(digest.differing_pages(memory, expected[first:last]) + first)
            first, last = digest.next_data(file.fd, last, len(expected))
        found.append(np.flatnonzero(hole & (expected != np.uint64(digest.ZERO_PAGE_DIGEST))).astype(np.int64))
        return _numbers(np.sort(np.concatenate(found)))

    def _plan(self, parts: tuple[Part, ...]) -> _Plan:
        """Check the parts against the memory there is, and work out every write. Raises FrameError."""
        if self._closed:
            raise FrameError("frame: expected an open shadow, this one is closed")
        plan = _Plan(extras=dict(self._extras))
        for part in parts:
            if not part.verified:
                raise FrameError(
                    f"part {part.header.part} of epoch {part.header.epoch} was not verified, or was released"
                )
            targets = self._targets(part.blocks, plan.extras)
            plan.tables.append((part.blocks, list(_steps(part, targets))))
        return plan

    def _targets(
        self, blocks: tuple[Block, ...], extras: dict[str, _Extra]
    ) -> list[tuple[ByteArray, _MemoryFile | None]]:
        targets: list[tuple[ByteArray, _MemoryFile | None]] = []
        for block in blocks:
            file = self._files.get(block.name)
            if block.shared_file != (file is not None):
                right = (
                    "a block in a file" if file is not None else f"one of {', '.join(self._files) or 'none'}"
                )
                raise FrameError(
                    f"block {block.name}: shared-file flag is {block.shared_file}: expected {right}"
                )
            if file is not None:
                if not block.used_length == block.max_length == file.size:
                    raise FrameError(
                        f"block {block.name}: length is {block.used_length} of {block.max_length}:"
                        f" expected {file.size}, the size of its file"
                    )
                targets.append((file.memory, file))
                continue
            extra = extras.get(block.name)
            if extra is None:
                # With an epoch committed, the machine is known: a block that comes out of nowhere was never
                # synced.
                if self._committed_epoch is not None:
                    raise FrameError(
                        f"block {block.name}: is new: expected the blocks that the sync began with"
                    )
                total = block.max_length + sum(known.memory.size for known in extras.values())
                if total > self._extras_limit:
                    raise FrameError(
                        f"block {block.name}: blocks outside the RAM files have {total} bytes:"
                        f" expected at most {self._extras_limit}"
                    )
                extra = extras[block.name] = _Extra(np.zeros(block.max_length, dtype=np.uint8), 0)
            if extra.memory.size != block.max_length:
                raise FrameError(
                    f"block {block.name}: maximal length is {block.max_length}:"
                    f" expected {extra.memory.size}, as before"
                )
            targets.append((extra.memory, None))
        absent = ({*self._files, *extras}) - {block.name for block in blocks}
        if absent:
            raise FrameError(
                f"block table: lacks {', '.join(sorted(absent))}: expected every block that was there before"
            )
        return targets

    def _write(self, plan: _Plan) -> None:
        self._extras = plan.extras
        for blocks, steps in plan.tables:
            for block in blocks:
                extra = self._extras.get(block.name)
                if extra is not None:
                    # What a block gives up is zero if it ever comes back.
                    extra.memory[block.used_length : extra.used_length] = 0
                    extra.used_length = block.used_length
            for step in steps:
                step.target[step.pages] = step.data
                if step.zeros.size:
                    zeros = step.zeros if step.file is None else step.file.with_data(step.zeros)
                    step.target[zeros] = _ZERO_PAGE


def _numbers(pages: IndexArray) -> list[int]:
    return [int(page) for page in pages]


def _steps(part: Part, targets: list[tuple[ByteArray, _MemoryFile | None]]) -> list[_Step]:
    data = part.data.reshape(-1).view(f"V{PAGE_SIZE}")
    index, pages = split_entries(part.pages)
    zero_index, zeros = split_entries(np.sort(part.zeros))
    # QEMU goes from block to block, so a block's pages are a slice. If not, they are picked, at the cost of a
    # copy.
    ascending = bool((index[1:] >= index[:-1]).all())
    steps = []
    for number in np.union1d(index, zero_index).tolist():
        memory, file = targets[number]
        mine: slice | IndexArray
        if ascending:
            mine = slice(*np.searchsorted(index, (number, number + 1)).tolist())
        else:
            mine = np.flatnonzero(index == number)
        steps.append(
            _Step(
                target=memory.view(f"V{PAGE_SIZE}"),
                file=file,
                pages=pages[mine],
                data=data[mine],
                zeros=zeros[slice(*np.searchsorted(zero_index, (number, number + 1)).tolist())],
            )
        )
    return steps


def _image(
    generation: int,
    epoch: int,
    blocks: tuple[Block, ...],
    pages: U64Array,
    zeros: U64Array,
    data: ByteArray,
    device: bytes,
) -> int:
    try:
        fd = os.memfd_create("ftd-load", os.MFD_CLOEXEC)
    except OSError as error:
        raise HostError(f"load image: memfd_create failed: {error.strerror}") from error

    def allocate(size: int) -> memoryview:
        os.ftruncate(fd, size)
        return memoryview(mmap.mmap(fd, size))

    try:
        encode_slot(
            generation=generation,
            epoch=epoch,
            kind=Kind.CHECKPOINT,
            complete=True,
            running=False,
            blocks=blocks,
            pages=pages,
            data=data,
            zeros=zeros,
            device=device,
            allocate=allocate,
        )
    except OSError as error:
        os.close(fd)
        raise HostError(f"load image: cannot be made: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd
