"""Decides when a silent peer counts as lost. Pure arithmetic: no clock, no timer, no socket.

The sum behind the time limit:

    interval × misses                       silence that is accepted        (50 ms × 6 = 300 ms)
    + the time until the next tick          none, if that is put forward to `deadline_ns`
    + the peer's last heartbeat's age when the peer died: between 0 and one interval *earlier*, so it is no
    extra

It does not cover what comes after: asking the arbiter, applying the last frame, starting the guest.

*Doubt yourself first.* A daemon that was not scheduled, or whose event loop was busy, has heard nothing
because it did not listen. So silence is not measured by subtracting two times. It is counted in ticks: a tick
adds the time since the one before, but never more than one period, however late it came. And a late tick
never gives the verdict `silent` by itself, since what the peer sent meanwhile may still be waiting to be
read: the tick after it does. A peer that is really dead is found all the same, if this host is slow: later,
as every tick counts for something.

A side that did not look for longer than the limit was silent itself meanwhile, so the peer may have given it
up. `stood_still_since` says that, also after the next ticks: what follows from it is read after them.

Being wrong here costs an attempt to take over, never safety: who may run the guest is decided by the arbiter.
"""

from enum import StrEnum


class Verdict(StrEnum):
    """What the detector thinks of the peer."""

    ALIVE = "alive"
    SUSPECT = "suspect"  # at least one heartbeat is missing
    SILENT = "silent"  # the limit is over; final, heartbeats that come later do not change it


class HeartbeatDetector:
    """Fed with `heard` for every heartbeat and `tick` every `period_ns`, or more often; all times are
    monotonic nanoseconds.
    """

    def __init__(self, interval_ns: int, misses: int, now_ns: int) -> None:
        if interval_ns < 2 or misses < 1:
            raise ValueError(f"interval {interval_ns} ns and misses {misses}: at least 2 and 1 are needed")
        self.interval_ns = interval_ns
        self.limit_ns = interval_ns * misses
        # How often tick() is to be called, and how late a tick may be before the caller doubts itself.
        self.period_ns = interval_ns // 2
        self.tolerance_ns = interval_ns // 2
        self.last_heard_ns = now_ns  # a new peer starts with a full allowance
        self.lateness_ns = 0  # of the last tick
        self.verdict = Verdict.ALIVE
        self._last_tick_ns = now_ns
        self._silence_ns = 0
        self._late = False
        # The last time that nobody looked for longer than the limit: for how long, and until when.
        self._still_ns = self._woke_ns = 0

    def heard(self, now_ns: int) -> None:
        """Note a sign of life."""
        if self.verdict is Verdict.SILENT:
            return
        self.last_heard_ns = max(now_ns, self.last_heard_ns)
        self._silence_ns = 0
        self.verdict = Verdict.ALIVE

    def tick(self, now_ns: int) -> Verdict:
        """Count the time since the last tick and give the verdict."""
        since = now_ns - self._last_tick_ns
        self.lateness_ns = max(0, since - self.period_ns)
        if since > self.limit_ns:
            self._still_ns, self._woke_ns = since, now_ns
        late_before, self._late = self._late, self.lateness_ns > self.tolerance_ns
        silent_since = now_ns - max(self._last_tick_ns, self.last_heard_ns)
        # A tick within the tolerance counts in full; otherwise small delays would add up to a longer limit.
        counts = self.period_ns if self._late else silent_since
        self._silence_ns += max(0, min(silent_since, counts))
        self._last_tick_ns = max(now_ns, self._last_tick_ns)
        if self.verdict is Verdict.SILENT:
            return self.verdict
        if self._silence_ns >= self.limit_ns and (late_before or not self._late):
            self.verdict = Verdict.SILENT
        elif self._silence_ns > self.interval_ns + self.tolerance_ns:
            self.verdict = Verdict.SUSPECT
        return self.verdict

    def stood_still_since(self, moment_ns: int, now_ns: int) -> int:
        """For how long nobody looked, in one stretch that ended after a moment or lasts; 0 if for no longer
        than the limit.
        """
        lasting = now_ns - self._last_tick_ns
        if lasting > self.limit_ns:
            return lasting
        return self._still_ns if self._woke_ns > moment_ns else 0

    @property
    def silence_ns(self) -> int:
        """Silence counted so far, as of the last tick."""
        return self._silence_ns

    def deadline_ns(self) -> int:
        """When `silent` will be said if nothing more is heard and no tick is late."""
        return max(self._last_tick_ns, self.last_heard_ns) + max(0, self.limit_ns - self._silence_ns)
