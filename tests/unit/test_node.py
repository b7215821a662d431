"""What a daemon finds at its start."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from unit import sample

from ftd import node as node_module
from ftd.arbiter import Record
from ftd.authority import Start
from ftd.config import Config, load
from ftd.durable import Durable, Memory
from ftd.errors import HostError
from ftd.http import Server
from ftd.marker import Marker, Worth, mark
from ftd.node import Found, Node, _find
from ftd.state import Role
from ftd.succession import Handed, HandedBackup, HandedPrimary


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(sample.write(tmp_path, own='run_dir = "run"'))


def ended(words: str) -> int:
    """A process of ours that has ended and was not waited for, as a QEMU after execve."""
    process = subprocess.Popen([sys.executable, "-c", words])
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    process.returncode = 0  # this object is not to wait for it
    return process.pid


def handed(qemu: int, *, role: str = "primary") -> Handed:
    # Descriptors that are not open: closing them is tried, and does no harm.
    slots = HandedPrimary(paired_with="b", slots=[9001], slot_bytes=4096, slot_pages=1, release=9002)
    return Handed(
        node="a",
        pid=1,
        qemu_pid=qemu,
        generation=3,
        epoch=4,
        peer_node="b",
        began=0,
        deadline=5,
        primary=slots if role == "primary" else None,
        backup=HandedBackup(image=9001) if role == "backup" else None,
    )


@pytest.mark.parametrize(
    ("words", "wanted"), [("pass", True), ("import os; os.abort()", False), ("raise SystemExit(1)", False)]
)
async def test_a_guest_that_ended_while_its_daemon_was_replaced(
    config: Config, words: str, wanted: bool
) -> None:
    """With success: it has ended by itself, which is no failure (rule S7). Else QEMU is lost."""
    qemu = ended(words)
    found = await _find(config, handed(qemu))
    assert (found.role, found.qemu, found.handed, found.ended) == ("primary", None, None, wanted)
    assert f"QEMU (process {qemu}) ended while the daemon was replaced" in str(found.lost)
    with pytest.raises(ProcessLookupError):
        os.kill(qemu, 0)  # it was waited for


async def test_a_shadow_that_ended_meanwhile_is_made_anew(config: Config) -> None:
    found = await _find(config, handed(ended("pass"), role="backup"))
    assert (found.role, found.lost, found.ended) == ("primary", None, False)


async def test_a_daemon_that_finds_nothing_is_what_is_configured(config: Config) -> None:
    assert (await _find(config, None)).role == "primary"


# ---- who may start the guest ------------------------------------------------------------------------------


@pytest.fixture
def arbitrated(tmp_path: Path) -> Config:
    """A node with a disk, and an arbiter in a folder."""
    (tmp_path / "records").mkdir()
    (tmp_path / "disk.img").touch()
    own, disk = 'run_dir = "run"\nstate_dir = "state"', '[[machine.disk]]\npath = "disk.img"\n'
    return load(sample.write(tmp_path, own=own, arbiter=sample.FILE_ARBITER, more=disk))


def marked(config: Config, worth: Worth, generation: int) -> None:
    disks = [Marker(disk.path, config.node.state_folder) for disk in config.machine.disk]
    mark(disks, worth, generation, "a")


@pytest.mark.parametrize(
    ("worth", "forced", "why"),
    [
        (Worth.COPY, False, "it is a backup's copy, which is started by taking over"),
        (Worth.COPY, True, "it is a backup's copy, which is started by taking over"),
        (Worth.SYNCING, False, "it is the target of a copy that is not complete"),
        (Worth.SYNCING, True, "it is the target of a copy that is not complete"),
        (Worth.REPLICATED, False, "it had a backup, which may have taken over"),
    ],
)
async def test_a_disk_that_is_not_to_be_started_from_costs_no_generation(
    arbitrated: Config, worth: Worth, forced: bool, why: str
) -> None:
    """However often the supervisor starts the daemon again."""
    record = Record(generation=6, owner="a", state="solo")
    assert (await Node(arbitrated, Found("primary"))._inquiry.arbiter.compare_and_set(None, record)).won
    marked(arbitrated, worth, 7)
    for _ in range(3):
        node = Node(arbitrated, Found("primary"))
        if forced:
            assert await node.control("takeover", {})
        with pytest.raises(HostError, match=f"disk .*disk.img: {why} "):
            await node._live(node._link_options())
        assert await node._inquiry.arbiter.read() == record


@pytest.mark.parametrize(("generation", "forced"), [(6, False), (7, True)])
async def test_one_that_may_be_started_from_has_the_guest_won(
    arbitrated: Config, generation: int, forced: bool
) -> None:
    """The record settles that nobody has taken over from this node in that generation, or a person does."""
    marked(arbitrated, Worth.REPLICATED, generation)
    node = Node(arbitrated, Found("primary"))
    record = Record(generation=6, owner="a", state="solo")
    assert (await node._inquiry.arbiter.compare_and_set(None, record)).won
    if forced:
        assert await node.control("takeover", {})
    won = await node._win(Start.BOOT)
    assert won is not None
    assert won == (await node._inquiry.arbiter.read(), generation)
    assert won[0].generation == 7


# ---- what is remembered -----------------------------------------------------------------------------------


async def test_the_event_loop_does_not_wait_for_what_is_remembered(
    arbitrated: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that is busy with a copy can take seconds, and heartbeats go on."""
    node = Node(arbitrated, Found("backup"))
    loop, busy, free = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    fsync = os.fsync

    def slow(fd: int) -> None:
        loop.call_soon_threadsafe(busy.set)
        assert free.wait(10)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    work = asyncio.create_task(node._remember(7, "backup"))
    await busy.wait()  # in the loop, which goes on
    assert not work.done()
    free.set()
    await work
    kept = Durable(arbitrated.node.state_folder).read()
    assert kept == Memory(generation=7, role="backup", arbiter=node._arbiter)
    node._report.flight.close()


async def test_what_is_there_already_is_not_written_again(
    arbitrated: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a session that goes on after a daemon was replaced does not wait for a disk."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    expected = 0
    for generation, role, writes in ((3, "backup", True), (3, "backup", False), (4, "backup", True)):
        node = Node(arbitrated, Found("backup"))
        await node._remember(generation, cast(Role, role))
        await node._remember(generation, cast(Role, role))
        expected += 2 * writes  # the file, and its folder
        assert len(synced) == expected
        node._report.flight.close()
    node._remember_at_once(4)
    assert len(synced) == expected + 2
    assert Durable(arbitrated.node.state_folder).read().role == "primary"


# ---- a daemon that goes on with another's protection ------------------------------------------------------


@pytest.fixture
def successor(tmp_path: Path) -> Iterator[Node]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = 'run_dir = "run"\nstate_dir = "state"'
    config = load(sample.write(tmp_path, own=own, more=f"[http]\nport = {port}\n"))
    node = Node(config, Found("primary", handed=handed(1)))
    yield node
    node._report.flight.close()


async def answers(node: Node) -> bool:
    port = node._config.http.port
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return b"200" in line


async def test_http_is_served_once_output_does_not_wait_for_that(
    successor: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "SERVE_AFTER_SECONDS", 3600)
    begun = []
    serve = successor._serve

    async def noted() -> Server:
        begun.append(True)
        return await serve()

    monkeypatch.setattr(successor, "_serve", noted)
    serving = asyncio.create_task(successor._serve_later())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not begun
    assert not await answers(successor)
    successor._report.resumed(5, 0.5)
    await serving
    assert await answers(successor)
    assert successor._server is not None
    await successor._server.close()


async def test_http_is_served_although_protection_does_not_go_on_and_when_its_port_is_free_again(
    successor: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_module, "SERVE_AFTER_SECONDS", 0)
    monkeypatch.setattr(node_module, "ASK_AGAIN_SECONDS", 0.01)
    with socket.socket() as other:
        other.bind(("127.0.0.1", successor._config.http.port))
        other.listen()
        serving = asyncio.create_task(successor._serve_later())
        async with asyncio.timeout(30):
            while "HTTP is not served; trying again" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    await serving
    assert await answers(successor)
    assert caplog.text.count("HTTP is not served") == 1
    assert successor._server is not None
    await successor._server.close()


def test_what_output_waits_for_is_not_more_than_it_needs(tmp_path: Path) -> None:
    """A daemon that takes another's place imports this before it reaches its peer, an arbiter included."""
    words = """
import sys
from pathlib import Path
from ftd import cli, config, node, succession
from ftd.arbiters import open_arbiter
settings = {"kind": "etcd", "pair": "web", "endpoints": ["http://127.0.0.1:2379"]}
open_arbiter(config.Arbiter.model_validate(settings, strict=False))
print(*sorted({"aiohttp", "rich", "ftd.http", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout == "numpy\n"
