"""What `ftd why` says: why the last takeover happened, or why there was none, from both nodes' records.

Besides takeovers and losses it knows the daemons that were replaced in place (ftd/succession.py), since
output waits for them, and a takeover may follow:

    replaced     the daemon's last word. epoch: of the last commit, if there is protection to go on with
    away         of the side that waits, or (own) of a backup's next daemon. peer, epoch, seconds agreed on
    resumed      epoch: the first that was committed afterwards. On the primary, held: seconds
    not-resumed  of a primary whose backup, or which itself, came too late. reason
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ftd.errors import FtdError
from ftd.flight import Entry

# As the reason of a session-lost: no session was lost, the other side's next daemon did not come.
_OVERDUE = "restart-overdue:"

_ENDS = frozenset({"resumed", "not-resumed", "took-over"})

_LONGEST = 12


@dataclass(frozen=True)
class _Restart:
    """A daemon was replaced in place.

    begun: what both nodes noted of its beginning; first: the number of the first of these entries. end: that
    of the entry that ended it, if there is one. epoch: the last one that was committed before; None: there
    was nothing to go on with.
    """

    node: str
    epoch: int | None
    first: int
    begun: list[Entry]
    end: int | None

    def seconds_until(self, entry: Entry) -> float:
        """Return the time from its beginning, by the clock of the entry's node if that noted it."""
        own = [begun for begun in self.begun if begun.node == entry.node]
        return max(0.0, entry.at - (own or self.begun)[0].at)

    @property
    def agreed(self) -> str:
        """For how long the other side waits."""
        seconds = next((begun.fields["seconds"] for begun in self.begun if "seconds" in begun.fields), None)
        return f"the {seconds:g} s" if isinstance(seconds, int | float) else "the time"


def explain(entries: list[Entry]) -> str:
    """Say in a few lines why the last takeover happened, or why there was none.

    Raises FtdError if there are no entries.
    """
    if not entries:
        raise FtdError("nothing was recorded")
    last = max((number for number, entry in enumerate(entries) if entry.what == "took-over"), default=None)
    lost = max((number for number, entry in enumerate(entries) if _is_loss(entry)), default=None)
    restart = _last_restart(entries)
    told = None
    if last is not None and (lost is None or lost < last or not _decided_after(entries, lost)):
        told, text = last, _why_taken(entries, last, restart)
    elif lost is not None:
        told, text = lost, _why_none(entries, lost)
    if restart is None or (told is not None and told > restart.first):
        return text if told is not None else "No takeover: neither side has lost the other."
    sentence = _of_restart(entries, restart)
    lines = [f"No takeover: {sentence}"] if told is None else [text, f"Since then, {sentence}"]
    if restart.end is not None and entries[restart.end].what == "not-resumed":
        lines += _decisions(entries[restart.end :])
    return "\n".join(lines[:_LONGEST])


def _is_loss(entry: Entry) -> bool:
    return entry.what == "session-lost" and not str(entry.fields.get("reason")).startswith(_OVERDUE)


def _decided_after(entries: list[Entry], lost: int) -> bool:
    return any(
        entry.what == "state" and entry.fields.get("to") in ("solo", "held") for entry in entries[lost:]
    )


def _before(entries: list[Entry], end: int, what: str, **fields: object) -> Entry | None:
    """Return the last entry of that kind, of the node whose entry `end` is."""
    node = entries[end].node
    for entry in reversed(entries[:end]):
        if (
            entry.node == node
            and entry.what == what
            and all(entry.fields.get(key) == value for key, value in fields.items())
        ):
            return entry
    return None


def _why_taken(entries: list[Entry], last: int, restart: _Restart | None) -> str:
    took = entries[last]
    lines = [
        f"{took.node} took over at {_clock(took.at)} ({took.fields.get('trigger')}), "
        f"from epoch {took.fields.get('epoch')}."
    ]
    lost = _before(entries, last, "session-lost")
    if restart is not None and restart.end == last:
        sentence = _of_restart(entries, restart)
        lines.append(sentence[0].upper() + sentence[1:])
    elif lost is not None:
        lines.append(
            f"It had lost its primary {took.at - lost.at:.3f} s before: {lost.fields.get('reason')}."
        )
    asked = _before(entries, last, "arbiter", question="takeover", answer="granted")
    if asked is not None:
        took_s = asked.fields.get("seconds", 0.0)
        lines.append(f"The arbiter granted it within {took_s:.3f} s: {asked.fields.get('record')}.")
    other = next((e for e in entries[last:] if e.node != took.node and e.what == "state"), None)
    if other is not None:
        lines.append(f"Then {other.node} was {other.fields.get('to')}: {other.fields.get('reason')}.")
    return "\n".join(lines)


def _why_none(entries: list[Entry], lost: int) -> str:
    loss = entries[lost]
    lines = [
        f"No takeover after {loss.node} lost its peer at {_clock(loss.at)}: {loss.fields.get('reason')}.",
        *_decisions(entries[lost + 1 :]),
    ]
    return "\n".join(lines[:_LONGEST])


def _decisions(entries: list[Entry]) -> Iterator[str]:
    """Say what was asked and decided."""
    for entry in entries:
        if entry.what == "arbiter" and entry.fields.get("question") in ("solo", "takeover"):
            yield (
                f"{entry.node} asked for {entry.fields['question']}: {entry.fields.get('answer')}"
                + (f", {entry.fields['record']}" if entry.fields.get("record") else "")
                + "."
            )
        elif entry.what == "state" and entry.fields.get("to") in ("solo", "held", "waiting", "stopped"):
            yield f"{entry.node} was {entry.fields['to']}: {entry.fields.get('reason')}."


# ---- daemons that were replaced ----------------------------------------------------------------------------


def _replaced(entry: Entry) -> tuple[str, int | None] | None:
    """Return whose daemon is replaced and after which epoch, if the entry is about the beginning of that."""
    if entry.what == "replaced":
        return entry.node, entry.fields.get("epoch")
    if entry.what == "away":
        return (entry.node if entry.fields.get("own") else str(entry.fields.get("peer"))), entry.fields.get(
            "epoch"
        )
    return None


def _last_restart(entries: list[Entry]) -> _Restart | None:
    last = max((number for number, entry in enumerate(entries) if _replaced(entry)), default=None)
    if last is None:
        return None
    which = _replaced(entries[last])
    assert which is not None
    first, begun = last, [entries[last]]
    for number in range(last - 1, -1, -1):
        if entries[number].what in ("resumed", "took-over"):
            break  # what is before is another restart. One that was given up may still come, too late
        if _replaced(entries[number]) == which:
            first = number
            begun.insert(0, entries[number])
    after = range(first + 1, len(entries))
    ends = [number for number in after if entries[number].what in _ENDS] if which[1] is not None else []
    # The primary's says how long output was held.
    end = next((number for number in ends if "held" in entries[number].fields), ends[0] if ends else None)
    if end is not None and entries[ends[0]].what != "resumed":
        end = ends[0]
    return _Restart(which[0], which[1], first, begun, end)


def _of_restart(entries: list[Entry], restart: _Restart) -> str:
    """Say in a sentence what became of it, and for how long output was held."""
    daemon, at = f"the daemon of {restart.node}", _clock(restart.begun[0].at)
    if restart.epoch is None:
        return f"{daemon} was replaced in place at {at}, with no protection to go on with."
    end = entries[restart.end] if restart.end is not None else None
    if end is None:
        return (
            f"{daemon} is being replaced in place since {at}: output is held, and the other side waits for "
            f"{restart.agreed} agreed."
        )
    held = restart.seconds_until(end)
    if end.what == "resumed":
        held = end.fields.get("held") or held
        return (
            f"{daemon} was replaced in place at {at}, and protection went on with epoch "
            f"{end.fields.get('epoch')}, without a copy; output was held for {held:.3f} s."
        )
    if end.what == "took-over":
        return (
            f"{daemon} was being replaced in place since {at}, and the next one did not come within "
            f"{restart.agreed} agreed; output was held for {held:.3f} s, until this takeover."
        )
    failed = f"{daemon} was replaced in place at {at}, and protection did not go on"
    failed += f": {end.fields.get('reason')}; output"
    for entry in entries[restart.end or 0 :]:
        if entry.node == end.node and entry.what == "state" and entry.fields.get("to") == "solo":
            held = restart.seconds_until(entry)
            return f"{failed} was held for {held:.3f} s, until {entry.node} was solo."
    return f"{failed} is held since."


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d} UTC"
