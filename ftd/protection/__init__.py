"""Protection over one session: the first copy, and then epoch after epoch until something ends it.

    begin ── live rounds ── checkpoint ── ack ──> protected ── run an epoch ── checkpoint ─┐
             (guest runs)                                          ^                       │
                                                                   └── room in flight? <───┘

Three things go on at once: this loop has QEMU gather, the sender's thread puts slots on the wire, and
acknowledgements come in. So several frames are under way, each later one as soon as the epoch after it is
over, and are committed in order. What is under way is bounded by the slots and by `in_flight_mib`; when the
link is slower than the guest dirties memory, the next checkpoint waits, so that the epoch becomes longer and
nothing grows.

How long an epoch is and whether pages are sent early are decided elsewhere (`pacing`, `speculation`): here is
done what they say.

    primary ── Protection ─┬─ FirstCopy                      once
                           ├─ resume, or Suspension          what one session leaves, and the next one gets
                           ├─ Switchover                     the guest is handed over
                           ├─ Epochs ── Comparison           epoch after epoch, compared now and then
                           └─ Gathering                      what QEMU is asked for, and the slots
"""

from ftd.protection.ends import ProtectionLost, Suspended, Yielded
from ftd.protection.fence import Fence
from ftd.protection.protection import Protection

__all__ = ["Fence", "Protection", "ProtectionLost", "Suspended", "Yielded"]
