"""What follows from the end of a backup's session: the table alone."""

from typing import Any

import pytest

from ftd.backup.judgement import Left, Loss, judge
from ftd.backup.outcome import GuestEnded
from ftd.link import LostKind, LostReason
from ftd.messages import Goodbye, GuestStopped, QemuLost, Restarting, Yield

LIMIT_MS = 300
HEARD, DECIDED, NOW = 100.0, 100.5, 101.0


def lost(kind: LostKind, *, stood_still: float = 0) -> LostReason:
    return LostReason(
        kind, "detail", "control", int(HEARD * 1e9), int(DECIDED * 1e9), stood_still_ns=int(stood_still * 1e9)
    )


def judged(said: Any, how: LostReason | None, *, forced: bool = False, decides: bool = True) -> Any:
    return judge(said, how, forced=forced, decides=decides, limit_ms=LIMIT_MS, decided=NOW)


@pytest.mark.parametrize(
    ("kind", "follows"),
    [
        (LostKind.RESET, Loss("connection-reset", "detail", HEARD, DECIDED)),
        (LostKind.SILENCE, Loss("silence", "detail", HEARD, DECIDED)),
        (LostKind.CUT, Loss("link-cut", "detail", HEARD, DECIDED)),
        (LostKind.PROTOCOL, Left("protocol: detail")),
        (LostKind.STALLED, Left("stalled: detail")),
        (LostKind.GOODBYE, Left("goodbye: detail")),
        (LostKind.CLOSED, Left("closed: detail")),
    ],
)
def test_a_session_that_ends_without_a_word(kind: LostKind, follows: Any) -> None:
    assert judged(None, lost(kind)) == follows
    # Without an arbiter, a primary that lives behind a link that is cut goes on alone.
    nobody_to_ask = Left("cut: detail") if kind is LostKind.CUT else follows
    assert judged(None, lost(kind), decides=False) == nobody_to_ask


@pytest.mark.parametrize("how", [None, lost(LostKind.RESET), lost(LostKind.SILENCE, stood_still=9)])
@pytest.mark.parametrize("forced", [False, True])
def test_what_the_primary_said_counts_more_than_how_the_session_ended(
    how: LostReason | None, forced: bool
) -> None:
    for decides in (False, True):

        def said(message: Any, decides: bool = decides) -> Any:
            return judged(message, how, forced=forced, decides=decides)

        assert said(GuestStopped(reason="shutdown")) == GuestEnded("shutdown")
        assert said(Goodbye(reason="maintenance")) == Left("maintenance")
        assert said(QemuLost(detail="status 1")) == Loss("qemu-died", "status 1", NOW, NOW)
        assert said(Yield(epoch=4, running=True)) == Loss("switchover", "asked for", NOW, NOW, resume=True)
        assert said(Yield(epoch=4, running=False)) == Loss("switchover", "asked for", NOW, NOW)


def test_a_daemon_that_is_replaced_and_was_not_waited_for_is_judged_by_the_sessions_end() -> None:
    said = Restarting(epoch=4, grace_ms=1)
    assert judged(said, lost(LostKind.RESET)) == Loss("connection-reset", "detail", HEARD, DECIDED)
    assert isinstance(judged(said, lost(LostKind.CLOSED)), Left)


def test_a_takeover_by_force_needs_a_session_that_lives() -> None:
    assert judged(None, None, forced=True) == Loss("forced", "asked for by an operator", NOW, NOW)
    assert judged(None, lost(LostKind.PROTOCOL), forced=True) == Left("protocol: detail")


def test_without_an_arbiter_a_side_that_stood_still_takes_nothing() -> None:
    for kind in (LostKind.RESET, LostKind.SILENCE):
        long, short = lost(kind, stood_still=0.31), lost(kind, stood_still=0.29)
        assert isinstance(judged(None, long, decides=False), Left)
        assert isinstance(judged(None, short, decides=False), Loss)
        assert isinstance(judged(None, long), Loss)  # the arbiter knows


def test_a_reset_is_known_at_once_whatever_was_heard_last() -> None:
    late = LostReason(LostKind.RESET, "detail", "control", int((DECIDED + 1) * 1e9), int(DECIDED * 1e9))
    assert judged(None, late) == Loss("connection-reset", "detail", DECIDED, DECIDED)
