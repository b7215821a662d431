"""The staging slots: memory files that QEMU fills and the daemon sends from.

A slot is busy from the moment its number is given to QEMU (`x-ft-collect`, `x-ft-checkpoint`) until its last
byte is sent. QEMU and the daemon map the same memory, so nothing is copied on the way, and the daemon's
mapping is read-only.
"""

import asyncio
import contextlib
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ftd.errors import HostError
from ftd.frame import BLOCK_SIZE, HEADER_SIZE, MAX_BLOCKS, PAGE_SIZE

DEVICE_BYTES = 8 << 20
"""Room for the device state. 14 KB is what a small machine has; devices with large buffers have megabytes."""

LARGEST_REQUEST = (1 << 20) + 32
"""Bytes that the largest request to a disk takes in a journal: FT_JOURNAL_MAX_WRITE in the series."""


def slot_size(data_bytes: int, memory_bytes: int, journal_bytes: int = 0) -> int:
    """Return the size of a slot file for `data_bytes` of page data of a guest with `memory_bytes` of memory.

    `journal_bytes`: what its disks may write in an epoch; 0 for a guest without disks.

    QEMU lays the sections out, and says in FtStatus how many pages a slot holds. This is what they need at
    most:

        header     4096
        blocks     320 × 256
        pages      8 × pages of data
        zeros      8 × pages of data (more zero pages than that go into the next part)
        data       data_bytes, and up to 4095 so that it begins at a page
        device     8 MiB
        digests    8 × pages of the guest: 2 MiB per GiB
        journal    journal_bytes, and at least one request of 1 MiB with its record

    `memory_bytes` counts all blocks at their maximal length, not only the RAM.
    """
    pages = -(-data_bytes // PAGE_SIZE)
    digests = 8 * -(-memory_bytes // PAGE_SIZE)
    tables = BLOCK_SIZE * MAX_BLOCKS + 8 * pages + 8 * pages
    journal = max(journal_bytes, LARGEST_REQUEST) + PAGE_SIZE if journal_bytes else 0
    total = HEADER_SIZE + tables + (pages + 1) * PAGE_SIZE + DEVICE_BYTES + digests + journal
    return -(-total // PAGE_SIZE) * PAGE_SIZE


class Slot:
    """One memory file.

    `index` is what QMP commands call it by, `view` the daemon's read-only mapping of all `size` bytes.
    """

    def __init__(self, index: int, size: int, fd: int | None = None) -> None:
        self.index = index
        self.size = size
        self.name = f"ftd-slot-{index}"
        self.fd = _create(self.name, size) if fd is None else fd
        try:
            self._map = mmap.mmap(self.fd, size, access=mmap.ACCESS_READ)
        except OSError as error:
            os.close(self.fd)
            raise HostError(f"staging slot of {size} bytes: cannot be mapped: {error.strerror}") from error
        self.view = memoryview(self._map)

    def _close(self) -> None:
        # Views handed out earlier may still live in a sender thread; the mapping then goes when the last of
        # them does.
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
        os.close(self.fd)


def _create(name: str, size: int) -> int:
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise HostError(f"staging slot {name}: memfd_create failed: {error.strerror}") from error
    try:
        os.ftruncate(fd, size)
        # The size can change no more: neither side can make the other touch pages that are gone, which is
        # fatal. F_SEAL_SEAL keeps anybody from sealing it against the writing that it is for.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise HostError(
            f"staging slot {name}: cannot be made {size} bytes large: {error.strerror}"
        ) from error
    return fd


class Staging:
    """`count` slots of `size` bytes (see `slot_size`), and the account of which are free.

    Belongs to one event loop. No method may be called from another thread: a sender thread that is done with
    a slot calls loop.call_soon_threadsafe(staging.release, slot). Slots are given out in the order in which
    they came back, and waiters get them in the order in which they began to wait.

    fds: memory files that QEMU has already, from an earlier daemon, instead of new ones; all are free.

    Raises HostError when the memory files cannot be made.
    """

    def __init__(self, count: int, size: int, fds: Sequence[int] | None = None) -> None:
        self.slots: list[Slot] = []
        self._closed = False
        self._waiters: deque[asyncio.Future[Slot]] = deque()
        try:
            for index in range(count):
                self.slots.append(Slot(index, size, None if fds is None else fds[index]))
        except HostError:
            self.close()
            raise
        self._free = deque(self.slots)

    @property
    def free(self) -> int:
        """Number of slots that are free now."""
        return len(self._free)

    @property
    def busy(self) -> int:
        """Number of slots that are in use now."""
        return len(self.slots) - len(self._free)

    def acquire_free_nowait(self) -> Slot | None:
        """Return a free slot, busy from now on, or None. Does not overtake those that wait."""
        return self._free.popleft() if self._free and not self._waiters else None

    async def acquire_free(self) -> Slot:
        """Wait for a free slot and return it, busy from now on. Raises HostError after `close`."""
        self._require_open()
        slot = self.acquire_free_nowait()
        if slot is not None:
            return slot
        waiter: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # Cancelled between being given a slot and waking up: the slot must not be lost.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def release(self, slot: Slot) -> None:
        """Make a busy slot free, or hand it to whoever waits. After `close`, nothing.

        Raises ValueError for a slot that is not busy here: it would be given out twice.
        """
        if self._closed:
            return
        if slot not in self.slots or slot in self._free:
            raise ValueError(f"slot {slot.index} is not busy: it cannot be released")
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(slot)
                return
        self._free.append(slot)

    def close(self) -> None:
        """Let go of all memory files; whoever waits for a slot gets a HostError. At the second call, nothing.

        QEMU must have let go of them before (`x-ft-end`), or they live on there.
        """
        if self._closed:
            return
        self._closed = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(HostError("staging is closed: no slot will become free"))
        for slot in self.slots:
            slot._close()
        self.slots = []
        self._free = deque()

    def _require_open(self) -> None:
        if self._closed:
            raise HostError("staging is closed: no slot will become free")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
