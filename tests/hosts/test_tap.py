"""The guest's network interface on a host where it only waits takes nothing in."""

from collections.abc import Callable
from typing import Any

import pytest
from testbed.guarded import assert_takeover, linux_guest, wait_committed
from testbed.hosts import Host

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
