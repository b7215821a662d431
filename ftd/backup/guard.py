"""One session of the backup: what the primary sends is held, and its end has what follows from it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from ftd import log
from ftd.absence import LEAVE_SECONDS, Away, agree_to_wait, leave, wait_applied
from ftd.assembly import receive_limits
from ftd.authority import Event
from ftd.backup.claim import take_over
from ftd.backup.judgement import Left, Loss, Said, judge, was_away
from ftd.backup.outcome import GuestEnded, ShadowGone, TakenOver
from ftd.backup.standby import ShadowVm, Standby
from ftd.errors import FtdError
from ftd.frame import PartBufferPool
from ftd.link import LinkLost, Session
from ftd.marker import Worth
from ftd.messages import (
    DiskDigestsWanted,
    DiskLost,
    DiskVerifyResult,
    Goodbye,
    GuestStopped,
    QemuLost,
    RestartAgreed,
    Restarting,
    Resync,
    TookOver,
    Yield,
)
from ftd.receiver import Committed, Receiver
from ftd.state import PairState

_log = log.get(__name__)

End = TakenOver | GuestEnded | ShadowGone | Away | None


class Guard:
    """Guards over one session, once. away: what it may go on from.

    It does if its hello says so, for that was asked when it was admitted.
    """

    def __init__(self, standby: Standby, vm: ShadowVm, session: Session, away: Away | None) -> None:
        self._standby = standby
        self._report = standby.report
        self._vm = vm
        self._shadow = vm.shadow
        self._session = session
        self._away = away
        self._generation = session.hello.generation
        self._resumes = session.hello.resume is not None
        self._taken_up = not self._resumes  # what is gone on from: once a frame is committed
        self._copied = asyncio.Event()  # once the shadow holds a guest
        self._failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._disk_failed = False  # that is the failure

    async def run(self) -> End:
        """Return what the session has come to; None when the backup goes back to waiting."""
        session = self._session
        if self._resumes and self._away is None:
            # Another session was faster, or the shadow was claimed. The primary has to hear that.
            session.abort("what was committed before is not held here any more")
            return None
        if not await self._begin():
            return None
        self._receiver = self._make_receiver()
        self._messages = asyncio.ensure_future(self._listen())
        self._lost = asyncio.ensure_future(session.wait_lost())
        self._keeper = asyncio.ensure_future(
            self._vm.disks.keep(self._copied, self._generation, self._on_failed)
        )
        try:
            self._standby.guarding = True
            try:
                await self._first_end()
            finally:
                self._standby.guarding = False
            return await self._follow_end()
        except BaseException:
            if session.lost is None:
                await session.close("this backup stops")
            raise
        finally:
            self._messages.cancel()
            self._lost.cancel()
            self._keeper.cancel()
            self._report.away = ""
            self._report.session_ended()
            if session.lost is None:
                session.abort("this side is done with the session")
            await self._receiver.drain()

    # ---- the beginning ------------------------------------------------------------------------------------

    async def _begin(self) -> bool:
        """Be ready for frames. Returns False if the disks cannot be; the session is closed then."""
        standby, report, session = self._standby, self._report, self._session
        standby.forced = asyncio.get_running_loop().create_future()
        report.set_generation(self._generation)
        report.session_began(session)
        report.flight.note(
            "session", peer=session.peer_node, generation=self._generation, resumes=self._resumes
        )
        if self._resumes:
            self._copied.set()
        else:
            standby.authority.on(Event.SYNC)
            standby.claimable = False
            report.begin_sync()
            report.machine.move(PairState.SYNCING, f"{session.peer_node} has come and copies its guest")
            self._shadow.begin_sync(self._generation)
        await standby.guards(self._generation)
        if self._resumes or await self._vm.disks.mark(Worth.SYNCING, self._generation):
            return True
        report.session_ended()
        await session.close("the disks here cannot be marked as incomplete")
        report.machine.move(PairState.WAITING, "the disks here cannot be marked as incomplete")
        return False

    def _make_receiver(self) -> Receiver:
        config, report, copies = self._standby.config, self._report, self._vm.disks.copies
        limits = receive_limits(self._vm.memory_limit, config.epoch.in_flight_mib << 20)
        return Receiver(
            self._session,
            self._shadow,
            PartBufferPool(*limits),
            generation=self._generation,
            memory_limit=self._vm.memory_limit,
            on_committed=self._on_committed,
            on_received=lambda size: report.metrics.add_link_bytes("frames", received=size),
            on_verified=report.verified,
            on_failed=self._on_failed,
            on_applied=lambda epoch, seconds: report.disks_applied(seconds) if copies.images else None,
            copies=copies,
            replicate=config.disks.apply,
            after=self._away.epoch if self._away is not None and self._resumes else None,
        )

    # ---- while it lasts -----------------------------------------------------------------------------------

    def _on_committed(self, frame: Committed) -> None:
        report = self._report
        report.epoch = frame.epoch + 1
        if not self._taken_up:
            self._taken_up = True
            report.away = ""
            report.resumed(frame.epoch, None)
        report.committed_epoch(frame.epoch)
        if self._vm.disks.copies.images:
            report.journal(frame.requests, frame.journal_bytes)
        if frame.first:
            self._standby.authority.on(Event.COMMITTED)
            self._standby.claimable = True
            self._copied.set()
            report.end_sync()
            report.machine.move(PairState.PROTECTED, f"epoch {frame.epoch} is committed")
        self._session.set_beat(report.machine.state.value, frame.epoch)

    def _on_failed(self, reason: str, disk: bool) -> None:
        if not self._failure.done():
            self._disk_failed = disk
            self._failure.set_result(reason)

    async def _listen(self) -> Said | None:
        """Return the message of the primary that ends this session, or None if it ended without one."""
        try:
            while True:
                message = await self._session.receive()
                if isinstance(message, GuestStopped | QemuLost | Yield | Restarting | Goodbye):
                    return message
                if isinstance(message, RestartAgreed) and self._standby.leaving.done():
                    return message
                if isinstance(message, DiskDigestsWanted):
                    self._receiver.ask(message)
                elif isinstance(message, DiskVerifyResult):
                    self._on_disks_verified(message)
        except LinkLost:
            return None

    def _on_disks_verified(self, result: DiskVerifyResult) -> None:
        self._report.verified_disks(result)
        if not result.ok:
            first = result.differences[0] if result.differences else None
            where = f", first block {first.block} of disk {first.disk}" if first else ""
            self._shadow.poison(
                f"after epoch {result.epoch} its disks differ from the guest's in {result.differing} "
                f"blocks{where}"
            )

    # ---- its end ------------------------------------------------------------------------------------------

    async def _first_end(self) -> None:
        """Wait for the first thing that ends the session, on either side.

        Raises Succession when this daemon is to be replaced, and the primary waits for the next one.
        """
        standby, vm = self._standby, self._vm
        ends: set[asyncio.Future[Any]] = {
            self._messages,
            self._lost,
            vm.gone,
            self._failure,
            standby.forced,
            standby.leaving,
        }
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not standby.leaving.done():
            return
        ends.remove(standby.leaving)
        if not any(end.done() for end in ends):
            node = standby.config.node
            left = await leave(
                self._session, self._messages, self._shadow, node.restart_grace_ms, node.name, vm.qemu.pid
            )
            if left is not None:
                raise left
        standby.leaving = asyncio.get_running_loop().create_future()
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

    async def _follow_end(self) -> End:
        """Do what follows: this side's own troubles first, then what the primary said or suffered."""
        if self._vm.gone.done():
            return await self._on_shadow_gone()
        if self._failure.done() and not self._lost.done():
            await self._on_failure(self._failure.result())
            return None
        # What the primary said last decides; when the session ends, that is read before anything else.
        said = await self._messages if self._messages.done() or self._lost.done() else None
        if isinstance(said, Restarting):
            next_daemon, said = await self._on_restarting(said)
            if next_daemon is not None and said is None and not self._vm.gone.done():
                return next_daemon
        return await self._on_primary_ended(said, time.monotonic())

    async def _on_shadow_gone(self) -> ShadowGone:
        status = self._vm.qemu.exit_status
        with contextlib.suppress(FtdError):
            await self._session.send(QemuLost(detail=f"it ended with status {status}"))
        await self._session.close("the shadow's QEMU has ended")
        return self._standby.shadow_gone(f"it ended with status {status} while it held a shadow")

    async def _on_failure(self, reason: str) -> None:
        """What the primary sent is of no use here: it has to copy anew, or to wait."""
        _log.error("what the primary sent cannot be used", reason=reason)
        if self._disk_failed:
            self._standby.disk_failed(reason)
        with contextlib.suppress(FtdError):
            await self._session.send(DiskLost(reason=reason) if self._disk_failed else Resync(reason=reason))
        await self._session.close(reason)
        await self._receiver.drain()
        self._wait_again(reason)

    async def _on_restarting(self, said: Restarting) -> tuple[Away | None, Said | None]:
        """Agree to wait for the primary's next daemon, and see the session end.

        Returns what was agreed, and what the primary has said after it: the guest may have ended.
        """
        self._messages = asyncio.ensure_future(self._listen())
        guards = self._report.machine.state is PairState.PROTECTED
        grace = self._standby.config.node.restart_grace_ms if guards else 0
        next_daemon = await agree_to_wait(self._session, said, self._shadow, grace)
        ends: set[asyncio.Future[Any]] = {self._lost, self._vm.gone}
        await asyncio.wait(ends, timeout=LEAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if self._session.lost is None:
            self._session.abort("the primary said that its daemon is replaced, and stayed")
            await self._lost
        after = await self._messages
        await self._receiver.drain()
        return next_daemon, after

    async def _on_primary_ended(self, said: Said | None, decided: float) -> End:
        """The primary has ended the session, or was lost; or an operator does not wait for that."""
        standby, session = self._standby, self._session
        self._report.flight.note(
            "session-lost",
            reason=said.kind if said is not None else str(session.lost or "ended here"),
            heartbeats_missed=session.heartbeats_missed,
            stood_still=round(session.lost.stood_still_ns / 1e9, 4) if session.lost is not None else 0,
        )
        decides, limit_ms = standby.inquiry.decides, session.heartbeat.limit_ms
        found = judge(
            said,
            session.lost,
            forced=standby.forced.done(),
            decides=decides,
            limit_ms=limit_ms,
            decided=decided,
        )
        if isinstance(found, GuestEnded):
            return await self._on_guest_ended(found)
        if isinstance(said, Yield):
            assert isinstance(found, Loss)
            return await self._on_yield(said.epoch, found)
        if isinstance(found, Left) and not isinstance(said, Goodbye):
            self._warn_of_absence(decides=decides, limit_ms=limit_ms)
        if isinstance(found, Loss) and session.lost is None:
            session.abort(
                "an operator has this side take over"
                if found.trigger == "forced"
                else "its QEMU is lost: taking over"
            )
        await self._receiver.drain()
        if isinstance(found, Left):
            self._wait_again(f"the primary left: {found.reason}")
            return None
        return await self._take_over(found)

    def _warn_of_absence(self, *, decides: bool, limit_ms: int) -> None:
        lost = self._session.lost
        if not decides and lost is not None and was_away(lost, limit_ms):
            _log.warning(
                "this node itself stood still: it does not take over", seconds=lost.stood_still_ns / 1e9
            )

    async def _on_guest_ended(self, ended: GuestEnded) -> GuestEnded:
        self._standby.authority.on(Event.ENDED)
        await self._session.close("the guest has stopped")
        await self._receiver.drain()
        self._report.machine.move(PairState.STOPPED, f"the guest has stopped: {ended.reason}")
        return ended

    async def _on_yield(self, epoch: int, loss: Loss) -> End:
        """Switchover: the guest stands still on the primary, and its last epoch is acknowledged."""
        try:
            await wait_applied(self._shadow, epoch)
        except TimeoutError:
            self._session.abort("the last epoch was not applied")
            await self._receiver.drain()
            self._wait_again("switchover: the last epoch was not applied")
            return None
        outcome = await self._take_over(loss, self._tell_primary)
        if isinstance(outcome, TakenOver):
            await self._session.close("took over")
        return outcome

    def _tell_primary(self, generation: int) -> None:
        with contextlib.suppress(FtdError):
            self._session.send_nowait(TookOver(generation=generation))

    async def _take_over(self, loss: Loss, on_running: Callable[[int], None] | None = None) -> End:
        self._keeper.cancel()
        return await take_over(self._standby, self._vm, loss, self._generation, on_running)

    def _wait_again(self, why: str) -> None:
        self._standby.spoiled()
        self._report.machine.move(PairState.WAITING, why)
