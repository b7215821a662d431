"""What follows from the end of a session: decisions only, the table is in the package's docstring."""

from __future__ import annotations

from dataclasses import dataclass

from ftd.backup.outcome import GuestEnded
from ftd.link import LostKind, LostReason
from ftd.messages import Goodbye, GuestStopped, QemuLost, RestartAgreed, Restarting, Yield
from ftd.metrics import Trigger

# What the primary may say last.
Said = GuestStopped | QemuLost | Yield | Restarting | RestartAgreed | Goodbye


@dataclass(frozen=True)
class Loss:
    """Why the primary counts as lost. heard, decided: monotonic seconds.

    resume: the guest was stopped for this takeover only, and is to run again.
    """

    trigger: Trigger
    detail: str
    heard: float
    decided: float
    resume: bool = False


@dataclass(frozen=True)
class Left:
    """The primary is not lost, and comes again to copy anew."""

    reason: str


def was_away(lost: LostReason, limit_ms: int) -> bool:
    """Whether this side itself stood still for longer than the primary waits for it."""
    return lost.stood_still_ns > limit_ms * 1_000_000


def judge(
    said: Said | None,
    lost: LostReason | None,
    *,
    forced: bool,
    decides: bool,
    limit_ms: int,
    decided: float,
) -> Loss | Left | GuestEnded:
    """Return what follows when the primary has said something, or the session is lost, or both.

    said: what counts of the primary's words. forced: an operator wants a takeover. decides: whether there is
    an arbiter. limit_ms: after how long the primary takes this side for lost. decided: now, monotonic
    seconds.
    """
    match said:
        case GuestStopped(reason=reason):
            return GuestEnded(reason)
        case Yield(running=running):
            return Loss("switchover", "asked for", decided, decided, running)
        case QemuLost(detail=detail):
            return Loss("qemu-died", detail, decided, decided)
        case Goodbye(reason=reason):
            return Left(reason)
        case None if forced and lost is None:
            return Loss("forced", "asked for by an operator", decided, decided)
    # Without an arbiter, a side that was away takes nothing: the primary has gone on alone.
    if lost is None or (not decides and was_away(lost, limit_ms)):
        return Left(str(lost))
    at, heard = lost.decided_ns / 1e9, lost.last_heard_ns / 1e9
    if lost.kind is LostKind.RESET:
        # The kernel of a host that lives says so at once: what was heard last is no measure of it.
        return Loss("connection-reset", lost.detail, min(heard, at), at)
    if lost.kind is LostKind.CUT and decides:
        return Loss("link-cut", lost.detail, heard, at)
    if lost.kind is LostKind.SILENCE:
        return Loss("silence", lost.detail, heard, at)
    return Left(str(lost))
