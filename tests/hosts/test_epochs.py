"""Within and between epochs: pages sent early, several frames under way, a length that follows the load."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from testbed.guarded import (
    assert_bare_guest_goes_on,
    assert_takeover,
    bare_guest,
    metric,
    wait_committed,
)
from testbed.pair import Pair

pytestmark = pytest.mark.root
StartPair = Callable[..., Any]

MIB = 1 << 20


async def test_pages_sent_early_belong_to_their_frame(start_pair: StartPair) -> None:
    """In every epoch: verified page by page on the way, and worth a takeover at the end.

    The host dies with pages of the running epoch on the backup, whose checkpoint will never come: what
    arrived of them must not be used, which the guest's own check of all its pages shows.
    """
    settings = {"epoch": {"speculative": "always", "length_ms": 50, "verify_every": 10}}
    pair: Pair = await start_pair(await bare_guest(pages=1024, rounds_per_second=100), settings)
    await pair.backup.wait_status(
        "ten epochs verified",
        lambda status: (status["last_verify"] or {"epoch": 0})["epoch"] >= 100,
        90,
    )
    speculation = (await pair.primary.status())["speculation"]
    assert (speculation["mode"], speculation["active"]) == ("always", True)
    assert speculation["rounds"] > 50
    assert 0 < speculation["pages_again"] <= speculation["pages"]
    assert await metric(pair.primary, "ftd_speculative_rounds_total") >= speculation["rounds"]
    assert await metric(pair.backup, "ftd_verify_differing_pages_total") == 0
    # A narrow link, so that the early part is still on it, or the last to have arrived.
    pair.a.limit_link(400_000_000)
    committed = (await wait_committed(pair.primary, 3))["epoch"]["committed"]
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)


async def test_early_pages_that_are_dirty_again_are_noticed(start_pair: StartPair) -> None:
    """A guest that writes to the same pages all the time: after the trials no page is sent early any more."""
    # After the round there is time for the guest to come around, on a busy host as well.
    settings = {"epoch": {"speculative": "auto", "length_ms": 80}}
    pair: Pair = await start_pair(await bare_guest(pages=512, rounds_per_second=200), settings)
    status = await pair.primary.wait_status(
        "a trial and a break", lambda status: status["epoch"]["committed"] >= 60, 60
    )
    speculation = status["speculation"]
    assert not speculation["active"]
    assert speculation["gain"] < 0
    assert 0 < speculation["rounds"] < 30
    assert speculation["pages_again"] > speculation["pages"] / 2


async def test_several_frames_are_under_way_within_the_bound(start_pair: StartPair) -> None:
    """On a link that is slower than the guest; and death then loses no epoch that was committed."""
    limit = 8 * MIB
    settings = {"epoch": {"in_flight_mib": limit // MIB}, "staging": {"slot_mib": 8, "slots": 4}}
    pair: Pair = await start_pair(await bare_guest(pages=256, rounds_per_second=100), settings)
    await wait_committed(pair.primary, 5)
    pair.a.limit_link(60_000_000)
    most_frames, most_bytes, last = 0, 0, 0
    async with asyncio.timeout(60):
        while most_frames < 3 or last < 3 or not await metric(pair.primary, "ftd_epochs_stretched_total"):
            status = await pair.primary.status()
            epoch = status["epoch"]
            most_frames = max(most_frames, epoch["in_flight"])
            most_bytes = max(most_bytes, status["in_flight_bytes"])
            last += epoch["in_flight"] >= 2
            # None is lost track of: the one that runs, those under way, and the committed.
            assert epoch["begun"] == epoch["committed"] + epoch["aborted"] + epoch["in_flight"] + 1
    assert most_bytes <= limit
    async with asyncio.timeout(30):
        while (status := await pair.primary.status())["epoch"]["in_flight"] < 2:
            pass
    pair.kill_primary_host()
    taken = await assert_takeover(pair, "silence", committed=status["epoch"]["committed"])
    # Released or not, what was committed is an epoch that had been closed.
    assert taken["takeover"]["epoch"] <= status["epoch"]["current"] + 3
    await assert_bare_guest_goes_on(pair.backup)


async def test_every_epoch_in_flight_is_counted_when_it_is_given_up(start_pair: StartPair) -> None:
    settings = {"epoch": {"in_flight_mib": 16}, "staging": {"slot_mib": 8, "slots": 4}}
    pair: Pair = await start_pair(await bare_guest(pages=256, rounds_per_second=100), settings)
    pair.a.limit_link(40_000_000)
    await pair.primary.wait_status(
        "two frames in flight", lambda status: status["epoch"]["in_flight"] >= 2, 60
    )
    pair.b.kill_all()
    status = await pair.primary.wait_state("solo")
    epoch = status["epoch"]
    assert epoch["aborted"] >= 3
    assert (epoch["begun"], epoch["in_flight"]) == (epoch["committed"] + epoch["aborted"], 0)
    assert status["in_flight_bytes"] == 0
    await assert_bare_guest_goes_on(pair.primary)


async def test_auto_shortens_the_epochs_of_a_guest_that_does_little(start_pair: StartPair) -> None:
    """And only down to what is configured, whatever this machine's pauses are."""
    settings = {
        "epoch": {
            "mode": "auto",
            "length_ms": 400,
            "slowdown_percent": 50,
            "latency_ms": 5000,
            "shortest_ms": 40,
            "longest_ms": 400,
        }
    }
    pair: Pair = await start_pair(await bare_guest(pages=64), settings)
    status = await pair.primary.wait_status(
        "short epochs", lambda status: status["epoch"]["target"] < 0.060, 60
    )
    epoch = status["epoch"]
    assert (epoch["mode"], epoch["configured"]) == ("auto", 0.4)
    assert epoch["decided_by"] in ("shortest", "slowdown")
    assert epoch["target"] >= 0.040
    assert 0 < epoch["slowdown"] < 1
    assert epoch["added_latency"] > 0
    await assert_bare_guest_goes_on(pair.primary)
