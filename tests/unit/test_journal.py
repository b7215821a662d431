import struct

import numpy as np
import pytest

from ftd.errors import FrameError
from ftd.journal import (
    HEADER_SIZE,
    Journal,
    Request,
    RequestKind,
    encode,
    encode_chunks,
    is_chunks,
    parse_chunks,
)

REQUESTS = [
    Request(0, RequestKind.DATA, 512, 3, b"abc"),
    Request(1, RequestKind.ZEROES, 4096, 8192),
    Request(0, RequestKind.FLUSH),
    Request(1, RequestKind.DATA, 0, 5, b"hello"),
    Request(0, RequestKind.UNMAP, 1 << 40, 1 << 30),
]


def journal(section: bytes, count: int) -> Journal:
    made = Journal(memoryview(section), count)
    made.verify()
    return made


def test_requests_come_out_in_the_order_in_which_they_went_in_each_with_its_data() -> None:
    found = journal(encode(REQUESTS), len(REQUESTS))
    assert list(found) == REQUESTS
    assert (len(found), found.nbytes) == (5, 8)
    assert list(journal(b"", 0)) == []


def test_the_section_is_laid_out_as_the_reference_says() -> None:
    section = struct.pack("<QQIIQ", 512, 3, 7, 1, 0) + struct.pack("<QQIIQ", 0, 0, 7, 4, 0) + b"abc"
    assert list(journal(section, 2)) == [
        Request(7, RequestKind.DATA, 512, 3, b"abc"),
        Request(7, RequestKind.FLUSH),
    ]


@pytest.mark.parametrize(
    ("record", "data", "words"),
    [
        ((0, 1, 0, 0, 0), b"", r"journal\[1\]: kind is 0: expected 1 to 4"),
        ((0, 1, 0, 5, 0), b"", r"journal\[1\]: kind is 5"),
        ((0, 1, 0, 1, 9), b"x", r"journal\[1\]: reserved part is 9: expected 0"),
        ((0, 0, 0, 2, 0), b"", r"journal\[1\]: length is 0: expected at least 1 byte"),
        ((0, 7, 0, 4, 0), b"", r"journal\[1\]: length of a flush is 7: expected 0"),
        (((1 << 63) + 1, 1, 0, 2, 0), b"", r"journal\[1\]: offset is 9223372036854775809: expected at most"),
        ((0, 1 << 63, 0, 2, 0), b"", r"journal\[1\]: length is 9223372036854775808: expected at most"),
        ((0, 4, 0, 1, 0), b"abc", "journal: has 3 bytes of data: expected 4"),
        ((0, 2, 0, 1, 0), b"abc", "journal: has 3 bytes of data: expected 2"),
        ((0, 1 << 62, 0, 1, 0), b"abc", "journal: has 3 bytes of data: expected 4611686018427387904"),
    ],
)
def test_what_makes_no_sense_is_refused_and_named(record: tuple[int, ...], data: bytes, words: str) -> None:
    section = struct.pack("<QQIIQ", 0, 0, 0, 4, 0) + struct.pack("<QQIIQ", *record) + data
    with pytest.raises(FrameError, match=words):
        journal(section, 2)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(2, RequestKind.ZEROES, 0, 1), "disk is 2: expected less than 2, the number of disks"),
        (
            Request(1, RequestKind.ZEROES, 4000, 97),
            "request ends at 4097: expected at most 4096, the size of disk 1",
        ),
        (Request(0, RequestKind.DATA, 1024, 1, b"x"), "request ends at 1025: expected at most 1024"),
    ],
)
def test_a_request_outside_of_its_disk_is_refused_before_any_is_made(request_: Request, words: str) -> None:
    fitting = [Request(0, RequestKind.DATA, 1023, 1, b"x"), Request(1, RequestKind.UNMAP, 0, 4096)]
    journal(encode(fitting), 2).check([1024, 4096])
    with pytest.raises(FrameError, match=words):
        journal(encode([*fitting, request_]), 3).check([1024, 4096])


def test_every_flipped_bit_of_a_message_with_pieces_of_disks_is_found() -> None:
    message = encode_chunks(7, REQUESTS)
    assert is_chunks(memoryview(message))
    assert list(parse_chunks(memoryview(message), 7)) == REQUESTS
    random = np.random.default_rng(5)
    for at in [*range(HEADER_SIZE * 8), *random.integers(HEADER_SIZE * 8, len(message) * 8, 100).tolist()]:
        torn = bytearray(message)
        torn[at // 8] ^= 1 << at % 8
        if at // 8 < 8:
            assert not is_chunks(memoryview(torn))
            continue
        with pytest.raises(FrameError, match="pieces of disks"):
            parse_chunks(memoryview(torn), 7)


@pytest.mark.parametrize("size", [8, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 31, -1])
def test_a_message_that_is_cut_off_is_refused(size: int) -> None:
    with pytest.raises(FrameError, match="pieces of disks"):
        parse_chunks(memoryview(encode_chunks(7, REQUESTS)[:size]), 7)


def test_pieces_of_another_generation_are_refused() -> None:
    with pytest.raises(FrameError, match="generation is 7: expected 8"):
        parse_chunks(memoryview(encode_chunks(7, REQUESTS)), 8)


def test_the_requests_within_a_piece_and_the_pieces_that_are_written_to() -> None:
    requests = [
        Request(0, RequestKind.DATA, 512, 1024, bytes([1]) * 1024),
        Request(1, RequestKind.ZEROES, 4096, 40960),
        Request(0, RequestKind.FLUSH),
        Request(0, RequestKind.DATA, 4096 - 512, 1024, bytes([2]) * 1024),
        Request(0, RequestKind.UNMAP, 8192, 512),
    ]
    journal = Journal(memoryview(encode(requests)), len(requests))
    assert journal.within(0, 0, 4096) == [requests[0], requests[3]]
    assert journal.within(0, 4096, 4096) == [requests[3]]
    assert journal.within(0, 1536, 2048) == []
    assert journal.within(1, 8192, 1) == [requests[1]]
    assert journal.within(2, 0, 1 << 40) == []
    assert journal.places(0, 4096) == {0, 1, 2}
    assert journal.places(1, 4096) == set(range(1, 11))
    assert journal.places(2, 4096) == set()
