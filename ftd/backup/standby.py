"""What a backup is from session to session, and the VM that waits in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ftd import log
from ftd.absence import Away
from ftd.authority import Authority, Event, Standing
from ftd.backup.disks import Disks
from ftd.backup.outcome import ShadowGone
from ftd.config import Config
from ftd.inquiry import Inquiry
from ftd.link import Session
from ftd.machine import MachineDescription
from ftd.marker import Marker
from ftd.qemu import QemuProcess
from ftd.report import Report
from ftd.shadow import Shadow
from ftd.state import PairState, Role

_log = log.get(__name__)

# Has it noted durably which part this node plays in a generation.
Remember = Callable[[int, Role], Awaitable[None]]


@dataclass(frozen=True)
class ShadowVm:
    """A VM that does not run: its QEMU, and what is equal to the last applied epoch.

    memory_limit: bytes that its memory may have. gone: done when its QEMU has ended.
    """

    qemu: QemuProcess
    shadow: Shadow
    disks: Disks
    memory_limit: int
    gone: asyncio.Future[int | None]


async def _forget(generation: int, role: Role) -> None:
    """Note nothing."""


class Standby:
    """The backup's own state. The event loop's: what is said about one moment holds until the next await."""

    def __init__(self, config: Config, report: Report, inquiry: Inquiry, standing: Standing) -> None:
        self.config = config
        self.report = report
        self.inquiry = inquiry
        self.authority = Authority(standing, report.on_authority)
        report.set_standing(standing)
        self.remember: Remember = _forget
        # Of the shadow's machine; None while there is none that a primary could come to.
        self.description: MachineDescription | None = None
        self.markers: list[Marker] = []  # of its disks
        self.claimable = False  # the shadow could be started now
        self.busy = False  # with a session, or its end: no primary may come
        self.guarding = False  # over a session, and nothing has ended it
        self.runs_here = False  # the shadow was started: it is the guest, and not to be ended any more
        self.arrived: asyncio.Queue[Session] = asyncio.Queue()
        self.arrival = asyncio.Event()  # something was put there
        # A daemon of the pair is being replaced, and the shadow waits for it.
        self.away: Away | None = None
        # What operators want: a takeover now; this daemon to be replaced.
        self.forced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.disk_failure = ""
        self.disk_failed_at = 0.0

    def on_session(self, session: Session) -> None:
        """A primary has come, and waits to be guarded."""
        self.arrived.put_nowait(session)
        self.arrival.set()

    async def guards(self, generation: int) -> None:
        """Have it noted, before anything is acknowledged in it, that this node is the backup in a generation.

        Without an arbiter nobody asks for it: the primary's generation is whatever it says.
        """
        if self.inquiry.decides:
            await self.remember(generation, "backup")

    def wait_for_next_daemon(self, away: Away) -> None:
        """Keep the shadow for as long as was agreed."""
        self.away = away
        self.report.away = str(away)
        grace = round(away.deadline - away.since, 3)
        self.report.flight.note("away", peer=away.peer_node, own=away.own, epoch=away.epoch, seconds=grace)
        _log.info("waiting for the primary to go on", peer=away.peer_node, epoch=away.epoch, seconds=grace)

    def disk_failed(self, reason: str) -> None:
        """A disk here cannot be written to: see admission."""
        self.disk_failure, self.disk_failed_at = reason, time.monotonic()

    def spoiled(self) -> None:
        """The shadow is worth nothing any more."""
        self.claimable = False
        if self.authority.knows(Event.SPOILED):
            self.authority.on(Event.SPOILED)

    def shadow_gone(self, when: str) -> ShadowGone:
        """The shadow's QEMU has ended, and with it the shadow."""
        self.spoiled()
        self.report.machine.move(PairState.WAITING, "the shadow's QEMU has ended")
        return ShadowGone(when)
