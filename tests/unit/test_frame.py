import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.frame_builder import BLOCKS, RAM, ROM, Spec, page

from ftd import frame
from ftd.errors import FrameError
from ftd.frame import (
    HEADER_SIZE,
    PAGE_SIZE,
    SECTIONS,
    Block,
    Kind,
    Part,
    PartBufferPool,
    encode_slot,
    encode_wire,
    entry,
    listed_pages,
    parse_header,
    split_entries,
    wire_views,
)
from ftd.journal import Request, RequestKind, encode

SPEC = Spec(
    epoch=5,
    part=2,
    pages={(0, 1): 11, (1, 3): 12},
    zeros=((0, 2), (2, 1)),
    requests=(Request(0, RequestKind.DATA, 512, 10, b"0123456789"), Request(1, RequestKind.UNMAP, 0, 4096)),
)


def hand_made_slot() -> bytearray:
    """A slot written from qemu/README.md by its offsets, not by the encoder under test."""
    slot = bytearray(0x4000)
    slot[0:8] = b"FTDSLOT\0"
    struct.pack_into("<IIQQIIII", slot, 0x008, 2, 4096, 9, 77, 2, 3, 0, 7)
    slot[0x1000:0x1006] = b"pc.ram"
    struct.pack_into("<QQI", slot, 0x1100, 8192, 12288, 1)
    struct.pack_into("<Q", slot, 0x1200, 1)
    struct.pack_into("<Q", slot, 0x1300, 0)
    slot[0x2000:0x3000] = b"\xab" * 4096
    slot[0x3000:0x3005] = b"state"
    digests = [xxhash.xxh3_64_intdigest(bytes(4096)), xxhash.xxh3_64_intdigest(b"\xab" * 4096)]
    struct.pack_into("<QQ", slot, 0x3100, *digests)
    struct.pack_into("<QQIIQ", slot, 0x3200, 1024, 4, 1, 1, 0)
    slot[0x3220:0x3224] = b"data"
    places = [
        (0x1000, 320, 1),
        (0x1200, 8, 1),
        (0x1300, 8, 1),
        (0x2000, 4096, 1),
        (0x3000, 5, 1),
        (0x3100, 16, 2),
        (0x3200, 36, 1),
    ]
    for index, (offset, size, count) in enumerate(places):
        digest = xxhash.xxh3_64_intdigest(slot[offset : offset + size])
        struct.pack_into("<QQQQ", slot, 0x030 + 32 * index, offset, size, count, digest)
    struct.pack_into("<Q", slot, 0x110, 1)
    struct.pack_into("<Q", slot, 0xFF8, xxhash.xxh3_64_intdigest(slot[:0xFF8]))
    return slot


def test_a_slot_written_by_hand_from_the_reference_is_understood() -> None:
    slot = hand_made_slot()
    part = Part.from_slot(slot)
    part.verify()
    header = part.header
    assert (header.generation, header.epoch, header.kind, header.part) == (9, 77, Kind.CHECKPOINT, 0)
    assert header.complete
    assert header.running
    assert header.capacity == 1
    assert part.blocks == (Block("pc.ram", 8192, 12288, shared_file=True),)
    assert part.pages.tolist() == [1]
    assert part.zeros.tolist() == [0]
    assert part.data.tobytes() == b"\xab" * 4096
    assert bytes(part.device) == b"state"
    assert part.digests.tolist()[1] == xxhash.xxh3_64_intdigest(b"\xab" * 4096)
    assert list(part.journal) == [Request(1, RequestKind.DATA, 1024, 4, b"data")]
    wire = b"".join(wire_views(slot, header))
    assert len(wire) == header.wire_size == 4096 + 320 + 8 + 8 + 4096 + 5 + 16 + 36
    again = Part.from_wire(wire)
    again.verify()
    assert again.header.encode() == slot[:4096]


names = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=["L", "N", "P"]), min_size=1, max_size=60
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    kind = draw(st.sampled_from(RequestKind))
    data = draw(st.binary(min_size=1, max_size=600)) if kind is RequestKind.DATA else b""
    if kind is RequestKind.FLUSH:
        return Request(draw(st.integers(0, 3)), kind)
    offset = draw(st.integers(0, 1 << 62))
    return Request(draw(st.integers(0, 3)), kind, offset, len(data) or draw(st.integers(1, 1 << 40)), data)


@st.composite
def parts(draw: st.DrawFn) -> dict[str, object]:
    blocks = []
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        used = draw(st.integers(0, 12))
        shared, read_only = draw(st.booleans()), draw(st.booleans())
        blocks.append(
            Block(name, used * PAGE_SIZE, (used + draw(st.integers(0, 3))) * PAGE_SIZE, shared, read_only)
        )
    where = [entry(index, number) for index, block in enumerate(blocks) for number in range(block.pages)]
    chosen = draw(st.lists(st.sampled_from(where), unique=True)) if where else []
    cut = draw(st.integers(0, len(chosen)))
    last = draw(st.booleans())
    seed = draw(st.integers(0, 1000))
    data = np.random.default_rng(seed).integers(0, 256, (cut, PAGE_SIZE), dtype=np.uint8)
    digests = np.arange(len(where), dtype="<u8") if last and draw(st.booleans()) else np.empty(0, "<u8")
    return {
        "generation": draw(st.integers(0, 2**64 - 1)),
        "epoch": draw(st.integers(1, 2**64 - 1)),
        "part": draw(st.integers(0, 2**32 - 1)),
        "kind": Kind.CHECKPOINT if last else draw(st.sampled_from(Kind)),
        "complete": last,
        "running": draw(st.booleans()),
        "blocks": tuple(blocks),
        "pages": np.array(chosen[:cut], dtype="<u8"),
        "zeros": np.array(chosen[cut:], dtype="<u8"),
        "data": data,
        "device": draw(st.binary(max_size=70)) if last else b"",
        "digests": digests,
        "requests": len(asked := draw(st.lists(requests(), max_size=5))),
        "journal": encode(asked),
    }


@settings(max_examples=100, deadline=None)
@given(parts())
def test_what_is_encoded_is_parsed_back_from_slot_and_from_wire(given_part: dict[str, object]) -> None:
    slot = encode_slot(**given_part)  # type: ignore[arg-type]
    for part in (Part.from_slot(slot), Part.from_wire(encode_wire(slot))):
        part.verify()
        header = part.header
        for name in ("generation", "epoch", "part", "kind", "complete", "running"):
            assert getattr(header, name) == given_part[name], name
        assert part.blocks == given_part["blocks"]
        for name in ("pages", "zeros", "data", "digests"):
            assert np.array_equal(getattr(part, name), given_part[name]), name
        assert bytes(part.device) == given_part["device"]
        assert len(part.journal) == given_part["requests"]
        assert encode(list(part.journal)) == given_part["journal"]
        assert parse_header(header.encode()) == header


def resealed(change: object, spec: Spec = SPEC) -> bytes:
    """The header of `spec` after change(bytearray), with a checksum that is right again."""
    header = bytearray(spec.slot()[:HEADER_SIZE])
    change(header)  # type: ignore[operator]
    struct.pack_into("<Q", header, 0xFF8, xxhash.xxh3_64_intdigest(header[:0xFF8]))
    return bytes(header)


def put(form: str, offset: int, value: object) -> object:
    return lambda header: struct.pack_into(form, header, offset, value)


def section(name: str, what: int) -> int:
    return 0x30 + 32 * SECTIONS.index(name) + 8 * what


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("<8s", 0, b"FTDSLOX\0"), "magic is"),
        (put("<I", 8, 1), "version is 1: expected 2"),
        (put("<I", 12, 512), "header size is 512: expected 4096"),
        (put("<Q", 0x18, 0), "epoch is 0"),
        (put("<I", 0x20, 0), "kind is 0"),
        (put("<I", 0x20, 3), "kind is 3"),
        (put("<I", 0x24, 7), "flags is 0x7"),
        (put("<I", 0x2C, 5), "number of sections is 5: expected 7"),
        (put("<B", 0x118, 1), "reserved part of the header is not zero"),
        (put("<B", 0xFF7, 1), "reserved part of the header is not zero"),
        (put("<Q", section("blocks", 1), 321), "size of blocks is 321: expected 3 items of 320 bytes"),
        (put("<Q", section("pages", 2), 3), "size of pages is 16: expected 3 items of 8 bytes"),
        (put("<Q", section("device", 2), 2), "count of device is 2"),
        (put("<Q", section("journal", 2), 3), "size of journal is 74: expected 3 requests of 32 bytes"),
        (put("<Q", section("pages", 0), 4096), "offset of pages is 4096: expected at least"),
        (put("<Q", section("data", 0), (1 << 63) + 8), "offset of data is 9223372036854775816"),
        (put("<Q", 0x110, 1), "count of pages is 2: expected at most the slot's capacity, 1"),
        (put("<I", 0x20, 1), "flag complete is set in a live part"),
        (put("<I", 0x24, 0), "size of device is 12: expected 0"),
    ],
)
def test_a_header_with_one_wrong_field_is_refused_by_name(change: object, words: str) -> None:
    with pytest.raises(FrameError) as caught:
        parse_header(resealed(change))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_bit_of_a_header_counts() -> None:
    header = SPEC.slot()[:HEADER_SIZE]
    for bit in [
        *range(0x110 * 8),
        *range(0x110 * 8, HEADER_SIZE * 8, 97),
        *range(0xFF8 * 8, HEADER_SIZE * 8),
    ]:
        bad = bytearray(header)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            parse_header(bad)


def test_sizes_beyond_the_limit_are_refused_before_anything_is_allocated() -> None:
    def huge(header: bytearray) -> None:
        for name, item in (("pages", 8), ("data", 4096)):
            struct.pack_into("<QQ", header, section(name, 1), item * (1 << 40), 1 << 40)
        struct.pack_into("<Q", header, section("zeros", 0), 1 << 50)
        struct.pack_into("<Q", header, section("data", 0), 1 << 51)
        struct.pack_into("<Q", header, section("device", 0), 1 << 60)
        struct.pack_into("<Q", header, section("journal", 0), 1 << 61)
        struct.pack_into("<Q", header, 0x110, 1 << 40)

    with pytest.raises(FrameError, match=r"size of the part is \d{16}: expected at most 1073741824 bytes"):
        parse_header(resealed(huge))
    size = parse_header(SPEC.slot()).wire_size
    assert parse_header(SPEC.slot(), limit=size).wire_size == size
    with pytest.raises(FrameError, match=f"size of the part is {size}: expected at most {size - 1}"):
        parse_header(SPEC.slot(), limit=size - 1)


def test_a_header_without_blocks_or_cut_short_is_refused() -> None:
    with pytest.raises(FrameError, match="count of blocks is 0"):
        parse_header(Spec(blocks=()).slot())
    with pytest.raises(FrameError, match="header length is 4095"):
        parse_header(SPEC.slot()[:4095])
    with pytest.raises(FrameError, match="end of the last section"):
        Part.from_slot(SPEC.slot()[:HEADER_SIZE])
    for wire in (SPEC.wire()[:-1], SPEC.wire() + b"\0"):
        with pytest.raises(FrameError, match="length of the part"):
            Part.from_wire(wire)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "digests"])
def test_a_flipped_bit_in_any_section_is_found(name: str) -> None:
    slot = bytearray(SPEC.slot())
    place = parse_header(slot).section(name)
    slot[place.offset + place.size - 1] ^= 0x10
    with pytest.raises(FrameError, match=f"checksum of {name} is 0x"):
        Part.from_slot(slot).verify()


def test_the_checksum_check_is_what_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = frame._expect

    def blind(condition: bool, field: str, value: object, right: str) -> None:
        real(condition or "checksum" in field, field, value, right)

    slot = bytearray(SPEC.slot())
    slot[parse_header(slot).section("data").offset] ^= 0x10
    monkeypatch.setattr(frame, "_expect", blind)
    Part.from_slot(slot).verify()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (replace(SPEC, pages={(3, 0): 1}), r"pages\[0\]: block index is 3: expected less than 3"),
        (
            replace(SPEC, pages={(0, 0): 1, (0, 24): 1}),
            r"pages\[1\]: page number in block pc.ram is 24: expected less",
        ),
        (
            replace(SPEC, pages={(1, 6): 1}),
            "page number in block 0000:00:02.0/vga.vram is 6: expected less than 6",
        ),
        (replace(SPEC, zeros=((0, 1 << 47),)), r"zeros\[0\]: page number"),
        (replace(SPEC, zeros=((65535, 0),)), r"zeros\[0\]: block index is 65535"),
        (replace(SPEC, zeros=((0, 9), (0, 9))), "page 9 of block pc.ram is listed twice"),
        (replace(SPEC, zeros=((0, 9), (1, 3))), "page 3 of block 0000:00:02.0/vga.vram is listed twice"),
        (replace(SPEC, digests=(1, 2, 3)), "count of digests is 3: expected 32, one for each page"),
        (
            replace(SPEC, blocks=(*BLOCKS, RAM)),
            "block 3: name is 'pc.ram': expected a name that no other block has",
        ),
        (replace(SPEC, blocks=(*BLOCKS, Block("", 0, 0))), "block 3: name is ''"),
        (replace(SPEC, blocks=(*BLOCKS, Block("a\nb", 0, 0))), "block 3: name is 'a"),
        (replace(SPEC, blocks=(*BLOCKS, Block("x" * 256, 0, 0))), "block 3: name is not terminated"),
        (replace(SPEC, blocks=(*BLOCKS, Block("x\0y", 0, 0))), "block 3: name is followed by stray bytes"),
        (replace(SPEC, blocks=(*BLOCKS, Block("x", 1, 4096))), r"block 3 \(x\): used length is 1"),
        (replace(SPEC, blocks=(*BLOCKS, Block("x", 0, 9))), r"block 3 \(x\): maximal length is 9"),
        (replace(SPEC, blocks=(*BLOCKS, Block("x", 8192, 4096))), "used length is 8192: expected at most"),
    ],
)
def test_an_index_or_a_block_that_is_wrong_is_refused_by_name(spec: Spec, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        spec.received().verify()


@pytest.mark.parametrize(("offset", "words"), [(272, "flags is 0x"), (276, "reserved"), (319, "reserved")])
def test_unknown_bits_in_a_block_are_refused(
    offset: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_bytes = bytearray(ROM.encode())
    entry_bytes[offset] |= 0x80
    monkeypatch.setattr(Block, "encode", lambda self: bytes(entry_bytes))
    with pytest.raises(FrameError, match=words):
        Spec(blocks=(ROM,)).received().verify()


def test_a_name_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "encode", lambda self: b"\xff" + bytes(319))
    with pytest.raises(FrameError, match=r"block 0: name is .* expected UTF-8"):
        Spec(blocks=(ROM,)).received().verify()


def test_the_same_page_number_in_two_blocks_is_no_repetition() -> None:
    Spec(pages={(0, 1): 1, (1, 1): 2}, zeros=((2, 1),)).received().verify()


def test_pages_need_not_be_listed_in_order() -> None:
    Spec(pages={(1, 1): 1, (0, 1): 2, (0, 0): 3}).received().verify()


def test_entries_are_split_without_loss() -> None:
    index, number = split_entries(np.array([entry(255, (1 << 48) - 1), entry(0, 3)], dtype=np.uint64))
    assert index.tolist() == [255, 0]
    assert number.tolist() == [(1 << 48) - 1, 3]


def test_a_part_cannot_be_written_to() -> None:
    part = Part.from_wire(bytearray(SPEC.wire()))
    with pytest.raises(ValueError, match="read-only"):
        part.data[0, 0] = 1
    assert part.device.readonly


def test_a_released_part_is_not_verified_and_gives_its_buffer_back_once() -> None:
    calls: list[int] = []
    part = Part.from_wire(SPEC.wire(), on_release=lambda: calls.append(1))
    part.verify()
    part.release()
    part.release()
    assert calls == [1]
    assert not part.verified
    with pytest.raises(FrameError, match="released"):
        part.verify()
    with pytest.raises(AttributeError):
        _ = part.data


def test_buffers_are_reused() -> None:
    pool = PartBufferPool(8 << 20)
    first = pool.acquire(100)
    first.view[:4] = b"mark"
    first.release()
    first.release()
    second = pool.acquire(50)
    assert bytes(second.view[:4]) == b"mark"
    assert len(second.view) == 50
    assert pool.lent == 1 << 20


def test_a_part_larger_than_the_pool_is_refused_with_both_numbers() -> None:
    with pytest.raises(FrameError, match="is 3000000: expected at most 2097152"):
        PartBufferPool(2 << 20).acquire(3_000_000)


def test_idle_buffers_make_room_for_a_larger_one() -> None:
    pool = PartBufferPool(4 << 20)
    small = [pool.acquire(1 << 20) for _ in range(4)]
    for buffer in small:
        buffer.release()
    large = pool.acquire(4 << 20)
    assert pool.lent == 4 << 20
    assert sum(memory.size for memory in pool._idle) == 0
    large.release()


def test_memory_beyond_what_is_kept_is_given_back() -> None:
    pool = PartBufferPool(8 << 20, keep=2 << 20)
    for buffer in [pool.acquire(1 << 20) for _ in range(8)]:
        buffer.release()
    assert pool.lent == 0
    assert sum(memory.size for memory in pool._idle) == 2 << 20


def test_a_full_pool_waits_for_a_buffer_and_says_so_when_none_comes() -> None:
    pool = PartBufferPool(2 << 20)
    held = pool.acquire(2 << 20)
    with pytest.raises(FrameError, match="expected at most 0, what 2097152 bytes of receive buffers"):
        pool.acquire(1, timeout=0.01)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(len(pool.acquire(2 << 20, timeout=30).view)))
    thread.start()
    held.release()
    thread.join()
    assert got == [2 << 20]


def test_pages_say_what_they_are() -> None:
    assert page(5).tobytes() == struct.pack("<Q", 5) * 512


def test_the_pages_that_a_slot_lists_are_those_with_data_and_those_of_zeros() -> None:
    slot = Spec(pages={(0, 3): 1, (1, 2): 5}, zeros=((0, 7), (2, 1))).slot()
    assert listed_pages(slot).tolist() == [entry(0, 3), entry(1, 2), entry(0, 7), entry(2, 1)]
    with pytest.raises(FrameError, match="magic"):
        listed_pages(bytes(PAGE_SIZE))
