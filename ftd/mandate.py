"""The primary's mandate: what it may say for its guest, and how it asks for what it may not say yet.

The rules are ftd/authority.py's, and the questions ftd/inquiry.py's. Here is when they are put, what a
person's word changes, and what a protection has to wait for: a `Mandate` is the fence of ftd/protection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from ftd.authority import Authority, Event, Release, Standing
from ftd.errors import Deposed, QemuDied
from ftd.inquiry import Inquiry, Outcome
from ftd.link import Session
from ftd.protection import ProtectionLost
from ftd.report import Report

# Between two questions to an arbiter that does not answer.
ASK_AGAIN_SECONDS = 0.5

_SETTLED = "who has the guest was settled while it was copied"


class Mandate:
    """What one primary may say for its guest. Belongs to the event loop.

    standing: at the beginning. told: False if a person gave the guest to this side, and the arbiter does not
    know. won: is told of every generation that this side wins. replicated: notes for a generation that the
    backup may use its copies of the disks; raises HostError.
    """

    def __init__(
        self,
        report: Report,
        inquiry: Inquiry,
        generation: int,
        standing: Standing,
        *,
        told: bool,
        won: Callable[[int], None],
        replicated: Callable[[int], Awaitable[None]],
    ) -> None:
        self._report = report
        self._inquiry = inquiry
        self._authority = Authority(standing, report.on_authority)
        report.set_standing(standing)
        self.generation = generation
        self.held = False  # without an arbiter: output is held, and nobody said that it may go
        self.paired_with = ""  # the backup that the arbiter has on record, in this generation
        self.over = False  # the guest has ended, or was ended: `happened` refuses
        self._won = won
        self._replicated = replicated
        self._told = told or not inquiry.decides
        self._forced = False  # an operator says that the other side is dead
        self._backup = ""  # of the session that there is, or was
        self._asking: asyncio.Task[bool] | None = None  # while a copy is made
        self._nudge = asyncio.Event()  # something changed for whoever waits to ask again

    @property
    def standing(self) -> Standing:
        """See ftd/authority.py."""
        return self._authority.standing

    @property
    def has_arbiter(self) -> bool:
        """Whether there is an arbiter."""
        return self._inquiry.decides

    @property
    def forced(self) -> bool:
        """Whether an operator has said that the other side is dead, and nothing came of it yet."""
        return self._forced

    @property
    def told(self) -> bool:
        """Whether the arbiter knows of everything that a person has decided."""
        return self._told

    @property
    def flows(self) -> bool:
        """Whether all of the guest's output may go."""
        return self._authority.release is Release.ALL

    def happened(self, event: Event) -> None:
        """Change the standing. Raises QemuDied once the guest has ended: nothing changes it any more."""
        if self.over:
            raise QemuDied("the guest has ended")
        self._authority.on(event)

    async def guest_has_ended(self) -> None:
        """It has ended by itself: nobody takes over, and the arbiter is told so, once."""
        self._authority.on(Event.ENDED)
        await self._inquiry.stopped(self.generation)

    # ---- asking -------------------------------------------------------------------------------------------

    @property
    def may_be_forced(self) -> bool:
        """Whether output is held that a person's word would release."""
        return self.standing in (Standing.ASKING, Standing.UNSURE)

    def force(self) -> None:
        """Go on alone with the next question, whatever the arbiter says."""
        self._forced = True
        self._nudge.set()

    async def ask(self) -> Outcome:
        """Ask once to go on alone, or have the arbiter told of what a person has decided.

        Raises Deposed if the other side has the guest, QemuDied if the guest has ended meanwhile.
        """
        if self._forced or not self._told:
            self._forced = self._told = False
            outcome = await self._inquiry.force(self.generation)
            self._told = outcome.granted
            self.happened(Event.FORCED)
            if not self._told:
                self._report.warn(
                    "arbiter_not_told", f"taken by force, and not known to it: {outcome.reason}"
                )
        else:
            outcome = await self._inquiry.solo(self.generation)
            self.happened(outcome.event)
        if self.standing is Standing.DEPOSED:
            raise Deposed(f"this node has lost the guest: {outcome.reason}")
        if self.standing is Standing.ALONE:
            self._forced = self.held = False
            self.paired_with = ""
        if self._told:
            self._report.clear_warning("arbiter_not_told")
        if outcome.granted and outcome.record is not None and outcome.record.generation > self.generation:
            self.generation = outcome.record.generation
            self._won(self.generation)
        return outcome

    @contextlib.asynccontextmanager
    async def over_session(self, session: Session) -> AsyncIterator[None]:
        """The time of a session with a backup, in which questions are put for as long as a copy is made.

        No question is under way any more at its end. Raises what `ask` raises.
        """
        self._backup = session.peer_node
        if self.standing is Standing.ASKING:
            self._asking = asyncio.ensure_future(self._ask_during_copy(session))
        try:
            yield
        finally:
            await self._stop_asking()

    async def _ask_during_copy(self, session: Session) -> bool:
        """Ask for as long as the copy takes, since output is held; end the session once that is settled.

        Returns whether it is. The copy is of a generation, and may not be committed in another; nor may it
        while a question can still be granted. Raises what `ask` raises.
        """
        me = asyncio.current_task()
        while self._asking is me and not self._settled():
            self._nudge.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudge.wait(), ASK_AGAIN_SECONDS)
            if self._asking is me and (self._inquiry.decides or self._forced):
                try:
                    await self.ask()
                finally:
                    if self._settled():
                        await session.close(_SETTLED)
        return self._settled()

    def _settled(self) -> bool:
        return self.standing is not Standing.ASKING

    async def _stop_asking(self) -> bool:
        """Return when no question is under way; whether it is settled who has the guest. Raises Deposed."""
        asking, self._asking = self._asking, None
        if asking is None:
            return False
        self._nudge.set()
        await asyncio.wait({asking})  # and not for it: one that is cancelled may have been carried out
        return asking.result()

    # ---- the fence of a protection; see protection.Fence -------------------------------------------------

    async def before_first_commit(self) -> None:
        """See protection.Fence."""
        await self._replicated(self.generation)

    async def ready_to_commit(self) -> None:
        """See protection.Fence."""
        if await self._stop_asking():
            raise ProtectionLost(f"{_SETTLED}: another copy is needed", resync=True, aborted="stopped")

    def on_first_commit(self) -> None:
        """See protection.Fence."""
        self.held = self._forced = False
        self.happened(Event.COMMITTED)

    async def pair(self) -> None:
        """See protection.Fence."""
        while True:
            outcome = await self._inquiry.pairing(self.generation, self._backup)
            self.happened(outcome.event)
            if outcome.granted:
                self.paired_with = self._backup
                return
            if outcome.event is Event.DENIED:
                raise Deposed(f"this node has lost the guest: {outcome.reason}")
            if self.paired_with == self._backup:
                return  # it is on record from before, and neither side has asked for anything since
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    def release_at_the_end(self, committed: bool) -> bool:
        """See protection.Fence."""
        if not self._authority.knows(Event.LOST):
            return False  # deposed, or the guest has ended
        self._authority.on(Event.LOST)
        if not self._inquiry.decides and not self.held and self.standing is Standing.ASKING:
            self._authority.on(Event.GRANTED)  # nobody to ask
        return self.flows
