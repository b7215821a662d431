"""The primary dies at every moment that matters, and at random ones: the guest goes on, or nobody starts it.

What each test kills is killed for real. A moment is reached by what the outside can do (a narrow link, a
guest that dirties much) and watched for through status, counters and QEMU's own monitor, so that each test
knows that it hit what its name says.
"""

import asyncio
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testbed.guarded import (
    ask,
    assert_bare_guest_goes_on,
    assert_takeover,
    bare_guest,
    linux_guest,
    metric,
    wait_committed,
    wait_ended,
    wait_ready,
)
from testbed.hosts import Host
from testbed.pair import Daemon, Pair

from ftd.monitor import Monitor

pytestmark = pytest.mark.root
StartPair = Callable[..., Any]

MIB = 1 << 20
# Frames that take long on a narrow link: a guest that writes to 12 MiB as fast as it can.
HEAVY = {"pages": 3000, "rounds_per_second": 0}
REFUSED = "takeover is refused: the first sync is not complete"


def received_bytes(host: Host) -> int:
    """What has arrived on the host's end of the link, all connections together."""
    for pid in host.processes():
        for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "link0":
                return int(counters.split()[0])
    raise AssertionError(f"no process on {host.name} to ask")


async def shadow_still_waits(daemon: Daemon) -> None:
    async with await Monitor.connect(daemon.run_dir / "operator.sock") as operator:
        assert (await operator.execute("query-status"))["status"] == "inmigrate"


# ---- death of the host at special moments -----------------------------------------------------------------


async def test_host_dies_during_first_sync(make_pair: StartPair) -> None:
    """Hit when the primary says that some of the copy, and not all, is done. The shadow must not start.

    The backup stays of use: the same host boots again, and its guest is protected.
    """
    settings = {"staging": {"slot_mib": 4, "slots": 2}}
    pair: Pair = await make_pair(await bare_guest(pages=8192, rounds_per_second=0), settings)
    pair.a.limit_link(40_000_000)
    await pair.primary.start()
    await assert_bare_guest_goes_on(pair.primary, lines=1)  # it has memory that takes a while to copy
    await pair.backup.start()
    await pair.primary.wait_status(
        "a copy half done",
        lambda status: status["state"] == "syncing" and 0.1 < status["sync"]["progress"] < 0.9,
        60,
    )
    pair.kill_primary_host()
    status = await pair.backup.wait_status(
        "refusal", lambda status: status["state"] == "waiting" and REFUSED in status["reason"], 30
    )
    assert status["takeover"] is None
    assert await metric(pair.backup, "ftd_takeovers_refused_total") == 1
    await shadow_still_waits(pair.backup)
    pair.a.revive()
    assert pair.a.memory_directory.is_dir()
    await pair.primary.close()
    await pair.primary.start()
    await pair.wait_protected()
    await assert_bare_guest_goes_on(pair.primary)


async def test_host_dies_during_a_checkpoint(start_pair: StartPair) -> None:
    """Hit when QEMU's own monitor says `paused`: the guest stands still while its frame is gathered.

    That takes long here since the frame fills several slots, and the link is slow to empty them. The frame
    cannot be whole on the backup, so the epoch taken over is one before it.
    """
    settings = {"staging": {"slot_mib": 4, "slots": 2}, "epoch": {"in_flight_mib": 4}}
    pair: Pair = await start_pair(await bare_guest(**HEAVY), settings)
    pair.a.limit_link(100_000_000)
    async with await Monitor.connect(pair.primary.run_dir / "operator.sock") as operator:
        async with asyncio.timeout(60):
            while not (told := await operator.execute("query-x-ft"))["paused"]:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        pair.kill_primary_host()
    status = await assert_takeover(pair, "silence", committed=told["epoch"] - 2)
    assert status["takeover"]["epoch"] < told["epoch"]
    await assert_bare_guest_goes_on(pair.backup)


async def test_host_dies_in_the_middle_of_a_frame(start_pair: StartPair) -> None:
    """Hit when megabytes of the next frame have arrived at the backup's host, and its ack has not.

    The frame takes seconds on this link. What arrived of it must not be used.
    """
    pair: Pair = await start_pair(await bare_guest(**HEAVY), {"epoch": {"in_flight_mib": 64}})
    pair.a.limit_link(40_000_000)
    await wait_committed(pair.primary, 2)
    committed, arrived = -1, 0
    async with asyncio.timeout(60):
        while committed < 0 or received_bytes(pair.b) - arrived < 3 * MIB:
            now = (await pair.backup.status())["epoch"]["committed"]
            if now != committed:
                committed, arrived = now, received_bytes(pair.b)
    pair.kill_primary_host()
    status = await assert_takeover(pair, "silence", committed=committed)
    assert status["takeover"]["epoch"] == committed
    await assert_bare_guest_goes_on(pair.backup)


async def test_host_dies_between_commit_and_apply(start_pair: StartPair) -> None:
    """Hit when the backup has acknowledged epochs whose turn to be applied has not come.

    Every epoch is verified after it was applied, and a short epoch takes longer to verify than to run; so
    acknowledged frames queue up, and the last verification tells how far the applying is. What was
    acknowledged must not be lost.
    """
    settings = {"epoch": {"length_ms": 5, "verify_every": 1}}
    pair: Pair = await start_pair(await bare_guest(pages=8192, rounds_per_second=20), settings)
    behind = await pair.backup.wait_status(
        "three epochs acknowledged and not applied",
        lambda status: (
            status["last_verify"] is not None
            and status["epoch"]["committed"] - status["last_verify"]["epoch"] >= 3
        ),
        60,
    )
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=behind["epoch"]["committed"])
    await assert_bare_guest_goes_on(pair.backup)


# ---- death of the host at random moments ------------------------------------------------------------------


async def assert_goes_on_or_refuses(pair: Pair, committed: int) -> None:
    """Before the first commit nobody starts the guest, and the backup says why; after it, it goes on."""
    status = await pair.backup.wait_status(
        "an end of it",
        lambda status: status["takeover"] is not None or status["state"] == "waiting",
        30,
    )
    if status["takeover"] is None:
        assert committed == 0
        assert REFUSED in status["reason"]
        await shadow_still_waits(pair.backup)
    else:
        await assert_takeover(pair, "silence", committed=committed)
        await assert_bare_guest_goes_on(pair.backup)


@pytest.mark.parametrize("seed", range(6))
async def test_host_dies_at_a_random_moment(make_pair: StartPair, seed: int) -> None:
    """From the first byte of the copy on. The epoch that the primary last said was committed is not lost."""
    chance = random.Random(seed)
    moment = chance.uniform(0, 2)
    pages = chance.choice([64, 1024, 4000])
    print(f"seed {seed}: killed {moment:.3f} s after the copy began, {pages} pages a round")
    pair: Pair = await make_pair(await bare_guest(pages=pages))
    await pair.backup.start()
    await wait_ready(pair.backup)
    await pair.primary.start()
    await pair.backup.wait_status("a session", lambda status: status["state"] != "waiting", 30)
    deadline = time.monotonic() + moment
    committed = 0
    while time.monotonic() < deadline:
        committed = (await pair.primary.status())["epoch"]["committed"]
    pair.kill_primary_host()
    await assert_goes_on_or_refuses(pair, committed)


# ---- death of a process -----------------------------------------------------------------------------------


async def test_qemu_of_the_primary_dies(start_pair: StartPair) -> None:
    pair: Pair = await start_pair(await bare_guest())
    committed = (await wait_committed(pair.primary, 5))["epoch"]["committed"]
    pair.kill_primary_qemu()
    await assert_takeover(pair, "qemu-died", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)
    assert await wait_ended(pair.primary) == 7
    assert "ftd: error: QEMU is lost" in pair.primary.logs().splitlines()[-1]


async def test_daemon_of_the_primary_dies(start_pair: StartPair) -> None:
    """Its QEMU is not touched by that (rule S6)."""
    pair: Pair = await start_pair(await bare_guest())
    committed = (await wait_committed(pair.primary, 5))["epoch"]["committed"]
    qemu = pair.primary.qemu_pid()
    pair.kill_primary_daemon()
    await assert_takeover(pair, "connection-reset", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)
    assert pair.primary.qemu_pid() == qemu


async def test_qemu_of_the_backup_dies(start_pair: StartPair) -> None:
    """The guest notices nothing; the backup starts a new shadow, and the guest is protected again."""
    pair: Pair = await start_pair(await bare_guest())
    qemu = pair.backup.qemu_pid()
    pair.backup.kill_qemu()
    await pair.backup.wait_status("a new shadow", lambda status: status["qemu"]["pid"] != qemu, 30)
    await pair.wait_protected()
    await wait_committed(pair.primary, 10)
    assert pair.backup.qemu_pid() != qemu
    assert await metric(pair.primary, "ftd_syncs_completed_total") == 2
    await assert_bare_guest_goes_on(pair.primary)


# ---- what is no failure -----------------------------------------------------------------------------------


async def test_guest_that_powers_itself_off_ends_both_sides(start_pair: StartPair) -> None:
    """Rule S7: nobody takes over."""
    pair: Pair = await start_pair(await linux_guest())
    await pair.primary.console.wait_for(r"^ftd-guest: ready", 90)
    await pair.wait_protected()
    await ask(pair.network.client, "POST", "/poweroff")
    assert await wait_ended(pair.primary) == 0
    assert await wait_ended(pair.backup) == 0
    assert "took over" not in pair.backup.logs()
    assert "the guest has stopped: guest-shutdown" in pair.backup.logs()
    assert pair.a.processes() == []
    assert pair.b.processes() == []


async def test_planned_stop_of_the_primary_leaves_the_guest_running(start_pair: StartPair) -> None:
    """The backup waits and does not take over; the daemon that comes back finds the guest and protects it."""
    pair: Pair = await start_pair(await bare_guest())
    qemu = pair.primary.qemu_pid()
    assert await pair.primary.stop() == 0
    assert "the primary left" in (await pair.backup.wait_state("waiting"))["reason"]
    await assert_bare_guest_goes_on(pair.primary)
    await pair.primary.start()
    await pair.wait_protected()
    await wait_committed(pair.primary, 10)
    assert pair.primary.qemu_pid() == qemu
    assert "took over" not in pair.backup.logs()
    await assert_bare_guest_goes_on(pair.primary)
    # Not only in name: this protection is worth something.
    committed = (await pair.primary.status())["epoch"]["committed"]
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)


async def test_planned_stop_of_the_backup_leaves_the_primary_solo(start_pair: StartPair) -> None:
    """Its shadow ends with it; when the daemon is back, so is protection."""
    pair: Pair = await start_pair(await bare_guest())
    assert await pair.backup.stop() == 0
    assert pair.b.processes() == []
    await pair.primary.wait_state("solo")
    await assert_bare_guest_goes_on(pair.primary)
    await pair.backup.start()
    await pair.wait_protected()
    await wait_committed(pair.primary, 10)
    await assert_bare_guest_goes_on(pair.primary)


# ---- a link that is too slow ------------------------------------------------------------------------------


def anonymous_bytes(daemon: Daemon) -> int:
    """Memory of the daemon's own; guest memory and slots, which are shared files, are not in it."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


async def test_link_slower_than_the_guest_stretches_epochs(start_pair: StartPair) -> None:
    """Nothing grows but the epochs, nothing is lost, and without the limit they are short again."""
    limit = 16 * MIB
    settings = {
        "epoch": {"in_flight_mib": limit // MIB, "verify_every": 10},
        "staging": {"slot_mib": 16},
    }
    pair: Pair = await start_pair(await bare_guest(**HEAVY), settings)
    await wait_committed(pair.primary, 5)
    daemons = (pair.primary, pair.backup)
    before = [anonymous_bytes(daemon) for daemon in daemons]
    stretched = await metric(pair.primary, "ftd_epochs_stretched_total")
    frame = 3200 * 4096  # its pages, a few of the guest's own, and tables
    pair.a.limit_link(200_000_000)
    most_in_flight, most = 0, [0, 0]
    async with asyncio.timeout(60):
        while await metric(pair.primary, "ftd_epochs_stretched_total") < stretched + 10:
            most_in_flight = max(most_in_flight, (await pair.primary.status())["in_flight_bytes"])
            most = [max(one, anonymous_bytes(daemon)) for one, daemon in zip(most, daemons, strict=True)]
    assert 0 < most_in_flight <= limit + frame
    for now, once in zip(most, before, strict=True):
        assert now - once <= 4 * (limit + frame)
    assert (await pair.primary.status())["epoch"]["stretch"] > 1
    pair.a.limit_link(None)
    unlimited = await wait_committed(pair.primary, 20)
    await pair.backup.wait_status(
        "a verification of a later epoch",
        lambda status: status["last_verify"]["epoch"] > unlimited["epoch"]["committed"],
        60,
    )
    for daemon in daemons:
        assert (await daemon.status())["state"] == "protected"
        assert await metric(daemon, "ftd_verify_differing_pages_total") == 0
        assert await metric(daemon, "ftd_syncs_completed_total") == 1, "protection was lost in between"
    await assert_bare_guest_goes_on(pair.primary)
