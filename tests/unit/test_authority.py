"""Authority: the table, the questions, and who starts. The interleavings are searched by test_model.py."""

from itertools import product

import pytest

from ftd.arbiter import Record
from ftd.authority import (
    TABLE,
    Authority,
    Denied,
    Event,
    IllegalEvent,
    Question,
    Release,
    Row,
    Standing,
    Start,
    ask_first,
    ask_pairing,
    ask_solo,
    ask_stopped,
    ask_takeover,
    at_start,
    may_begin_session,
    release_of,
)
from ftd.errors import ArbiterStale

BACKUP = {Standing.EMPTY, Standing.GUARDING, Standing.CLAIMING, Standing.DOUBTING}
RUNS = {Standing.ALONE, Standing.PAIRED, Standing.ASKING, Standing.UNSURE}


def record(generation: int = 3, owner: str = "a", state: str = "paired", backup: str = "b") -> Record:
    return Record.model_validate(
        {"generation": generation, "owner": owner, "state": state, "backup": backup, "token": "t"}
    )


# ---- the table --------------------------------------------------------------------------------------------


def test_each_row_is_unique_and_has_a_reason() -> None:
    assert len({(row.standing, row.event) for row in TABLE}) == len(TABLE)
    assert all(len(row.why) > 10 for row in TABLE)


@pytest.mark.parametrize(("standing", "event"), [*product(Standing, Event)], ids=str)
def test_exactly_the_events_of_the_table_are_taken(standing: Standing, event: Event) -> None:
    heard: list[Row] = []
    authority = Authority(standing, heard.append)
    row = next((row for row in TABLE if (row.standing, row.event) == (standing, event)), None)
    assert authority.knows(event) is (row is not None)
    if row is not None:
        assert authority.on(event) is row.to
        assert heard == [row]
    else:
        with pytest.raises(IllegalEvent, match=f"{event} has no meaning for a node that is {standing}"):
            authority.on(event)
        assert authority.standing is standing
        assert heard == []


def test_all_output_goes_only_by_a_granted_question_or_a_persons_word() -> None:
    into = {row.event for row in TABLE if row.to is Standing.ALONE and row.standing is not Standing.ALONE}
    assert into == {Event.GRANTED, Event.FORCED}
    assert {standing for standing in Standing if release_of(standing) is Release.ALL} == {Standing.ALONE}
    assert {s for s in Standing if release_of(s) is Release.COMMITTED} == {Standing.PAIRED}


def test_a_node_that_may_be_deposed_never_gets_back_to_alone_by_a_loss() -> None:
    rows = {(row.standing, row.event): row.to for row in TABLE}
    assert rows[Standing.ALONE, Event.COMMITTED] is Standing.PAIRED
    assert rows[Standing.PAIRED, Event.LOST] is Standing.ASKING
    assert release_of(Standing.ASKING) is Release.NOTHING


def test_doubt_ends_only_by_an_answer_or_a_persons_word() -> None:
    for doubt in (Standing.UNSURE, Standing.DOUBTING):
        out = {row.event for row in TABLE if row.standing is doubt and row.to is not doubt}
        assert out == {Event.GRANTED, Event.DENIED, Event.FORCED, Event.ENDED}
        assert not may_begin_session(doubt)


def test_a_backup_starts_its_shadow_only_from_a_claim() -> None:
    origins = {row.standing for row in TABLE if row.to is Standing.ALONE and row.standing in BACKUP}
    assert origins == {Standing.GUARDING, Standing.CLAIMING, Standing.DOUBTING}
    from_guarding = [row for row in TABLE if row.standing is Standing.GUARDING and row.to is Standing.ALONE]
    assert [row.event for row in from_guarding] == [Event.FORCED]


def test_only_who_runs_the_guest_is_deposed_and_there_is_no_way_back() -> None:
    assert {row.standing for row in TABLE if row.to is Standing.DEPOSED} <= RUNS
    assert {row.to for row in TABLE if row.standing is Standing.DEPOSED} == {Standing.ENDED}


# ---- questions --------------------------------------------------------------------------------------------


def wanted(question: Question | Denied) -> Record:
    assert isinstance(question, Question)
    return question.wanted


def test_solo_is_generation_plus_one_of_what_this_node_has() -> None:
    now = record()
    question = ask_solo("a", 3, now)
    assert isinstance(question, Question)
    assert question.expected == now
    assert (question.wanted.generation, question.wanted.owner, question.wanted.state) == (4, "a", "solo")
    assert wanted(ask_solo("a", 3, record(5, "a", "solo"))).generation == 6
    assert isinstance(ask_solo("a", 3, record(4, "b", "solo")), Denied)


@pytest.mark.parametrize(
    "there",
    [
        record(state="solo"),
        record(state="stopped"),
        record(backup="c"),
        record(4),
        record(4, "b", "solo"),
    ],
    ids=str,
)
def test_a_backup_that_is_not_on_record_does_not_even_ask(there: Record) -> None:
    assert isinstance(ask_takeover("b", 3, there), Denied)


def test_a_backup_on_record_asks_for_the_next_generation() -> None:
    taken = wanted(ask_takeover("b", 3, record()))
    assert (taken.generation, taken.owner, taken.state) == (4, "b", "solo")


def test_pairing_keeps_the_generation_and_is_another_record_each_time() -> None:
    once, again = (wanted(ask_pairing("a", 3, "b", record())) for _ in range(2))
    assert (once.generation, once.owner, once.state, once.backup) == (3, "a", "paired", "b")
    assert once != again
    assert isinstance(ask_pairing("a", 3, "b", record(4, "b", "solo")), Denied)
    assert isinstance(ask_pairing("a", 3, "b", record(4, "a", "solo")), Denied)


def test_the_end_of_the_guest_is_written_down_by_its_owner_only() -> None:
    assert wanted(ask_stopped("a", 3, record())).state == "stopped"
    assert isinstance(ask_stopped("a", 3, record(4, "b", "solo")), Denied)
    assert isinstance(ask_stopped("a", 3, None), Denied)


def test_an_old_or_empty_arbiter_is_refused_by_every_question() -> None:
    for there in (None, record(2)):
        for ask in (
            lambda there: ask_solo("a", 3, there),
            lambda there: ask_takeover("b", 3, there),
            lambda there: ask_pairing("a", 3, "b", there),
        ):
            with pytest.raises(ArbiterStale, match=r"has seen generation 3: .*ftd takeover --force"):
                ask(there)


def test_the_first_record_is_generation_1() -> None:
    assert wanted(ask_first("a", None)).generation == 1


# ---- the start --------------------------------------------------------------------------------------------

CASES = [
    # me, configured, guest here, known, record, what
    ("a", "primary", False, 0, None, Start.BOOT),
    ("b", "backup", False, 0, None, Start.BACKUP),
    ("a", "primary", True, 0, None, Start.ATTACH),
    ("b", "backup", True, 0, None, Start.ATTACH),
    ("a", "primary", False, 3, record(3, "a", "solo"), Start.BOOT),
    ("a", "backup", False, 3, record(3, "a", "solo"), Start.BOOT),
    ("a", "primary", False, 3, record(3, "a", "stopped"), Start.BOOT),
    ("a", "primary", False, 3, record(), Start.WAIT),
    ("a", "primary", True, 3, record(), Start.ATTACH),
    ("b", "primary", False, 3, record(), Start.BACKUP),
    ("b", "backup", False, 0, record(3, "a", "stopped"), Start.BACKUP),
    ("b", "backup", True, 3, record(), Start.KILL),
]


@pytest.mark.parametrize(("me", "configured", "here", "known", "there", "start"), CASES)
def test_who_starts_is_decided_from_what_is_durable(me, configured, here, known, there, start) -> None:
    decision = at_start(me, configured, here, known, there)
    assert decision.start is start
    assert len(decision.why) > 10


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("there", [None, record(2)])
def test_nobody_starts_by_an_arbiter_that_is_older(here: bool, there: Record | None) -> None:
    with pytest.raises(ArbiterStale, match="its data are old or lost"):
        at_start("a", "primary", here, 3, there)


def test_of_two_nodes_at_most_one_boots_the_guest() -> None:
    states = ("solo", "paired", "stopped")
    for owner, state in product("ab", states):
        starts = [
            at_start(me, role, False, 0, record(3, owner, state)).start  # type: ignore[arg-type]
            for me, role in (("a", "primary"), ("b", "primary"))
        ]
        assert starts.count(Start.BACKUP) == 1
