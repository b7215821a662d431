"""Protection over one session: which part comes when, what the backup says to it, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import NoReturn

from ftd import log
from ftd.carried import Carried
from ftd.config import Config
from ftd.disk import Image
from ftd.disksync import Questions
from ftd.errors import FtdError, HostError, LinkError, QemuDied, QemuError
from ftd.link import Session
from ftd.machine import guest_disks
from ftd.messages import (
    Ack,
    DiskDigests,
    DiskLost,
    GuestStopped,
    QemuLost,
    RestartAgreed,
    Restarting,
    Resync,
    SyncProgress,
    TookOver,
    VerifyResult,
)
from ftd.monitor import Monitor
from ftd.protection.comparison import Comparison
from ftd.protection.ends import ProtectionLost, Suspended, Yielded, most_telling, no_disks
from ftd.protection.epochs import Epochs
from ftd.protection.fence import Fence
from ftd.protection.firstcopy import FirstCopy
from ftd.protection.gathering import Gathering
from ftd.protection.suspension import Suspension, resume
from ftd.protection.switchover import Switchover
from ftd.report import Report
from ftd.state import PairState
from ftd.status import VerifyReport
from ftd.wire import LinkLost

_log = log.get(__name__)


class Protection:
    """Protects the guest behind `monitor` with the backup behind `session`. Runs once."""

    def __init__(
        self,
        config: Config,
        report: Report,
        monitor: Monitor,
        session: Session,
        generation: int,
        first_epoch: int,
        *,
        fence: Fence,
        carried: Carried | None = None,
    ) -> None:
        """carried: what an earlier session has left, to go on with instead of a copy."""
        self._config = config
        self._report = report
        self._monitor = monitor
        self._session = session
        self._generation = generation
        self._fence = fence
        self._resumed = carried
        self._images: list[Image] = [] if carried is None else carried.images
        self._questions = Questions(session.send)
        self._gathering = Gathering(monitor, report.metrics, first_epoch, carried)
        self._comparison = Comparison(
            report,
            session,
            self._images,
            self._questions,
            every=config.epoch.verify_every,
            epoch=lambda: self._gathering.epoch,
        )
        self._epochs = Epochs(
            config,
            report,
            session,
            self._gathering,
            self._comparison,
            fence,
            generation,
            images=self._images,
            committed=carried is not None,
        )
        self._switchover = Switchover(monitor, session, self._gathering, self._epochs)
        self._suspension = Suspension(
            session, self._gathering, self._epochs, self._images, generation, config.node.restart_grace_ms
        )
        self._qemu_died = False
        self._goes_on = False  # over another session

    @property
    def epoch(self) -> int:
        """The epoch that the guest is in."""
        return self._gathering.epoch

    @property
    def uncommitted(self) -> int:
        """How many epochs were begun and are not committed: those in flight, and the one that runs."""
        return len(self._epochs.in_flight) + (not self._goes_on)

    @property
    def stopped_guest(self) -> bool:
        """Whether the guest stands still since it was to be handed over, and ran before."""
        return self._switchover.stopped_guest

    async def run(self) -> None:
        """Copy, then close epochs until protection is lost. Never returns otherwise.

        Raises ProtectionLost; LinkLost when the session has ended; QemuError when QEMU refused or died.
        Checkpointing is off in QEMU afterwards, unless QEMU died.
        """
        subscriptions = self._gathering.subscribe()
        try:
            async with asyncio.TaskGroup() as group:
                self._comparison.start(group, self._epochs.wait_committed)
                group.create_task(self._listen())
                group.create_task(self._protect())
        except* (FtdError, OSError) as failures:
            error = most_telling(failures)
            if self._suspension.carried is not None and isinstance(error, LinkLost):
                error = Suspended(self._suspension.carried)  # the session's end is what was waited for
            self._goes_on = isinstance(error, Suspended)
            self._qemu_died = isinstance(error, QemuDied)
            raise error from None
        finally:
            for unsubscribe in subscriptions:
                unsubscribe()
            await self._clean_up()

    async def verify(self) -> VerifyReport:
        """Have the memory on both sides compared at the end of this epoch, and then the disks.

        Raises LinkLost or ProtectionLost if protection ends first, HostError if a disk cannot be read.
        """
        return await self._comparison.verify()

    def yield_guest(self) -> None:
        """Have the backup take over when the running epoch is over, after one more with the guest stopped."""
        self._switchover.wanted = True

    def suspend(self) -> None:
        """Have this session end with the running epoch, since this side's daemon is to be replaced.

        `run` then raises Suspended, or ProtectionLost if the backup does not wait.
        """
        self._suspension.want()

    # ---- which part comes when ----------------------------------------------------------------------------

    async def _protect(self) -> None:
        gathering, epochs = self._gathering, self._epochs
        if self._resumed is not None:
            await self._run(await resume(self._resumed, self._report, self._session, gathering, epochs))
        await self._begin()
        copy = FirstCopy(
            self._config,
            self._report,
            gathering,
            self._generation,
            self._images,
            self._questions,
            self._fence,
        )
        await copy.run()
        await gathering.wait_for(epochs.has_room)
        first = gathering.epoch
        began, _ = await epochs.checkpoint()
        await gathering.wait_for(lambda: first not in epochs.in_flight)
        self._report.end_sync()
        # The arbiter may be slow, and the guest's epochs go on.
        pairing = asyncio.ensure_future(self._pair(first))
        try:
            await self._run(began, pairing)
        finally:
            pairing.cancel()

    async def _run(self, began: float, pairing: asyncio.Future[None] | None = None) -> NoReturn:
        """Close epoch after epoch. pairing: until it is done, the backup is not relied on."""
        while True:
            if pairing is None or pairing.done():
                if pairing is not None:
                    pairing.result()
                if self._switchover.wanted:
                    await self._switchover.run()
                if self._suspension.wanted:
                    await self._suspension.run()
            began = await self._epochs.run_epoch(began)

    async def _pair(self, first: int) -> None:
        await self._fence.pair()
        self._report.machine.move(
            PairState.PROTECTED, f"epoch {first} is committed on {self._session.peer_node}"
        )

    async def _begin(self) -> None:
        config = self._config
        self._report.begin_sync()
        info = await self._monitor.execute("query-x-ft")
        memory = sum(block["max-length"] for block in info["blocks"])
        disks = await guest_disks(self._monitor) if config.disks.replicate else []
        try:
            for disk in disks:
                self._images.append(Image(disk.name, disk.path))
        except HostError as error:
            raise no_disks(error) from None
        tracker = await self._gathering.begin(
            config, self._generation, [disk.node_name for disk in disks], memory, info["tracker"]
        )
        self._report.qemu = self._report.qemu.model_copy(update={"tracker": tracker})
        self._epochs.begin()

    # ---- what the backup says -----------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            message = await self._session.receive()
            match message:
                case Ack():
                    await self._epochs.on_ack(message)
                case VerifyResult():
                    self._comparison.on_verified(message)
                case SyncProgress():
                    pass
                case DiskDigests():
                    try:
                        self._questions.on_digests(message)
                    except LinkError as error:
                        raise no_disks(error) from None
                case DiskLost(reason=reason):
                    raise ProtectionLost(
                        f"{self._session.peer_node} has lost its copy of a disk: {reason}",
                        resync=False,
                        aborted="invalid",
                    )
                case Resync(reason=reason):
                    raise ProtectionLost(
                        f"{self._session.peer_node} needs a new copy: {reason}",
                        resync=True,
                        aborted="invalid",
                    )
                case QemuLost(detail=detail):
                    raise ProtectionLost(
                        f"{self._session.peer_node} has lost its shadow: {detail}",
                        resync=False,
                        aborted="link",
                    )
                case Restarting():
                    self._suspension.on_restarting(message)
                case RestartAgreed():
                    self._suspension.on_agreed(message)
                case TookOver(generation=generation):
                    raise Yielded(f"{self._session.peer_node} has the guest, generation {generation}")
                case GuestStopped(reason=reason):
                    _log.warning("a backup said that the guest has stopped; ignored", reason=reason)
                case _:
                    _log.debug("message of the backup ignored", kind=message.kind)

    # ---- the end ------------------------------------------------------------------------------------------

    async def _clean_up(self) -> None:
        self._comparison.close()
        self._epochs.end()
        if self._qemu_died:
            # Whether that is a loss or a shutdown is for the primary to tell the backup, over this session.
            await self._session.wait_lost()
        elif self._session.lost is None:
            # The sender would otherwise wait for a network that nobody needs any more.
            await self._session.close("protection over this session has ended")
        await self._gathering.disconnect()
        if self._goes_on:
            return  # with everything as it is
        release = self._fence.release_at_the_end(self._epochs.committed)
        with contextlib.suppress(QemuError):
            await self._gathering.end(release=release)
        if release:
            self._report.no_output()
        self._gathering.close()
        for image in self._images:
            image.close()
