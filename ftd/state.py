"""The state of a VM pair as one node sees it, and every move between states.

    primary:   waiting -> solo | held | syncing | protected
               syncing -> protected -> syncing | solo | held
               solo -> syncing        held -> solo | syncing
    backup:    waiting -> syncing -> protected -> taken-over      waiting -> protected
               syncing | protected | held -> waiting        protected -> held -> taken-over | syncing
    after a takeover the backup is the primary: taken-over -> syncing
    a deposed primary is the backup: syncing | protected | solo | held | taken-over -> waiting
    every state -> stopped, which is the end

States promise, moves act: being in a state causes nothing. What each state promises:

waiting     This node answers for no guest. A backup to which no primary has come, or whose shadow was thrown
            away; a primary whose guest is not up yet. The pair as a whole is in none of the other six states
            then: it is not `stopped`, since no guest came to its end, and not `solo`, since no guest of this
            node runs. Without this word an idle spare would look like a failure, or like a running guest.
syncing     The guest runs on the primary; the first copy, or a new one, is under way. The shadow is equal to
            no committed epoch and must not be started: there is no move from here to taken-over.
protected   The backup holds a committed epoch; output is released on commit.
solo        The guest runs here without a backup, by authority; output flows.
held        It is unclear who has the authority (ftd/authority.py). A primary's guest runs, its output is
            withheld. A backup keeps its shadow, not started, and goes on asking the arbiter.
taken-over  The shadow was started here, by authority; output flows; there is no backup yet.
stopped     The guest has ended (by itself, by its operator, or because this side lost the authority), or the
            daemon is on its way out. No way leads back within a process: a new one starts in `waiting`.

`MOVES` is the whole design: a move that has no row there is refused as a bug of the caller, with the state
left as it was. This module is pure: it decides and tells, and does no I/O of its own. It belongs to the event
loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, get_args

from ftd import log

_log = log.get(__name__)

Role = Literal["primary", "backup"]
ROLES: tuple[Role, ...] = get_args(Role)


class PairState(Enum):
    """A state; the value is the word that metrics, status and logs use."""

    STOPPED = "stopped"
    WAITING = "waiting"
    SYNCING = "syncing"
    PROTECTED = "protected"
    SOLO = "solo"
    HELD = "held"
    TAKEN_OVER = "taken-over"

    @property
    def number(self) -> int:
        """The state as a number, in the metric `ftd_pair_state_number`."""
        return _NUMBERS[self]

    def __str__(self) -> str:
        return self.value


# Frozen: alerts and dashboards made last year rely on them. A new state takes the next free number; the
# number of a state that goes away is never used again.
_NUMBERS: dict[PairState, int] = {
    PairState.STOPPED: 0,
    PairState.WAITING: 1,
    PairState.SYNCING: 2,
    PairState.PROTECTED: 3,
    PairState.SOLO: 4,
    PairState.HELD: 5,
    PairState.TAKEN_OVER: 6,
}


@dataclass(frozen=True)
class Row:
    """One allowed move of a node in the given role, and what it is for."""

    role: Role
    origin: PairState
    to: PairState
    why: str


def _rows(role: Role, origin: PairState, *targets: tuple[PairState, str]) -> list[Row]:
    return [Row(role, origin, to, why) for to, why in targets]


_DEPOSED = (
    PairState.WAITING,
    "the other side has the guest, or is to have it: the one here is no more, and this node is the backup",
)

MOVES: tuple[Row, ...] = (
    *_rows(
        "primary",
        PairState.WAITING,
        (PairState.SYNCING, "the guest is up and the backup is there: the first copy begins"),
        (PairState.PROTECTED, "the daemon was restarted in place, and the backup has kept its shadow"),
        (PairState.SOLO, "the guest is up with authority and no backup answers yet"),
        (PairState.HELD, "a guest left by an earlier daemon was found; who owns its output is not known yet"),
        (PairState.STOPPED, "stopped, or failed, before the guest was up"),
    ),
    *_rows(
        "primary",
        PairState.SYNCING,
        _DEPOSED,
        (PairState.PROTECTED, "the first epoch after the copy is committed"),
        (PairState.SOLO, "the backup is lost and authority to go on alone is certain"),
        (PairState.HELD, "the backup is lost and the authority is unclear"),
        (PairState.STOPPED, "the guest ended, was stopped, or belongs to the other side"),
    ),
    *_rows(
        "primary",
        PairState.PROTECTED,
        _DEPOSED,
        (PairState.SYNCING, "the shadow can no longer be trusted or kept up: everything is copied anew"),
        (PairState.SOLO, "the backup left or is lost and authority to go on alone was won"),
        (PairState.HELD, "the backup is lost and the arbiter has not answered"),
        (PairState.STOPPED, "the guest ended, was stopped, or belongs to the other side"),
    ),
    *_rows(
        "primary",
        PairState.SOLO,
        _DEPOSED,
        (PairState.SYNCING, "a backup has come"),
        (PairState.STOPPED, "the guest ended, was stopped, or belongs to the other side"),
    ),
    *_rows(
        "primary",
        PairState.HELD,
        _DEPOSED,
        (PairState.SOLO, "the authority to go on alone is certain: the arbiter or an operator gave it"),
        (PairState.SYNCING, "the same backup is back and nobody has taken over: the copy begins anew"),
        (PairState.STOPPED, "the other side has the authority, or the guest ended"),
    ),
    *_rows(
        "primary",
        PairState.TAKEN_OVER,
        _DEPOSED,
        (PairState.SYNCING, "a new backup has come"),
        (PairState.STOPPED, "the guest ended or was stopped"),
    ),
    *_rows(
        "backup",
        PairState.WAITING,
        (PairState.SYNCING, "a primary has come and its first copy begins"),
        (PairState.PROTECTED, "the daemon was restarted in place, and has kept the shadow"),
        (PairState.STOPPED, "stopped with nothing to guard"),
    ),
    *_rows(
        "backup",
        PairState.SYNCING,
        (PairState.PROTECTED, "the first epoch after the copy is committed"),
        (
            PairState.WAITING,
            "the primary left or is lost before the first commit: the shadow is worth nothing",
        ),
        (PairState.STOPPED, "the guest ended, or this side was stopped"),
    ),
    *_rows(
        "backup",
        PairState.PROTECTED,
        (PairState.TAKEN_OVER, "the primary is lost and the authority was won"),
        (PairState.HELD, "the primary is lost and the arbiter has not answered"),
        (PairState.SYNCING, "the primary copies everything anew"),
        (PairState.WAITING, "the primary took its leave or kept the authority: the shadow is thrown away"),
        (PairState.STOPPED, "the guest ended, or this side was stopped"),
    ),
    *_rows(
        "backup",
        PairState.HELD,
        (PairState.TAKEN_OVER, "the arbiter gave the authority"),
        (PairState.SYNCING, "the primary is back and copies everything anew"),
        (PairState.WAITING, "the primary kept the authority: the shadow is thrown away"),
        (PairState.STOPPED, "the guest ended, or this side was stopped"),
    ),
)

_ROWS: dict[tuple[Role, PairState, PairState], Row] = {(row.role, row.origin, row.to): row for row in MOVES}


class IllegalMove(ValueError):  # noqa: N818 - names what happened
    """A move without a row in `MOVES`: a bug in the caller, not an event to handle."""


@dataclass(frozen=True)
class Move:
    """A move that has happened.

    role: the role in which it was made; a takeover is made by a backup. reason: what happened this time, in
    one line.
    """

    role: Role
    origin: PairState
    to: PairState
    reason: str
    why: str


Listener = Callable[[Move], None]


class StateMachine:
    """Holds the state and the role of this node. `move` is the only way to change either."""

    def __init__(self, role: Role) -> None:
        self._role: Role = role
        self._state = PairState.WAITING
        self._reason = "started"
        self._listeners: list[Listener] = []

    @property
    def state(self) -> PairState:
        """The state now."""
        return self._state

    @property
    def role(self) -> Role:
        """The role now: a backup that took over is the primary."""
        return self._role

    @property
    def reason(self) -> str:
        """Why the node is in this state: the reason given with the last move."""
        return self._reason

    def assume(self, role: Role) -> None:
        """Take another role than at first, while nothing has begun: the arbiter says who is who.

        Raises IllegalMove in any state but `waiting`.
        """
        if self._state is not PairState.WAITING:
            raise IllegalMove(f"a {self._role} that is {self._state} cannot become a {role} just so")
        self._role = role

    def allows(self, to: PairState) -> bool:
        """Say whether a move to the state would be accepted now."""
        return to is self._state or (self._role, self._state, to) in _ROWS

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Have the listener called after every move, in the order of registration; returns what ends that.

        Listeners watch, they do not decide: one that raises is logged and changes nothing, since the state
        has changed already and the others have to hear of it. A listener must not call `move`.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def move(self, to: PairState, reason: str) -> bool:
        """Change the state, and the role with a takeover; log it and tell the listeners.

        Returns whether anything changed: a move to the present state is a repetition, and does nothing.
        Raises IllegalMove, with state and role unchanged, when `MOVES` has no such row for this role.
        """
        if to is self._state:
            return False
        row = _ROWS.get((self._role, self._state, to))
        if row is None:
            allowed = ", ".join(r.to.value for r in MOVES if (r.role, r.origin) == (self._role, self._state))
            raise IllegalMove(
                f"a {self._role} cannot move from {self._state} to {to} ({reason}); "
                f"allowed from here: {allowed or 'nothing'}"
            )
        move = Move(self._role, self._state, to, reason, row.why)
        self._state, self._reason = to, reason
        if to is PairState.TAKEN_OVER:
            self._role = "primary"
        elif to is PairState.WAITING:
            self._role = "backup"  # deposed, if it was the primary
        write = _log.warning if to in _LOUD else _log.info
        write("pair state changed", role=move.role, state=to, was=move.origin, reason=reason, meaning=row.why)
        for listener in list(self._listeners):
            try:
                listener(move)
            except Exception as exception:
                _log.exception("listener to the pair state failed", exception, state=to)
        return True


# Each of these means that a failure of one host now costs something.
_LOUD = frozenset({PairState.SOLO, PairState.HELD, PairState.TAKEN_OVER})


def table() -> str:
    """Return the moves as text, one a line, for people."""
    return "\n".join(f"{row.role:8} {row.origin.value:10} -> {row.to.value:10}  {row.why}" for row in MOVES)
