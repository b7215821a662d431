"""The link over real sockets on the loopback interface, with real TLS and without."""

import asyncio
import logging
import re
import socket
import ssl
import subprocess
import threading
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import trustme

from ftd import tls
from ftd.channel import Channel
from ftd.detector import Verdict
from ftd.errors import ConfigError, HostError, LinkError, NothingToResume, PeerError
from ftd.link import LinkLost, LinkOptions, Listener, LostKind, Session, connect
from ftd.messages import (
    Ack,
    Goodbye,
    GuestStopped,
    Heartbeat,
    HeartbeatSettings,
    Hello,
    Refusal,
    Resume,
    Welcome,
    encode,
)
from ftd.wire import HEADER_SIZE, PROTOCOL_VERSION, MessageType, encode_header

HOST = "127.0.0.1"
# Long enough that a busy test machine is not taken for a dead peer.
PATIENT = HeartbeatSettings(interval_ms=50, misses=100)
QUICK = HeartbeatSettings(interval_ms=20, misses=5)
SOON = 10.0  # a limit for what has to happen, never a time that is waited out


def write_identity(directory, authority, certificate, key=None):
    directory.mkdir()
    files = tls.TlsFiles(directory / "cert.pem", directory / "key.pem", directory / "ca.pem")
    files.certificate.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    (key or certificate).private_key_pem.write_to_path(files.key)
    files.key.chmod(0o600)
    authority.cert_pem.write_to_path(files.authority)
    return files


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture(scope="session")
def identity_files(authority, tmp_path_factory):
    return write_identity(tmp_path_factory.mktemp("tls") / "own", authority, authority.issue_cert(HOST, "a"))


@pytest.fixture(scope="session")
def identity(identity_files):
    return tls.load_identity(identity_files)


@pytest.fixture(params=["tls", "plain"])
def options(request, identity):
    return LinkOptions(identity=identity if request.param == "tls" else None, heartbeat=PATIENT)


@pytest.fixture
def tls_options(identity):
    return LinkOptions(identity=identity, heartbeat=PATIENT)


def hello(**changes):
    fields = {
        "software_version": "0.1",
        "node": "a",
        "session": uuid4(),
        "generation": 3,
        "epoch_ms": 20,
        "heartbeat": PATIENT,
    }
    return Hello(**(fields | changes))


def admit(_hello, heartbeat=PATIENT):
    return Welcome(software_version="0.1", node="b", generation=3, heartbeat=heartbeat)


class Backup:
    """A listener, what it delivered and what it rejected."""

    def __init__(self, options, **changes):
        self.sessions = asyncio.Queue()
        self.rejected = asyncio.Queue()
        self.options = options
        self.listener = Listener(
            options,
            **(
                {
                    "host": HOST,
                    "port": 0,
                    "heartbeat_port": 0,
                    "peer_name": HOST,
                    "admit": admit,
                    "on_session": self.sessions.put_nowait,
                    "on_rejected": self.rejected.put_nowait,
                }
                | changes
            ),
        )

    async def connect(self, hello_=None, options=None, **changes):
        port, heartbeat_port = self.listener.ports
        target = {"host": HOST, "port": port, "heartbeat_port": heartbeat_port} | changes
        return await connect(options or self.options, hello_ or hello(), **target)

    async def next_session(self):
        return await asyncio.wait_for(self.sessions.get(), SOON)

    async def next_rejected(self):
        return await asyncio.wait_for(self.rejected.get(), SOON)

    async def raw(self, port=0):
        """A connection that does nothing by itself."""
        reader, writer = await asyncio.open_connection(HOST, self.listener.ports[port])
        return reader, writer


@asynccontextmanager
async def listening(options, **changes):
    backup = Backup(options, **changes)
    await backup.listener.start()
    try:
        yield backup
    finally:
        for session in backup.listener.sessions:
            session.abort("test is over")
        await backup.listener.close()


@asynccontextmanager
async def connected(options, hello_=None, **changes):
    async with listening(options, **changes) as backup:
        primary = await backup.connect(hello_)
        try:
            yield primary, await backup.next_session()
        finally:
            primary.abort("test is over")


async def lost(session):
    return await asyncio.wait_for(session.wait_lost(), SOON)


async def in_thread(function, *arguments):
    """Like asyncio.to_thread, but a thread that never returns fails its test and does not hang the run."""
    loop = asyncio.get_running_loop()
    outcome = loop.create_future()

    def settle(setter, value):
        if not outcome.done():
            setter(value)

    def run():
        try:
            setter, value = outcome.set_result, function(*arguments)
        except BaseException as error:
            setter, value = outcome.set_exception, error
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, setter, value)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wait_for(outcome, SOON)


async def until(condition):
    """Let the event loop turn until something has come about."""

    async def turn():
        # The conditions are plain attributes of the tested code, which sets no event for them.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)

    await asyncio.wait_for(turn(), SOON)


def allocate(length):
    return memoryview(bytearray(length))


def gate():
    """An allocate callback, an event that says it was called, and the sizes asked for."""
    called = threading.Event()
    sizes = []

    def allocate_and_tell(length):
        sizes.append(length)
        called.set()
        return memoryview(bytearray(length))

    return allocate_and_tell, called, sizes


# ---- the good case -----------------------------------------------------------------------------------------


async def test_messages_go_both_ways_in_order(options):
    async with connected(options) as (primary, backup):
        assert primary.id == backup.id
        assert (primary.peer_node, backup.peer_node) == ("b", "a")
        for epoch in range(100):
            await backup.send(Ack(generation=3, epoch=epoch, part_count=1, bytes=epoch))
        for epoch in range(100):
            message = await asyncio.wait_for(primary.receive(), SOON)
            assert message == Ack(generation=3, epoch=epoch, part_count=1, bytes=epoch)
        await primary.send(GuestStopped(reason="shutdown"))
        assert await asyncio.wait_for(backup.receive(), SOON) == GuestStopped(reason="shutdown")


async def test_parts_arrive_whole_and_in_order(options):
    async with connected(options) as (primary, backup):
        parts = [[b"h" * 4096, b"", b"x" * 7, bytes(range(256)) * size, b"tail"] for size in (0, 1, 40_000)]
        sent = asyncio.gather(
            *[in_thread(primary.send_part, [memoryview(view) for view in parts[0]])], return_exceptions=False
        )
        assert bytes(await in_thread(backup.receive_part, allocate)) == b"".join(parts[0])
        await sent
        for part in parts[1:]:
            sending = asyncio.create_task(in_thread(primary.send_part, [memoryview(view) for view in part]))
            assert bytes(await in_thread(backup.receive_part, allocate)) == b"".join(part)
            assert await sending == len(b"".join(part))
        total = sum(len(b"".join(part)) + HEADER_SIZE for part in parts)
        assert primary.traffic()["frames"] == (total, 0)
        assert backup.traffic()["frames"] == (0, total)


async def test_a_part_is_received_into_the_buffer_that_was_given(options):
    async with connected(options) as (primary, backup):
        pool = memoryview(bytearray(10_000))
        sending = asyncio.create_task(in_thread(primary.send_part, [memoryview(b"abc" * 1000)]))
        part = await in_thread(backup.receive_part, lambda length: pool)
        await sending
        assert len(part) == 3000
        assert pool[:3000] == b"abc" * 1000
        assert part.obj is pool.obj


async def test_acks_may_be_posted_from_a_thread(options):
    async with connected(options) as (primary, backup):
        ack = Ack(generation=3, epoch=1, part_count=1, bytes=1)
        await in_thread(backup.post, ack)
        assert await asyncio.wait_for(primary.receive(), SOON) == ack
        backup.abort("gone")
        await in_thread(backup.post, ack)


async def test_heartbeats_carry_state_and_epoch(options):
    async with connected(options) as (primary, backup):
        primary.set_beat("protected", 42)
        await until(lambda: backup.peer_epoch == 42)
        assert backup.peer_state == "protected"
        assert backup.heartbeat_age < SOON
        assert backup.verdict is Verdict.ALIVE


async def test_a_new_session_follows_one_that_ended(options):
    async with listening(options) as backup:
        for _ in range(3):
            primary = await backup.connect()
            session = await backup.next_session()
            await primary.close("next")
            assert (await lost(session)).kind is LostKind.GOODBYE
        assert backup.listener.sessions == ()


async def test_two_sessions_do_not_mix(options):
    async with listening(replace(options, max_sessions=2)) as backup:
        pairs = [(await backup.connect(), await backup.next_session()) for _ in range(2)]
        for number, (primary, session) in enumerate(pairs):
            assert primary.id == session.id
            await primary.send(GuestStopped(reason=str(number)))
        for number, (primary, session) in enumerate(pairs):
            assert await asyncio.wait_for(session.receive(), SOON) == GuestStopped(reason=str(number))
            primary.abort("done")


# ---- how it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["primary", "backup"])
async def test_goodbye_is_told_with_its_reason(options, who):
    async with connected(options) as pair:
        leaving, staying = pair if who == "primary" else reversed(pair)
        await leaving.close("planned stop")
        reason = await lost(staying)
        assert (reason.kind, reason.detail, reason.planned) == (LostKind.GOODBYE, "planned stop", True)
        assert (await lost(leaving)).kind is LostKind.CLOSED
        with pytest.raises(LinkLost, match="planned stop"):
            await staying.receive()
        with pytest.raises(LinkLost):
            await leaving.send(Goodbye(reason="again"))
        await leaving.close("twice is harmless")


@pytest.mark.parametrize("who", ["primary", "backup"])
async def test_a_death_is_a_reset_and_known_at_once(options, who):
    async with connected(options) as pair:
        dying, living = pair if who == "primary" else reversed(pair)
        dying.abort("killed")
        reason = await lost(living)
        assert reason.kind is LostKind.RESET
        assert not reason.planned
        assert reason.last_heard_ns <= reason.decided_ns
        assert "without a goodbye" in reason.detail or "reset" in reason.detail


async def test_what_was_said_before_the_death_is_still_heard(options):
    async with connected(options) as (primary, backup):
        await primary.send(GuestStopped(reason="shutdown"))
        primary.abort("killed")
        assert (await lost(backup)).kind is LostKind.RESET
        assert await backup.receive() == GuestStopped(reason="shutdown")
        with pytest.raises(LinkLost) as caught:
            await backup.receive()
        assert caught.value.kind is LostKind.RESET


async def test_control_decides_when_another_connection_ends_first(options):
    # Heartbeat says goodbye first; what control still has to say counts.
    async with connected(options) as (primary, backup):
        primary._heartbeat.write(MessageType.HEARTBEAT, encode(Goodbye(reason="stop")))
        await primary.send(GuestStopped(reason="shutdown"))
        primary._control.write(MessageType.CONTROL, encode(Goodbye(reason="stop")))
        reason = await lost(backup)
        assert (reason.kind, reason.connection) == (LostKind.GOODBYE, "control")
        assert await backup.receive() == GuestStopped(reason="shutdown")


@pytest.mark.parametrize("connection", ["heartbeat", "frames"])
async def test_one_connection_alone_ends_the_session_after_the_grace(options, connection):
    async with connected(replace(options, grace_seconds=0.01)) as (primary, backup):
        receiving = asyncio.create_task(in_thread(backup.receive_part, allocate))
        if connection == "heartbeat":
            primary._heartbeat.close()
        else:
            primary._frames.shut()
        reason = await lost(backup)
        assert (reason.kind, reason.connection) == (LostKind.RESET, connection)
        with pytest.raises(LinkLost):
            await receiving


async def test_silence_is_found_by_the_detector(options):
    async with connected(options, hello(heartbeat=QUICK), admit=lambda h: admit(h, QUICK)) as pair:
        primary, backup = pair
        # The peer's connections stay open and say nothing more.
        primary._pulse.stop()
        reason = await lost(backup)
        assert reason.kind is LostKind.SILENCE
        assert "limit 100 ms" in reason.detail
        assert reason.decided_ns - reason.last_heard_ns >= 100_000_000
        assert backup.verdict is Verdict.SILENT


async def test_a_heartbeat_that_does_not_come_is_told_before_anybody_is_lost(options):
    slow = HeartbeatSettings(interval_ms=20, misses=100)
    async with connected(options, hello(heartbeat=slow), admit=lambda h: admit(h, slow)) as (primary, backup):
        missed, before = [], backup.heartbeats_missed
        backup.on_missed = lambda: missed.append(1)
        primary._pulse.stop()
        await until(lambda: missed)
        assert backup.lost is None
        assert backup.heartbeats_missed == before + 1
        # The same silence is told of once; the next one, again.
        await primary.send(Ack(generation=3, epoch=1, part_count=1, bytes=1))
        await until(lambda: len(missed) == 2)


async def test_our_own_lateness_is_told_and_accuses_nobody(options):
    late = []
    settings = {"admit": lambda h: admit(h, QUICK), "on_lateness": late.append}
    async with connected(options, hello(heartbeat=QUICK), **settings) as (primary, backup):
        # The whole process stands still for longer than the limit, with the loop blocked.
        threading.Event().wait(0.3)
        await until(lambda: any(seconds > 0.2 for seconds in late))
        assert backup.lost is None
        assert primary.lost is None


@pytest.mark.parametrize("how", ["reset", "silence"])
async def test_a_loss_found_after_our_own_lateness_tells_of_it(options, how):
    """A backup without an arbiter then does not take over: the primary may have gone on alone meanwhile."""
    async with connected(options, hello(heartbeat=QUICK), admit=lambda h: admit(h, QUICK)) as pair:
        primary, backup = pair
        if how == "silence":
            primary._pulse.stop()
        threading.Event().wait(0.3)
        if how == "reset":
            # What the peer's kernel says to the first word of a side that woke comes after some ticks.
            for _ in range(2):
                before = backup._pulse.detector._last_tick_ns
                await until(lambda before=before: backup._pulse.detector._last_tick_ns > before)
            primary.abort("killed")
        reason = await lost(backup)
        assert reason.kind is (LostKind.RESET if how == "reset" else LostKind.SILENCE)
        assert reason.stood_still_ns > 100_000_000


@pytest.mark.parametrize("garbage", [b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n" * 4, encode_header(1, 1, 0)])
@pytest.mark.parametrize("connection", ["control", "heartbeat", "frames"])
async def test_garbage_after_the_handshake_is_a_protocol_error(options, connection, garbage):
    async with connected(options) as (primary, backup):
        receiving = asyncio.create_task(in_thread(backup.receive_part, allocate))
        getattr(primary, f"_{connection}")._socket.send(garbage)
        reason = await lost(backup)
        assert (reason.kind, reason.connection) == (LostKind.PROTOCOL, connection)
        with pytest.raises(LinkLost):
            await receiving


@pytest.mark.parametrize("step", [0, 2], ids=["repeated", "skipped"])
async def test_a_gap_in_the_sequence_is_a_protocol_error(options, step):
    async with connected(options) as (primary, backup):
        ack = encode(Ack(generation=3, epoch=1, part_count=1, bytes=1))
        primary._control._next_out += step - 1
        primary._control.write(MessageType.CONTROL, ack)
        reason = await lost(backup)
        assert reason.kind is LostKind.PROTOCOL
        assert "lost, repeated or reordered" in reason.detail


async def test_a_heartbeat_with_a_wrong_number_is_a_protocol_error(options):
    async with connected(options) as (primary, backup):
        beat = Heartbeat(sequence=10**6, sent_ns=1, state="x", epoch=0)
        primary._heartbeat.write(MessageType.HEARTBEAT, encode(beat))
        reason = await lost(backup)
        assert reason.kind is LostKind.PROTOCOL
        assert "heartbeat 1000000, expected" in reason.detail


# ---- parts that do not arrive ------------------------------------------------------------------------------


async def test_a_part_that_is_not_completed_is_never_delivered(options):
    async with connected(options) as (primary, backup):
        allocate_, called, sizes = gate()
        receiving = asyncio.create_task(in_thread(backup.receive_part, allocate_))
        primary._frames._socket.setblocking(True)
        primary._frames._socket.sendall(
            encode_header(MessageType.PART, primary._frames._next_out, 100_000) + b"x" * 60_000
        )
        await in_thread(called.wait)
        primary.abort("killed in the middle")
        with pytest.raises(LinkLost) as caught:
            await receiving
        assert sizes == [100_000]
        # Which of the two notices first, the thread or the loop, is a matter of luck.
        assert caught.value.kind in (LostKind.RESET, LostKind.CLOSED)
        assert (await lost(backup)).kind is LostKind.RESET


async def test_a_part_that_stands_still_is_given_up(options):
    async with connected(replace(options, stall_seconds=0.05)) as (primary, backup):
        primary._frames._socket.setblocking(True)
        primary._frames._socket.sendall(
            encode_header(MessageType.PART, primary._frames._next_out, 100_000) + b"x" * 10
        )
        with pytest.raises(LinkLost) as caught:
            await in_thread(backup.receive_part, allocate)
        assert caught.value.kind is LostKind.STALLED
        assert (await lost(backup)).kind is LostKind.STALLED


async def test_a_part_that_is_too_large_is_refused_before_any_memory_is_taken(options):
    async with listening(replace(options, max_part_bytes=1000)) as backup:
        primary = await backup.connect(options=options)
        session = await backup.next_session()
        allocate_, _, sizes = gate()
        receiving = asyncio.create_task(in_thread(session.receive_part, allocate_))
        with suppress(LinkLost):
            await in_thread(primary.send_part, [memoryview(bytes(1001))])
        with pytest.raises(LinkLost, match="at most 1000 are allowed"):
            await receiving
        assert sizes == []
        assert (await lost(session)).kind is LostKind.PROTOCOL
        primary.abort("done")


async def test_a_receiver_that_refuses_a_part_ends_the_session(options):
    class NoRoomError(Exception):
        pass

    def refuse(_length):
        raise NoRoomError("no room")

    async with connected(options) as (primary, backup):
        receiving = asyncio.create_task(in_thread(backup.receive_part, refuse))
        await in_thread(primary.send_part, [memoryview(b"x" * 10)])
        with pytest.raises(NoRoomError):
            await receiving
        reason = await lost(backup)
        assert reason.kind is LostKind.PROTOCOL
        assert "no room" in reason.detail
        with pytest.raises(LinkLost):
            await in_thread(backup.receive_part, allocate)


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_sender_that_is_blocked_is_woken_by_the_close(options, how):
    async with connected(options) as (primary, _backup):
        # Nobody receives: the sockets fill up, and the sender stands.
        sending = asyncio.create_task(in_thread(primary.send_part, [memoryview(bytes(64 << 20))]))
        await until(lambda: primary._frames._busy)
        if how == "close":
            await primary.close("stop")
        else:
            primary.abort("stop")
        with pytest.raises(LinkLost) as caught:
            await sending
        assert caught.value.kind is LostKind.CLOSED
        assert primary._frames._socket.fileno() == -1


async def test_a_receiver_that_waits_is_woken_by_the_close(options):
    async with connected(options) as (_primary, backup):
        receiving = asyncio.create_task(in_thread(backup.receive_part, allocate))
        await until(lambda: backup._frames._busy)
        backup.abort("stop")
        with pytest.raises(LinkLost) as caught:
            await receiving
        assert caught.value.kind is LostKind.CLOSED


async def test_heartbeats_do_not_wait_behind_a_frame_that_is_stuck(options):
    async with connected(options, hello(heartbeat=QUICK), admit=lambda h: admit(h, QUICK)) as pair:
        primary, backup = pair
        sending = asyncio.create_task(in_thread(primary.send_part, [memoryview(bytes(64 << 20))]))
        heard = backup._pulse.heard
        await until(lambda: backup._pulse.heard >= heard + 20)
        assert (primary.lost, backup.lost) == (None, None)
        assert not sending.done()
        primary.abort("done")
        with pytest.raises(LinkLost):
            await sending


async def test_a_peer_that_reads_nothing_makes_control_wait(options):
    async with connected(options) as (primary, backup):
        backup._control.pause()
        message = GuestStopped(reason="x" * 500)

        async def flood():
            while True:
                await primary.send(message)

        flooding = asyncio.create_task(flood())
        await until(lambda: primary._control.unsent_bytes)
        backup._control.resume()
        for _ in range(2000):
            assert await asyncio.wait_for(backup.receive(), SOON) == message
        flooding.cancel()
        with suppress(asyncio.CancelledError):
            await flooding


# ---- who may connect ---------------------------------------------------------------------------------------


async def test_refusal_is_one_clear_line(options):
    async with listening(options, admit=lambda _: Refusal(reason="vcpus 2, here 4")) as backup:
        with pytest.raises(PeerError, match=r"^127\.0\.0\.1:\d+ refused: vcpus 2, here 4$"):
            await backup.connect()
        assert await backup.next_rejected() == "refused"


async def test_what_admit_raises_is_a_refusal(options):
    def broken(_hello):
        raise ZeroDivisionError

    def unfit(_hello):
        raise HostError("no space in /dev/shm")

    async with listening(options, admit=broken) as backup:
        with pytest.raises(PeerError, match="internal error"):
            await backup.connect()
    async with listening(options, admit=unfit) as backup:
        with pytest.raises(PeerError, match="no space in /dev/shm"):
            await backup.connect()


async def test_a_second_primary_is_refused_and_the_first_goes_on(options):
    async with listening(options) as backup:
        first = await backup.connect()
        session = await backup.next_session()
        with pytest.raises(PeerError, match=r"connected with a \(127.0.0.1:\d+\) already"):
            await backup.connect(hello(node="c"))
        await first.send(GuestStopped(reason="still here"))
        assert await asyncio.wait_for(session.receive(), SOON) == GuestStopped(reason="still here")
        first.abort("done")


async def test_another_protocol_version_is_refused_with_both_numbers(options):
    async with listening(options) as backup:
        with pytest.raises(PeerError, match=f"version {PROTOCOL_VERSION + 1}, this side {PROTOCOL_VERSION}"):
            await backup.connect(hello(protocol=PROTOCOL_VERSION + 1))
        assert await backup.next_rejected() == "incompatible"


async def test_what_is_to_be_resumed_and_is_lost_is_told_from_what_may_come_later(options):
    def admit(hello):
        return Refusal(reason="it is gone", lost=hello.resume is not None and hello.resume.epoch == 41)

    async with listening(options, admit=admit) as backup:
        with pytest.raises(NothingToResume, match="it is gone"):
            await backup.connect(hello(resume=Resume(epoch=41)))
        with pytest.raises(PeerError) as later:
            await backup.connect(hello(resume=Resume(epoch=42)))
        assert not isinstance(later.value, NothingToResume)


async def test_exchanged_ports_are_named(options):
    async with listening(options) as backup:
        port, heartbeat_port = backup.listener.ports
        with pytest.raises(PeerError, match="port and heartbeat_port must be the same"):
            await backup.connect(port=heartbeat_port, heartbeat_port=port)


async def test_a_connection_of_no_session_is_refused(tls_options):
    async with listening(tls_options) as backup:
        sock = socket.create_connection((HOST, backup.listener.ports[0]))
        channel = Channel(sock, "frames", "peer")
        await channel.start_tls(tls_options.identity, server_side=False, peer_name=HOST)
        channel.write(MessageType.HANDSHAKE, encode(hello(channel="frames")))
        _, answer = await asyncio.wait_for(channel.receive(), SOON)
        assert b"begin with control" in answer
        assert await backup.next_rejected() == "refused"
        channel.close()


async def test_a_session_that_stays_incomplete_is_given_up(options):
    async with listening(replace(options, handshake_seconds=0.05)) as backup:
        sock = socket.create_connection((HOST, backup.listener.ports[0]))
        channel = Channel(sock, "control", "peer")
        if options.identity:
            await channel.start_tls(options.identity, server_side=False, peer_name=HOST)
        channel.write(MessageType.HANDSHAKE, encode(hello()))
        assert await backup.next_rejected() == "timeout"
        assert backup.sessions.empty()
        channel.close()


async def test_a_half_formed_session_makes_room_for_the_next(options):
    async with listening(options) as backup:
        sock = socket.create_connection((HOST, backup.listener.ports[0]))
        channel = Channel(sock, "control", "peer")
        if options.identity:
            await channel.start_tls(options.identity, server_side=False, peer_name=HOST)
        channel.write(MessageType.HANDSHAKE, encode(hello()))
        await asyncio.wait_for(channel.receive(), SOON)
        primary = await backup.connect()
        assert primary.id == (await backup.next_session()).id
        assert await backup.next_rejected() == "timeout"
        primary.abort("done")
        channel.close()


@pytest.mark.parametrize("port", [0, 1], ids=["data", "heartbeat"])
@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n", b"\0" * 100, b"\xff" * 100_000, encode_header(2, 0, 0)],
    ids=["http", "zeros", "much", "wrong-type"],
)
async def test_garbage_is_closed_with_one_log_line(options, port, garbage, caplog):
    caplog.set_level(logging.INFO, "ftd")
    async with listening(options) as backup:
        reader, writer = await backup.raw(port)
        writer.write(garbage)
        assert await backup.next_rejected() in ("garbage", "tls")
        writer.write_eof()
        with suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), SOON)
        writer.close()
        lines = [record for record in caplog.records if record.getMessage() == "connection rejected"]
        assert len(lines) == 1
        # The port goes on working.
        primary = await backup.connect()
        await backup.next_session()
        primary.abort("done")


async def test_a_connection_that_leaves_without_a_word_is_counted(options):
    async with listening(options) as backup:
        _, writer = await backup.raw()
        writer.close()
        assert await backup.next_rejected() in ("garbage", "tls")


@pytest.mark.parametrize("sent", [b"", encode_header(1, 0, 500)[:20], encode_header(1, 0, 500) + b"{"])
async def test_half_a_hello_is_given_up_in_time(options, sent):
    async with listening(replace(options, handshake_seconds=0.05)) as backup:
        reader, writer = await backup.raw()
        if options.identity:
            # TLS is as slow: a record that announces more than comes.
            sent = b"\x16\x03\x01\x02\x00\x01"[: len(sent)]
        writer.write(sent)
        assert await backup.next_rejected() == "timeout"
        with suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), SOON) == b""
        writer.close()


async def test_too_many_pending_connections_push_out_the_oldest(options):
    async with listening(replace(options, max_pending=4, handshake_seconds=SOON)) as backup:
        stalled = [await backup.raw() for _ in range(10)]
        for _ in range(6):
            assert await backup.next_rejected() == "timeout"
        primary = await backup.connect()
        await backup.next_session()
        primary.abort("done")
        for _, writer in stalled:
            writer.close()


# ---- TLS ---------------------------------------------------------------------------------------------------


def client_context(authority, **_):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


async def attempt(backup, context):
    """Shake hands as a client that ftd has not made; return what it gets to read."""
    reader, writer = await asyncio.open_connection(
        HOST, backup.listener.ports[0], ssl=context, server_hostname=HOST
    )
    try:
        return await asyncio.wait_for(reader.read(), SOON)
    finally:
        writer.close()


async def test_a_client_without_certificate_is_refused(tls_options, authority):
    async with listening(tls_options) as backup:
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            await attempt(backup, client_context(authority))
        assert await backup.next_rejected() == "tls"


async def test_tls_1_2_is_refused(tls_options, authority):
    context = client_context(authority)
    authority.issue_cert(HOST).configure_cert(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listening(tls_options) as backup:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await attempt(backup, context)
        assert await backup.next_rejected() == "tls"


def expired(authority):
    long_ago = datetime.now(UTC) - timedelta(days=10)
    return authority.issue_cert(HOST, not_before=long_ago, not_after=long_ago + timedelta(days=1))


@pytest.mark.parametrize("case", ["authority", "expired", "name"])
async def test_a_wrong_client_certificate_is_refused_and_both_sides_say_why(
    tls_options, authority, tmp_path, case, caplog
):
    strange = trustme.CA() if case == "authority" else authority
    certificate = {
        "authority": lambda: strange.issue_cert(HOST),
        "expired": lambda: expired(authority),
        "name": lambda: authority.issue_cert("10.9.9.9"),
    }[case]()
    context = client_context(authority)
    certificate.configure_cert(context)
    own = tls.Identity(context, context, (HOST,), datetime.now(UTC), ())
    async with listening(tls_options) as backup:
        with pytest.raises((PeerError, LinkError)) as caught:
            await backup.connect(options=replace(tls_options, identity=own))
        assert await backup.next_rejected() == "tls"
        told = {
            "authority": ("another authority", "does not know the authority"),
            "expired": ("has expired", "certificate has expired"),
            "name": ("is for 10.9.9.9, expected 127.0.0.1", "cannot connect"),
        }[case]
        log_line = next(record for record in caplog.records if record.getMessage() == "connection rejected")
        assert told[0] in log_line.ftd_fields["reason"]
        assert told[1] in str(caught.value)
        assert backup.sessions.empty()


async def test_a_wrong_server_certificate_is_named_by_the_client(tls_options, authority, tmp_path):
    other = trustme.CA()
    server = tls.load_identity(write_identity(tmp_path / "s", other, other.issue_cert(HOST)))
    async with listening(replace(tls_options, identity=server)) as backup:
        with pytest.raises(PeerError, match="another authority"):
            await backup.connect(options=tls_options)
    async with listening(tls_options) as backup:
        with pytest.raises(PeerError, match=r"not for 10\.0\.0\.9; correct peer_name"):
            await backup.connect(peer_name="10.0.0.9")
        primary = await backup.connect(peer_name="a")
        primary.abort("done")


async def test_insecure_on_one_side_only_is_named(tls_options):
    plain = replace(tls_options, identity=None)
    async with listening(tls_options) as backup:
        with pytest.raises(PeerError, match=r"refused: .*no TLS.*insecure must be the same on both hosts"):
            await backup.connect(options=plain)
        assert await backup.next_rejected() == "tls"
    async with listening(plain) as backup:
        with pytest.raises(PeerError, match="insecure must be the same on both hosts"):
            await backup.connect(options=tls_options)
        assert await backup.next_rejected() == "tls"


def test_own_files_are_checked_before_any_peer_is_asked(identity_files, authority, tmp_path):
    assert set(tls.load_identity(identity_files).names) == {HOST, "a"}

    def refused(files, told):
        with pytest.raises(ConfigError, match=told):
            tls.load_identity(files)

    missing = tmp_path / "missing.pem"
    refused(replace(identity_files, certificate=missing), "certificate = .*missing.pem: no such file")
    refused(replace(identity_files, key=missing), "key = .*missing.pem: no such file")
    refused(replace(identity_files, authority=missing), "authority = .*missing.pem: no such file")
    refused(replace(identity_files, key=tmp_path), "key = .*: cannot be read: is a directory")
    text = tmp_path / "text.pem"
    text.write_text("hello")
    refused(replace(identity_files, certificate=text), "no PEM file")
    text.write_text("-----BEGIN CERTIFICATE-----\nhello\n-----END CERTIFICATE-----\n")
    refused(replace(identity_files, authority=text), "authority = .*text.pem: cannot be used")

    one, two = authority.issue_cert(HOST), authority.issue_cert(HOST)
    refused(write_identity(tmp_path / "mix", authority, one, key=two), "does not belong to the certificate")
    refused(write_identity(tmp_path / "old", authority, expired(authority)), "it has expired")
    refused(write_identity(tmp_path / "ca", trustme.CA(), one), "not issued by the authority")

    encrypted = tmp_path / "encrypted.pem"
    command = [
        "openssl",
        "pkey",
        "-in",
        identity_files.key,
        "-aes256",
        "-passout",
        "pass:x",
        "-out",
        encrypted,
    ]
    subprocess.run(command, check=True, capture_output=True)
    refused(replace(identity_files, key=encrypted), "it is encrypted")


def test_what_will_be_trouble_is_a_warning(authority, tmp_path):
    soon = authority.issue_cert(HOST, not_after=datetime.now(UTC) + timedelta(days=5, hours=1))
    files = write_identity(tmp_path / "soon", authority, soon)
    files.key.chmod(0o644)
    warnings = tls.load_identity(files).warnings
    assert "expires in 5 days" in warnings[0]
    assert "can be read by others (mode 644)" in warnings[1]


def test_the_script_makes_certificates_that_fit(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "make-certificates"
    folder = tmp_path / "tls"

    def make(*arguments):
        return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)

    assert make(folder, "host-a=10.0.0.1,fd00::1", "host-b=10.0.0.2").returncode == 0
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    for name, names in (
        ("host-a", {"host-a", "10.0.0.1", "FD00:0:0:0:0:0:0:1"}),
        ("host-b", {"host-b", "10.0.0.2"}),
    ):
        files = tls.TlsFiles(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")
        identity = tls.load_identity(files)
        assert set(identity.names) == names
        assert identity.warnings == ()

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for arguments, told in (
        ((folder, "host-a"), "host-a.pem exists; --force"),
        ((folder, "host-c=999.0.0.1"), "999.0.0.1"),
        ((folder, "../host-c"), "not a host name"),
        ((folder, "host-c=a,x:$(id)"), "are not ADDRESS"),
        ((folder,), "at least one HOST"),
        ((folder, "--days", "0", "host-c"), "--days 0"),
    ):
        refused = make(*arguments)
        assert refused.returncode == 1
        assert told in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    # The authority stays, so the other host need not be told.
    assert make("--force", folder, "host-a=10.0.0.9").returncode == 0
    assert (folder / "ca.pem").read_bytes() == before["ca.pem"]
    assert (folder / "host-a.key").read_bytes() != before["host-a.key"]


@pytest.mark.parametrize(
    ("names", "expected", "fits"),
    [
        ([("DNS", "host-a")], "HOST-A", True),
        ([("DNS", "host-a")], "host-b", False),
        ([("DNS", "*.example")], "a.example", False),
        ([("IP Address", "10.0.0.1")], "10.0.0.1", True),
        ([("IP Address", "10.0.0.1")], "10.0.0.10", False),
        ([("IP Address", "FD00:0:0:0:0:0:0:1")], "fd00::1", True),
        ([("URI", "host-a")], "host-a", False),
        ([], "host-a", False),
    ],
)
def test_names_are_compared_as_names(names, expected, fits):
    certificate = {"subjectAltName": tuple(names), "subject": ((("commonName", expected),),)}
    if fits:
        tls.check_peer_name(certificate, expected)
    else:
        with pytest.raises(PeerError, match=f"expected {expected}"):
            tls.check_peer_name(certificate, expected)


# ---- the network around it ---------------------------------------------------------------------------------


async def test_a_port_in_use_is_named_with_its_user(options):
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            HostError, match=rf"port {port} \(held by .*, process \d+\): .*another port"
        ) as caught:
            async with listening(options, heartbeat_port=port):
                pass
        assert "\n" not in str(caught.value)


async def test_an_address_that_is_not_ours_is_named(options):
    with pytest.raises(HostError, match=r"listen = 192\.0\.2\.1, port 0: .*address of this machine"):
        async with listening(options, host="192.0.2.1"):
            pass


async def test_nobody_there(options):
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(LinkError, match=f"127.0.0.1:{port}: connection refused; is ftd running there"):
        await connect(options, hello(), host=HOST, port=port, heartbeat_port=port)


@pytest.mark.parametrize("host", ["10.0.0..3", "x" * 64 + ".example"])
async def test_what_cannot_be_a_host_is_named(options, host):
    with pytest.raises(
        LinkError, match=rf"^peer {re.escape(host)}: is neither an address nor a name of a host"
    ):
        await connect(options, hello(), host=host, port=1, heartbeat_port=2)


async def test_somebody_there_who_does_not_answer(options):
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(LinkError, match=r"no answer within 0\.05 s"):
            await connect(
                replace(options, handshake_seconds=0.05), hello(), host=HOST, port=port, heartbeat_port=port
            )


async def test_connecting_can_be_cancelled(options):
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        attempt_ = asyncio.create_task(connect(options, hello(), host=HOST, port=port, heartbeat_port=port))
        await in_thread(silent.accept)
        attempt_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt_


async def test_closed_at_the_moment_somebody_connects(options):
    """Nobody's connection is lost to a future that was cancelled, and nothing is reported."""
    loop = asyncio.get_running_loop()
    reported = []
    loop.set_exception_handler(lambda _loop, context: reported.append(context))
    async with listening(options) as backup:
        await asyncio.sleep(0)  # the listener waits
        with socket.create_connection((HOST, backup.listener.ports[0])) as client:
            # One turn of the loop: it finds the listener readable, and this runs before the callback does.
            await asyncio.sleep(0)
            await backup.listener.close()
            client.settimeout(SOON)
            with suppress(ConnectionError):
                assert client.recv(1) == b""
    assert not reported


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_nothing_is_left_open(options):
    before = open_descriptors()
    for _ in range(3):
        async with connected(options) as (primary, backup):
            assert isinstance(backup, Session)
            await primary.close("done")
            await lost(backup)
        with pytest.raises(PeerError):
            async with listening(options, admit=lambda _: Refusal(reason="no")) as backup:
                await backup.connect()
    assert open_descriptors() == before
