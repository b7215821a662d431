"""Systems to compare: a tracker with its switches. Each is a VM of its own; those that live take turns.

KVM makes rings and bitmap exclusive, chosen when the VM starts, so systems cannot be modes of one VM. All
VMs of a comparison are alive at the same time, stopped but for one, and that one runs for a short slice
before it is the next one's turn. So all of them see the same noise of the host.
"""

import asyncio
import contextlib
import math
import mmap
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftd.errors import HostError
from ftd.qemu import QemuProcess, choose_accelerator
from ftd.staging import Staging
from harness import machine
from harness.guest import (
    FIRST_PAGE_OFFSET,
    PAGE_SIZE,
    Checkpoints,
    SlotTooSmallError,
    bare_guest,
    begin_checkpoints,
    make_staging,
)

# early is before the pause; reset and registers are within others, or beside: see FtPause in qemu/README.md.
PARTS = ("early", "stop", "registers", "drain", "harvest", "reset", "copy", "device", "resume")
RING_ENTRIES = 65_536
# The first copy of a large guest names all of its pages, so many in each part: few parts, and yet a ring that
# overflows does not fill all of the guest's memory file.
LEAST_SLOT_PAGES = 32_768
WARM_UP = 3
MOST_PAGES = 32_768
# What a guest manages whose instructions KVM emulates; it writes to each page twice in an epoch.
EMULATED_PAGES_PER_SECOND = 200_000
UNPROTECTED = "unprotected"
EMULATED = (
    "KVM emulates the guest's code on this machine: the guest is slower than on hardware, and a ring gets an "
    "entry for every store, not for every page. What the trackers cost the guest between checkpoints (faults "
    "on protected pages, exits to the hypervisor) is not seen here."
)


@dataclass(frozen=True)
class System:
    """A tracker, and what is switched otherwise than it is by itself."""

    tracker: str
    switches: dict[str, bool | int] = field(default_factory=dict)

    @property
    def ring_entries(self) -> int:
        """Entries of KVM's ring; 0 for its bitmap."""
        return 0 if self.tracker == "bitmap" else RING_ENTRIES


# `bitmap` and `ring-stock` are the systems of the literature: asked for by name, their pause is serial.
SYSTEMS = {
    "bitmap": System("bitmap"),
    "ring-stock": System("ring-stock"),
    "ring": System("ring"),
    "bitmap-parallel": System("bitmap", {"serial-pause": False}),
    "ring-stock-parallel": System("ring-stock", {"serial-pause": False}),
    "ring-serial": System("ring", {"serial-pause": True}),
    "ring-no-early": System("ring", {"early-harvest": False}),
    "ring-no-streaming": System("ring", {"streaming-copy": False}),
    "ring-no-defer": System("ring", {"defer-reset": False}),
    "ring-late-registers": System("ring", {"early-registers": False}),
    "ring-one-harvester": System("ring", {"parallel-harvest": False}),
    "ring-no-groups": System("ring", {"dirty-groups": False}),
    "ring-hot": System("ring", {"hot-epochs": 3}),
}


@dataclass
class Turn:
    """One slice of one VM."""

    seconds: float
    written: int  # pages that the guest wrote to, each time counted
    cpu_seconds: float  # of the whole QEMU process, the guest's own work included
    parts: list[dict[str, Any]]  # FtPart of each checkpoint


class Vm:
    """A bare-metal guest under one system, stopped but in its turns. Made by `vms`."""

    def __init__(
        self,
        name: str,
        qemu: QemuProcess,
        memory: int,
        pages: int,
        staging: Staging | None,
        copy_threads: int,
    ) -> None:
        self.name = name
        self.turns: list[Turn] = []
        self.overflows = 0
        self._qemu, self._staging, self._copy_threads = qemu, staging, copy_threads
        self._run: Checkpoints | None = None
        self._map = mmap.mmap(memory, pages * PAGE_SIZE, prot=mmap.PROT_READ, offset=FIRST_PAGE_OFFSET)
        # With check=0 the first word of a page is the number of the round that wrote to it last.
        self._words = np.frombuffer(self._map, np.uint32)[:: PAGE_SIZE // 4]

    @property
    def protected(self) -> bool:
        """Whether it is one that makes checkpoints."""
        return self._staging is not None

    async def begin(self) -> None:
        """Begins to make checkpoints; the guest is stopped."""
        if self._staging is None:
            return
        system = SYSTEMS[self.name]
        self._run = await begin_checkpoints(
            self._qemu.monitor,
            self._staging,
            copy_threads=self._copy_threads,
            tracker=system.tracker,
            switches=system.switches,
        )
        status = await self._qemu.monitor.execute("query-x-ft")
        if status["tracker"] != system.tracker:
            raise HostError(f"asked for the tracker {system.tracker}, QEMU uses {status['tracker']}")

    async def turn(self, seconds: float, epoch: float) -> None:
        """Runs for so long, with checkpoints if it is protected, and is stopped again."""
        monitor = self._qemu.monitor
        await monitor.execute("cont")
        for _ in range(WARM_UP):
            await asyncio.sleep(epoch)
            await self._checkpoint()
        parts: list[dict[str, Any]] = []
        start, written, cpu = time.monotonic(), self._written(), self._cpu_seconds()
        while not parts or time.monotonic() - start < seconds:
            await asyncio.sleep(epoch)
            part = await self._checkpoint()
            if part is not None:
                parts.append(part)
            elif time.monotonic() - start >= seconds:
                break
        took = time.monotonic() - start
        turn = Turn(took, self._written() - written, self._cpu_seconds() - cpu, parts)
        await monitor.execute("stop")
        self.turns.append(turn)

    async def _checkpoint(self) -> dict[str, Any] | None:
        """None if there was none, since the VM is unprotected or its ring had overflowed."""
        if self._run is None:
            return None
        try:
            return await self._run.checkpoint()
        except SlotTooSmallError:
            # All memory counts as dirty. Beginning anew leaves the holes of the memory file as they are.
            self.overflows += 1
            await self._qemu.monitor.execute("x-ft-end")
            await self.begin()
            return None

    def _written(self) -> int:
        return int(self._words.sum(dtype=np.int64))

    def _cpu_seconds(self) -> float:
        total = 0
        for file in Path(f"/proc/{self._qemu.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # a thread that ended just now
                total += int(file.read_text().split()[0])
        return total / 1e9

    def close(self) -> None:
        """Gives back the mapping of the guest's memory."""
        del self._words
        self._map.close()


@contextlib.asynccontextmanager
async def vms(
    names: Sequence[str],
    *,
    pages: int,
    rounds_per_second: int,
    ram_gib: int,
    vcpus: int,
    copy_threads: int,
    qemu: Path | None,
    memory_path: Path,
) -> AsyncIterator[list[Vm]]:
    """A VM for each name, of SYSTEMS or UNPROTECTED: started, synchronised and stopped."""
    guest = {"pages": pages, "rounds_per_second": rounds_per_second, "pattern": "sequential", "check": 0}
    made: list[Vm] = []
    async with contextlib.AsyncExitStack() as stack:
        for name in names:
            ring = RING_ENTRIES if name == UNPROTECTED else SYSTEMS[name].ring_entries
            process, memory = await stack.enter_async_context(
                bare_guest(
                    "kvm",
                    guest,
                    qemu=qemu,
                    memory_mib=1024 * ram_gib,
                    memory_path=memory_path,
                    vcpus=vcpus,
                    dirty_ring_size=ring,
                )
            )
            await process.monitor.execute("stop")
            staging = None
            if name != UNPROTECTED:
                slot_pages = max(pages + pages // 4 + 1024, LEAST_SLOT_PAGES)
                staging = stack.enter_context(
                    await make_staging(process.monitor, slot_pages, whole_memory=False)
                )
            vm = Vm(name, process, memory, pages, staging, copy_threads)
            stack.callback(vm.close)
            await vm.begin()
            made.append(vm)
        yield made


async def take_turns(vms: Sequence[Vm], *, seconds: float, slice_seconds: float, epoch: float) -> None:
    """Gives each VM so many seconds in all. Every other round goes backwards: nobody is always the first."""
    rounds = max(2, round(seconds / slice_seconds))
    for number in range(rounds):
        for vm in vms if number % 2 == 0 else reversed(vms):
            await vm.turn(seconds / rounds, epoch)


def epoch_for(pages: int, epoch: float) -> float:
    """The length of an epoch in which the guest can write to so many pages."""
    return epoch if machine.hardware_virtualisation() else max(epoch, pages / EMULATED_PAGES_PER_SECOND)


def rounds_for(epoch: float) -> int:
    """Rounds per second of a guest that halts: two in an epoch, wherever it begins, hold a whole one."""
    return min(1000, math.ceil(2 / epoch))


def caveat() -> str | None:
    """What has to be known of this machine before its figures are read."""
    return None if machine.hardware_virtualisation() else EMULATED


def require_kvm(program: str) -> None:
    """Raises HostError where there are no trackers to compare."""
    found, reason = choose_accelerator("auto")
    if found != "kvm":
        raise HostError(f"{program} compares how KVM finds dirty pages, and there is no KVM: {reason}")


def pauses(vm: Vm) -> dict[str, Any]:
    """What the checkpoints of all turns came to: percentiles in seconds.

    Raises HostError if none succeeded, since the ring overflowed in each epoch.
    """
    parts = [part for turn in vm.turns for part in turn.parts]
    if not parts:
        raise HostError(f"{vm.name}: no checkpoint succeeded; its ring overflowed {vm.overflows} times")

    def percentile(name: str, percent: float) -> float:
        return float(np.percentile([part["pause"][f"{name}-ns"] for part in parts], percent)) / 1e9

    return {
        "pages_measured": float(np.median([part["pages"] for part in parts])),
        "epochs": len(parts),
        "overflows": vm.overflows,
        "pause_p50_s": percentile("total", 50),
        "pause_p99_s": percentile("total", 99),
        **{f"{name}_s": percentile(name, 50) for name in PARTS},
        "cpu_s_per_epoch": sum(turn.cpu_seconds for turn in vm.turns) / len(parts),
        "cpu_s_per_s": cpu_share(vm),
    }


def cpu_share(vm: Vm) -> float:
    """Seconds of processor time per second, over all turns."""
    return sum(turn.cpu_seconds for turn in vm.turns) / sum(turn.seconds for turn in vm.turns)


def turn_medians(vm: Vm) -> list[float | None]:
    """The median pause of each turn in seconds; None for one without a checkpoint."""
    return [
        float(np.median([part["pause"]["total-ns"] for part in turn.parts])) / 1e9 if turn.parts else None
        for turn in vm.turns
    ]
