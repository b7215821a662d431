"""What really is on a wire: the frames of one sender, with the kernel's time of each."""

import contextlib
import socket
import struct
import threading
import time
from typing import Self

from testbed.hosts import GUEST_MAC, Node
from testbed.namespaces import call_in_namespace

ETH_P_ALL = 3
PACKET_OUTGOING = 4
SOL_PACKET, PACKET_STATISTICS = 263, 6
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35
ROOM = 256 << 20
KEPT = 96  # bytes of each frame


def _stamp(extra: list[tuple[int, int, bytes]]) -> int:
    """The kernel's time of a message, in nanoseconds of the time of day."""
    for _, kind, value in extra:
        if kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", value)
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    raise OSError("the kernel tells no time of a message")


def _wait_until_stamped() -> None:
    """Wait until the kernel notes times on arrival.

    It begins to do so a moment after the first socket wants it. Of what arrives before, the time is that at
    which it is read.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        probe.bind(("127.0.0.1", 0))
        probe.settimeout(5)
        while True:
            probe.sendto(b"", probe.getsockname())
            sent = time.time_ns()
            if _stamp(probe.recvmsg(1, 128)[1]) <= sent:
                return


class Capture:
    """Records frames that come in at an interface from `mac`, as a context manager.

    At the tap of a guest's NIC, "in" is what QEMU writes: the kernel notes a frame before that call returns,
    so the time of a frame is never later than the moment at which QEMU says that it has let it go.
    """

    def __init__(self, node: Node, interface: str, mac: str = GUEST_MAC) -> None:
        self.frames: list[tuple[int, bytes]] = []  # monotonic ns, first bytes
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._socket = call_in_namespace(node.namespace, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.settimeout(0.1)
        _wait_until_stamped()
        self._socket.bind((interface, ETH_P_ALL))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record, name=f"capture-{interface}")

    def _record(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError, OSError):  # an interface that goes away is silent
                self._read()

    def _read(self) -> None:
        data, extra, _, address = self._socket.recvmsg(KEPT, 128)
        if address[2] == PACKET_OUTGOING or data[6:12] != self._mac:
            return
        # The kernel tells the time of day; the two clocks do not drift apart while a frame waits here.
        offset = time.monotonic_ns() - time.time_ns()
        self.frames.append((_stamp(extra) + offset, data))

    def missed(self) -> int:
        """How many frames the kernel had no room for, since this was asked last."""
        told = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        return int(struct.unpack("II", told)[1])

    def datagrams(self, port: int) -> list[int]:
        """The numbers of the flooder's datagrams to this port, in the order in which they came."""
        return [
            struct.unpack_from("!Q", data, 42)[0]
            for _, data in self.frames
            if data[12:14] == b"\x08\x00" and data[23] == socket.IPPROTO_UDP
            if struct.unpack_from("!H", data, 36)[0] == port
        ]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()
