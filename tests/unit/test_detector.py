"""The detector's rules, one table each. Times are in milliseconds of a clock that only the test moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftd.detector import HeartbeatDetector, Verdict

MS = 1_000_000
INTERVAL, MISSES = 50, 6
PERIOD, LIMIT = INTERVAL // 2, INTERVAL * MISSES
ALIVE, SUSPECT, SILENT = Verdict.ALIVE, Verdict.SUSPECT, Verdict.SILENT


def detector(now=0, interval=INTERVAL, misses=MISSES):
    return HeartbeatDetector(interval * MS, misses, now * MS)


def play(script, *, watched=None):
    """Run ("heard" | "tick", time) steps; return the verdicts of the ticks."""
    watched = watched or detector()
    verdicts = []
    for what, at in script:
        if what == "heard":
            watched.heard(at * MS)
        else:
            verdicts.append(watched.tick(at * MS))
    return verdicts


def ticks(start, end):
    return [("tick", at) for at in range(start, end + 1, PERIOD)]


@pytest.mark.parametrize(
    ("last_heard", "tick_until", "verdict"),
    [
        (0, 75, ALIVE),
        (0, 100, SUSPECT),
        (0, 275, SUSPECT),
        (0, 300, SILENT),
        (10, 300, SUSPECT),
        (10, 325, SILENT),
        (24, 325, SILENT),
    ],
)
def test_silence_is_measured_from_the_last_heartbeat(last_heard, tick_until, verdict):
    assert play([("heard", last_heard), *ticks(PERIOD, tick_until)])[-1] is verdict


def test_one_heartbeat_ends_the_suspicion():
    watched = detector()
    assert play(ticks(25, 275), watched=watched)[-1] is SUSPECT
    assert play([("heard", 280), *ticks(300, 350)], watched=watched) == [ALIVE, ALIVE, ALIVE]
    assert play(ticks(375, 575), watched=watched)[-1] is SUSPECT
    assert play(ticks(600, 600), watched=watched) == [SILENT]


def test_silent_is_final():
    watched = detector()
    play(ticks(25, 300), watched=watched)
    assert play([("heard", 310), ("tick", 325)], watched=watched) == [SILENT]


def test_a_late_tick_does_not_accuse_the_peer():
    # The process stood still for ten seconds: it heard nothing because it did not listen.
    watched = detector()
    assert play([("tick", 25), ("tick", 10_025)], watched=watched) == [ALIVE, ALIVE]
    assert watched.lateness_ns == 9_975 * MS
    # What had been waiting in the socket is heard; nothing has happened.
    assert play([("heard", 10_026), *ticks(10_050, 10_100)], watched=watched) == [ALIVE, ALIVE, ALIVE]


def test_standing_still_for_longer_than_the_limit_is_remembered_with_its_end():
    watched = detector()
    play([("tick", 25), ("tick", 426), *ticks(450, 600)], watched=watched)
    # It counts for what was begun before it ended, however many ticks came since.
    assert watched.stood_still_since(20 * MS, 601 * MS) == 401 * MS
    assert watched.stood_still_since(425 * MS, 601 * MS) == 401 * MS
    assert watched.stood_still_since(426 * MS, 601 * MS) == 0
    # Nobody looks now, and the tick is still to come.
    assert watched.stood_still_since(600 * MS, 901 * MS) == 301 * MS
    assert watched.stood_still_since(600 * MS, 900 * MS) == 0


def test_standing_still_within_the_limit_is_not():
    watched = detector()
    play([("tick", 25), ("tick", 325), ("tick", 350)], watched=watched)
    assert watched.stood_still_since(0, 360 * MS) == 0


def test_a_peer_that_died_while_we_stood_still_is_found():
    watched = detector()
    verdicts = play([("tick", 25), *ticks(10_025, 10_275)], watched=watched)
    assert verdicts[-1] is SILENT
    assert verdicts[-2] is SUSPECT


def test_a_late_tick_never_decides_by_itself():
    # Everything but the last bit of the limit has passed, then a tick comes late: one more chance to read.
    watched = detector()
    assert play([*ticks(25, 275), ("tick", 400)], watched=watched)[-1] is SUSPECT
    assert watched.tick(425 * MS) is SILENT

    watched = detector()
    assert play([*ticks(25, 275), ("tick", 400), ("heard", 401), ("tick", 425)], watched=watched)[-1] is ALIVE


def test_a_host_that_is_always_late_finds_a_dead_peer_all_the_same():
    # Every tick comes four times too late: detection takes longer by that, and has an end.
    watched = detector()
    verdicts = play([("tick", at) for at in range(100, 4 * LIMIT + 101, 100)], watched=watched)
    assert SILENT in verdicts
    assert verdicts.index(SILENT) + 1 == pytest.approx(LIMIT / PERIOD, abs=1)


def test_lateness_within_the_tolerance_counts_in_full():
    watched = detector()
    verdicts = play([("tick", at) for at in range(50, 301, 50)], watched=watched)
    assert verdicts[-1] is SILENT


def test_deadline_says_when():
    watched = detector()
    assert watched.deadline_ns() == 300 * MS
    play([("tick", 25), ("heard", 40)], watched=watched)
    assert watched.deadline_ns() == 340 * MS
    watched.tick(2_040 * MS)
    assert watched.deadline_ns() == (2_040 + 300 - PERIOD) * MS  # only one period of the gap counted


def test_a_tick_at_the_deadline_says_it_and_one_before_does_not():
    for at, verdict in ((309, SUSPECT), (310, SILENT)):
        watched = detector()
        play([("heard", 10), *ticks(PERIOD, 300)], watched=watched)
        assert watched.deadline_ns() == 310 * MS
        assert watched.tick(at * MS) is verdict


def test_a_late_tick_leaves_no_deadline_but_the_next_tick():
    watched = detector()
    play([("tick", at) for at in range(PERIOD, 276, PERIOD)], watched=watched)
    assert watched.tick(360 * MS) is SUSPECT
    assert watched.deadline_ns() == 360 * MS


def test_a_clock_that_stands_still_or_goes_back_harms_nothing():
    watched = detector(now=100)
    assert play([("tick", 100), ("tick", 100), ("tick", 50), ("heard", 60)], watched=watched)[-1] is ALIVE
    assert watched.last_heard_ns == 100 * MS


@pytest.mark.parametrize(("interval", "misses"), [(0, 1), (1, 0), (-5, 3)])
def test_settings_without_sense_are_refused(interval, misses):
    with pytest.raises(ValueError, match="at least"):
        HeartbeatDetector(interval, misses, 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=200))
def test_nothing_is_ever_declared_silent_before_its_time(steps):
    watched = detector()
    now = 0
    for is_heard, gap in steps:
        now += gap
        if is_heard:
            watched.heard(now * MS)
        elif watched.tick(now * MS) is SILENT:
            assert now * MS - watched.last_heard_ns >= LIMIT * MS
            break


@given(st.lists(st.integers(1, 2000), min_size=4 * MISSES + 2, max_size=60))
def test_a_dead_peer_is_always_found_however_the_ticks_fall(gaps):
    # Each gap is at least one period, so each counts at least one; the last two are on time or late alike.
    watched = detector()
    now = 0
    for gap in gaps:
        now += PERIOD + gap
        watched.tick(now * MS)
    assert watched.verdict is SILENT


@given(st.lists(st.integers(0, INTERVAL), min_size=1, max_size=300), st.integers(0, 5000))
def test_a_peer_that_sends_in_time_is_never_suspected(gaps, stall):
    watched = detector()
    now = 0
    for gap in gaps:
        now += gap
        watched.heard(now * MS)
        now += min(gap, PERIOD)
        assert watched.tick(now * MS) is ALIVE
    watched.heard((now + stall) * MS)
    assert watched.tick((now + stall) * MS) is ALIVE
