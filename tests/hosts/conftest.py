"""Tests on hosts made of network namespaces; they need root and say so when they are skipped."""

import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from testbed.arbitrated import NIC, arbitrated, free_guests
from testbed.chaos import Chaos, as_text, counted, summary
from testbed.etcd import Etcd
from testbed.guarded import bare_guest, defects, wait_ready
from testbed.guest import KVM, Guest
from testbed.hosts import Host, TestNetwork
from testbed.pair import Pair
from testbed.speakers import Speakers

REPOSITORY = Path(__file__).parents[2]
StartPair = Callable[..., Awaitable[Pair]]

# Machines that run tests are busy: a daemon that is not scheduled for a moment is no dead host. Without an
# arbiter the backup would take over beside a primary that lives.
PATIENT = {"interval_ms": 100, "misses": 12}
# Pages are found by KVM's bitmap unless a test is about its rings.
DEFAULTS = {"heartbeat": PATIENT, "machine": {"dirty_ring_size": 0}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = pytest.mark.skip(reason="network namespaces need root")
    kvm = pytest.mark.skip(reason=f"{KVM} is not there, or may not be used")
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(root)
        if item.get_closest_marker("kvm") and not os.access(KVM, os.R_OK | os.W_OK):
            item.add_marker(kvm)


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[TestNetwork]:
    """Two hosts and a client, as TestNetwork makes them; nothing of it may be left afterwards.

    With an etcd, there is a third host for it; with `spare`, one more; with `side`, a further path.
    """
    more = [host for host, name in (("arbiter", "etcd"), ("host-c", "spare")) if name in request.fixturenames]
    with TestNetwork(["host-a", "host-b", *more], side="side" in request.fixturenames) as made:
        yield made
    assert made.leftovers() == []


@pytest.fixture
def side() -> None:
    """Heartbeats have a path of their own beside the link."""


@pytest.fixture
def spare(network: TestNetwork) -> Host:
    """A host that no daemon runs on yet."""
    return network.hosts["host-c"]


@pytest.fixture(scope="session")
def qemu_binary() -> Path:
    """The patched QEMU: $FTD_QEMU, or what scripts/build-qemu has built. A missing one is a failure."""
    if given := os.environ.get("FTD_QEMU"):
        return Path(given)
    script = REPOSITORY / "scripts/build-qemu"
    built = subprocess.run([script, "--print"], capture_output=True, text=True, check=False)
    if built.returncode != 0:
        pytest.fail("no QEMU to test with: run scripts/build-qemu, or set FTD_QEMU", pytrace=False)
    return Path(built.stdout.strip()) / "bin/qemu-system-x86_64"


@pytest.fixture
async def make_pair(network: TestNetwork, qemu_binary: Path) -> AsyncIterator[StartPair]:
    """Makes a pair of daemons that are not started: takes the guest, `settings` and `backup_settings`.

    Afterwards no log of either may hold what only a defect writes, whatever the test did to them. The logs
    are printed, and shown if the test failed. All the while somebody asks on the bridge whether two guests
    answer; a guest without a network is watched by its QEMUs.
    """
    pairs: list[Pair] = []
    probes: list[Speakers] = []

    async def make(
        guest: Guest,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        backup_settings: Mapping[str, Mapping[str, Any]] | None = None,
        qemu: Path = qemu_binary,
    ) -> Pair:
        tables = {**DEFAULTS, **{name: dict(table) for name, table in (settings or {}).items()}}
        more = {name: dict(table) for name, table in (backup_settings or {}).items()}
        pair = Pair(network, guest, qemu, tables, more)
        await pair.prepare()
        pairs.append(pair)
        # Without a network card there is no output, and nothing that could be held.
        mute = guest.kind == "bare" and "nic" in tables.get("machine", {})
        probes.append(Speakers(network, (lambda: free_guests(pair)) if mute else None).start())
        return pair

    yield make
    found = []
    for probe in probes:
        await probe.stop()
        print(f"---- asked {probe.asked} times who answers: {dict(probe.answers)}; {probe.looks} looks")
        found += probe.problems()
    for host in network.hosts.values():
        host.kill_all()
    for pair in pairs:
        for daemon in (pair.primary, pair.backup):
            if daemon.process is not None:
                await daemon.process.wait()
            print(f"---- log of the {daemon.role} on {daemon.host.name}\n{daemon.logs()[-6000:]}")
            found += defects(daemon)
        await pair.close()
    if found:
        pytest.fail("\n".join([*found[:20], f"{len(found)} in all"]), pytrace=False)


@pytest.fixture
async def start_pair(make_pair: StartPair) -> StartPair:
    """Like make_pair, but both daemons are started, and the guest is protected."""

    async def start(*arguments: Any, **settings: Any) -> Pair:
        pair = await make_pair(*arguments, **settings)
        await pair.backup.start()
        await wait_ready(pair.backup)
        await pair.primary.start()
        await pair.wait_protected()
        return pair

    return start


@pytest.fixture
async def etcd(network: TestNetwork) -> AsyncIterator[Etcd]:
    async with Etcd.on(network.hosts["arbiter"], network.directory / "etcd") as made:
        yield made


@pytest.fixture
async def pair(start_pair: StartPair, etcd: Etcd, request: pytest.FixtureRequest) -> Pair:
    """A protected pair with an arbiter."""
    more = getattr(request, "param", {})
    made: Pair = await start_pair(await bare_guest(), arbitrated(etcd) | NIC | more)
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What random schedules of faults were injected, and what came of them."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = [told for report in reports for name, told in report.user_properties if name == "chaos"]
    if rows:
        terminalreporter.section("faults injected, and what came of them")
        terminalreporter.write_line(as_text(summary(rows), counted(rows), width=160))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chaos(qemu_binary: Path) -> AsyncIterator[Chaos]:
    """Runs schedules of random faults; see tests/testbed/chaos.py."""
    made = Chaos(qemu_binary)
    yield made
    await made.close()
