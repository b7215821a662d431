"""How long an epoch is: as configured, or chosen so that two bounds hold. Arithmetic only; no clock, no I/O.

Two prices are paid for checkpoints, and the length of the epoch moves them against each other:

    slowdown       pause / (run + pause): what the guest loses                     longer epochs lower it
    added latency  run + pause + commit: the longest that output waits because     shorter epochs lower it
                   it came right after a checkpoint

`AutoPace` takes the shortest epoch that holds the slowdown under its bound, for latency is what clients
notice and the slowdown up to its bound was granted. If that epoch is too long for the bound of the latency,
*the latency wins*: a shorter epoch lowers the latency and costs a slowdown that `shortest` bounds,
while the epoch that holds the slowdown of a guest that dirties memory faster and faster has no bound at all.

A limit: that holds as long as the link is not what epochs wait for. What a guest dirties in every epoch is
sent in every epoch, and on a link that is nearly full more of them make a longer queue. This is not noticed.

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

from dataclasses import dataclass
from typing import Literal

Reason = Literal["configured", "slowdown", "latency", "shortest", "longest", "pressure"]
REASONS: tuple[Reason, ...] = ("configured", "slowdown", "latency", "shortest", "longest", "pressure")
"""What the length of the epochs follows from. pressure: QEMU ends them before it has passed."""

# A window is this many epochs. Long epochs are not waited for so long: fewer make a window, after a time.
WINDOW = 8
SMALLEST_WINDOW = 4
WINDOW_SECONDS = 0.25

# What is aimed at, as a share of a bound; and how far the aim may be missed before the length changes. Since
# 0.85 × 1.08 < 1 and 0.85 ÷ 0.92 < 1, a length that is kept holds the bound.
AIM = 0.85
BAND = 0.08
LARGEST_STEP = 2.0

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
    closed_at: float
    commit: float | None = None


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

    def closed(self, epoch: int, *, run: float, pause: float, early: bool, now: float) -> None:
        """Note that an epoch was closed. Ends a window, and may change the length.

        run: how long the guest ran in it; pause: the pause of its checkpoint; early: whether QEMU asked for
        it before its time; now: any clock that does not run backwards, the same in `committed`. Seconds.
        """
        if self._window_began is None:
            self._window_began = now - run - pause
        if self._first is None:
            self._first = epoch
        self._window[epoch] = _Epoch(run, pause, early, now)
        if not self._window_is_whole(now):
            return
        epochs = list(self._window.values())
        self._account = Account(_slowdown(epochs), _latency(epochs, now))
        self._decide(epochs, now)
        self._window = {}
        self._window_began = now
        self._first = epoch + 1

    def committed(self, epoch: int, latency: float) -> None:
        """Note that an epoch was committed, so many seconds after its checkpoint."""
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
        self._reason = reason
        step = min(max(wanted / self._length, 1 / LARGEST_STEP), LARGEST_STEP)
        if abs(step - 1) > BAND:
            self._length = min(max(self._length * step, limits.shortest), limits.longest)

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
