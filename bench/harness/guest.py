"""A bare-metal guest in a QEMU of its own, checkpointed without daemons and without a network."""

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ftd.config import Config
from ftd.errors import HostError
from ftd.monitor import Monitor
from ftd.qemu import QemuProcess, require_patched
from ftd.staging import Staging, slot_size
from harness.environment import REPO

# Where the bare-metal guest's pages begin: see guests/README.md.
FIRST_PAGE_OFFSET = 16 << 20
PAGE_SIZE = 4096


async def _run(*words: str | Path) -> str:
    """The last line that a program printed."""
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        output, errors = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise HostError(f"{words[0]} failed: {errors.decode(errors='replace').strip()}")
    return output.decode().strip().split("\n")[-1]


@contextlib.asynccontextmanager
async def bare_guest(
    accelerator: str,
    options: dict[str, object],
    *,
    qemu: Path | None = None,
    memory_mib: int = 256,
    memory_path: Path = Path("/dev/shm"),
    vcpus: int = 1,
    dirty_ring_size: int = 4096,
) -> AsyncIterator[tuple[QemuProcess, int]]:
    """A bare-metal guest that has begun its rounds, and a descriptor of its memory file.

    `options` are those of guests/README.md. QEMU is started as the daemon starts it. Its memory file has no
    name any more, so that nothing is left of it whatever becomes of us.
    """
    bare = Path(await _run(REPO / "guests" / "bare" / "build"))
    with tempfile.TemporaryDirectory(prefix="ftd-bench-") as name:
        folder = Path(name)
        console = folder / "console"
        arguments = ["-bios", str(bare / "ftd-bare.bin")]
        for option, value in options.items():
            arguments += ["-fw_cfg", f"name=opt/ftd/{option},string={value}"]
        config = Config.model_validate(
            {
                "node": {"name": f"bench-{os.getpid()}", "role": "primary", "run_dir": folder},
                "link": {"listen": "127.0.0.1", "peer": "127.0.0.1", "insecure": True},
                "arbiter": {"accept_split_brain": True},
                "machine": {
                    "qemu": qemu,
                    "accelerator": accelerator,
                    "dirty_ring_size": dirty_ring_size,
                    "vcpus": vcpus,
                    "memory_mib": memory_mib,
                    "memory_path": memory_path,
                    "console": console,
                    "arguments": arguments,
                },
            }
        )
        process = await QemuProcess.start(config)
        try:
            memory = os.open(process.memory_file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                process.memory_file.unlink()
                await require_patched(process.monitor)
                await _first_round(process, console, options)
                yield process, memory
            finally:
                os.close(memory)
        finally:
            await process.kill()


async def _first_round(process: QemuProcess, console: Path, options: dict[str, object]) -> None:
    """Waits until the guest has written to all of its pages once, and has got the options it was given."""
    for _ in range(6000):
        text = _text(console)
        if re.search(r"^round [1-9]", text, re.MULTILINE):
            for option, value in options.items():
                if not re.search(rf"^ftd-bare: ready .*\b{option}={value}\b", text, re.MULTILINE):
                    raise HostError(f"the guest did not take {option}={value}: {text.splitlines()[0]}")
            return
        if process.ended.is_set():
            raise HostError(f"QEMU ended while the guest started, with {process.exit_status}")
        await asyncio.sleep(0.01)
    raise HostError("the bare-metal guest does not begin its rounds")


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


class SlotTooSmallError(HostError):
    """The pages of a checkpoint did not fit into one slot. The guest is still paused."""


class Checkpoints:
    """Checkpointing of one guest into slots whose contents nobody reads. Made by `checkpoints`."""

    def __init__(self, monitor: Monitor, slots: int) -> None:
        self._monitor = monitor
        self._slots = slots
        self._gathered = 0
        self._epoch = 1

    async def sync(self) -> None:
        """Gathers all of memory, as before the first checkpoint."""
        while not (await self._gather("x-ft-collect", {}))["complete"]:
            pass

    async def collect(self) -> dict[str, Any]:
        """The FtPart of a live round in the running epoch; what does not fit into one slot stays dirty."""
        return await self._gather("x-ft-collect", {})

    async def checkpoint(self, **arguments: Any) -> dict[str, Any]:
        """The FtPart of a checkpoint, which has to fit into one slot."""
        part = await self._gather("x-ft-checkpoint", arguments)
        self._epoch += 1
        if not part["complete"]:
            raise SlotTooSmallError(
                f"a checkpoint of {part['pages'] + part['remaining']} pages: slots are too small"
            )
        return part

    async def _gather(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """`slot`, the number of the slot that was filled, is added to what QEMU tells."""
        slot = self._gathered % self._slots
        self._gathered += 1
        part: dict[str, Any] = await self._monitor.execute(command, slot=slot, epoch=self._epoch, **arguments)
        return {**part, "slot": slot}


async def make_staging(monitor: Monitor, pages: int, slots: int = 2, *, whole_memory: bool = True) -> Staging:
    """Slots that hold so many pages each.

    Where KVM emulates the guest's code, a ring may overflow, and then all memory counts as dirty: slots hold
    that, too, but for `whole_memory` = False. Then such a checkpoint raises SlotTooSmallError.
    """
    status = await monitor.execute("query-x-ft")
    memory = sum(block["max-length"] for block in status["blocks"])
    data = pages * PAGE_SIZE
    return Staging(slots, slot_size(max(data, memory) if whole_memory else data, memory))


async def begin_checkpoints(monitor: Monitor, staging: Staging, **begin: Any) -> Checkpoints:
    """Like `checkpoints`; x-ft-end is left to the caller."""
    for slot in staging.slots:
        await monitor.send_descriptor(slot.name, slot.fd)
    names = [slot.name for slot in staging.slots]
    await monitor.execute("x-ft-begin", generation=1, slots=names, **begin)
    run = Checkpoints(monitor, len(names))
    await run.sync()
    return run


@contextlib.asynccontextmanager
async def checkpoints(monitor: Monitor, staging: Staging, **begin: Any) -> AsyncIterator[Checkpoints]:
    """Checkpointing, synchronised; `begin` are arguments of x-ft-begin."""
    yield await begin_checkpoints(monitor, staging, **begin)
    # After a failure QEMU is thrown away, and its answers mean nothing any more.
    await monitor.execute("x-ft-end")
