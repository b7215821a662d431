"""The node: the one place where the parts are put together, and the order in which they start and stop.

    start    certificates → HTTP → QEMU (guest or shadow) → READY
    run      primary, or backup; a backup that took over goes on as the primary
    stop     take leave of the peer → let go of the guest, or end the shadow → HTTP

The guest is never stopped by the daemon's end, however that comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from ftd import http, log
from ftd.arbiter import NoArbiter
from ftd.backup import Backup, TakenOver
from ftd.config import Config
from ftd.errors import FtdError
from ftd.link import LinkOptions
from ftd.messages import HeartbeatSettings
from ftd.metrics import Metrics
from ftd.notify import Notifier
from ftd.primary import Primary, start_guest
from ftd.report import Report
from ftd.state import Move, PairState
from ftd.status import Status, VerifyReport
from ftd.tls import TlsFiles, load_identity

_log = log.get(__name__)

# Threads that move bulk data give the event loop, and so acknowledgements and heartbeats, the interpreter
# back after this many seconds; Python's default of 5 ms is the length of a short epoch.
SWITCH_INTERVAL_SECONDS = 0.0005


class Node:
    """A running daemon; the source of its status."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._report = Report(config, Metrics())
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
        options = self._link_options()
        self._show_warnings(options)
        server = await http.serve(
            http.create_app(self, self._report.metrics), self._config.http.listen, self._config.http.port
        )
        watchdog = asyncio.create_task(self._notifier.watch(self.why_unhealthy))
        try:
            if self._config.node.role == "backup":
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
        outcome = await backup.run()
        if not isinstance(outcome, TakenOver):
            return 0
        return await self._lead(
            Primary(self._config, self._report, options, outcome.guest, outcome.generation)
        )

    async def _run_primary(self, options: LinkOptions) -> int:
        guest = await start_guest(self._config)
        self._notifier.ready("primary: the guest runs")
        return await self._lead(Primary(self._config, self._report, options, guest, 1))

    async def _lead(self, primary: Primary) -> int:
        self._primary = primary
        try:
            reason = await primary.run()
        finally:
            await primary.let_go()
        _log.info("the guest has ended, so does the daemon", reason=reason)
        return 0

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
        report.warn(
            "output_not_held",
            "network output is not held back: clients may see answers that a takeover undoes",
        )
        if options.identity is None:
            report.warn("insecure_link", "the link is neither encrypted nor authenticated (insecure = true)")
        else:
            for warning in options.identity.warnings:
                _log.warning("certificate", warning=warning)

    def _tell_systemd(self, move: Move) -> None:
        self._notifier.status(f"{move.to}: {move.reason}")


async def run(config: Config) -> int:
    """Run a node; return the exit code. Raises FtdError, one line, for what it cannot do without."""
    return await Node(config).run()
