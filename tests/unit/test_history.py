"""What the analysis of a client's history finds, on histories made by hand and at random."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from testbed.history import (
    History,
    Kind,
    Request,
    Sample,
    as_reads,
    read_samples,
    stream_problems,
    value_problems,
)

MS = 1_000_000


def answered(start: int, end: int, value: int, kind: Kind = "increment", worker: int = 0) -> Request:
    return Request(kind, worker, 1, start * MS, end * MS, value=value)


def failed(start: int, end: int, error: str) -> Request:
    return Request("increment", 0, 1, start * MS, end * MS, error=error)


def history(*requests: Request) -> History:
    return History(requests)


GOOD = history(answered(0, 1, 1), answered(2, 3, 2), answered(4, 5, 2, "read"), answered(6, 7, 3))


def test_right_history_has_no_problems() -> None:
    assert GOOD.problems(before=0, after=3) == []
    assert GOOD.lost(0, 3) == 0
    assert GOOD.last_value == 3
    assert GOOD.connections == 1


def test_more_counted_than_acknowledged_is_fine() -> None:
    """An answer may be lost on the way: the client does not know, the counter does."""
    assert history(answered(0, 1, 1), failed(2, 3, "TimeoutError: "), answered(4, 5, 3)).lost(0, 3) == 0


def test_rolled_back_counter() -> None:
    rolled = history(*(answered(2 * n, 2 * n + 1, n) for n in range(1, 6)), answered(20, 21, 4))
    assert rolled.lost() == 2  # the fourth and the fifth
    assert rolled.lost(0, 4) == 2
    assert rolled.duplicates() == {4: 2}
    [(earlier, later)] = rolled.backwards()
    assert (earlier.value, later.value) == (5, 4)
    assert any("2 acknowledged increments are lost" in line for line in rolled.problems(0, 4))


def test_loss_shows_in_the_final_counter_alone() -> None:
    assert history(answered(0, 1, 1), answered(2, 3, 2)).lost(after=1) == 1


def test_loss_shows_in_a_read() -> None:
    lost = history(answered(0, 1, 1), answered(2, 3, 2), answered(4, 5, 1, "read"))
    assert lost.lost() == 1
    assert len(lost.backwards()) == 1


def test_loss_shows_in_the_number_counted() -> None:
    """Rolled back, and hidden by increments whose answers nobody saw."""
    assert history(answered(0, 10, 1), answered(0, 10, 2), answered(0, 10, 3)).lost(0, 2) == 1


def test_duplicates_of_concurrent_requests_are_lost_too() -> None:
    both = history(answered(0, 5, 7, worker=0), answered(1, 4, 7, worker=1))
    assert both.lost() == 1
    assert both.backwards() == []


def test_concurrent_requests_are_in_no_order() -> None:
    assert history(answered(0, 5, 1, worker=0), answered(1, 4, 2, worker=1)).problems(0, 2) == []


def test_equal_times_are_in_no_order() -> None:
    assert history(answered(0, 5, 2, worker=0), answered(5, 6, 1, worker=1)).backwards() == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_a_counter_that_loses_nothing_is_never_accused(steps: list[tuple[int, int, int]]) -> None:
    """Requests take effect at one moment between start and end, in the order of these moments."""
    moment, requests = 0, []
    for value, (early, late, idle) in enumerate(steps, 1):
        moment += 1 + idle
        requests.append(answered(moment - early, moment + late, value, worker=value % 3))
    made = history(*requests)
    assert made.lost(0, len(steps)) == 0
    assert made.duplicates() == {}
    assert made.backwards() == []


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 10))
def test_a_roll_back_seen_in_order_is_counted_exactly(count: int, back: int, then: int) -> None:
    kept = max(count - back, 0)
    first = [answered(2 * n, 2 * n + 1, n) for n in range(1, count + 1)]
    second = [answered(1000 + 2 * n, 1001 + 2 * n, kept + n) for n in range(1, then + 1)]
    assert history(*first, *second).lost(0, kept + then) == count - kept


def test_downtime_is_the_longest_gap_less_the_typical() -> None:
    ends = [10, 20, 30, 40, 340, 350, 360]
    made = history(*(answered(end - 5, end, n) for n, end in enumerate(ends, 1)))
    downtime = made.downtime()
    assert downtime is not None
    assert downtime.seconds == pytest.approx(0.29)
    assert downtime.typical_s == pytest.approx(0.01)
    assert downtime.gap.start_ns == 40 * MS


def test_downtime_of_a_moment_ignores_what_was_before() -> None:
    ends = [10, 500, 510, 520, 620, 630]
    made = history(*(answered(end - 5, end, n) for n, end in enumerate(ends, 1)))
    inside = made.downtime(after_ns=530 * MS)
    assert inside is not None
    assert inside.gap.end_ns == 620 * MS
    assert made.downtime(after_ns=630 * MS) is None  # nothing came any more


def test_downtime_needs_two_answers() -> None:
    assert history().downtime() is None
    assert history(answered(0, 1, 1)).downtime() is None
    two = history(answered(0, 1, 1), answered(2, 11, 2)).downtime()
    assert two is not None
    assert two.seconds == pytest.approx(0.01)


def test_resets_are_told_from_other_errors() -> None:
    made = history(
        failed(0, 1, "ConnectionResetError: reset"),
        failed(2, 3, "TimeoutError: "),
        failed(4, 5, "IncompleteReadError: closed"),
    )
    assert len(made.errors) == 3
    assert len(made.resets) == 2
    assert len(made.problems()) == 3


def test_file_round_trip_and_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "history"
    requests = (answered(0, 1, 1), failed(2, 3, "TimeoutError: x"))
    path.write_text("".join(each.line() + "\n" for each in requests) + '{"kind": "incr')
    assert History.read(path).requests == requests
    path.write_text('{"kind": "incr\n' + requests[0].line() + "\n")
    with pytest.raises(ValueError, match="Unterminated"):
        History.read(path)


def test_stream_and_datagrams(tmp_path: Path) -> None:
    stream = [Sample("stream", n, n * 10, n * 10 + 5, value=n) for n in range(1, 4)]
    assert stream_problems(stream) == []
    assert stream_problems([stream[0], stream[2]]) == ["line 3 was answered as 3, expected 2"]
    datagrams = [Sample("udp", n, n * 10, n * 10 + 5, value=v) for n, v in ((1, 5), (2, 6), (3, 4))]
    assert value_problems(datagrams[:2]) == []
    assert value_problems(datagrams) == ["datagram 3 knows 4, 2 knew 6"]
    path = tmp_path / "samples"
    path.write_text("".join(each.line() + "\n" for each in stream))
    assert read_samples(path) == stream


def test_datagrams_are_judged_with_the_increments() -> None:
    ahead = [Sample("udp", 1, 20, 25, value=9), Sample("stream", 1, 20, 25, value=1)]
    increments = (
        Request("increment", 0, 1, 0, 5, value=7),
        Request("increment", 0, 1, 30, 35, value=8),  # the datagram knew 9 before
    )
    assert History(increments).problems() == []
    assert History((*increments, *as_reads(ahead[1:]))).problems() == []
    assert History((*increments, *as_reads(ahead))).problems() == ["value 8 at 30 after 9 at 25"]
    behind = [Sample("udp", 1, 40, 45, value=7)]
    assert History((*increments, *as_reads(behind))).lost() == 1
