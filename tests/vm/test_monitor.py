"""The monitor against a real QEMU, and against servers that misbehave as no QEMU does."""

import asyncio
import contextlib
import json
import logging
import os
from pathlib import Path

import pytest

from ftd.errors import QemuDied, QemuError
from ftd.monitor import Monitor

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}
}


@pytest.fixture
async def monitor(run_qemu):
    _, path = run_qemu("-machine", "pc", "-m", "16M")
    async with await Monitor.connect(path) as monitor:
        yield monitor


@pytest.fixture
async def serve(folder):
    """Serves a socket with the given coroutine (reader, writer) for every client."""
    path = folder / "fake.sock"
    async with contextlib.AsyncExitStack() as stack:

        async def start(behave):
            server = await asyncio.start_unix_server(behave, path)
            await stack.enter_async_context(server)
            return path

        yield start


def scripted(*replies: bytes, close: bool = False):
    """A QMP server that greets, answers the negotiation, and then each command with the next reply."""

    async def behave(reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(json.dumps(GREETING).encode() + b"\n")
            for reply in (None, *replies):
                # A request has no newline at its end; one at a time is sent here, so that one read gets it.
                request = json.loads(await reader.read(65536) or b"{}")
                if not request:
                    break
                answer = b'{"return": {}, "id": "ID"}' if reply is None else reply
                writer.write(
                    answer.replace(b"ID", request["id"].encode() if "id" in request else b"") + b"\n"
                )
                await writer.drain()
            if not close:
                await reader.read()
            writer.close()

    return behave


# ---- connecting -------------------------------------------------------------------------------------------


async def test_missing_socket(folder):
    with pytest.raises(QemuError, match=r"none\.sock: no such socket; is QEMU running"):
        await Monitor.connect(folder / "none.sock")


async def test_socket_without_a_listener(folder, run_qemu):
    process, path = run_qemu("-machine", "none")
    process.kill()
    process.wait()
    with pytest.raises(QemuError, match="no QEMU listens on this socket; it has ended"):
        await Monitor.connect(path)


async def test_garbage_server(serve):
    async def behave(_reader, writer):
        writer.write(b"220 mail.example.org ESMTP\r\n")
        await writer.drain()

    with pytest.raises(QemuError, match="does not speak QMP; give the path of a QMP socket"):
        await Monitor.connect(await serve(behave))


async def test_binary_garbage_server(serve):
    async def behave(_reader, writer):
        writer.write(b"\xff\xfe\x00\n")
        await writer.drain()

    with pytest.raises(QemuError, match="does not speak QMP"):
        await Monitor.connect(await serve(behave))


async def test_an_event_may_come_before_the_greeting(serve):
    """QEMU's main loop emits it, and another thread greets: it is connected to anew."""
    connections = 0

    async def behave(reader, writer):
        nonlocal connections
        connections += 1
        if connections == 1:
            writer.write(b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\n')
            await writer.drain()
        await scripted(b'{"return": 7, "id": "ID"}')(reader, writer)

    async with await Monitor.connect(await serve(behave)) as monitor:
        assert await monitor.execute("x") == 7
    assert connections == 2


async def test_silent_server(serve):
    async def behave(reader, _writer):
        await reader.read()

    with pytest.raises(QemuError, match=r"no QMP greeting within 0\.2 s; .* one client at a time"):
        await Monitor.connect(await serve(behave), timeout=0.2)


async def test_server_that_hangs_up(serve):
    async def behave(_reader, writer):
        writer.close()

    with pytest.raises(QemuDied, match="closed the connection before its greeting"):
        await Monitor.connect(await serve(behave))


async def test_server_that_hangs_up_when_the_session_is_up(serve):
    """What qemu.qmp takes for impossible, and a QEMU that is killed at that moment does."""

    async def behave(reader, writer):
        writer.write(b'{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}, ')
        writer.write(b'"capabilities": []}}\r\n')
        asked = json.loads(await reader.read(4096))
        writer.write(json.dumps({"return": {}, "id": asked.get("id")}).encode() + b"\r\n")
        writer.close()

    with pytest.raises(QemuDied, match="closed the connection after its greeting"):
        await Monitor.connect(await serve(behave))


async def test_second_client_waits_until_the_first_leaves(monitor):
    with pytest.raises(QemuError, match="one client at a time"):
        await Monitor.connect(monitor.path, timeout=0.2)
    await monitor.close()
    async with await Monitor.connect(monitor.path) as second:
        assert (await second.execute("query-status"))["running"] is False


# ---- commands ---------------------------------------------------------------------------------------------


async def test_underscores_become_dashes(monitor):
    answer = await monitor.execute("human-monitor-command", command_line="info status")
    assert "paused" in answer


async def test_refusal_carries_the_words_of_qemu(monitor):
    with pytest.raises(QemuError) as caught:
        await monitor.execute("qom-get", path="/none", property="x")
    assert caught.value.qmp_class == "DeviceNotFound"
    assert caught.value.description == "Device '/none' not found"
    assert str(caught.value) == "QEMU refused qom-get: Device '/none' not found"
    assert not isinstance(caught.value, QemuDied)


async def test_argument_that_json_cannot_hold_leaves_the_connection_up(monitor):
    with pytest.raises(TypeError):
        await monitor.execute("qom-get", path=b"/machine", property="type")
    assert (await monitor.execute("query-status"))["running"] is False


async def test_concurrent_commands_get_their_own_answers(monitor):
    properties = ["type", "usb", "graphics"] * 20
    answers = await asyncio.gather(
        *(monitor.execute("qom-get", path="/machine", property=name) for name in properties)
    )
    assert answers[:3] * 20 == answers
    assert answers[0].startswith("pc-i440fx")


async def test_cancelled_command_leaves_the_connection_usable(monitor, caplog):
    for _ in range(20):
        task = asyncio.create_task(monitor.execute("query-commands"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (await monitor.execute("query-status"))["running"] is False
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


async def test_large_answer(serve):
    text = b"x" * 20_000_000
    path = await serve(scripted(b'{"return": "%s", "id": "ID"}' % text))
    async with await Monitor.connect(path) as monitor:
        assert len(await monitor.execute("query-large")) == len(text)


async def test_malformed_reply_is_an_error_of_that_command_only(serve):
    path = await serve(scripted(b'{"surprise": 1, "id": "ID"}', b'{"return": 5, "id": "ID"}'))
    async with await Monitor.connect(path) as monitor:
        with pytest.raises(QemuError, match="answer to first is not QMP"):
            await monitor.execute("first")
        assert await monitor.execute("second") == 5


# ---- events -----------------------------------------------------------------------------------------------


async def test_events_arrive_before_the_answer_that_follows_them(monitor):
    seen = []
    remove = monitor.on("RESUME", lambda event: seen.append(event["event"]))
    monitor.on("*", lambda event: seen.append("any"))
    await monitor.execute("cont")
    assert seen == ["RESUME", "any"]
    remove()
    await monitor.execute("stop")
    await monitor.execute("cont")
    assert seen == ["RESUME", "any", "any", "any"]


async def test_failing_callback_hurts_nobody_else(monitor, caplog):
    seen = []
    monitor.on("RESUME", lambda event: 1 / 0)
    monitor.on("RESUME", seen.append)
    await monitor.execute("cont")
    assert len(seen) == 1
    assert "a callback for QEMU's event RESUME failed" in caplog.text
    await monitor.execute("query-status")


# ---- descriptors ------------------------------------------------------------------------------------------


async def test_descriptor_reaches_qemu(monitor):
    fd = os.memfd_create("ftd-test")
    try:
        inode = os.fstat(fd).st_ino
        await monitor.send_descriptor("slot0", fd)
        os.fstat(fd)  # stays open here
        assert inode in open_inodes(monitor.peer_pid)
        await monitor.execute("closefd", fdname="slot0")
        assert inode not in open_inodes(monitor.peer_pid)
        with pytest.raises(QemuError, match="'slot0' not found"):
            await monitor.execute("closefd", fdname="slot0")
    finally:
        os.close(fd)


async def test_concurrent_descriptors_keep_their_names(monitor):
    fds = [os.memfd_create(f"ftd-test{number}") for number in range(8)]
    try:
        await asyncio.gather(
            *(monitor.send_descriptor(f"slot{number}", fd) for number, fd in enumerate(fds)),
            *(monitor.execute("query-qmp-schema") for _ in range(4)),
        )
        assert {os.fstat(fd).st_ino for fd in fds} <= open_inodes(monitor.peer_pid)
        for number, fd in enumerate(fds):
            await monitor.execute("closefd", fdname=f"slot{number}")
            assert os.fstat(fd).st_ino not in open_inodes(monitor.peer_pid)
    finally:
        for fd in fds:
            os.close(fd)


async def test_closed_descriptor_is_named(monitor):
    fd = os.memfd_create("ftd-test")
    os.close(fd)
    with pytest.raises(QemuError, match=f"cannot give file descriptor {fd} to QEMU: bad file descriptor"):
        await monitor.send_descriptor("slot0", fd)
    await monitor.execute("query-status")


def open_inodes(pid: int) -> set[int]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(entry.stat().st_ino)
    return found


# ---- the end of the connection ----------------------------------------------------------------------------


async def test_death_of_qemu_is_noticed_at_once(run_qemu, caplog):
    process, path = run_qemu("-machine", "pc", "-m", "16M")
    monitor = await Monitor.connect(path)
    process.kill()
    await asyncio.wait_for(monitor.lost.wait(), 1)
    assert monitor.lost_reason == f"{path}: QEMU has ended, or closed its monitor"
    for attempt in (monitor.execute("query-status"), monitor.send_descriptor("slot0", 0)):
        with pytest.raises(QemuDied, match="QEMU has ended"):
            await attempt
    with pytest.raises(QemuDied):
        _ = monitor.peer_pid
    await monitor.close()
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


async def test_commands_under_way_end_with_the_connection(serve):
    path = await serve(scripted())
    monitor = await Monitor.connect(path)
    tasks = [asyncio.create_task(monitor.execute("never-answered")) for _ in range(3)]
    await asyncio.sleep(0)  # they have started
    await monitor.close()
    for task in tasks:
        with pytest.raises(QemuDied, match="never-answered: the monitor was closed by ftd"):
            await task


async def test_answer_and_end_together(serve):
    path = await serve(scripted(b'{"return": 1, "id": "ID"}', close=True))
    monitor = await Monitor.connect(path)
    assert await monitor.execute("quit") == 1
    await asyncio.wait_for(monitor.lost.wait(), 1)


@pytest.mark.parametrize(
    "garbage", [b"not json", b"[1]", b"\xff\xfe", b'{"error": {"class": "x", "desc": "y"}}']
)
async def test_garbage_in_the_middle_ends_the_connection(serve, garbage):
    monitor = await Monitor.connect(await serve(scripted(garbage)))
    with pytest.raises(QemuDied, match="sent what is not QMP"):
        await monitor.execute("query-status")
    assert "\n" not in monitor.lost_reason


async def test_closing_twice_is_harmless(monitor):
    await monitor.close()
    await monitor.close()
    assert monitor.lost.is_set()
