"""The first copy: disks and memory, as they change, until what is left is little enough for a pause."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ftd.config import Config
from ftd.disk import Image
from ftd.disksync import CLOSE_SECONDS, DiskCopy, Questions
from ftd.errors import HostError, LinkError
from ftd.protection.ends import no_disks
from ftd.protection.fence import Fence
from ftd.protection.gathering import Gathering
from ftd.report import Report
from ftd.wire import LinkLost

# Live rounds end when the last one left so little that a pause copies it, or when they no longer get smaller.
MOST_LIVE_ROUNDS = 30
SMALL_ENOUGH = 0.25  # of a slot


class FirstCopy:
    """Copies all that the guest has to a backup that has nothing. Runs once."""

    def __init__(
        self,
        config: Config,
        report: Report,
        gathering: Gathering,
        generation: int,
        images: Sequence[Image],
        questions: Questions,
        fence: Fence,
    ) -> None:
        self._config = config
        self._report = report
        self._gathering = gathering
        self._generation = generation
        self._images = images
        self._questions = questions
        self._fence = fence

    async def run(self) -> None:
        """Copy until a checkpoint makes the copy a shadow. Raises ProtectionLost, LinkLost, QemuError."""
        await self._copy_disks()
        noted = asyncio.ensure_future(self._note_disks())
        noted.add_done_callback(_forget)
        await self._copy_memory()
        await self._wait_for(noted)
        await self._wait_for(asyncio.ensure_future(self._fence.ready_to_commit()))

    async def _copy_disks(self) -> None:
        """Have the backup's disks made equal; what the guest writes from now on comes in journals."""
        if not self._images:
            return
        copy = DiskCopy(
            self._images,
            self._generation,
            bytes_per_second=self._config.disks.sync_mib_per_s << 20,
            questions=self._questions,
            send=self._gathering.sender.send_message,
            close_journal=self._gathering.close_journal,
            wait_for_pressure=self._gathering.wait_for_pressure,
            on_progress=self._report.disk_sync,
        )
        try:
            await copy.run()
        except LinkLost:
            raise
        except (HostError, LinkError) as error:
            raise no_disks(error) from None

    async def _note_disks(self) -> None:
        """Have it noted that the backup may take over with the disks that it has. Raises ProtectionLost."""
        if self._images:
            try:
                await self._fence.before_first_commit()
            except HostError as error:
                raise no_disks(error) from None

    async def _wait_for(self, done: asyncio.Future[None]) -> None:
        """Return when something is done that has to be before the first frame.

        The host's disk, or the arbiter, may take its time, and the guest's journal would be full meanwhile.
        Then the guest has to wait, and the first frame is one of two parts, with the guest paused in between.
        """
        while not done.done():
            await asyncio.wait({done}, timeout=CLOSE_SECONDS)
            if self._images and not done.done():
                await self._gathering.close_journal()
        done.result()

    async def _copy_memory(self) -> None:
        """Live rounds: first over all memory, then over what became dirty meanwhile, until that is little."""
        sent = total = 0
        last = 0
        for _ in range(1 << 30):
            slot = await self._gathering.free_slot()
            part = await self._gathering.gather("x-ft-collect", slot)
            pages = part["pages"] + part["zero-pages"]
            sent += pages
            total = max(total, sent + part["remaining"])
            self._report.sync_round(sent / total if total else 1.0, part["slot-bytes"])
            self._gathering.send(slot)
            if not part["complete"]:
                continue
            if pages <= self._gathering.slot_pages * SMALL_ENOUGH:
                return
            # Another pass pays only while passes shrink.
            last, shrunk = pages, not last or pages < 0.9 * last
            if not shrunk or self._report.status().sync.rounds > MOST_LIVE_ROUNDS:
                return


def _forget(task: asyncio.Future[None]) -> None:
    """Take note of a task's failure, which may not be what ended protection."""
    if not task.cancelled():
        task.exception()
