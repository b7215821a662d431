"""The node: the one place where the parts are put together, and the order in which they start and stop.

    start    certificates → HTTP → QEMU (guest or shadow) → READY
    run      primary, or backup; a backup that took over goes on as the primary
    stop     take leave of the peer → let go of the guest, or end the shadow → HTTP

The guest is never stopped by the daemon's end, however that comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from ftd import http, log
from ftd.arbiter import NoArbiter
from ftd.backup import Backup, TakenOver
from ftd.config import Config
from ftd.durable import Durable, Memory
from ftd.errors import FtdError, HostError, QemuDied, QemuError, friendly
from ftd.link import LinkOptions
from ftd.messages import HeartbeatSettings
from ftd.metrics import Metrics
from ftd.notify import Notifier
from ftd.primary import Primary, start_guest
from ftd.qemu import QemuProcess, RunFiles, is_running
from ftd.report import Report
from ftd.state import Move, PairState, Role
from ftd.status import Status, VerifyReport
from ftd.tls import TlsFiles, load_identity

_log = log.get(__name__)

# Threads that move bulk data give the event loop, and so acknowledgements and heartbeats, the interpreter
# back after this many seconds; Python's default of 5 ms is the length of a short epoch.
SWITCH_INTERVAL_SECONDS = 0.0005

# For hosts that do not let the daemon have real-time priority.
NICENESS = -10


class Node:
    """A running daemon; the source of its status."""

    def __init__(self, config: Config, role: Role) -> None:
        self._config = config
        self._role = role
        self._durable = Durable(config.node.state_folder)
        self._report = Report(config, Metrics(), role)
        # It took over, and serves alone by intent until there is a backup.
        self._report.solo_intended = role != config.node.role
        self._primary: Primary | None = None
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

    # ---- life ---------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run until the guest has ended (returns 0), or the daemon is told to stop (cancelled).

        Raises FtdError when something is missing that this node cannot do without.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        _take_priority()
        options = self._link_options()
        self._show_warnings(options)
        server = await http.serve(
            http.create_app(self, self._report.metrics), self._config.http.listen, self._config.http.port
        )
        watchdog = asyncio.create_task(self._notifier.watch(self.why_unhealthy))
        try:
            if self._role == "backup":
                return await self._run_backup(options)
            return await self._run_primary(options)
        except asyncio.CancelledError:
            self._notifier.stopping("told to stop; the guest is not touched")
            raise
        finally:
            if self._report.machine.allows(PairState.STOPPED):
                self._report.machine.move(PairState.STOPPED, "the daemon ends")
            watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watchdog
            await server.close()

    async def _run_backup(self, options: LinkOptions) -> int:
        backup = Backup(self._config, self._report, options, NoArbiter())
        self._notifier.ready("backup: waiting for a primary")
        try:
            outcome = await backup.run()
        except QemuDied as error:
            # A shadow's QEMU, not a guest's: to start again is right, unlike what the error's code says.
            raise QemuError(str(error)) from None
        if not isinstance(outcome, TakenOver):
            return 0
        self._remember(outcome.generation)
        return await self._lead(
            Primary(self._config, self._report, options, outcome.guest, outcome.generation)
        )

    async def _run_primary(self, options: LinkOptions) -> int:
        generation = max(1, self._durable.read().generation)
        guest = await start_guest(self._config)
        self._remember(generation)
        self._notifier.ready("primary: the guest runs")
        return await self._lead(Primary(self._config, self._report, options, guest, generation))

    async def _lead(self, primary: Primary) -> int:
        self._primary = primary
        try:
            reason = await primary.run()
        finally:
            await primary.let_go()
        _log.info("the guest has ended, so does the daemon", reason=reason)
        return 0

    def _remember(self, generation: int) -> None:
        """Note that this node runs the guest, which goes on whatever becomes of the note."""
        try:
            self._durable.write(Memory(generation=generation, role="primary"))
        except HostError as error:
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
        )

    def _show_warnings(self, options: LinkOptions) -> None:
        report = self._report
        report.warn("accept_split_brain", NoArbiter.WARNING)
        if not self._config.output.hold:
            report.warn(
                "output_not_held",
                "network output is not held back (hold = false): clients see answers that a takeover undoes",
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


async def run(config: Config) -> int:
    """Run a node; return the exit code. Raises FtdError, one line, for what it cannot do without."""
    return await Node(config, await _role(config)).run()


async def _role(config: Config) -> Role:
    """Return what this node is: as configured, but for a backup that took over and whose daemon starts anew.

    A shadow that an earlier daemon left waiting is ended: what it held is not known to be whole.
    """
    if not is_running(config):
        return config.node.role
    found = await QemuProcess.attach(RunFiles(config.node.run_folder).qmp_socket)
    status = await found.monitor.execute("query-status")
    if status["status"] == "inmigrate":
        _log.warning("ending a shadow that an earlier daemon left behind", pid=found.pid)
        await found.kill()
        return config.node.role
    await found.detach()
    if config.node.role == "backup":
        _log.warning("the guest runs here since a takeover: this node is the primary", pid=found.pid)
    return "primary"
