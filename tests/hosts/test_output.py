"""Output commit: what clients were told, the survivor knows; and what is not committed is on no wire.

Clients of every kind ask a Linux guest through a bridge, from a namespace of their own, and record all that
they see. Whatever dies meanwhile, their histories have to be those of one guest that never died.
"""

import asyncio
import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testbed.capture import Capture
from testbed.client import CounterClient, read_counter
from testbed.guarded import ask, linux_guest, metric, wait_committed
from testbed.guest import Console
from testbed.history import History, as_reads, value_problems
from testbed.hosts import CLIENT_ADDRESS, GUEST_ADDRESS
from testbed.pair import Daemon, Pair
from testbed.redis_load import RedisClient, redis_guest, wait_redis
from testbed.survival import Clients, Plan, kill, protected_pair, survive

from ftd.monitor import Monitor

# A guest that boots under TCG beside other tests takes its time.
pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
StartPair = Callable[..., Any]

READY = r"^ftd-guest: ready"
BOOT_S = 90.0
MIB = 1 << 20


async def qemu_output(daemon: Daemon) -> dict[str, Any]:
    """What QEMU itself says of the guest's output, whether a daemon is there or not."""
    async with await Monitor.connect(daemon.run_dir / "operator.sock") as operator:
        output: dict[str, Any] = (await operator.execute("query-x-ft"))["output"]
        return output


async def guest_runs(console: Console, lines: int) -> None:
    """The guest prints so many more of its numbers, each a tenth of a second of its own time apart."""
    console.skip()
    numbers = [int((await console.wait_for(r"^sequence (\d+)", 60))[1]) for _ in range(lines)]
    assert numbers == list(range(numbers[0], numbers[0] + lines))


async def assert_silence(wire: Capture, pair: Pair) -> dict[str, Any]:
    """While the guest runs and sends, nothing comes out of it, and nothing has since QEMU's last release.

    The kernel noted the time of each frame before QEMU wrote down when it had released its epoch. So a frame
    of a later epoch cannot hide among those of the released ones.
    """
    await guest_runs(pair.primary.console, 2)
    before = await qemu_output(pair.primary)
    frames = len(wire.frames)
    assert before["holding"]
    assert [at - before["released-at-ns"] for at, _ in wire.frames if at > before["released-at-ns"]] == []
    await guest_runs(pair.primary.console, 7)
    after = await qemu_output(pair.primary)
    assert len(wire.frames) == frames
    assert wire.missed() == 0
    assert after["packets"] > 0
    assert after["packets"] >= before["packets"]
    for name in ("holding", "released-epoch", "released-at-ns", "dropped"):
        assert after[name] == before[name], name
    return after


async def start_clients(pair: Pair, timeout_s: float = 100.0) -> Clients:
    await pair.primary.console.wait_for(READY, BOOT_S)
    clients = Clients(pair.network.client, pair.network.directory, timeout_s=timeout_s)
    await clients.start()
    return clients


# ---- takeovers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0])  # the chaos schedules have more, and scripts/soak any number
async def test_no_client_can_tell_that_the_host_died(start_pair: StartPair, seed: int) -> None:
    """All clients at once, and the primary's host dies at a random moment.

    A numbered stream over one connection misses, repeats and breaks nothing; no acknowledged increment is
    lost, no value given twice, none goes backwards, on connections that stay; no answer to a datagram told
    of a counter that the survivor did not have; pings go on. scripts/soak does this many times.
    """
    plan = Plan.of(seed, "primary-host")
    print(plan)
    pair: Pair = await start_pair(await plan.guest(), plan.settings)
    outcome = await survive(pair, plan)
    print(json.dumps(outcome.told()))
    assert outcome.problems == []
    clients = outcome.clients
    assert clients.count.history().connections == 4
    # Both before and after the death, and many: a history of nothing would be right as well.
    for told in (clients.count.history().answered, clients.stream.samples(), clients.udp.samples()):
        assert sum(each.end_ns < outcome.death.began_ns for each in told) >= 20
        assert sum(each.start_ns > outcome.death.ended_ns for each in told) >= 20
    before = [each.value for each in clients.udp.samples() if each.end_ns < outcome.death.began_ns]
    survivor = [each.value for each in clients.udp.samples() if each.start_ns > outcome.death.ended_ns]
    assert max(before) <= min(survivor)


async def test_redis_keeps_what_it_acknowledged(start_pair: StartPair) -> None:
    """Debian's Redis, and its usual client library: counters and batches of keys on several connections."""
    chance = random.Random(20)
    pair: Pair = await start_pair(await redis_guest())
    client = pair.network.client
    await pair.primary.console.wait_for(READY, BOOT_S)
    await wait_redis(client, GUEST_ADDRESS, 60)
    load = RedisClient(client, pair.network.directory / "redis", connections=6)
    await load.start()
    await load.wait_answers(30, 60)
    await asyncio.sleep(chance.uniform(0.5, 1.5))  # the moment of death
    death = pair.kill_primary_host()
    await pair.backup.wait_takeover()
    await load.wait_answers(30, 60, after_ns=death.ended_ns)
    await load.stop()
    assert await load.problems() == []
    writes = load.writes()
    print(f"{len(load.history().acknowledged)} increments, {len(writes)} keys")
    assert sum(each.end_ns < death.began_ns for each in writes) >= 100
    assert sum(each.start_ns > death.ended_ns for each in writes) >= 100


async def test_without_output_commit_acknowledged_increments_are_lost(qemu_binary: Path) -> None:
    """That the tests above can fail: the same judgement of the same clients, with output not held.

    An epoch is long and the clients are busy, so a death nearly always falls between an answer and the
    commit of its epoch; and again if it did not.
    """
    settings = {"output": {"hold": False}, "epoch": {"length_ms": 200}}
    found = []
    for attempt in range(3):
        async with protected_pair(await linux_guest(), qemu_binary, settings) as pair:
            await pair.primary.console.wait_for(READY, BOOT_S)
            node, folder = pair.network.client, pair.network.directory
            # Connections do not survive this either.
            count = CounterClient(node, folder / "count", connections=4, reconnect=True, timeout_s=2)
            udp = CounterClient(node, folder / "udp", probe="udp", interval_s=0.002)
            for client in (count, udp):
                await client.start()
                await client.wait_answers(40, 60)
            death = kill(pair, "primary-host")
            await pair.backup.wait_takeover()
            for client in (udp, count):
                await client.wait_answers(20, 60, after_ns=death.ended_ns)
                await client.stop()
            history = History((*count.history().requests, *as_reads(udp.samples())))
            lost = history.lost(0, await read_counter(node))
            fell = value_problems(udp.samples())
            print(f"attempt {attempt}: {lost} lost, {len(history.backwards())} backwards, {fell[:1]}")
            found.append(lost > 0 and bool(fell) and history.backwards() != [])
            if found[-1]:
                break
    assert found[-1], "three takeovers without output commit, and nobody noticed"


# ---- held -------------------------------------------------------------------------------------------------


async def test_output_is_held_while_there_is_neither_daemon_nor_backup(start_pair: StartPair) -> None:
    """The primary's daemon is killed while the backup hangs: nothing leaves the guest any more.

    Nor does it when the daemon is back, since it cannot know whether the backup has taken over. Then the
    backup's host dies and boots; the guest is protected anew, what was held goes out, and no client has
    lost more than time.
    """
    pair: Pair = await start_pair(await linux_guest())
    clients = await start_clients(pair)
    assert pair.backup.process is not None
    with Capture(pair.a, pair.a.taps[0]) as wire:
        os.kill(pair.backup.process.pid, signal.SIGSTOP)
        pair.kill_primary_daemon()
        held = await assert_silence(wire, pair)
        await pair.primary.close()
        await pair.primary.start()
        status = await pair.primary.wait_state("held")
        assert status["output"]["holding"]
        assert status["output"]["held_packets"] >= held["packets"]
        again = await assert_silence(wire, pair)
        assert (again["released-epoch"], again["released-at-ns"]) == (
            held["released-epoch"],
            held["released-at-ns"],
        )
        assert (await pair.primary.status())["state"] == "held"
        pair.b.revive()
        assert pair.b.memory_directory.is_dir()
        await pair.backup.close()
        frames = len(wire.frames)
        await pair.backup.start()
        await pair.wait_protected()
        flows = (await qemu_output(pair.primary))["released-at-ns"]
        await clients.wait_answers(after_ns=flows)
        assert len(wire.frames) >= frames + again["packets"]
    await clients.stop()
    assert await clients.problems() == []
    assert (await pair.primary.status())["output"]["dropped"] == 0


async def test_held_output_of_the_loser_is_never_seen(start_pair: StartPair) -> None:
    """As above, but the backup wakes up and takes over: the old guest runs, and nobody hears of it.

    Also not when its daemon comes back.
    """
    pair: Pair = await start_pair(await linux_guest())
    clients = await start_clients(pair)
    assert pair.backup.process is not None
    with Capture(pair.a, pair.a.taps[0]) as wire:
        os.kill(pair.backup.process.pid, signal.SIGSTOP)
        death = pair.kill_primary_daemon()
        await assert_silence(wire, pair)
        os.kill(pair.backup.process.pid, signal.SIGCONT)
        await pair.backup.wait_takeover()
        await clients.wait_answers(after_ns=death.ended_ns)
        await assert_silence(wire, pair)
        await pair.primary.close()
        await pair.primary.start()
        await pair.primary.wait_state("held")
        await assert_silence(wire, pair)
    await clients.stop()
    assert await clients.problems() == []


async def test_output_is_held_while_the_link_is_cut(start_pair: StartPair) -> None:
    """Until somebody decides that the other is lost, nothing of later epochs leaves; this is before that.

    When the link is whole again in time, everything goes on as if nothing had been.
    """
    settings = {"heartbeat": {"interval_ms": 1000, "misses": 30}}
    pair: Pair = await start_pair(await linux_guest(), settings)
    clients = await start_clients(pair)
    with Capture(pair.a, pair.a.taps[0]) as wire:
        pair.a.cut_link()
        await assert_silence(wire, pair)
        for daemon in (pair.primary, pair.backup):
            assert (await daemon.status())["state"] == "protected"
        pair.a.restore_link()
        await wait_committed(pair.primary, 2)
        await clients.wait_answers(after_ns=(await qemu_output(pair.primary))["released-at-ns"])
    await clients.stop()
    assert await clients.problems() == []
    assert await metric(pair.primary, "ftd_syncs_completed_total") == 1


# ---- more output than may be held -------------------------------------------------------------------------


def anonymous_bytes(pid: int) -> int:
    """Memory of the process's own; the guest's memory is a shared file, and not in it."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


async def test_flood_is_slowed_down_and_loses_nothing(start_pair: StartPair) -> None:
    """The guest sends datagrams as fast as it can, into a buffer that holds a few hundred of them.

    Counted where QEMU hands them to the host, since those who receive them may lose some: each once, and in
    order. What QEMU needs for it is bounded, whatever the amount.
    """
    datagrams, size, port, limit_mib = 30_000, 1400, 7001, 1
    settings = {"output": {"limit_mib": limit_mib}, "epoch": {"length_ms": 100}}
    pair: Pair = await start_pair(await linux_guest(), settings)
    await pair.primary.console.wait_for(READY, BOOT_S)
    client, qemu = pair.network.client, pair.primary.qemu_pid()

    async def flood(number: int) -> int:
        """Returns by how much QEMU's memory grew at most."""
        target = f"/flood?to={CLIENT_ADDRESS}&datagrams={number}&bytes={size}&port={port}"
        wanted, before, most = int(await ask(client, "GET", target)), anonymous_bytes(qemu), 0
        async with asyncio.timeout(120):
            while (told := json.loads(await ask(client, "GET", "/status", 60)))["flood_done"] < wanted:
                most = max(most, anonymous_bytes(qemu))
        assert (told["flood_sent"], told["flood_errors"]) == (number, 0)
        return most - before

    with Capture(pair.a, pair.a.taps[0]) as wire:
        await flood(1000)  # so that QEMU has translated the code that does it
        pushed_back = (await pair.primary.status())["output"]["pushed_back"]
        growth = await flood(datagrams)
        await wait_committed(pair.primary, 2)
        assert wire.missed() == 0
    output = (await pair.primary.status())["output"]
    seen = wire.datagrams(port)
    print(f"QEMU grew by {growth / MIB:.1f} MiB, pushed back {output['pushed_back'] - pushed_back} times")
    assert seen == [*range(1000), *range(datagrams)]
    assert output["dropped"] == 0
    assert output["pushed_back"] > pushed_back
    # The limit, the packets' own headers, and room for the allocator. All of it would be 40 MiB.
    assert growth <= (limit_mib + 8) * MIB
    for daemon in (pair.primary, pair.backup):
        assert (await daemon.status())["state"] == "protected"
    assert await metric(pair.primary, "ftd_syncs_completed_total") == 1
