"""What systemd hears, over real datagram sockets."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftd.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """NOTIFY_SOCKET and the socket behind it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        if request.param == "path":
            address = str(tmp_path / "notify")
            receiver.bind(address)
        else:
            address = f"@ftd-test-{os.getpid()}"
            receiver.bind("\0" + address[1:])
        yield address, receiver


def heard(receiver: socket.socket) -> str:
    return receiver.recv(4096).decode()


def test_messages(systemd: tuple[str, socket.socket]) -> None:
    address, receiver = systemd
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    notifier.ready("protected")
    assert heard(receiver) == "READY=1\nSTATUS=protected"
    notifier.status("syncing\nREADY=1")
    assert heard(receiver) == "STATUS=syncing READY=1"
    notifier.alive()
    assert heard(receiver) == "WATCHDOG=1"
    notifier.stopping()
    assert heard(receiver) == "STOPPING=1"


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier.from_environment({})
    assert notifier.watchdog_seconds is None
    notifier.ready("x")
    notifier.stopping()


def test_children_do_not_inherit_the_socket() -> None:
    environment = {
        "NOTIFY_SOCKET": "/x",
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid()),
        "A": "b",
    }
    notifier = Notifier.from_environment(environment)
    assert notifier.watchdog_seconds == 1
    assert environment == {"A": "b"}


@pytest.mark.parametrize("interval", ["", "0", "-5", "soon", "1.5", "²"])
def test_a_wrong_interval_means_no_watchdog(interval: str) -> None:
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": interval}
    assert Notifier.from_environment(environment).watchdog_seconds is None


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(environment).watchdog_seconds is None


def test_an_address_of_another_family_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    Notifier.from_environment({"NOTIFY_SOCKET": "vsock:2:1234"}).ready()
    assert "neither a path nor an abstract name" in caplog.text


def test_a_socket_that_is_gone_fails_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(str(tmp_path / "gone"))
    for _ in range(5):
        notifier.alive()
    assert caplog.text.count("cannot notify systemd") == 1


def test_a_full_socket_does_not_stop_the_daemon(systemd: tuple[str, socket.socket]) -> None:
    address, _ = systemd
    notifier = Notifier(address)
    for _ in range(5000):
        notifier.alive()


async def test_the_watchdog_gets_signs_of_life_only_while_healthy(systemd: tuple[str, socket.socket]) -> None:
    address, receiver = systemd
    why: list[str | None] = [None, None, "the sender thread died"]
    asked = asyncio.Event()

    def why_unhealthy() -> str | None:
        if len(why) == 1:
            asked.set()
            return why[0]
        return why.pop(0)

    notifier = Notifier(address, watchdog_seconds=0.03)
    task = asyncio.create_task(notifier.watch(why_unhealthy))
    async with asyncio.timeout(5):
        await asked.wait()
    task.cancel()
    assert [heard(receiver) for _ in range(3)] == [
        "WATCHDOG=1",
        "WATCHDOG=1",
        "STATUS=unhealthy: the sender thread died",
    ]


async def test_without_a_watchdog_watching_ends_at_once() -> None:
    async with asyncio.timeout(1):
        await Notifier("/x").watch(lambda: None)
