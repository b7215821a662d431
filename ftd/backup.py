"""The backup: holds the shadow, and starts it when the primary is lost.

One call of `Backup.run` goes from an idle backup to one of its ends:

    TakenOver      the primary was lost, the shadow runs here: go on as primary with this guest
    GuestEnded     the guest shut down (rule S7): nobody takes over, both sides stop

In between, sessions come and go. A session that ends before its first commit, or by a goodbye, leaves the
shadow worthless, and the backup waits for the next one. What ends a session, and what follows:

    reset, silence     the primary's daemon, or its host, is gone              ask the arbiter, take over
    cut                only the link is lost: the primary is heard elsewhere   let it ask first, then ask
    QemuLost           the primary's QEMU is gone, its daemon says so          ask the arbiter, take over
    Yield              a switchover                                            ask the arbiter, take over
    Restarting         the primary's daemon is about to be replaced            wait for the next one, then
                                                                               as if the primary were lost
    goodbye            a planned stop                                          wait
    protocol, stalled  the primary is there, but what it sends is of no use    wait; it copies anew
    GuestStopped       the guest shut down                                     end

Every takeover asks the arbiter first (rule S3). Without an answer the backup is `held`: it starts nothing,
and asks again. Meanwhile it takes the primary back, unless a question of its own may still be granted.

A primary that lives behind a link that is cut asks for solo, and is to get it: its guest runs. So the backup
waits before it asks. It does ask, since a primary that does not reach the arbiter serves nobody. Without an
arbiter it asks nobody and takes nothing: the primary goes on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ftd
from ftd import log, tap
from ftd.absence import LEAVE_SECONDS, Away, agree_to_wait, leave, wait_applied
from ftd.arbiter import Record
from ftd.assembly import receive_limits
from ftd.authority import Authority, Event, Standing, may_begin_session
from ftd.config import Config
from ftd.disk import Copies, Image
from ftd.errors import (
    FtdError,
    HostError,
    PeerError,
    QemuDied,
    QemuError,
    TakeoverRefused,
    friendly,
)
from ftd.frame import PartBufferPool
from ftd.inquiry import Inquiry, Outcome
from ftd.link import LinkOptions, Listener, Session
from ftd.machine import MachineDescription, guest_disks
from ftd.marker import Marker, Worth, mark
from ftd.messages import (
    DiskDigestsWanted,
    DiskLost,
    DiskVerifyResult,
    Goodbye,
    GuestStopped,
    HeartbeatSettings,
    Hello,
    QemuLost,
    Refusal,
    RestartAgreed,
    Restarting,
    Resync,
    TookOver,
    VerifyResult,
    Welcome,
    Yield,
)
from ftd.metrics import Rejection, Trigger
from ftd.partner import Partner
from ftd.qemu import QemuProcess, require_patched
from ftd.receiver import Committed, Receiver
from ftd.report import Report
from ftd.shadow import Shadow
from ftd.state import PairState
from ftd.status import Difference, QemuStatus, VerifyReport
from ftd.succession import Handed, Succession
from ftd.takeover import LoadImage, start_shadow
from ftd.wire import LinkLost, LostKind

_log = log.get(__name__)

# Between two questions to an arbiter that does not answer.
ASK_AGAIN_SECONDS = 0.5

# For a primary that lives behind a link that is cut to have asked the arbiter before this side does.
FIRST_SAY_SECONDS = 2.0

# Between two looks at a session that was admitted and is not complete, when the time to wait is over.
FORMING_SECONDS = 0.05

# How often what was written to the disks is made durable.
DISK_SYNC_SECONDS = 2.0

# A copy that fails, since a disk here is full, is not tried again at once: it keeps both hosts busy.
AFTER_DISK_FAILURE_SECONDS = 60.0


@dataclass(frozen=True)
class TakenOver:
    """The guest runs here now; generation: of the authority that this side won."""

    guest: QemuProcess
    generation: int


@dataclass(frozen=True)
class GuestEnded:
    """The guest has shut down on the primary."""

    reason: str


@dataclass(frozen=True)
class _Loss:
    """Why the primary counts as lost. heard, decided: monotonic seconds.

    resume: the guest was stopped for this takeover only, and is to run again.
    """

    trigger: Trigger
    detail: str
    heard: float
    decided: float
    resume: bool = False


class Backup:
    """The backup's part of a node's life. Made once; `run` returns how it ended.

    handed: what a predecessor has left, with the QEMU of its shadow, to go on with.
    """

    def __init__(
        self,
        config: Config,
        report: Report,
        options: LinkOptions,
        inquiry: Inquiry,
        partner: Partner,
        handed: tuple[Handed, QemuProcess] | None = None,
    ) -> None:
        self._config = config
        self._report = report
        # Further paths lead to the peer of the configuration.
        self._options = replace(options, paths=()) if partner.address.chosen else options
        self._partner = partner
        self._inquiry = inquiry
        standing = Standing.EMPTY if handed is None else Standing.GUARDING
        self._authority = Authority(standing, report.on_authority)
        report.set_standing(standing)
        self._handed = handed
        self._away: Away | None = None
        self._leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._claimable = False  # the shadow could be started now
        self._on_generation: Callable[[int], None] = lambda generation: None
        self._description: MachineDescription | None = None
        self._arrived: asyncio.Queue[Session] = asyncio.Queue()
        self._arrival = asyncio.Event()  # something was put there
        self._guarding = False
        self._markers: list[Marker] = []  # of the disks
        self._disk_failure = ""
        self._disk_failed_at = 0.0

    def on_generation(self, listener: Callable[[int], None]) -> None:
        """Have the listener told of each session's generation, before anything is acknowledged in it."""
        self._on_generation = listener

    def force(self) -> str:
        """Start the shadow whatever the arbiter says. Returns what will be done; raises TakeoverRefused."""
        if not self._claimable or self._authority.standing not in (
            Standing.GUARDING,
            Standing.CLAIMING,
            Standing.DOUBTING,
        ):
            raise TakeoverRefused(
                f"there is no committed shadow here; this node is {self._report.machine.state}"
            )
        if not self._forced.done():
            self._forced.set_result(None)
        return "the shadow is being started; see ftd status"

    def restart(self) -> str | None:
        """Have `run` end with a Succession whose successor goes on with this shadow.

        Returns what is done; None if there is no shadow to go on with: the daemon is then to be stopped as
        planned. What the primary says or suffers comes first.
        """
        grace = self._config.node.restart_grace_ms
        if self._report.machine.state is not PairState.PROTECTED or self._away is not None or not grace:
            return None
        if not self._leaving.done():
            self._leaving.set_result(None)
        return f"{self._report.peer_name} is asked to wait up to {grace / 1000:g} s for it"

    async def run(self) -> TakenOver | GuestEnded:
        """Wait for primaries and guard their guest.

        Raises HostError or QemuError if the shadow cannot be had.

        Cancelled, it takes its leave of the primary and ends the shadow. Raises Succession when this daemon's
        part is over since it is to be replaced: see `restart`.
        """
        link = self._config.link
        listener = Listener(
            self._options,
            host=link.listen,
            port=link.port,
            heartbeat_port=link.heartbeat_port,
            peer_name=None if link.insecure else self._partner.address.name,
            admit=self._admit,
            on_session=self._on_session,
            on_rejected=self._on_rejected,
            on_lateness=self._report.metrics.loop_lag.set,
        )
        self._listener = listener
        qemu = await (self._start_qemu() if self._handed is None else self._adopt_qemu(self._handed[1]))
        try:
            await listener.start()
            while True:
                outcome = await self._with_shadow(qemu)
                if isinstance(outcome, GuestEnded | TakenOver):
                    if isinstance(outcome, TakenOver):
                        return outcome
                    await qemu.kill()
                    return outcome
                # The shadow's QEMU has ended: protection needs a new one, the guest needs nothing.
                _log.error("the shadow's QEMU is lost", reason=outcome)
                self._description = None
                await qemu.kill()
                qemu = await self._start_qemu()
        except Succession as succession:
            await (qemu.kill() if succession.handed is None else qemu.detach())
            raise
        except BaseException:
            await qemu.kill()
            raise
        finally:
            await listener.close()
            while not self._arrived.empty():
                self._arrived.get_nowait().abort("this side is no backup any more")

    async def _start_qemu(self) -> QemuProcess:
        # Before as well: once QEMU has opened a tap that is up, the kernel keeps what arrives.
        tap.switch(self._config.machine.nic, up=False, missing_ok=True)
        return await self._adopt_qemu(await QemuProcess.start(self._config, incoming=True))

    async def _adopt_qemu(self, qemu: QemuProcess) -> QemuProcess:
        try:
            tap.switch(self._config.machine.nic, up=False)
            await require_patched(qemu.monitor)
            self._description = await MachineDescription.of(qemu.monitor)
        except BaseException:
            await qemu.kill()
            raise
        self._report.qemu = QemuStatus(
            pid=qemu.pid,
            version=self._description.qemu_version,
            accelerator=self._description.accelerator,
        )
        return qemu

    # ---- who may come -------------------------------------------------------------------------------------

    def _admit(self, hello: Hello) -> Welcome | Refusal:
        own = self._description
        if not may_begin_session(self._authority.standing):
            return Refusal(reason="the arbiter has not answered a question of this node; try again")
        if own is None or self._guarding or self._handed is not None or self._leaving.done():
            return Refusal(reason="the shadow is not ready; try again")
        if hello.resume is not None and not self._may_resume(hello):
            return Refusal(reason="what was committed before is not held here any more", lost=True)
        if self._disk_failure and time.monotonic() - self._disk_failed_at < AFTER_DISK_FAILURE_SECONDS:
            return Refusal(reason=f"waiting a while after a failure: {self._disk_failure}")
        for marker in self._markers:
            refusal = marker.refusal_to_overwrite(hello.generation)
            if refusal is not None:
                raise PeerError(refusal)
        try:
            peer = MachineDescription.model_validate(hello.description)
        except ValueError:
            raise PeerError(
                f"{hello.node} describes its machine in a way that this version does not understand; "
                "install the same version of ftd on both hosts"
            ) from None
        differences = own.differences(peer)
        if differences:
            raise PeerError(
                f"the machine of {hello.node} is not the one configured on {self._config.node.name}: "
                + "; ".join(differences)
            )
        return Welcome(
            software_version=ftd.__version__,
            node=self._config.node.name,
            generation=hello.generation,
            heartbeat=HeartbeatSettings(
                interval_ms=self._config.heartbeat.interval_ms, misses=self._config.heartbeat.misses
            ),
            description=own.model_dump(mode="json"),
        )

    def _on_session(self, session: Session) -> None:
        self._arrived.put_nowait(session)
        self._arrival.set()

    def _may_resume(self, hello: Hello) -> bool:
        """Whether the shadow is what the primary has left off with, and nobody has asked for it since."""
        guards = self._authority.standing is Standing.GUARDING
        return guards and self._away is not None and self._away.fits(hello)

    def _on_rejected(self, reason: Rejection) -> None:
        self._report.metrics.link_rejected.labels(reason=reason).inc()

    # ---- sessions -----------------------------------------------------------------------------------------

    async def _with_shadow(self, qemu: QemuProcess) -> TakenOver | GuestEnded | str:
        """Guard with this QEMU until an end, or until QEMU is lost: then return why."""
        info = await qemu.monitor.execute("query-x-ft")
        files = {block["name"]: block["path"] for block in info["blocks"] if block["shared-file"]}
        disks = await guest_disks(qemu.monitor)
        self._markers = [Marker(disk.path, self._config.node.state_folder) for disk in disks]
        copies = Copies([(disk.name, disk.path) for disk in disks])
        try:
            shadow = await asyncio.to_thread(Shadow, files)
        except BaseException:
            copies.close()
            raise
        memory_limit = sum(block["max-length"] for block in info["blocks"])
        gone = asyncio.ensure_future(qemu.wait())
        outcome: TakenOver | GuestEnded | Away | str | None
        try:
            if self._handed is not None:
                await self._take_up(self._handed[0], shadow)
            while True:
                session = await self._next_session(gone)
                away, self._away = self._away, None
                if session is None or session.hello.resume is None:
                    self._report.away = ""
                self._guarding = True
                try:
                    if gone.done():
                        self._spoiled()
                        if away is not None:
                            self._report.machine.move(PairState.WAITING, "the shadow's QEMU has ended")
                        return f"it ended with status {qemu.exit_status} while it waited"
                    if session is not None:
                        outcome = await self._guard(session, qemu, shadow, copies, memory_limit, gone, away)
                    else:
                        assert away is not None
                        outcome = await self._give_up_waiting(away, qemu, shadow, copies, gone)
                finally:
                    self._guarding = False
                if isinstance(outcome, Away):
                    self._wait_for_next_daemon(outcome)
                elif outcome is not None:
                    return outcome
        finally:
            gone.cancel()
            shadow.close()
            copies.close()

    # ---- a daemon of the pair is replaced -----------------------------------------------------------------

    async def _next_session(self, gone: asyncio.Future[int | None]) -> Session | None:
        """Return the next session; None when QEMU has ended, or there is no time left to wait for one."""
        arrival = asyncio.ensure_future(self._arrived.get())
        loop = asyncio.get_running_loop()
        try:
            while True:
                away = self._away
                waits: set[asyncio.Future[Any]] = {arrival, gone}
                left: float | None = None
                if away is not None:
                    waits.add(self._forced)
                    left = max(0.0, away.deadline - loop.time())
                    if not left and self._listener.forming:
                        # It was admitted in time. The primary may take it for a session already.
                        left = FORMING_SECONDS
                await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if arrival.done() and not gone.done():
                    return arrival.result()
                if gone.done() or away is None or self._forced.done():
                    return None
                if loop.time() >= away.deadline and not self._listener.forming and self._arrived.empty():
                    return None
        finally:
            if not arrival.done():
                arrival.cancel()

    def _wait_for_next_daemon(self, away: Away) -> None:
        """Keep the shadow for as long as was agreed."""
        self._away = away
        self._report.away = str(away)
        grace = round(away.deadline - away.since, 3)
        self._report.flight.note("away", peer=away.peer_node, own=away.own, epoch=away.epoch, seconds=grace)
        _log.info("waiting for the primary to go on", peer=away.peer_node, epoch=away.epoch, seconds=grace)

    async def _take_up(self, handed: Handed, shadow: Shadow) -> None:
        """Go on with what a predecessor has handed on: a shadow that nothing was done to since."""
        assert handed.backup is not None
        generation, epoch = handed.generation, handed.epoch
        try:
            await asyncio.to_thread(shadow.restore, handed.backup.image, generation, epoch)
        except (FtdError, OSError) as error:
            _log.error("the shadow does not go on", reason=friendly(error))
            self._spoiled()
            return
        finally:
            handed.close()
            self._handed = None
        self._on_generation(generation)
        self._report.set_generation(generation)
        self._report.epoch, self._report.committed = epoch + 1, epoch
        self._report.peer_name = handed.peer_node
        self._claimable = True
        self._report.machine.move(
            PairState.PROTECTED, f"the daemon was replaced, and has kept the shadow of epoch {epoch}"
        )
        now = time.monotonic()
        left = max(0.0, handed.deadline - handed.began)
        self._wait_for_next_daemon(Away(handed.peer_node, generation, epoch, True, now, now + left))

    async def _give_up_waiting(
        self,
        away: Away,
        qemu: QemuProcess,
        shadow: Shadow,
        copies: Copies,
        gone: asyncio.Future[int | None],
    ) -> TakenOver | GuestEnded | str | None:
        """The time that was agreed is over, or an operator does not want to wait for its end."""
        decided = time.monotonic()
        waited = f"{away.peer_node} did not come back within {decided - away.since:.1f} s"
        if self._forced.done():
            loss = _Loss("forced", "asked for by an operator", decided, decided)
        elif away.own and not self._inquiry.decides:
            # It is this side that was away, and the primary has gone on alone. There is nobody to ask.
            reason = f"this daemon was replaced, and {waited}: it may run the guest alone"
            self._authority.on(Event.LOST)
            self._report.machine.move(PairState.HELD, reason)
            self._guarding = False
            waits: set[asyncio.Future[Any]] = {gone, self._forced}
            while self._arrived.empty():
                await asyncio.wait(waits, timeout=ASK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    self._spoiled()
                    self._report.machine.move(PairState.WAITING, "the shadow's QEMU has ended")
                    return "it ended while this node was held"
                if self._forced.done():
                    break
            else:
                return None
            self._guarding = True
            decided = time.monotonic()
            loss = _Loss("forced", "asked for by an operator", decided, decided)
        else:
            loss = _Loss("restart-overdue", waited, away.since, decided)
        self._report.flight.note("session-lost", reason=f"{loss.trigger}: {waited}")
        return await self._take_over(loss, qemu, shadow, copies, away.generation, gone)

    async def _guard(
        self,
        session: Session,
        qemu: QemuProcess,
        shadow: Shadow,
        copies: Copies,
        memory_limit: int,
        gone: asyncio.Future[int | None],
        away: Away | None = None,
    ) -> TakenOver | GuestEnded | Away | str | None:
        """One session. Returns None when the backup goes back to waiting.

        away: what it may go on from. It does if its hello says so, for that was asked when it was admitted.
        """
        report = self._report
        generation = session.hello.generation
        failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        resumes = session.hello.resume is not None
        if resumes and away is None:
            # Another session was faster, or the shadow was claimed. The primary has to hear that.
            session.abort("what was committed before is not held here any more")
            return None
        self._on_generation(generation)
        self._forced = asyncio.get_running_loop().create_future()
        disk_failed = False
        copied = asyncio.Event()  # once a frame is committed
        report.set_generation(generation)
        report.session_began(session)
        report.flight.note("session", peer=session.peer_node, generation=generation, resumes=resumes)
        if resumes:
            copied.set()
        else:
            self._authority.on(Event.SYNC)
            self._claimable = False
            report.begin_sync()
            report.machine.move(PairState.SYNCING, f"{session.peer_node} has come and copies its guest")
            shadow.begin_sync(generation)
            if not await self._mark(Worth.SYNCING, generation):
                report.session_ended()
                await session.close("the disks here cannot be marked as incomplete")
                report.machine.move(PairState.WAITING, "the disks here cannot be marked as incomplete")
                return None
        resumed = not resumes  # once a frame is committed

        def on_committed(frame: Committed) -> None:
            nonlocal resumed
            report.epoch = frame.epoch + 1
            if not resumed:
                resumed = True
                report.away = ""
                report.resumed(frame.epoch, None)
            report.committed_epoch(frame.epoch)
            if copies.images:
                report.journal(frame.requests, frame.journal_bytes)
            if frame.first:
                self._authority.on(Event.COMMITTED)
                self._claimable = True
                copied.set()
                report.end_sync()
                report.machine.move(PairState.PROTECTED, f"epoch {frame.epoch} is committed")
            session.set_beat(report.machine.state.value, frame.epoch)

        def on_failed(reason: str, disk: bool) -> None:
            nonlocal disk_failed
            if not failure.done():
                disk_failed = disk
                failure.set_result(reason)

        receiver = Receiver(
            session,
            shadow,
            PartBufferPool(*receive_limits(memory_limit, self._config.epoch.in_flight_mib << 20)),
            generation=generation,
            memory_limit=memory_limit,
            on_committed=on_committed,
            on_received=lambda size: report.metrics.add_link_bytes("frames", received=size),
            on_verified=self._on_verified,
            on_failed=on_failed,
            on_applied=lambda epoch, seconds: report.disks_applied(seconds) if copies.images else None,
            copies=copies,
            replicate=self._config.disks.apply,
            after=away.epoch if away is not None and resumes else None,
        )
        messages = asyncio.ensure_future(self._listen(session, receiver, shadow))
        keeper = asyncio.ensure_future(self._keep_disks(copies, copied, generation, on_failed))
        lost = asyncio.ensure_future(session.wait_lost())
        try:
            ends: set[asyncio.Future[Any]] = {messages, lost, gone, failure, self._forced, self._leaving}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._leaving.done():
                ends.remove(self._leaving)
                if not any(end.done() for end in ends):
                    grace = self._config.node.restart_grace_ms
                    me = (self._config.node.name, qemu.pid)
                    if (left := await leave(session, messages, shadow, grace, *me)) is not None:
                        raise left
                self._leaving = asyncio.get_running_loop().create_future()
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                with contextlib.suppress(FtdError):
                    await session.send(QemuLost(detail=f"it ended with status {qemu.exit_status}"))
                await session.close("the shadow's QEMU has ended")
                self._spoiled()
                report.machine.move(PairState.WAITING, "the shadow's QEMU has ended")
                return f"it ended with status {qemu.exit_status} while it held a shadow"
            if failure.done() and not lost.done():
                _log.error("what the primary sent cannot be used", reason=failure.result())
                with contextlib.suppress(FtdError):
                    if disk_failed:
                        self._disk_failure, self._disk_failed_at = failure.result(), time.monotonic()
                        await session.send(DiskLost(reason=failure.result()))
                    else:
                        await session.send(Resync(reason=failure.result()))
                await session.close(failure.result())
                await receiver.drain()
                self._spoiled()
                report.machine.move(PairState.WAITING, failure.result())
                return None
            # What the primary said last decides; when the session ends, that is read before anything else.
            said = await messages if messages.done() or lost.done() else None
            next_daemon = None
            if isinstance(said, Restarting):
                messages = asyncio.ensure_future(self._listen(session, receiver, shadow))
                guards = report.machine.state is PairState.PROTECTED
                grace = self._config.node.restart_grace_ms if guards else 0
                next_daemon = await agree_to_wait(session, said, shadow, grace)
                ends = {lost, gone}
                await asyncio.wait(ends, timeout=LEAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if session.lost is None:
                    session.abort("the primary said that its daemon is replaced, and stayed")
                    await lost
                said = await messages  # the guest may have ended
                await receiver.drain()
            decided = time.monotonic()
            if next_daemon is not None and said is None and not gone.done():
                return next_daemon
            report.flight.note(
                "session-lost",
                reason=said.kind if said is not None else str(session.lost or "ended here"),
                heartbeats_missed=session.heartbeats_missed,
                stood_still=round(session.lost.stood_still_ns / 1e9, 4) if session.lost is not None else 0,
            )
            if isinstance(said, GuestStopped):
                self._authority.on(Event.ENDED)
                await session.close("the guest has stopped")
                await receiver.drain()
                report.machine.move(PairState.STOPPED, f"the guest has stopped: {said.reason}")
                return GuestEnded(said.reason)
            if isinstance(said, Yield):
                try:
                    await wait_applied(shadow, said.epoch)
                except TimeoutError:
                    session.abort("the last epoch was not applied")
                    await receiver.drain()
                    self._spoiled()
                    report.machine.move(PairState.WAITING, "switchover: the last epoch was not applied")
                    return None
                loss: _Loss | None
                loss = _Loss("switchover", "asked for", decided, decided, said.running)
                keeper.cancel()
                outcome = await self._take_over(loss, qemu, shadow, copies, generation, gone)
                if isinstance(outcome, TakenOver) and session.lost is None:
                    with contextlib.suppress(FtdError):
                        await session.send(TookOver(generation=outcome.generation))
                    await session.close("took over")
                return outcome
            if self._forced.done() and said is None and session.lost is None:
                session.abort("an operator has this side take over")
                loss = _Loss("forced", "asked for by an operator", decided, decided)
            else:
                loss = self._judge(session, said, decided)
            if isinstance(said, QemuLost):
                session.abort("its QEMU is lost: taking over")
            await receiver.drain()
            if loss is None:
                reason = said.reason if isinstance(said, Goodbye) else str(session.lost)
                self._spoiled()
                report.machine.move(PairState.WAITING, f"the primary left: {reason}")
                return None
            keeper.cancel()
            return await self._take_over(loss, qemu, shadow, copies, generation, gone)
        except BaseException:
            if session.lost is None:
                await session.close("this backup stops")
            raise
        finally:
            messages.cancel()
            lost.cancel()
            keeper.cancel()
            report.away = ""
            report.session_ended()
            if session.lost is None:
                session.abort("this side is done with the session")
            await receiver.drain()

    def _spoiled(self) -> None:
        self._claimable = False
        if self._authority.knows(Event.SPOILED):
            self._authority.on(Event.SPOILED)

    async def _mark(self, worth: Worth, generation: int) -> bool:
        """Note what the disks here are worth. Returns whether that was possible."""
        try:
            await asyncio.to_thread(mark, self._markers, worth, generation, self._config.node.name)
        except HostError as error:
            _log.error("the disks are not marked", worth=worth, reason=friendly(error))
            return False
        return True

    async def _keep_disks(
        self,
        copies: Copies,
        copied: asyncio.Event,
        generation: int,
        on_failed: Callable[[str, bool], None],
    ) -> None:
        """Mark the copy as complete, and make it durable again and again.

        Nobody waits for it: a backup that loses its power is not taken over to, and is copied anew. But
        should this host take over and lose its power, too, the less is lost, the more is durable.
        """
        if not copies.images:
            return
        await copied.wait()
        await self._mark(Worth.COPY, generation)
        while True:
            await asyncio.sleep(DISK_SYNC_SECONDS)
            try:
                await asyncio.to_thread(copies.sync)
            except HostError as error:
                on_failed(friendly(error), True)
                return

    async def _listen(
        self, session: Session, receiver: Receiver, shadow: Shadow
    ) -> GuestStopped | QemuLost | Yield | Restarting | RestartAgreed | Goodbye | None:
        """Return the message of the primary that ends this session, or None if it ended without one."""
        try:
            while True:
                message = await session.receive()
                if isinstance(message, GuestStopped | QemuLost | Yield | Restarting | Goodbye):
                    return message
                if isinstance(message, RestartAgreed) and self._leaving.done():
                    return message
                if isinstance(message, DiskDigestsWanted):
                    receiver.ask(message)
                elif isinstance(message, DiskVerifyResult):
                    self._on_disks_verified(message, shadow)
        except LinkLost:
            return None

    def _judge(
        self, session: Session, said: QemuLost | Restarting | RestartAgreed | Goodbye | None, decided: float
    ) -> _Loss | None:
        """Return why the primary is lost, or None if it is not: pure decision, the table is above."""
        if isinstance(said, QemuLost):
            return _Loss("qemu-died", said.detail, decided, decided)
        lost = session.lost
        if isinstance(said, Goodbye) or lost is None:
            return None
        if not self._inquiry.decides and lost.stood_still_ns > session.heartbeat.limit_ms * 1_000_000:
            # It is this side that was away, and the primary has gone on alone. There is nobody to ask.
            _log.warning(
                "this node itself stood still: it does not take over", seconds=lost.stood_still_ns / 1e9
            )
            return None
        if lost.kind is LostKind.RESET:
            # The kernel of a host that lives says so at once: what was heard last is no measure of it.
            at = lost.decided_ns / 1e9
            return _Loss("connection-reset", lost.detail, min(lost.last_heard_ns / 1e9, at), at)
        if lost.kind is LostKind.CUT and self._inquiry.decides:
            return _Loss("link-cut", lost.detail, lost.last_heard_ns / 1e9, lost.decided_ns / 1e9)
        if lost.kind is LostKind.SILENCE:
            return _Loss("silence", lost.detail, lost.last_heard_ns / 1e9, lost.decided_ns / 1e9)
        return None

    def _on_verified(self, result: VerifyResult) -> None:
        self._report.verified(
            VerifyReport(
                epoch=result.epoch,
                ok=result.ok,
                pages=result.pages,
                differing=result.differing,
                differences=[Difference(block=d.block, page=d.page) for d in result.differences],
            )
        )
        for difference in result.differences[:16]:
            _log.error(
                "THE SHADOW DIFFERS FROM THE GUEST",
                epoch=result.epoch,
                block=difference.block,
                page=difference.page,
            )

    def _on_disks_verified(self, result: DiskVerifyResult, shadow: Shadow) -> None:
        self._report.verified_disks(result)
        if not result.ok:
            first = result.differences[0] if result.differences else None
            where = f", first block {first.block} of disk {first.disk}" if first else ""
            shadow.poison(
                f"after epoch {result.epoch} its disks differ from the guest's in {result.differing} "
                f"blocks{where}"
            )

    async def _make_durable(self) -> bool:
        """Make the disks here survive a power loss. Returns whether that was possible."""

        def sync() -> None:
            for marker in self._markers:
                image = Image(marker.image.name, marker.image)
                try:
                    image.sync()
                finally:
                    image.close()

        try:
            await asyncio.to_thread(sync)
        except HostError as error:
            _log.error("the disks are not durable yet", reason=friendly(error))
            return False
        return True

    # ---- takeover -----------------------------------------------------------------------------------------

    async def _claim(
        self, generation: int, loss: _Loss, gone: asyncio.Future[int | None]
    ) -> Outcome | str | None:
        """Ask for the guest until the arbiter answers.

        Returns its answer; None when the primary is back first; a text when the shadow's QEMU is lost.
        """
        lost, wait = f"the primary is lost ({loss.detail})", 0.0
        if loss.trigger == "link-cut":
            lost, wait = f"the link is lost ({loss.detail})", FIRST_SAY_SECONDS
        reason = "the primary lives, and may ask the arbiter first"
        while True:
            if wait:
                held = await self._hold(f"{lost}: {reason}", wait, gone)
                if held is not None or not self._arrived.empty():
                    return held
            wait = ASK_AGAIN_SECONDS
            if self._forced.done():
                outcome = await self._inquiry.force(generation)
                self._authority.on(Event.FORCED)
                if not outcome.granted:
                    _log.error("taken over by force, and the arbiter does not know", reason=outcome.reason)
                    record = Record(generation=generation + 1, owner=self._config.node.name, state="solo")
                    return Outcome(Event.GRANTED, outcome.reason, record)
                return outcome
            outcome = await self._inquiry.takeover(generation)
            self._authority.on(outcome.event)
            if outcome.event in (Event.GRANTED, Event.DENIED):
                return outcome
            reason = outcome.reason

    async def _hold(self, why: str, seconds: float, gone: asyncio.Future[int | None]) -> str | None:
        """Be `held` for so long, or until something happens; returns a text if the shadow's QEMU is lost."""
        report = self._report
        report.machine.move(PairState.HELD, why)
        self._guarding = False  # a primary that is back is welcome, if the standing allows it
        self._arrival.clear()
        arrival = asyncio.ensure_future(self._arrival.wait())
        try:
            waits: set[asyncio.Future[Any]] = {gone, self._forced, arrival}
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._guarding = True
            arrival.cancel()
        if gone.done():
            if self._authority.standing is Standing.DOUBTING:
                # The question may still be granted, and the daemon's next start finds out.
                raise QemuError("the shadow's QEMU has ended while the arbiter was being asked")
            self._spoiled()
            report.machine.move(PairState.WAITING, "the shadow's QEMU has ended")
            return "it ended while the arbiter was being asked"
        return None

    async def _take_over(
        self,
        loss: _Loss,
        qemu: QemuProcess,
        shadow: Shadow,
        copies: Copies,
        generation: int,
        gone: asyncio.Future[int | None],
    ) -> TakenOver | GuestEnded | str | None:
        _log.warning(
            "the primary is lost",
            trigger=loss.trigger,
            detail=loss.detail,
            applied_ms=round((time.monotonic() - loss.decided) * 1000, 1),
        )
        if self._authority.knows(Event.LOST) and self._authority.standing is not Standing.EMPTY:
            self._authority.on(Event.LOST)
        image = LoadImage(shadow)  # while the arbiter is asked
        try:
            return await self._start_if_granted(loss, qemu, shadow, image, copies, generation, gone)
        finally:
            await image.close()

    async def _start_if_granted(
        self,
        loss: _Loss,
        qemu: QemuProcess,
        shadow: Shadow,
        image: LoadImage,
        copies: Copies,
        generation: int,
        gone: asyncio.Future[int | None],
    ) -> TakenOver | GuestEnded | str | None:
        report = self._report
        refusal = shadow.takeover_refusal()
        if refusal is None:
            outcome = await self._claim(generation, loss, gone)
            if isinstance(outcome, str):
                return outcome
            if outcome is None:
                return None  # the primary is back
            if not outcome.granted:
                refusal = outcome.reason
                record = outcome.record
                if record is not None and record.state == "stopped":
                    report.machine.move(PairState.STOPPED, f"the guest has stopped: {record}")
                    return GuestEnded(str(record))
            elif outcome.record is not None:
                generation = outcome.record.generation - 1
        if refusal is not None:
            self._spoiled()
            report.metrics.takeovers_refused.inc()
            _log.error("takeover refused", reason=refusal)
            report.machine.move(PairState.WAITING, f"the primary is lost, and takeover is refused: {refusal}")
            return None
        epoch = shadow.committed_epoch
        assert epoch is not None
        copies.close()  # QEMU wants the locks
        try:
            nics = self._config.machine.nic
            running = await start_shadow(qemu.monitor, shadow, image, nics, resume=loss.resume)
        except (TakeoverRefused, QemuError, HostError) as error:
            # This side has the authority by now, and a QEMU that is of no use: no session can follow.
            report.metrics.takeovers_refused.inc()
            remedy = (
                "start the daemon again to have the guest boot here"
                if self._inquiry.decides
                else "the guest is not running here, and nobody knows whether it runs on the other host"
            )
            raise QemuDied(
                f"this node has won the guest, and could not start it from epoch {epoch}: "
                f"{friendly(error)}; {remedy}"
            ) from None
        report.set_generation(generation + 1)
        report.committed = epoch
        status = await qemu.monitor.execute("query-status")
        report.qemu = report.qemu.model_copy(update={"running": status["running"]})
        detection = max(0.0, loss.decided - loss.heard)
        activation = running - loss.decided
        report.took_over(
            loss.trigger, epoch, detection=detection, activation=activation, total=detection + activation
        )
        report.machine.move(PairState.TAKEN_OVER, f"{loss.trigger}: {loss.detail}")
        # It runs already, and these only matter after the next failure. In this order: from a disk that is
        # marked so, a guest is started.
        if self._markers and await self._make_durable():
            await self._mark(Worth.ALONE, generation + 1)
        _log.warning(
            "took over",
            epoch=epoch,
            trigger=loss.trigger,
            detection_ms=round(detection * 1000, 1),
            activation_ms=round(activation * 1000, 1),
        )
        return TakenOver(qemu, generation + 1)
