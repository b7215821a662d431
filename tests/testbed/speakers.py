"""The probe for two guests that answer: one question, and never two sides that answer it.

    client --- ARP request, 02:a5:NUMBER asks ---> br-net ---> br0 of each host ---> tap ---> guest
    client <-------- ARP reply to 02:a5:NUMBER --- br-net <--- which port it came in at is noted

Each question bears a number, as the hardware address that asks; the guest's kernel answers to that address.
A guest whose output is held answers late, and one that was deposed may say late what had been committed
before: both are answers to old questions. But a question that was answered on two hosts' ports has reached
two guests, and both could speak. So the verdict needs no time limit, and knows nothing of takeovers.

Guests without a network say nothing to that. For them both QEMUs are asked, over QMP, whether a guest runs
whose output is free.
"""

import asyncio
import contextlib
import ctypes
import secrets
import socket
import struct
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable
from typing import Self

from testbed.hosts import GUEST_ADDRESS, NET, TestNetwork
from testbed.namespaces import call_in_namespace

ASKS = f"{NET}.201"
ETH_P_ALL, ETH_P_ARP = 3, 0x0806
PACKET_OUTGOING = 4
SO_ATTACH_FILTER = 26
ASK_EVERY_S = 0.05
LOOK_EVERY_S = 0.1
REMEMBERED = 10_000  # questions

# Of frames: ARP replies to our kind of question.
_REPLIES = (
    (0x28, 0, 0, 12),
    (0x15, 0, 5, ETH_P_ARP),
    (0x28, 0, 0, 20),
    (0x15, 0, 3, 2),
    (0x28, 0, 0, 32),  # the first two bytes of the address that asked
    (0x15, 0, 1, 0x02A5),
    (6, 0, 0, 128),
    (6, 0, 0, 0),
)

_NUMBERS = (1 << 22) - 1
_OURS = struct.pack("!HH", 2, 0x02A5)

Look = Callable[[], Awaitable[list[str]]]


def _attach(sock: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(code))
    )


class Speakers:
    """Asks and listens, as an asynchronous context manager, or from `start` to `stop`.

    `look`: names the hosts on which a guest runs with its output free; None: nobody is asked.
    """

    def __init__(
        self,
        network: TestNetwork,
        look: Look | None = None,
        *,
        look_every_s: float = LOOK_EVERY_S,
        ask_every_s: float = ASK_EVERY_S,
    ) -> None:
        self._ports = {host.ports[0]: name for name, host in network.hosts.items()}
        self._look, self._look_every_s, self._ask_every_s = look, look_every_s, ask_every_s
        self._client = call_in_namespace(
            network.client.namespace, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0
        )
        self._client.bind(("net0", 0))
        self._mac = self._client.getsockname()[4]
        # On all interfaces: a host that boots again has other ones of the same names.
        self._switch = call_in_namespace(
            network.namespace("switch"),
            socket.socket,
            socket.AF_PACKET,
            socket.SOCK_RAW,
            socket.htons(ETH_P_ALL),
        )
        _attach(self._switch, _REPLIES)
        self._switch.settimeout(0.2)
        # Of several probes in one network each knows its own questions.
        self._tag = secrets.randbits(10) << 22
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._listen)]
        self._task: asyncio.Task[None] | None = None
        self._answered: OrderedDict[int, set[str]] = OrderedDict()
        self._found: list[str] = []
        self.asked = 0
        self.answers: dict[str, int] = defaultdict(int)  # by host
        self.looks = 0

    def problems(self) -> list[str]:
        """What was seen of two guests that speak, one line each."""
        return list(self._found)

    # ---- threads ------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        while not self._over.wait(self._ask_every_s):
            self.asked += 1
            asks = struct.pack("!HI", 0x02A5, self._tag | (self.asked & _NUMBERS))
            frame = b"\xff" * 6 + self._mac + struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, 1)
            frame += asks + socket.inet_aton(ASKS) + bytes(6) + socket.inet_aton(GUEST_ADDRESS)
            with contextlib.suppress(OSError):  # cut off for a moment
                self._client.send(frame)

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                data, (port, _, kind, *_) = self._switch.recvfrom(128)
            except OSError:  # nothing, or an interface that went away
                continue
            # What came before the filter was in place is anything.
            if kind == PACKET_OUTGOING or port not in self._ports or data[20:22] + data[32:34] != _OURS:
                continue
            (question,) = struct.unpack_from("!I", data, 34)
            if question & ~_NUMBERS == self._tag:
                self.heard(self._ports[port], question & _NUMBERS)

    def heard(self, host: str, question: int) -> None:
        """Note an answer."""
        self.answers[host] += 1
        hosts = self._answered.setdefault(question, set())
        if hosts and host not in hosts:
            self._found.append(
                f"two guests answered: question {question}, on {' and '.join(sorted({*hosts, host}))}"
            )
        hosts.add(host)
        while len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    async def _watch(self, look: Look) -> None:
        while not self._over.is_set():
            if len(free := await look()) > 1:
                self._found.append(f"two guests run with their output free: on {' and '.join(free)}")
            self.looks += 1
            await asyncio.sleep(self._look_every_s)

    # ---- start and stop -----------------------------------------------------------------------------------

    def start(self) -> Self:
        for thread in self._threads:
            thread.start()
        if self._look is not None:
            self._task = asyncio.create_task(self._watch(self._look))
        return self

    async def stop(self) -> None:
        """Safe to call twice."""
        if self._over.is_set():
            return
        self._over.set()
        if self._task is not None:
            await self._task  # a look that is broken off leaves a QMP connection half made
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._client.close()
        self._switch.close()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
