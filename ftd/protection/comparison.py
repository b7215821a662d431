"""Comparing what the backup holds with the guest: memory at a checkpoint, and disks while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ftd.disk import Image
from ftd.disksync import Questions
from ftd.diskverify import DiskChecks
from ftd.errors import LinkError
from ftd.link import Session
from ftd.messages import DiskVerifyResult, VerifyResult
from ftd.protection.ends import ProtectionLost, no_disks
from ftd.report import Report, with_disks
from ftd.status import VerifyReport
from ftd.wire import LinkLost


class Comparison:
    """Compares when somebody wants it, and each `every` epochs (0: never by itself).

    epoch: that the guest is in.
    """

    def __init__(
        self,
        report: Report,
        session: Session,
        images: Sequence[Image],
        questions: Questions,
        *,
        every: int,
        epoch: Callable[[], int],
    ) -> None:
        self._report = report
        self._session = session
        self._images = images
        self._questions = questions
        self._every = every
        self._epoch = epoch
        self._next = False  # at the next checkpoint
        self._waiting: dict[int, asyncio.Future[VerifyReport]] = {}  # by epoch; -1: the next one's
        self._disks: DiskChecks | None = None
        self._closed = False
        self._group: asyncio.TaskGroup | None = None
        self._wait_committed: Callable[[int], Awaitable[None]] | None = None

    def start(self, group: asyncio.TaskGroup, wait_committed: Callable[[int], Awaitable[None]]) -> None:
        """Compare disks as soon as there is something committed, in a task of the group.

        wait_committed(epoch): returns when that is committed.
        """
        self._group, self._wait_committed = group, wait_committed

    async def verify(self) -> VerifyReport:
        """Have the memory on both sides compared at the end of this epoch, and then the disks.

        Raises LinkLost or ProtectionLost if protection ends first, HostError if a disk cannot be read.
        """
        if self._closed:  # the session's goodbye takes its time, and nobody would answer any more
            raise _ended_first()
        self._next = True
        result: asyncio.Future[VerifyReport] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(-1, result)
        report = await asyncio.shield(self._waiting[-1])
        if self._disks is None or not report.ok:
            return report
        return with_disks(report, await self._disks.whole())

    # ---- at checkpoints -----------------------------------------------------------------------------------

    def begin_checkpoint(self, epoch: int, *, committed: bool) -> bool:
        """Return whether the frame is to have a digest of memory.

        committed: whether the backup holds the guest by now, so that disks can be compared.
        """
        if committed and self._images and self._disks is None:
            self._watch_disks()
        return self._next or bool(self._every and epoch % self._every == 0)

    def on_slot(self, epoch: int, view: memoryview) -> None:
        """Look at what the guest has written to its disks: a slot that has a journal."""
        if self._disks is not None:
            self._disks.on_slot(epoch, view)

    def end_checkpoint(self, epoch: int) -> None:
        """The frame of an epoch was gathered, and has a digest."""
        if self._next:
            self._next = False
            self._waiting[epoch] = self._waiting.pop(-1)
        elif self._disks is not None:
            self._disks.changed()

    # ---- results ------------------------------------------------------------------------------------------

    def on_verified(self, result: VerifyResult) -> None:
        """Tell everybody what the backup has found. Raises ProtectionLost when memory differs."""
        report = self._report.verified(result)
        waiting = self._waiting.pop(result.epoch, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(report)
        if not result.ok:
            first = result.differences[0] if result.differences else None
            where = f", first page {first.page} of block {first.block}" if first else ""
            raise ProtectionLost(
                f"the shadow differs from the guest in {result.differing} pages "
                f"after epoch {result.epoch}{where}",
                resync=True,
                aborted="invalid",
            )

    def _watch_disks(self) -> None:
        """From now on, compare the disks whenever that is wanted."""
        assert self._group is not None
        assert self._wait_committed is not None
        self._disks = DiskChecks(
            self._images,
            self._questions,
            epoch=self._epoch,
            wait_committed=self._wait_committed,
            remember=self._every > 0,
            on_result=self._on_disks_compared,
        )
        self._group.create_task(self._check_disks(self._disks))

    async def _check_disks(self, checks: DiskChecks) -> None:
        try:
            await checks.run()
        except LinkLost:
            raise
        except LinkError as error:
            raise no_disks(error) from None

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

    def close(self) -> None:
        """Protection has ended: whoever waits, or comes after this, is told."""
        self._closed = True
        ended = _ended_first()
        for result in self._waiting.values():
            if not result.done():
                result.set_exception(ended)
                result.exception()  # somebody may have stopped waiting
        if self._disks is not None:
            self._disks.close(ended)


def _ended_first() -> ProtectionLost:
    return ProtectionLost("protection ended first", resync=False, aborted="link")
