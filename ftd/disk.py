"""Images of the guest's disks: raw files or block devices of this host, and what may not be done with them.

Each host has its own image, of the same size. On the primary QEMU writes to it, and the daemon reads it for
the copy; on the backup the daemon writes to it, and the shadow's QEMU has it open without touching it.

While the daemon has an image open for writing it holds the same locks as a QEMU that writes would, so that
neither another QEMU nor qemu-img takes the image by mistake. They are given up before the shadow is started.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import xxhash

from ftd.errors import HostError, friendly
from ftd.journal import Journal, Request, RequestKind

SECTOR = 512
BLOCK: Literal[4096] = 4096
"""Bytes of the smallest piece that is compared and copied."""
CHUNK: Literal[1048576] = 1048576
"""Bytes that are compared first."""
DIGEST_SIZE = 16

# Beginnings of files that are no raw images, and what made them.
_FORMATS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"QED\0": "qed"}

# fcntl's, which Python has no names for before 3.12; bytes that QEMU locks (block/file-posix.c) for who
# writes, and for who wants nobody else to.
_OFD_GETLK, _OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")
_WRITES, _SHARES_NO_WRITES = 101, 201

_PUNCH_HOLE = 0x02 | 0x01
_ZERO_RANGE = 0x10 | 0x01
_libc = ctypes.CDLL(None, use_errno=True)


def is_image(path: Path) -> bool:
    """Say whether there is a file or a block device."""
    return path.is_file() or path.is_block_device()


def check_image(path: Path, *, name: str, exclusive: bool = False) -> int:
    """Return the size in bytes of an image that can be protected.

    exclusive: nobody else may write to it now. Raises HostError, one line, that says what is wrong and what
    to do.
    """
    what = f"disk {name} ({path})"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"{what}: {friendly(OSError(error.errno, ''))}") from None
    try:
        size = _size(fd, what)
        head = os.pread(fd, 8, 0)
        for magic, form in _FORMATS.items():
            if head.startswith(magic):
                raise HostError(
                    f"{what}: is a {form} image, and only raw ones are replicated; "
                    f"convert it with: qemu-img convert -O raw {path} {path.with_suffix('.raw')}"
                )
        if exclusive:
            _refuse_if_used(fd, what)
    finally:
        os.close(fd)
    return size


def _size(fd: int, what: str) -> int:
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISBLK(about.st_mode):
        raise HostError(f"{what}: is neither a file nor a block device; give a raw image or a logical volume")
    size = about.st_size if stat.S_ISREG(about.st_mode) else os.lseek(fd, 0, os.SEEK_END)
    if size == 0 or size % SECTOR:
        fitting = max(SECTOR, -(-size // SECTOR) * SECTOR)
        raise HostError(
            f"{what}: has {size} bytes, which is no whole number of sectors of {SECTOR} bytes; "
            f"enlarge it with: truncate -s {fitting}"
        )
    return size


def _locked(fd: int, byte: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, _OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _refuse_if_used(fd: int, what: str) -> None:
    if _locked(fd, _WRITES) or _locked(fd, _SHARES_NO_WRITES):
        raise HostError(
            f"{what}: another program writes to it (a QEMU, say); end that, or give another image"
        )


class Image:
    """An image that is open: for reading, or, `writable`, for the daemon alone to write to.

    `apply` belongs to one thread; the other methods may be called from any. Raises HostError.
    """

    def __init__(self, name: str, path: Path, *, writable: bool = False) -> None:
        self.name = name
        self.path = path
        self._what = f"disk {name} ({path})"
        try:
            self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"{self._what}: {friendly(OSError(error.errno, ''))}") from None
        try:
            self.size = _size(self._fd, self._what)
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            if writable:
                _refuse_if_used(self._fd, self._what)
                self._lock(fcntl.F_RDLCK)
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self, kind: int) -> None:
        for byte in (_WRITES, _SHARES_NO_WRITES):
            fcntl.fcntl(self._fd, _OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

    def close(self) -> None:
        """Close it, and give up the locks. At the second call, nothing."""
        if self._fd < 0:
            return
        # Closing alone does not, as long as another thread is within a call, `sync` say: a shadow did not
        # start, since its QEMU could not have the locks.
        self._lock(fcntl.F_UNLCK)
        fd, self._fd = self._fd, -1
        os.close(fd)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, without leaving them in the page cache if that is possible."""
        try:
            parts = []
            while length > 0:
                part = os.pread(self._fd, length, offset)
                if not part:
                    raise HostError(f"{self._what}: ends at {offset}, before its {self.size} bytes")
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as error:
            raise HostError(
                f"{self._what}: reading at {offset}: {friendly(OSError(error.errno, ''))}"
            ) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def is_hole(self, offset: int, length: int) -> bool:
        """Say whether a range is nothing but a hole, which reads as zeros; False if that is not known."""
        return self._next_data(offset, min(offset + length, self.size))[0] >= min(offset + length, self.size)

    def digests(self, offset: int, length: int, piece: int, seed: int) -> list[bytes]:
        """Return the XXH3-128 of each piece of `piece` bytes of a range; the last piece may be shorter."""
        found = []
        end = min(offset + length, self.size)
        at = offset
        data, hole = -1, -1  # the piece of data asked for last
        while at < end:
            size = min(piece, end - at)
            if at >= hole:
                data, hole = self._next_data(at, end)
            if data >= at + size:
                found.append(zero_digest(size, seed))
            elif piece == BLOCK:
                # In one read: there may be many.
                size = min(CHUNK, end - at)
                found += self.digests_of(memoryview(self.read(at, size)), seed)
            else:
                found.append(digest(self.read(at, size), seed))
            at += size
        return found

    @staticmethod
    def digests_of(content: memoryview, seed: int) -> list[bytes]:
        """Return the XXH3-128 of each block of 4096 bytes."""
        return [digest(content[at : at + BLOCK], seed) for at in range(0, len(content), BLOCK)]

    def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        """Return where the next data from `offset` on begins and ends; (end, end) for nothing but a hole."""
        if not self._regular:
            return offset, end
        try:
            first = os.lseek(self._fd, offset, os.SEEK_DATA)
            return first, os.lseek(self._fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end, end
            return offset, end

    def apply(self, request: Request) -> None:
        """Repeat a request of the guest. FLUSH does nothing: see `sync`. Raises HostError."""
        try:
            if request.kind is RequestKind.DATA:
                self._write(request.offset, memoryview(request.data))
            elif request.kind is not RequestKind.FLUSH:
                self._zero(request.offset, request.length, unmap=request.kind is RequestKind.UNMAP)
        except OSError as error:
            raise HostError(
                f"{self._what}: writing {request.length} bytes at {request.offset}: "
                f"{friendly(OSError(error.errno, ''))}"
            ) from None

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._fd, data, offset)
            data = data[count:]
            offset += count

    def _zero(self, offset: int, length: int, *, unmap: bool) -> None:
        modes = (_PUNCH_HOLE, _ZERO_RANGE) if unmap else (_ZERO_RANGE,)
        for mode in modes:
            size, place = ctypes.c_longlong(length), ctypes.c_longlong(offset)
            if _libc.fallocate64(self._fd, mode, place, size) == 0:
                return
            if ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
                raise OSError(ctypes.get_errno(), "fallocate")
        zeros = memoryview(bytes(min(length, CHUNK)))
        while length > 0:
            self._write(offset, zeros[:length])
            offset += min(length, CHUNK)
            length -= min(length, CHUNK)

    def sync(self) -> None:
        """Make everything that was written survive a power loss. Raises HostError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise HostError(f"{self._what}: {friendly(OSError(error.errno, ''))}") from None


def digest(data: bytes | memoryview, seed: int) -> bytes:
    """Return the XXH3-128 of data. With a seed that the guest does not know, it cannot make two alike."""
    return xxhash.xxh3_128_digest(data, seed)


_zero_digests: dict[tuple[int, int], bytes] = {}


def zero_digest(size: int, seed: int) -> bytes:
    """Return the digest of `size` bytes of zeros."""
    if (size, seed) not in _zero_digests:
        if len(_zero_digests) > 64:
            _zero_digests.clear()
        _zero_digests[size, seed] = digest(bytes(size), seed)
    return _zero_digests[size, seed]


class Copies:
    """The images of all disks on the backup, in the order of their numbers; `apply` repeats journals.

    Raises HostError if one cannot be had.
    """

    def __init__(self, disks: Sequence[tuple[str, Path]]) -> None:
        self._disks = tuple(disks)
        self.images: list[Image] = []
        self.open()

    def open(self) -> None:
        """Take the images back after `close`. Raises HostError if that is impossible."""
        self.images = []
        try:
            for name, path in self._disks:
                self.images.append(Image(name, path, writable=True))
        except BaseException:
            self.close()
            raise

    @property
    def sizes(self) -> list[int]:
        """Bytes of each disk."""
        return [image.size for image in self.images]

    def apply(self, journal: Journal) -> bool:
        """Repeat all requests of a journal, in order. Returns whether the guest asked for durability.

        Raises HostError; the disks are those of no epoch then.
        """
        flushed = False
        for request in journal:
            self.images[request.disk].apply(request)
            flushed = flushed or request.kind is RequestKind.FLUSH
        return flushed

    def sync(self) -> None:
        """Make everything durable. Raises HostError."""
        for image in self.images:
            image.sync()

    def close(self) -> None:
        """Let go of all images, and of their locks."""
        for image in self.images:
            with contextlib.suppress(OSError):
                image.close()
