"""What two daemons say to each other, apart from the parts of frames: JSON of the models below.

A message names its `kind`. Kinds and fields that are not known are refused, as are values out of range, so a
receiver never has to guess. Texts are for people: they are made one line and cut to TEXT_LIMIT on both sides.

    handshake   Hello → Welcome | Refusal        first on each connection
    control     Ack, SyncProgress, VerifyResult, GuestStopped, QemuLost, Resync, DiskDigestsWanted,
                DiskDigests, DiskLost, Yield, TookOver, FlightWanted, Flight, Restarting, RestartAgreed,
                Goodbye
    heartbeat   Heartbeat, Goodbye, LinkCut
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from ftd.wire import PAYLOAD_LIMITS, PROTOCOL_VERSION, LinkLost, LostKind, MessageType

TEXT_LIMIT = 500
MAX_DIFFERENCES = 1000  # listed in a VerifyResult; `differing` counts all


def one_line(value: Any) -> Any:
    """Make a text safe for a log line: printable, one line, at most TEXT_LIMIT characters."""
    if not isinstance(value, str):
        return value
    line = " ".join("".join(c if c.isprintable() else " " for c in value[: 4 * TEXT_LIMIT]).split())
    return line if len(line) <= TEXT_LIMIT else line[: TEXT_LIMIT - 1] + "…"


Text = Annotated[str, BeforeValidator(one_line)]
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
# Counts, epochs, generations and sizes. A signed 64-bit number holds them in every reader of JSON that we
# know.
Number = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]

ChannelName = Literal["control", "frames", "heartbeat"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HeartbeatSettings(_Model):
    """How often a side sends, and after how many intervals without a heartbeat the peer counts as lost."""

    interval_ms: int = Field(ge=5, le=10_000)
    misses: int = Field(ge=2, le=100)

    def agreed(self, other: "HeartbeatSettings") -> "HeartbeatSettings":
        """Return what two sides use between them: the more patient value of each, so that both mean the
        same.
        """
        return HeartbeatSettings(
            interval_ms=max(self.interval_ms, other.interval_ms), misses=max(self.misses, other.misses)
        )

    @property
    def limit_ms(self) -> int:
        """Silence that is accepted, in ms."""
        return self.interval_ms * self.misses


# ---- handshake -------------------------------------------------------------------------------------------


class Resume(_Model):
    """The session goes on with what an earlier one has committed, up to `epoch`: nothing is copied anew."""

    epoch: Number


class Hello(_Model):
    """First message of the connecting side (the primary) on each connection of a session."""

    kind: Literal["hello"] = "hello"
    protocol: int = Field(default=PROTOCOL_VERSION, ge=0, le=65535)
    software_version: Name
    node: Name
    session: UUID
    channel: ChannelName = "control"
    # Of a heartbeat connection: the [[heartbeat.path]] that it is for; empty for the link's own.
    path: str = Field(default="", max_length=32, pattern=r"^[a-z0-9-]*$")
    generation: Number
    role: Name = "primary"
    epoch_ms: int = Field(ge=1, le=60_000)
    heartbeat: HeartbeatSettings
    # The machine to be protected, so that the backup can compare it with its own (empty: not told).
    description: dict[str, JsonValue] = {}
    # None: a session that begins with a copy.
    resume: Resume | None = None


class Welcome(_Model):
    """The listening side (the backup) accepts the connection."""

    kind: Literal["welcome"] = "welcome"
    protocol: int = Field(default=PROTOCOL_VERSION, ge=0, le=65535)
    software_version: Name
    node: Name
    generation: Number
    role: Name = "backup"
    heartbeat: HeartbeatSettings
    description: dict[str, JsonValue] = {}


class Refusal(_Model):
    """The listening side does not accept the connection, and says why."""

    kind: Literal["refusal"] = "refusal"
    reason: Text
    # What the hello wants to resume is not held here, and will not be.
    lost: bool = False


# ---- control ---------------------------------------------------------------------------------------------


class Ack(_Model):
    """The backup holds the frame of `epoch` wholly, verified, in memory: it is committed."""

    kind: Literal["ack"] = "ack"
    generation: Number
    epoch: Number
    part_count: Number
    bytes: Number


class SyncProgress(_Model):
    """How far the backup is with the first copy; counts since its start."""

    kind: Literal["sync-progress"] = "sync-progress"
    generation: Number
    part_count: Number
    pages: Number
    bytes: Number


class Difference(_Model):
    """A page of the shadow that is not what the primary's digest says."""

    block: Name
    page: Number


class VerifyResult(_Model):
    """Outcome of comparing the whole shadow with the digests of a frame; `differences` lists the first
    ones.
    """

    kind: Literal["verify-result"] = "verify-result"
    epoch: Number
    ok: bool
    pages: Number
    differing: Number = 0
    differences: list[Difference] = Field(default=[], max_length=MAX_DIFFERENCES)


class DiskDifference(_Model):
    """A block of 4096 bytes of the backup's disk that is not what the primary's is."""

    disk: Name
    block: Number


class DiskVerifyResult(_Model):
    """From the primary: outcome of comparing disks, or pieces of them; `differences` lists the first ones.

    epoch: the disks were compared as of epochs up to this one.
    """

    kind: Literal["disk-verify-result"] = "disk-verify-result"
    epoch: Number
    ok: bool
    blocks: Number
    differing: Number = 0
    differences: list[DiskDifference] = Field(default=[], max_length=MAX_DIFFERENCES)


class GuestStopped(_Model):
    """The guest ended by itself: not a failure, nobody takes over."""

    kind: Literal["guest-stopped"] = "guest-stopped"
    reason: Text
    epoch: Number = 0


class QemuLost(_Model):
    """The sender's QEMU died or no longer answers."""

    kind: Literal["qemu-lost"] = "qemu-lost"
    detail: Text


class Resync(_Model):
    """The sender needs a new first copy."""

    kind: Literal["resync"] = "resync"
    reason: Text


class Yield(_Model):
    """The primary has stopped the guest after `epoch`, which is committed, and wants the backup to have it.

    running: whether the guest ran before, and is to run again.
    """

    kind: Literal["yield"] = "yield"
    epoch: Number
    running: bool


class TookOver(_Model):
    """The backup has the guest now, in this generation."""

    kind: Literal["took-over"] = "took-over"
    generation: Number


class Restarting(_Model):
    """The sender's daemon is about to be replaced by its successor, and wants the other side to wait for it.

    epoch: the last one that is committed, from the primary; 0 from a backup, which cannot know what is under
    way. grace_ms: how long the other side shall wait at most.
    """

    kind: Literal["restarting"] = "restarting"
    epoch: Number
    grace_ms: int = Field(ge=1, le=60_000)


class RestartAgreed(_Model):
    """The sender waits for the other side's next daemon, for `grace_ms`; 0: it does not wait.

    epoch: the last one that is committed. Nothing is under way, and nothing will be sent any more.
    """

    kind: Literal["restart-agreed"] = "restart-agreed"
    epoch: Number
    grace_ms: int = Field(ge=0, le=60_000)


class DiskDigestsWanted(_Model):
    """The primary asks for digests of pieces of a disk; bytes. See ftd.disksync."""

    kind: Literal["disk-digests-wanted"] = "disk-digests-wanted"
    number: Number
    disk: Number
    offsets: list[Number] = Field(min_length=1, max_length=64)
    length: int = Field(ge=1, le=64 << 20)
    piece: Literal[4096, 1048576]
    seed: Number


class DiskDigests(_Model):
    """The backup's answer: one digest of 16 bytes for each piece, in base64.

    epoch: the one whose disk this is; 0 if it is not complete yet.
    """

    kind: Literal["disk-digests"] = "disk-digests"
    number: Number
    epoch: Number = 0
    digests: str = Field(max_length=500_000)


class DiskLost(_Model):
    """The backup cannot write to one of its disks: it is of no use until somebody has looked at it."""

    kind: Literal["disk-lost"] = "disk-lost"
    reason: Text


class FlightWanted(_Model):
    """The sender asks for the newest lines of the other side's flight recorder, for `ftd why`."""

    kind: Literal["flight-wanted"] = "flight-wanted"


class Flight(_Model):
    """The answer: whole lines, compressed as ftd.flight.pack does it. cut: there are older ones."""

    kind: Literal["flight"] = "flight"
    lines: str = Field(max_length=700_000)
    cut: bool = False


class Goodbye(_Model):
    """The sender leaves as planned. Last message on control and on heartbeat."""

    kind: Literal["goodbye"] = "goodbye"
    reason: Text


# ---- heartbeat -------------------------------------------------------------------------------------------


class Heartbeat(_Model):
    """A sign of life. `sent_ns` is of the sender's monotonic clock: only differences of it mean something."""

    kind: Literal["heartbeat"] = "heartbeat"
    sequence: Number
    sent_ns: Number
    state: Name
    epoch: Number


class LinkCut(_Model):
    """The sender has given the session up, since the link is lost to it, and lives. On further paths only."""

    kind: Literal["link-cut"] = "link-cut"
    reason: Text


# ---- to and from bytes -----------------------------------------------------------------------------------

HandshakeMessage = Hello | Welcome | Refusal
ControlMessage = (
    Ack
    | SyncProgress
    | VerifyResult
    | DiskVerifyResult
    | GuestStopped
    | QemuLost
    | Resync
    | DiskDigestsWanted
    | DiskDigests
    | DiskLost
    | Yield
    | TookOver
    | FlightWanted
    | Flight
    | Restarting
    | RestartAgreed
    | Goodbye
)
HeartbeatMessage = Heartbeat | Goodbye | LinkCut
Message = HandshakeMessage | ControlMessage | Heartbeat | LinkCut

_ADAPTERS: dict[MessageType, TypeAdapter[Any]] = {
    MessageType.HANDSHAKE: TypeAdapter(Annotated[HandshakeMessage, Field(discriminator="kind")]),
    MessageType.CONTROL: TypeAdapter(Annotated[ControlMessage, Field(discriminator="kind")]),
    MessageType.HEARTBEAT: TypeAdapter(Annotated[HeartbeatMessage, Field(discriminator="kind")]),
}


def encode(message: Message) -> bytes:
    """Return the JSON of a message. The caller checks the size, which depends on the type it is sent as."""
    return message.model_dump_json().encode()


def decode(type_: MessageType, payload: bytes | bytearray) -> Message:
    """Return the message in a payload of that type.

    Raises LinkLost of kind PROTOCOL, naming the field, what it holds and what would be right.
    """
    if len(payload) > PAYLOAD_LIMITS[type_]:
        raise LinkLost(
            LostKind.PROTOCOL,
            f"the peer sent a {type_.name} message of {len(payload)} bytes; "
            f"at most {PAYLOAD_LIMITS[type_]} are allowed",
        )
    try:
        message: Message = _ADAPTERS[type_].validate_json(bytes(payload), strict=True)
    except ValidationError as error:
        raise LinkLost(LostKind.PROTOCOL, f"the peer sent {_explain(error, payload)}") from None
    return message


def _explain(error: ValidationError, payload: bytes | bytearray) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return f"a message that is not JSON (it begins with {bytes(payload[:20])!r})"
    location: Sequence[int | str] = first["loc"]
    if not location:
        return one_line(f"a message of no known kind: {first['msg']}; is it of another version of ftd?")  # type: ignore[no-any-return]
    if first["type"] == "extra_forbidden":
        return f"a {location[0]} message with the unknown field {'.'.join(map(str, location[1:]))}"
    value = repr(first["input"])
    if len(value) > 60:
        value = value[:60] + "…"
    where = ".".join(map(str, location[1:]))
    return f"a {location[0]} message with {where} = {value}: {first['msg']}"
