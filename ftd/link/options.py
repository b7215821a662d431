"""What both sides of the link need to know."""

from __future__ import annotations

from dataclasses import dataclass

from ftd.messages import HeartbeatSettings
from ftd.paths import PathSettings
from ftd.tls import Identity
from ftd.wire import PAYLOAD_LIMITS, MessageType


@dataclass(frozen=True)
class LinkOptions:
    """The link's settings; times in seconds, sizes in bytes."""

    identity: Identity | None  # None: no TLS at all (insecure = true)
    heartbeat: HeartbeatSettings
    # For a connection to get through TCP, TLS and Hello, and for a session to get its three connections
    # together.
    handshake_seconds: float = 5.0
    # A part, once begun, may stand still for so long. Generous: a host or path that is gone is the
    # detector's.
    stall_seconds: float = 30.0
    # The kernel gives a connection up when sent data stays unacknowledged for so long: the last resort.
    user_timeout_seconds: float = 20.0
    # For a goodbye to be read by the peer before this side closes regardless.
    linger_seconds: float = 1.0
    # For control to tell why, when another connection ends first.
    grace_seconds: float = 0.25
    # Further paths for heartbeats, and for how long the link alone may be silent.
    paths: tuple[PathSettings, ...] = ()
    patience_seconds: float = 2.0
    max_part_bytes: int = PAYLOAD_LIMITS[MessageType.PART]
    # Accepted connections whose Hello has not come; above it, the oldest has to go.
    max_pending: int = 16
    max_sessions: int = 1
