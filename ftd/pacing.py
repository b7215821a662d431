"""How long an epoch is: as configured, or chosen so that two bounds hold. Arithmetic only; no clock, no I/O.

Two prices are paid for checkpoints, and the length of the epoch moves them against each other:

    slowdown       pause / (run + pause): what the guest loses                     longer epochs lower it
    added latency  run + pause + commit: the longest that output waits because     shorter epochs lower it
                   it came right after a checkpoint

`AutoPace` takes the shortest epoch that holds the slowdown under its bound, for latency is what clients
notice and the slowdown up to its bound was granted. If that epoch is too long for the bound of the latency,
*the latency wins*: a shorter epoch lowers the latency and costs a slowdown that `shortest` bounds,
while the epoch that holds the slowdown of a guest that dirties memory faster and faster has no bound at all.

That a shorter epoch lowers the latency is not true of a link that is nearly full: what a guest dirties in
every epoch is sent in every epoch, so shorter ones load the link more, and frames wait behind frames. So a
third rule comes before both bounds: no epoch is shorter than the link can take. `_Link` tells how loaded it
is. Above `FULL` the least length grows, but not while what is under way gets less, for then it is long
enough already and an old queue drains. Below `FREE` it shrinks, by as much as would load the link `HALF`,
so that it does not come back to where it was too short: the load never grows faster than epochs get
shorter. Between the two nothing happens while the latency is held; if it is not, the least length shrinks
as long as that leaves the link below `FULL`. If even the longest epochs fill the link, it cannot take what
the guest writes, at any length; they stay the longest, which send the least.

It decides seldom: after a window of epochs that all had the same length, so that it never takes the effect of
an earlier decision for news. With a pause of p + a·T and a commit of c + m·T after an epoch of T seconds, the
two proposals

    T ← pause / r                 with r = slowdown / (1 − slowdown)
    T ← T · latency bound / added latency

are fixed-point iterations whose slopes lie in [0, 1): a/r (where there is a solution at all), and m·T ÷
bound. So each moves towards its solution from one side and does not swing around it. What noise is left is
kept out by margins below the bounds, by a band within which nothing changes, by leaving the worst epoch of a
window out of its account, and by a limit to each step.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

Reason = Literal["configured", "slowdown", "latency", "shortest", "longest", "pressure", "link"]
REASONS: tuple[Reason, ...] = ("configured", "slowdown", "latency", "shortest", "longest", "pressure", "link")
"""What the length of the epochs follows from. pressure: QEMU ends them before it has passed; link: shorter
ones would fill it."""

# A window is this many epochs. Long epochs are not waited for so long: fewer make a window, after a time.
WINDOW = 8
SMALLEST_WINDOW = 4
WINDOW_SECONDS = 0.25

# What is aimed at, as a share of a bound; and how far the aim may be missed before the length changes. Since
# 0.85 × 1.08 < 1 and 0.85 ÷ 0.92 < 1, a length that is kept holds the bound.
AIM = 0.85
BAND = 0.08
LARGEST_STEP = 2.0

# Loads of the link: above the first it is taken for full, below the second for free.
FULL = 0.85
FREE = 0.40
HALF = 0.60
# As loaded as that it may be made for the sake of the latency, and it is still not full a band later.
BUSY = FULL / (1 + 2 * BAND)
# So much less under way at the end of a window than at its beginning is a queue that drains.
DRAINING = 0.97

# Which of a window's latencies counts: that which seven epochs of eight keep.
LATENCY_RANK = 0.85


@dataclass(frozen=True)
class Limits:
    """What `AutoPace` has to hold. shortest, longest, latency: seconds; slowdown: a share, above 0, below 1.

    latency counts from the beginning of an epoch until its commit.
    """

    shortest: float
    longest: float
    slowdown: float
    latency: float


@dataclass
class _Epoch:
    run: float
    pause: float
    early: bool
    stretched: bool
    size: int
    closed_at: float
    commit: float | None = None


class _Link:
    """What is known of the link from the frames that went over it.

    Two things tell that it is full. Frames come in later than the quickest ever did, by more than an epoch:
    they wait for each other. (What the quickest took is the way itself, there and back, which loads
    nothing.) Or epochs are stretched for want of room. Only then are acknowledgements as far apart as the
    link takes for a frame, and say what it carries; later a frame that comes in sooner than that says that
    it carries more.
    """

    def __init__(self) -> None:
        self._under_way: dict[int, tuple[int, float]] = {}  # bytes, closed at
        self._under_way_before = 0  # bytes, when the window began
        self._quickest = math.inf  # commit of all, in seconds
        self._acks: list[tuple[float, int]] = []  # of this window, and the last one before it: when, bytes
        self._carries: float | None = None  # bytes a second; None: it was never full

    def closed(self, epoch: int, size: int, now: float) -> None:
        self._under_way[epoch] = (size, now)

    def committed(self, epoch: int, latency: float) -> None:
        self._quickest = min(self._quickest, latency)
        if epoch not in self._under_way:
            return  # the frame that ended the copy: no epoch was closed for it
        size, closed_at = self._under_way.pop(epoch)
        self._acks.append((closed_at + latency, size))
        if self._carries is not None and latency > 0:
            self._carries = max(self._carries, size / latency)

    def begin_window(self) -> None:
        self._under_way_before = self._bytes()
        del self._acks[:-1]

    def _bytes(self) -> int:
        return sum(size for size, _ in self._under_way.values())

    @property
    def drains(self) -> bool:
        """Whether less is under way than when the window began."""
        return self._bytes() < DRAINING * self._under_way_before

    def load(self, epochs: list[_Epoch], now: float) -> float:
        """Return how loaded it is by a window of epochs: 1 is as much as it can carry."""
        waits = self._waits(epochs, now)
        if waits > FULL or 2 * sum(one.stretched for one in epochs) > len(epochs):
            if len(self._acks) > 2 and (span := self._acks[-1][0] - self._acks[0][0]) > 0:
                self._carries = sum(size for _, size in self._acks[1:]) / span
            return max(waits, 1.0)
        if self._carries is None:
            return waits
        seconds = sum(one.run + one.pause for one in epochs)
        # It may carry more than that, so this alone does not say that it is full: nothing waits for it.
        return min(FULL, max(waits, sum(one.size for one in epochs) / (self._carries * seconds)))

    def _waits(self, epochs: list[_Epoch], now: float) -> float:
        """Return how much later than the quickest frames come in, in epochs: the median."""
        if not math.isfinite(self._quickest):
            return 0.0  # nothing was ever committed, and that is not the first thing to say of such a link
        late = [
            (one.commit - self._quickest) / (one.run + one.pause) for one in epochs if one.commit is not None
        ]
        waiting = [one for one in epochs if one.commit is None]
        if waiting:
            oldest = waiting[0]  # it will take at least as long as it has taken
            so_far = (now - oldest.closed_at - self._quickest) / (oldest.run + oldest.pause)
            if not late or so_far > max(late):
                late.append(so_far)
        return statistics.median(late)


@dataclass(frozen=True)
class Account:
    """What a window of epochs cost. slowdown: a share; added_latency: seconds, None if nothing committed."""

    slowdown: float
    added_latency: float | None


class FixedPace:
    """Epochs of one length, in seconds. Keeps the account that operators see."""

    def __init__(self, length: float) -> None:
        self._length = length
        self._window: dict[int, _Epoch] = {}
        self._window_began: float | None = None
        self._first: int | None = None  # epochs before it were begun under another length
        self._link = _Link()
        self._account: Account | None = None

    @property
    def length(self) -> float:
        """How long the next epoch shall be, in seconds."""
        return self._length

    @property
    def reason(self) -> Reason:
        """What the length follows from."""
        return "configured"

    @property
    def account(self) -> Account | None:
        """What the last whole window of epochs cost; None before the first."""
        return self._account

    def closed(
        self, epoch: int, *, run: float, pause: float, early: bool, stretched: bool, size: int, now: float
    ) -> None:
        """Note that an epoch was closed. Ends a window, and may change the length.

        run: how long the guest ran in it; pause: the pause of its checkpoint; early: whether QEMU asked for
        it before its time; stretched: whether it had to wait for earlier frames; size: bytes of its frame;
        now: any clock that does not run backwards. Seconds.
        """
        if self._window_began is None:
            self._window_began = now - run - pause
        if self._first is None:
            self._first = epoch
        self._window[epoch] = _Epoch(run, pause, early, stretched, size, now)
        self._link.closed(epoch, size, now)
        if not self._window_is_whole(now):
            return
        epochs = list(self._window.values())
        self._account = Account(_slowdown(epochs), _latency(epochs, now))
        self._decide(epochs, now)
        self._window = {}
        self._window_began = now
        self._first = epoch + 1
        self._link.begin_window()

    def committed(self, epoch: int, latency: float) -> None:
        """Note that an epoch was committed, so many seconds after its checkpoint."""
        self._link.committed(epoch, latency)
        if (known := self._window.get(epoch)) is not None:
            known.commit = latency

    def _window_is_whole(self, now: float) -> bool:
        assert self._window_began is not None
        count, seconds = len(self._window), now - self._window_began
        if count < SMALLEST_WINDOW or (count < WINDOW and seconds < WINDOW_SECONDS):
            return False
        # Commits come late on a slow link. That none came for so long says enough by itself.
        commits = sum(one.commit is not None for one in self._window.values())
        return commits >= count // 2 or count >= 4 * WINDOW or seconds >= 4 * WINDOW_SECONDS

    def _decide(self, epochs: list[_Epoch], now: float) -> None:
        """Change the length, if there is a reason."""


class AutoPace(FixedPace):
    """Epochs whose length follows the load, see above. Begins with `length`, in seconds."""

    def __init__(self, length: float, limits: Limits) -> None:
        super().__init__(min(max(length, limits.shortest), limits.longest))
        self._limits = limits
        self._reason: Reason = "configured"
        self._least = limits.shortest  # what the link can take

    @property
    def reason(self) -> Reason:
        """What the length follows from."""
        return self._reason

    def _decide(self, epochs: list[_Epoch], now: float) -> None:
        limits = self._limits
        reason: Reason = "slowdown"
        wanted = self._for_slowdown(epochs)
        if wanted <= limits.shortest:
            wanted, reason = limits.shortest, "shortest"
        ran = sum(one.run for one in epochs) / len(epochs)
        # Nobody would see a longer one, and one that is longer only in name is a bad place to start from.
        if wanted > ran and 2 * sum(one.early for one in epochs) > len(epochs):
            wanted, reason = min(wanted, self._length), "pressure"
        latency = _latency(epochs, now)
        if latency is not None:
            most = ran * AIM * limits.latency / latency
            if wanted > most:
                wanted, reason = most, "latency"
        if wanted > limits.longest:
            wanted, reason = limits.longest, "longest"
        # If the latency asked for less, it is not held, and neither is the slowdown.
        wanted = max(wanted, limits.shortest)
        self._learn_the_least(epochs, ran, now, late=latency is not None and latency > limits.latency)
        if wanted < self._least:
            wanted, reason = self._least, "link"
        self._reason = reason
        step = min(max(wanted / self._length, 1 / LARGEST_STEP), LARGEST_STEP)
        if abs(step - 1) > BAND:
            self._length = min(max(self._length * step, limits.shortest), limits.longest)

    def _learn_the_least(self, epochs: list[_Epoch], ran: float, now: float, *, late: bool) -> None:
        """Follow what the link can take. late: the latency is over its bound."""
        limits = self._limits
        load = self._link.load(epochs, now)
        if load > FULL:
            # Or longer in name only.
            if self._link.drains or 2 * sum(one.early for one in epochs) > len(epochs):
                return
            # A stretched epoch is longer than was asked for, and still not long enough.
            step = min(max(load / HALF, 1 + 2 * BAND), LARGEST_STEP)
            self._least = min(max(self._least, self._length, ran) * step, limits.longest)
        elif load < (BUSY if late else FREE):
            step = max(load / (BUSY if late else HALF), 1 / LARGEST_STEP)
            self._least = max(self._least * step, limits.shortest)

    def _for_slowdown(self, epochs: list[_Epoch]) -> float:
        """Return the epoch in which such pauses are as much as they may be."""
        slowdown = self._limits.slowdown
        # One hiccup of the host is no load.
        pauses = sorted(one.pause for one in epochs)[:-1]
        return sum(pauses) / len(pauses) / (slowdown / (1 - slowdown) * AIM)


def _slowdown(epochs: list[_Epoch]) -> float:
    paused = sum(one.pause for one in epochs)
    whole = paused + sum(one.run for one in epochs)
    return paused / whole if whole else 0.0


def _latency(epochs: list[_Epoch], now: float) -> float | None:
    """Return the added latency that most epochs of a window keep, or None if none can be told yet."""
    latencies = []
    for one in epochs:
        if one.commit is not None:
            latencies.append(one.run + one.pause + one.commit)
    waiting = [one for one in epochs if one.commit is None]
    if waiting:
        # It will take at least as long as it has taken.
        oldest = waiting[0]
        so_far = oldest.run + oldest.pause + now - oldest.closed_at
        if not latencies or so_far > max(latencies):
            latencies.append(so_far)
    if not latencies:
        return None
    latencies.sort()
    return latencies[-(-int(LATENCY_RANK * 100) * len(latencies) // 100) - 1]
