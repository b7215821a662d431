"""The units in systemd/, run by a real systemd on each host."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from testbed.arbitrated import NIC, arbitrated, lives, one_speaks
from testbed.etcd import Etcd
from testbed.guarded import assert_bare_guest_goes_on, bare_guest, wait_ready
from testbed.hosts import TestbedError, TestNetwork
from testbed.pair import Pair
from testbed.systemd import Systemd, SystemdMissingError, Unit, inside

pytestmark = pytest.mark.root


@pytest.fixture
def systemds(network: TestNetwork) -> list[Systemd]:
    """One for each host of a pair; they are not started."""
    return [Systemd(network.hosts[name]) for name in ("host-a", "host-b")]


async def start(systemd: Systemd) -> None:
    try:
        await systemd.start()
    except SystemdMissingError as error:
        pytest.skip(str(error))


async def test_units_start_reload_and_come_back(
    systemds: list[Systemd], etcd: Etcd, make_pair: Callable[..., Any]
) -> None:
    """A reload keeps the guest protected. A killed daemon is started again, and has become the backup. When a
    unit is stopped its guest lives on, and is found by the next start.
    """
    pair: Pair = await make_pair(await bare_guest(), arbitrated(etcd) | NIC)
    a = Unit(systemds[0], pair.primary, pair.configuration(pair.a, pair.b, "primary"))
    b = Unit(systemds[1], pair.backup, pair.configuration(pair.b, pair.a, "backup"))
    pair.primary, pair.backup = a, b
    for unit in (b, a):
        await start(unit.systemd)
        await unit.start()
        assert await unit.systemd.show(unit.unit, "ActiveState") == "active"
        if unit is b:
            await wait_ready(b)
    await pair.wait_protected()
    qemu = a.qemu_pid()

    async with one_speaks(pair):
        for count, unit in enumerate((a, b), 1):
            await unit.systemd.control("reload", unit.unit)
            for each in (a, b):
                status = await each.wait_state("protected", 30)
                assert status["generation"] == 1
            assert (await b.status())["resumption"]["count"] == (count if unit is a else 1)
            assert await unit.systemd.show(unit.unit, "ActiveState") == "active"
            assert await unit.systemd.show(unit.unit, "NRestarts") == "0"
        assert a.qemu_pid() == qemu
        await assert_bare_guest_goes_on(a)

        await a.systemd.control("kill", "--kill-whom=main", "--signal=KILL", a.unit)
        taken = await b.wait_takeover()
        assert taken["generation"] == 2
        status = await a.wait_state("protected", 60)
        assert status["role"] == "backup"
        assert await a.systemd.show(a.unit, "NRestarts") == "1"
        assert not lives(qemu)
        await assert_bare_guest_goes_on(b)

        await b.wait_state("protected", 30)
        qemu = b.qemu_pid()
        await b.systemd.control("stop", b.unit)
        assert lives(qemu)
        await b.start()
        assert b.qemu_pid() == qemu
        status = await b.wait_state("protected", 60)
        assert status["role"] == "primary"
        await assert_bare_guest_goes_on(b)


async def test_daemon_that_hangs_is_ended_by_the_watchdog(
    systemds: list[Systemd], etcd: Etcd, make_pair: Callable[..., Any]
) -> None:
    """And its unit starts the next one, which finds the shadow's guest elsewhere and becomes the backup."""
    pair: Pair = await make_pair(await bare_guest(), arbitrated(etcd) | NIC)
    a = Unit(systemds[0], pair.primary, pair.configuration(pair.a, pair.b, "primary"))
    pair.primary = a
    await pair.backup.start()
    await wait_ready(pair.backup)
    await start(a.systemd)
    (a.systemd.units / "ftd-primary@.service.d" / "watchdog.conf").write_text("[Service]\nWatchdogSec=2\n")
    await a.systemd.control("daemon-reload")
    await a.start()
    await pair.wait_protected()
    pid = int(await a.systemd.show(a.unit, "MainPID"))
    assert pid > 1
    outside = next(each for each in pair.a.processes() if inside(each) == pid)
    async with one_speaks(pair):
        os.kill(outside, signal.SIGSTOP)
        assert (await pair.backup.wait_takeover())["generation"] == 2
        status = await a.wait_state("protected", 60)
        assert status["role"] == "backup"
    assert int(await a.systemd.show(a.unit, "NRestarts")) >= 1
    assert int(await a.systemd.show(a.unit, "MainPID")) != pid
    await assert_bare_guest_goes_on(pair.backup)


async def test_wrong_configuration_is_not_tried_again(
    systemds: list[Systemd], make_pair: Callable[..., Any]
) -> None:
    """The unit fails, and stays so: starting again would not mend it."""
    pair: Pair = await make_pair(await bare_guest())
    tables = pair.configuration(pair.a, pair.b, "primary")
    a = Unit(systemds[0], pair.primary, tables | {"epoch": {"length": 20}})
    await start(a.systemd)
    with pytest.raises(TestbedError):
        await a.start()
    assert await a.systemd.show(a.unit, "ExecMainStatus") == "2"
    assert await a.systemd.show(a.unit, "ActiveState") == "failed"
    assert a.logs().count("\n") == 1
    assert "[epoch] length = 20: unknown key; did you mean length_ms?" in a.logs()
