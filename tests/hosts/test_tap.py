"""The guest's network interface on a host where it only waits takes nothing in."""

from collections.abc import Callable
from typing import Any

import pytest
from testbed.arbitrated import arbitrated, post
from testbed.etcd import Etcd
from testbed.guarded import assert_takeover, linux_guest, wait_committed
from testbed.hosts import Host
from testbed.speakers import Speakers

pytestmark = pytest.mark.root


async def is_up(host: Host) -> bool:
    """Whether the host's tap is administratively up."""
    return "UP" in (await host.output(["ip", "-o", "link", "show", host.taps[0]])).split("<")[1].split(">")[
        0
    ].split(",")


async def test_tap_is_up_where_the_guest_runs_and_only_there(start_pair: Callable[..., Any]) -> None:
    """The shadow's tap is down until the takeover, so that nothing old waits in it for the guest."""
    pair = await start_pair(await linux_guest())
    committed = (await wait_committed(pair.primary, 5))["epoch"]["committed"]
    assert await is_up(pair.a)
    assert not await is_up(pair.b)
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    assert await is_up(pair.b)


async def test_nothing_waits_in_the_tap_of_a_host_that_becomes_the_backup(
    start_pair: Callable[..., Any], etcd: Etcd
) -> None:
    """The tap of a guest that has moved away is up; what arrives while the shadow is started is not kept.

    If it was, the guest would answer these requests when it comes back: they were answered elsewhere.
    """
    pair = await start_pair(await linux_guest(), arbitrated(etcd))
    await pair.primary.console.wait_for(r"^ftd-guest: ready", 90)
    async with Speakers(pair.network, ask_every_s=0.001) as probe:
        for leader, follower in ((pair.primary, pair.backup), (pair.backup, pair.primary)):
            assert (await post(leader, "switchover"))["code"] == 200
            await follower.wait_takeover()
            await pair.wait_protected()
    assert min(probe.answers[host.name] for host in (pair.a, pair.b)) > 20
    if found := probe.problems():
        pytest.fail("\n".join([*found[:5], f"{len(found)} in all"]), pytrace=False)
