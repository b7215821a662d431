"""The length of epochs, against a model of a pair: a guest, a pause, a link. No clock but the model's own."""

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ftd.pacing import BAND, LARGEST_STEP, WINDOW, AutoPace, FixedPace, Limits

PAGE = 4096
LIMITS = Limits(shortest=0.010, longest=0.500, slowdown=0.10, latency=0.100)


@dataclass
class Model:
    """A guest that writes `rate` pages a second among `pages`, and a link of `bandwidth` bytes a second.

    The frames of several epochs are under way at once, and the link takes them one after the other; with more
    than `most_bytes` under way the next checkpoint waits, as it does in ftd.protection.
    """

    rate: float = 20_000
    pages: float = 100_000
    bandwidth: float = 1e9
    pause_base: float = 0.0005
    pause_page: float = 0.6e-6
    round_trip: float = 0.0005
    most_bytes: float = 256 << 20
    slot_pages: float = math.inf  # as many dirty pages end an epoch early
    noise: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    now: float = 0.0
    link_free_at: float = 0.0
    epoch: int = 0
    under_way: list[tuple[int, float, float, float]] = field(default_factory=list)

    def dirty(self, seconds: float) -> float:
        return self.pages * -math.expm1(-self.rate * seconds / self.pages)

    def noisy(self, value: float) -> float:
        return value * self.chance.uniform(1 - self.noise, 1 + self.noise)

    def one_epoch(self, pace: FixedPace) -> tuple[float, float, float]:
        """Run one epoch, and tell the pace of it; returns its run, its pause and what its latency will be."""
        began = self.now
        run = length = pace.length
        early = False
        if self.dirty(run) > self.slot_pages:
            run, early = -math.log1p(-self.slot_pages / self.pages) * self.pages / self.rate, True
        self._commit_until(began + run, pace)
        while sum(size for *_, size in self.under_way) > self.most_bytes:
            run = max(run, self.under_way[0][1] - began + 1e-9)
            self._commit_until(began + run, pace)
        dirty = self.dirty(run)
        pause = self.noisy(self.pause_base + self.pause_page * dirty)
        self.now = began + run + pause
        size = dirty * PAGE + 20_000
        self.link_free_at = max(self.link_free_at, self.now) + size / self.noisy(self.bandwidth)
        acknowledged = self.link_free_at + self.noisy(self.round_trip)
        self.epoch += 1
        self.under_way.append((self.epoch, acknowledged, self.now, size))
        stretched = run > length and not early
        pace.closed(
            self.epoch, run=run, pause=pause, early=early, stretched=stretched, size=int(size), now=self.now
        )
        return run, pause, acknowledged - began

    def _commit_until(self, until: float, pace: FixedPace) -> None:
        while self.under_way and self.under_way[0][1] <= until:
            epoch, acknowledged, resumed, _ = self.under_way.pop(0)
            pace.committed(epoch, acknowledged - resumed)

    def run(self, pace: FixedPace, epochs: int) -> list[tuple[float, float, float, float]]:
        """Return (length, run, pause, added latency) of so many epochs."""
        return [(pace.length, *self.one_epoch(pace)) for _ in range(epochs)]


models = st.builds(
    Model,
    rate=st.floats(10, 400_000),
    pages=st.floats(100, 1_000_000),
    bandwidth=st.floats(20e6, 5e9),
    pause_base=st.floats(0.0001, 0.003),
    pause_page=st.floats(0.2e-6, 2e-6),
    round_trip=st.floats(0.0001, 0.02),
    most_bytes=st.sampled_from([64 << 20, 256 << 20]),
    slot_pages=st.sampled_from([math.inf, 12_288.0]),
)
limits = st.builds(
    Limits,
    shortest=st.sampled_from([0.005, 0.010, 0.020]),
    longest=st.sampled_from([0.100, 0.500, 2.0]),
    slowdown=st.floats(0.02, 0.5),
    latency=st.floats(0.03, 1.0),
)
starts = st.floats(0.005, 2.0)


def test_a_fixed_pace_stays_and_keeps_account() -> None:
    pace = FixedPace(0.020)
    rows = Model(rate=50_000).run(pace, 100)
    assert {row[0] for row in rows} == {0.020}
    assert pace.reason == "configured"
    assert pace.account is not None
    assert pace.account.slowdown == pytest.approx(rows[0][2] / (rows[0][1] + rows[0][2]), rel=0.01)
    assert pace.account.added_latency == pytest.approx(rows[-1][3], rel=0.01)


def test_there_is_no_account_before_the_first_window() -> None:
    pace = FixedPace(0.020)
    Model().run(pace, WINDOW - 1)
    assert pace.account is None


def test_an_idle_guest_gets_the_shortest_epochs() -> None:
    pace = AutoPace(0.200, LIMITS)
    Model(rate=10).run(pace, 200)
    assert pace.length == pytest.approx(LIMITS.shortest, rel=BAND)
    assert pace.reason == "shortest"


def test_a_busy_guest_gets_longer_ones_that_hold_the_slowdown() -> None:
    pace = AutoPace(0.010, LIMITS)
    rows = Model(rate=100_000, pages=200_000, pause_base=0.001, bandwidth=5e9).run(pace, 400)
    length, run, pause, latency = rows[-1]
    assert 0.015 < length < 0.08
    assert pause / (run + pause) < LIMITS.slowdown
    assert latency < LIMITS.latency
    assert pace.reason == "slowdown"


def test_where_both_cannot_be_held_the_latency_is() -> None:
    """Writes so fast that its pauses are a fifth of its time, whatever the epoch is."""
    pace = AutoPace(0.010, LIMITS)
    rows = Model(rate=400_000, pages=10_000_000, bandwidth=5e9).run(pace, 400)
    _, run, pause, latency = rows[-1]
    assert latency < LIMITS.latency
    assert pause / (run + pause) > LIMITS.slowdown
    assert pace.reason == "latency"


def test_a_slow_link_shortens_epochs_until_their_latency_holds() -> None:
    pace = AutoPace(0.100, LIMITS)
    rows = Model(rate=40_000, pages=10_000_000, pause_base=0.005, bandwidth=250e6).run(pace, 400)
    assert rows[-1][3] < LIMITS.latency
    assert pace.reason == "latency"


def test_a_latency_that_no_epoch_holds_leads_to_the_shortest_and_no_further() -> None:
    pace = AutoPace(0.100, LIMITS)
    rows = Model(rate=20_000, round_trip=0.300).run(pace, 400)
    assert rows[-1][0] == pytest.approx(LIMITS.shortest, rel=BAND)
    assert pace.reason == "latency"


def test_epochs_that_qemu_ends_early_do_not_make_the_length_run_away() -> None:
    pace = AutoPace(0.020, replace(LIMITS, latency=10.0))
    Model(rate=400_000, pages=10_000_000, slot_pages=3000, pause_page=2e-6, bandwidth=5e9).run(pace, 1000)
    assert pace.length == 0.020
    assert pace.reason == "pressure"


def test_a_load_that_changes_is_followed_both_ways() -> None:
    pace = AutoPace(0.020, LIMITS)
    model = Model(rate=100, pages=20_000, bandwidth=5e9)
    model.run(pace, 100)
    assert pace.length == pytest.approx(LIMITS.shortest, rel=BAND)
    model.rate = 150_000
    changed = model.now
    model.run(pace, 80)
    assert pace.length > 0.020
    assert model.now - changed < 4, "80 epochs of at most half a second would be 40"
    model.rate = 100
    model.run(pace, 80)
    assert pace.length == pytest.approx(LIMITS.shortest, rel=BAND)


def test_one_hiccup_of_the_host_changes_nothing() -> None:
    pace = AutoPace(0.020, LIMITS)
    model = Model(rate=100_000, pages=20_000, bandwidth=5e9)
    model.run(pace, 400)
    before = pace.length
    while model.epoch % WINDOW:
        model.one_epoch(pace)
    model.pause_base += 0.050
    model.one_epoch(pace)
    model.pause_base -= 0.050
    model.run(pace, 5 * WINDOW)
    assert pace.length == before


def test_commits_that_do_not_come_count_with_the_time_that_they_have_taken() -> None:
    pace = AutoPace(0.100, replace(LIMITS, slowdown=0.02))
    now = 0.0
    for epoch in range(1, 200):
        now += pace.length + 0.008
        pace.closed(epoch, run=pace.length, pause=0.008, early=False, stretched=False, size=1 << 20, now=now)
    assert pace.length == pytest.approx(LIMITS.shortest, rel=BAND)
    assert pace.account is not None
    assert pace.account.added_latency is not None
    assert pace.account.added_latency > LIMITS.latency


def hot(pages: float, bandwidth: float, **more: Any) -> Model:
    """A guest that dirties the same pages in any epoch, however short."""
    return Model(rate=1e9, pages=pages, bandwidth=bandwidth, **more)


@pytest.mark.parametrize("pages", [300, 500, 800])
@pytest.mark.parametrize("start", [0.010, 0.100])
def test_a_link_that_short_epochs_would_fill_gets_longer_ones(pages: float, start: float) -> None:
    """A frame takes 25, 41 and 66 ms; epochs of 10 ms would be a queue that grows until nothing fits in."""
    pace = AutoPace(start, LIMITS)
    model = hot(pages, 50e6)
    model.run(pace, 400)
    rows = model.run(pace, 200)
    takes = pages * PAGE / 50e6
    assert {row[0] for row in rows} == {pace.length}
    assert pace.reason == "link"
    assert takes < pace.length < 3 * takes
    # Nothing queues: the way of a frame is what it takes the link, and its epoch is all that comes on top.
    assert rows[-1][3] == pytest.approx(rows[-1][1] + takes, abs=0.005)
    fixed = FixedPace(LIMITS.shortest)
    assert rows[-1][3] < 0.1 * hot(pages, 50e6).run(fixed, 600)[-1][3]


def test_a_link_that_becomes_slow_and_fast_again_is_followed_both_ways() -> None:
    pace = AutoPace(0.010, LIMITS)
    model = hot(500, 2e9)
    model.run(pace, 200)
    assert pace.length == pytest.approx(LIMITS.shortest, rel=BAND)
    model.bandwidth, changed = 50e6, model.now
    model.run(pace, 150)
    assert 0.041 < pace.length < 0.125
    assert model.now - changed < 15
    model.bandwidth, changed = 2e9, model.now
    while pace.length > LIMITS.shortest * (1 + BAND):
        model.one_epoch(pace)
        assert model.now - changed < 15


def test_epochs_longer_than_the_link_needs_give_way_to_the_latency() -> None:
    """A frame takes 60 ms, then 45, which leaves a link that is neither full nor free."""
    bounds = replace(LIMITS, latency=0.120)
    pace = AutoPace(0.010, bounds)
    model = hot(500, 34e6)
    model.run(pace, 300)
    before = pace.length
    model.bandwidth = 46e6
    assert 0.045 / before > 0.4
    assert before + 0.045 > bounds.latency
    model.run(pace, 300)
    rows = model.run(pace, 100)
    assert max(row[3] for row in rows) <= bounds.latency
    assert pace.reason == "link"


def test_a_link_that_no_epoch_leaves_room_on_gets_the_longest() -> None:
    """They send no more than others, and cost fewer pauses. What is under way is bounded elsewhere."""
    pace = AutoPace(0.010, LIMITS)
    model = Model(rate=40_000, pages=10_000_000, bandwidth=80e6)
    model.run(pace, 400)
    assert {row[0] for row in model.run(pace, 100)} == {LIMITS.longest}
    assert pace.reason == "link"


def test_the_commit_of_a_frame_of_no_epoch_says_nothing_of_what_the_link_carries() -> None:
    """That which ended the copy comes first. The link is full from then on."""
    pace = AutoPace(0.010, LIMITS)
    pace.committed(0, 3.0)
    model = hot(500, 50e6, now=1000.0)
    while pace._link._carries is None:
        model.one_epoch(pace)
    assert pace._link._carries == pytest.approx(50e6, rel=0.05)


def test_a_long_way_is_no_full_link() -> None:
    """Many frames are under way at once, and none waits for another."""
    pace = AutoPace(0.100, replace(LIMITS, latency=1.0))
    Model(rate=10, round_trip=0.200).run(pace, 400)
    assert pace.length == pytest.approx(LIMITS.shortest, rel=BAND)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(models, limits, starts)
def test_the_length_is_always_within_its_bounds(model: Model, bounds: Limits, start: float) -> None:
    assume(bounds.latency > bounds.shortest)
    pace = AutoPace(start, replace(bounds))
    for length, *_ in model.run(pace, 300):
        assert bounds.shortest <= length <= bounds.longest


@settings(max_examples=60, deadline=None, derandomize=True)
@example(
    Model(
        rate=207_746.0,
        pages=47_593.0,
        bandwidth=1_683_417_886.0,
        pause_base=0.001953125,
        pause_page=6.364987568173628e-07,
        round_trip=0.015625,
        most_bytes=64 << 20,
        slot_pages=12_288.0,
    ),
    Limits(shortest=0.005, longest=0.1, slowdown=0.125, latency=1.0),
    1.0,
)  # slots end its epochs early, just before their length
@given(models, limits, starts)
def test_under_a_steady_load_it_settles_and_what_can_be_held_is(
    model: Model, bounds: Limits, start: float
) -> None:
    assume(bounds.latency > bounds.shortest)
    # A link that is full has a queue that grows and shrinks: that is the next test's.
    assume(model.dirty(bounds.shortest) * PAGE / bounds.shortest < 0.5 * model.bandwidth)
    pace = AutoPace(start, bounds)
    model.run(pace, 800)
    rows = model.run(pace, 200)
    lengths = {row[0] for row in rows}
    assert len(lengths) == 1, "it still moves"
    length, run, pause, latency = rows[-1]
    if length > bounds.shortest * (1 + BAND):
        assert latency <= bounds.latency
    if pace.reason in ("shortest", "slowdown"):
        assert pause / (run + pause) <= bounds.slowdown


@settings(max_examples=50, deadline=None, derandomize=True)
@given(models, limits, starts, st.integers(0, 2**32), st.floats(0, 0.2))
def test_noise_moves_it_within_a_band(
    model: Model, bounds: Limits, start: float, seed: int, noise: float
) -> None:
    assume(bounds.latency > bounds.shortest)
    assume(model.dirty(bounds.shortest) * PAGE / bounds.shortest < 0.5 * model.bandwidth)
    model.noise, model.chance = noise, random.Random(seed)
    pace = AutoPace(start, bounds)
    model.run(pace, 800)
    lengths = [length for length, *_ in model.run(pace, 400)]
    # No step is larger than the noise and the band together make it.
    assert max(lengths) / min(lengths) <= (1 + 2 * noise + 2 * BAND) ** 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.floats(100, 2000), st.floats(30e6, 500e6), st.floats(0, 0.15), st.integers(0, 2**32), limits, starts
)
def test_no_queue_stays_where_an_epoch_is_long_enough_for_its_frame(
    pages: float, bandwidth: float, noise: float, seed: int, bounds: Limits, start: float
) -> None:
    takes = (pages * PAGE + 20_000) / bandwidth
    assume(bounds.latency > bounds.shortest)
    assume(takes < bounds.longest / 2)
    pace = AutoPace(start, bounds)
    model = hot(pages, bandwidth, noise=noise, chance=random.Random(seed))
    model.run(pace, 800)
    for _, run, pause, latency in model.run(pace, 200):
        assert latency <= run + pause + 2 * takes + 0.002


@settings(max_examples=40, deadline=None, derandomize=True)
@given(models, limits, starts)
def test_on_a_link_that_is_full_it_swings_no_further_than_two_steps(
    model: Model, bounds: Limits, start: float
) -> None:
    assume(bounds.latency > bounds.shortest)
    model.pages, model.rate = 10_000_000, max(model.rate, 50_000)
    model.bandwidth = 0.7 * model.rate * PAGE
    model.slot_pages = math.inf
    pace = AutoPace(start, bounds)
    model.run(pace, 1500)
    lengths = [length for length, *_ in model.run(pace, 300)]
    assert max(lengths) / min(lengths) <= LARGEST_STEP**2
