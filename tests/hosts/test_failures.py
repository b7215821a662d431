"""Rows of docs/failures.md that need a pair of their own kind, or that a random schedule would rarely reach.

The other rows are in test_authority.py; test_chaos.py mixes all of them. A third host has the etcd.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testbed.arbitrated import NIC, arbitrated, boot, free_guests, post
from testbed.etcd import Etcd
from testbed.faults import frames_port, operate
from testbed.guarded import assert_bare_guest_goes_on, bare_guest, wait_committed, wait_ended
from testbed.pair import Daemon, Pair

pytestmark = pytest.mark.root
StartPair = Callable[..., Any]
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


async def assert_nothing_happened(pair: Pair, generation: int = 1) -> None:
    """Epochs go on being committed, by the same two, in the same generation."""
    await wait_committed(pair.primary, 30)
    for daemon, role in ((pair.primary, "primary"), (pair.backup, "backup")):
        status = await daemon.status()
        assert (status["state"], status["role"], status["generation"]) == ("protected", role, generation)
    assert await free_guests(pair) == []


# ---- parts of the link ------------------------------------------------------------------------------------


async def test_only_heartbeats_are_cut(pair: Pair) -> None:
    """Frames and acknowledgements are signs of life, too: nothing happens, for long."""
    limit = pair.primary.heartbeat_limit_s
    pair.a.cut_port(pair.primary.heartbeat_port)
    began = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() - began < 2 * limit:
        await wait_committed(pair.primary, 5)
    await assert_nothing_happened(pair)
    pair.a.restore_port(pair.primary.heartbeat_port)
    await assert_nothing_happened(pair)


@pytest.mark.parametrize("cut", ["heartbeats", "frames"])
async def test_one_connection_is_cut_for_long(start_pair: StartPair, etcd: Etcd, cut: str) -> None:
    """After [link] stall_s one of the two sides wins, and speaks; whole again, they protect again."""
    settings = arbitrated(etcd) | NIC | {"link": {"stall_s": 2}}
    pair: Pair = await start_pair(await bare_guest(), settings)
    port = pair.primary.heartbeat_port if cut == "heartbeats" else await frames_port(pair.primary)
    assert port is not None
    pair.a.cut_port(port)
    # Frames: a new session has another port, and so comes about at once.
    wanted = ("solo", "taken-over") if cut == "heartbeats" else ("solo", "taken-over", "syncing")
    async with asyncio.timeout(30):
        while not any(  # noqa: ASYNC110
            [(await daemon.status())["state"] in wanted for daemon in (pair.primary, pair.backup)]
        ):
            await asyncio.sleep(0.02)
    pair.a.restore_port(port)
    await pair.wait_protected()
    roles = {(await daemon.status())["role"]: daemon for daemon in (pair.primary, pair.backup)}
    assert (await roles["primary"].status())["generation"] == 2
    await assert_bare_guest_goes_on(roles["primary"])


# ---- clocks -----------------------------------------------------------------------------------------------


def jump(daemon: Daemon, seconds: int) -> None:
    """Set the wall clock of a daemon that runs with libfaketime; monotonic clocks are not touched."""
    (daemon.folder / "clock").write_text(f"{seconds:+d}\n")


@pytest.fixture
def faketime() -> Iterator[Path]:
    """Gives the library. What its killed processes leave in shared memory is removed, of earlier runs, too.

    To be the first fixture of a test: those that start processes are then gone before it.
    """
    assert FAKETIME.exists(), "run scripts/setup"
    yield FAKETIME
    for left in Path("/dev/shm").glob("*faketime_s*_*"):
        if not Path("/proc", left.name.rpartition("_")[2]).exists():
            left.unlink(missing_ok=True)


async def test_clocks_of_hosts_jump(faketime: Path, make_pair: StartPair, etcd: Etcd) -> None:
    """Forwards, backwards and apart: nothing happens; and what happens then does not depend on them."""
    pair: Pair = await make_pair(await bare_guest(), arbitrated(etcd) | NIC)
    for daemon in (pair.primary, pair.backup):
        jump(daemon, 0)
        daemon.environment = {
            "LD_PRELOAD": str(faketime),
            "FAKETIME_TIMESTAMP_FILE": str(daemon.folder / "clock"),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_NO_CACHE": "1",
        }
    await pair.backup.start()
    await pair.primary.start()
    await pair.wait_protected()
    for here, there in ((3600, 0), (-86400, 86400), (0, -86400)):
        jump(pair.primary, here)
        jump(pair.backup, there)
        await assert_nothing_happened(pair)
    assert pair.primary.process is not None
    pair.kill_primary_host()
    status = await pair.backup.wait_takeover()
    assert status["generation"] == 2
    assert status["takeover"]["total"] < 60
    await assert_bare_guest_goes_on(pair.backup)
    # A day ago no certificate was valid yet, and no session could begin: that is what a wrong clock costs.
    jump(pair.backup, 0)
    jump(pair.primary, 7200)
    await boot(pair.a, pair.primary)
    await pair.wait_protected()


# ---- the guest --------------------------------------------------------------------------------------------


async def test_guest_that_an_operator_paused_is_taken_over_and_stays_paused(pair: Pair) -> None:
    await operate(pair.primary, "stop")
    await assert_nothing_happened(pair)
    pair.kill_primary_host()
    await pair.backup.wait_takeover()
    assert (await operate(pair.backup, "query-status"))["status"] == "paused"
    await operate(pair.backup, "cont")
    await assert_bare_guest_goes_on(pair.backup)


async def test_qemu_of_a_primary_without_a_backup_dies(pair: Pair) -> None:
    """The guest is lost. Its daemon ends with a code after which nothing starts it by itself."""
    pair.b.kill_all()
    await pair.primary.wait_state("solo", 20)
    pair.kill_primary_qemu()
    assert await wait_ended(pair.primary) == 7
    assert "start the daemon again to have the guest boot" in pair.primary.logs()
    await pair.primary.close()
    await pair.primary.start()
    status = await pair.primary.wait_state("solo", 30)
    assert status["generation"] == 3
    await assert_bare_guest_goes_on(pair.primary)


# ---- the arbiter ------------------------------------------------------------------------------------------


async def test_arbiter_is_gone_while_all_else_works(pair: Pair, etcd: Etcd) -> None:
    etcd.members[0].kill()
    await assert_nothing_happened(pair)
    assert (await post(pair.primary, "verify"))["ok"] is True
    etcd.members[0].start()
    await etcd.wait_healthy()
    pair.kill_primary_host()
    await pair.backup.wait_takeover()


async def test_an_arbiter_that_answers_late_is_waited_for(pair: Pair, etcd: Etcd) -> None:
    """Frozen longer than its time limit: the claim may have been granted, so it is put again."""
    etcd.members[0].signal(signal.SIGSTOP)
    pair.kill_primary_host()
    await pair.backup.wait_state("held", 20)
    await pair.backup.wait_status(
        "a doubt", lambda now: now["authority"]["error"] != "" and now["state"] == "held", 20
    )
    assert await free_guests(pair) == []
    etcd.members[0].signal(signal.SIGCONT)
    status = await pair.backup.wait_takeover()
    assert status["generation"] == 2
    await assert_bare_guest_goes_on(pair.backup)


async def test_a_folder_that_both_hosts_mount_is_the_arbiter(start_pair: StartPair, tmp_path: Path) -> None:
    """kind = "file", for a pair in two network namespaces: takeover, coming back, and back again."""
    folder = tmp_path / "arbiter"
    folder.mkdir()
    settings = NIC | {
        "arbiter": {"kind": "file", "pair": "web", "folder": str(folder), "accept_split_brain": False}
    }
    pair: Pair = await start_pair(await bare_guest(), settings)
    pair.kill_primary_host()
    status = await pair.backup.wait_takeover()
    assert status["generation"] == 2
    await boot(pair.a, pair.primary)
    await pair.wait_protected()
    assert (await pair.primary.status())["role"] == "backup"
    assert (await post(pair.backup, "switchover"))["code"] == 200
    await pair.primary.wait_takeover()
    await pair.wait_protected()
    assert (await pair.primary.status())["generation"] == 3
    assert sorted(path.name for path in folder.iterdir())[0] == "web.00000001"
    await assert_bare_guest_goes_on(pair.primary)
