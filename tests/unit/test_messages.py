import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ftd.messages import (
    TEXT_LIMIT,
    Ack,
    Difference,
    Goodbye,
    GuestStopped,
    Heartbeat,
    HeartbeatSettings,
    Hello,
    QemuLost,
    Refusal,
    Resync,
    SyncProgress,
    VerifyResult,
    Welcome,
    decode,
    encode,
)
from ftd.wire import PAYLOAD_LIMITS, LinkLost, LostKind, MessageType

BEAT = HeartbeatSettings(interval_ms=50, misses=6)
HELLO = Hello(
    software_version="0.1",
    node="a",
    session=UUID(int=7),
    generation=3,
    epoch_ms=20,
    heartbeat=BEAT,
    description={"machine": "pc", "vcpus": 2, "blocks": [{"name": "ftd-ram"}]},
)
CONTROL = [
    Ack(generation=1, epoch=2, part_count=1, bytes=4096),
    SyncProgress(generation=1, part_count=1, pages=5, bytes=6),
    VerifyResult(epoch=2, ok=False, pages=9, differing=1, differences=[Difference(block="vga", page=3)]),
    GuestStopped(reason="shutdown", epoch=9),
    QemuLost(detail="killed by signal 9"),
    Resync(reason="digest differs"),
    Goodbye(reason="planned stop"),
]
EVERY = [
    (MessageType.HANDSHAKE, HELLO),
    (MessageType.HANDSHAKE, Welcome(software_version="0.1", node="b", generation=3, heartbeat=BEAT)),
    (MessageType.HANDSHAKE, Refusal(reason="busy")),
    *((MessageType.CONTROL, message) for message in CONTROL),
    (MessageType.HEARTBEAT, Heartbeat(sequence=1, sent_ns=2, state="protected", epoch=3)),
    (MessageType.HEARTBEAT, Goodbye(reason="planned stop")),
]


@pytest.mark.parametrize(("type_", "message"), EVERY, ids=lambda value: getattr(value, "kind", value))
def test_every_message_survives_the_wire(type_, message):
    payload = encode(message)
    assert len(payload) <= PAYLOAD_LIMITS[type_]
    assert decode(type_, payload) == message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "ack2"}, "no known kind"),
        ({"extra": 1}, "unknown field extra"),
        ({"epoch": -1}, "epoch = -1"),
        ({"epoch": "7"}, "epoch = '7'"),
        ({"epoch": 1.5}, "epoch = 1.5"),
        ({"epoch": 2**70}, "epoch = "),
        ({"epoch": None}, "epoch = None"),
    ],
)
def test_a_message_with_a_wrong_field_is_refused_with_its_name(change, told):
    fields = json.loads(encode(CONTROL[0])) | change
    with pytest.raises(LinkLost, match=told) as caught:
        decode(MessageType.CONTROL, json.dumps(fields).encode())
    assert caught.value.kind is LostKind.PROTOCOL


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"kind":"ack"}', b"{}" * 9])
def test_what_is_no_message_is_refused(payload):
    with pytest.raises(LinkLost):
        decode(MessageType.CONTROL, payload)


@given(st.binary(max_size=200), st.sampled_from([MessageType.HANDSHAKE, MessageType.CONTROL]))
def test_random_bytes_are_refused_in_one_line(payload, type_):
    with pytest.raises(LinkLost) as caught:
        decode(type_, payload)
    assert str(caught.value).isprintable()


def test_a_message_has_its_place():
    with pytest.raises(LinkLost, match="no known kind"):
        decode(MessageType.CONTROL, encode(HELLO))
    with pytest.raises(LinkLost, match="no known kind"):
        decode(MessageType.HEARTBEAT, encode(CONTROL[0]))


def test_size_is_limited():
    payload = b" " * (1 << 20) + encode(CONTROL[0])
    with pytest.raises(LinkLost, match="at most 1048576"):
        decode(MessageType.CONTROL, payload)


def test_texts_cannot_forge_log_lines():
    text = Goodbye(reason="a\nftd: error: \x1b[31mb\t" + "x" * 5000).reason
    assert text.startswith("a ftd: error: [31mb x")
    assert text.isprintable()
    assert len(text) == TEXT_LIMIT
    sent = b'{"kind":"goodbye","reason":"a\\nb"}'
    assert decode(MessageType.CONTROL, sent) == Goodbye(reason="a b")


def test_two_sides_agree_on_the_more_patient_heartbeat():
    one, two = HeartbeatSettings(interval_ms=50, misses=10), HeartbeatSettings(interval_ms=100, misses=3)
    assert one.agreed(two) == two.agreed(one) == HeartbeatSettings(interval_ms=100, misses=10)
    assert one.limit_ms == 500


def test_messages_cannot_be_changed():
    with pytest.raises(ValidationError):
        HELLO.node = "b"
