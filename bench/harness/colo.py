"""QEMU's own COLO: two QEMUs that run the same guest and make checkpoints, from start to takeover."""

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from testbed.guest import Console, Guest

from ftd.config import Config
from ftd.errors import HostError
from ftd.monitor import Event, Monitor
from ftd.qemu import QemuProcess

WARM_UP = 5  # checkpoints that are not counted: the first ones hold what changed during the copy
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Settings:
    """How COLO is run. dirty_ring: entries of KVM's ring, 0 for its bitmap."""

    qemu: Path
    epoch_ms: int
    dirty_ring: int = 0
    mib_per_s: int = 1 << 20  # no limit


def event_time(event: Event) -> float:
    """When QEMU sent an event, in seconds of the time of day."""
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


class Pauses:
    """The time between QEMU's STOP and RESUME events, in seconds."""

    def __init__(self, monitor: Monitor) -> None:
        self.seconds: list[float] = []
        self._stopped: float | None = None
        monitor.on("STOP", self._on_stop)
        monitor.on("RESUME", self._on_resume)

    def _on_stop(self, event: Event) -> None:
        self._stopped = event_time(event)

    def _on_resume(self, event: Event) -> None:
        if self._stopped is not None:
            self.seconds.append(event_time(event) - self._stopped)
        self._stopped = None


async def _start_side(
    guest: Guest, folder: Path, settings: Settings, stack: contextlib.AsyncExitStack, *, incoming: bool
) -> QemuProcess:
    """One of the two QEMUs, started as ftd starts its own, with COLO switched on."""
    await asyncio.to_thread(folder.mkdir)
    words = ["-bios", str(guest.folder / "ftd-bare.bin")]
    for name, value in guest.options.items():
        words += ["-fw_cfg", f"name=opt/ftd/{name},string={value}"]
    config = Config.model_validate(
        {
            "node": {"name": f"bench-{os.getpid()}-{folder.name}", "role": "primary", "run_dir": folder},
            "link": {"listen": "127.0.0.1", "peer": "127.0.0.1", "insecure": True},
            "arbiter": {"accept_split_brain": True},
            "machine": {
                "qemu": settings.qemu,
                "accelerator": guest.accelerator,
                "dirty_ring_size": settings.dirty_ring,
                "memory_mib": guest.memory_mib,
                "console": folder / "console",
                "arguments": words,
            },
        }
    )
    qemu = await QemuProcess.start(config, incoming=incoming)
    stack.push_async_callback(qemu.kill)
    on = [{"capability": "x-colo", "state": True}]
    await qemu.monitor.execute("migrate-set-capabilities", capabilities=on)
    await qemu.monitor.execute(
        "migrate-set-parameters",
        x_checkpoint_delay=settings.epoch_ms,
        max_bandwidth=settings.mib_per_s << 20,
    )
    return qemu


class Colo:
    """Two QEMUs with the bare-metal guest in the first of them. Made by `colo`."""

    def __init__(self, primary: QemuProcess, secondary: QemuProcess, folder: Path) -> None:
        self.console = Console(folder / "p" / "console")
        self._primary, self._secondary = primary, secondary
        self._address = f"unix:{folder / 'colo'}"

    async def protect(self) -> Pauses:
        """Begin, and return after the first checkpoints. The pauses go on being noted."""
        await self._secondary.monitor.execute("migrate-incoming", uri=self._address)
        pauses = Pauses(self._primary.monitor)
        await self._primary.monitor.execute("migrate", uri=self._address)
        async with asyncio.timeout(PATIENCE_S):
            while len(pauses.seconds) < WARM_UP:
                status = await self._primary.monitor.execute("query-migrate")
                if status["status"] == "failed":
                    raise HostError(
                        f"COLO: the migration failed: {status.get('error-desc', 'no reason given')}"
                    )
                await asyncio.sleep(0.01)
        return pauses

    async def take_over(self) -> float:
        """Kill the primary, have the secondary take over at once, and return the seconds until it had."""
        killed = time.time()
        os.kill(self._primary.pid, signal.SIGKILL)
        monitor = self._secondary.monitor
        async with asyncio.timeout(PATIENCE_S):
            await monitor.execute("x-colo-lost-heartbeat")
            while (await monitor.execute("query-colo-status"))["mode"] != "none":  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            while not (await monitor.execute("query-status"))["running"]:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            return time.time() - killed


@contextlib.asynccontextmanager
async def colo(guest: Guest, settings: Settings) -> AsyncIterator[Colo]:
    """Both QEMUs of a pair that is not protected yet."""
    with tempfile.TemporaryDirectory(prefix="ftd-bench-") as name:
        async with contextlib.AsyncExitStack() as stack:
            folder = Path(name)
            primary = await _start_side(guest, folder / "p", settings, stack, incoming=False)
            secondary = await _start_side(guest, folder / "s", settings, stack, incoming=True)
            yield Colo(primary, secondary, folder)
