"""The link between primary and backup: three TCP connections that live and end together, as a `Session`.

    control     data port        both ways    event loop   Hello, then acknowledgements and control messages
    frames      data port        to backup    a thread     parts of frames
    heartbeat   heartbeat port   both ways    event loop   signs of life, which must not wait behind a frame

The primary connects, the backup listens. Control comes first: its Hello is what the backup admits or refuses;
the other two show the same session id. Each connection has TLS of its own, with certificates on both sides.

How a session ends is said by `wait_lost()`, once and for good (LostKind):

    goodbye    the peer said so, on control and on heartbeat: a planned stop
    reset      control ended without it: the daemon there died. Known at once, as its kernel says so
    silence    nothing heard for interval × misses (ftd.detector), or the path takes no data: the host is gone
    stalled    the peer's daemon is there but takes or sends no bytes of a part
    protocol   the peer sent what it may not
    closed     this side called close()

Control decides: what else the peer wanted to say (that the guest shut down, say) is on its way there, and
packets of several connections overtake each other. So when frames or heartbeat end first, control gets
`grace_seconds` to end, too, before the session counts as lost for that other reason. Messages that came
before the end can still be taken with `receive()` after it, and must be, before anybody takes over.

With further paths for heartbeats, silence is silence on all of them. A link that alone is silent has
`patience_seconds` to come back; nothing is committed meanwhile, so nothing of the guest's output is released.
Control that ends by a reset counts as cut when a further path goes on for longer than the grace: the kernel
of a daemon that died resets all of its connections at once. Who gives a session up as cut says so on the
further paths, so that the other side, to which the link may look whole, comes to the same end.

    connect, Listener     the two sides (`connecting`, `listening`); `handshake` is what they say first
    Session ─┬─ Pulse     heartbeats: sent, heard, judged
             └─ LossRules the rules above, as decisions only (`loss`)
"""

from ftd.link.connecting import connect
from ftd.link.listening import Listener
from ftd.link.loss import LostReason
from ftd.link.options import LinkOptions
from ftd.link.session import Session
from ftd.wire import LinkLost, LostKind

__all__ = [
    "LinkLost",
    "LinkOptions",
    "Listener",
    "LostKind",
    "LostReason",
    "Session",
    "connect",
]
