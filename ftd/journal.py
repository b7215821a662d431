"""The journal of the guest's disks: what a part of a frame says was written to them, and every check of it.

The section `journal` of a slot (qemu/README.md), written by migration/ft/journal.c in the series:

    count × 32 bytes   offset u64, length u64, disk u32, kind u32, zero u64
    data               of all requests of kind DATA, in order, without gaps

The same goes over the wire when disks are copied, in front of it a header of 48 bytes:

    magic "FTDDISK\\0", u64 each: generation, count, size, XXH3-64 of the section, XXH3-64 of these 40 bytes

Requests are in the order in which they have to be repeated. Offsets and lengths are bytes. A disk is a number
that both sides give it: its place in the list of disks that x-ft-begin was told.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import xxhash

from ftd.errors import FrameError

REQUEST_SIZE = 32
_DTYPE = np.dtype(
    [("offset", "<u8"), ("length", "<u8"), ("disk", "<u4"), ("kind", "<u4"), ("zero", "<u8")], align=False
)
_LARGEST = 1 << 62


class RequestKind(IntEnum):
    """What a request does: writes data; writes zeros; writes zeros that need no space; makes durable."""

    DATA = 1
    ZEROES = 2
    UNMAP = 3
    FLUSH = 4


class Request(NamedTuple):
    """One request of the guest to a disk. `data` has `length` bytes for DATA, and none for the others."""

    disk: int
    kind: RequestKind
    offset: int = 0
    length: int = 0
    data: bytes | memoryview = b""


class Journal:
    """The requests in one section, in order; views into its bytes. Means something only after `verify`."""

    def __init__(self, section: memoryview, count: int) -> None:
        self._records = np.frombuffer(section[: count * REQUEST_SIZE], dtype=_DTYPE)
        self._data = section[count * REQUEST_SIZE :]

    def __len__(self) -> int:
        return len(self._records)

    @property
    def nbytes(self) -> int:
        """Bytes of data, without the records."""
        return self._data.nbytes

    def verify(self) -> None:
        """Check every record. Raises FrameError, which names the first wrong one."""
        records = self._records
        kind, offset, length = records["kind"], records["offset"], records["length"]
        flush = kind == RequestKind.FLUSH
        for bad, what, values, right in (
            ((kind < 1) | (kind > RequestKind.FLUSH), "kind", kind, "1 to 4"),
            (records["zero"] != 0, "reserved part", records["zero"], "0"),
            (flush & ((offset != 0) | (length != 0)), "length of a flush", length, "0, at offset 0"),
            (~flush & (length == 0), "length", length, "at least 1 byte"),
            (offset > _LARGEST, "offset", offset, f"at most {_LARGEST}"),
            (length > _LARGEST, "length", length, f"at most {_LARGEST}"),
        ):
            at = np.flatnonzero(bad)
            if at.size:
                first = int(at[0])
                raise FrameError(f"journal[{first}]: {what} is {int(values[first])}: expected {right}")
        # In Python's numbers: a sum of lengths could wrap around in those of numpy.
        size = sum(length[kind == RequestKind.DATA].tolist())
        if size != self._data.nbytes:
            raise FrameError(f"journal: has {self._data.nbytes} bytes of data: expected {size}")

    def check(self, sizes: Sequence[int]) -> None:
        """Check that every request lies within its disk; `sizes` are bytes. Raises FrameError."""
        if not len(self):
            return
        disk = self._records["disk"]
        at = np.flatnonzero(disk >= len(sizes))
        if at.size:
            first = int(at[0])
            raise FrameError(
                f"journal[{first}]: disk is {int(disk[first])}: expected less than {len(sizes)}, "
                "the number of disks"
            )
        size = np.array(sizes, dtype=np.uint64)[disk]
        end = self._records["offset"] + self._records["length"]
        at = np.flatnonzero(end > size)
        if at.size:
            first = int(at[0])
            raise FrameError(
                f"journal[{first}]: request ends at {int(end[first])}: expected at most {int(size[first])}, "
                f"the size of disk {int(disk[first])}"
            )

    def within(self, disk: int, offset: int, length: int) -> list[Request]:
        """Return the requests that write to a piece of a disk, in order; views, as those of iteration."""
        records = self._records
        begin, size = records["offset"], records["length"]
        hit = (records["disk"] == disk) & (begin < offset + length) & (begin + size > offset) & (size > 0)
        at = np.flatnonzero(hit)
        if not at.size:
            return []
        is_data = records["kind"] == RequestKind.DATA
        ends = np.cumsum(np.where(is_data, size, 0))
        found = []
        for number in at.tolist():
            kind, count = RequestKind(int(records["kind"][number])), int(size[number])
            end = int(ends[number])
            data = self._data[end - count : end] if kind is RequestKind.DATA else self._data[:0]
            found.append(Request(disk, kind, int(begin[number]), count, data))
        return found

    def places(self, disk: int, piece: int) -> set[int]:
        """Return the numbers of the pieces of `piece` bytes of a disk that are written to."""
        records = self._records[(self._records["disk"] == disk) & (self._records["length"] > 0)]
        first = records["offset"] // piece
        last = (records["offset"] + records["length"] - 1) // piece
        found = {*np.unique(first).tolist(), *np.unique(last).tolist()}
        for at in np.flatnonzero(last > first + 1).tolist():
            found.update(range(int(first[at]), int(last[at])))
        return found

    def __iter__(self) -> Iterator[Request]:
        at = 0
        for offset, length, disk, kind, _ in self._records.tolist():
            data = self._data[:0]
            if kind == RequestKind.DATA:
                data = self._data[at : at + length]
                at += length
            yield Request(disk, RequestKind(kind), offset, length, data)


def encode(requests: Sequence[Request]) -> bytes:
    """Return the section that says `requests`. Checks nothing: the tests encode invalid ones with it."""
    records = np.zeros(len(requests), dtype=_DTYPE)
    for number, each in enumerate(requests):
        records[number] = (each.offset, each.length, each.disk, int(each.kind), 0)
    return records.tobytes() + b"".join(bytes(each.data) for each in requests)


MAGIC = b"FTDDISK\0"
_HEADER = struct.Struct("<8sQQQQQ")
HEADER_SIZE = _HEADER.size


def encode_chunks(generation: int, requests: Sequence[Request]) -> bytes:
    """Return the message that carries pieces of disks during a copy."""
    section = encode(requests)
    fields = _HEADER.pack(
        MAGIC, generation, len(requests), len(section), xxhash.xxh3_64_intdigest(section), 0
    )[:-8]
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields)) + section


def is_chunks(message: memoryview) -> bool:
    """Say whether a message on the frames connection carries pieces of disks, and not a part of a frame."""
    return bytes(message[: len(MAGIC)]) == MAGIC


def parse_chunks(message: memoryview, generation: int) -> Journal:
    """Check a message of `encode_chunks` and return what is in it. Raises FrameError."""
    if len(message) < HEADER_SIZE:
        raise FrameError(f"pieces of disks: message has {len(message)} bytes: expected {HEADER_SIZE} or more")
    _, told, count, size, checksum, own = _HEADER.unpack_from(message)
    found = xxhash.xxh3_64_intdigest(message[: HEADER_SIZE - 8])
    if own != found:
        raise FrameError(f"pieces of disks: header checksum is {own:#018x}: expected {found:#018x}")
    if told != generation:
        raise FrameError(f"pieces of disks: generation is {told}: expected {generation}")
    section = message[HEADER_SIZE:].toreadonly()
    if size != len(section) or size < count * REQUEST_SIZE:
        raise FrameError(
            f"pieces of disks: size is {size} for {count} requests: expected {len(section)}, what came"
        )
    found = xxhash.xxh3_64_intdigest(section)
    if checksum != found:
        raise FrameError(f"pieces of disks: checksum is {checksum:#018x}: expected {found:#018x}")
    journal = Journal(section, count)
    journal.verify()
    return journal
