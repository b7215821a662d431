"""What both sides do with a connection before it belongs to a session."""

from __future__ import annotations

import socket

from ftd.channel import Channel, FrameChannel
from ftd.errors import NothingToResume, PeerError
from ftd.link.options import LinkOptions
from ftd.messages import Hello, Refusal, Welcome, decode, encode
from ftd.wire import PAYLOAD_LIMITS, PROTOCOL_VERSION, LinkLost, LostKind, MessageType, VersionMismatch

HANDSHAKE_ONLY = {MessageType.HANDSHAKE: PAYLOAD_LIMITS[MessageType.HANDSHAKE]}


async def introduce(options: LinkOptions, channel: Channel, hello: Hello, name: str) -> Welcome:
    """Say hello on a connection that was made, and return the welcome.

    name: what the peer's certificate must be for. Raises PeerError or LinkLost.
    """
    if options.identity is not None:
        await channel.start_tls(options.identity, server_side=False, peer_name=name)
    channel.write(MessageType.HANDSHAKE, encode(hello))
    answer = decode(*await channel.receive(HANDSHAKE_ONLY))
    if isinstance(answer, Refusal):
        kind = NothingToResume if answer.lost else PeerError
        raise kind(f"{channel.peer} refused: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise LinkLost(
            LostKind.PROTOCOL, f"{channel.where}: the peer answered with a {answer.kind}, expected a welcome"
        )
    if answer.protocol != PROTOCOL_VERSION:
        raise VersionMismatch(answer.protocol)
    return answer


def frame_channel(
    options: LinkOptions, sock: socket.socket, peer: str, next_out: int, next_in: int
) -> FrameChannel:
    """Return the connection for frames, for a thread, of what a Channel for it was detached to."""
    return FrameChannel(
        sock,
        peer,
        next_out=next_out,
        next_in=next_in,
        max_part_bytes=options.max_part_bytes,
        stall_seconds=options.stall_seconds,
    )
