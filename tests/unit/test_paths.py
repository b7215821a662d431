"""Heartbeats on further paths, over real sockets on several addresses of the loopback interface."""

import asyncio
import socket
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from ftd.config.paths import LINK_PATH
from ftd.link import LinkLost, LinkOptions, Listener, LostKind, connect
from ftd.messages import Flight, HeartbeatSettings, Hello, Welcome
from ftd.paths import PathSettings

LINK, SIDE = "127.0.0.1", "127.0.0.2"
# Long enough that a busy test machine is not taken for a dead peer.
PATIENT = HeartbeatSettings(interval_ms=50, misses=100)
QUICK = HeartbeatSettings(interval_ms=20, misses=10)
SOON = 10.0


def free_ports():
    """Two ports that are free on both addresses."""
    with socket.socket() as one, socket.socket() as other:
        one.bind((SIDE, 0))
        other.bind((SIDE, 0))
        return one.getsockname()[1], other.getsockname()[1]


def options(heartbeat, **changes):
    return LinkOptions(identity=None, heartbeat=heartbeat, **changes)


@asynccontextmanager
async def pair(heartbeat, *, primary=(), backup=(), patience=0.0):
    """Two sessions that are one."""
    port, heartbeat_port = free_ports()
    sessions = asyncio.Queue()
    listener = Listener(
        options(heartbeat, paths=tuple(backup), patience_seconds=patience),
        host=LINK,
        port=port,
        heartbeat_port=heartbeat_port,
        peer_name=None,
        admit=lambda _: Welcome(software_version="0.1", node="b", generation=3, heartbeat=heartbeat),
        on_session=sessions.put_nowait,
    )
    await listener.start()
    hello = Hello(
        software_version="0.1", node="a", session=uuid4(), generation=3, epoch_ms=20, heartbeat=heartbeat
    )
    own = options(heartbeat, paths=tuple(primary), patience_seconds=patience)
    near = await connect(own, hello, host=LINK, port=port, heartbeat_port=heartbeat_port)
    far = await asyncio.wait_for(sessions.get(), SOON)
    try:
        yield near, far
    finally:
        near.abort("over")
        far.abort("over")
        await listener.close()


def path(name="side", address=SIDE):
    return PathSettings(name, address, address)


async def until(condition):
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def up(session, name="side"):
    return {each.name: each.up for each in session.paths()}[name]


def detail(session, name="side"):
    return {each.name: each.detail for each in session.paths()}[name]


async def test_a_further_path_is_connected_beside_the_session_and_heard():
    changes = []
    async with pair(PATIENT, primary=[path()], backup=[path()]) as (near, far):
        far.on_path = lambda *change: changes.append(change)
        await until(lambda: up(near) and up(far))
        assert up(near, LINK_PATH)
        assert [each.name for each in near.paths()] == [LINK_PATH, "side"]
        assert all(each.heard_age is not None for each in near.paths()[1:])
    assert [change[:2] for change in changes] == [("side", True)]


async def test_a_path_that_only_one_side_knows_is_told_and_costs_nothing():
    async with pair(PATIENT, primary=[path()]) as (near, far):
        await until(lambda: "connection refused; is ftd running there?" in detail(near))
        assert not up(near)
        assert near.lost is far.lost is None


async def test_a_connection_for_another_path_than_that_of_its_address_is_refused():
    async with pair(PATIENT, primary=[path("one")], backup=[path("other")]) as (near, far):
        told = "a connection for heartbeat path one on the address of other"
        await until(lambda: told in detail(near, "one"))
        assert near.lost is far.lost is None


async def test_a_path_that_is_lost_is_connected_again():
    async with pair(PATIENT, primary=[path()], backup=[path()]) as (near, far):
        await until(lambda: up(near) and up(far))
        changes = []
        near.on_path = lambda name, up, _: changes.append((name, up))
        far._pulse.paths._further["side"].channel.close()
        await until(lambda: changes == [("side", False), ("side", True)])
        assert near.lost is far.lost is None


async def test_the_death_of_the_peer_is_a_reset_at_once_whatever_the_paths():
    async with pair(PATIENT, primary=[path()], backup=[path()]) as (near, far):
        await until(lambda: up(near) and up(far))
        # As a kernel does it for a process that is no more.
        far._pulse.paths.close()
        far._control.close()
        far._heartbeat.close()
        lost = await asyncio.wait_for(near.wait_lost(), SOON)
        assert lost.kind is LostKind.RESET


async def test_control_that_is_reset_while_the_peer_is_heard_elsewhere_was_cut():
    async with pair(PATIENT, primary=[path()], backup=[path()]) as (near, far):
        await until(lambda: up(near) and up(far))
        far._control.close()
        lost = await asyncio.wait_for(near.wait_lost(), SOON)
        assert lost.kind is LostKind.CUT
        assert "the peer is heard on side" in lost.detail


async def test_all_paths_silent_is_silence():
    async with pair(QUICK, primary=[path()], backup=[path()]) as (near, far):
        await until(lambda: up(near) and up(far))
        far._pulse._beat = lambda now: None
        lost = await asyncio.wait_for(near.wait_lost(), SOON)
        assert lost.kind is LostKind.SILENCE


async def test_a_goodbye_is_heard_on_a_path_when_the_link_carries_nothing():
    async with pair(PATIENT, primary=[path()], backup=[path()]) as (near, far):
        await until(lambda: up(near) and up(far))
        far._control.write = far._heartbeat.write = lambda *_: None
        far._control.finish = far._heartbeat.finish = _forever
        closing = asyncio.create_task(far.close("maintenance"))
        lost = await asyncio.wait_for(near.wait_lost(), SOON)
        assert (lost.kind, lost.detail) == (LostKind.GOODBYE, "maintenance")
        closing.cancel()


async def _forever(_seconds):
    await asyncio.Event().wait()


@pytest.mark.parametrize("patience", [0.0, 0.2])
async def test_a_silent_link_is_cut_after_its_patience_and_both_sides_know(patience):
    async with pair(QUICK, primary=[path()], backup=[path()], patience=patience) as (near, far):
        await until(lambda: up(near) and up(far))
        # The link carries nothing from here on towards the one; the other hears everything.
        far._heartbeat.write = lambda *_: None
        lost = await asyncio.wait_for(near.wait_lost(), SOON)
        assert lost.kind is LostKind.CUT
        assert "nothing heard on the link for" in lost.detail
        other = await asyncio.wait_for(far.wait_lost(), SOON)
        assert other.kind is LostKind.CUT


async def test_a_link_that_is_back_within_its_patience_is_as_before():
    async with pair(QUICK, primary=[path()], backup=[path()], patience=SOON) as (near, far):
        await until(lambda: up(near) and up(far))
        write, far._heartbeat.write = far._heartbeat.write, lambda *_: None
        sent = far._pulse.sent
        await until(lambda: not up(near, LINK_PATH))
        assert near.heartbeat_age < 1  # heard, though not there
        far._heartbeat.write, far._pulse.sent = write, sent
        await until(lambda: up(near, LINK_PATH))
        assert near.lost is far.lost is None


async def test_each_side_gives_the_other_its_flight_recorder():
    async with pair(PATIENT) as (near, far):

        async def own():
            return Flight(lines="abc", cut=True)

        far.flight = own
        assert await near.fetch_flight() == Flight(lines="abc", cut=True)
        asking = asyncio.ensure_future(far.fetch_flight())  # nobody answers there
        await asyncio.sleep(0)
        near.abort("over")
        with pytest.raises(LinkLost):
            await asking
