"""What QEMU is asked for during protection, and the slots that it fills; the sender empties them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftd.carried import Carried
from ftd.config import Config
from ftd.errors import QemuError
from ftd.link import Session
from ftd.metrics import Metrics
from ftd.monitor import Event, Monitor
from ftd.protection.ends import ProtectionLost
from ftd.sender import Sender
from ftd.staging import Slot, Staging, slot_size

# QEMU resumes a guest whose next part is not asked for within this time; only a daemon that died or a link
# that stands still lets it pass.
PAUSE_LIMIT_MS = 2000

# Dirty pages that make an epoch end early, as a share of what a slot holds: a frame of one part is the
# shortest pause.
PRESSURE = 0.75


class Gathering:
    """From `x-ft-begin` to `x-ft-end`. Ready for slots after `begin`, or with what an earlier session has
    left; for the sender after `connect`.
    """

    def __init__(self, monitor: Monitor, metrics: Metrics, epoch: int, carried: Carried | None) -> None:
        self._monitor = monitor
        self._metrics = metrics
        self.epoch = epoch  # that the guest is in now
        self._staging: Staging | None = None
        self._sender: Sender | None = None
        self._release: int | None = None  # eventfd: QEMU releases as many epochs as are added to it
        self.slot_pages = 0
        if carried is not None:
            self._staging, self._release = carried.staging, carried.release
            self.slot_pages = carried.slot_pages
        self.changed = asyncio.Event()  # an ack came, or a slot was sent, or there is pressure
        self._pressed = -1  # what QEMU called the epoch in which it asked for a checkpoint
        # Requests that cannot wait any more, once the guest is paused, may be too many for one slot.
        self.journal_full = False
        self._abandoned: str | None = None

    @property
    def staging(self) -> Staging:
        """The slots."""
        assert self._staging is not None
        return self._staging

    @property
    def sender(self) -> Sender:
        """The thread that sends them."""
        assert self._sender is not None
        return self._sender

    @property
    def release(self) -> int:
        """The eventfd by which QEMU is told to let go of an epoch's output: 1 for each."""
        assert self._release is not None
        return self._release

    # ---- beginning and end --------------------------------------------------------------------------------

    def subscribe(self) -> list[Callable[[], None]]:
        """Listen to QEMU's events; returns what ends that."""
        return [
            self._monitor.on("X_FT_DIRTY_PRESSURE", self._on_pressure),
            self._monitor.on("X_FT_OUTPUT_FULL", self._on_pressure),
            self._monitor.on("X_FT_JOURNAL_FULL", self._on_journal_full),
            self._monitor.on("X_FT_ABANDONED", self._on_abandoned),
        ]

    async def begin(
        self, config: Config, generation: int, disks: Sequence[str], memory: int, best: str
    ) -> str:
        """Share slots with QEMU, and have it note what changes. Returns the tracker that it uses.

        disks: node names of those whose writes are to be noted. memory: bytes of the guest's. best: the
        tracker that QEMU would choose.
        """
        tracker, hot = config.epoch.tracker, config.epoch.hot_epochs
        ring = (best if tracker == "auto" else tracker) == "ring"
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
            generation=generation,
            slots=[slot.name for slot in self._staging.slots],
            copy_threads=config.staging.copy_threads,
            pause_limit_ms=PAUSE_LIMIT_MS,
            pressure_pages=int(pages * PRESSURE),
            output_limit=config.output.limit_mib << 20 if config.output.hold else 0,
            release_fd="ftd-release",
            **({"disks": list(disks)} if config.disks.replicate else {}),
            journal_limit=journal,
            **({} if tracker == "auto" else {"tracker": tracker}),
            **({"switches": {"hot-epochs": hot}} if hot and ring else {}),
        )
        self.slot_pages = status["pages-per-slot"]
        return str(status["tracker"])

    def connect(self, session: Session) -> None:
        """From now on slots can be sent over this session."""
        self._sender = Sender(session, self.staging, self._on_sent)

    async def disconnect(self) -> None:
        """Send no more. The session has ended before, or the sender may wait for it."""
        if self._sender is not None:
            await self._sender.close()

    async def end(self, *, release: bool) -> None:
        """Have QEMU note nothing any more. release: what becomes of the output that is held."""
        await self._monitor.execute("x-ft-end", output="release" if release else "hold")

    def close(self) -> None:
        """Let go of what was shared with QEMU."""
        if self._release is not None:
            os.close(self._release)
        if self._staging is not None:
            self._staging.close()

    # ---- slots --------------------------------------------------------------------------------------------

    async def free_slot(self) -> Slot:
        """Wait for a slot that nothing is in."""
        return await self.staging.acquire_free()

    async def gather(self, command: str, slot: Slot, **arguments: Any) -> Mapping[str, Any]:
        """Have QEMU fill a slot. If it fails, the slot is given back.

        Raises ProtectionLost when QEMU refused, QemuError when it is lost.
        """
        try:
            part: Mapping[str, Any] = await self._monitor.execute(
                command, slot=slot.index, epoch=self.epoch, **arguments
            )
        except QemuError as error:
            self.staging.release(slot)
            if error.qmp_class:
                reason = self._abandoned or f"{command}: {error.description}"
                raise ProtectionLost(
                    f"a frame was lost: {reason}", resync=True, aborted="abandoned"
                ) from None
            raise
        return part

    def send(self, slot: Slot) -> None:
        """Have a slot sent; it is free again afterwards."""
        assert self._sender is not None
        self._sender.send(slot)

    async def close_journal(self) -> None:
        """Send what the guest has written to its disks, and nothing of its memory."""
        self.answer_pressure()
        slot = await self.free_slot()
        await self.gather("x-ft-collect", slot, memory=False)
        self.send(slot)

    async def wait_for_pressure(self, seconds: float) -> bool:
        """Wait so long, or until QEMU wants to get rid of something; return whether it does."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.pressure:
            self.changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.changed.wait()
            except TimeoutError:
                break
        return self.pressure

    async def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something is so that an ack, a slot or QEMU can make so."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    # ---- what comes in ------------------------------------------------------------------------------------

    def _on_sent(self, size: int) -> None:
        self._metrics.add_link_bytes("frames", sent=size)
        self.changed.set()

    def _on_pressure(self, event: Event) -> None:
        self._pressed = int(event.get("data", {}).get("epoch", self.epoch))
        self.changed.set()

    def _on_journal_full(self, event: Event) -> None:
        self.journal_full = True
        self._on_pressure(event)

    @property
    def pressure(self) -> bool:
        """Whether QEMU wants the running epoch closed, and not the one before, whose event came late.

        QEMU names the epoch that it was asked to gather last, which is the one before the running one.
        """
        return self._pressed >= self.epoch - 1

    def _on_abandoned(self, event: Event) -> None:
        self._abandoned = str(event.get("data", {}).get("reason", "given up by QEMU"))

    def answer_pressure(self) -> None:
        """What QEMU wanted to get rid of is being taken."""
        self._pressed = -1
