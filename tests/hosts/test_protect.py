"""`ftd protect`: a new backup for a guest that runs. The choice outlives daemon and host."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from testbed.arbitrated import boot, post
from testbed.guarded import assert_bare_guest_goes_on, metric, wait_ready
from testbed.guest import ROOT
from testbed.hosts import Host
from testbed.pair import Daemon, Pair

pytestmark = pytest.mark.root
StartPair = Callable[..., Any]


async def backup_on(host: Host, pair: Pair) -> Daemon:
    """A backup of the pair's primary on another host, with a certificate of the same authority."""
    tls = pair.network.directory / "tls"
    words = [ROOT / "scripts/make-certificates", tls, f"{host.name}={host.link_address}"]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0
    folder = pair.network.directory / host.name
    daemon = Daemon(host, "backup", folder, pair.configuration(host, pair.a, "backup"))
    await daemon.start()
    await wait_ready(daemon)
    return daemon


async def test_a_guest_alone_gets_a_third_host_which_takes_over(pair: Pair, spare: Host) -> None:
    """The choice outlives the primary's daemon, and the primary itself."""
    pair.b.kill_all()
    await pair.primary.wait_state("solo", 20)
    third = await backup_on(spare, pair)
    told = await post(pair.primary, "protect", json.dumps({"host": spare.link_address}))
    note = pair.primary.folder / "state" / "peer.json"
    assert told["code"] == 200
    assert str(note) in told["detail"]
    assert json.loads(note.read_text())["host"] == spare.link_address
    before = pair.primary.config.read_text()
    await pair.primary.wait_state("protected", 60)
    await third.wait_state("protected", 60)

    assert await pair.primary.stop() == 0
    await pair.primary.close()
    await pair.primary.start()
    status = await pair.primary.wait_state("protected", 60)
    assert status["peer"]["name"] == spare.name
    assert any("as `ftd protect` chose" in text for text in status["warnings"])
    assert await metric(pair.primary, "ftd_warning", warning="other_peer") == 1
    assert pair.primary.config.read_text() == before

    await third.wait_state("protected", 60)
    pair.kill_primary_host()
    await third.wait_takeover()
    await assert_bare_guest_goes_on(third)
    await boot(pair.a, pair.primary)
    # It becomes the backup of a node that its configuration does not name.
    status = await pair.primary.wait_state("protected", 60)
    assert (status["role"], status["peer"]["name"]) == ("backup", spare.name)
    await third.close()
