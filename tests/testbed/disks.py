"""Guests that write to disks, the images behind these, and what has to be true of them after a takeover."""

import asyncio
import os
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftd.monitor import Monitor
from testbed.guest import Guest, build
from testbed.hosts import GUEST_ADDRESS, Host, Node, TestbedError
from testbed.namespaces import call_in_namespace
from testbed.pair import Daemon, Pair

PORT = 7500
MIB = 1 << 20
BLOCK = 4096


async def disk_guest(
    *,
    files: int = 0,
    sectors: int = 0,
    witness: str = "",
    bench: str = "",
    disks: list[dict[str, Any]] | None = None,
) -> Guest:
    """The Linux guest with SQLite under TCG; options are those of guests/linux/init."""
    folder = await build("guests/sqlite/build")
    options = {"files": str(files), "sectors": str(sectors), "witness": witness, "bench": bench}
    disks = disks or [{"path": "disk0.img"}]
    return Guest("linux", "tcg", "asked for", folder, memory_mib=128, options=options, disks=disks)


class IdleGuest(Guest):
    """A machine in which nothing runs but the firmware, which boots nothing; `request` writes for it."""

    def machine(self, host: Host, console: Path, qemu: Path) -> dict[str, Any]:
        table = super().machine(host, console, qemu)
        del table["arguments"]
        return table


def idle_guest(disks: list[dict[str, Any]]) -> Guest:
    """A guest that does nothing, with disks."""
    return IdleGuest("bare", "tcg", "asked for", Path(), memory_mib=32, disks=disks)


async def request(daemon: Daemon, command: str, disk: int = 0) -> None:
    """Have QEMU make a request to the guest's disk, in the words of `qemu-io`."""
    line = f'qemu-io -d /machine/peripheral/vd{disk}/virtio-backend "{command}"'
    async with await Monitor.connect(daemon.run_dir / "operator.sock") as operator:
        said = await operator.execute("human-monitor-command", command_line=line)
    if "failed" in said or "error" in said:
        raise TestbedError(f"{command}: {said.strip()}")


async def tool(*words: str | Path, good: tuple[int, ...] = (0,)) -> str:
    """Run a program, and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, words), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    text = out.decode(errors="replace")
    if process.returncode not in good:
        raise TestbedError(f"{' '.join(map(str, words))}: exit status {process.returncode}: {text.strip()}")
    return text


def image(daemon: Daemon, number: int = 0) -> Path:
    """The image of a disk on the daemon's host."""
    return daemon.folder / f"disk{number}.img"


async def make_images(pair: Pair, sizes: list[int], *, ext4: bool = True) -> None:
    """Make the images on both hosts, the first of the primary's with a file system; the backup's is noise."""
    for number, size in enumerate(sizes):
        for daemon in (pair.primary, pair.backup):
            path = image(daemon, number)
            with path.open("wb") as file:
                file.truncate(size)
                if daemon is pair.backup:
                    file.seek(size // 2)
                    file.write(os.urandom(min(3 * MIB, size // 2)))
    if ext4:
        await tool("mkfs.ext4", "-q", "-F", image(pair.primary))


def differing_blocks(one: Path, other: Path) -> list[int]:
    """Numbers of the blocks of 4096 bytes in which two images differ."""
    found = []
    with one.open("rb") as left, other.open("rb") as right:
        at = 0
        while True:
            a, b = left.read(MIB), right.read(MIB)
            if a != b:
                found += [
                    (at + start) // BLOCK
                    for start in range(0, max(len(a), len(b)), BLOCK)
                    if a[start : start + BLOCK] != b[start : start + BLOCK]
                ]
            if not a:
                return found
            at += len(a)


async def file_system_faults(path: Path) -> str:
    """What fsck finds in a copy of the image once the journal is replayed; nothing, if all is well."""
    copy = path.with_suffix(".fsck")
    try:
        await asyncio.to_thread(shutil.copyfile, path, copy)
        await tool("e2fsck", "-E", "journal_only", "-fy", copy, good=(0, 1))
        try:
            await tool("e2fsck", "-fn", copy)
        except TestbedError as error:
            return str(error)
        return ""
    finally:
        copy.unlink(missing_ok=True)


def _ask(line: str, timeout_s: float = 60.0) -> str:
    with socket.create_connection((GUEST_ADDRESS, PORT), timeout=timeout_s) as connection:
        connection.sendall(f"{line}\n".encode())
        with connection.makefile() as lines:
            return lines.readline().strip()


async def ask_ledger(node: Node, line: str) -> str:
    """One question to the guest's database."""
    return await asyncio.to_thread(call_in_namespace, node.namespace, lambda: _ask(line))


async def wait_ledger(node: Node, timeout_s: float = 60.0) -> None:
    """Wait until the database answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await asyncio.to_thread(call_in_namespace, node.namespace, lambda: _ask("has 0", 2))
            return
        except OSError:
            if time.monotonic() > deadline:
                raise TestbedError(f"the guest's database does not answer within {timeout_s:g} s") from None
            await asyncio.sleep(0.1)


@dataclass
class LedgerLoad:
    """Clients that put rows as fast as they are acknowledged; `acknowledged` counts those of each worker."""

    node: Node
    workers: int = 3
    interval_s: float = 0.0  # from an acknowledgement to the next row
    acknowledged: dict[int, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _stop: bool = False

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in range(self.workers)]

    async def _work(self, worker: int) -> None:
        def connect() -> socket.socket:
            return socket.create_connection((GUEST_ADDRESS, PORT), timeout=60)

        connection = await asyncio.to_thread(call_in_namespace, self.node.namespace, connect)
        connection.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            first = number = self.acknowledged.get(worker, 0)
            while not self._stop:
                writer.write(f"put {worker} {number}\n".encode())
                said = (await asyncio.wait_for(reader.readline(), 60)).decode().strip()
                # What was put right before the guest booted anew may be there, though nobody was told.
                stored = 0 < number == first and "UNIQUE constraint failed" in said
                if said != "ok" and not stored:
                    self.errors.append(f"put {worker} {number}: {said!r}")
                    return
                number += 1
                self.acknowledged[worker] = number
                if self.interval_s:
                    await asyncio.sleep(self.interval_s)
        except (OSError, TimeoutError) as error:
            self.errors.append(f"worker {worker}: {error!r}")
        finally:
            writer.close()

    @property
    def total(self) -> int:
        """Rows that were acknowledged."""
        return sum(self.acknowledged.values())

    async def wait_for(self, more: int, timeout_s: float = 60.0) -> None:
        """Wait for so many more rows."""
        wanted = self.total + more
        deadline = time.monotonic() + timeout_s
        while self.total < wanted:
            if self.errors or time.monotonic() > deadline:
                raise TestbedError(f"{self.total} rows instead of {wanted}: {self.errors}")
            await asyncio.sleep(0.02)

    def cancel(self) -> None:
        """Stop at once, whatever is under way."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Stop, after each worker's row is acknowledged."""
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def abandon(self) -> None:
        """Stop at once: the guest will not answer any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def problems(self) -> list[str]:
        """What the database lost of what it acknowledged, and what is wrong with it."""
        found = list(self.errors)
        check = await ask_ledger(self.node, "check")
        if not check.startswith("ok "):
            found.append(f"the database is damaged: {check}")
        for worker, count in self.acknowledged.items():
            said = await ask_ledger(self.node, f"has {worker}")
            rows, highest = map(int, said.split())
            if rows < count or highest < count - 1:
                found.append(f"worker {worker}: {count} rows were acknowledged, the database has {said}")
        return found
