"""The backup: holds the shadow, and starts it when the primary is lost.

One call of `Backup.run` goes from an idle backup to one of its ends:

    TakenOver      the primary was lost, the shadow runs here: go on as primary with this guest
    GuestEnded     the guest shut down (rule S7): nobody takes over, both sides stop

In between, sessions come and go. A session that ends before its first commit, or by a goodbye, leaves the
shadow worthless, and the backup waits for the next one. What ends a session, and what follows:

    reset, silence     the primary's daemon, or its host, is gone              ask the arbiter, take over
    cut                only the link is lost: the primary is heard elsewhere   let it ask first, then ask
    QemuLost           the primary's QEMU is gone, its daemon says so          ask the arbiter, take over
    Yield              a switchover                                            ask the arbiter, take over
    Restarting         the primary's daemon is about to be replaced            wait for the next one, then
                                                                               as if the primary were lost
    goodbye            a planned stop                                          wait
    protocol, stalled  the primary is there, but what it sends is of no use    wait; it copies anew
    GuestStopped       the guest shut down                                     end

Every takeover asks the arbiter first (rule S3). Without an answer the backup is `held`: it starts nothing,
and asks again. Meanwhile it takes the primary back, unless a question of its own may still be granted.

A primary that lives behind a link that is cut asks for solo, and is to get it: its guest runs. So the backup
waits before it asks. It does ask, since a primary that does not reach the arbiter serves nobody. Without an
arbiter it asks nobody and takes nothing: the primary goes on alone.

    Backup ─┬─ admit              which primaries may come
            ├─ Guard ── judge     one session, and what follows from its end
            ├─ interim            waiting for the next one
            └─ take_over          the arbiter is asked, the shadow is started (`claim`)
    all share Standby, what the backup is from session to session, and ShadowVm, what waits in it
"""

from ftd.backup.backup import Backup
from ftd.backup.outcome import GuestEnded, TakenOver

__all__ = ["Backup", "GuestEnded", "TakenOver"]
