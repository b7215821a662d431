"""Network output is held and let go by QEMU, whatever the backend, with several cards and queues at once.

The test is at the other end of each card's backend, and asks by ARP: whoever asks under the address N is
answered by the guest under the address N, so that answers can be told apart and are seen to be in order.
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from testbed.guest import FAST_BOOT, Console, build
from testbed.namespaces import call_in_namespace, http_session

from ftd.errors import QemuError
from ftd.monitor import Monitor
from ftd.staging import Staging, slot_size

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

MIB = 1 << 20
GUEST = ipaddress.IPv4Address("10.0.2.15")
ASKER = ipaddress.IPv4Address("10.0.2.100")
ASKER_MAC = bytes.fromhex("525400aa0001")
QUEUES = 2
TAP = "tap0"
WEB_PORT = 8080  # in the test's own namespace
MEMORY_MIB = 128
ETH_P_ALL = 3
ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")
ARP_TYPE, REQUEST, REPLY = 0x0806, 1, 2


def _question(number: int) -> bytes:
    asker = (ASKER + number).packed
    head = (b"\xff" * 6, ASKER_MAC, ARP_TYPE, 1, 0x0800, 6, 4, REQUEST)
    return ARP.pack(*head, ASKER_MAC, asker, bytes(6), GUEST.packed).ljust(60, b"\0")


def _answer(frame: bytes) -> int | None:
    """The number of the question that a frame answers, if it is an answer of the guest."""
    if len(frame) < ARP.size:
        return None
    fields = ARP.unpack_from(frame)
    if fields[2] != ARP_TYPE or fields[7] != REPLY or fields[9] != GUEST.packed:
        return None
    return int(ipaddress.IPv4Address(fields[11])) - int(ASKER)


class Wire:
    """The other end of a card's backend."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        end.setblocking(False)

    def ask(self, number: int) -> None:
        self._send(_question(number))

    def try_to_ask(self, number: int) -> bool:
        """False if QEMU has not read what was asked before."""
        try:
            self.ask(number)
        except BlockingIOError:
            return False
        return True

    def answers(self) -> list[int]:
        """Those that are there now, in order; they are taken off the wire."""
        found = [_answer(frame) for frame in self._frames()]
        return [number for number in found if number is not None]

    async def wait_answers(self, count: int) -> list[int]:
        found: list[int] = []
        async with asyncio.timeout(30):
            while len(found) < count:
                found += self.answers()
                await asyncio.sleep(0.002)
        return found

    def _send(self, frame: bytes) -> None:
        self._end.send(frame)

    def _frames(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                yield self._end.recv(65536)


class DatagramWire(Wire):
    """Not connected, since only then the kernel has QEMU wait when a few datagrams are not read."""

    def __init__(self, end: socket.socket, to: Path) -> None:
        super().__init__(end)
        self._to = str(to)

    def _send(self, frame: bytes) -> None:
        self._end.sendto(frame, self._to)


class StreamWire(Wire):
    """A stream carries the length of each frame in front of it."""

    _rest = b""

    def _send(self, frame: bytes) -> None:
        self._end.sendall(struct.pack("!I", len(frame)) + frame)

    def _frames(self) -> Iterator[bytes]:
        self._rest += b"".join(super()._frames())
        while len(self._rest) >= 4:
            size = 4 + struct.unpack_from("!I", self._rest)[0]
            if len(self._rest) < size:
                return
            yield self._rest[4:size]
            self._rest = self._rest[size:]


@pytest.fixture
def namespace() -> Iterator[str]:
    """A namespace with a tap of several queues in it."""
    name = f"ftdv-{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "tuntap", "add", "dev", TAP, "mode", "tap", "multi_queue")
        ip("-n", name, "link", "set", TAP, "up")
        yield name
    finally:
        ip("netns", "delete", name)


class Machine:
    """A guest with cards on backends of every kind, protected by hand."""

    def __init__(self, monitor: Monitor, staging: Staging, wires: dict[str, Wire], namespace: str) -> None:
        self.monitor, self.wires = monitor, wires
        self._staging, self._namespace = staging, namespace
        self._slot = 0

    async def begin(self, **arguments: Any) -> None:
        for slot in self._staging.slots:
            await self.monitor.send_descriptor(slot.name, slot.fd)
        names = [slot.name for slot in self._staging.slots]
        await self.monitor.execute("x-ft-begin", generation=1, slots=names, **arguments)
        while not (await self._part("x-ft-collect", 1))["complete"]:
            pass

    async def checkpoint(self, epoch: int) -> None:
        while not (await self._part("x-ft-checkpoint", epoch))["complete"]:
            pass

    async def _part(self, command: str, epoch: int) -> dict[str, Any]:
        self._slot = (self._slot + 1) % len(self._staging.slots)
        part: dict[str, Any] = await self.monitor.execute(command, slot=self._slot, epoch=epoch)
        return part

    async def output(self) -> dict[str, Any]:
        output: dict[str, Any] = (await self.monitor.execute("query-x-ft"))["output"]
        return output

    async def ask(self, numbers: range) -> None:
        """Ask on every wire, and wait until all answers are held."""
        held = (await self.output())["packets"]
        for number in numbers:
            for wire in self.wires.values():
                wire.ask(number)
        async with asyncio.timeout(30):
            while (await self.output())["packets"] < held + len(numbers) * len(self.wires):  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def counter(self) -> int:
        """Ask the guest's web service, by way of the card on slirp."""
        async with (
            http_session(self._namespace, timeout_s=60) as session,
            session.post(f"http://127.0.0.1:{WEB_PORT}/increment") as answer,
        ):
            return int(await answer.text())


def _listen(kind: int, path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, kind)
    end.settimeout(30)
    end.bind(str(path))
    return end


@pytest.fixture
async def machine(qemu_binary: Path, folder: Path, namespace: str) -> AsyncIterator[Machine]:
    guest = await build("guests/linux/build")
    console = Console(folder / "console")
    # In the namespace, where a socket takes no more than ten datagrams that nobody has read.
    datagrams = call_in_namespace(namespace, _listen, socket.SOCK_DGRAM, folder / "here")
    server = _listen(socket.SOCK_STREAM, folder / "stream")
    server.listen(1)
    ends = {"local": folder / "there", "remote": folder / "here"}
    backends = {
        "user": f"user,hostfwd=tcp:127.0.0.1:{WEB_PORT}-{GUEST}:80",
        "dgram": "dgram," + ",".join(f"{n}.type=unix,{n}.path={path}" for n, path in ends.items()),
        "stream": f"stream,server=off,addr.type=unix,addr.path={folder / 'stream'}",
        "tap": f"tap,ifname={TAP},script=no,downscript=no,vhost=off,queues={QUEUES}",
    }
    words = ["ip", "netns", "exec", namespace, str(qemu_binary)]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    for firmware in ("/usr/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu"):
        words += ["-L", firmware]
    words += ["-m", f"{MEMORY_MIB}", "-smp", f"{QUEUES}", "-serial", f"file:{console.path}"]
    words += ["-kernel", f"{guest / 'vmlinuz'}", "-initrd", f"{guest / 'initramfs.cpio'}"]
    # No IPv6: its chatter would be counted with the answers that are held.
    network = f"ftd.ip={GUEST}/24 ftd.gw=10.0.2.2 ipv6.disable=1"
    words += ["-append", f"console=ttyS0 quiet panic=1 {FAST_BOOT} {network}"]
    for number, (name, backend) in enumerate(backends.items()):
        kind, _, rest = backend.partition(",")
        words += ["-netdev", f"{kind},id={name},{rest}"]
        more = f",mq=on,vectors={2 * QUEUES + 2}" if name == "tap" else ""
        words += ["-device", f"virtio-net-pci,netdev={name},mac=52:54:00:00:00:{number:02x}{more}"]
    words += ["-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
    process = subprocess.Popen(words)  # noqa: ASYNC220 - a moment, in a test
    try:
        stream, _ = await asyncio.to_thread(server.accept)
        packets = call_in_namespace(namespace, socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
        packets.bind((TAP, ETH_P_ALL))
        wires = {
            "dgram": DatagramWire(datagrams, folder / "there"),
            "stream": StreamWire(stream),
            "tap": Wire(packets),
        }
        await console.wait_for("^ftd-guest: ready", 90)
        async with await Monitor.connect(folder / "qmp") as monitor:
            staging = Staging(2, slot_size(MEMORY_MIB * MIB, 2 * MEMORY_MIB * MIB))
            try:
                yield Machine(monitor, staging, wires, namespace)
            finally:
                staging.close()
    finally:
        process.kill()
        process.wait()


async def test_every_backend_is_held_and_let_go_in_order(machine: Machine) -> None:
    """Cards on tap with two queues, datagram and stream sockets and slirp, all at once.

    What was sent in an epoch leaves with that epoch's release and not before, in order, and no other.
    """
    for wire in machine.wires.values():
        wire.ask(1)
        assert await wire.wait_answers(1) == [1]
    before = await machine.counter()
    await machine.begin(output_limit=MIB)
    await machine.checkpoint(1)
    await machine.ask(range(10, 15))
    web = asyncio.ensure_future(machine.counter())
    await machine.checkpoint(2)
    await machine.ask(range(20, 25))
    await machine.monitor.execute("x-ft-release", epoch=1)
    assert [wire.answers() for wire in machine.wires.values()] == [[], [], []]
    with pytest.raises(QemuError, match="3"):
        await machine.monitor.execute("x-ft-release", epoch=3)
    await machine.monitor.execute("x-ft-release", epoch=2)
    for wire in machine.wires.values():
        assert await wire.wait_answers(5) == [*range(10, 15)]
    assert not web.done()
    epoch = 3
    async with asyncio.timeout(60):
        while not web.done():
            await machine.checkpoint(epoch)
            await machine.monitor.execute("x-ft-release", epoch=epoch)
            epoch += 1
    assert web.result() == before + 1
    for wire in machine.wires.values():
        assert await wire.wait_answers(5) == [*range(20, 25)]
    output = await machine.output()
    assert (output["released-epoch"], output["dropped"]) == (epoch - 1, 0)


async def test_end_of_protection(machine: Machine) -> None:
    """What is held goes out, is dropped, or stays held with all that follows, as the daemon says."""
    for output in ("release", "drop", "hold"):
        await machine.begin(output_limit=MIB)
        await machine.checkpoint(1)
        await machine.ask(range(10, 15))
        await machine.monitor.execute("x-ft-end", output=output)
        expected = [] if output == "drop" else [*range(10, 15)]
        if output == "hold":
            await machine.ask(range(20, 25))
            assert [wire.answers() for wire in machine.wires.values()] == [[], [], []]
            assert (await machine.output())["holding"]
            await machine.monitor.execute("x-ft-end", output="release")
            expected += range(20, 25)
        # Sent last and seen last, so nothing else can come any more.
        for wire in machine.wires.values():
            wire.ask(99)
            assert await wire.wait_answers(len(expected) + 1) == [*expected, 99], output
        assert not (await machine.output())["holding"]


async def begin_with_little_room(machine: Machine) -> asyncio.Event:
    """Hold output, fewer answers than are asked for here; the event is set when a card has to wait."""
    full = asyncio.Event()
    machine.monitor.on("X_FT_OUTPUT_FULL", lambda _: full.set())
    await machine.begin(output_limit=4096)
    await machine.checkpoint(1)
    return full


async def test_a_full_queue_makes_the_guest_wait(machine: Machine) -> None:
    """More answers than may be held: the guest keeps them in its own rings, and they come in order later."""
    full = await begin_with_little_room(machine)
    tap = machine.wires["tap"]
    asked = range(10, 140)  # of 42 bytes and a header each
    for number in asked:
        tap.ask(number)
    async with asyncio.timeout(30):
        await full.wait()
    assert tap.answers() == []
    output = await machine.output()
    assert (output["dropped"], output["pushed-back"] > 0, output["bytes"] <= 2 * 4096) == (0, True, True)
    epoch, found = 2, list[int]()
    async with asyncio.timeout(60):
        while len(found) < len(asked):
            await machine.checkpoint(epoch)
            await machine.monitor.execute("x-ft-release", epoch=epoch)
            found += tap.answers()
            epoch += 1
    assert sorted(found) == [*asked]
    assert (await machine.output())["dropped"] == 0


async def test_the_end_of_protection_wakes_a_card_whose_backend_has_no_room(machine: Machine) -> None:
    """Nobody is left then who would wake it when there is room."""
    full = await begin_with_little_room(machine)
    wire = machine.wires["dgram"]
    asked = range(10, 140)
    async with asyncio.timeout(30):
        for number in asked:
            while not wire.try_to_ask(number):  # noqa: ASYNC110 - QEMU does not tell
                await asyncio.sleep(0.001)
        await full.wait()
    await machine.monitor.execute("x-ft-end", output="release")
    assert sorted(await wire.wait_answers(len(asked))) == [*asked]
