"""The node: the one place where the parts are put together, and the order in which they start and stop.

    start    certificates → HTTP → arbiter → QEMU (guest or shadow) → READY
    run      primary, or backup; who took over goes on as primary, who was deposed as backup
    stop     take leave of the peer → let go of the guest, or end the shadow → HTTP

The guest is never stopped by the daemon's end, however that comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftd import log, succession
from ftd.arbiter import NoArbiter, Record
from ftd.arbiters import identity, open_arbiter
from ftd.authority import Decision, Standing, Start, at_start
from ftd.backup import Backup, GuestEnded, TakenOver
from ftd.config import Config
from ftd.durable import Durable, Memory
from ftd.errors import (
    ArbiterError,
    ArbiterStale,
    Deposed,
    FtdError,
    HostError,
    QemuDied,
    QemuError,
    TakeoverRefused,
    friendly,
)
from ftd.inquiry import Inquiry
from ftd.link import LinkOptions
from ftd.marker import Marker, Markers, Worth, mark
from ftd.messages import HeartbeatSettings
from ftd.metrics import Metrics
from ftd.notify import Notifier
from ftd.partner import Partner
from ftd.paths import PathSettings
from ftd.primary import Primary, refuse_to_boot, start_guest
from ftd.qemu import QemuProcess, RunFiles, listens
from ftd.report import Report
from ftd.state import Move, PairState, Role
from ftd.status import Done, PeerFlight, Status, VerifyReport
from ftd.succession import Handed, Succession
from ftd.tls import TlsFiles, load_identity

if TYPE_CHECKING:
    from ftd import http

_log = log.get(__name__)

# Threads that move bulk data give the event loop, and so acknowledgements and heartbeats, the interpreter
# back after this many seconds; Python's default of 5 ms is the length of a short epoch.
SWITCH_INTERVAL_SECONDS = 0.0005

# Between two looks at an arbiter that does not answer.
ASK_AGAIN_SECONDS = 0.5

# A daemon that goes on with another's protection has reached its peer by then, or waits for it.
SERVE_AFTER_SECONDS = 1.0

# A backup that could take over has done so within this, or is not there: its
# detection (0.3 s by default) began before this node's daemon did.
GRACE_SECONDS = 10.0

# For hosts that do not let the daemon have real-time priority.
NICENESS = -10


class Node:
    """A running daemon; the source of its status."""

    def __init__(self, config: Config, found: Found) -> None:
        self._config = config
        self._found = found.qemu
        self._handed = found.handed
        self._lost = found.lost
        self._ended = found.ended
        role = found.role
        self._task: asyncio.Task[Any] | None = None
        self._server: http.Server | None = None
        self._succession = False  # stopped as planned, but to be replaced
        self._role = role
        self._durable = Durable(config.node.state_folder)
        self._report = Report(config, Metrics(), role)
        # It took over, and serves alone by intent until there is a backup.
        self._report.solo_intended = role != config.node.role
        self._partner = Partner(config)
        self._report.set_peer_address(self._partner.address.host, self._partner.in_words())
        self._inquiry = Inquiry(open_arbiter(config.arbiter), self._report, config.node.name)
        self._deposed = False
        self._arbiter = identity(config.arbiter)
        memory = self._durable.read()
        self._known = memory.generation if memory.arbiter == self._arbiter else 0
        self._forced = asyncio.Event()  # an operator says that this node is to have the guest
        self._primary: Primary | None = None
        self._backup: Backup | None = None
        self._notifier = Notifier.from_environment()
        self._report.machine.listen(self._tell_systemd)

    # ---- StatusSource -------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Return a snapshot."""
        return self._report.status()

    def why_unhealthy(self) -> str | None:
        """The loop that answers this is all that a restart could mend."""
        return None

    async def verify(self) -> VerifyReport:
        """Compare all memory with the shadow. Raises FtdError when this node has none to compare."""
        if self._primary is None:
            raise FtdError(f"{self._config.node.name} is a backup; ask the primary to verify")
        return await self._primary.verify()

    async def peer_flight(self) -> PeerFlight:
        """Fetch the peer's flight recorder over the link. Raises FtdError when the peer cannot be asked."""
        return await self._report.peer_flight()

    async def control(self, action: str, arguments: Mapping[str, Any]) -> Done:
        """Carry out what an operator asks for. Raises FtdError that says why not."""
        if action == "takeover":
            if self._backup is not None:
                return Done(detail=self._backup.force())
            if self._primary is not None:
                return Done(detail=self._primary.force())
            if self._inquiry.decides:
                self._forced.set()
                return Done(detail="the guest is to boot here; see ftd status")
            raise TakeoverRefused(f"there is nothing to take over with: {self._report.machine.reason}")
        if action == "upgrade":
            return Done(detail=await self._upgrade())
        if self._primary is None:
            raise FtdError(f"{self._config.node.name} does not run the guest; ask the primary")
        match action:
            case "switchover":
                return Done(detail=await self._primary.switchover())
            case "pause-protection":
                return Done(detail=self._primary.pause_protection())
            case "resume-protection":
                return Done(detail=self._primary.resume_protection())
            case _:
                return Done(detail=self._primary.protect(str(arguments["host"]), arguments.get("port")))

    async def _upgrade(self) -> str:
        """Have this daemon replaced in place. Raises FtdError if its successor would not start."""
        await succession.check()
        detail = None
        if self._primary is not None:
            detail = self._primary.restart()
        elif self._backup is not None:
            detail = self._backup.restart()
        if detail is None:
            assert self._task is not None
            self._succession = True
            self._task.cancel()
            detail = f"there is no protection to go on with: this node is {self._report.machine.state}"
        return f"the daemon is being replaced; {detail}"

    # ---- life ---------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run until the guest has ended (returns 0), or the daemon is told to stop (cancelled).

        Raises FtdError when something is missing that this node cannot do without, and Succession when the
        daemon is to be replaced.
        """
        self._task = asyncio.current_task()
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        _take_priority()
        options = self._link_options()
        self._show_warnings(options)
        later = None
        if self._handed is None:
            self._server = await self._serve()
        else:
            later = asyncio.create_task(self._serve_later())
        watchdog = asyncio.create_task(self._notifier.watch(self.why_unhealthy))
        try:
            return await self._live(options)
        except Succession as ended:
            self._note_replaced(ended.handed)
            raise
        except asyncio.CancelledError:
            if self._succession:
                self._note_replaced(None)
                raise Succession(None) from None
            self._notifier.stopping("told to stop; the guest is not touched")
            raise
        finally:
            if self._report.machine.allows(PairState.STOPPED):
                self._report.machine.move(PairState.STOPPED, "the daemon ends, or is replaced")
            for task in (watchdog, later):
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            await self._inquiry.arbiter.close()
            await asyncio.to_thread(self._report.flight.close)
            if self._server is not None:
                await self._server.close()

    async def _serve(self) -> http.Server:
        """Serve HTTP. Raises HostError if that is not possible here."""
        # In a thread, since a session may be going on; it takes longer than all else of ftd.
        module = await asyncio.to_thread(importlib.import_module, "ftd.http")
        settings = self._config.http
        server: http.Server = await module.serve(
            module.create_app(self, self._report.metrics), settings.listen, settings.port
        )
        return server

    async def _serve_later(self) -> None:
        """Serve HTTP once the guest's output does not wait any more for this daemon, or for the peer's.

        Whatever is in the way: protection goes on without it.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._report.went_on.wait(), SERVE_AFTER_SECONDS)
        told = ""
        while self._server is None:
            try:
                self._server = await self._serve()
            except (HostError, ImportError, OSError) as error:
                if friendly(error) != told:
                    told = friendly(error)
                    _log.error("HTTP is not served; trying again", reason=told)
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    def _note_replaced(self, handed: Handed | None) -> None:
        """Have the flight recorder know: without this it looks as if the peer was lost."""
        if handed is None:
            self._report.flight.note("replaced")
        else:
            seconds = round(handed.deadline - handed.began, 3)
            self._report.flight.note("replaced", peer=handed.peer_node, epoch=handed.epoch, seconds=seconds)

    async def _live(self, options: LinkOptions) -> int:
        """Play one part after the other, until the guest has ended."""
        if self._ended:
            await self._note_the_end()
            return 0
        lost = self._lost  # the guest ran here, and its QEMU is gone
        if lost is not None and not self._inquiry.decides:
            raise lost
        while True:
            if self._handed is not None and self._handed.backup is not None:
                start = Start.BACKUP
            elif not self._inquiry.decides:
                start = Start.BACKUP if self._role == "backup" else Start.ATTACH
            else:
                start = await self._decide(lost)
            try:
                if start is Start.BACKUP:
                    self._role = "backup"
                    if self._report.machine.role != "backup":
                        self._report.machine.assume("backup")
                    outcome = await self._guard(options)
                    if isinstance(outcome, GuestEnded):
                        return 0
                    # Nothing is awaited until it runs: a guest is nobody's in between.
                    primary = self._primary_of(
                        options,
                        outcome.guest,
                        outcome.generation,
                        Standing.ALONE,
                        markers=outcome.markers,
                        told=outcome.told,
                    )
                elif start is Start.ATTACH:
                    self._assume_primary()
                    primary = await self._start_primary(options)
                else:
                    won = await self._win(start)
                    if won is None:
                        continue
                    record, settled = won
                    self._assume_primary()
                    guest = await start_guest(self._config, settled)
                    self._report.set_generation(record.generation)
                    primary = self._primary_of(options, guest, record.generation, Standing.ALONE)
                self._role = "primary"
                self._notifier.ready("primary: the guest runs")
                await self._lead(primary)
                return 0
            except Deposed as error:
                self._role, lost, self._deposed = "backup", None, True
                self._report.machine.move(PairState.WAITING, str(error))
                _log.warning("deposed: this node is the backup from now on", reason=str(error))
            except QemuDied as error:
                if not self._inquiry.decides or self._role == "backup":
                    raise
                lost = error
                self._report.machine.move(PairState.WAITING, str(error))

    async def _note_the_end(self) -> None:
        """The guest ended by itself while nobody looked: no failure, as far as the arbiter allows it."""
        outcome = await self._inquiry.stopped(self._known)
        if outcome.granted and self._inquiry.decides:
            folder = self._config.node.state_folder
            markers = [Marker(disk.path, folder) for disk in self._config.machine.disk]
            try:
                mark(markers, Worth.ALONE, self._known, self._config.node.name)
            except HostError as error:
                _log.error("a disk is not marked as the newest copy", reason=friendly(error))
        self._report.machine.move(PairState.STOPPED, f"{self._lost}, as the guest wanted")

    def _assume_primary(self) -> None:
        if self._report.machine.role != "primary":
            self._report.machine.assume("primary")

    async def _guard(self, options: LinkOptions) -> TakenOver | GuestEnded:
        handed, self._handed = self._handed, None
        found = None
        if handed is not None:
            assert self._found is not None
            found, self._found = (handed, self._found), None
        self._forced.clear()  # from here on it is this part's
        self._backup = backup = Backup(
            self._config, self._report, options, self._inquiry, self._partner, found
        )
        backup.on_generation(self._remember)
        self._notifier.ready("backup: waiting for a primary")
        try:
            return await backup.run()
        except QemuDied as error:
            # A shadow's QEMU, not a guest's: to start again is right, unlike what the error's code says.
            raise QemuError(str(error)) from None
        finally:
            self._backup = None

    async def _start_primary(self, options: LinkOptions) -> Primary:
        """Start the guest without asking anybody, or attach to the one that runs here."""
        generation = max(1, self._known)
        if not self._inquiry.decides:
            await self._remember(generation)
        guest, self._found = self._found or await start_guest(self._config), None
        handed, self._handed = self._handed, None
        if handed is None or handed.generation != generation:
            return self._primary_of(options, guest, generation, Standing.ASKING)
        return self._primary_of(options, guest, generation, Standing.PAIRED, handed)

    def _primary_of(
        self,
        options: LinkOptions,
        guest: QemuProcess,
        generation: int,
        standing: Standing,
        handed: Handed | None = None,
        markers: Markers | None = None,
        told: bool = True,
    ) -> Primary:
        return Primary(
            self._config,
            self._report,
            options,
            guest,
            generation,
            standing=standing,
            inquiry=self._inquiry,
            partner=self._partner,
            remember=self._remember_at_once,
            handed=handed,
            markers=markers,
            told=told,
        )

    async def _lead(self, primary: Primary) -> None:
        self._primary = primary
        self._forced.clear()  # from here on it is this part's
        try:
            reason = await primary.run()
        finally:
            self._primary = None
            await primary.let_go()
        _log.info("the guest has ended, so does the daemon", reason=reason)

    # ---- who runs the guest -------------------------------------------------------------------------------

    async def _decide(self, lost: QemuDied | None) -> Start:
        """Ask the arbiter which part this node has to play, for as long as it does not answer.

        lost: the guest has just died here. Raises it when nobody has taken over. An arbiter whose record is
        older than what this node has noted counts as one that does not answer: a person has to look.
        """
        attach = self._config.machine.attach is not None and not self._deposed
        if lost is None and (attach or self._found is not None):
            # Its output stays held until the primary has asked.
            return Start.ATTACH
        clock = asyncio.get_running_loop().time
        waited_since = clock()
        told = ""
        while True:
            try:
                record = await self._inquiry.arbiter.read()
                decision = at_start(
                    self._config.node.name, self._config.node.role, False, self._known, record
                )
                self._report.arbiter_seen(record)
            except ArbiterError as error:
                self._report.arbiter_failed(str(error), stale=isinstance(error, ArbiterStale))
                # The supervisor need not wait for the arbiter as well.
                self._notifier.ready("waiting for the arbiter")
                decision = Decision(Start.WAIT, str(error))
                waited_since = clock()
            if decision.why != told:
                told = decision.why
                self._report.flight.note("decided", start=decision.start.value, reason=told)
                loud = _log.error if "arbiter_stale" in self._report.warning_names else _log.info
                loud("who runs the guest", decision=decision.start.value, reason=told)
            self._report.note = told
            if self._forced.is_set():
                return Start.BOOT
            if decision.start is Start.WAIT:
                if clock() - waited_since < GRACE_SECONDS:
                    await asyncio.sleep(ASK_AGAIN_SECONDS if lost is None else 0.05)
                    continue
                decision = Decision(Start.BOOT, told)
            if decision.start is Start.BOOT and lost is not None:
                raise QemuDied(
                    f"{lost}; nobody has taken over: start the daemon again to have the guest boot"
                )
            return decision.start

    async def _win(self, start: Start) -> tuple[Record, int] | None:
        """Win the next generation, to start the guest here; None when it has to be decided anew.

        Returns the record, and the generation up to which nobody has taken the guest from this node, -1 if
        that is not known. The record says it: no question of the other side is granted any more. Or a person.

        Raises HostError, with nothing asked, if a disk is not one to start the guest from: each start of the
        daemon would cost a generation.
        """
        if self._forced.is_set():
            self._forced.clear()
            refuse_to_boot(self._config, sys.maxsize)  # whatever generation it will be
            forced = await self._inquiry.force(self._known)
            if not forced.granted or forced.record is None:
                _log.error("the guest is not started: the arbiter has to know it", reason=forced.reason)
                return None
            await self._remember(forced.record.generation)
            return forced.record, forced.record.generation
        try:
            record = await self._inquiry.arbiter.read()
        except ArbiterError:
            return None
        if record is not None and record.owner != self._config.node.name:
            return None
        settled = -1 if record is None else record.generation
        refuse_to_boot(self._config, settled)
        outcome = await self._inquiry.first(record)
        if not outcome.granted or outcome.record is None:
            return None
        await self._remember(outcome.record.generation)
        return outcome.record, settled

    async def _remember(self, generation: int, role: Role = "primary") -> None:
        """Note this node's part in a generation. The guest goes on, whatever becomes of the note.

        The host's disk may be busy with a copy: heartbeats go on meanwhile.
        """
        self._known = max(self._known, generation)
        memory = Memory(generation=generation, role=role, arbiter=self._arbiter)
        if not self._durable.holds(memory):
            await asyncio.to_thread(self._write_down, memory)

    def _remember_at_once(self, generation: int) -> None:
        """The same for a primary that has no session, and lets no output go before it is noted."""
        self._known = max(self._known, generation)
        self._write_down(Memory(generation=generation, role="primary", arbiter=self._arbiter))

    def _write_down(self, memory: Memory) -> None:
        try:
            self._durable.write(memory)
        except HostError as error:
            generation = memory.generation
            _log.error("the generation is not remembered", generation=generation, error=friendly(error))

    def _link_options(self) -> LinkOptions:
        link = self._config.link
        identity = None
        if not link.insecure:
            assert link.certificate is not None
            assert link.key is not None
            assert link.authority is not None
            identity = load_identity(TlsFiles(link.certificate, link.key, link.authority))
        heartbeat = self._config.heartbeat
        return LinkOptions(
            identity=identity,
            heartbeat=HeartbeatSettings(interval_ms=heartbeat.interval_ms, misses=heartbeat.misses),
            paths=tuple(PathSettings(path.name, path.listen, path.peer) for path in heartbeat.path),
            patience_seconds=heartbeat.link_patience_ms / 1000,
            stall_seconds=link.stall_s,
            user_timeout_seconds=link.stall_s,
        )

    def _show_warnings(self, options: LinkOptions) -> None:
        report = self._report
        if not self._inquiry.decides:
            report.warn("accept_split_brain", NoArbiter.WARNING)
        if not self._config.output.hold:
            report.warn(
                "output_not_held",
                "network output is not held back (hold = false): clients see answers that a takeover undoes",
            )
        if not self._config.disks.replicate or self._config.disks.apply != "committed":
            report.warn(
                "disks_not_replicated",
                "disks are not replicated ([disks] replicate = false, or another apply than committed): a "
                "takeover damages them",
            )
        if options.identity is None:
            report.warn("insecure_link", "the link is neither encrypted nor authenticated (insecure = true)")
        else:
            for warning in options.identity.warnings:
                _log.warning("certificate", warning=warning)

    def _tell_systemd(self, move: Move) -> None:
        self._notifier.status(f"{move.to}: {move.reason}")


def _take_priority() -> None:
    """Let the event loop run before everything else that wants a processor.

    A heartbeat that waits for a busy host is a missed one. Real-time, since niceness does not count between
    sessions (autogroups). Only this thread: threads and programs that it starts begin as everybody else.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError as error:
        _log.warning("no real-time priority: heartbeats may be late on a busy host", error=friendly(error))
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


@dataclass(frozen=True)
class Found:
    """What a daemon finds at its start. qemu: attached to; handed: what a predecessor left for this part.

    lost: the guest's QEMU ended while the daemon was replaced; ended: it did so with success.
    """

    role: Role
    qemu: QemuProcess | None = None
    handed: Handed | None = None
    lost: QemuDied | None = None
    ended: bool = False


async def run(config: Config) -> int:
    """Run a node; return the exit code.

    Raises FtdError, one line, for what it cannot do without, and Succession if the daemon is to be replaced.
    """
    return await Node(config, await _find(config, succession.take(config.node.name))).run()


async def _find(config: Config, handed: Handed | None) -> Found:
    """Find out what this node is.

    It is what is configured, but for a backup that took over and whose daemon starts anew.

    A shadow that an earlier daemon left waiting is ended, unless it was handed on: what it held is not known
    to be whole.
    """
    socket = RunFiles(config.node.run_folder).qmp_socket
    if handed is not None and handed.primary is not None and config.machine.attach is not None:
        socket = config.machine.attach
    if not listens(socket):
        return Found(config.node.role) if handed is None else _find_nothing(config, handed)
    found = await QemuProcess.attach(socket)
    status = await found.monitor.execute("query-status")
    waits = status["status"] == "inmigrate"
    if handed is not None and (waits != (handed.role == "backup") or found.pid != handed.qemu_pid):
        _log.error("what was handed on does not fit QEMU", pid=found.pid, status=status["status"])
        handed.close()
        handed = None
    if waits and handed is None:
        _log.warning("ending a shadow that an earlier daemon left behind", pid=found.pid)
        await found.kill()
        return Found(config.node.role)
    if waits:
        return Found("backup", found, handed)
    if config.node.role == "backup":
        _log.warning("the guest runs here since a takeover: this node is the primary", pid=found.pid)
    return Found("primary", found, handed)


def _find_nothing(config: Config, handed: Handed) -> Found:
    """QEMU has ended in the moment in which nobody looked."""
    handed.close()
    status = 0
    with contextlib.suppress(ChildProcessError):
        _, status = os.waitpid(handed.qemu_pid, os.WNOHANG)
    text = f"QEMU (process {handed.qemu_pid}) ended while the daemon was replaced"
    _log.error("QEMU is lost", reason=text, status=os.waitstatus_to_exitcode(status))
    if handed.role == "backup":
        return Found(config.node.role)
    return Found("primary", lost=QemuDied(text), ended=status == 0)
