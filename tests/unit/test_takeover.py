"""From the arbiter's word to the primary that runs the guest: a whole node, but for QEMU's own answers.

Whatever happens in between, a guest that was won and runs is not ended by its daemon (rule S6), and its own
end is no failure (rule S7).
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from unit import sample
from unit.frame_builder import BLOCKS, GENERATION, RAM, Spec

from ftd.arbiter import Answer, Record
from ftd.arbiter_file import FileArbiter
from ftd.arbiters import identity
from ftd.assembly import Frame
from ftd.backup import backup as backup_module
from ftd.config import Config, load
from ftd.disk import Image
from ftd.durable import Durable, Memory
from ftd.errors import FtdError, QemuDied, QemuError
from ftd.link import Listener
from ftd.machine import GuestDisk, MachineDescription
from ftd.marker import Marker, Worth, mark
from ftd.monitor import Event, Monitor
from ftd.node import Found, Node
from ftd.primary import Primary
from ftd.qemu import QemuProcess
from ftd.shadow import Shadow
from ftd.state import PairState
from ftd.succession import Handed, HandedBackup

WON = GENERATION + 1

MACHINE = MachineDescription(
    qemu_version="10.0.13",
    machine_type="pc-i440fx-10.0-machine",
    accelerator="tcg",
    cpu_model="qemu64",
    cpu_features={},
    vcpus=1,
    memory_bytes=RAM.max_length,
    ram_blocks={},
    devices={},
)


class Gate:
    """A place at which things stop until they are let go; for the event loop and for threads."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._open = threading.Event()

    async def wait(self) -> None:
        await asyncio.to_thread(self.wait_here)

    def wait_here(self) -> None:
        self._reached.set()
        assert self._open.wait(10)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 10)

    def open(self) -> None:
        self._open.set()


class Qmp:
    """What QEMU would say: the monitor of a shadow, and of the guest that it becomes."""

    def __init__(self, ram: Path) -> None:
        self.path = ram.with_name("qmp.sock")
        self.said: list[str] = []
        self.before: dict[str, Callable[[], Any]] = {}
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self._listeners: list[tuple[str, Callable[[Event], None]]] = []
        blocks = [{"name": RAM.name, "path": str(ram), "shared-file": True, "max-length": RAM.max_length}]
        self._answers = {
            "query-x-ft": {"blocks": blocks, "active": False, "output": {"holding": False}},
            "query-status": {"running": True},
            "x-ft-load": {"run-state": "running", "device-bytes": 1, "pages": 1},
        }

    def on(self, name: str, callback: Callable[[Event], None]) -> Callable[[], None]:
        listener = (name, callback)
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def emit(self, name: str, **data: Any) -> None:
        for wanted, callback in list(self._listeners):
            if wanted == name:
                callback({"event": name, "data": data})

    async def execute(self, command: str, **_: Any) -> Any:
        hook = self.before.pop(command, None)
        if hook is not None:
            await hook()
        if self.lost.is_set():
            raise QemuDied(f"{command}: {self.lost_reason}")
        self.said.append(command)
        return self._answers.get(command, {})

    async def send_descriptor(self, name: str, fd: int) -> None:
        os.fstat(fd)

    async def close(self) -> None:
        self.lost_reason = "closed"
        self.lost.set()


class Backup:
    """A node whose daemon was replaced, with a shadow; its primary does not come back, and it takes over."""

    def __init__(self, config: Config, image: Path) -> None:
        self.config = config
        self.process = subprocess.Popen(["sleep", "600"])
        ram = image.with_name("ram")
        ram.write_bytes(bytes(RAM.used_length))
        shadow = Shadow({RAM.name: ram}, generation=GENERATION)
        part = Spec(blocks=BLOCKS).whole().received()
        part.verify()
        shadow.apply(Frame(GENERATION, 1, (part,)))
        handed = Handed(
            node="b",
            pid=os.getpid(),
            qemu_pid=self.process.pid,
            generation=GENERATION,
            epoch=1,
            peer_node="a",
            began=time.monotonic(),
            deadline=time.monotonic(),
            backup=HandedBackup(image=shadow.load_image()),
        )
        shadow.close()
        self.qmp = Qmp(ram)
        self.qemu = QemuProcess(self.process.pid, cast(Monitor, self.qmp), {}, child=None)
        before = Memory(generation=GENERATION, role="backup", arbiter=identity(config.arbiter))
        Durable(config.node.state_folder).write(before)
        self.node = Node(config, Found("backup", self.qemu, handed))
        self.marker = Marker(image, config.node.state_folder)
        mark([self.marker], Worth.COPY, GENERATION, "b")
        self.arbiter = self.node._inquiry.arbiter

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    async def run(self, record: Record) -> asyncio.Task[int]:
        assert (await self.arbiter.compare_and_set(None, record)).won
        return asyncio.create_task(self.node._live(self.node._link_options()))

    async def takes_over(self) -> asyncio.Task[int]:
        return await self.run(Record(generation=GENERATION, owner="a", state="paired", backup="b"))

    @contextlib.contextmanager
    def arbiter_away(self) -> Iterator[None]:
        folder = self.config.node.state_folder.with_name("records")
        away = folder.rename(folder.with_name("away"))
        yield
        away.rename(folder)

    async def becomes(self, wanted: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not wanted():  # noqa: ASYNC110 - threads have a part in it
                await asyncio.sleep(0.005)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.node._report.flight.close()


async def stop(task: asyncio.Task[int]) -> None:
    """As the supervisor does."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
async def backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "records").mkdir()
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    own = 'run_dir = "run"\nstate_dir = "state"'
    text = sample.text("b", "backup", own=own, arbiter=sample.FILE_ARBITER)
    text = text.replace("10.0.0.2", "127.0.0.1").replace("10.0.0.1", "127.0.0.2")
    text = text.replace("insecure = true", f"insecure = true\nport = {ports[0]}\nheartbeat_port = {ports[1]}")
    (tmp_path / "b.toml").write_text(text)

    async def nothing(_: object) -> None: ...

    async def description(_: object) -> MachineDescription:
        return MACHINE

    async def disks(_: object) -> list[GuestDisk]:
        return [GuestDisk("vd0", "disk0", image, 1 << 20)]

    primary_module = __import__("ftd.primary", fromlist=["primary"])
    for module in (backup_module, primary_module):
        monkeypatch.setattr(module, "require_patched", nothing)
        monkeypatch.setattr(module, "guest_disks", disks)
        monkeypatch.setattr(module, "MachineDescription", SimpleNamespace(of=description))
    monkeypatch.setattr(primary_module, "refuse_devices", lambda machine: None)
    made = Backup(load(tmp_path / "b.toml"), image)
    yield made
    made.close()


def stop_at(backup: Backup, stage: str, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Have the takeover stop at a command to QEMU, or at something else that it waits for."""
    gate = Gate()

    def hold(owner: type, name: str, *, thread: bool) -> None:
        inner = getattr(owner, name)

        async def held(*arguments: Any, **named: Any) -> Any:
            await gate.wait()
            return await inner(*arguments, **named)

        def held_here(*arguments: Any, **named: Any) -> Any:
            gate.wait_here()
            return inner(*arguments, **named)

        monkeypatch.setattr(owner, name, held_here if thread else held)

    match stage:
        case "asked":
            hold(FileArbiter, "read", thread=False)
        case "granted":
            compare_and_set = FileArbiter.compare_and_set

            async def granted(self: FileArbiter, expected: Record | None, wanted: Record) -> Answer:
                answer = await compare_and_set(self, expected, wanted)
                if wanted.owner == "b":
                    await gate.wait()
                return answer

            monkeypatch.setattr(FileArbiter, "compare_and_set", granted)
        case "remembered":
            hold(Durable, "write", thread=True)
        case "listener":
            hold(Listener, "close", thread=False)
        case "durable":
            hold(Image, "sync", thread=True)
        case "primary":
            hold(Primary, "_prepare_and_protect", thread=False)
        case _:
            backup.qmp.before[stage] = gate.wait
    return gate


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize(
    "stage",
    [
        "asked",
        "granted",
        "x-ft-load",
        "cont",
        "announce-self",
        "query-status",
        "remembered",
        "listener",
        "primary",
        "durable",
    ],
)
async def test_a_daemon_that_is_stopped_while_it_takes_over_stops_no_guest(
    backup: Backup, monkeypatch: pytest.MonkeyPatch, stage: str, signals: int
) -> None:
    """Once the arbiter may have granted it, nobody else will ever start that guest."""
    task = await backup.takes_over()
    gate = stop_at(backup, stage, monkeypatch)
    await gate.reached()
    for _ in range(signals):
        task.cancel()
        await asyncio.sleep(0.01)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backup.lives
    assert "cont" in backup.qmp.said
    assert not backup.qemu._child.followed  # let go of, not lost
    record = await backup.arbiter.read()
    assert record is not None
    assert (record.owner, record.generation, record.state) == ("b", WON, "solo")
    remembered = Durable(backup.config.node.state_folder).read()
    assert (remembered.generation, remembered.role) == (WON, "primary")
    note = backup.marker.read()
    assert note is not None
    if signals == 1:  # somebody who asks twice does not want to wait for a disk
        # The next daemon finds the guest, and marks what this one could not.
        assert note.worth is (Worth.ALONE if stage in ("durable", "primary") else Worth.COPY)


async def test_one_that_is_stopped_while_it_is_denied_ends_its_shadow(
    backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await backup.run(Record(generation=WON, owner="a", state="solo"))
    gate = stop_at(backup, "asked", monkeypatch)
    await gate.reached()
    task.cancel()
    await asyncio.sleep(0.01)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not backup.lives
    assert "cont" not in backup.qmp.said


async def test_what_goes_wrong_once_the_guest_runs_does_not_end_it(
    backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused() -> None:
        raise QemuError("QEMU refused announce-self")

    def full(*_: object) -> None:
        raise RuntimeError("a defect")

    backup.qmp.before["announce-self"] = backup.qmp.before["query-status"] = refused
    monkeypatch.setattr(Durable, "write", full)
    task = await backup.takes_over()
    with pytest.raises(RuntimeError, match="a defect"):
        await task
    assert backup.node._report.machine.state is PairState.TAKEN_OVER
    assert backup.lives


async def test_the_disks_are_made_durable_and_then_marked_while_the_guest_runs(
    backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk keeps nobody from anything: the node is a primary, and looks for a backup."""
    gate = stop_at(backup, "durable", monkeypatch)
    task = await backup.takes_over()
    await gate.reached()
    await backup.becomes(lambda: backup.node._primary is not None)
    assert backup.node._report.machine.state is PairState.TAKEN_OVER
    note = backup.marker.read()
    assert note is not None
    assert note.worth is Worth.COPY
    gate.open()
    await backup.becomes(lambda: (note := backup.marker.read()) is not None and note.worth is Worth.ALONE)
    await stop(task)
    assert backup.lives


@pytest.mark.parametrize("stage", ["announce-self", "query-status", "remembered", "durable"])
async def test_a_guest_that_ends_in_the_moment_in_which_it_was_taken_over_has_stopped(
    backup: Backup, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Rule S7: nobody has lost it, and its owner may start it again."""
    gate = stop_at(backup, stage, monkeypatch)
    task = await backup.takes_over()
    await gate.reached()
    backup.qmp.emit("SHUTDOWN", guest=True, reason="guest-shutdown")
    backup.process.terminate()
    await asyncio.to_thread(backup.process.wait)
    backup.qmp.lost_reason = "QEMU closed the connection"
    backup.qmp.lost.set()
    gate.open()
    assert await task == 0
    assert backup.node._report.machine.state is PairState.STOPPED
    record = await backup.arbiter.read()
    assert record == Record(generation=WON, owner="b", state="stopped", token=record.token if record else "")
    note = backup.marker.read()
    assert note is not None
    assert (note.worth, note.generation) == (Worth.ALONE, WON)


async def test_one_that_is_killed_instead_is_lost(backup: Backup, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = stop_at(backup, "query-status", monkeypatch)
    task = await backup.takes_over()
    await gate.reached()
    backup.process.kill()
    await asyncio.to_thread(backup.process.wait)
    backup.qmp.lost.set()
    gate.open()
    with pytest.raises(QemuDied, match="start the daemon again to have the guest boot"):
        await task


async def test_an_arbiter_that_was_gone_hears_that_a_person_gave_the_guest_to_this_node(
    backup: Backup,
) -> None:
    task = await backup.takes_over()
    with backup.arbiter_away():
        await backup.becomes(lambda: backup.node._report.machine.state is PairState.HELD)
        await backup.node.control("takeover", {"force": True})
        await backup.becomes(lambda: "arbiter_not_told" in backup.node._report.warning_names)
        assert "cont" in backup.qmp.said
    await backup.becomes(lambda: "arbiter_not_told" not in backup.node._report.warning_names)
    record = await backup.arbiter.read()
    assert record is not None
    assert (record.owner, record.state) == ("b", "solo")
    assert record.generation == backup.node._report.status().generation > GENERATION
    await stop(task)
    assert backup.lives


# ---- a daemon that is to be replaced meanwhile ------------------------------------------------------------


async def upgrade(backup: Backup, monkeypatch: pytest.MonkeyPatch) -> str:
    async def good() -> None: ...

    monkeypatch.setattr("ftd.succession.check", good)
    return await backup.node._upgrade()


@pytest.mark.parametrize("stage", ["asked", "granted", "cont", "remembered"])
async def test_a_daemon_is_not_replaced_while_it_takes_over(
    backup: Backup, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    gate = stop_at(backup, stage, monkeypatch)
    task = await backup.takes_over()
    await gate.reached()
    with pytest.raises(FtdError, match="the daemon is not replaced now: the shadow here may be all that is"):
        await upgrade(backup, monkeypatch)
    gate.open()
    await backup.becomes(lambda: backup.node._primary is not None)
    assert backup.lives
    await stop(task)


async def test_nor_while_it_is_held(backup: Backup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its primary is dead, and the arbiter out of reach: with the shadow, the guest would be gone."""
    task = await backup.takes_over()
    with backup.arbiter_away():
        await backup.becomes(lambda: backup.node._report.machine.state is PairState.HELD)
        with pytest.raises(FtdError, match=r"would be ended; this node is held \(the primary is lost"):
            await upgrade(backup, monkeypatch)
    await backup.becomes(lambda: backup.node._primary is not None)
    assert backup.lives
    await stop(task)
