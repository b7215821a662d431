"""Heartbeats over two paths: the peer is lost when it is heard on neither; a lost link alone is no death."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from testbed.arbitrated import free_guests
from testbed.guarded import assert_bare_guest_goes_on, bare_guest, metric, wait_committed
from testbed.guest import ROOT
from testbed.pair import Daemon, Pair

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("side")]
StartPair = Callable[..., Any]

# How long is long enough is for the tests to say: a link that is to come back has ten seconds, which is more
# than TCP takes to notice; one that is not has none.
BEATS = {"interval_ms": 50, "misses": 16}
PATIENT = {"heartbeat": {**BEATS, "link_patience_ms": 10_000}}
HASTY = {"heartbeat": {**BEATS, "link_patience_ms": 0}}


async def wait_path(daemon: Daemon, name: str, up: bool) -> dict[str, Any]:
    """Wait until a path is up, or down, as this daemon sees it."""

    def as_wanted(status: dict[str, Any]) -> bool:
        return [path["up"] for path in status["peer"]["paths"] if path["name"] == name] == [up]

    return await daemon.wait_status(f"path {name} {'up' if up else 'down'}", as_wanted, 30)


async def why(daemon: Daemon) -> "subprocess.CompletedProcess[str]":
    """Run `ftd why` on the host of a daemon."""
    return await asyncio.to_thread(
        subprocess.run,
        daemon.host.command([sys.executable, "-m", "ftd", "why", daemon.config, "--last", "1000"]),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("pair", [PATIENT], indirect=True)
async def test_one_path_down_is_no_loss_and_both_are(pair: Pair) -> None:
    """Each of the two goes and comes back, with the guest protected; then both go at once."""
    for daemon in (pair.primary, pair.backup):
        await wait_path(daemon, "side", True)
    pair.b.cut_side()
    for daemon in (pair.primary, pair.backup):
        status = await wait_path(daemon, "side", False)
        assert status["state"] == "protected"
        assert any("heartbeat path side is down: nothing heard" in text for text in status["warnings"])
        assert await metric(daemon, "ftd_heartbeat_path_up", path="side") == 0
        assert await metric(daemon, "ftd_heartbeat_path_up", path="link") == 1
        assert await metric(daemon, "ftd_heartbeat_path_losses_total", path="side") == 1
        assert await metric(daemon, "ftd_warning", warning="path_down") == 1
    await wait_committed(pair.primary, 3)
    pair.b.restore_side()
    for daemon in (pair.primary, pair.backup):
        status = await wait_path(daemon, "side", True)
        assert not any("heartbeat path" in text for text in status["warnings"])

    pair.b.cut_link()
    for daemon in (pair.primary, pair.backup):
        await wait_path(daemon, "link", False)
    assert await free_guests(pair) == []  # what is not committed does not leave
    pair.b.restore_link()
    for daemon in (pair.primary, pair.backup):
        await wait_path(daemon, "link", True)
    await wait_committed(pair.primary, 3)
    status = await pair.primary.status()
    assert (status["state"], status["generation"]) == ("protected", 1)
    assert "link ended" not in pair.primary.logs() + pair.backup.logs()
    assert '"what": "path"' in (pair.primary.folder / "state" / "flight.jsonl").read_text()

    pair.a.cut_side()
    pair.a.cut_link()
    status = await pair.backup.wait_takeover()
    assert status["takeover"]["trigger"] == "silence"
    await assert_bare_guest_goes_on(pair.backup)


@pytest.mark.parametrize("pair", [HASTY], indirect=True)
async def test_link_is_lost_and_the_primary_lives(pair: Pair) -> None:
    """It goes on alone if it reaches the arbiter; if it does not, the backup takes over, but asks second.

    And `ftd why` has the other node's record fetched when there is a session, and says when there is none.
    """
    await wait_path(pair.primary, "side", True)
    pair.b.cut_link()
    status = await pair.primary.wait_state("solo", 20)
    assert status["generation"] == 2
    assert await free_guests(pair) == ["host-a"]
    told = await why(pair.primary)
    assert told.returncode == 0
    assert told.stderr.startswith("ftd: without the other node's record: ")
    assert told.stderr.endswith(f"no session with the peer at {pair.b.link_address} now: this node is solo\n")
    assert told.stderr.count("\n") == 1
    assert "No takeover after host-a lost its peer" in told.stdout
    assert "  host-b " not in told.stdout
    await pair.backup.wait_state("held", 20)
    assert "took over" not in pair.backup.logs()
    pair.b.restore_link()
    await pair.primary.wait_state("protected", 60)
    await pair.backup.wait_state("protected", 60)
    await wait_path(pair.primary, "side", True)

    pair.a.cut_link()  # and with it the way to the arbiter
    await pair.primary.wait_state("held", 20)
    status = await pair.backup.wait_takeover()
    assert status["takeover"]["trigger"] == "link-cut"
    assert await free_guests(pair) == ["host-b"]
    pair.a.restore_link()
    await pair.primary.wait_status("backup", lambda now: now["role"] == "backup", 30)
    await pair.backup.wait_state("protected", 60)
    assert (await pair.backup.status())["generation"] == 3
    for daemon in (pair.primary, pair.backup):
        told = await why(daemon)
        assert (told.returncode, told.stderr) == (0, "")
        assert "host-b took over at " in told.stdout
        assert "  host-a " in told.stdout
        assert "  host-b " in told.stdout


async def test_without_an_arbiter_a_primary_that_is_heard_is_not_taken_over(start_pair: StartPair) -> None:
    """With one path this is a split brain."""
    pair: Pair = await start_pair(await bare_guest(), HASTY)
    await wait_path(pair.backup, "side", True)
    pair.b.cut_link("to-host")  # the primary hears everything, and is told on the other path
    await pair.primary.wait_state("solo", 20)
    status = await pair.backup.wait_state("waiting", 20)
    assert "the primary left: cut: " in status["reason"]
    pair.b.restore_link()
    await pair.primary.wait_state("protected", 60)
    assert "took over" not in pair.backup.logs()
