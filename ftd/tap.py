"""The guest's tap interfaces: down while the guest only waits here, up while it runs.

What arrives at a tap whose guest stands still is kept by the kernel, and would be delivered after a takeover:
old requests, seconds or days late. A tap that is down takes nothing.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Iterable

from ftd.config import Nic
from ftd.errors import HostError, friendly

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
_REQUEST = struct.Struct("16sh14x")  # struct ifreq with its flags


def switch(nics: Iterable[Nic], *, up: bool, missing_ok: bool = False) -> None:
    """Set the tap of every card up or down. Raises HostError naming the tap.

    missing_ok: pass over a tap that is not there yet, since QEMU makes it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        for nic in nics:
            name = nic.tap.encode()
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, _REQUEST.pack(name, 0))
                flags = _REQUEST.unpack(answer)[1]
                wanted = flags | IFF_UP if up else flags & ~IFF_UP
                if wanted != flags:
                    fcntl.ioctl(any_socket, SIOCSIFFLAGS, _REQUEST.pack(name, wanted))
            except OSError as error:
                if missing_ok and error.errno == errno.ENODEV:
                    continue
                way = "up" if up else "down"
                raise HostError(
                    f"[[machine.nic]] tap = {nic.tap}: cannot be set {way}: {friendly(error)}"
                ) from None
