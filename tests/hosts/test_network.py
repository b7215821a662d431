"""The testbed itself: what it cuts is cut, what it kills is dead, and nothing stays behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from testbed.hosts import (
    CLIENT_ADDRESS,
    Direction,
    Host,
    Node,
    TestbedError,
    TestNetwork,
    processes_in,
    remove_kept,
    remove_stale,
)
from testbed.namespaces import call_in_namespace

pytestmark = pytest.mark.root

PORT = 7999


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def udp(node: Node, address: str) -> socket.socket:
    made = call_in_namespace(node.namespace, socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, PORT))
    made.settimeout(0.3)
    return made


def arrives(sender: socket.socket, receiver: socket.socket, text: bytes = b"hello") -> bool:
    try:
        sender.sendto(text, receiver.getsockname())
        return receiver.recv(100) == text
    except OSError:  # no answer in time, or no way there
        return False


@pytest.mark.parametrize(
    ("direction", "from_a", "to_a"),
    [("both", False, False), ("from-host", False, True), ("to-host", True, False)],
)
def test_link_is_cut_in_the_directions_asked_for(
    network: TestNetwork, direction: Direction, from_a: bool, to_a: bool
) -> None:
    a, b = network.hosts["host-a"], network.hosts["host-b"]
    with udp(a, a.link_address) as end_a, udp(b, b.link_address) as end_b:
        assert arrives(end_a, end_b)
        assert arrives(end_b, end_a)
        a.cut_link(direction)
        assert (arrives(end_a, end_b), arrives(end_b, end_a)) == (from_a, to_a)
        a.restore_link()
        assert arrives(end_a, end_b)
        assert arrives(end_b, end_a)


async def test_link_and_network_are_cut_apart(network: TestNetwork) -> None:
    a = network.hosts["host-a"]
    with udp(a, a.address) as host, udp(network.client, CLIENT_ADDRESS) as client:
        # The kernel tells the host's bridge of its carrier a moment after the network was built.
        await until(lambda: arrives(host, client))
        a.cut_link()
        assert arrives(host, client)
        a.cut_network()
        assert not arrives(host, client)
        a.restore_network()
        assert arrives(host, client)
        a.link_down()
        assert not arrives(host, client)
        a.link_up()
        await until(lambda: arrives(host, client))  # the carrier comes back a moment later


def connects(source: Node, address: str, port: int) -> bool:
    def attempt() -> bool:
        try:
            with socket.create_connection((address, port), 0.3):
                return True
        except OSError:
            return False

    return call_in_namespace(source.namespace, attempt)


def test_one_peer_or_one_port_is_cut_and_nothing_else() -> None:
    with TestNetwork(["host-a", "host-b", "arbiter"]) as network:
        a, b, c = network.hosts.values()
        servers = [
            call_in_namespace(host.namespace, socket.create_server, (host.link_address, port))
            for host in (b, c)
            for port in (PORT, PORT + 1)
        ]

        def reached() -> list[bool]:
            return [connects(a, host.link_address, port) for host in (b, c) for port in (PORT, PORT + 1)]

        assert reached() == [True, True, True, True]
        a.cut_from(b)
        assert reached() == [False, False, True, True]
        a.cut_port(PORT)
        assert reached() == [False, False, False, True]
        a.restore_from(b)
        assert reached() == [False, True, False, True]
        a.restore_port(PORT)
        assert reached() == [True, True, True, True]
        a.cut_port(PORT + 1, "to-host")
        a.restore_all()
        assert reached() == [True, True, True, True]
        for server in servers:
            server.close()


def test_link_can_be_made_slow(network: TestNetwork) -> None:
    a = network.hosts["host-a"]
    a.limit_link(100_000_000)
    assert "tbf" in subprocess.check_output(a.command(["tc", "qdisc", "show", "dev", "link0"]), text=True)
    a.limit_link(None)
    assert "tbf" not in subprocess.check_output(a.command(["tc", "qdisc", "show", "dev", "link0"]), text=True)


async def accept_and_wait(host: Host, client: Node) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """A process on the host with an open TCP connection to the client, and the client's end."""
    listener = call_in_namespace(client.namespace, socket.create_server, (CLIENT_ADDRESS, PORT))
    listener.settimeout(5)
    program = f"import socket,time; s=socket.create_connection(('{CLIENT_ADDRESS}',{PORT})); time.sleep(600)"
    process = await host.run([sys.executable, "-c", program])
    with listener:
        connection, _ = await asyncio.to_thread(listener.accept)
    connection.settimeout(0.5)
    return process, connection


async def test_death_of_a_host_is_silent(network: TestNetwork) -> None:
    a = network.hosts["host-a"]
    process, connection = await accept_and_wait(a, network.client)
    child = await a.run(["sh", "-c", "setsid sleep 600 & setsid sleep 600 & wait"])
    await until(lambda: len(a.processes()) == 4)
    with connection:
        death = a.kill_all()
        assert len(death.killed) == 4
        assert a.processes() == []
        assert death.began_ns <= death.links_down_ns <= death.ended_ns
        assert await process.wait() == -signal.SIGKILL
        assert await child.wait() == -signal.SIGKILL
        # No FIN and no RST: the client hears nothing.
        with pytest.raises(TimeoutError):
            connection.recv(1)


async def test_kill_of_a_process_is_heard(network: TestNetwork) -> None:
    """The opposite of the test before, so that its silence means something."""
    process, connection = await accept_and_wait(network.hosts["host-a"], network.client)
    with connection:
        process.kill()
        await process.wait()
        assert connection.recv(1) == b""


async def test_frozen_host_thaws(network: TestNetwork) -> None:
    a = network.hosts["host-a"]
    process = await a.run(["sleep", "600"])
    assert a.freeze() == [process.pid]
    await until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T")
    assert a.thaw() == [process.pid]
    process.kill()
    await process.wait()


async def test_dead_host_boots_again(network: TestNetwork) -> None:
    a, b = network.hosts["host-a"], network.hosts["host-b"]
    process = await a.run(["sleep", "600"])
    a.kill_all()
    await process.wait()
    a.revive()
    with udp(a, a.link_address) as end_a, udp(b, b.link_address) as end_b:
        assert arrives(end_a, end_b)
    assert await a.output(["cat", "/sys/class/net/tap0/operstate"])


async def test_output_says_what_went_wrong(network: TestNetwork) -> None:
    with pytest.raises(TestbedError, match="nonsense"):
        await network.client.output(["ip", "link", "show", "nonsense"])


async def use_and_fail(network: TestNetwork) -> None:
    async with network:
        await network.hosts["host-a"].run(["sh", "-c", "setsid sleep 600 & sleep 600"])
        (network.hosts["host-a"].memory_directory / "ram").write_bytes(b"x")
        assert network.leftovers()
        raise ZeroDivisionError


async def test_nothing_is_left_even_after_a_failure() -> None:
    network = TestNetwork()
    with pytest.raises(ZeroDivisionError):
        await use_and_fail(network)
    assert network.leftovers() == []


def start_victim(keep: bool) -> tuple[subprocess.Popen[str], str]:
    """A Python process with a network of its own, and the network's prefix."""
    program = (
        "import subprocess, sys, time\n"
        "from testbed.hosts import TestNetwork\n"
        f"network = TestNetwork(keep={keep})\n"
        "network.start()\n"
        "subprocess.Popen(network.client.command(['sleep', '600']), start_new_session=True, stdout=-3)\n"
        "print(network.prefix, flush=True)\n"
        f"time.sleep({0 if keep else 600})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    victim = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert victim.stdout is not None
    return victim, victim.stdout.readline().strip()


@pytest.mark.alone  # others remove what they find, too
def test_next_run_removes_what_a_killed_one_left() -> None:
    victim, prefix = start_victim(keep=False)
    remove_stale()
    inode = Path(f"/run/netns/{prefix}-client").stat().st_ino  # it lives, so it is not touched
    victim.kill()
    victim.wait()
    assert prefix in remove_stale()
    assert not list(Path("/run/netns").glob(f"{prefix}*"))
    assert processes_in([inode]) == []


def test_kept_network_stays_until_asked() -> None:
    victim, prefix = start_victim(keep=True)
    victim.wait()
    assert victim.returncode == 0
    assert prefix not in remove_stale()
    assert Path(f"/run/netns/{prefix}-client").exists()
    assert prefix in remove_kept()
    assert not Path(f"/run/netns/{prefix}-client").exists()


def test_runs_live_side_by_side() -> None:
    with TestNetwork() as one, TestNetwork() as other:
        assert one.prefix != other.prefix
        with udp(one.client, CLIENT_ADDRESS) as mine, udp(other.hosts["host-a"], "10.77.0.11") as theirs:
            assert not arrives(theirs, mine)


def test_death_takes_little_time(network: TestNetwork) -> None:
    death = network.hosts["host-b"].kill_all()
    print(f"links down after {(death.links_down_ns - death.began_ns) / 1e6:.2f} ms")
    assert death.ended_ns - death.began_ns < 2e9
    assert time.monotonic_ns() >= death.ended_ns
