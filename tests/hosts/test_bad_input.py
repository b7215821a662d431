"""Whatever comes from a person, a file, a socket or a QEMU that is not as it should be: one clear line each.

A daemon that cannot go on ends with the exit code of the error's kind (ftd/errors.py); where a guest runs, it
runs on (rule S8).
"""

import asyncio
import fcntl
import json
import mmap
import os
import random
import socket
import struct
import termios
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from testbed.guarded import (
    assert_bare_guest_goes_on,
    bare_guest,
    metric,
    wait_committed,
    wait_ended,
    wait_log,
    wait_ready,
)
from testbed.namespaces import call_in_namespace
from testbed.pair import HTTP_PORT, Daemon, Pair, to_toml

import ftd
from ftd import link
from ftd.link import LinkOptions
from ftd.machine import MachineDescription
from ftd.messages import HeartbeatSettings, Hello
from ftd.monitor import Monitor
from ftd.tls import TlsFiles, load_identity
from ftd.wire import MessageType, encode_header

pytestmark = pytest.mark.root
StartPair = Callable[..., Any]

DATA_PORT, HEARTBEAT_PORT = 7788, 7789
GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}
}


def only_error(daemon: Daemon) -> str:
    """The one line that the daemon ended with."""
    lines = [line for line in daemon.logs().splitlines() if line.startswith("ftd: error: ")]
    assert len(lines) == 1, daemon.logs()
    return lines[0]


# ---- what a daemon cannot go on without -------------------------------------------------------------------


async def test_unpatched_qemu(make_pair: StartPair) -> None:
    """The QEMU is a stub that greets and has only QEMU's own commands: no unpatched one is at hand."""
    pair: Pair = await make_pair(await bare_guest())
    folder = pair.network.directory
    memory = folder / "guest.ram"
    memory.write_bytes(bytes(4096))
    answers = {
        "qmp_capabilities": {},
        "query-commands": [{"name": "stop"}, {"name": "cont"}],
        "qom-list": [{"name": "ram", "type": "child<memory-backend-file>"}],
    }

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        decoder, text = json.JSONDecoder(), ""
        while data := await reader.read(65536):
            text += data.decode()
            while text := text.lstrip():
                try:
                    request, end = decoder.raw_decode(text)
                except ValueError:
                    break
                text = text[end:]
                answer: Any = answers.get(request["execute"])
                if request["execute"] == "qom-get":
                    answer = True if request["arguments"]["property"] == "share" else str(memory)
                reply = {"return": answer, "id": request.get("id")}
                writer.write(json.dumps(reply).encode() + b"\n")
        writer.close()

    # The daemon takes only a process for QEMU that maps the guest's memory; here it is this one.
    with memory.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        async with await asyncio.start_unix_server(behave, folder / "qmp.sock"):
            tables = pair.configuration(pair.a, pair.b, "primary")
            tables["machine"]["attach"] = str(folder / "qmp.sock")
            pair.primary.config.write_text(to_toml(tables))
            await pair.primary.start()
            assert await wait_ended(pair.primary) == 4
    error = only_error(pair.primary)
    assert "this QEMU lacks ftd's patches" in error
    assert "scripts/build-qemu" in error


@pytest.mark.parametrize("role", ["primary", "backup"])
async def test_qemu_that_dies_at_its_start(make_pair: StartPair, role: str) -> None:
    guest = await bare_guest()
    pair: Pair = await make_pair(guest)
    daemon: Daemon = getattr(pair, role)
    tables = pair.configuration(pair.a, pair.b, role)
    tables["machine"]["arguments"] = ["-device", "nonsense"]
    daemon.config.write_text(to_toml(tables))
    await daemon.start()
    assert await wait_ended(daemon) == 4
    assert "'nonsense' is not a valid device model name" in only_error(daemon)


@pytest.mark.parametrize(
    ("port", "role"), [(DATA_PORT, "backup"), (HEARTBEAT_PORT, "backup"), (HTTP_PORT, "primary")]
)
async def test_port_in_use(make_pair: StartPair, port: int, role: str) -> None:
    """Nothing is left running by a daemon that has not got its port."""
    pair: Pair = await make_pair(await bare_guest())
    daemon: Daemon = getattr(pair, role)
    listener = call_in_namespace(daemon.host.namespace, socket.create_server, ("", port))
    with listener:
        await daemon.start()
        assert await wait_ended(daemon) == 3
    error = only_error(daemon)
    assert str(port) in error
    assert "in use" in error
    assert daemon.host.processes() == []


@pytest.mark.parametrize(
    ("table", "key", "value", "told"),
    [
        ("epoch", "lenght_ms", 20, "did you mean length_ms?"),
        ("epoch", "length_ms", "20", "[epoch] length_ms"),
        ("link", "certificate", "/nowhere/host.pem", "/nowhere/host.pem"),
        ("machine", "memory_path", "/nowhere", "/nowhere"),
    ],
)
async def test_wrong_configuration(
    make_pair: StartPair, table: str, key: str, value: object, told: str
) -> None:
    pair: Pair = await make_pair(await bare_guest())
    tables = pair.configuration(pair.a, pair.b, "primary")
    tables[table][key] = value
    pair.primary.config.write_text(to_toml(tables))
    await pair.primary.start()
    assert await wait_ended(pair.primary) == 2
    error = only_error(pair.primary)
    assert key in error
    assert told in error


async def test_missing_configuration(make_pair: StartPair) -> None:
    pair: Pair = await make_pair(await bare_guest())
    pair.primary.config.unlink()
    await pair.primary.start()
    assert await wait_ended(pair.primary) == 2
    assert "ftd.toml: no such file or directory" in only_error(pair.primary)


async def test_missing_qmp_socket(make_pair: StartPair) -> None:
    pair: Pair = await make_pair(await bare_guest())
    tables = pair.configuration(pair.a, pair.b, "primary")
    tables["machine"]["attach"] = "/nowhere/qmp.sock"
    pair.primary.config.write_text(to_toml(tables))
    await pair.primary.start()
    assert await wait_ended(pair.primary) == 4
    assert "/nowhere/qmp.sock: no such socket" in only_error(pair.primary)


# ---- peers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        pytest.param({"memory_mib": 96}, "memory: ", id="memory"),
        pytest.param({"vcpus": 2}, "vCPUs: ", id="vcpus"),
        pytest.param({"accelerator": "tcg"}, "accelerator: ", id="accelerator", marks=pytest.mark.kvm),
    ],
)
async def test_peer_with_another_machine(make_pair: StartPair, machine: dict[str, Any], told: str) -> None:
    """The guest runs on alone, and both sides name the difference."""
    pair: Pair = await make_pair(await bare_guest(), None, {"machine": {"dirty_ring_size": 0, **machine}})
    await pair.backup.start()
    await wait_ready(pair.backup)
    await pair.primary.start()
    status = await pair.primary.wait_state("solo")
    assert told in status["reason"]
    assert "here" in status["reason"]
    assert told in await wait_log(pair.primary, "no backup: the guest runs unprotected")
    assert told in await wait_log(pair.backup, "connection rejected")
    await assert_bare_guest_goes_on(pair.primary)
    assert pair.primary.logs().count("no backup: the guest runs unprotected") == 1


def garbage(seed: int) -> list[bytes]:
    """What may come to a port: noise, another protocol, the beginnings of ours and of TLS."""
    chance = random.Random(seed)
    print(f"garbage of seed {seed}")
    return [
        b"",
        b"GET / HTTP/1.1\r\nHost: ftd\r\n\r\n",
        chance.randbytes(5000),
        b"\x16\x03\x01\x02\x00" + chance.randbytes(512),
        encode_header(MessageType.HANDSHAKE, 0, 100)[:20],
        b"FTDM" + chance.randbytes(60),
    ]


async def test_garbage_on_both_ports_while_protected(start_pair: StartPair) -> None:
    """Not one epoch is disturbed by it; every connection is counted and answered for."""
    pair: Pair = await start_pair(await bare_guest())
    before = await pair.primary.status()
    sent = 0
    for port in (DATA_PORT, HEARTBEAT_PORT):
        for data in garbage(seed=port):
            connection = await asyncio.to_thread(
                call_in_namespace,
                pair.a.namespace,
                socket.create_connection,
                (pair.b.link_address, port),
            )
            with connection:
                connection.sendall(data)
                sent += 1

    async def rejected() -> float:
        metrics = await pair.backup.metrics()
        name = "ftd_link_rejected_connections_total"
        return sum(value for (metric_name, _), value in metrics.items() if metric_name == name)

    async with asyncio.timeout(20):
        while await rejected() < sent:  # noqa: ASYNC110 - the daemon is asked from outside
            await asyncio.sleep(0.02)
    assert await rejected() == sent
    await wait_committed(pair.primary, 10)
    for daemon in (pair.primary, pair.backup):
        assert (await daemon.status())["state"] == "protected"
        assert await metric(daemon, "ftd_syncs_completed_total") == 1
    assert (await pair.primary.status())["epoch"]["aborted"] == before["epoch"]["aborted"]
    await assert_bare_guest_goes_on(pair.primary)


async def connect_as_primary(pair: Pair, description: dict[str, Any]) -> link.Session:
    """A session with the backup, as the primary's daemon begins it, with the primary's certificate."""
    tls = pair.network.directory / "tls"
    identity = load_identity(TlsFiles(tls / f"{pair.a.name}.pem", tls / f"{pair.a.name}.key", tls / "ca.pem"))
    beat = HeartbeatSettings(interval_ms=100, misses=12)
    hello = Hello(
        software_version=ftd.__version__,
        node=pair.a.name,
        session=uuid.uuid4(),
        generation=1,
        epoch_ms=20,
        heartbeat=beat,
        description=description,
    )
    return await link.connect(
        LinkOptions(identity=identity, heartbeat=beat),
        hello,
        host=pair.b.link_address,
        port=DATA_PORT,
        heartbeat_port=HEARTBEAT_PORT,
    )


def unacknowledged_bytes(connection: socket.socket) -> int:
    """What has not arrived in the peer's kernel yet."""
    answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    return struct.unpack("i", answer)[0]


def run_in_namespace(pair: Pair, work: Callable[[], Any]) -> Any:
    """Run a coroutine in a loop and a thread of their own on the primary's host."""
    return call_in_namespace(pair.a.namespace, lambda: asyncio.run(work()))


async def test_a_device_that_was_plugged_in_while_nothing_protected_the_guest(make_pair: StartPair) -> None:
    """It is in no machine that the backup has; while the guest is protected, QEMU refuses it."""
    pair: Pair = await make_pair(await bare_guest())
    await pair.primary.start()
    await pair.primary.wait_state("solo", 20)
    device = {"driver": "virtio-balloon-pci", "id": "late"}
    async with await Monitor.connect(pair.primary.run_dir / "operator.sock") as operator:
        await operator.execute("device_add", **device)
        await pair.backup.start()
        await wait_log(
            pair.primary, r"no backup: .* device id late: absent here, virtio-balloon-pci on the peer"
        )
        assert (await pair.primary.status())["state"] == "solo"


async def test_peer_that_ends_in_the_middle_of_a_frame(make_pair: StartPair) -> None:
    """A primary of this test's own sends half a part, then no more, and dies: the shadow is as before."""
    pair: Pair = await make_pair(await bare_guest())
    await pair.backup.start()
    await wait_ready(pair.backup)
    (memory,) = pair.backup.host.memory_directory.glob("*.ram")
    blocks_before = memory.stat().st_blocks
    async with await Monitor.connect(pair.backup.run_dir / "operator.sock") as operator:
        description = (await MachineDescription.of(operator)).model_dump(mode="json")

    async def be_half_a_primary() -> None:
        session = await connect_as_primary(pair, description)
        half = os.urandom(1 << 20)
        # The header says twice what comes; the rest of the part is what the thread never gets to send.
        raw = session._frames._socket
        raw.setblocking(True)
        raw.sendall(encode_header(MessageType.PART, session._frames._next_out, 2 * len(half)) + half)
        async with asyncio.timeout(20):
            while unacknowledged_bytes(raw):  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.01)
        assert session.lost is None
        session.abort("as if killed")

    await asyncio.to_thread(run_in_namespace, pair, be_half_a_primary)
    status = await pair.backup.wait_status(
        "back to waiting",
        lambda status: status["state"] == "waiting" and "lost" in status["reason"],
        30,
    )
    assert "the first sync is not complete" in status["reason"]
    assert status["takeover"] is None
    assert memory.stat().st_blocks == blocks_before
    # And it is good for a real one.
    await pair.primary.start()
    await pair.wait_protected()
    await assert_bare_guest_goes_on(pair.primary)
