"""Whether sending early pays: the decision over synthetic traces of guests."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftd.frame import entry
from ftd.speculation import (
    FIRST_BREAK,
    LONGEST_BREAK,
    TRIAL,
    Round,
    Speculation,
    count_again,
)

Guest = Callable[[int], Round]


def run(speculation: Speculation, guest: Guest, epochs: range) -> list[bool]:
    """Whether a round was made, for each epoch; its outcome is known before the next epoch asks."""
    made = []
    for epoch in epochs:
        made.append(speculation.wanted())
        if made[-1]:
            speculation.observe(guest(epoch))
    return made


def streaming(epoch: int) -> Round:
    """Writes to each page once: hardly any comes again."""
    return Round(early=3000, again=30 + epoch % 7)


def hot(epoch: int) -> Round:
    """Writes to the same pages all the time."""
    return Round(early=3000, again=2900 - epoch % 50)


def quiet(epoch: int) -> Round:
    """Dirties so little that there is nothing to gain."""
    return Round(early=40 + epoch % 5, again=2)


def test_a_guest_that_writes_each_page_once_is_always_sent_early() -> None:
    speculation = Speculation("auto")
    assert all(run(speculation, streaming, range(200)))
    assert speculation.active
    assert speculation.average_gain == pytest.approx(2900, rel=0.02)


@pytest.mark.parametrize("guest", [hot, quiet])
def test_a_guest_for_which_it_does_not_pay_is_left_alone_but_for_trials(guest: Guest) -> None:
    speculation = Speculation("auto")
    made = run(speculation, guest, range(5000))
    assert not speculation.active
    # Breaks double, so that trials are few, and never end, so that a guest that changes is found out.
    assert TRIAL * 8 <= sum(made) <= TRIAL * 11
    assert made[:TRIAL] == [True] * TRIAL
    assert made[TRIAL : TRIAL + FIRST_BREAK] == [False] * FIRST_BREAK
    assert sum(run(speculation, guest, range(3 * LONGEST_BREAK))) >= TRIAL


def test_a_guest_that_changes_is_followed() -> None:
    speculation = Speculation("auto")
    run(speculation, streaming, range(50))
    ended = run(speculation, hot, range(50, 120))
    assert not speculation.active
    assert sum(ended) < 3 + TRIAL * 3, "it takes a few rounds to notice, and trials to be sure"
    run(speculation, streaming, range(120, 120 + 8 * FIRST_BREAK))
    assert speculation.active


def test_one_bad_round_does_not_end_it() -> None:
    speculation = Speculation("auto")
    run(speculation, streaming, range(50))
    run(speculation, lambda _: Round(early=3000, again=1500), range(1))
    assert speculation.active


def test_pages_sent_in_vain_cost_more_on_a_full_link() -> None:
    fair = Speculation("auto")
    run(fair, lambda _: Round(early=3000, again=600), range(TRIAL))
    full = Speculation("auto")
    run(full, lambda _: Round(early=3000, again=600, link_was_full=True), range(TRIAL))
    assert (fair.active, full.active) == (True, False)


def test_off_and_always_do_not_decide() -> None:
    assert not any(run(Speculation("off"), hot, range(100)))
    always = Speculation("always")
    assert all(run(always, hot, range(100)))
    assert always.active


def test_rounds_that_find_no_slot_are_tried_again_after_a_break() -> None:
    speculation = Speculation("auto")
    made = [speculation.wanted() for _ in range(10 * (TRIAL + FIRST_BREAK + 1))]
    assert 9 * TRIAL <= sum(made) <= 11 * TRIAL
    run(speculation, streaming, range(2 * FIRST_BREAK + 2 * TRIAL))
    assert speculation.active


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.15), st.integers(600, 20000))
def test_noise_never_makes_the_decision_flap_where_it_pays(seed: int, share: float, pages: int) -> None:
    chance = random.Random(seed)

    def guest(_: int) -> Round:
        early = int(pages * chance.uniform(0.8, 1.2))
        return Round(early=early, again=int(early * share * chance.uniform(0.5, 1.5)))

    speculation = Speculation("auto")
    run(speculation, guest, range(TRIAL))
    assert speculation.active == (speculation.average_gain >= 256)
    if speculation.active and pages * (1 - 3 * 1.5 * share) * 0.8 >= 300:
        assert all(run(speculation, guest, range(500)))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), unique=True),
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), unique=True), max_size=3),
)
def test_pages_again_are_counted_once_whatever_the_parts(
    early: list[tuple[int, int]], parts: list[list[tuple[int, int]]]
) -> None:
    def entries(pages: list[tuple[int, int]]) -> np.ndarray:
        return np.array([entry(*where) for where in pages], dtype=np.uint64)

    later = {where for part in parts for where in part}
    assert count_again(entries(early), [entries(part) for part in parts]) == len(set(early) & later)
