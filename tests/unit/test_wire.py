import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftd.wire import (
    HEADER_SIZE,
    PAYLOAD_LIMITS,
    PROTOCOL_VERSION,
    LinkLost,
    LostKind,
    MessageHeader,
    MessageType,
    VersionMismatch,
    decode_header,
    encode_header,
)


def raw(magic=b"FTDM", version=PROTOCOL_VERSION, type_=2, sequence=0, length=0, flags=0):
    fields = struct.pack("<4sHHQQI", magic, version, type_, sequence, length, flags)
    return fields + struct.pack("<I", zlib.crc32(fields))


@given(type_=st.sampled_from(MessageType), sequence=st.integers(0, 2**64 - 1), data=st.data())
def test_what_is_encoded_is_decoded(type_, sequence, data):
    length = data.draw(st.integers(0, PAYLOAD_LIMITS[type_]))
    encoded = encode_header(type_, sequence, length)
    assert len(encoded) == HEADER_SIZE
    assert encoded == raw(type_=type_, sequence=sequence, length=length)
    assert decode_header(encoded, sequence=sequence) == MessageHeader(type_, sequence, length)


@given(st.binary(max_size=64))
def test_random_bytes_are_refused_as_a_protocol_error(data):
    with pytest.raises(LinkLost) as caught:
        decode_header(data)
    assert caught.value.kind is LostKind.PROTOCOL
    assert "\n" not in str(caught.value)


@given(position=st.integers(0, HEADER_SIZE - 1), change=st.integers(1, 255))
def test_one_damaged_byte_is_noticed(position, change):
    damaged = bytearray(encode_header(MessageType.CONTROL, 7, 100))
    damaged[position] ^= change
    with pytest.raises(LinkLost):
        decode_header(damaged)


@given(
    version=st.integers(0, 65535),
    type_=st.integers(0, 65535),
    sequence=st.integers(0, 2**64 - 1),
    length=st.integers(0, 2**64 - 1),
    flags=st.integers(0, 2**32 - 1),
)
def test_a_right_checksum_alone_convinces_nobody(version, type_, sequence, length, flags):
    data = raw(version=version, type_=type_, sequence=sequence, length=length, flags=flags)
    try:
        header = decode_header(data, sequence=5)
    except LinkLost:
        pass
    else:
        assert (version, header.sequence, flags) == (PROTOCOL_VERSION, 5, 0)
        assert header.length <= PAYLOAD_LIMITS[header.type]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"short", "5 bytes, expected 32"),
        (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"[:32], "no ftd message"),
        (raw(type_=99), "type 99"),
        (raw(flags=1), "flags 0x1, expected 0"),
        (raw(sequence=4), "message number 4, expected 3"),
        (raw(sequence=2), "message number 2, expected 3"),
        (raw(sequence=3, length=(1 << 20) + 1), "at most 1048576 are allowed"),
        (raw(type_=3, sequence=3), "a PART message, which has no place"),
    ],
)
def test_the_error_names_value_and_expectation(data, told):
    limits = {MessageType.CONTROL: PAYLOAD_LIMITS[MessageType.CONTROL]}
    with pytest.raises(LinkLost, match=told) as caught:
        decode_header(data, sequence=3, limits=limits)
    assert caught.value.kind is LostKind.PROTOCOL


def test_the_length_is_not_believed_before_the_checksum():
    damaged = bytearray(raw(length=2**63))
    damaged[-1] ^= 1
    with pytest.raises(LinkLost, match="checksum"):
        decode_header(damaged)


def test_another_version_is_told_as_such():
    newer, older = PROTOCOL_VERSION + 1, PROTOCOL_VERSION - 1
    for version, where in ((newer, "here"), (older, "on the peer")):
        told = rf"version {version}, this side {PROTOCOL_VERSION}: .*; upgrade ftd {where} as well"
        with pytest.raises(VersionMismatch, match=told):
            decode_header(raw(version=version))


def test_too_large_a_message_is_a_fault_of_the_sender():
    with pytest.raises(ValueError, match="over the limit"):
        encode_header(MessageType.HEARTBEAT, 0, PAYLOAD_LIMITS[MessageType.HEARTBEAT] + 1)
