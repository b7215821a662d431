"""The primary: runs the guest, and keeps a backup of it for as long as one can be reached.

The guest comes first: whatever happens to the backup, to the link or to the copy, it runs on. Only its own
end ends the primary:

    it shut down, or was told to by QMP quit     GuestStopped to the backup, which stops too     (rule S7)
    its QEMU died                                QemuLost to the backup, which takes over
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable

import ftd
from ftd import link, log, tap
from ftd.config import Config
from ftd.epochs import Protection, ProtectionLost
from ftd.errors import FtdError, HostError, LinkError, PeerError, QemuDied, QemuError, friendly
from ftd.link import LinkOptions, Session
from ftd.machine import MachineDescription, guest_disks, refuse_devices
from ftd.marker import Marker, Worth, mark
from ftd.messages import GuestStopped, HeartbeatSettings, Hello, QemuLost
from ftd.monitor import Event
from ftd.qemu import QemuProcess, RunFiles, is_running, require_patched
from ftd.report import Report
from ftd.state import Move, PairState
from ftd.status import QemuStatus, VerifyReport
from ftd.wire import LinkLost

_log = log.get(__name__)

# Between two attempts to reach a backup. A refusal needs a person, so it is repeated less often.
RETRY_SECONDS = 0.5
RETRY_AFTER_REFUSAL_SECONDS = 5.0

# Reasons of QEMU's SHUTDOWN event that come from the host and not from anybody who wants the guest to end:
# a signal to QEMU. The guest did nothing, so this is a loss like any other.
_NOT_WANTED = frozenset({"host-signal", "host-error"})


async def start_guest(config: Config) -> QemuProcess:
    """Start the guest, or attach to the one that runs: the configured one, or one left by an earlier daemon.

    Raises HostError, ConfigError or QemuError with one line that says what is wrong.
    """
    machine = config.machine
    if machine.attach is not None:
        return await QemuProcess.attach(machine.attach)
    if is_running(config):
        _log.info("the guest of an earlier daemon runs: attaching to it")
        return await QemuProcess.attach(RunFiles(config.node.run_folder).qmp_socket)
    for disk in machine.disk:
        refusal = Marker(disk.path, config.node.state_folder).refusal_to_start()
        if refusal is not None:
            raise HostError(refusal)
    guest = await QemuProcess.start(config)
    try:
        tap.switch(machine.nic, up=True)
    except HostError:
        await guest.kill()
        raise
    return guest


class Primary:
    """The primary's part of a node's life, for one guest. Made once; `run` returns why the guest ended."""

    def __init__(
        self, config: Config, report: Report, options: LinkOptions, guest: QemuProcess, generation: int
    ) -> None:
        self._config = config
        self._report = report
        self._options = options
        self._guest = guest
        self._generation = generation
        self._next_epoch = 1
        self._description: MachineDescription | None = None
        self._protection: Protection | None = None
        self._session: Session | None = None
        self._held = False  # output is held, and it is not known whether this side may release it
        self._over = False  # the guest has ended: no more backups, and no more moves but to `stopped`
        self._shutdown: str | None = None  # QEMU's reason, once the guest is ending
        self._unsubscribe: list[Callable[[], None]] = []
        self._markers: list[Marker] = []  # of the guest's disks
        report.machine.listen(self._on_move)

    async def run(self) -> str:
        """Run until the guest ends; return QEMU's reason for a wanted end.

        Raises QemuDied if QEMU was lost, and QemuError or HostError for a guest that cannot be protected;
        that one is left running. Cancelled, it takes its leave of the backup; the guest runs on.
        """
        report = self._report
        monitor = self._guest.monitor
        report.set_generation(self._generation)
        self._unsubscribe += [
            monitor.on("SHUTDOWN", self._on_shutdown),
            monitor.on("STOP", lambda _: self._set_running(False)),
            monitor.on("RESUME", lambda _: self._set_running(True)),
        ]
        ended = asyncio.ensure_future(self._until_ended())
        work = asyncio.ensure_future(self._prepare_and_protect())
        try:
            await asyncio.wait({ended, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not ended.done():
                # A loss of QEMU is seen by the work a moment before the process is reaped.
                error = work.exception()
                if not isinstance(error, QemuDied):
                    raise error if error is not None else AssertionError("the primary has no work left")
                await ended
            self._over = True
            return await self._after_the_end()
        finally:
            for unsubscribe in self._unsubscribe:
                unsubscribe()
            ended.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, FtdError):
                await work

    async def let_go(self) -> None:
        """Let go of the guest, which runs on if it has not ended."""
        await self._guest.detach()

    async def verify(self) -> VerifyReport:
        """Compare all memory with the shadow at the end of this epoch. Raises FtdError if there is none."""
        if self._protection is None or self._report.machine.state is not PairState.PROTECTED:
            raise FtdError(
                f"nothing to compare with: this node is {self._report.machine.state}, not protected"
            )
        return await self._protection.verify()

    def _on_move(self, move: Move) -> None:
        if move.to is PairState.SOLO:
            self._mark_alone()

    def _mark_alone(self) -> None:
        """Note that no other copy of the disks can be newer, which costs nobody anything if it fails."""
        try:
            mark(self._markers, Worth.ALONE, self._generation, self._config.node.name)
        except HostError as error:
            _log.error("a disk is not marked as the newest copy", reason=friendly(error))

    # ---- the guest's end ----------------------------------------------------------------------------------

    def _on_shutdown(self, event: Event) -> None:
        self._shutdown = str(event.get("data", {}).get("reason", "unknown"))

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
        session = self._session
        if self._shutdown is not None and self._shutdown not in _NOT_WANTED:
            reason = f"the guest has ended: {self._shutdown}"
            if session is not None and session.lost is None:
                with contextlib.suppress(FtdError):
                    await session.send(GuestStopped(reason=self._shutdown, epoch=self._report.committed))
                await session.close(reason)
            self._mark_alone()
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
        info = await monitor.execute("query-x-ft")
        self._held = info["output"]["holding"]
        await monitor.execute("x-ft-end", output="hold" if self._held else "release")
        if self._held:
            self._report.output(info["output"], None)
            self._report.machine.move(
                PairState.HELD,
                "the guest of an earlier daemon, whose output is held: the backup may have taken over",
            )
        self._description = await MachineDescription.of(monitor)
        refuse_devices(self._description)
        self._markers = [
            Marker(disk.path, self._config.node.state_folder) for disk in await guest_disks(monitor)
        ]
        self._report.qemu = QemuStatus(
            pid=self._guest.pid,
            version=self._description.qemu_version,
            accelerator=self._description.accelerator,
            running=(await monitor.execute("query-status"))["running"],
        )
        told = ""
        while not self._over:
            wait = RETRY_SECONDS
            try:
                session = await self._connect()
            except (LinkError, PeerError) as error:
                text = friendly(error)
                if isinstance(error, PeerError):
                    wait = RETRY_AFTER_REFUSAL_SECONDS
                if text != told:
                    told = text
                    _log.warning("no backup: the guest runs unprotected", reason=text)
                if self._held:
                    await self._look_at_held_output()
                if not self._held and self._report.machine.allows(PairState.SOLO):
                    self._report.machine.move(PairState.SOLO, text)
                await asyncio.sleep(wait)
                continue
            told = ""
            if await self._with_backup(session):
                continue
            await asyncio.sleep(wait)

    async def _look_at_held_output(self) -> None:
        """Show what is held; an operator may have let it go over QMP, and with it said who has the guest."""
        info = await self._guest.monitor.execute("query-x-ft")
        self._held = info["output"]["holding"]
        self._report.output(info["output"], None)

    async def _connect(self) -> Session:
        assert self._description is not None
        hello = Hello(
            software_version=ftd.__version__,
            node=self._config.node.name,
            session=uuid.uuid4(),
            generation=self._generation,
            epoch_ms=self._config.epoch.length_ms,
            heartbeat=HeartbeatSettings(
                interval_ms=self._config.heartbeat.interval_ms, misses=self._config.heartbeat.misses
            ),
            description=self._description.model_dump(mode="json"),
        )
        settings = self._config.link
        session = await link.connect(
            self._options,
            hello,
            host=settings.peer,
            port=settings.port,
            heartbeat_port=settings.heartbeat_port,
            peer_name=settings.expected_peer_name,
            source=settings.listen,
            on_lateness=self._report.metrics.loop_lag.set,
        )
        _log.info("link up", peer=session.peer, node=session.peer_node, session=session.id)
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

    async def _with_backup(self, session: Session) -> bool:
        """Protect the guest over a session until that ends. Returns whether to begin anew at once.

        Raises QemuDied if QEMU was lost; the session is then left to whoever has to tell the peer.
        """
        report = self._report
        self._session = session
        report.peer_name, report.peer_connected = session.peer_node, True
        report.heartbeat_age = lambda: session.heartbeat_age
        report.machine.move(PairState.SYNCING, f"{session.peer_node} is there: copying the guest")
        self._protection = protection = Protection(
            self._config,
            report,
            self._guest.monitor,
            session,
            self._generation,
            self._next_epoch,
            held_before=self._held,
        )
        again, aborted = False, "link"
        reason = ""
        try:
            await protection.run()
        except ProtectionLost as error:
            reason, again, aborted = str(error), error.resync, error.aborted
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
            self._held = self._held and not protection.committed
            self._protection = None
            report.peer_connected = False
            report.heartbeat_age = lambda: None
            if not self._over and reason:
                _log.warning("protection is lost", reason=reason)
                alone = PairState.HELD if self._held else PairState.SOLO
                report.machine.move(PairState.SYNCING if again else alone, reason)
        return again
