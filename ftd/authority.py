"""Who may speak for the guest: every decision about authority, as tables and pure functions.

Three things are asked of this module, and nothing of them is decided anywhere else:

    may output be released, and which?      `release_of` a standing
    must the guest here be killed?          `Standing.DEPOSED`
    may the shadow be started?              after `Event.GRANTED` from a backup's standing, only
    which question is put to the arbiter?   `ask_solo`, `ask_takeover`, `ask_pairing`, `ask_stopped`
    who runs the guest at the start?        `at_start`

A node has one standing at a time:

    empty       backup: holds nothing that may be started
    guarding    backup: holds a committed epoch
    claiming    backup: has lost the primary, and asks for generation + 1
    doubting    backup: the same, and a question was sent whose answer is not known
    alone       runs the guest by the arbiter's record `solo`: all of its output may go
    paired      runs the guest, and a backup may take over: what is committed may go, and nothing else
    asking      runs the guest and has lost the backup: nothing may go; asks for solo, generation + 1
    unsure      the same, and a question was sent whose answer is not known
    deposed     the other side has the guest: the one here must be killed
    ended       the guest has ended by itself

`claiming` and `asking` may go back into protection with their peer, since no question of theirs can still be
granted. `doubting` and `unsure` may not: a late grant would make a second owner. They ask the same question
again until it is answered.

`TABLE` is the whole protocol. tests/model/authority.pml is the same for a model checker, which tries each
interleaving with losses, and refutes the protocol if one of its rules is left out.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from ftd.arbiter import Record
from ftd.errors import ArbiterStale
from ftd.state import Role


class Standing(StrEnum):
    """What a node may do; see the module."""

    EMPTY = "empty"
    GUARDING = "guarding"
    CLAIMING = "claiming"
    DOUBTING = "doubting"
    ALONE = "alone"
    PAIRED = "paired"
    ASKING = "asking"
    UNSURE = "unsure"
    DEPOSED = "deposed"
    ENDED = "ended"


class Event(StrEnum):
    """What happens to a node's authority."""

    SYNC = "sync"  # a session begins: the shadow is overwritten
    COMMITTED = "committed"  # the first frame of a session is committed
    LOST = "lost"  # the peer is lost, or leaves, or is to have the guest
    SPOILED = "spoiled"  # the shadow is worth nothing any more, or the primary has taken its leave
    GRANTED = "granted"  # the arbiter's record is what was asked for
    DENIED = "denied"  # the record is another side's
    SILENT = "silent"  # no answer, and the question cannot have been carried out
    DOUBT = "doubt"  # no answer, and the question may have been or may yet be carried out
    FORCED = "forced"  # an operator says that this side has the guest
    ENDED = "ended"  # the guest has ended by itself


class Release(StrEnum):
    """Which of the guest's output may go."""

    ALL = "all"
    COMMITTED = "committed"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Row:
    """In a standing an event leads to another; why, in one line."""

    standing: Standing
    event: Event
    to: Standing
    why: str


_S, _E = Standing, Event

TABLE: tuple[Row, ...] = (
    # a backup
    Row(_S.EMPTY, _E.SYNC, _S.EMPTY, "a copy begins"),
    Row(_S.EMPTY, _E.COMMITTED, _S.GUARDING, "the shadow is a committed epoch"),
    Row(_S.EMPTY, _E.LOST, _S.EMPTY, "there is nothing that could be started"),
    Row(_S.EMPTY, _E.SPOILED, _S.EMPTY, "there was nothing to lose"),
    Row(_S.GUARDING, _E.SYNC, _S.EMPTY, "the primary copies everything anew"),
    Row(_S.GUARDING, _E.SPOILED, _S.EMPTY, "the shadow must not be started, or need not"),
    Row(_S.GUARDING, _E.LOST, _S.CLAIMING, "the primary is lost: the arbiter is asked"),
    Row(_S.CLAIMING, _E.GRANTED, _S.ALONE, "generation + 1 was won: the shadow is started"),
    Row(_S.CLAIMING, _E.DENIED, _S.EMPTY, "the primary kept the guest: the shadow is old"),
    Row(_S.CLAIMING, _E.SILENT, _S.CLAIMING, "the question never got there"),
    Row(_S.CLAIMING, _E.DOUBT, _S.DOUBTING, "the question may still be granted"),
    Row(_S.CLAIMING, _E.SYNC, _S.EMPTY, "the primary is back, and no question of ours can still be granted"),
    Row(_S.CLAIMING, _E.SPOILED, _S.EMPTY, "the shadow must not be started"),
    Row(_S.DOUBTING, _E.GRANTED, _S.ALONE, "generation + 1 was won: the shadow is started"),
    Row(_S.DOUBTING, _E.DENIED, _S.EMPTY, "the primary kept the guest: the shadow is old"),
    Row(_S.DOUBTING, _E.SILENT, _S.DOUBTING, "an earlier question may still be granted"),
    Row(_S.DOUBTING, _E.DOUBT, _S.DOUBTING, "the question may still be granted"),
    # who runs the guest
    Row(_S.ALONE, _E.COMMITTED, _S.PAIRED, "a backup holds the guest: it is to be written down"),
    Row(_S.ALONE, _E.LOST, _S.ALONE, "the backup was not written down: nobody else may start the guest"),
    Row(_S.PAIRED, _E.COMMITTED, _S.PAIRED, "the backup holds the guest again"),
    Row(_S.PAIRED, _E.GRANTED, _S.PAIRED, "the backup is written down"),
    Row(_S.PAIRED, _E.DENIED, _S.DEPOSED, "another side has the guest"),
    Row(_S.PAIRED, _E.SILENT, _S.PAIRED, "the backup is not written down yet"),
    Row(_S.PAIRED, _E.DOUBT, _S.PAIRED, "the backup may be written down"),
    Row(
        _S.PAIRED, _E.LOST, _S.ASKING, "the backup may take over: nothing goes out until the arbiter answers"
    ),
    Row(_S.ASKING, _E.GRANTED, _S.ALONE, "generation + 1 was won: nobody else can have it"),
    Row(_S.ASKING, _E.DENIED, _S.DEPOSED, "the backup has taken over"),
    Row(_S.ASKING, _E.SILENT, _S.ASKING, "the question never got there"),
    Row(_S.ASKING, _E.DOUBT, _S.UNSURE, "the question may still be granted"),
    Row(_S.ASKING, _E.COMMITTED, _S.PAIRED, "the same backup is back, and holds the guest again"),
    Row(_S.ASKING, _E.LOST, _S.ASKING, "the backup was lost again before it held anything"),
    Row(_S.UNSURE, _E.GRANTED, _S.ALONE, "generation + 1 was won: nobody else can have it"),
    Row(_S.UNSURE, _E.DENIED, _S.DEPOSED, "the backup has taken over"),
    Row(_S.UNSURE, _E.SILENT, _S.UNSURE, "an earlier question may still be granted"),
    Row(_S.UNSURE, _E.DOUBT, _S.UNSURE, "the question may still be granted"),
    # a person's word
    *(
        Row(standing, _E.FORCED, _S.ALONE, "an operator says that the other side is dead")
        for standing in (_S.GUARDING, _S.CLAIMING, _S.DOUBTING, _S.ASKING, _S.UNSURE, _S.ALONE)
    ),
    *(
        Row(standing, _E.ENDED, _S.ENDED, "the guest has ended by itself: nobody takes over")
        for standing in _S
        if standing is not _S.ENDED
    ),
)

_ROWS = {(row.standing, row.event): row for row in TABLE}


def release_of(standing: Standing) -> Release:
    """Say which output may go in a standing (rule S1)."""
    match standing:
        case Standing.ALONE:
            return Release.ALL
        case Standing.PAIRED:
            return Release.COMMITTED
        case _:
            return Release.NOTHING


def may_begin_session(standing: Standing) -> bool:
    """Say whether this side may go into protection with its peer, as primary or as backup."""
    return standing not in (Standing.UNSURE, Standing.DOUBTING, Standing.DEPOSED, Standing.ENDED)


class IllegalEvent(ValueError):  # noqa: N818 - names what happened
    """An event that the table does not know in this standing: a bug of the caller."""


class Authority:
    """Holds the standing of a node. `on` is the only way to change it."""

    def __init__(self, standing: Standing, listener: Callable[[Row], None] = lambda row: None) -> None:
        self._standing = standing
        self._listener = listener

    @property
    def standing(self) -> Standing:
        """The standing now."""
        return self._standing

    @property
    def release(self) -> Release:
        """Which output may go now."""
        return release_of(self._standing)

    def knows(self, event: Event) -> bool:
        """Say whether the table has a row for the event now."""
        return (self._standing, event) in _ROWS

    def on(self, event: Event) -> Standing:
        """Take the row of the table for this event, tell the listener, and return the new standing.

        Raises IllegalEvent, with the standing unchanged, if there is none.
        """
        row = _ROWS.get((self._standing, event))
        if row is None:
            raise IllegalEvent(f"{event} has no meaning for a node that is {self._standing}")
        self._standing = row.to
        self._listener(row)
        return row.to


# ---- questions to the arbiter -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A compare-and-set: the record that has to be there, and the one that is to follow."""

    expected: Record | None
    wanted: Record


@dataclass(frozen=True)
class Denied:
    """No question is worth asking: the record says so already. record: the one that says it."""

    reason: str
    record: Record | None


def check_not_stale(record: Record | None, known: int) -> None:
    """Refuse a record that is older than a generation this node knows of (0: none).

    Raises ArbiterStale: with such an arbiter two sides could win the same generation.
    """
    found = record.generation if record is not None else 0
    if found < known:
        what = f"generation {found}" if record is not None else "nothing"
        raise ArbiterStale(
            f"the arbiter knows {what}, and this node has seen generation {known}: its data are old or lost; "
            "restore newer ones, or let a person decide with `ftd takeover --force` on the side that is to "
            "have the guest"
        )


def ask_first(me: str, record: Record | None) -> Question:
    """Return the question of a node that is to start the guest, whoever had it before it was this node."""
    generation = record.generation + 1 if record is not None else 1
    return Question(record, Record(generation=generation, owner=me, state="solo"))


def ask_solo(me: str, generation: int, record: Record | None) -> Question | Denied:
    """Return the question of a node that runs the guest in a generation and wants to go on alone."""
    check_not_stale(record, generation)
    if record is not None and record.owner != me:
        return Denied(f"{record.owner} has the guest: {record}", record)
    return ask_first(me, record)


def ask_takeover(me: str, generation: int, record: Record | None) -> Question | Denied:
    """Return the question of a backup whose shadow is of a generation."""
    check_not_stale(record, generation)
    if record is None:
        return Denied("the arbiter has no record of this pair", record)
    if record.state == "stopped":
        return Denied(f"the guest has ended by itself: {record}", record)
    if record.generation != generation or record.owner == me:
        return Denied(
            f"the shadow is of generation {generation}, and the guest is elsewhere: {record}", record
        )
    if record.state != "paired" or record.backup != me:
        return Denied(f"{record.owner} runs the guest without this backup: {record}", record)
    return ask_first(me, record)


def ask_pairing(me: str, generation: int, backup: str, record: Record | None) -> Question | Denied:
    """Return the question of a node whose backup holds a committed epoch of a generation."""
    check_not_stale(record, generation)
    if record is not None and (record.owner != me or record.generation != generation):
        return Denied(f"the guest of generation {generation} is no longer the one: {record}", record)
    return Question(record, Record(generation=generation, owner=me, state="paired", backup=backup))


def ask_stopped(me: str, generation: int, record: Record | None) -> Question | Denied:
    """Return the question of a node whose guest has ended by itself (rule S7)."""
    if record is None or record.owner != me or record.generation < generation:
        return Denied("this node does not have the guest", record)
    return Question(record, Record(generation=record.generation, owner=me, state="stopped"))


# ---- the start --------------------------------------------------------------------------------------------


class Start(StrEnum):
    """What a node does when its daemon starts."""

    BOOT = "boot"  # win generation + 1, and start the guest from this node's own disks
    WAIT = "wait"  # the backup may be taking over: look again for a while, and then boot
    ATTACH = "attach"  # the guest runs here: hold its output, and ask for solo
    KILL = "kill"  # the guest that runs here is not the one: kill it, and be the backup
    BACKUP = "backup"


@dataclass(frozen=True)
class Decision:
    """What to do at the start, and why in one line."""

    start: Start
    why: str


def at_start(me: str, configured: Role, guest_here: bool, known: int, record: Record | None) -> Decision:
    """Decide who runs the guest when a daemon starts, from what is durable alone.

    guest_here: a QEMU that an earlier daemon left runs the guest. known: the newest generation that this node
    has noted durably. Raises ArbiterStale.
    """
    check_not_stale(record, known)
    if record is None:
        if guest_here:
            return Decision(Start.ATTACH, "the guest runs here, and the arbiter has no record of it yet")
        if configured == "primary":
            return Decision(Start.BOOT, "no record yet, and this node is configured as the primary")
        return Decision(Start.BACKUP, "no record yet, and this node is configured as the backup")
    if record.owner != me:
        if guest_here:
            return Decision(Start.KILL, f"the guest that runs here is deposed: {record}")
        return Decision(Start.BACKUP, f"{record.owner} has the guest, and the newest disks: {record}")
    if guest_here:
        return Decision(Start.ATTACH, f"the guest runs here, as the arbiter says: {record}")
    if record.state == "paired":
        return Decision(
            Start.WAIT, f"the guest ran here and is gone; its backup may be taking over: {record}"
        )
    return Decision(Start.BOOT, f"this node had the guest last, and has the newest disks: {record}")
