"""Proof of equality: the shadow is what the guest was, page for page, and no difference stays hidden.

FTD_TRACKER_EPOCHS sets the number of epochs, of which every tenth is verified.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from testbed.disks import MIB, make_images
from testbed.guarded import (
    ROUND,
    assert_bare_guest_goes_on,
    assert_linux_guest_is_sound,
    assert_takeover,
    bare_guest,
    console_faults,
    linux_guest,
    metric,
    wait_committed,
    wait_log,
    wait_ready,
)
from testbed.pair import Pair
from testbed.survival import Clients

from ftd.monitor import Monitor

EPOCHS = int(os.environ.get("FTD_TRACKER_EPOCHS", "500"))
# Of thousands of epochs, each may take a tenth of a second.
pytestmark = [pytest.mark.root, pytest.mark.timeout(180 + EPOCHS // 5)]
EVERY = 10
SETTINGS = {"epoch": {"length_ms": 20, "verify_every": EVERY}}


async def run_epochs_and_verify(pair: Pair) -> int:
    """Let the epochs pass; every tenth is verified on the backup, and none differs. Returns the committed."""
    status = await wait_committed(pair.primary, EPOCHS + EVERY, timeout_s=90 + EPOCHS / 10)
    await pair.backup.wait_status(
        "verifications", lambda told: told["epoch"]["committed"] >= EPOCHS + EVERY, timeout_s=30
    )
    await assert_never_different(pair)
    for daemon in (pair.primary, pair.backup):
        assert await metric(daemon, "ftd_epochs_committed_total") >= EPOCHS
    assert await metric(pair.backup, "ftd_epochs_verified_total") >= EPOCHS // EVERY
    committed: int = status["epoch"]["committed"]
    return committed


async def assert_never_different(pair: Pair) -> None:
    for daemon in (pair.primary, pair.backup):
        assert await metric(daemon, "ftd_verify_differing_pages_total") == 0, daemon.last_status[
            "last_verify"
        ]
        assert await metric(daemon, "ftd_syncs_completed_total") == 1, "protection was lost in between"


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("vcpus", "ring", "speculative", "hot"),
    [(1, 65536, "off", 0), (2, 65536, "always", 3), (2, 0, "always", 0)],
    ids=["ring-1-vcpu", "ring-2-vcpus-early-and-hot-pages", "bitmap-2-vcpus-early-pages"],
)
async def test_bare_guest_is_equal_for_500_epochs_and_taken_over(
    start_pair: Callable[..., Any], vcpus: int, ring: int, speculative: str, hot: int
) -> None:
    """With KVM's dirty rings, and with its bitmap; with pages sent early, and hot ones, too; across a reset.

    The guest has to run on all the while: one that stands still is equal to its shadow, too.
    The rings are large, so that none fills up: see test_guest_that_fills_its_ring_runs_on.
    """
    settings = {
        "epoch": {**SETTINGS["epoch"], "speculative": speculative, "hot_epochs": hot},
        "machine": {"dirty_ring_size": ring},
    }
    pair = await start_pair(await bare_guest("kvm", vcpus=vcpus, pages=512), settings)
    await run_epochs_and_verify(pair)
    await assert_bare_guest_goes_on(pair.primary)
    if speculative != "off":
        assert await metric(pair.primary, "ftd_speculative_pages_total") > EPOCHS
    assert (await metric(pair.primary, "ftd_hot_pages") > 0) == (hot > 0)
    async with await Monitor.connect(pair.primary.run_dir / "operator.sock") as operator:
        await operator.execute("system_reset")
    # Not at the beginning of a line: the guest may have been printing another one.
    await pair.primary.console.wait_for("ftd-bare: ready", 30)
    committed = (await wait_committed(pair.primary, 5 * EVERY))["epoch"]["committed"]
    await assert_bare_guest_goes_on(pair.primary)
    await assert_never_different(pair)
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)


@pytest.mark.kvm
async def test_guest_that_fills_its_ring_runs_on(start_pair: Callable[..., Any]) -> None:
    """The vCPU stops when its ring is full; once that is emptied it runs on, and no page was missed.

    Where KVM emulates the guest's code, the ring even overflows before the vCPU stops: all memory counts as
    dirty then, which is why the guest and its ring are small here.
    """
    settings = {**SETTINGS, "machine": {"dirty_ring_size": 4096}}
    guest = await bare_guest("kvm", pages=512, rounds_per_second=200)
    pair: Pair = await start_pair(guest, settings)
    await wait_committed(pair.primary, 50)
    rounds = len(pair.primary.console.find_all(ROUND))
    await wait_committed(pair.primary, 100)
    assert len(pair.primary.console.find_all(ROUND)) > rounds, "the guest stands still"
    for daemon in (pair.primary, pair.backup):
        assert await metric(daemon, "ftd_verify_differing_pages_total") == 0


@pytest.mark.kvm
async def test_frames_of_several_parts_are_equal(start_pair: Callable[..., Any]) -> None:
    """Frames that do not fit into one slot go on in the next, while the guest stays paused."""
    slot = 4 << 20
    settings = {
        "epoch": {"length_ms": 100, "verify_every": 2},
        "staging": {"slot_mib": slot >> 20, "slots": 2},
        # With the bitmap, dirty pages are counted, and the epoch would end before they are so many.
        "machine": {"dirty_ring_size": 65536},
    }
    pair: Pair = await start_pair(await bare_guest("kvm", pages=3000, rounds_per_second=20), settings)
    await wait_committed(pair.primary, 20)
    size = await metric(pair.primary, "ftd_epoch_frame_bytes_sum")
    assert size / await metric(pair.primary, "ftd_epoch_frame_bytes_count") > slot, "one slot was enough"
    assert await metric(pair.backup, "ftd_epochs_verified_total") >= 5
    assert await metric(pair.backup, "ftd_verify_differing_pages_total") == 0
    committed = (await pair.primary.status())["epoch"]["committed"]
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)


async def test_linux_guest_is_equal_for_500_epochs_and_taken_over(make_pair: Callable[..., Any]) -> None:
    """Under TCG, with its dirtier on, and devices that write to its memory all the time.

    The network card does for clients of every kind, and the disk for a program that reads back what it wrote,
    past the guest's own cache.
    """
    guest = await linux_guest(dirty_pages_per_second=2000, dirty_pages=1024, witness="vda")
    guest.disks = [{"path": "disk0.img"}]
    pair: Pair = await make_pair(guest, SETTINGS)
    await make_images(pair, [MIB], ext4=False)
    await pair.backup.start()
    await wait_ready(pair.backup)
    await pair.primary.start()
    await pair.wait_protected()
    await pair.primary.console.wait_for(r"^ftd-guest: ready", 90)
    clients = Clients(pair.network.client, pair.network.directory)
    await clients.start()
    requests = await metric(pair.primary, "ftd_epoch_journal_bytes_sum")
    committed = await run_epochs_and_verify(pair)
    assert await metric(pair.primary, "ftd_epoch_journal_bytes_sum") > requests, "its disk stood still"
    death = pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    await clients.wait_answers(after_ns=death.ended_ns)
    await clients.stop()
    assert await clients.problems() == []
    status = await assert_linux_guest_is_sound(pair)
    assert status["dirty_verified"] > 0
    assert console_faults(pair.backup.console.text()) == []


async def test_difference_is_named_and_mended(start_pair: Callable[..., Any]) -> None:
    """A byte is changed in the shadow's memory, from outside, on a page that the guest never writes to.

    Both sides name block and page, protection drops at once, and a full copy brings it back.
    """
    pair = await start_pair(await bare_guest(), SETTINGS)
    await wait_committed(pair.primary, 2 * EVERY)
    page = 8192 + 17  # at 32 MiB: above all that the guest uses
    (memory,) = pair.backup.host.memory_directory.glob("*.ram")
    with memory.open("r+b") as file:
        file.seek(page * 4096 + 100)
        file.write(b"\x01")
    named = await pair.primary.wait_status(
        "a difference", lambda status: (status["last_verify"] or {}).get("ok") is False, 30
    )
    # The next verification may have come, and have found all well, before this side is asked.
    for daemon in (pair.primary, pair.backup):
        line = await wait_log(daemon, "THE SHADOW DIFFERS FROM THE GUEST")
        assert f"{page}" in line
        assert "ftd-ram" in line
        assert await metric(daemon, "ftd_verify_differing_pages_total") == 1
    assert named["last_verify"]["differing"] == 1
    assert named["last_verify"]["differences"] == [{"block": "ftd-ram", "page": page}]
    reason = await wait_log(pair.primary, "state=syncing was=protected")
    assert (
        f"the shadow differs from the guest in 1 pages after epoch {named['last_verify']['epoch']}" in reason
    )
    assert f"first page {page} of block ftd-ram" in reason
    await asyncio.gather(
        *(
            daemon.wait_status(
                "protected and equal again",
                lambda status: status["state"] == "protected" and status["last_verify"]["ok"],
                60,
            )
            for daemon in (pair.primary, pair.backup)
        )
    )
    assert await metric(pair.primary, "ftd_syncs_completed_total") == 2
    await assert_bare_guest_goes_on(pair.primary)
