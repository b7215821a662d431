"""The states of a pair: which moves there are, and that there are no others."""

import logging
from itertools import product

import pytest

from ftd.state import MOVES, ROLES, IllegalMove, Move, PairState, Role, StateMachine, table

WAITING, SYNCING, PROTECTED = PairState.WAITING, PairState.SYNCING, PairState.PROTECTED
SOLO, HELD, TAKEN_OVER, STOPPED = PairState.SOLO, PairState.HELD, PairState.TAKEN_OVER, PairState.STOPPED


def ways(role: Role) -> dict[tuple[Role, PairState], list[PairState]]:
    """A shortest way to every (role, state) that a node which starts in the role can reach."""
    found: dict[tuple[Role, PairState], list[PairState]] = {(role, WAITING): []}
    queue = [(role, WAITING)]
    while queue:
        at = queue.pop(0)
        for row in MOVES:
            if (row.role, row.origin) == at:
                changed: dict[PairState, Role] = {TAKEN_OVER: "primary", WAITING: "backup"}
                after = changed.get(row.to, row.role)
                if (after, row.to) not in found:
                    found[after, row.to] = [*found[at], row.to]
                    queue.append((after, row.to))
    return found


def machine_at(role: Role, state: PairState) -> StateMachine:
    start: Role = "backup" if state is TAKEN_OVER else role
    machine = StateMachine(start)
    for step in ways(start)[role, state]:
        machine.move(step, "on the way")
    assert (machine.role, machine.state) == (role, state)
    return machine


PLACES = [*ways("primary"), ("primary", TAKEN_OVER), *ways("backup")]
PLACES = list(dict.fromkeys(PLACES))


def test_numbers_are_frozen() -> None:
    assert {state.value: state.number for state in PairState} == {
        "stopped": 0,
        "waiting": 1,
        "syncing": 2,
        "protected": 3,
        "solo": 4,
        "held": 5,
        "taken-over": 6,
    }


def test_each_row_is_unique_and_has_a_reason() -> None:
    assert len({(row.role, row.origin, row.to) for row in MOVES}) == len(MOVES)
    assert all(len(row.why) > 10 for row in MOVES)
    assert all(row.origin is not row.to for row in MOVES)


def test_each_row_can_be_reached() -> None:
    assert {(row.role, row.origin) for row in MOVES} <= set(PLACES)


@pytest.mark.parametrize(("place", "to"), [*product(PLACES, PairState)], ids=str)
def test_exactly_the_moves_of_the_table_are_accepted(place: tuple[Role, PairState], to: PairState) -> None:
    role, origin = place
    machine = machine_at(role, origin)
    reason = machine.reason
    if to is origin:
        assert machine.allows(to)
        assert machine.move(to, "again") is False
        assert machine.reason == reason
    elif any((row.role, row.origin, row.to) == (role, origin, to) for row in MOVES):
        assert machine.allows(to)
        assert machine.move(to, "because") is True
        assert (machine.state, machine.reason) == (to, "because")
    else:
        assert not machine.allows(to)
        with pytest.raises(IllegalMove, match=f"a {role} cannot move from {origin} to {to} \\(because\\)"):
            machine.move(to, "because")
        assert (machine.role, machine.state, machine.reason) == (role, origin, reason)


def test_a_shadow_that_is_not_equal_to_a_committed_epoch_is_never_started() -> None:
    origins = {row.origin for row in MOVES if row.to is TAKEN_OVER}
    assert origins == {PROTECTED, HELD}
    # held is entered by a backup only from protected, with a committed epoch in its hands
    assert {row.origin for row in MOVES if row.role == "backup" and row.to is HELD} == {PROTECTED}


def test_only_a_backup_takes_over_and_only_a_primary_is_solo() -> None:
    assert {row.role for row in MOVES if row.to is TAKEN_OVER} == {"backup"}
    assert {row.role for row in MOVES if row.to is SOLO} == {"primary"}


def test_stopped_is_reached_from_everywhere_and_left_to_nowhere() -> None:
    assert not [row for row in MOVES if row.origin is STOPPED]
    for role, state in PLACES:
        assert machine_at(role, state).allows(STOPPED)


def test_life_of_a_primary() -> None:
    machine = StateMachine("primary")
    for to in (
        SOLO,
        SYNCING,
        PROTECTED,
        SYNCING,
        PROTECTED,
        HELD,
        SOLO,
        SYNCING,
        HELD,
        SYNCING,
        SOLO,
        STOPPED,
    ):
        assert machine.move(to, "story")
    assert machine.role == "primary"


def test_a_backup_that_took_over_is_the_primary_and_can_be_protected_again() -> None:
    machine = StateMachine("backup")
    for to in (SYNCING, WAITING, SYNCING, PROTECTED, HELD, TAKEN_OVER):
        assert machine.move(to, "story")
    assert machine.role == "primary"
    for to in (SYNCING, PROTECTED, SOLO, STOPPED):
        assert machine.move(to, "story")


def test_a_deposed_primary_is_the_backup_and_can_take_over_again() -> None:
    machine = StateMachine("primary")
    for to in (SYNCING, PROTECTED, HELD, WAITING):
        assert machine.move(to, "story")
    assert machine.role == "backup"
    for to in (SYNCING, PROTECTED, TAKEN_OVER):
        assert machine.move(to, "story")
    assert machine.role == "primary"


def test_a_role_is_assumed_only_before_anything_has_begun() -> None:
    machine = StateMachine("primary")
    machine.assume("backup")
    assert machine.role == "backup"
    machine.move(SYNCING, "a primary came")
    with pytest.raises(IllegalMove, match="a backup that is syncing cannot become a primary just so"):
        machine.assume("primary")


def test_listeners_hear_every_move_in_order_even_when_one_of_them_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: list[tuple[str, Move]] = []
    machine = StateMachine("backup")

    def fails(move: Move) -> None:
        heard.append(("first", move))
        raise RuntimeError("listener broke")

    machine.listen(fails)
    machine.listen(lambda move: heard.append(("second", move)))
    machine.move(SYNCING, "a primary came")
    machine.move(SYNCING, "repeated")
    assert [(who, move.role, move.origin, move.to, move.reason) for who, move in heard] == [
        ("first", "backup", WAITING, SYNCING, "a primary came"),
        ("second", "backup", WAITING, SYNCING, "a primary came"),
    ]
    assert machine.state is SYNCING
    assert "listener to the pair state failed" in caplog.text


def test_every_move_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    machine = StateMachine("primary")
    machine.move(SYNCING, "backup 10.0.0.2 is there")
    machine.move(HELD, "connection reset")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING"]
    assert caplog.records[1].ftd_fields == {  # type: ignore[attr-defined]
        "role": "primary",
        "state": HELD,
        "was": SYNCING,
        "reason": "connection reset",
        "meaning": "the backup is lost and the authority is unclear",
    }


def test_the_table_can_be_printed() -> None:
    assert len(table().splitlines()) == len(MOVES)
    assert set(ROLES) == {"primary", "backup"}
