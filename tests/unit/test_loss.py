"""How a session ends, when its connections end one after the other: the rules alone."""

from typing import Any

import pytest

from ftd.link.loss import Ending, LossRules
from ftd.wire import LostKind

NOWHERE: list[str] = []
SIDE = ["side"]


def told(ending: Ending | None) -> Any:
    if ending is None:
        return None
    return ending.kind, ending.detail, ending.connection, ending.in_grace


def in_grace(kind: LostKind, detail: str, connection: str) -> Any:
    return kind, detail, connection, True


def at_once(kind: LostKind, detail: str, connection: str) -> Any:
    return kind, detail, connection, False


def test_control_that_is_reset_ends_the_session_at_once() -> None:
    ending = LossRules().connection_ended(LostKind.RESET, "gone", "control", NOWHERE)
    assert told(ending) == at_once(LostKind.RESET, "gone", "control")


@pytest.mark.parametrize("connection", ["heartbeat", "frames"])
def test_another_connection_waits_for_control_and_the_first_reason_counts(connection: Any) -> None:
    rules = LossRules()
    first = rules.connection_ended(LostKind.RESET, "first", connection, NOWHERE)
    assert told(first) == in_grace(LostKind.RESET, "first", connection)
    assert rules.said_goodbye("second") is None
    assert first is not None
    assert told(rules.grace_over(first, NOWHERE)) == at_once(LostKind.RESET, "first", connection)


@pytest.mark.parametrize("kind", [LostKind.PROTOCOL, LostKind.STALLED])
@pytest.mark.parametrize("connection", ["control", "heartbeat", "frames"])
def test_what_is_no_reset_waits_for_nothing_and_is_no_cut(kind: LostKind, connection: Any) -> None:
    ending = LossRules().connection_ended(kind, "bad", connection, SIDE)
    assert told(ending) == at_once(kind, "bad", connection)


def test_control_is_reset_while_a_path_goes_on_for_longer_than_the_grace() -> None:
    rules = LossRules()
    reset = rules.connection_ended(LostKind.RESET, "gone", "control", SIDE)
    assert told(reset) == in_grace(LostKind.RESET, "gone", "control")
    assert rules.connection_ended(LostKind.RESET, "again", "control", SIDE) is None
    assert reset is not None
    ending = rules.grace_over(reset, SIDE)
    assert told(ending) == at_once(LostKind.CUT, "gone; the peer is heard on side", "session")
    assert ending.cut == "gone"  # the peer is told


def test_control_is_reset_and_the_paths_after_it() -> None:
    rules = LossRules()
    assert rules.path_ended(NOWHERE) is None
    rules.connection_ended(LostKind.RESET, "gone", "control", ["side", "other"])
    assert rules.path_ended(["other"]) is None
    assert told(rules.path_ended(NOWHERE)) == at_once(LostKind.RESET, "gone", "control")


def test_the_peer_said_cut_and_then_control_is_reset() -> None:
    rules = LossRules()
    assert told(rules.said_cut("silent", "side")) == in_grace(
        LostKind.CUT, "said on side: silent", "heartbeat"
    )
    ending = rules.connection_ended(LostKind.RESET, "gone", "control", SIDE)
    assert told(ending) == at_once(LostKind.CUT, "said on side: silent", "session")
    assert ending is not None
    assert not ending.cut  # it knows


def test_control_is_reset_and_then_the_peer_said_cut() -> None:
    rules = LossRules()
    rules.connection_ended(LostKind.RESET, "gone", "control", SIDE)
    assert told(rules.said_cut("silent", "side")) == at_once(LostKind.CUT, "said on side: silent", "session")


def test_a_silence_of_the_channel_is_a_cut_when_the_peer_is_heard_elsewhere() -> None:
    rules = LossRules()
    ending = rules.connection_ended(LostKind.SILENCE, "no data taken", "control", SIDE)
    assert told(ending) == at_once(LostKind.CUT, "no data taken; the peer is heard on side", "session")
    ending = rules.connection_ended(LostKind.SILENCE, "no data taken", "control", NOWHERE)
    assert told(ending) == at_once(LostKind.SILENCE, "no data taken", "control")
