"""Epoch after epoch: its end, the checkpoint, and what becomes of its frame."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftd.config import Config
from ftd.disk import Image
from ftd.frame import U64Array, listed_pages
from ftd.link import Session
from ftd.messages import Ack
from ftd.metrics import PAUSE_PARTS
from ftd.pacing import AutoPace, FixedPace, Limits
from ftd.protection.comparison import Comparison
from ftd.protection.ends import ProtectionLost
from ftd.protection.fence import Fence
from ftd.protection.gathering import Gathering
from ftd.report import Report
from ftd.speculation import MOMENT, Round, Speculation, count_again

# Timers of asyncio are up to a millisecond late, since epoll counts in milliseconds: with this, an epoch is
# as long as configured on average.
TIMER_LATENESS = 0.0005

# A checkpoint's account is kept this much later: first the sender's thread needs the interpreter, and clients
# wait for what it sends.
ACCOUNT_AFTER = 0.002


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


class Epochs:
    """The epochs of one session."""

    def __init__(
        self,
        config: Config,
        report: Report,
        session: Session,
        gathering: Gathering,
        comparison: Comparison,
        fence: Fence,
        generation: int,
        *,
        images: Sequence[Image],
        committed: bool,
    ) -> None:
        """images: the guest's disks, known by the first checkpoint. committed: whether this goes on from what
        an earlier session has committed.
        """
        self._config = config
        self._report = report
        self._session = session
        self._gathering = gathering
        self._comparison = comparison
        self._fence = fence
        self._generation = generation
        self._images = images
        # Set once the first frame is committed: from then on output is this session's to release.
        self.committed = committed
        self._pace = pace_of(config)
        self._speculation = Speculation(config.epoch.speculative)
        self._early: _Early | None = None
        self._stretched = False  # the epoch that was closed last: its checkpoint had to wait
        # What the next frame is taken to need: what the last one did.
        self._last_parts = 1
        self._last_size = 0
        self.backlog = 0  # bytes of the running epoch that were sent before its frame, after a resumption
        self.in_flight: dict[int, _InFlight] = {}
        self._acknowledged: dict[int, int] = {}  # when epochs were, monotonic ns
        self._over = False

    def begin(self, *, counted: bool = False) -> None:
        """The slots are ready. counted: the running epoch was counted already."""
        self._gathering.connect(self._session)
        if not counted:
            self._report.begin_epoch(self._gathering.epoch)
        self._report.pace(self._pace)
        self._report.speculation(self._speculation)

    def end(self) -> None:
        """Nothing is under way any more."""
        self._over = True
        self._report.set_in_flight(0)
        self._report.no_epochs()

    async def wait_committed(self, epoch: int) -> None:
        """Return when an epoch is closed and committed."""
        await self._gathering.wait_for(
            lambda: self._gathering.epoch > epoch and min(self.in_flight, default=epoch + 1) > epoch
        )

    async def run_epoch(self, began: float) -> float:
        """Let the guest run until the epoch is over and there is room for its frame; close it.

        Returns when the next epoch began.
        """
        length = self._pace.length
        if self._speculation.mode != "off":
            await self._run_until(began + length * MOMENT)
            if not self._gathering.pressure and self._speculation.wanted():
                await self._send_early()
        await self._run_until(began + length - TIMER_LATENESS)
        early = self._gathering.pressure
        self._stretched = not self.has_room()
        if self._stretched:
            self._report.metrics.epochs_stretched.inc()
            await self._gathering.wait_for(self.has_room)
        self._report.epoch_length(time.monotonic() - began)
        epoch = self._gathering.epoch
        resumed, pause = await self.checkpoint()
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
        timer = loop.call_at(deadline, self._gathering.changed.set)
        try:
            # asyncio may call a moment early, by what it takes for the clock's resolution.
            while not self._gathering.pressure and deadline - loop.time() > 1e-6:
                self._gathering.changed.clear()
                await self._gathering.changed.wait()
        finally:
            timer.cancel()

    def has_room(self) -> bool:
        """Whether the next frame can be gathered and be under way, if it is as large as the last one.

        A frame that needs several slots needs all of them at once: the guest stands still until it has them.
        """
        parts = max(self._last_parts, 2 if self._gathering.journal_full else 1)
        if self._gathering.staging.free < min(parts, len(self._gathering.staging.slots)):
            return False
        # What was sent early is a part of that frame, and nothing that it could wait for.
        if not self.in_flight:
            return True
        size = max(self._last_size, self._early.size if self._early else 0)
        return self._frames_in_flight() + size <= self._config.epoch.in_flight_mib << 20

    def _frames_in_flight(self) -> int:
        return sum(frame.size for frame in self.in_flight.values())

    def _account_in_flight(self) -> None:
        early = self._early.size if self._early else 0
        self._report.set_in_flight(self._frames_in_flight() + early, len(self.in_flight))

    async def _send_early(self) -> None:
        """Send the pages that the running epoch has dirtied so far, if nothing has to wait for that."""
        # One slot remains for the checkpoint, whatever the link does.
        if self._gathering.staging.free <= self._last_parts or not self.has_room():
            return
        slot = await self._gathering.free_slot()
        part = await self._gathering.gather("x-ft-collect", slot)
        self._early = _Early(part["slot-bytes"], listed_pages(slot.view))
        self._account_in_flight()
        self._gathering.send(slot)

    def _learn_from_round(self, early: _Early, checkpoint: list[U64Array]) -> None:
        again = count_again(early.pages, checkpoint)
        one = Round(early=len(early.pages), again=again, link_was_full=self._stretched)
        self._speculation.observe(one)
        if not self._over:
            self._report.speculation(self._speculation, one)

    async def checkpoint(self) -> tuple[float, float]:
        """Close the epoch, and hand its frame to the sender.

        Returns when the guest ran again, and for how long it was paused, in seconds.
        """
        epoch = self._gathering.epoch
        digest = self._comparison.begin_checkpoint(epoch, committed=self.committed)
        size = pages = parts = requests = journal = before_pause = 0
        early = self._early
        listed: list[U64Array] = []
        pause = dict.fromkeys([f"{part}-ns" for part in PAUSE_PARTS], 0)
        self._gathering.answer_pressure()
        self._gathering.journal_full = False
        asked = None
        while True:
            slot = await self._gathering.free_slot()
            asked = asked or time.monotonic()
            part = await self._gathering.gather("x-ft-checkpoint", slot, digest=digest)
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
            if part["journal-requests"]:
                self._comparison.on_slot(epoch, slot.view)
            requests += part["journal-requests"]
            journal += part["journal-bytes"]
            for name in pause:
                pause[name] += part["pause"][name]
            if part["complete"]:
                # Known before the ack can come: the sender has not seen the last part.
                self._early = None
                self._last_parts = parts
                self._last_size = size + (early.size if early else 0) + self.backlog
                self.backlog = 0
                self.in_flight[epoch] = _InFlight(self._last_size, resumed)
                self._account_in_flight()
            self._gathering.send(slot)
            if part["complete"]:
                break
        pause["total-ns"] = part["pause"]["total-ns"]
        pages += len(early.pages) if early else 0
        loop = asyncio.get_running_loop()
        # Nor may such a QEMU know of hot pages.
        hot = part.get("hot-pages", 0)
        loop.call_later(ACCOUNT_AFTER, self._keep_account, pause, part["output"], pages, hot, self._last_size)
        if early is not None:
            loop.call_later(ACCOUNT_AFTER, self._learn_from_round, early, listed)
        if self._images:
            loop.call_later(ACCOUNT_AFTER, self._report.journal, requests, journal)
        if digest:
            self._comparison.end_checkpoint(epoch)
        self._gathering.epoch = epoch + 1
        self._report.begin_epoch(epoch + 1)
        self._session.set_beat(self._report.machine.state.value, self._report.committed)
        return resumed, pause["total-ns"] / 1e9

    def _keep_account(
        self, pause: Mapping[str, int], output: Mapping[str, Any], pages: int, hot: int, size: int
    ) -> None:
        self._report.pause(pause)
        self._report.metrics.observe_frame(pages, size)
        if not self._over:
            self._report.pace(self._pace)
            self._report.metrics.hot_pages.set(hot)
            self._on_output(output)

    async def on_ack(self, ack: Ack) -> None:
        """An epoch is committed: release its output.

        Raises ProtectionLost for one that was not expected, LinkLost if this side stood still and the backup
        is gone.
        """
        arrived = time.monotonic_ns()
        frame = self.in_flight.get(ack.epoch)
        # In order, once, of this generation: anything else is not the daemon that we know.
        if frame is None or ack.generation != self._generation or ack.epoch != min(self.in_flight):
            raise ProtectionLost(
                f"{self._session.peer_node} acknowledged epoch {ack.epoch} of generation {ack.generation}, "
                f"expected {min(self.in_flight, default='none')} of {self._generation}",
                resync=True,
                aborted="invalid",
            )
        # A side that stood still may have been deposed meanwhile: first it hears from the backup of now.
        await self._session.until_sure()
        # Before anything else: clients wait for this.
        os.eventfd_write(self._gathering.release, 1)
        if not self.committed:
            self._fence.on_first_commit()
        self._acknowledged[ack.epoch] = arrived
        self.committed = True
        del self.in_flight[ack.epoch]
        self._account_in_flight()
        latency = arrived / 1e9 - frame.resumed
        self._pace.committed(ack.epoch, latency)
        self._report.committed_epoch(ack.epoch, latency)
        self._gathering.changed.set()

    def _on_output(self, output: Mapping[str, Any]) -> None:
        """Note what QEMU says of the guest's output."""
        released_at = self._acknowledged.get(output["released-epoch"])
        latency = None if released_at is None else (output["released-at-ns"] - released_at) / 1e9
        for epoch in [epoch for epoch in self._acknowledged if epoch <= output["released-epoch"]]:
            del self._acknowledged[epoch]
        self._report.output(output, latency)
