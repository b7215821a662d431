"""How a session ends: which reason counts when its connections end one after the other.

Decisions only, without clock and sockets. The rules are told of everything that ends, and answer with what is
to follow; the package's docstring says why they are so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ftd.metrics import Connection
from ftd.wire import LostKind

Where = Connection | Literal["session"]


@dataclass(frozen=True)
class LostReason:
    """How a session ended. Times are of the session's clock (monotonic), in nanoseconds."""

    kind: LostKind
    detail: str
    connection: Where
    last_heard_ns: int
    decided_ns: int
    # How long this side itself had stood still when the session ended, or shortly before.
    stood_still_ns: int = 0

    @property
    def planned(self) -> bool:
        """Whether one of the two sides wanted it: no failure, nobody takes over because of it."""
        return self.kind in (LostKind.GOODBYE, LostKind.CLOSED)

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


@dataclass(frozen=True)
class Ending:
    """What is to follow.

    in_grace: first control has its grace to say more; then `grace_over` decides. cut: what the peer is to
    hear about it on the further paths.
    """

    kind: LostKind
    detail: str
    connection: Where
    in_grace: bool = False
    cut: str = ""


class LossRules:
    """The rules of one session. `elsewhere`: the further paths on which the peer is heard now.

    Each call returns what is to follow, or None for nothing. What follows after a first end is of no interest
    any more.
    """

    def __init__(self) -> None:
        self._waiting: Ending | None = None  # what holds if control says nothing within the grace
        self._reset: str | None = None  # how control ended, while a further path goes on

    def connection_ended(
        self, kind: LostKind, detail: str, connection: Connection, elsewhere: Sequence[str]
    ) -> Ending | None:
        """One of the three connections has ended, or carried what it may not."""
        if kind is LostKind.RESET and connection != "control":
            return self._await_control(kind, detail, connection)
        if kind is LostKind.RESET and self._waiting is not None and self._waiting.kind is LostKind.CUT:
            return Ending(LostKind.CUT, self._waiting.detail, "session")
        if kind is LostKind.RESET and elsewhere:
            if self._reset is not None:
                return None
            self._reset = detail
            return Ending(kind, detail, connection, in_grace=True)
        return self._now(kind, detail, connection, elsewhere)

    def said_goodbye(self, reason: str) -> Ending | None:
        """The peer said goodbye on a connection for heartbeats."""
        return self._await_control(LostKind.GOODBYE, reason, "heartbeat")

    def said_cut(self, reason: str, path: str) -> Ending | None:
        """The peer said on a further path that it has given the session up."""
        detail = f"said on {path}: {reason}"
        if self._reset is not None:
            return Ending(LostKind.CUT, detail, "session")
        return self._await_control(LostKind.CUT, detail, "heartbeat")

    def path_ended(self, elsewhere: Sequence[str]) -> Ending | None:
        """The connection of a further path has ended."""
        if self._reset is not None and not elsewhere:
            return Ending(LostKind.RESET, self._reset, "control")
        return None

    def link_silent(self, why: str, elsewhere: Sequence[str]) -> Ending:
        """The link alone has been silent for too long."""
        return self._cut(why, elsewhere)

    def grace_over(self, ending: Ending, elsewhere: Sequence[str]) -> Ending:
        """Control has said nothing that counts more."""
        return self._now(ending.kind, ending.detail, ending.connection, elsewhere)

    def _await_control(self, kind: LostKind, detail: str, connection: Connection) -> Ending | None:
        if self._waiting is not None:
            return None
        self._waiting = Ending(kind, detail, connection, in_grace=True)
        return self._waiting

    def _now(self, kind: LostKind, detail: str, connection: Where, elsewhere: Sequence[str]) -> Ending:
        """End the session; a connection that was lost while the peer is heard elsewhere was cut."""
        if kind in (LostKind.RESET, LostKind.SILENCE) and elsewhere:
            return self._cut(detail, elsewhere)
        return Ending(kind, detail, connection)

    def _cut(self, why: str, elsewhere: Sequence[str]) -> Ending:
        """Give the session up, and say so where the peer may hear it."""
        detail = f"{why}; the peer is heard on {', '.join(elsewhere)}"
        return Ending(LostKind.CUT, detail, "session", cut=why)
