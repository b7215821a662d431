"""Handing the guest over: it stops, its last epoch is committed, and the backup starts it."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from ftd.link import Session
from ftd.messages import Yield
from ftd.monitor import Monitor
from ftd.protection.ends import ProtectionLost
from ftd.protection.epochs import Epochs
from ftd.protection.gathering import Gathering

# A backup that was asked to take over has its arbiter's time limit for it, and a moment to start the guest.
YIELD_SECONDS = 10.0


class Switchover:
    """Wanted at some time, perhaps; `run` then does it at the boundary of two epochs."""

    def __init__(self, monitor: Monitor, session: Session, gathering: Gathering, epochs: Epochs) -> None:
        self._monitor = monitor
        self._session = session
        self._gathering = gathering
        self._epochs = epochs
        self.wanted = False
        # Whether the guest stands still since it was to be handed over, and ran before.
        self.stopped_guest = False

    async def run(self) -> NoReturn:
        """Stop the guest, have its last epoch committed, and ask the backup to start it.

        Always ends in an exception: that of whoever hears the backup's answer, or one that says why there was
        none.
        """
        gathering, epochs = self._gathering, self._epochs
        # So that the guest stands still for one frame only.
        await gathering.wait_for(lambda: not epochs.in_flight)
        running = bool((await self._monitor.execute("query-status"))["running"])
        await self._monitor.execute("stop")
        self.stopped_guest = running
        last = gathering.epoch
        await epochs.checkpoint()
        await gathering.wait_for(lambda: last not in epochs.in_flight)
        await self._session.send(Yield(epoch=last, running=running))
        await asyncio.sleep(YIELD_SECONDS)
        raise ProtectionLost(
            f"{self._session.peer_node} did not take the guest within {YIELD_SECONDS:g} s",
            resync=False,
            aborted="stopped",
        )
