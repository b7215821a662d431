"""The listening sockets of the link: binding them, with a remedy when that fails, and accepting."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import suppress
from pathlib import Path

from ftd.errors import HostError, friendly


async def bind(host: str, port: int, backlog: int) -> socket.socket:
    """Listen on a port, non-blocking. Raises HostError, one line, when it cannot be had."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise HostError(
            f"listen = {host}: {(error.strerror or str(error)).lower()}; give an address of this host"
        ) from None
    family, _, _, _, address = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        user = _port_user(port) if error.errno == errno.EADDRINUSE else ""
        reason = friendly(OSError(error.errno, error.strerror))
        raise HostError(f"listen = {host}, port {port}{user}: {reason}") from None
    return sock


async def readable(sock: socket.socket) -> None:
    """Wait until something can be read, or accepted, from sock."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _port_user(port: int) -> str:
    """Say which process listens on a port of this network namespace, if /proc tells; else nothing."""
    wanted = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    wanted.add(f"socket:[{fields[9]}]")
    if not wanted:
        return ""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(descriptor.readlink()) in wanted:
                process = descriptor.parent.parent
                name = (process / "comm").read_text().strip()
                return f" (held by {name}, process {process.name})"
    return ""
