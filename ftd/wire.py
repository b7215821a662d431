"""The header in front of every message on a connection between two daemons, and the ways a connection can
end.

All numbers are little-endian. A message is this header and ``length`` bytes of payload:

    0   char[4]  magic "FTDM"
    4   u16      protocol version, 3
    6   u16      type (MessageType)
    8   u64      sequence: 0 for the first message of a connection and direction, then one more each time
    16  u64      length of the payload in bytes; each type has its limit
    24  u32      flags, 0 (reserved: a flag that is not known is refused)
    28  u32      CRC-32 (zlib) of the 28 bytes before it

Nothing in the header is believed before its CRC is right, above all not the length. The payload needs no
checksum here: TLS has one, and the sections of a part carry their own.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import MappingProxyType

from ftd.errors import LinkError

MAGIC = b"FTDM"
PROTOCOL_VERSION = 4
HEADER_SIZE = 32

_FIELDS = struct.Struct("<4sHHQQI")
_CRC = struct.Struct("<I")

KIB = 1 << 10
MIB = 1 << 20


class MessageType(IntEnum):
    """What a payload is. The numbers are on the wire and never change their meaning."""

    HANDSHAKE = 1  # Hello, Welcome, Refusal: the first message of every connection
    CONTROL = 2  # JSON of any other message
    PART = 3  # a part of a frame in its wire form; only on the frames connection
    HEARTBEAT = 4  # JSON of Heartbeat or Goodbye; only on the heartbeat connection


# Largest payload of each type, in bytes. A part may hold a full slot (4 GiB of pages at most) and its tables;
# what this host has room for is asked of the receiver's `allocate`, and of LinkOptions.max_part_bytes before.
PAYLOAD_LIMITS: Mapping[MessageType, int] = MappingProxyType(
    {
        MessageType.HANDSHAKE: 256 * KIB,
        MessageType.CONTROL: 1 * MIB,
        MessageType.PART: 5 << 30,
        MessageType.HEARTBEAT: 4 * KIB,
    }
)


class LostKind(StrEnum):
    """How a connection or a session ended. The texts are used in logs and as metric labels."""

    GOODBYE = "goodbye"  # the peer said that it leaves, and why: not a failure
    RESET = "reset"  # the peer's kernel closed the connection: its daemon died or was killed
    CUT = "cut"  # the link is lost, and the peer lives: it is heard on another path
    SILENCE = "silence"  # nothing heard for too long: the host or the path is gone, or stands still
    STALLED = "stalled"  # a part made no progress for too long, while other connections still work
    PROTOCOL = "protocol"  # the peer sent what it may not
    CLOSED = "closed"  # this side closed it


class LinkLost(LinkError):  # noqa: N818
    """A connection of the link ended. ``kind`` says how, ``detail`` is one line for people."""

    def __init__(self, kind: LostKind, detail: str) -> None:
        super().__init__(f"link lost ({kind}): {detail}")
        self.kind = kind
        self.detail = detail


class VersionMismatch(LinkLost):
    """The peer speaks another version of this protocol."""

    def __init__(self, version: int) -> None:
        super().__init__(
            LostKind.PROTOCOL,
            f"the peer speaks protocol version {version}, this side {PROTOCOL_VERSION}: the two cannot "
            f"protect a guest; upgrade ftd {'here' if version > PROTOCOL_VERSION else 'on the peer'} as well",
        )
        self.version = version


@dataclass(frozen=True, slots=True)
class MessageHeader:
    """A decoded header; ``length`` is in bytes."""

    type: MessageType
    sequence: int
    length: int


def encode_header(type_: MessageType, sequence: int, length: int) -> bytes:
    """Return the 32 bytes that go before a payload of ``length`` bytes.

    Raises ValueError if the payload is larger than its type allows: that is a fault of the caller.
    """
    if length > PAYLOAD_LIMITS[type_]:
        raise ValueError(
            f"a {type_.name} message of {length} bytes is over the limit of {PAYLOAD_LIMITS[type_]}"
        )
    fields = _FIELDS.pack(MAGIC, PROTOCOL_VERSION, type_, sequence, length, 0)
    return fields + _CRC.pack(zlib.crc32(fields))


def decode_header(
    data: bytes | bytearray | memoryview,
    *,
    sequence: int | None = None,
    limits: Mapping[MessageType, int] = PAYLOAD_LIMITS,
) -> MessageHeader:
    """Check 32 bytes and return what they say.

    ``sequence`` is the number expected next (None: any). A type that is not in ``limits`` is not welcome on
    this connection. Raises LinkLost of kind PROTOCOL; VersionMismatch, one of these, if the peer is of
    another version.
    """
    if len(data) != HEADER_SIZE:
        raise _garbage(f"a message header of {len(data)} bytes, expected {HEADER_SIZE}")
    magic, version, type_number, number, length, flags = _FIELDS.unpack_from(data)
    check_begin(magic)
    (crc,) = _CRC.unpack_from(data, _FIELDS.size)
    expected = zlib.crc32(memoryview(data)[: _FIELDS.size])
    if crc != expected:
        raise _garbage(f"a message header with checksum {crc:#010x}, expected {expected:#010x}")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(version)
    try:
        type_ = MessageType(type_number)
    except ValueError:
        raise _garbage(f"message type {type_number}, which does not exist") from None
    if type_ not in limits:
        raise _garbage(f"a {type_.name} message, which has no place on this connection")
    if flags:
        raise _garbage(f"message flags {flags:#x}, expected 0")
    if sequence is not None and number != sequence:
        raise _garbage(f"message number {number}, expected {sequence}: one was lost, repeated or reordered")
    if length > limits[type_]:
        raise _garbage(f"a {type_.name} message of {length} bytes; at most {limits[type_]} are allowed")
    return MessageHeader(type_, number, length)


def check_begin(data: bytes | bytearray | memoryview) -> None:
    """Refuse the beginning of a header that can never become one, without waiting for the rest.

    Raises LinkLost of kind PROTOCOL.
    """
    size = min(len(data), len(MAGIC))
    if data[:size] != MAGIC[:size]:
        raise _garbage(f"bytes that are no ftd message (they begin with {bytes(data[:8])!r})")


def _garbage(what: str) -> LinkLost:
    return LinkLost(LostKind.PROTOCOL, f"the peer sent {what}")
