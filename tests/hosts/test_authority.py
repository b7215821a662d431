"""Exactly one side speaks, whatever breaks, and protection comes back by itself; etcd is on a third host.

Each test is a row of the table in docs/failures.md. Two guests never run at once with their output free: the
fixture `make_pair` watches both sides through every test.
"""

import signal
from collections.abc import Callable
from typing import Any

import pytest
from testbed.arbitrated import arbitrated, boot, free_guests, lives, post
from testbed.etcd import Etcd
from testbed.guarded import (
    ask,
    assert_bare_guest_goes_on,
    linux_guest,
    metric,
    wait_committed,
    wait_ended,
)
from testbed.pair import Daemon, Pair

pytestmark = pytest.mark.root
StartPair = Callable[..., Any]


async def wait_roles(primary: Daemon, backup: Daemon, generation: int) -> None:
    """The pair is whole again, the roles are these, and the guest goes on."""
    await primary.wait_state("protected", 60)
    await backup.wait_state("protected", 60)
    for daemon, role in ((primary, "primary"), (backup, "backup")):
        status = await daemon.status()
        assert (status["role"], status["generation"]) == (role, generation)
    assert (await primary.status())["authority"]["standing"] == "paired"
    await assert_bare_guest_goes_on(primary)


# ---- the backup's side breaks -----------------------------------------------------------------------------


async def test_backup_host_dies_and_comes_back(pair: Pair) -> None:
    """Primary asks, and goes on alone; the backup that boots again is protected without a person."""
    pair.b.kill_all()
    status = await pair.primary.wait_state("solo", 20)
    assert status["generation"] == 2
    assert status["output"]["holding"] is False
    assert await free_guests(pair) == ["host-a"]
    await assert_bare_guest_goes_on(pair.primary)
    await boot(pair.b, pair.backup)
    await wait_roles(pair.primary, pair.backup, 2)


async def test_without_arbiter_in_reach_output_is_held_until_it_answers(pair: Pair, etcd: Etcd) -> None:
    etcd.members[0].signal(signal.SIGSTOP)
    pair.b.kill_all()
    status = await pair.primary.wait_state("held", 20)
    await pair.primary.wait_status(
        "a question without an answer", lambda now: now["authority"]["error"] != "", 20
    )
    status = await pair.primary.status()
    assert "no answer within 0.5 s" in status["authority"]["error"]
    assert await metric(pair.primary, "ftd_warning", warning="arbiter_unreachable") == 1
    assert await free_guests(pair) == []
    await assert_bare_guest_goes_on(pair.primary)  # the guest itself runs on
    etcd.members[0].signal(signal.SIGCONT)
    await pair.primary.wait_state("solo", 20)
    assert await free_guests(pair) == ["host-a"]
    assert await metric(pair.primary, "ftd_warning", warning="arbiter_unreachable") == 0


async def test_link_cut_and_arbiter_gone_hold_both_and_the_link_back_brings_protection(
    pair: Pair, etcd: Etcd
) -> None:
    """Neither can ask. An arbiter that is not there leaves no doubt: so they may protect again without it."""
    etcd.members[0].kill()
    pair.b.cut_link()
    await pair.primary.wait_state("held", 20)
    await pair.backup.wait_state("held", 20)
    assert await free_guests(pair) == []
    pair.b.restore_link()
    await wait_roles(pair.primary, pair.backup, 1)


# ---- the primary's side breaks ----------------------------------------------------------------------------


async def test_primary_host_dies_boots_and_becomes_the_backup(pair: Pair) -> None:
    committed = (await wait_committed(pair.primary, 3))["epoch"]["committed"]
    pair.kill_primary_host()
    status = await pair.backup.wait_takeover()
    assert status["takeover"]["epoch"] >= committed
    assert (status["role"], status["generation"]) == ("primary", 2)
    await assert_bare_guest_goes_on(pair.backup)
    await boot(pair.a, pair.primary)
    await wait_roles(pair.backup, pair.primary, 2)
    # And the other way round: roles are symmetrical.
    pair.b.kill_all()
    await pair.primary.wait_takeover()
    await assert_bare_guest_goes_on(pair.primary)


async def test_primary_qemu_dies_and_its_daemon_becomes_the_backup(pair: Pair) -> None:
    pair.kill_primary_qemu()
    await pair.backup.wait_takeover()
    await wait_roles(pair.backup, pair.primary, 2)


async def test_primary_daemon_dies_and_the_next_finds_itself_deposed(pair: Pair) -> None:
    """The guest that it left behind never speaks, and is killed by the daemon that comes back."""
    stale = pair.primary.qemu_pid()
    pair.kill_primary_daemon()
    await pair.backup.wait_takeover()
    assert lives(stale)
    assert await free_guests(pair) == ["host-b"]
    await pair.primary.close()
    await pair.primary.start()
    await wait_roles(pair.backup, pair.primary, 2)
    assert not lives(stale)
    assert "deposed: this node is the backup from now on" in pair.primary.logs()


async def test_frozen_primary_host_wakes_deposed(pair: Pair) -> None:
    """SIGSTOP to all of it, and SIGCONT after it has lost the guest."""
    stale = pair.primary.qemu_pid()
    pair.a.freeze()
    await pair.backup.wait_takeover()
    pair.a.thaw()
    await wait_roles(pair.backup, pair.primary, 2)
    assert not lives(stale)


async def test_frozen_backup_host_wakes_and_takes_nothing(pair: Pair) -> None:
    pair.b.freeze()
    await pair.primary.wait_state("solo", 20)
    pair.b.thaw()
    await wait_roles(pair.primary, pair.backup, 2)
    assert (await pair.backup.status())["takeover"] is None


@pytest.mark.parametrize("direction", ["both", "from-host", "to-host"])
async def test_link_of_the_primary_is_cut(pair: Pair, direction: str) -> None:
    """Its way to the arbiter is cut with it, so the backup wins; the primary holds, and is deposed after."""
    pair.a.cut_link(direction)
    await pair.backup.wait_takeover()
    await pair.primary.wait_state("held", 20)
    assert await free_guests(pair) == ["host-b"]
    pair.a.restore_link()
    await wait_roles(pair.backup, pair.primary, 2)


# ---- daemons and hosts restart ----------------------------------------------------------------------------


async def test_planned_restart_of_the_primary_daemon_keeps_the_guest_served(pair: Pair) -> None:
    qemu = pair.primary.qemu_pid()
    assert await pair.primary.stop() == 0
    assert await free_guests(pair) == ["host-a"]
    await pair.primary.close()
    await pair.primary.start()
    await pair.primary.wait_state("protected", 60)
    assert pair.primary.qemu_pid() == qemu
    assert "took over" not in pair.backup.logs()


async def test_both_hosts_are_switched_off_and_on(pair: Pair) -> None:
    """Who had the guest last starts it, though the configuration says otherwise: it has the newest disks."""
    pair.kill_primary_host()
    await pair.backup.wait_takeover()
    pair.b.kill_all()
    await boot(pair.a, pair.primary)
    await boot(pair.b, pair.backup)
    await pair.backup.wait_status("the guest", lambda status: status["role"] == "primary", 30)
    await pair.backup.wait_state("protected", 60)
    status = await pair.primary.wait_state("protected", 60)
    assert status["role"] == "backup"
    assert status["generation"] == 3


async def test_arbiter_back_with_old_data_is_refused(pair: Pair, etcd: Etcd) -> None:
    """By a primary that holds since it lost its backup, and by one that starts; a word helps both."""
    await etcd.wipe()
    pair.b.kill_all()
    told = "the arbiter knows nothing, and this node has seen generation 1"
    await pair.primary.wait_status(
        "a refusal", lambda now: now["state"] == "held" and told in now["authority"]["error"], 30
    )
    assert await metric(pair.primary, "ftd_warning", warning="arbiter_stale") == 1
    assert (await post(pair.primary, "takeover"))["code"] == 409
    assert await free_guests(pair) == []
    assert (await post(pair.primary, "takeover", '{"force": true}'))["code"] == 200
    status = await pair.primary.wait_state("solo", 30)
    assert (status["generation"], status["output"]["holding"]) == (2, False)
    assert await metric(pair.primary, "ftd_warning", warning="arbiter_stale") == 0
    await etcd.wipe()
    pair.a.kill_all()
    await boot(pair.a, pair.primary)
    told = "the arbiter knows nothing, and this node has seen generation 2"
    await pair.primary.wait_status(
        "a refusal", lambda now: now["state"] == "waiting" and told in now["reason"], 30
    )
    assert await metric(pair.primary, "ftd_warning", warning="arbiter_stale") == 1
    assert (await post(pair.primary, "takeover", '{"force": true}'))["code"] == 200
    status = await pair.primary.wait_state("solo", 30)
    assert status["generation"] == 3
    assert await metric(pair.primary, "ftd_warning", warning="arbiter_stale") == 0


# ---- what is asked for ------------------------------------------------------------------------------------


async def test_switchover_there_and_back(pair: Pair) -> None:
    told = await post(pair.primary, "switchover")
    assert told == {"detail": "the backup has the guest", "code": 200}
    status = await pair.backup.wait_takeover()
    assert status["takeover"]["trigger"] == "switchover"
    await wait_roles(pair.backup, pair.primary, 2)
    assert (await post(pair.backup, "switchover"))["code"] == 200
    await wait_roles(pair.primary, pair.backup, 3)


async def test_protection_is_paused_and_resumed(pair: Pair) -> None:
    assert (await post(pair.primary, "pause-protection"))["code"] == 200
    status = await pair.primary.wait_state("solo", 20)
    assert status["solo_intended"] is True
    assert await free_guests(pair) == ["host-a"]
    await pair.backup.wait_state("waiting", 20)
    assert (await post(pair.primary, "resume-protection"))["code"] == 200
    await wait_roles(pair.primary, pair.backup, 2)


async def test_takeover_by_force_needs_the_word_and_goes_past_a_dead_arbiter(pair: Pair, etcd: Etcd) -> None:
    etcd.members[0].kill()
    pair.kill_primary_host()
    await pair.backup.wait_state("held", 20)
    assert (await post(pair.backup, "takeover"))["code"] == 409
    # With its shadow, the guest would be gone.
    refused = await post(pair.backup, "upgrade")
    assert (refused["code"], "the daemon is not replaced now" in str(refused)) == (409, True)
    assert await free_guests(pair) == []
    assert (await post(pair.backup, "takeover", '{"force": true}'))["code"] == 200
    status = await pair.backup.wait_takeover()
    assert status["takeover"]["trigger"] in ("silence", "forced")
    await assert_bare_guest_goes_on(pair.backup)


async def test_guest_that_powers_itself_off_stops_both_and_starts_where_it_was(
    start_pair: StartPair, etcd: Etcd
) -> None:
    """Rule S7, and what the arbiter keeps of it."""
    pair: Pair = await start_pair(await linux_guest(), arbitrated(etcd))
    await pair.primary.console.wait_for(r"^ftd-guest: ready", 90)
    await pair.wait_protected()
    await ask(pair.network.client, "POST", "/poweroff")
    assert await wait_ended(pair.primary) == 0
    assert await wait_ended(pair.backup) == 0
    assert "took over" not in pair.backup.logs()
    await pair.primary.close()
    await pair.primary.start()
    status = await pair.primary.wait_state("solo", 30)
    assert status["generation"] == 2
