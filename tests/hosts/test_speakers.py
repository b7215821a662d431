"""The probe for two guests that answer finds two, and not one that answers late or on another host."""

import asyncio
import time
from collections.abc import Callable

import pytest
from testbed.hosts import GUEST_ADDRESS, TestNetwork
from testbed.speakers import Speakers

pytestmark = pytest.mark.root


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_who_answers_is_seen(network: TestNetwork) -> None:
    """The kernels of the hosts answer here for the guest's address, one after the other and then both."""
    a, b = network.hosts.values()
    async with Speakers(network, ask_every_s=0.01) as probe:
        await a.output(["ip", "addr", "add", GUEST_ADDRESS, "dev", "br0"])
        await until(lambda: probe.answers["host-a"] > 10)
        await a.output(["ip", "addr", "del", f"{GUEST_ADDRESS}/32", "dev", "br0"])
        b.revive()  # its ports are other ones of the same names
        await b.output(["ip", "addr", "add", GUEST_ADDRESS, "dev", "br0"])
        await until(lambda: probe.answers["host-b"] > 10)
        assert probe.problems() == []
        await a.output(["ip", "addr", "add", GUEST_ADDRESS, "dev", "br0"])
        await until(lambda: bool(probe.problems()))
    assert "two guests answered" in probe.problems()[0]
    assert "on host-a and host-b" in probe.problems()[0]


async def test_an_answer_that_comes_late_is_no_second_one(network: TestNetwork) -> None:
    a, b = network.hosts.values()
    probe = Speakers(network)
    for question, host in ((1, a), (2, a), (3, b), (2, a), (4, b)):
        probe.heard(host.name, question)
    assert probe.problems() == []
    probe.heard(b.name, 2)
    assert len(probe.problems()) == 1


async def test_two_that_run_free_are_seen_without_a_network(network: TestNetwork) -> None:
    free = ["host-a"]

    async def look() -> list[str]:
        return free

    async with Speakers(network, look, look_every_s=0.001) as probe:
        await until(lambda: probe.looks > 10)
        assert probe.problems() == []
        free.append("host-b")
        await until(lambda: bool(probe.problems()))
    assert probe.problems()[0] == "two guests run with their output free: on host-a and host-b"
