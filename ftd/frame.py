"""The layout of a slot, and every check that bytes pass before they may count as part of a frame.

The layout is that of qemu/README.md, where QEMU's side of it is described; FT_SLOT_VERSION there is VERSION
here.

    slot (memfd)                                   wire
    0x0000  header, 4096 bytes                     header, unchanged, 4096 bytes
    ...     blocks   320 bytes each                blocks  \\
    ...     pages    u64 each                      pages    |
    ...     zeros    u64 each                      zeros    | the `size` bytes of each section,
    ...     data     4096 bytes each, aligned      data     | in this order, without gaps
    ...     device   a byte stream                 device   |
    ...     digests  u64 for every page of RAM     digests  |
    ...     journal  requests to disks             journal /

A page is named by one number, an *entry*: block index << 48 | page number in the block.

Checks come in two steps. `parse_header` looks at 4096 bytes and says how many bytes will follow, so that
nothing is allocated for a header that makes no sense. `Part.verify` looks at everything else. A part that was
not verified is accepted by nobody: the assembler verifies what it is fed, and the shadow refuses the rest.

Checksums are XXH3-64. python-xxhash lets go of the GIL for large buffers (measured with 4.1: none of the
threads beside a checksum of 256 MiB waited longer than usual) and holds it for single pages. So `verify` may
run in a receiver thread beside the event loop.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from ftd.errors import FrameError
from ftd.journal import REQUEST_SIZE, Journal

PAGE_SIZE = 4096
HEADER_SIZE = 4096
VERSION = 2
MAGIC = b"FTDSLOT\0"
BLOCK_SIZE = 320
"""Bytes of one entry of the block table."""
MAX_BLOCKS = 256
NAME_SIZE = 256
"""Bytes of a block's name, the terminating NUL included."""
PART_LIMIT = 1 << 30
"""Bytes of the largest part that is accepted when the caller names no limit."""

SECTIONS = ("blocks", "pages", "zeros", "data", "device", "digests", "journal")
_ITEM_SIZE = {"blocks": BLOCK_SIZE, "pages": 8, "zeros": 8, "data": PAGE_SIZE, "digests": 8}

_FLAG_COMPLETE = 1
_FLAG_RUNNING = 2
_BLOCK_SHARED_FILE = 1
_BLOCK_READ_ONLY = 2

_FIXED = struct.Struct("<8sIIQQIIII")
_SECTION = struct.Struct("<QQQQ")
_U64 = struct.Struct("<Q")
_BLOCK = struct.Struct("<256sQQII40s")
_CAPACITY_AT = _FIXED.size + len(SECTIONS) * _SECTION.size
_RESERVED_AT = _CAPACITY_AT + _U64.size
_CHECKSUM_AT = HEADER_SIZE - _U64.size
_RESERVED = bytes(_CHECKSUM_AT - _RESERVED_AT)

_PAGE_BITS = 48
_PAGE_MASK = (1 << _PAGE_BITS) - 1

Bytes: TypeAlias = bytes | bytearray | memoryview
U64Array: TypeAlias = npt.NDArray[np.uint64]
ByteArray: TypeAlias = npt.NDArray[np.uint8]


class Kind(IntEnum):
    """What a part holds: pages gathered while the guest ran, or at the pause that ends the epoch."""

    LIVE = 1
    CHECKPOINT = 2


@dataclass(frozen=True, slots=True)
class Section:
    """Where one section lies in a slot: offset and size in bytes, number of items, XXH3-64 of its bytes."""

    offset: int
    size: int
    count: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Header:
    """The first 4096 bytes of a part, checked.

    `sections` are in the order of SECTIONS; `capacity` counts the pages that the slot can hold.
    """

    generation: int
    epoch: int
    kind: Kind
    complete: bool
    running: bool
    part: int
    sections: tuple[Section, ...]
    capacity: int

    def section(self, name: str) -> Section:
        """Return the section of that name (one of SECTIONS)."""
        return self.sections[SECTIONS.index(name)]

    @property
    def wire_size(self) -> int:
        """Bytes of the part in wire form, this header included."""
        return HEADER_SIZE + sum(section.size for section in self.sections)

    @property
    def slot_size(self) -> int:
        """Bytes of the slot that are in use, from its start to the end of its last section."""
        return max([HEADER_SIZE, *(s.offset + s.size for s in self.sections if s.size)])

    def encode(self) -> bytes:
        """Return the 4096 bytes of this header with their checksum. Checks nothing."""
        flags = (_FLAG_COMPLETE if self.complete else 0) | (_FLAG_RUNNING if self.running else 0)
        out = bytearray(HEADER_SIZE)
        _FIXED.pack_into(
            out,
            0,
            MAGIC,
            VERSION,
            HEADER_SIZE,
            self.generation,
            self.epoch,
            self.kind,
            flags,
            self.part,
            len(SECTIONS),
        )
        for index, s in enumerate(self.sections):
            _SECTION.pack_into(
                out, _FIXED.size + index * _SECTION.size, s.offset, s.size, s.count, s.checksum
            )
        _U64.pack_into(out, _CAPACITY_AT, self.capacity)
        _U64.pack_into(out, _CHECKSUM_AT, checksum(memoryview(out)[:_CHECKSUM_AT]))
        return bytes(out)


@dataclass(frozen=True, slots=True)
class Block:
    """One entry of the block table: a stretch of guest memory that QEMU knows by name. Lengths are bytes.

    `shared_file`: its memory is in a file that the daemon maps too. `read_only`: the guest cannot write it.
    """

    name: str
    used_length: int
    max_length: int
    shared_file: bool = False
    read_only: bool = False

    @property
    def pages(self) -> int:
        """Number of pages in use."""
        return self.used_length // PAGE_SIZE

    def encode(self) -> bytes:
        """Return the 320 bytes of this entry."""
        flags = (_BLOCK_SHARED_FILE if self.shared_file else 0) | (_BLOCK_READ_ONLY if self.read_only else 0)
        return _BLOCK.pack(self.name.encode(), self.used_length, self.max_length, flags, 0, b"")


def checksum(data: Bytes | npt.NDArray[np.generic]) -> int:
    """Return the XXH3-64 (seed 0) of `data`, as the layout uses it."""
    return xxhash.xxh3_64_intdigest(data)  # type: ignore[arg-type,unused-ignore]


def _frombuffer(view: memoryview, dtype: str) -> npt.NDArray[np.generic]:
    # np.frombuffer refuses an empty buffer. The bytes need not be aligned in wire form; numpy copes.
    return np.frombuffer(view, dtype=dtype) if len(view) else np.empty(0, dtype=dtype)


def _expect(condition: bool, field: str, value: object, right: str) -> None:
    if not condition:
        raise FrameError(f"{field} is {value}: expected {right}")


def parse_header(data: Bytes, *, limit: int = PART_LIMIT) -> Header:
    """Check the first 4096 bytes of a part and return what they say.

    `limit` is the largest number of bytes that the part may have in wire form; it holds before anything is
    allocated. More bytes than 4096 may be given, and are not looked at. Raises FrameError, which names the
    first wrong field.
    """
    view = memoryview(data).cast("B")
    _expect(len(view) >= HEADER_SIZE, "header length", len(view), f"{HEADER_SIZE} bytes")
    view = view[:HEADER_SIZE]
    magic, version, header_size, generation, epoch, kind, flags, part, sections = _FIXED.unpack_from(view)
    _expect(magic == MAGIC, "magic", magic, repr(MAGIC))
    _expect(
        version == VERSION, "version", version, f"{VERSION} (both hosts need the same series of QEMU patches)"
    )
    _expect(header_size == HEADER_SIZE, "header size", header_size, str(HEADER_SIZE))
    (stored,) = _U64.unpack_from(view, _CHECKSUM_AT)
    found = checksum(view[:_CHECKSUM_AT])
    _expect(stored == found, "header checksum", f"{stored:#018x}", f"{found:#018x}")
    _expect(epoch >= 1, "epoch", epoch, "a number from 1 up")
    _expect(kind in (Kind.LIVE, Kind.CHECKPOINT), "kind", kind, "1 (live) or 2 (checkpoint)")
    known = _FLAG_COMPLETE | _FLAG_RUNNING
    _expect(flags & ~known == 0, "flags", f"{flags:#x}", f"no bits but {known:#x}")
    _expect(sections == len(SECTIONS), "number of sections", sections, str(len(SECTIONS)))
    _expect(
        bytes(view[_RESERVED_AT:_CHECKSUM_AT]) == _RESERVED,
        "reserved part of the header",
        "not zero",
        "zero bytes",
    )
    (capacity,) = _U64.unpack_from(view, _CAPACITY_AT)
    header = Header(
        generation=generation,
        epoch=epoch,
        kind=Kind(kind),
        complete=bool(flags & _FLAG_COMPLETE),
        running=bool(flags & _FLAG_RUNNING),
        part=part,
        sections=tuple(
            Section(*_SECTION.unpack_from(view, _FIXED.size + index * _SECTION.size))
            for index in range(len(SECTIONS))
        ),
        capacity=capacity,
    )
    _check_sections(header, limit)
    return header


def _check_sections(header: Header, limit: int) -> None:
    end = HEADER_SIZE
    for name, s in zip(SECTIONS, header.sections, strict=True):
        if name == "journal":
            _expect(
                s.size >= s.count * REQUEST_SIZE and (s.count > 0 or s.size == 0),
                "size of journal",
                s.size,
                f"{s.count} requests of {REQUEST_SIZE} bytes and their data",
            )
        elif name == "device":
            _expect(
                s.count == (1 if s.size else 0),
                "count of device",
                s.count,
                "1, or 0 if there is no device state",
            )
        else:
            item = _ITEM_SIZE[name]
            _expect(s.size == s.count * item, f"size of {name}", s.size, f"{s.count} items of {item} bytes")
        # An empty section has no place: its offset means nothing, whatever it is.
        if s.size:
            _expect(
                s.offset >= end, f"offset of {name}", s.offset, f"at least {end}, the end of what precedes it"
            )
            aligned = name != "data" or s.offset % PAGE_SIZE == 0
            _expect(aligned, f"offset of {name}", s.offset, f"a multiple of {PAGE_SIZE}")
            end = s.offset + s.size
    data = header.section("data")
    _expect(header.wire_size <= limit, "size of the part", header.wire_size, f"at most {limit} bytes")
    blocks, pages = header.section("blocks").count, header.section("pages").count
    _expect(1 <= blocks <= MAX_BLOCKS, "count of blocks", blocks, f"1 to {MAX_BLOCKS}")
    _expect(data.count == pages, "count of data", data.count, f"{pages}, the count of pages")
    _expect(
        pages <= header.capacity, "count of pages", pages, f"at most the slot's capacity, {header.capacity}"
    )
    last = header.kind is Kind.CHECKPOINT and header.complete
    _expect(last or not header.complete, "flag complete", "set in a live part", "only in a checkpoint part")
    for name in ("device", "digests"):
        size = header.section(name).size
        _expect(last or size == 0, f"size of {name}", size, "0 in a part that does not complete a checkpoint")


# Every part of a session has the same table, or nearly so.
@lru_cache(maxsize=4)
def _parse_blocks(table: bytes) -> tuple[Block, ...]:
    blocks: list[Block] = []
    names: set[str] = set()
    for index, raw in enumerate(_BLOCK.iter_unpack(table)):
        raw_name, used, longest, flags, reserved, tail = raw
        where = f"block {index}"
        name_bytes, nul, rest = raw_name.partition(b"\0")
        _expect(bool(nul), f"{where}: name", "not terminated", f"a NUL within {NAME_SIZE} bytes")
        _expect(
            not rest.strip(b"\0"), f"{where}: name", "followed by stray bytes", "zero bytes after its end"
        )
        try:
            name = name_bytes.decode()
        except UnicodeDecodeError:
            raise FrameError(f"{where}: name is {name_bytes!r}: expected UTF-8") from None
        _expect(name.isprintable() and name != "", f"{where}: name", repr(name), "printable characters")
        _expect(name not in names, f"{where}: name", repr(name), "a name that no other block has")
        names.add(name)
        where = f"block {index} ({name})"
        _expect(longest % PAGE_SIZE == 0, f"{where}: maximal length", longest, f"a multiple of {PAGE_SIZE}")
        _expect(used % PAGE_SIZE == 0, f"{where}: used length", used, f"a multiple of {PAGE_SIZE}")
        _expect(used <= longest, f"{where}: used length", used, f"at most its maximal length, {longest}")
        known = _BLOCK_SHARED_FILE | _BLOCK_READ_ONLY
        _expect(flags & ~known == 0, f"{where}: flags", f"{flags:#x}", f"no bits but {known:#x}")
        _expect(reserved == 0 and not tail.strip(b"\0"), f"{where}: reserved part", "not zero", "zero bytes")
        blocks.append(
            Block(name, used, longest, bool(flags & _BLOCK_SHARED_FILE), bool(flags & _BLOCK_READ_ONLY))
        )
    return tuple(blocks)


class Part:
    """One part of a frame: views into the bytes of a slot or of a receive buffer; nothing is copied.

    Shapes: `pages` (n,) and `zeros` (m,) of uint64 entries, `data` (n, 4096) of uint8, `digests` (k,) of
    uint64. `device` is a memoryview of bytes, `journal` the requests to disks. All are read-only, and mean
    something only after `verify`.
    """

    def __init__(
        self, header: Header, sections: Sequence[memoryview], on_release: Callable[[], None] | None
    ) -> None:
        self.header = header
        self._sections = dict(zip(SECTIONS, (section.toreadonly() for section in sections), strict=True))
        self._on_release = on_release
        self._verified = False
        self.pages: U64Array = _frombuffer(self._sections["pages"], "<u8").view(np.uint64)
        self.zeros: U64Array = _frombuffer(self._sections["zeros"], "<u8").view(np.uint64)
        self.data: ByteArray = _frombuffer(self._sections["data"], "u1").view(np.uint8).reshape(-1, PAGE_SIZE)
        self.digests: U64Array = _frombuffer(self._sections["digests"], "<u8").view(np.uint64)
        self.journal = Journal(self._sections["journal"], header.section("journal").count)

    @classmethod
    def from_slot(cls, slot: Bytes, *, limit: int = PART_LIMIT) -> "Part":
        """Return the part that lies in `slot`, a whole slot. Raises FrameError for a bad header.

        QEMU may write to the slot at any time; what was verified there is only good as long as the slot is
        ours.
        """
        view = memoryview(slot).cast("B")
        header = parse_header(view, limit=limit)
        _expect(
            header.slot_size <= len(view), "end of the last section", header.slot_size, f"at most {len(view)}"
        )
        return cls(
            header,
            [view[s.offset : s.offset + s.size] if s.size else view[:0] for s in header.sections],
            None,
        )

    @classmethod
    def from_wire(
        cls, wire: Bytes, *, limit: int = PART_LIMIT, on_release: Callable[[], None] | None = None
    ) -> "Part":
        """Return the part whose wire form is `wire`, no more and no less. Raises FrameError for a bad header.

        `on_release` is called once, by `release`: it takes the buffer back (PartBuffer.release).
        """
        view = memoryview(wire).cast("B")
        header = parse_header(view, limit=limit)
        _expect(header.wire_size == len(view), "length of the part", len(view), f"{header.wire_size} bytes")
        sections = []
        start = HEADER_SIZE
        for s in header.sections:
            sections.append(view[start : start + s.size])
            start += s.size
        return cls(header, sections, on_release)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The block table. Raises FrameError if it is not valid."""
        return _parse_blocks(bytes(self._sections["blocks"]))

    @property
    def device(self) -> memoryview:
        """The device state stream; empty if the part has none."""
        return self._sections["device"]

    @property
    def nbytes(self) -> int:
        """Bytes of the part in wire form."""
        return self.header.wire_size

    @property
    def verified(self) -> bool:
        """Whether `verify` found the part good, and it was not released since."""
        return self._verified

    def verify(self) -> None:
        """Check every checksum and every index; at the second call, nothing. Raises FrameError.

        About 0.11 ms for each MiB. Lets go of the GIL for all of it that takes long.
        """
        if self._verified:
            return
        _expect(bool(self._sections), "part", "released", "a part whose buffer is still held")
        for name, s in zip(SECTIONS, self.header.sections, strict=True):
            found = checksum(self._sections[name])
            _expect(s.checksum == found, f"checksum of {name}", f"{s.checksum:#018x}", f"{found:#018x}")
        _check_entries(self.blocks, self.pages, self.zeros)
        self.journal.verify()
        if self.digests.size:
            total = sum(block.pages for block in self.blocks)
            _expect(
                self.digests.size == total,
                "count of digests",
                self.digests.size,
                f"{total}, one for each page",
            )
        self._verified = True

    def release(self) -> None:
        """Give the buffer back. The part is of no use afterwards, and no longer counts as verified."""
        self._verified = False
        self._sections = {}
        # Whoever uses the part after this meets missing attributes, not the bytes of another part.
        for name in ("pages", "zeros", "data", "digests", "journal"):
            self.__dict__.pop(name, None)
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()


def split_entries(entries: U64Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (block indices, page numbers) of `entries`, both of the same shape (n,)."""
    index = (entries >> np.uint64(_PAGE_BITS)).astype(np.int64)
    page = (entries & np.uint64(_PAGE_MASK)).astype(np.int64)
    return index, page


def entry(block: int, page: int) -> int:
    """Return the number that names page `page` of the block with index `block`."""
    return block << _PAGE_BITS | page


def _check_entries(blocks: tuple[Block, ...], pages: U64Array, zeros: U64Array) -> None:
    lengths = np.array([block.pages for block in blocks], dtype=np.int64)
    for name, entries in (("pages", pages), ("zeros", zeros)):
        index, page = split_entries(entries)
        bad = np.flatnonzero(index >= len(blocks))
        if bad.size:
            at = int(bad[0])
            raise FrameError(f"{name}[{at}]: block index is {index[at]}: expected less than {len(blocks)}")
        bad = np.flatnonzero(page >= lengths[index])
        if bad.size:
            at = int(bad[0])
            block = blocks[int(index[at])]
            raise FrameError(
                f"{name}[{at}]: page number in block {block.name} is {page[at]}:"
                f" expected less than {block.pages}"
            )
    # QEMU lists pages in ascending order, but nothing in the layout promises it. Sorting what is sorted is
    # cheap.
    every = np.sort(np.concatenate((pages, zeros)))
    twice = np.flatnonzero(every[1:] == every[:-1])
    if twice.size:
        value = int(every[twice[0]])
        block = blocks[value >> _PAGE_BITS]
        raise FrameError(
            f"page {value & _PAGE_MASK} of block {block.name} is listed twice: expected once in a part"
        )


def wire_views(slot: Bytes, header: Header) -> list[memoryview]:
    """Return the pieces of `slot` that make up the wire form, in order, for sendmsg; empty ones are left out.

    Their lengths add up to header.wire_size. Raises FrameError if the slot is shorter than its header says.
    """
    view = memoryview(slot).cast("B")
    _expect(
        header.slot_size <= len(view), "end of the last section", header.slot_size, f"at most {len(view)}"
    )
    return [view[:HEADER_SIZE], *(view[s.offset : s.offset + s.size] for s in header.sections if s.size)]


def listed_pages(slot: Bytes) -> U64Array:
    """Return the entries of all pages that a slot lists, those of zeros included; a copy, shape (n,).

    Entries are block index << 48 | page number. Raises FrameError if the slot's header is wrong.
    """
    header = parse_header(slot, limit=1 << 62)
    view = memoryview(slot).cast("B")
    sections = (header.section("pages"), header.section("zeros"))
    return np.concatenate(
        [np.frombuffer(view[one.offset : one.offset + one.size], dtype="<u8") for one in sections]
    ).astype(np.uint64, copy=False)


def journal_in(slot: Bytes) -> Journal:
    """Return the journal in a slot; views into it. Raises FrameError if the slot's header is wrong."""
    section = parse_header(slot, limit=1 << 62).section("journal")
    view = memoryview(slot).cast("B")
    return Journal(view[section.offset : section.offset + section.size], section.count)


def _round_up(value: int, to: int) -> int:
    return -(-value // to) * to


def lay_out(
    *, blocks: int, pages: int, zeros: int, device: int, digests: int, requests: int = 0, journal: int = 0
) -> tuple[tuple[Section, ...], int]:
    """Return the sections of a slot image that holds just so much, and its size in bytes, a multiple of 4096.

    `device` and `journal` count bytes, the others count items. The checksums in the sections are 0.
    """
    sections = []
    at = HEADER_SIZE
    counts = {"blocks": blocks, "pages": pages, "zeros": zeros, "data": pages, "digests": digests}
    for name in SECTIONS:
        at = _round_up(at, PAGE_SIZE if name == "data" else 8)
        if name == "device":
            count, size = min(device, 1), device
        elif name == "journal":
            count, size = requests, journal
        else:
            count, size = counts[name], counts[name] * _ITEM_SIZE[name]
        sections.append(Section(at, size, count, 0))
        at += size
    return tuple(sections), _round_up(at, PAGE_SIZE)


def encode_slot(
    *,
    generation: int,
    epoch: int,
    kind: Kind = Kind.CHECKPOINT,
    complete: bool = True,
    running: bool = True,
    part: int = 0,
    blocks: Sequence[Block],
    pages: npt.ArrayLike = (),
    data: ByteArray | None = None,
    zeros: npt.ArrayLike = (),
    device: Bytes = b"",
    digests: npt.ArrayLike = (),
    requests: int = 0,
    journal: Bytes = b"",
    allocate: Callable[[int], memoryview] | None = None,
) -> memoryview:
    """Build a slot image and return it, a writable memoryview of a whole number of pages.

    `pages` and `zeros` are entries, `data` is (n, 4096) uint8, `journal` is a section of `requests` requests
    (journal.encode). `allocate` is given the size in bytes and
    returns the zero-filled memory to build in (a mapped memfd, say); a bytearray by default. Does not check
    what it is told: the tests build invalid parts with it. This is the one encoder outside QEMU; the load
    image of a takeover is built by it.
    """
    pages = np.asarray(pages, dtype="<u8")
    zeros = np.asarray(zeros, dtype="<u8")
    digests = np.asarray(digests, dtype="<u8")
    data = np.empty((0, PAGE_SIZE), dtype=np.uint8) if data is None else data
    places, size = lay_out(
        blocks=len(blocks),
        pages=len(pages),
        zeros=len(zeros),
        device=len(device),
        digests=len(digests),
        requests=requests,
        journal=len(journal),
    )
    view = memoryview(bytearray(size)) if allocate is None else allocate(size)
    out = np.frombuffer(view, dtype=np.uint8)
    contents: list[Bytes | npt.NDArray[np.uint8]] = [
        b"".join(block.encode() for block in blocks),
        pages.view(np.uint8),
        zeros.view(np.uint8),
        np.ascontiguousarray(data).reshape(-1),
        device,
        digests.view(np.uint8),
        journal,
    ]
    sections = []
    for place, content in zip(places, contents, strict=True):
        target = out[place.offset : place.offset + place.size]
        if place.size:
            target[:] = content if isinstance(content, np.ndarray) else np.frombuffer(content, dtype=np.uint8)
        sections.append(Section(place.offset, place.size, place.count, checksum(target)))
    header = Header(generation, epoch, kind, complete, running, part, tuple(sections), capacity=len(pages))
    out[:HEADER_SIZE] = np.frombuffer(header.encode(), dtype=np.uint8)
    return view


def encode_wire(slot: Bytes) -> bytes:
    """Return the wire form of the part in `slot` as one copy; for tests and tools. Raises FrameError."""
    return b"".join(wire_views(slot, parse_header(slot, limit=1 << 62)))


class PartBuffer:
    """Memory for one part in wire form, lent by a PartBufferPool. `view` is writable and just as long."""

    def __init__(self, pool: "PartBufferPool", memory: ByteArray, size: int) -> None:
        self._pool = pool
        self._memory: ByteArray | None = memory
        self.view = memoryview(memory.data)[:size]

    def release(self) -> None:
        """Give the memory back to the pool; from any thread; at the second call, nothing.

        The memory is handed out again: no view of it may be used afterwards. Part.release sees to that for a
        part.
        """
        memory, self._memory = self._memory, None
        if memory is not None:
            self.view = memoryview(b"")
            self._pool._take_back(memory)


class PartBufferPool:
    """Receive buffers, reused: touching 64 MiB of fresh memory costs more than receiving into it.

    `limit` bounds the bytes of all buffers together, lent or idle. When it is reached, `acquire` waits for a
    buffer to come back, so a backup that applies too slowly slows the sender down through TCP. `keep` bounds
    the bytes of those that lie idle (default: the limit), so that a frame larger than all others does not
    hold its memory for ever. Usable from any thread.
    """

    _STEP = 1 << 20

    def __init__(self, limit: int, keep: int | None = None) -> None:
        self.limit = limit
        self.keep = limit if keep is None else keep
        self._changed = threading.Condition()
        self._idle: list[ByteArray] = []  # guarded by _changed
        self._lent = 0  # bytes; guarded by _changed

    @property
    def lent(self) -> int:
        """Bytes of the buffers that are out now."""
        return self._lent

    def acquire(self, size: int, *, timeout: float = 10.0) -> PartBuffer:
        """Return a buffer of `size` bytes, whatever is in them. Blocks for `timeout` seconds at most.

        Raises FrameError when the pool can never hold so much, or when nothing came back in time.
        """
        need = _round_up(max(size, 1), self._STEP)
        if need > self.limit:
            raise FrameError(
                f"size of the part is {size}: expected at most {self.limit}, the limit of receive buffers"
            )
        with self._changed:
            if not self._changed.wait_for(lambda: self._lent + need <= self.limit, timeout):
                raise FrameError(
                    f"size of the part is {size}: expected at most {self.limit - self._lent}, what"
                    f" {self.limit} bytes of receive buffers still have free after {timeout:g} s"
                )
            # A small part must not sit in a large buffer, or few parts use the limit up.
            most = min(4 * need, self.limit - self._lent)
            fits = [memory for memory in self._idle if need <= memory.size <= most]
            memory = min(fits, key=lambda candidate: candidate.size, default=None)
            if memory is None:
                # Smaller idle buffers make room, largest first: they are the least likely to fit what comes
                # next.
                self._idle.sort(key=lambda candidate: candidate.size)
                while self._idle and self._lent + sum(m.size for m in self._idle) + need > self.limit:
                    self._idle.pop()
                memory = np.empty(need, dtype=np.uint8)
            else:
                self._idle = [candidate for candidate in self._idle if candidate is not memory]
            self._lent += memory.size
        return PartBuffer(self, memory, size)

    def _take_back(self, memory: ByteArray) -> None:
        with self._changed:
            self._lent -= memory.size
            if sum(idle.size for idle in self._idle) + memory.size <= self.keep:
                self._idle.append(memory)
            self._changed.notify_all()
