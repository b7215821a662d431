"""The primary: runs the guest, and keeps a backup of it for as long as one can be reached.

The guest comes first: whatever happens to the backup, to the link or to the copy, it runs on. Only its own
end ends the primary:

    it shut down, or was told to by QMP quit     GuestStopped to the backup, which stops too     (rule S7)
    its QEMU died                                QemuLost to the backup, which takes over
    the other side has the authority             the guest is killed, and this node becomes the backup

What may be said of the guest's output is ftd/authority.py's to decide, and ftd/mandate.py asks for it. When
the backup is lost, all of it is held until the arbiter has given this side the authority to go on alone; the
guest is `held` so long.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from dataclasses import replace

import ftd
from ftd import link, log, tap
from ftd.authority import Event as Happening
from ftd.authority import Standing, may_begin_session
from ftd.carried import Carried
from ftd.config import Config
from ftd.errors import (
    Deposed,
    FtdError,
    HostError,
    LinkError,
    NothingToResume,
    PeerError,
    QemuDied,
    QemuError,
    friendly,
)
from ftd.inquiry import Inquiry
from ftd.link import LinkOptions, Session
from ftd.machine import MachineDescription, guest_disks, refuse_devices
from ftd.mandate import Mandate
from ftd.marker import Marker, Markers, Worth
from ftd.messages import GuestStopped, HeartbeatSettings, Hello, QemuLost, Resume
from ftd.partner import Partner
from ftd.protection import Protection, ProtectionLost, Suspended, Yielded
from ftd.qemu import QemuProcess, RunFiles, is_running, require_patched
from ftd.report import Report
from ftd.state import Move, PairState
from ftd.status import QemuStatus, VerifyReport
from ftd.succession import Handed, Succession
from ftd.wire import LinkLost

_log = log.get(__name__)

# Between two attempts to reach a backup. One that refuses may only have to end what it is at; if it goes on,
# a person is needed, and each time it is asked half as often as before, down to the second of these.
RETRY_SECONDS = 0.5
RETRY_AFTER_REFUSAL_SECONDS = 5.0

# The same while output is held for a daemon that is being replaced.
RETRY_TO_RESUME_SECONDS = 0.05

# For a backup to take a connection while this side is held, and would rather hear of the arbiter.
CONNECT_WHILE_ASKING_SECONDS = 1.5

# Reasons of QEMU's SHUTDOWN event that come from the host and not from anybody who wants the guest to end:
# a signal to QEMU. The guest did nothing, so this is a loss like any other.
_NOT_WANTED = frozenset({"host-signal", "host-error"})


def refuse_to_boot(config: Config, settled: int) -> None:
    """Raise HostError if a disk's marker says that no guest may be started from its image.

    settled: as for `start_guest`. A guest that runs already is not started, and not refused.
    """
    if config.machine.attach is not None or is_running(config):
        return
    for disk in config.machine.disk:
        refusal = Marker(disk.path, config.node.state_folder).refusal_to_start(settled)
        if refusal is not None:
            raise HostError(refusal)


async def start_guest(config: Config, settled: int = -1) -> QemuProcess:
    """Start the guest, or attach to the one that runs: the configured one, or one left by an earlier daemon.

    settled: up to this generation it is known that no backup has taken over from this node.

    Raises HostError, ConfigError or QemuError with one line that says what is wrong.
    """
    machine = config.machine
    if machine.attach is not None:
        return await QemuProcess.attach(machine.attach)
    if is_running(config):
        _log.info("the guest of an earlier daemon runs: attaching to it")
        return await QemuProcess.attach(RunFiles(config.node.run_folder).qmp_socket)
    refuse_to_boot(config, settled)
    guest = await QemuProcess.start(config)
    try:
        tap.switch(machine.nic, up=True)
    except HostError:
        await guest.kill()
        raise
    return guest


class Primary:
    """The primary's part of a node's life, for one guest. Made once; `run` returns why the guest ended.

    standing: `alone` with authority that was won for this guest, `asking` for a guest that was found,
    `paired` with what a predecessor has handed on. remember: is told of every generation that this side wins.
    told: False if the guest was given to this side by a person, and the arbiter does not know.
    markers: of the disks of a guest that was taken over; they are to be made durable, and marked as its own.
    """

    def __init__(
        self,
        config: Config,
        report: Report,
        options: LinkOptions,
        guest: QemuProcess,
        generation: int,
        *,
        standing: Standing,
        inquiry: Inquiry,
        partner: Partner,
        remember: Callable[[int], None],
        handed: Handed | None = None,
        told: bool = True,
        markers: Markers | None = None,
    ) -> None:
        self._config = config
        self._report = report
        self._options = options
        self._guest = guest
        self._mandate = Mandate(
            report,
            inquiry,
            generation,
            standing,
            told=told,
            won=self._on_generation,
            replicated=lambda generation: self._markers.write(Worth.REPLICATED, generation),
        )
        self._partner = partner
        self._remember = remember
        self._handed = handed
        self._carried: Carried | None = None  # protection that has no session, and is to go on over another
        self._restarting = False  # this daemon is to be replaced when this session has ended
        self._next_epoch = 1
        self._stopped_guest = False  # for a switchover that is not over
        self._paused = False  # protection is not wanted
        self._nudge = asyncio.Event()  # something changed for whoever waits to look for a backup
        self._closing: asyncio.Future[None] | None = None
        self._description: MachineDescription | None = None
        self._protection: Protection | None = None
        self._session: Session | None = None
        self._unsubscribe: list[Callable[[], None]] = []
        self._took_over = markers is not None
        self._markers = markers or Markers([], config.node.name)  # of the guest's disks
        self._unsubscribe.append(report.machine.listen(self._on_move))

    async def run(self) -> str:
        """Run until the guest ends; return QEMU's reason for a wanted end.

        Raises QemuDied if QEMU was lost; Deposed when the other side has the guest, and the one here was
        killed; QemuError or HostError for a guest that cannot be protected; that one is left running.
        Cancelled, it takes its leave of the backup; the guest runs on. Raises Succession when this daemon's
        part is over since it is to be replaced: see `restart`.
        """
        report = self._report
        monitor = self._guest.monitor
        report.set_generation(self._mandate.generation)
        self._unsubscribe += [
            monitor.on("STOP", lambda _: self._set_running(False)),
            monitor.on("RESUME", lambda _: self._set_running(True)),
        ]
        if self._took_over:
            self._mark_alone()
        ended = asyncio.ensure_future(self._until_ended())
        work = asyncio.ensure_future(self._prepare_and_protect())
        try:
            await asyncio.wait({ended, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not ended.done():
                # A loss of QEMU is seen by the work a moment before the process is reaped.
                error = work.exception()
                if isinstance(error, Deposed):
                    self._mandate.over = True
                    await self._guest.kill()
                    report.qemu = QemuStatus()
                    report.no_output()
                    raise error
                if not isinstance(error, QemuDied):
                    raise error if error is not None else AssertionError("the primary has no work left")
                await ended
            self._mandate.over = True
            return await self._after_the_end()
        finally:
            for unsubscribe in self._unsubscribe:
                unsubscribe()
            ended.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, FtdError, Succession):
                await work
            if self._carried is not None:
                if self._mandate.over:
                    self._carried.close()
                else:
                    with contextlib.suppress(FtdError):
                        await self._give_up_resuming("the daemon was told to stop")
            if (
                not self._mandate.over
                and self._mandate.has_arbiter
                and self._mandate.standing is Standing.ASKING
            ):
                # A planned stop: the guest is to be served while there is no daemon. Without an answer its
                # output stays held until there is one again.
                with contextlib.suppress(FtdError):
                    await self._ask_for_solo()
            # Whatever this node is next writes to them, too.
            await self._markers.settle()

    async def let_go(self) -> None:
        """Let go of the guest, which runs on if it has not ended."""
        await self._guest.detach()

    async def verify(self) -> VerifyReport:
        """Compare all memory with the shadow at the end of this epoch. Raises FtdError if there is none."""
        self._refuse_while_away()
        if self._protection is None or self._report.machine.state is not PairState.PROTECTED:
            raise FtdError(
                f"nothing to compare with: this node is {self._report.machine.state}, not protected"
            )
        return await self._protection.verify()

    # ---- what operators ask for ---------------------------------------------------------------------------

    async def switchover(self) -> str:
        """Have the backup take over, with nothing lost. Returns when it has the guest, or raises FtdError."""
        self._refuse_while_away()
        if self._protection is None or self._report.machine.state is not PairState.PROTECTED:
            state = self._report.machine.state
            raise FtdError(f"nobody to hand over to: this node is {state}, not protected")
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def watch(move: Move) -> None:
            if not over.done():
                over.set_result("" if move.to is PairState.WAITING else f"{move.to}: {move.reason}")

        unlisten = self._report.machine.listen(watch)
        try:
            self._protection.yield_guest()
            went_wrong = await over
        finally:
            unlisten()
        if went_wrong:
            raise FtdError(f"the guest stays here, {went_wrong}")
        return "the backup has the guest"

    def _refuse_while_away(self) -> None:
        if self._carried is not None:
            raise FtdError(f"{self._report.away or 'a daemon is being replaced'}; try again in a moment")

    def restart(self) -> str | None:
        """Have `run` end with a Succession whose successor goes on with this protection.

        Returns what is done; None if there is nothing to go on with: the daemon is then to be stopped as
        planned. If protection is lost first, the Succession has nothing to go on with.
        """
        grace = self._config.node.restart_grace_ms
        if self._protection is None or self._report.machine.state is not PairState.PROTECTED or not grace:
            return None
        self._restarting = True
        self._protection.suspend()
        return f"{self._report.peer_name} is asked to wait up to {grace / 1000:g} s for it"

    def pause_protection(self) -> str:
        """Go on without a backup until `resume_protection`."""
        self._paused = True
        self._report.solo_intended = True
        self._end_session("protection is paused by an operator")
        return "protection is paused; the guest runs alone"

    def resume_protection(self) -> str:
        """Look for a backup again."""
        self._paused = False
        self._report.solo_intended = False
        self._nudge.set()
        return "looking for the backup"

    def protect(self, host: str, port: int | None) -> str:
        """Have another backup than so far. Raises HostError if that cannot be noted."""
        noted = self._partner.choose(host, port)
        self._report.set_peer_address(self._partner.address.host, self._partner.in_words())
        self._report.flight.note("peer-chosen", host=host)
        self._end_session(f"another backup is wanted: {host}")
        self.resume_protection()
        return f"looking for the backup at {host}: {noted}"

    def _end_session(self, reason: str) -> None:
        self._nudge.set()
        if self._carried is not None:
            self._carried.deadline = 0.0
        if self._session is not None and self._session.lost is None:
            self._closing = asyncio.ensure_future(self._session.close(reason))

    def force(self) -> str:
        """Go on alone whatever the arbiter says. Raises FtdError if this node's output is not held."""
        if not self._mandate.may_be_forced:
            raise FtdError(
                f"nothing to force: this node is {self._report.machine.state}, and its output is not held"
            )
        self._mandate.force()
        self._nudge.set()
        return "output is being released; see ftd status"

    # ---- authority -----------------------------------------------------------------------------------------

    async def _ask_for_solo(self) -> None:
        """Ask once, with no session, and let output go if that is granted. Raises Deposed."""
        mandate = self._mandate
        if not mandate.has_arbiter and not mandate.forced:
            # Only an operator knows who has the guest.
            info = await self._guest.monitor.execute("query-x-ft")
            self._report.output(info["output"], None)
            mandate.held = info["output"]["holding"]
            if not mandate.held:
                mandate.happened(Happening.FORCED)
            return
        flowed, forced = mandate.flows, mandate.forced
        outcome = await mandate.ask()
        if flowed:
            return
        if mandate.standing is not Standing.ALONE:
            info = await self._guest.monitor.execute("query-x-ft")
            self._report.output(info["output"], None)
            self._report.machine.move(PairState.HELD, f"output is held: {outcome.reason}")
            return
        await self._guest.monitor.execute("x-ft-end", output="release")
        self._report.no_output()
        await self._let_stopped_guest_go()
        self._alone(
            f"{'an operator' if forced else 'the arbiter'} gave this node the authority to go on alone"
        )

    def _on_generation(self, generation: int) -> None:
        self._next_epoch = 1
        self._report.set_generation(generation)
        self._remember(generation)

    def _on_move(self, move: Move) -> None:
        if move.to is PairState.SOLO:
            self._mark_alone()

    def _mark_alone(self) -> None:
        """Have it noted that no other copy of the disks can be newer; nobody waits for that."""

        def written(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("a disk is not marked as the newest copy", reason=friendly(error))

        self._markers.start(Worth.ALONE, self._mandate.generation).add_done_callback(written)

    # ---- the guest's end ----------------------------------------------------------------------------------

    def _set_running(self, running: bool) -> None:
        self._report.qemu = self._report.qemu.model_copy(update={"running": running})

    async def _until_ended(self) -> None:
        gone = asyncio.ensure_future(self._guest.wait())
        lost = asyncio.ensure_future(self._guest.monitor.lost.wait())
        try:
            await asyncio.wait({gone, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            lost.cancel()

    async def _after_the_end(self) -> str:
        self._set_running(False)
        session, shutdown = self._session, self._guest.shutdown
        if shutdown is not None and shutdown not in _NOT_WANTED:
            reason = f"the guest has ended: {shutdown}"
            if session is not None and session.lost is None:
                with contextlib.suppress(FtdError):
                    await session.send(GuestStopped(reason=shutdown, epoch=self._report.committed))
                await session.close(reason)
            await self._mandate.guest_has_ended()
            self._mark_alone()
            await self._markers.settle()
            self._report.machine.move(PairState.STOPPED, reason)
            return reason
        # A guest that cannot be spoken to any more may still run, and must not beside the one that the backup
        # will start. The signal goes out before the message, and is not waited for.
        killed = asyncio.ensure_future(self._guest.kill())
        await asyncio.sleep(0)
        detail = f"QEMU is lost: {self._guest.monitor.lost_reason or 'its process has ended'}"
        if session is not None and session.lost is None:
            with contextlib.suppress(FtdError):
                await session.send(QemuLost(detail=detail))
        if not self._mandate.has_arbiter:
            self._report.machine.move(PairState.STOPPED, detail)
        if session is not None:
            await session.close(detail)
        await killed
        raise QemuDied(f"{detail}; see {RunFiles(self._config.node.run_folder).log}")

    # ---- protecting it ------------------------------------------------------------------------------------

    async def _prepare_and_protect(self) -> None:
        monitor = self._guest.monitor
        await require_patched(monitor)
        # An earlier daemon may have left checkpointing on, into slots that are gone. Output that it held
        # stays held (rule S6): its backup may have taken over since.
        if self._handed is not None:
            await self._take_up(self._handed)
        if self._carried is None:
            info = await monitor.execute("query-x-ft")
            holding = info["output"]["holding"]
            if not self._mandate.has_arbiter:
                self._mandate.held = holding
                if not holding and self._mandate.standing is Standing.ASKING:
                    self._mandate.happened(Happening.GRANTED)
            free = self._mandate.flows
            await monitor.execute("x-ft-end", output="release" if free else "hold")
            if holding and not free:
                self._report.output(info["output"], None)
                self._report.machine.move(
                    PairState.HELD,
                    "the guest of an earlier daemon, whose output is held: the backup may have taken over",
                )
        self._description = await MachineDescription.of(monitor)
        refuse_devices(self._description)
        disks = await guest_disks(monitor)
        if not self._took_over:
            folder = self._config.node.state_folder
            self._markers = Markers([Marker(disk.path, folder) for disk in disks], self._config.node.name)
        self._report.qemu = QemuStatus(
            pid=self._guest.pid,
            version=self._description.qemu_version,
            accelerator=self._description.accelerator,
            running=(await monitor.execute("query-status"))["running"],
        )
        told, refused = "", 0
        while not self._mandate.over:
            wait = RETRY_SECONDS
            if self._carried is not None and await self._resume(self._carried):
                continue
            if self._mandate.standing in (Standing.ASKING, Standing.UNSURE) or not self._mandate.told:
                await self._ask_for_solo()
            if self._paused or not self._mandate.told or not may_begin_session(self._mandate.standing):
                if self._mandate.flows:
                    self._alone(
                        "protection is paused by an operator"
                        if self._paused
                        else "taken by force: protection begins when the arbiter knows"
                    )
                await self._sleep(wait)
                continue
            asking = not self._mandate.flows and self._mandate.has_arbiter
            try:
                # The arbiter is to be asked again soon, whatever a host that is gone makes of our packets.
                async with asyncio.timeout(CONNECT_WHILE_ASKING_SECONDS if asking else None):
                    session = await self._connect()
            except (LinkError, PeerError, TimeoutError) as error:
                text = friendly(error)
                refused = refused + 1 if isinstance(error, PeerError) else 0
                if refused and not asking:
                    wait = min(RETRY_SECONDS * 2 ** (refused - 1), RETRY_AFTER_REFUSAL_SECONDS)
                if text != told:
                    told = text
                    _log.warning("no backup: the guest runs unprotected", reason=text)
                if self._mandate.flows:
                    self._alone(text)
                await self._sleep(wait)
                continue
            told, refused = "", 0
            if await self._with_backup(session):
                continue
            if self._mandate.flows or not self._mandate.has_arbiter:
                await self._sleep(wait)

    def _alone(self, reason: str) -> None:
        if self._report.machine.allows(PairState.SOLO):
            self._report.machine.move(PairState.SOLO, reason)

    async def _sleep(self, seconds: float) -> None:
        self._nudge.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._nudge.wait(), seconds)

    async def _let_stopped_guest_go(self) -> None:
        """Run a guest again that was stopped for a switchover which came to nothing."""
        if self._stopped_guest:
            self._stopped_guest = False
            with contextlib.suppress(QemuError):
                await self._guest.monitor.execute("cont")

    # ---- a daemon of the pair is replaced -----------------------------------------------------------------

    async def _take_up(self, handed: Handed) -> None:
        """Go on with what a predecessor has handed on, if QEMU says the same; the standing is `paired`."""
        self._handed = None
        assert handed.primary is not None
        self._mandate.paired_with = handed.primary.paired_with
        self._next_epoch = handed.epoch + 2
        try:
            info = await self._guest.monitor.execute("query-x-ft")
            if not info["active"] or info["generation"] != handed.generation or info["paused"]:
                raise HostError("QEMU has given protection up meanwhile")
            if self._guest.pid != handed.qemu_pid:
                raise HostError(f"the guest's QEMU is process {self._guest.pid}, not {handed.qemu_pid}")
            disks = [(disk.name, disk.path) for disk in await guest_disks(self._guest.monitor)]
            self._carried = Carried.take_over(handed, disks)
        except HostError as error:
            _log.error("protection does not go on", reason=friendly(error))
            handed.close()
            self._mandate.happened(Happening.LOST)
            return
        self._report.output(info["output"], None)
        self._report.epoch, self._report.committed = handed.epoch + 1, handed.epoch
        self._report.qemu = self._report.qemu.model_copy(update={"tracker": info["tracker"]})
        self._report.away = f"the daemon was replaced; {handed.peer_node} is asked whether it has waited"

    async def _resume(self, carried: Carried) -> bool:
        """Have protection go on over a new session. Returns False when that cannot be.

        The other side is tried until the deadline; then this one is as a node that has lost its backup.
        """
        late = reason = f"{carried.peer_node} was not reached in time"
        while carried.left > 0:
            try:
                async with asyncio.timeout(carried.left):
                    session = await self._connect(Resume(epoch=carried.epoch - 1))
            except NothingToResume as error:
                reason = friendly(error)
                break
            except TimeoutError:
                break
            except (LinkError, PeerError) as error:
                reason = f"{late}: {friendly(error)}"
                await asyncio.sleep(RETRY_TO_RESUME_SECONDS)
                continue
            self._carried = None
            await self._with_backup(session, carried)
            return True
        await self._give_up_resuming(reason)
        return False

    async def _give_up_resuming(self, reason: str) -> None:
        """Do as if the backup were lost, which is what it may be."""
        carried, self._carried = self._carried, None
        assert carried is not None
        self._report.away = ""
        _log.warning("protection does not go on without a copy", reason=reason)
        self._report.flight.note("not-resumed", reason=reason)
        if carried.own and not self._mandate.has_arbiter:
            self._mandate.held = True  # the backup had reason to take over, and there is nobody who knows
        free = self._mandate.release_at_the_end(committed=True)
        await self._guest.monitor.execute("x-ft-end", output="release" if free else "hold")
        carried.close()
        if free:
            self._alone(reason)
        elif self._report.machine.allows(PairState.HELD):
            self._report.machine.move(PairState.HELD, reason)

    async def _connect(self, resume: Resume | None = None) -> Session:
        assert self._description is not None
        hello = Hello(
            software_version=ftd.__version__,
            node=self._config.node.name,
            session=uuid.uuid4(),
            generation=self._mandate.generation,
            epoch_ms=self._config.epoch.length_ms,
            heartbeat=HeartbeatSettings(
                interval_ms=self._config.heartbeat.interval_ms, misses=self._config.heartbeat.misses
            ),
            description=self._description.model_dump(mode="json"),
            resume=resume,
        )
        settings = self._config.link
        peer = self._partner.address
        session = await link.connect(
            # Further paths lead to the peer of the configuration.
            replace(self._options, paths=()) if peer.chosen else self._options,
            hello,
            host=peer.host,
            port=peer.port,
            heartbeat_port=settings.heartbeat_port,
            peer_name=peer.name,
            source=settings.listen,
            on_lateness=self._report.metrics.loop_lag.set,
        )
        _log.info("link up", peer=session.peer, node=session.peer_node, session=session.id)
        if resume is None:
            try:
                await self._describe_again(session)
            except BaseException:
                session.abort("the guest's machine could not be described")
                raise
        try:
            differences = self._description.differences(
                MachineDescription.model_validate(session.welcome.description)
            )
        except ValueError:
            differences = ["its description is not understood; install the same version of ftd on both hosts"]
        if differences:
            text = f"the machine of {session.peer_node} is not this one: " + "; ".join(differences)
            await session.close(text)
            raise PeerError(text)
        return session

    async def _describe_again(self, session: Session) -> None:
        """See whether the machine is still what the backup was told. Raises LinkError, to try again, if not.

        A device may have been plugged in while nothing protected the guest, and no event of QEMU tells.
        """
        now = await MachineDescription.of(self._guest.monitor)
        if now != self._description:
            self._description = now
            text = "the guest's machine has changed since it was described"
            await session.close(text)
            raise LinkError(f"{text}; trying again")

    async def _with_backup(self, session: Session, carried: Carried | None = None) -> bool:
        """Protect the guest over a session until that ends. Returns whether to begin anew at once.

        carried: what to go on with, instead of a copy. Raises Succession if this daemon is to be replaced.
        Raises QemuDied if QEMU was lost; the session is then left to whoever has to tell the peer.
        """
        report = self._report
        self._session = session
        report.session_began(session)
        if carried is None:
            report.machine.move(PairState.SYNCING, f"{session.peer_node} is there: copying the guest")
        report.away = ""
        self._protection = protection = Protection(
            self._config,
            report,
            self._guest.monitor,
            session,
            self._mandate.generation,
            self._next_epoch if carried is None else carried.epoch,
            fence=self._mandate,
            carried=carried,
        )
        again, aborted = False, "link"
        reason, suspended = "", False
        report.flight.note("session", peer=session.peer_node, generation=self._mandate.generation)
        try:
            async with self._mandate.over_session(session):
                await protection.run()
        except Yielded as error:
            aborted = error.aborted
            raise Deposed(str(error)) from None
        except Suspended as error:
            aborted, suspended = error.aborted, True
            self._suspended(error.carried)
            again = True
        except ProtectionLost as error:
            reason, again, aborted = str(error), error.resync, error.aborted
        except Deposed:
            aborted = "stopped"
            raise
        except LinkLost:
            reason = str(await session.wait_lost())
        except QemuDied:
            aborted = "stopped"
            raise
        except QemuError as error:
            reason, aborted = f"QEMU refused: {friendly(error)}", "abandoned"
        except asyncio.CancelledError:
            aborted = "stopped"
            raise
        finally:
            report.epoch_aborted(aborted, protection.uncommitted)
            # A number is never used twice within a generation, committed or not.
            self._next_epoch = protection.epoch + 1
            self._stopped_guest = protection.stopped_guest
            self._protection = None
            report.session_ended()
            if not suspended:
                missed = session.heartbeats_missed
                report.flight.note("session-lost", reason=reason or "ended here", heartbeats_missed=missed)
            if not self._mandate.over and reason:
                _log.warning("protection is lost", reason=reason)
                if not self._mandate.flows:
                    report.machine.move(PairState.HELD, reason)
                elif again:
                    report.machine.move(PairState.SYNCING, reason)
                else:
                    self._alone(reason)
        if self._restarting:
            raise Succession(None)
        if self._mandate.flows:
            await self._let_stopped_guest_go()
        return again

    def _suspended(self, carried: Carried) -> None:
        """A daemon of the pair is being replaced. Raises Succession if it is this one."""
        if carried.own:
            raise Succession(
                carried.hand_on(self._config.node.name, self._guest.pid, self._mandate.paired_with)
            )
        self._carried = carried
        _log.info("waiting for the backup to go on", peer=carried.peer_node, seconds=round(carried.left, 1))
        self._report.flight.note(
            "away", peer=carried.peer_node, own=False, epoch=carried.epoch - 1, seconds=round(carried.left, 3)
        )
        self._report.away = f"the daemon of {carried.peer_node} is being replaced; output is held meanwhile"
