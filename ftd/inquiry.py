"""Puts a node's questions to the arbiter and tells what came of them, as events of ftd/authority.py.

A question whose answer is not known stays open, and is put again, the same, until it is answered. Everything
that an arbiter can do wrong ends as an event: nothing raised by it reaches a running guest's daemon.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ftd import log
from ftd.arbiter import Answer, Arbiter, Record
from ftd.authority import (
    Denied,
    Event,
    Question,
    ask_first,
    ask_pairing,
    ask_solo,
    ask_stopped,
    ask_takeover,
)
from ftd.errors import ArbiterError, ArbiterStale, ArbiterUnreachable
from ftd.report import Report

_log = log.get(__name__)

# A record that moves on between reading and writing is looked at anew, so often: twice is rare already.
_LOOKS = 5

Ask = Callable[[Record | None], Question | Denied]


@dataclass(frozen=True)
class Outcome:
    """What came of a question. record: what the arbiter has now, as far as it is known."""

    event: Event
    reason: str
    record: Record | None = None

    @property
    def granted(self) -> bool:
        """Whether this side has what it asked for."""
        return self.event is Event.GRANTED


class Inquiry:
    """The questions of one node, one at a time: the next waits. Belongs to the event loop."""

    def __init__(self, arbiter: Arbiter, report: Report, me: str) -> None:
        self.arbiter = arbiter
        self._report = report
        self._me = me
        self._open: tuple[str, Question] | None = None
        self._told = ""
        self._one = asyncio.Lock()

    @property
    def decides(self) -> bool:
        """Whether there is an arbiter at all; without one, everything is granted."""
        return self.arbiter.kind != "none"

    async def first(self, record: Record | None) -> Outcome:
        """Ask to start the guest here, from the record that was looked at."""
        return await self._put("first", lambda _: ask_first(self._me, record), once=True)

    async def solo(self, generation: int) -> Outcome:
        """Ask to go on without a backup. Without an arbiter: granted, in the same generation."""
        if not self.decides:
            return self._grant(generation)
        return await self._put("solo", lambda record: ask_solo(self._me, generation, record))

    async def takeover(self, generation: int) -> Outcome:
        """Ask for the guest of a primary that is lost."""
        if not self.decides:
            return self._grant(generation + 1)
        return await self._put("takeover", lambda record: ask_takeover(self._me, generation, record))

    async def pairing(self, generation: int, backup: str) -> Outcome:
        """Have it written down that a backup may take over."""
        if not self.decides:
            return self._grant(generation)
        return await self._put("pairing", lambda record: ask_pairing(self._me, generation, backup, record))

    async def stopped(self, generation: int) -> Outcome:
        """Have it written down that the guest has ended by itself."""
        if not self.decides:
            return self._grant(generation)
        return await self._put("stopped", lambda record: ask_stopped(self._me, generation, record))

    async def force(self, generation: int) -> Outcome:
        """Take the guest whatever the record says, on a person's word. Never denied."""
        if not self.decides:
            return self._grant(generation + 1)

        def ask(record: Record | None) -> Question:
            newest = max(generation, record.generation if record is not None else 0)
            return Question(record, Record(generation=newest + 1, owner=self._me, state="solo"))

        return await self._put("force", ask)

    def _grant(self, generation: int) -> Outcome:
        return Outcome(
            Event.GRANTED, "nobody decides", Record(generation=generation, owner=self._me, state="solo")
        )

    async def _put(self, name: str, ask: Ask, *, once: bool = False) -> Outcome:
        async with self._one:
            began = time.monotonic()
            outcome = await self._outcome(name, ask, once=once)
        self._report.arbiter_answered(name, outcome.event.value, time.monotonic() - began, outcome.record)
        told = f"{name} {outcome.event} {outcome.reason}"
        if told != self._told:  # asked twice a second while nobody answers
            self._told = told
            loud = outcome.event in (Event.SILENT, Event.DOUBT, Event.DENIED)
            (_log.warning if loud else _log.info)(
                "arbiter", question=name, answer=outcome.event.value, reason=outcome.reason
            )
        return outcome

    async def _outcome(self, name: str, ask: Ask, *, once: bool) -> Outcome:
        if self._open is not None and self._open[0] != name:
            self._open = None  # whatever becomes of it: the next record is not the one that it expects
        try:
            question: Question | Denied
            if self._open is not None:
                question = self._open[1]
            else:
                question = ask(None if once else await self.arbiter.read())
            for _ in range(_LOOKS):
                if isinstance(question, Denied):
                    self._open = None
                    return Outcome(Event.DENIED, question.reason, question.record)
                answer = await self._compare_and_set(name, question)
                if answer.won:
                    return Outcome(Event.GRANTED, str(answer.record), answer.record)
                if once:
                    return Outcome(Event.DENIED, f"it has moved on to {answer.record}", answer.record)
                question = ask(answer.record)
        except ArbiterUnreachable as error:
            self._report.arbiter_failed(str(error))
            return Outcome(Event.DOUBT if error.in_doubt else Event.SILENT, str(error))
        except ArbiterStale as error:
            self._report.arbiter_failed(str(error), stale=True)
            _log.error("THE ARBITER IS OLDER THAN THIS NODE", reason=str(error))
            return Outcome(Event.SILENT, str(error))
        except ArbiterError as error:
            self._report.arbiter_failed(str(error))
            return Outcome(Event.SILENT, str(error))
        return Outcome(Event.SILENT, f"the record was changed {_LOOKS} times meanwhile; asking again")

    async def _compare_and_set(self, name: str, question: Question) -> Answer:
        try:
            answer = await self.arbiter.compare_and_set(question.expected, question.wanted)
        except ArbiterUnreachable as error:
            if error.in_doubt:
                self._open = (name, question)
            raise
        self._open = None
        return answer
