"""Sending pages early, while the epoch still runs: whether it pays. Arithmetic only; no clock, no I/O.

    guest runs epoch N ...... round ......................|pause|
    on the wire                     ── early pages ──>         ── what was dirtied since ──>

A page that is sent early and not written to again is one page less to copy in the pause. One that is written
to again was sent for nothing: its bytes go over the link twice, and the guest pays one more write fault,
which costs it more than the copying of a page. So a round *gains*, in pages of pause,

    (early − again) − cost × again

The decision follows the average of that over the last rounds. Since how much is dirtied again can only be
seen by sending early, a trial is made now and then, the more seldom the more of them have failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Mode = Literal["off", "auto", "always"]
MODES: tuple[Mode, ...] = ("off", "auto", "always")

# When in an epoch a round is made, as a share of its length. Late enough that most of what the epoch will
# dirty is dirty, early enough that a link that would be idle carries it before the pause.
MOMENT = 0.7

# What a page sent in vain costs, in pages of pause; and while the link is what epochs wait for.
COST = 2.0
COST_ON_A_FULL_LINK = 8.0

# The average gain from which on rounds are made, and below which they are no longer. A round by itself costs
# QEMU's main loop about as much as copying a hundred pages.
BEGIN_ABOVE = 256.0
END_BELOW = 64.0
WEIGHT = 0.25  # of the latest round in the average

# A trial is so many rounds in a row. Epochs between two trials: doubled by each that fails.
TRIAL = 4
FIRST_BREAK = 16
LONGEST_BREAK = 1024


@dataclass(frozen=True)
class Round:
    """What one round came to, in pages. early: sent early; again: of these, dirty again at the checkpoint.

    link_was_full: whether the epoch was stretched, since earlier frames were still under way.
    """

    early: int
    again: int
    link_was_full: bool = False

    @property
    def gain(self) -> float:
        """What it gained, in pages of pause."""
        cost = COST_ON_A_FULL_LINK if self.link_was_full else COST
        return self.early - self.again - cost * self.again


class Speculation:
    """Decides for each epoch whether a round is made in it. `mode` is that of [epoch] speculative."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._active = mode == "always"
        self._average = 0.0
        self._trial_left = TRIAL if mode == "auto" else 0
        self._trial_rounds = 0
        self._break = FIRST_BREAK
        self._break_left = 0

    @property
    def active(self) -> bool:
        """Whether a round is made in each epoch, because that pays or is configured."""
        return self._active

    @property
    def average_gain(self) -> float:
        """Pages of pause that a round gains on average; 0 before the first."""
        return self._average

    def wanted(self) -> bool:
        """Return whether to make a round in this epoch. Asked once in each, when the moment has come.

        By then the round of the epoch before must have been observed, if there was one.
        """
        if self._active or self.mode != "auto":
            return self._active
        if self._break_left:
            self._break_left -= 1
            return False
        if self._trial_left:
            self._trial_left -= 1
            return True
        # The rounds of the trial never came about: no slot was free for them.
        self._begin_break()
        return False

    def observe(self, one: Round) -> None:
        """Take the outcome of a round into account."""
        # A trial begins anew: its average is that of its own rounds.
        weight = WEIGHT if self._active else 1 / (self._trial_rounds + 1)
        self._average += (one.gain - self._average) * weight
        if self.mode != "auto":
            return
        if self._active:
            if self._average < END_BELOW:
                self._active = False
                self._break = FIRST_BREAK
                self._begin_break()
            return
        self._trial_rounds += 1
        if self._trial_rounds < TRIAL:
            return
        if self._average >= BEGIN_ABOVE:
            self._active = True
            self._break = FIRST_BREAK
        else:
            self._begin_break()
            self._break = min(2 * self._break, LONGEST_BREAK)

    def _begin_break(self) -> None:
        self._break_left = self._break
        self._trial_left = TRIAL
        self._trial_rounds = 0


PageList = npt.NDArray[np.uint64]


def count_again(early: PageList, checkpoint: list[PageList]) -> int:
    """Return how many of the pages sent early are in the checkpoint, whose parts may name a page twice.

    Entries are those of a slot: block index << 48 | page number.
    """
    if not early.size or not checkpoint:
        return 0
    later = np.concatenate(checkpoint)
    return int(np.isin(early, later).sum())
