"""What `ftd why` makes of what the nodes have recorded."""

from typing import Any

import pytest

from ftd import flight
from ftd.errors import FtdError
from ftd.explanation import explain
from ftd.flight import Entry

LOST = Entry(10.0, "b", "session-lost", {"reason": "silence: nothing heard"})


def test_a_takeover_is_explained_from_both_sides() -> None:
    mine = [
        LOST,
        Entry(
            10.2,
            "b",
            "arbiter",
            {"question": "takeover", "answer": "granted", "seconds": 0.004, "record": "generation 2, b solo"},
        ),
        Entry(10.5, "b", "took-over", {"trigger": "silence", "epoch": 77}),
    ]
    other = [
        Entry(9.0, "a", "session", {"peer": "b"}),
        Entry(12.0, "a", "state", {"to": "waiting", "reason": "this node has lost the guest"}),
    ]
    merged = flight.merge([mine, other])
    assert [entry.at for entry in merged] == [9.0, 10.0, 10.2, 10.5, 12.0]
    assert explain(merged).splitlines() == [
        "b took over at 1970-01-01 00:00:10.500 UTC (silence), from epoch 77.",
        "It had lost its primary 0.500 s before: silence: nothing heard.",
        "The arbiter granted it within 0.004 s: generation 2, b solo.",
        "Then a was waiting: this node has lost the guest.",
    ]


def test_that_there_was_none_is_explained() -> None:
    story = [
        LOST,
        Entry(
            10.1,
            "b",
            "arbiter",
            {"question": "takeover", "answer": "denied", "record": "generation 2, a solo"},
        ),
        Entry(
            10.2, "b", "state", {"to": "waiting", "reason": "the primary is lost, and takeover is refused"}
        ),
    ]
    assert explain(story).splitlines() == [
        "No takeover after b lost its peer at 1970-01-01 00:00:10.000 UTC: silence: nothing heard.",
        "b asked for takeover: denied, generation 2, a solo.",
        "b was waiting: the primary is lost, and takeover is refused.",
    ]
    assert "neither side has lost the other" in explain([Entry(1.0, "a", "state", {"to": "solo"})])


def test_nothing_explains_nothing() -> None:
    with pytest.raises(FtdError, match="nothing was recorded"):
        explain([])


# ---- daemons that were replaced ---------------------------------------------------------------------------


def entry(at: float, node: str, what: str, **fields: Any) -> Entry:
    return Entry(at, node, what, fields)


# Of a primary that was replaced while b waited; b's clock is 0.2 s ahead.
REPLACED = [
    entry(100.0, "a", "committed", epoch=41, generation=1),
    entry(100.01, "a", "replaced", peer="b", epoch=41, seconds=5.0),
    entry(100.02, "a", "state", to="stopped", was="protected", reason="the daemon ends, or is replaced"),
]
WAITS = [entry(100.25, "b", "away", peer="a", own=False, epoch=41, seconds=5.0)]
GOES_ON = [
    entry(100.8, "a", "session", peer="b", generation=1),
    entry(100.9, "a", "resumed", epoch=42, generation=1, held=0.8432),
    entry(100.91, "a", "state", to="protected", reason="no copy was needed after this daemon was restarted"),
]
WENT_ON = [
    entry(101.0, "b", "session", peer="a", generation=1, resumes=True),
    entry(101.09, "b", "resumed", epoch=42, generation=1),
]
RESUMED = (
    "the daemon of a was replaced in place at 1970-01-01 00:01:40.010 UTC, and protection went on with epoch "
    "42, without a copy; output was held for 0.843 s."
)


def test_there_was_no_takeover_since_a_daemon_was_replaced() -> None:
    both = flight.merge([REPLACED + GOES_ON, WAITS + WENT_ON])
    assert explain(both) == f"No takeover: {RESUMED}"
    # One node's record is enough: the backup's tells how long it waited itself.
    assert explain(REPLACED + GOES_ON) == f"No takeover: {RESUMED}"
    alone = explain(WAITS + WENT_ON)
    assert "the daemon of a was replaced in place at 1970-01-01 00:01:40.250 UTC" in alone
    assert alone.endswith("output was held for 0.840 s.")


def test_a_backup_that_was_replaced_is_the_one_that_is_named() -> None:
    primary = [
        entry(50.0, "a", "away", peer="b", own=False, epoch=9, seconds=2.0),
        entry(50.7, "a", "resumed", epoch=10, generation=1, held=0.71),
    ]
    backup = [
        entry(50.1, "b", "replaced", peer="a", epoch=9, seconds=2.0),
        entry(50.6, "b", "away", peer="a", own=True, epoch=9, seconds=2.0),
        entry(50.8, "b", "resumed", epoch=10, generation=1),
    ]
    for story in (primary, flight.merge([primary, backup])):
        assert explain(story) == (
            "No takeover: the daemon of b was replaced in place at 1970-01-01 00:00:50.000 UTC, and "
            "protection went on with epoch 10, without a copy; output was held for 0.710 s."
        )


def test_a_restart_does_not_hide_the_takeover_before_it_nor_one_after_it() -> None:
    restart = flight.merge([REPLACED + GOES_ON, WAITS + WENT_ON])
    taken = [LOST, entry(10.5, "b", "took-over", trigger="silence", epoch=7)]
    before = explain(taken + restart).splitlines()
    assert before[0].startswith("b took over at 1970-01-01 00:00:10.500 UTC (silence)")
    assert before[-1] == f"Since then, {RESUMED}"
    after = [
        entry(200.0, "b", "session-lost", reason="silence: nothing heard"),
        entry(200.5, "b", "took-over", trigger="silence", epoch=77),
    ]
    told = explain(restart + after)
    assert "It had lost its primary 0.500 s before" in told
    assert "replaced" not in told


def test_a_takeover_since_the_next_daemon_was_overdue() -> None:
    taken = [
        entry(105.22, "b", "session-lost", reason="restart-overdue: a did not come back within 5.0 s"),
        entry(
            105.23,
            "b",
            "arbiter",
            question="takeover",
            answer="granted",
            seconds=0.004,
            record="generation 2, b solo",
        ),
        entry(105.25, "b", "took-over", trigger="restart-overdue", epoch=41),
    ]
    assert explain(flight.merge([REPLACED, WAITS + taken])).splitlines() == [
        "b took over at 1970-01-01 00:01:45.250 UTC (restart-overdue), from epoch 41.",
        "The daemon of a was being replaced in place since 1970-01-01 00:01:40.010 UTC, and the next one did "
        "not come within the 5 s agreed; output was held for 5.000 s, until this takeover.",
        "The arbiter granted it within 0.004 s: generation 2, b solo.",
    ]


def test_a_primary_that_went_on_alone_since_the_backup_was_overdue() -> None:
    primary = [
        entry(50.0, "a", "away", peer="b", own=False, epoch=9, seconds=1.5),
        entry(51.5, "a", "not-resumed", reason="b was not reached in time"),
        entry(51.51, "a", "state", to="held", reason="b was not reached in time"),
        entry(51.52, "a", "arbiter", question="solo", answer="granted", record="generation 2, a solo"),
    ]
    solo = entry(51.53, "a", "state", to="solo", reason="the arbiter gave it")
    late = [
        entry(52.0, "b", "away", peer="a", own=True, epoch=9, seconds=1.5),
        entry(53.5, "b", "session-lost", reason="restart-overdue: a did not come back within 1.5 s"),
        entry(53.51, "b", "arbiter", question="takeover", answer="denied", record="generation 2, a solo"),
    ]
    sentence = (
        "No takeover: the daemon of b was replaced in place at 1970-01-01 00:00:50.000 UTC, and protection "
        "did not go on: b was not reached in time; output "
    )
    assert explain(primary).splitlines()[0] == f"{sentence}is held since."
    told = explain(flight.merge([[*primary, solo], late])).splitlines()
    assert told[0] == f"{sentence}was held for 1.530 s, until a was solo."
    assert "a asked for solo: granted, generation 2, a solo." in told
    assert told[-1] == "b asked for takeover: denied, generation 2, a solo."


def test_a_restart_that_is_not_over_or_had_nothing_to_go_on_with() -> None:
    assert explain(flight.merge([REPLACED, WAITS])) == (
        "No takeover: the daemon of a is being replaced in place since 1970-01-01 00:01:40.010 UTC: output "
        "is held, and the other side waits for the 5 s agreed."
    )
    bare = [entry(5.0, "a", "replaced"), entry(9.0, "a", "resumed", epoch=3, held=1.0)]
    assert explain(bare) == (
        "No takeover: the daemon of a was replaced in place at 1970-01-01 00:00:05.000 UTC, with no "
        "protection to go on with."
    )
