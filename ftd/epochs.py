"""Protection over one session: the first copy, and then epoch after epoch until something ends it.

    begin ── live rounds ── checkpoint ── ack ──> protected ── run an epoch ── checkpoint ─┐
             (guest runs)                                          ^                       │
                                                                   └── room in flight? <───┘

Three things go on at once: this loop has QEMU gather, the sender's thread puts slots on the wire, and
acknowledgements come in. So several frames are under way, each later one as soon as the epoch after it is
over, and are committed in order. What is under way is bounded by the slots and by `in_flight_mib`; when the
link is slower than the guest dirties memory, the next checkpoint waits, so that the epoch becomes longer and
nothing grows.

How long an epoch is and whether pages are sent early are decided elsewhere (`pacing`, `speculation`): here is
done what they say.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ftd import log
from ftd.carried import Carried
from ftd.config import Config
from ftd.disk import Image
from ftd.disksync import CLOSE_SECONDS, DiskCopy, Questions
from ftd.diskverify import DiskChecks
from ftd.errors import FtdError, HostError, LinkError, QemuDied, QemuError
from ftd.frame import U64Array, listed_pages
from ftd.link import Session
from ftd.machine import guest_disks
from ftd.messages import (
    Ack,
    DiskDigests,
    DiskLost,
    DiskVerifyResult,
    GuestStopped,
    QemuLost,
    RestartAgreed,
    Restarting,
    Resync,
    SyncProgress,
    TookOver,
    VerifyResult,
    Yield,
)
from ftd.metrics import PAUSE_PARTS
from ftd.monitor import Event, Monitor
from ftd.pacing import AutoPace, FixedPace, Limits
from ftd.report import Report, with_disks
from ftd.sender import Sender
from ftd.speculation import MOMENT, Round, Speculation, count_again
from ftd.staging import Slot, Staging, slot_size
from ftd.state import PairState
from ftd.status import Difference, VerifyReport
from ftd.wire import LinkLost

_log = log.get(__name__)

# Live rounds end when the last one left so little that a pause copies it, or when they no longer get smaller.
MOST_LIVE_ROUNDS = 30
SMALL_ENOUGH = 0.25  # of a slot

# QEMU resumes a guest whose next part is not asked for within this time; only a daemon that died or a link
# that stands still lets it pass.
PAUSE_LIMIT_MS = 2000

# A backup that was asked to take over has its arbiter's time limit for it, and a moment to start the guest.
YIELD_SECONDS = 10.0

# For the backup to say that it waits for this side's next daemon, or to leave when it was told so.
SUSPEND_SECONDS = 5.0

# What was dirtied while there was no session is sent in live rounds before the first checkpoint, up to so
# many bytes: they all belong to one frame, which the backup has to hold.
BACKLOG_BYTES = 256 << 20

# Timers of asyncio are up to a millisecond late, since epoll counts in milliseconds: with this, an epoch is
# as long as configured on average.
TIMER_LATENESS = 0.0005

# A checkpoint's account is kept this much later: first the sender's thread needs the interpreter, and clients
# wait for what it sends.
ACCOUNT_AFTER = 0.002

# Dirty pages that make an epoch end early, as a share of what a slot holds: a frame of one part is the
# shortest pause.
PRESSURE = 0.75


class Fence(Protocol):
    """What the primary says about authority; the rules are in ftd/authority.py."""

    async def before_first_commit(self) -> None:
        """The backup may take over once a frame is on its way: return when that is noted for the disks.

        Raises HostError if it cannot be noted.
        """

    def on_first_commit(self) -> None:
        """The backup holds the guest: from now on this side may be deposed."""

    async def pair(self) -> None:
        """Return when the backup may be relied on. Raises FtdError when this side has lost the guest."""

    def release_at_the_end(self, committed: bool) -> bool:
        """Protection over this session has ended: say whether all that is held may go at once."""
        ...


class ProtectionLost(FtdError):  # noqa: N818 - names what happened
    """Protection over this session has ended; the guest runs on. The text says why.

    resync: whether to begin anew at once with the same backup. aborted: one of metrics.ABORT_REASONS.
    """

    def __init__(self, reason: str, *, resync: bool, aborted: str) -> None:
        super().__init__(reason)
        self.resync = resync
        self.aborted = aborted


class Yielded(ProtectionLost):
    """The backup has taken over, as it was asked to."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, resync=False, aborted="stopped")


class Suspended(ProtectionLost):
    """A daemon of the pair is being replaced; protection is to go on over another session."""

    def __init__(self, carried: Carried) -> None:
        super().__init__("a daemon of the pair is replaced", resync=True, aborted="stopped")
        self.carried = carried


@dataclass
class _InFlight:
    """A frame that was gathered and is not acknowledged: its bytes, and when the guest ran again."""

    size: int
    resumed: float


@dataclass
class _Early:
    """Pages of the running epoch that are under way already: bytes of the part, and which pages."""

    size: int
    pages: U64Array


def pace_of(config: Config) -> FixedPace:
    """Return what decides the length of the epochs: that of [epoch] mode."""
    epoch = config.epoch
    if epoch.mode == "fixed":
        return FixedPace(epoch.length_ms / 1000)
    limits = Limits(
        shortest=epoch.shortest_ms / 1000,
        longest=epoch.longest_ms / 1000,
        slowdown=epoch.slowdown_percent / 100,
        latency=epoch.latency_ms / 1000,
    )
    return AutoPace(epoch.length_ms / 1000, limits)


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
        self._epoch = first_epoch  # that the guest is in now
        self._staging: Staging | None = None
        self._sender: Sender | None = None
        self._slot_pages = 0
        self._pace = pace_of(config)
        self._speculation = Speculation(config.epoch.speculative)
        self._early: _Early | None = None
        self._stretched = False  # the epoch that was closed last: its checkpoint had to wait
        # What the next frame is taken to need: what the last one did.
        self._last_parts = 1
        self._last_size = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._changed = asyncio.Event()  # an ack came, or a slot was sent, or there is pressure
        self._pressed = -1  # what QEMU called the epoch in which it asked for a checkpoint
        # Requests that cannot wait any more, once the guest is paused, may be too many for one slot.
        self._journal_full = False
        self._abandoned: str | None = None
        self._qemu_died = False
        # Set once the first frame is committed: from then on output is this session's to release.
        self.committed = False
        self._release: int | None = None  # eventfd: QEMU releases as many epochs as are added to it
        self._acknowledged: dict[int, int] = {}  # when epochs were, monotonic ns
        self._over = False
        self._yielding = False
        # Whether the guest stands still since it was to be handed over, and ran before.
        self.stopped_guest = False
        self._images: list[Image] = []
        self._questions = Questions(session.send)
        self._disk_checks: DiskChecks | None = None
        self._group: asyncio.TaskGroup | None = None
        self._resumed = carried
        if carried is not None:
            self._staging, self._release = carried.staging, carried.release
            self._slot_pages, self._images = carried.slot_pages, carried.images
            self.committed = True
        self._backlog = 0  # bytes of the running epoch that were sent before its frame, after a resumption
        self._suspend_wanted = False
        self._peer_restarts: Restarting | None = None
        self._agreed: asyncio.Future[RestartAgreed] = asyncio.get_running_loop().create_future()
        self._suspended: Carried | None = None
        self._goes_on = False  # over another session
        self._verify_next = False
        self._verifying: dict[int, asyncio.Future[VerifyReport]] = {}

    @property
    def epoch(self) -> int:
        """The epoch that the guest is in."""
        return self._epoch

    @property
    def uncommitted(self) -> int:
        """How many epochs were begun and are not committed: those in flight, and the one that runs."""
        return len(self._in_flight) + (not self._goes_on)

    async def run(self) -> None:
        """Copy, then close epochs until protection is lost. Never returns otherwise.

        Raises ProtectionLost; LinkLost when the session has ended; QemuError when QEMU refused or died.
        Checkpointing is off in QEMU afterwards, unless QEMU died.
        """
        subscriptions = [
            self._monitor.on("X_FT_DIRTY_PRESSURE", self._on_pressure),
            self._monitor.on("X_FT_OUTPUT_FULL", self._on_pressure),
            self._monitor.on("X_FT_JOURNAL_FULL", self._on_journal_full),
            self._monitor.on("X_FT_ABANDONED", self._on_abandoned),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._listen())
                group.create_task(self._protect())
        except* (FtdError, OSError) as failures:
            error = _first(failures)
            if self._suspended is not None and isinstance(error, LinkLost):
                error = Suspended(self._suspended)  # the session's end is what was waited for
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
        self._verify_next = True
        result: asyncio.Future[VerifyReport] = asyncio.get_running_loop().create_future()
        self._verifying.setdefault(-1, result)
        report = await asyncio.shield(self._verifying[-1])
        if self._disk_checks is None or not report.ok:
            return report
        return with_disks(report, await self._disk_checks.whole())

    # ---- the copy -----------------------------------------------------------------------------------------

    async def _protect(self) -> None:
        if self._resumed is not None:
            await self._run(await self._go_on(self._resumed))
        await self._begin()
        await self._copy_disks()
        noted = asyncio.ensure_future(self._note_disks())
        noted.add_done_callback(_forget)
        await self._copy()
        await self._wait_noted(noted)
        await self._wait_for(self._has_room)
        first = self._epoch
        began, _ = await self._checkpoint()
        await self._wait_for(lambda: first not in self._in_flight)
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
                if self._yielding:
                    await self._hand_over()
                if self._suspend_wanted or self._peer_restarts is not None:
                    await self._suspend()
            began = await self._run_epoch(began)

    async def _pair(self, first: int) -> None:
        await self._fence.pair()
        self._report.machine.move(
            PairState.PROTECTED, f"epoch {first} is committed on {self._session.peer_node}"
        )

    def yield_guest(self) -> None:
        """Have the backup take over when the running epoch is over, after one more with the guest stopped."""
        self._yielding = True

    async def _hand_over(self) -> None:
        """Stop the guest, have its last epoch committed, and ask the backup to start it.

        Always ends in an exception: Yielded by `_listen`, or one that says why there was no answer.
        """
        await self._wait_for(lambda: not self._in_flight)  # so that the guest stands still for one frame only
        running = bool((await self._monitor.execute("query-status"))["running"])
        await self._monitor.execute("stop")
        self.stopped_guest = running
        last = self._epoch
        await self._checkpoint()
        await self._wait_for(lambda: last not in self._in_flight)
        await self._session.send(Yield(epoch=last, running=running))
        await asyncio.sleep(YIELD_SECONDS)
        raise ProtectionLost(
            f"{self._session.peer_node} did not take the guest within {YIELD_SECONDS:g} s",
            resync=False,
            aborted="stopped",
        )

    # ---- a daemon is replaced -----------------------------------------------------------------------------

    def suspend(self) -> None:
        """Have this session end with the running epoch, since this side's daemon is to be replaced.

        `run` then raises Suspended, or ProtectionLost if the backup does not wait.
        """
        self._suspend_wanted = True

    async def _suspend(self) -> None:
        """Agree with the backup to go on over another session. Nothing of the running epoch was sent yet."""
        last = self._epoch - 1
        mine = self._config.node.restart_grace_ms
        peer = self._peer_restarts
        if peer is not None and not mine:
            self._peer_restarts = None
            await self._session.send(RestartAgreed(epoch=last, grace_ms=0))
            return
        await self._wait_for(lambda: not self._in_flight)
        began = time.monotonic()
        if peer is not None:
            grace = min(peer.grace_ms, mine)
            self._suspended = self._carry(began, grace, own=False)
            await self._session.send(RestartAgreed(epoch=last, grace_ms=grace))
            await asyncio.sleep(SUSPEND_SECONDS)  # the session's end comes first
            self._suspended = None
            why = "said that it restarts, and stayed"
        else:
            await self._session.send(Restarting(epoch=last, grace_ms=mine))
            why = f"did not say within {SUSPEND_SECONDS:g} s whether it waits for the next daemon"
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(self._agreed, SUSPEND_SECONDS)
                if answer.grace_ms and answer.epoch == last:
                    self._suspended = self._carry(began, answer.grace_ms, own=True)
                    raise Suspended(self._suspended)
                why = "does not wait for the next daemon"
        raise ProtectionLost(f"{self._session.peer_node} {why}", resync=True, aborted="stopped")

    def _carry(self, began: float, grace_ms: int, *, own: bool) -> Carried:
        assert self._staging is not None
        assert self._release is not None
        return Carried(
            generation=self._generation,
            epoch=self._epoch,
            peer_node=self._session.peer_node,
            own=own,
            began=began,
            deadline=began + grace_ms / 1000,
            staging=self._staging,
            release=self._release,
            slot_pages=self._slot_pages,
            images=self._images,
        )

    async def _go_on(self, carried: Carried) -> float:
        """Have the backup commit all that happened since an earlier session, as one frame.

        Returns when the next epoch began.
        """
        self._prepare_to_send(begins=carried.own)
        epoch = self._epoch
        await self._send_backlog()
        began, _ = await self._checkpoint()
        await self._wait_for(lambda: epoch not in self._in_flight)
        held = time.monotonic() - carried.began
        who = "this daemon" if carried.own else f"the daemon of {self._session.peer_node}"
        self._report.resumed(epoch, held)
        _log.info("protection goes on without a copy", epoch=epoch, restarted=who, held_s=round(held, 3))
        self._report.machine.move(
            PairState.PROTECTED,
            f"epoch {epoch} is committed on {self._session.peer_node}: no copy was needed after {who} was "
            "restarted",
        )
        return began

    async def _send_backlog(self) -> None:
        """Send most of what became dirty without a session while the guest runs, to keep the pause short."""
        last = 0
        while self._backlog < BACKLOG_BYTES:
            slot = await self._free_slot()
            part = await self._gather("x-ft-collect", slot)
            pages = part["pages"] + part["zero-pages"]
            self._backlog += part["slot-bytes"]
            self._send(slot)
            if not part["complete"]:
                continue
            if pages <= self._slot_pages * SMALL_ENOUGH or (last and pages > 0.9 * last):
                return
            last = pages

    # ---- the beginning ------------------------------------------------------------------------------------

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
            raise _no_disks(error) from None
        journal = config.disks.journal_mib << 20
        size = slot_size(config.staging.slot_mib << 20, memory, journal if disks else 0)
        self._staging = await asyncio.to_thread(Staging, config.staging.slots, size)
        for slot in self._staging.slots:
            await self._monitor.send_descriptor(slot.name, slot.fd)
        self._release = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        await self._monitor.send_descriptor("ftd-release", self._release)
        pages = (config.staging.slot_mib << 20) // 4096
        status = await self._monitor.execute(
            "x-ft-begin",
            generation=self._generation,
            slots=[slot.name for slot in self._staging.slots],
            copy_threads=config.staging.copy_threads,
            pause_limit_ms=PAUSE_LIMIT_MS,
            pressure_pages=int(pages * PRESSURE),
            output_limit=config.output.limit_mib << 20 if config.output.hold else 0,
            release_fd="ftd-release",
            **({"disks": [disk.node_name for disk in disks]} if config.disks.replicate else {}),
            journal_limit=journal,
            **({} if config.epoch.tracker == "auto" else {"tracker": config.epoch.tracker}),
        )
        self._slot_pages = status["pages-per-slot"]
        self._report.qemu = self._report.qemu.model_copy(update={"tracker": status["tracker"]})
        self._prepare_to_send(begins=True)

    def _prepare_to_send(self, *, begins: bool) -> None:
        """Make ready for the first slot. begins: the running epoch was not counted yet."""
        assert self._staging is not None
        self._sender = Sender(self._session, self._staging, self._on_sent)
        if begins:
            self._report.begin_epoch(self._epoch)
        self._report.pace(self._pace)
        self._report.speculation(self._speculation)

    def _watch_disks(self) -> None:
        """From now on, compare the disks whenever that is wanted."""
        assert self._group is not None
        self._disk_checks = DiskChecks(
            self._images,
            self._questions,
            epoch=lambda: self._epoch,
            wait_committed=self._wait_committed,
            remember=self._config.epoch.verify_every > 0,
            on_result=self._on_disks_compared,
        )
        self._group.create_task(self._check_disks(self._disk_checks))

    async def _check_disks(self, checks: DiskChecks) -> None:
        try:
            await checks.run()
        except LinkLost:
            raise
        except LinkError as error:
            raise _no_disks(error) from None

    async def _wait_committed(self, epoch: int) -> None:
        await self._wait_for(lambda: self._epoch > epoch and min(self._in_flight, default=epoch + 1) > epoch)

    async def _on_disks_compared(self, found: DiskVerifyResult) -> None:
        """Tell everybody. Raises ProtectionLost when the disks differ: a new copy mends them."""
        self._report.verified_disks(found)
        await self._session.send(found)
        if found.differing:
            first = found.differences[0]
            raise ProtectionLost(
                f"the backup's disks differ from the guest's in {found.differing} blocks after epoch "
                f"{found.epoch}, first block {first.block} of disk {first.disk}",
                resync=True,
                aborted="invalid",
            )

    async def _copy_disks(self) -> None:
        """Have the backup's disks made equal; what the guest writes from now on comes in journals."""
        if not self._images:
            return
        assert self._sender is not None
        copy = DiskCopy(
            self._images,
            self._generation,
            bytes_per_second=self._config.disks.sync_mib_per_s << 20,
            questions=self._questions,
            send=self._sender.send_message,
            close_journal=self._close_journal,
            wait_for_pressure=self._wait_for_pressure,
            on_progress=self._report.disk_sync,
        )
        try:
            await copy.run()
        except LinkLost:
            raise
        except (HostError, LinkError) as error:
            raise _no_disks(error) from None

    async def _note_disks(self) -> None:
        """Have it noted that the backup may take over with the disks that it has. Raises ProtectionLost."""
        if self._images:
            try:
                await self._fence.before_first_commit()
            except HostError as error:
                raise _no_disks(error) from None

    async def _wait_noted(self, noted: asyncio.Future[None]) -> None:
        """Return when it is noted.

        The host's disk may take its time, and the guest's journal would be full meanwhile. Then the guest has
        to wait, and the first frame is one of two parts, with the guest paused in between.
        """
        while not noted.done():
            await asyncio.wait({noted}, timeout=CLOSE_SECONDS)
            if not noted.done():
                await self._close_journal()
        noted.result()

    async def _close_journal(self) -> None:
        """Send what the guest has written to its disks, and nothing of its memory."""
        self._pressed = -1
        slot = await self._free_slot()
        await self._gather("x-ft-collect", slot, memory=False)
        self._send(slot)

    async def _wait_for_pressure(self, seconds: float) -> bool:
        """Wait so long, or until QEMU wants to get rid of something; return whether it does."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not self._pressure:
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                break
        return self._pressure

    async def _copy(self) -> None:
        """Live rounds: first over all memory, then over what became dirty meanwhile, until that is little."""
        sent = total = 0
        last = 0
        for _ in range(1 << 30):
            slot = await self._free_slot()
            part = await self._gather("x-ft-collect", slot)
            pages = part["pages"] + part["zero-pages"]
            sent += pages
            total = max(total, sent + part["remaining"])
            self._report.sync_round(sent / total if total else 1.0, part["slot-bytes"])
            self._send(slot)
            if not part["complete"]:
                continue
            if pages <= self._slot_pages * SMALL_ENOUGH:
                return
            # Another pass pays only while passes shrink.
            last, shrunk = pages, not last or pages < 0.9 * last
            if not shrunk or self._report.status().sync.rounds > MOST_LIVE_ROUNDS:
                return

    # ---- epochs -------------------------------------------------------------------------------------------

    async def _run_epoch(self, began: float) -> float:
        """Let the guest run until the epoch is over and there is room for its frame; close it.

        Returns when the next epoch began.
        """
        length = self._pace.length
        if self._speculation.mode != "off":
            await self._run_until(began + length * MOMENT)
            if not self._pressure and self._speculation.wanted():
                await self._send_early()
        await self._run_until(began + length - TIMER_LATENESS)
        early = self._pressure
        self._stretched = not self._has_room()
        if self._stretched:
            self._report.metrics.epochs_stretched.inc()
            await self._wait_for(self._has_room)
        self._report.epoch_length(time.monotonic() - began)
        epoch = self._epoch
        resumed, pause = await self._checkpoint()
        self._pace.closed(
            epoch,
            run=max(0.0, resumed - began - pause),
            pause=pause,
            early=early,
            stretched=self._stretched,
            size=self._last_size,
            now=resumed,
        )
        return resumed

    async def _run_until(self, deadline: float) -> None:
        """Return at the deadline, of the loop's clock, or as soon as QEMU wants a checkpoint."""
        loop = asyncio.get_running_loop()
        timer = loop.call_at(deadline, self._changed.set)
        try:
            # asyncio may call a moment early, by what it takes for the clock's resolution.
            while not self._pressure and deadline - loop.time() > 1e-6:
                self._changed.clear()
                await self._changed.wait()
        finally:
            timer.cancel()

    def _has_room(self) -> bool:
        """Whether the next frame can be gathered and be under way, if it is as large as the last one.

        A frame that needs several slots needs all of them at once: the guest stands still until it has them.
        """
        assert self._staging is not None
        parts = max(self._last_parts, 2 if self._journal_full else 1)
        if self._staging.free < min(parts, len(self._staging.slots)):
            return False
        # What was sent early is a part of that frame, and nothing that it could wait for.
        if not self._in_flight:
            return True
        size = max(self._last_size, self._early.size if self._early else 0)
        return self._frames_in_flight() + size <= self._config.epoch.in_flight_mib << 20

    def _frames_in_flight(self) -> int:
        return sum(frame.size for frame in self._in_flight.values())

    def _account_in_flight(self) -> None:
        early = self._early.size if self._early else 0
        self._report.set_in_flight(self._frames_in_flight() + early, len(self._in_flight))

    async def _send_early(self) -> None:
        """Send the pages that the running epoch has dirtied so far, if nothing has to wait for that."""
        assert self._staging is not None
        # One slot remains for the checkpoint, whatever the link does.
        if self._staging.free <= self._last_parts or not self._has_room():
            return
        slot = await self._free_slot()
        part = await self._gather("x-ft-collect", slot)
        self._early = _Early(part["slot-bytes"], listed_pages(slot.view))
        self._account_in_flight()
        self._send(slot)

    def _learn_from_round(self, early: _Early, checkpoint: list[U64Array]) -> None:
        again = count_again(early.pages, checkpoint)
        one = Round(early=len(early.pages), again=again, link_was_full=self._stretched)
        self._speculation.observe(one)
        self._report.speculation(self._speculation, one)

    async def _checkpoint(self) -> tuple[float, float]:
        """Close the epoch, and hand its frame to the sender.

        Returns when the guest ran again, and for how long it was paused, in seconds.
        """
        epoch = self._epoch
        if self._images and self.committed and self._disk_checks is None:
            self._watch_disks()
        every = self._config.epoch.verify_every
        digest = self._verify_next or bool(every and epoch % every == 0)
        size = pages = parts = requests = journal = before_pause = 0
        early = self._early
        listed: list[U64Array] = []
        pause = dict.fromkeys([f"{part}-ns" for part in PAUSE_PARTS], 0)
        self._pressed = -1
        self._journal_full = False
        asked = None
        while True:
            slot = await self._free_slot()
            asked = asked or time.monotonic()
            part = await self._gather("x-ft-checkpoint", slot, digest=digest)
            # Not when the answer is seen: it waits for the checksums, and for its turn here, which would make
            # each epoch longer than it should be.
            # A QEMU that was started before an upgrade of ftd may not tell what it did before the pause.
            before_pause += part["pause"].get("early-ns", 0)
            resumed = asked + float(before_pause + part["pause"]["total-ns"]) / 1e9
            size += part["slot-bytes"]
            pages += part["pages"] + part["zero-pages"]
            parts += 1
            if early is not None:
                listed.append(listed_pages(slot.view))
            if part["journal-requests"] and self._disk_checks is not None:
                self._disk_checks.on_slot(epoch, slot.view)
            requests += part["journal-requests"]
            journal += part["journal-bytes"]
            for name in pause:
                pause[name] += part["pause"][name]
            if part["complete"]:
                # Known before the ack can come: the sender has not seen the last part.
                self._early = None
                self._last_parts = parts
                self._last_size = size + (early.size if early else 0) + self._backlog
                self._backlog = 0
                self._in_flight[epoch] = _InFlight(self._last_size, resumed)
                self._account_in_flight()
            self._send(slot)
            if part["complete"]:
                break
        pause["total-ns"] = part["pause"]["total-ns"]
        pages += len(early.pages) if early else 0
        loop = asyncio.get_running_loop()
        loop.call_later(ACCOUNT_AFTER, self._keep_account, pause, part["output"], pages, self._last_size)
        if early is not None:
            loop.call_later(ACCOUNT_AFTER, self._learn_from_round, early, listed)
        if self._images:
            loop.call_later(ACCOUNT_AFTER, self._report.journal, requests, journal)
        if digest and self._verify_next:
            self._verify_next = False
            self._verifying[epoch] = self._verifying.pop(-1)
        elif digest and self._disk_checks is not None:
            self._disk_checks.changed()
        self._epoch = epoch + 1
        self._report.begin_epoch(self._epoch)
        self._session.set_beat(self._report.machine.state.value, self._report.committed)
        return resumed, pause["total-ns"] / 1e9

    def _keep_account(
        self, pause: Mapping[str, int], output: Mapping[str, Any], pages: int, size: int
    ) -> None:
        self._report.pause(pause)
        self._report.pace(self._pace)
        self._report.metrics.observe_frame(pages, size)
        if not self._over:
            self._on_output(output)

    async def _gather(self, command: str, slot: Slot, **arguments: Any) -> Mapping[str, Any]:
        """Have QEMU fill a slot. If it fails, the slot is given back."""
        try:
            part: Mapping[str, Any] = await self._monitor.execute(
                command, slot=slot.index, epoch=self._epoch, **arguments
            )
        except QemuError as error:
            assert self._staging is not None
            self._staging.release(slot)
            if error.qmp_class:
                reason = self._abandoned or f"{command}: {error.description}"
                raise ProtectionLost(
                    f"a frame was lost: {reason}", resync=True, aborted="abandoned"
                ) from None
            raise
        return part

    async def _free_slot(self) -> Slot:
        assert self._staging is not None
        return await self._staging.acquire_free()

    def _send(self, slot: Slot) -> None:
        assert self._sender is not None
        self._sender.send(slot)

    async def _wait_for(self, condition: Any) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    # ---- what comes in ------------------------------------------------------------------------------------

    def _on_sent(self, size: int) -> None:
        self._report.metrics.add_link_bytes("frames", sent=size)
        self._changed.set()

    def _on_pressure(self, event: Event) -> None:
        self._pressed = int(event.get("data", {}).get("epoch", self._epoch))
        self._changed.set()

    def _on_journal_full(self, event: Event) -> None:
        self._journal_full = True
        self._on_pressure(event)

    @property
    def _pressure(self) -> bool:
        """Whether QEMU wants the running epoch closed, and not the one before, whose event came late.

        QEMU names the epoch that it was asked to gather last, which is the one before the running one.
        """
        return self._pressed >= self._epoch - 1

    def _on_abandoned(self, event: Event) -> None:
        self._abandoned = str(event.get("data", {}).get("reason", "given up by QEMU"))

    async def _listen(self) -> None:
        while True:
            message = await self._session.receive()
            match message:
                case Ack():
                    self._on_ack(message)
                case VerifyResult():
                    self._on_verified(message)
                case SyncProgress():
                    pass
                case DiskDigests():
                    try:
                        self._questions.on_digests(message)
                    except LinkError as error:
                        raise _no_disks(error) from None
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
                    self._peer_restarts = message
                case RestartAgreed():
                    if not self._agreed.done():
                        self._agreed.set_result(message)
                case TookOver(generation=generation):
                    raise Yielded(f"{self._session.peer_node} has the guest, generation {generation}")
                case GuestStopped(reason=reason):
                    _log.warning("a backup said that the guest has stopped; ignored", reason=reason)
                case _:
                    _log.debug("message of the backup ignored", kind=message.kind)

    def _on_ack(self, ack: Ack) -> None:
        arrived = time.monotonic_ns()
        frame = self._in_flight.get(ack.epoch)
        # In order, once, of this generation: anything else is not the daemon that we know.
        if frame is None or ack.generation != self._generation or ack.epoch != min(self._in_flight):
            raise ProtectionLost(
                f"{self._session.peer_node} acknowledged epoch {ack.epoch} of generation {ack.generation}, "
                f"expected {min(self._in_flight, default='none')} of {self._generation}",
                resync=True,
                aborted="invalid",
            )
        # A side that stood still may have been deposed meanwhile, and asks before it says another word.
        still = self._session.stood_still
        if still * 1000 > self._session.heartbeat.limit_ms:
            raise ProtectionLost(
                f"this side itself stood still for {still:.2f} s: the backup may have taken over",
                resync=False,
                aborted="link",
            )
        # Before anything else: clients wait for this.
        assert self._release is not None
        os.eventfd_write(self._release, 1)
        if not self.committed:
            self._fence.on_first_commit()
        self._acknowledged[ack.epoch] = arrived
        self.committed = True
        del self._in_flight[ack.epoch]
        self._account_in_flight()
        latency = arrived / 1e9 - frame.resumed
        self._pace.committed(ack.epoch, latency)
        self._report.committed_epoch(ack.epoch, latency)
        self._changed.set()

    def _on_output(self, output: Mapping[str, Any]) -> None:
        """Note what QEMU says of the guest's output."""
        released_at = self._acknowledged.get(output["released-epoch"])
        latency = None if released_at is None else (output["released-at-ns"] - released_at) / 1e9
        for epoch in [epoch for epoch in self._acknowledged if epoch <= output["released-epoch"]]:
            del self._acknowledged[epoch]
        self._report.output(output, latency)

    def _on_verified(self, result: VerifyResult) -> None:
        report = VerifyReport(
            epoch=result.epoch,
            ok=result.ok,
            pages=result.pages,
            differing=result.differing,
            differences=[Difference(block=d.block, page=d.page) for d in result.differences],
        )
        self._report.verified(report)
        waiting = self._verifying.pop(result.epoch, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(report)
        if not result.ok:
            first = result.differences[0] if result.differences else None
            where = f", first page {first.page} of block {first.block}" if first else ""
            _log.error(
                "THE SHADOW DIFFERS FROM THE GUEST",
                epoch=result.epoch,
                differing=result.differing,
                pages=" ".join(f"{d.block}:{d.page}" for d in result.differences[:16]),
            )
            raise ProtectionLost(
                f"the shadow differs from the guest in {result.differing} pages "
                f"after epoch {result.epoch}{where}",
                resync=True,
                aborted="invalid",
            )

    # ---- the end ------------------------------------------------------------------------------------------

    async def _clean_up(self) -> None:
        ended = ProtectionLost("protection ended first", resync=False, aborted="link")
        for result in self._verifying.values():
            if not result.done():
                result.set_exception(ended)
                result.exception()  # somebody may have stopped waiting
        if self._disk_checks is not None:
            self._disk_checks.close(ended)
        self._over = True
        self._report.set_in_flight(0)
        if self._qemu_died:
            # Whether that is a loss or a shutdown is for the primary to tell the backup, over this session.
            await self._session.wait_lost()
        elif self._session.lost is None:
            # The sender would otherwise wait for a network that nobody needs any more.
            await self._session.close("protection over this session has ended")
        if self._sender is not None:
            await self._sender.close()
        if self._goes_on:
            return  # with everything as it is
        with contextlib.suppress(QemuError):
            release = self._fence.release_at_the_end(self.committed)
            await self._monitor.execute("x-ft-end", output="release" if release else "hold")
        self._report.no_output()
        if self._release is not None:
            os.close(self._release)
        if self._staging is not None:
            self._staging.close()
        for image in self._images:
            image.close()


def _no_disks(error: FtdError) -> ProtectionLost:
    """Return that a disk cannot be replicated: to begin anew at once would not help."""
    return ProtectionLost(f"a disk cannot be replicated: {error}", resync=False, aborted="invalid")


def _forget(task: asyncio.Future[None]) -> None:
    """Take note of a task's failure, which may not be what ended protection."""
    if not task.cancelled():
        task.exception()


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the most telling error of a group: a reason of ours before the link's end that it caused."""
    errors: list[BaseException] = []

    def collect(one: BaseException) -> None:
        if isinstance(one, BaseExceptionGroup):
            for inner in one.exceptions:
                collect(inner)
        else:
            errors.append(one)

    collect(group)
    return min(errors, key=lambda error: (isinstance(error, LinkLost), isinstance(error, OSError)))
