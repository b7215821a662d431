"""The primary's side of the link: makes the three connections of a session, and those of further paths."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from ftd.channel import Channel, FrameChannel, tune
from ftd.config.fields import NO_HOST
from ftd.errors import LinkError, PeerError
from ftd.link.handshake import frame_channel, introduce
from ftd.link.options import LinkOptions
from ftd.link.session import Session
from ftd.messages import Hello, Welcome
from ftd.metrics import Connection
from ftd.paths import PathSettings
from ftd.wire import LinkLost, VersionMismatch


async def connect(
    options: LinkOptions,
    hello: Hello,
    *,
    host: str,
    port: int,
    heartbeat_port: int,
    peer_name: str = "",
    source: str = "",
    on_lateness: Callable[[float], None] | None = None,
) -> Session:
    """Connect to the peer's listener, all three connections, within options.handshake_seconds.

    `peer_name` is what the peer's certificate must be for (default: `host`), `source` this side's address
    (default: the kernel's choice). Raises PeerError, one line, if the peer is incompatible, somebody else, or
    refused; LinkError if it cannot be reached: worth another try.
    """
    name = peer_name or host
    channels: dict[Connection, Channel] = {}
    frames: FrameChannel | None = None

    async def dial(path: PathSettings) -> Channel:
        return await _dial(options, hello, path, heartbeat_port, name)

    async def one(connection: Connection) -> Welcome:
        to = heartbeat_port if connection == "heartbeat" else port
        channels[connection] = channel = await _open(options, connection, host, to, source)
        return await introduce(options, channel, hello.model_copy(update={"channel": connection}), name)

    try:
        async with asyncio.timeout(options.handshake_seconds):
            welcome = await one("control")
            # A TaskGroup would wrap the error in a group; the first one is all that anybody wants to read.
            await _all_or_first_error(one("frames"), one("heartbeat"))
        sock, next_out, next_in = channels.pop("frames").detach()
        frames = frame_channel(options, sock, f"{host}:{port}", next_out, next_in)
        return Session(
            hello,
            welcome,
            channels.pop("control"),
            channels.pop("heartbeat"),
            frames,
            options,
            peer_node=welcome.node,
            on_lateness=on_lateness,
            dial=dial,
        )
    except TimeoutError:
        raise LinkError(
            f"{host}:{port}: no answer within {options.handshake_seconds:g} s; "
            "is the host up, and ftd running there?"
        ) from None
    except LinkLost as error:
        if isinstance(error, VersionMismatch):
            raise PeerError(f"{host}:{port}: {error.detail}") from None
        raise LinkError(f"cannot connect: {error.detail}") from None
    finally:
        for channel in channels.values():
            channel.close()


async def _dial(options: LinkOptions, hello: Hello, path: PathSettings, port: int, name: str) -> Channel:
    """Connect on a further path. Raises PeerError and LinkError."""
    channel: Channel | None = None
    try:
        async with asyncio.timeout(options.handshake_seconds):
            channel = await _open(options, "heartbeat", path.peer, port, path.listen)
            await introduce(
                options, channel, hello.model_copy(update={"channel": "heartbeat", "path": path.name}), name
            )
    except TimeoutError:
        if channel is not None:
            channel.close()
        raise LinkError(f"{path.peer}:{port}: no answer within {options.handshake_seconds:g} s") from None
    except BaseException:
        if channel is not None:
            channel.close()
        raise
    return channel


async def _open(options: LinkOptions, connection: Connection, host: str, port: int, source: str) -> Channel:
    loop = asyncio.get_running_loop()
    where = f"{host}:{port}"
    sock: socket.socket | None = None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, type_, protocol, _, address = found[0]
        sock = socket.socket(family, type_, protocol)
        sock.setblocking(False)
        tune(sock, user_timeout_seconds=options.user_timeout_seconds, urgent=connection != "frames")
        if source:
            sock.bind((source, 0))
        await loop.sock_connect(sock, address)
        return Channel(sock, connection, where)
    except UnicodeError:
        # Before anybody is asked about a name, it is brought into the form that DNS knows.
        raise LinkError(f"peer {host}: {NO_HOST}") from None
    except socket.gaierror as error:
        raise LinkError(f"peer {host}: {(error.strerror or str(error)).lower()}; give its address") from None
    except OSError as error:
        if sock is not None:
            sock.close()
        reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        remedy = "is ftd running there?" if isinstance(error, ConnectionRefusedError) else "is the path up?"
        raise LinkError(f"{where}: {reason}; {remedy}") from None
    except BaseException:
        if sock is not None:
            sock.close()
        raise


async def _all_or_first_error(*coroutines: Coroutine[Any, Any, Welcome]) -> None:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
