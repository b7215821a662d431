"""The backup's life: its listener, one QEMU after the other with a shadow, and session after session."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from ftd import log, tap
from ftd.absence import Away
from ftd.authority import Standing
from ftd.backup.admission import admit
from ftd.backup.disks import Disks
from ftd.backup.guard import Guard
from ftd.backup.interim import give_up_waiting, next_session, take_up
from ftd.backup.outcome import GuestEnded, ShadowGone, TakenOver
from ftd.backup.standby import Remember, ShadowVm, Standby
from ftd.config import Config
from ftd.disk import Copies
from ftd.errors import FtdError, TakeoverRefused
from ftd.inquiry import Inquiry
from ftd.link import LinkOptions, Listener
from ftd.machine import MachineDescription, guest_disks
from ftd.marker import Marker
from ftd.metrics import Rejection
from ftd.partner import Partner
from ftd.qemu import QemuProcess, require_patched
from ftd.report import Report
from ftd.shadow import Shadow
from ftd.state import PairState
from ftd.status import QemuStatus
from ftd.succession import Handed, Succession

_log = log.get(__name__)


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
        standing = Standing.EMPTY if handed is None else Standing.GUARDING
        self._standby = Standby(config, report, inquiry, standing)
        self._standby.busy = handed is not None  # until that is taken up
        self._handed = handed

    def on_generation(self, remember: Remember) -> None:
        """Have it noted which part this node plays in each generation.

        That of a session, before anything is acknowledged in it; and the one in which it has taken over.
        """
        self._standby.remember = remember

    def force(self) -> str:
        """Start the shadow whatever the arbiter says. Returns what will be done; raises TakeoverRefused."""
        standby = self._standby
        if not standby.claimable or standby.authority.standing not in (
            Standing.GUARDING,
            Standing.CLAIMING,
            Standing.DOUBTING,
        ):
            raise TakeoverRefused(
                f"there is no committed shadow here; this node is {self._report.machine.state}"
            )
        if not standby.forced.done():
            standby.forced.set_result(None)
        return "the shadow is being started; see ftd status"

    def restart(self) -> str | None:
        """Have `run` end with a Succession whose successor goes on with this shadow.

        Returns what is done; None if there is no shadow to go on with: the daemon is then to be stopped as
        planned. What the primary says or suffers comes first. Raises FtdError while there is a shadow without
        a primary: it would be ended, and the guest may be lost with it.
        """
        grace, standby = self._config.node.restart_grace_ms, self._standby
        if standby.claimable and not standby.guarding:
            machine = self._report.machine
            raise FtdError(
                "the daemon is not replaced now: the shadow here may be all that is left of the guest, and "
                f"would be ended; this node is {machine.state} ({self._report.away or machine.reason}), try "
                "again when that is settled"
            )
        if not standby.claimable or not grace:
            return None
        if not standby.leaving.done():
            standby.leaving.set_result(None)
        return f"{self._report.peer_name} is asked to wait up to {grace / 1000:g} s for it"

    async def run(self) -> TakenOver | GuestEnded:
        """Wait for primaries and guard their guest.

        Raises HostError or QemuError if the shadow cannot be had.

        Cancelled, it takes its leave of the primary and ends the shadow; one that was started is the guest,
        and runs on. Raises Succession when this daemon's part is over since it is to be replaced: see
        `restart`.
        """
        link = self._config.link
        listener = Listener(
            self._options,
            host=link.listen,
            port=link.port,
            heartbeat_port=link.heartbeat_port,
            peer_name=None if link.insecure else self._partner.address.name,
            admit=lambda hello: admit(self._standby, hello),
            on_session=self._standby.on_session,
            on_rejected=self._on_rejected,
            on_lateness=self._report.metrics.loop_lag.set,
        )
        self._listener = listener
        qemu = await (self._start_qemu() if self._handed is None else self._adopt_qemu(self._handed[1]))
        try:
            try:
                await listener.start()
                while True:
                    outcome = await self._with_shadow(qemu)
                    if isinstance(outcome, TakenOver):
                        return outcome
                    if isinstance(outcome, GuestEnded):
                        await qemu.kill()
                        return outcome
                    # The shadow's QEMU has ended: protection needs a new one, the guest needs nothing.
                    _log.error("the shadow's QEMU is lost", reason=outcome.reason)
                    self._standby.description = None
                    await qemu.kill()
                    qemu = await self._start_qemu()
            finally:
                await self._close_listener(listener)
        except BaseException as error:
            handed_on = isinstance(error, Succession) and error.handed is not None
            await (qemu.detach() if handed_on or self._standby.runs_here else qemu.kill())
            raise

    async def _close_listener(self, listener: Listener) -> None:
        try:
            await listener.close()
        finally:
            while not self._standby.arrived.empty():
                self._standby.arrived.get_nowait().abort("this side is no backup any more")

    async def _start_qemu(self) -> QemuProcess:
        # Before as well: once QEMU has opened a tap that is up, the kernel keeps what arrives.
        tap.switch(self._config.machine.nic, up=False, missing_ok=True)
        return await self._adopt_qemu(await QemuProcess.start(self._config, incoming=True))

    async def _adopt_qemu(self, qemu: QemuProcess) -> QemuProcess:
        try:
            tap.switch(self._config.machine.nic, up=False)
            await require_patched(qemu.monitor)
            self._standby.description = await MachineDescription.of(qemu.monitor)
        except BaseException:
            await qemu.kill()
            raise
        self._report.qemu = QemuStatus(
            pid=qemu.pid,
            version=self._standby.description.qemu_version,
            accelerator=self._standby.description.accelerator,
        )
        return qemu

    def _on_rejected(self, reason: Rejection) -> None:
        self._report.metrics.link_rejected.labels(reason=reason).inc()

    # ---- sessions -----------------------------------------------------------------------------------------

    async def _with_shadow(self, qemu: QemuProcess) -> TakenOver | GuestEnded | ShadowGone:
        """Guard with this QEMU until an end, or until QEMU is lost."""
        standby = self._standby
        info = await qemu.monitor.execute("query-x-ft")
        files = {block["name"]: block["path"] for block in info["blocks"] if block["shared-file"]}
        disks = await guest_disks(qemu.monitor)
        standby.markers = [Marker(disk.path, self._config.node.state_folder) for disk in disks]
        copies = Copies([(disk.name, disk.path) for disk in disks])
        try:
            shadow = await asyncio.to_thread(Shadow, files)
        except BaseException:
            copies.close()
            raise
        vm = ShadowVm(
            qemu,
            shadow,
            Disks(copies, standby.markers, self._config.node.name),
            memory_limit=sum(block["max-length"] for block in info["blocks"]),
            gone=asyncio.ensure_future(qemu.wait()),
        )
        try:
            if self._handed is not None:
                handed, self._handed = self._handed[0], None
                await take_up(standby, handed, shadow)
            while True:
                outcome = await self._with_session(vm)
                if isinstance(outcome, Away):
                    standby.wait_for_next_daemon(outcome)
                elif outcome is not None:
                    return outcome
        finally:
            vm.gone.cancel()
            shadow.close()
            copies.close()
            if not standby.runs_here:
                await vm.disks.markers.settle()  # whatever this node is next writes to them, too

    async def _with_session(self, vm: ShadowVm) -> TakenOver | GuestEnded | ShadowGone | Away | None:
        """Wait for the next session, and guard over it; or give up waiting for one that was agreed on."""
        standby = self._standby
        session = await next_session(standby, vm.gone, lambda: self._listener.forming)
        away, standby.away = standby.away, None
        if session is None or session.hello.resume is None:
            self._report.away = ""
        standby.busy = True
        try:
            if vm.gone.done():
                standby.spoiled()
                if away is not None:
                    self._report.machine.move(PairState.WAITING, "the shadow's QEMU has ended")
                return ShadowGone(f"it ended with status {vm.qemu.exit_status} while it waited")
            if session is not None:
                return await Guard(standby, vm, session, away).run()
            assert away is not None
            return await give_up_waiting(standby, vm, away)
        finally:
            standby.busy = False
            if standby.leaving.done():
                # It came too late, or nothing came of it; with it, no primary is admitted.
                standby.leaving = asyncio.get_running_loop().create_future()
