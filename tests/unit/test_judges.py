"""Each judge of the chaos test finds what it is there for, and nothing in a good schedule; seeds decide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from testbed.faults import KINDS, Fault, Schedule, Step
from testbed.filters import drop_address, drop_tcp_port
from testbed.history import Request, Sample
from testbed.judges import CHECKERS, Evidence, Tail, Told, granted, judge

from ftd.arbiter import Record

MS = 1_000_000


def asked(value: int | None, at: int, error: str | None = None) -> Request:
    return Request("increment", 0, 1, at * MS, (at + 1) * MS, value, error)


def line(number: int, value: int | None, error: str | None = None) -> Sample:
    return Sample("stream", number, number * MS, (number + 1) * MS, value, error)


def record(generation: int, owner: str, state: Any = "solo", backup: str = "") -> Record:
    return Record(generation=generation, owner=owner, state=state, backup=backup)


TOLD = Told([asked(1, 0), asked(2, 2)], [line(8, 8), line(9, 9)], 7)
GOOD = Evidence(
    told=[TOLD],
    excused=False,
    speakers=[],
    records=[record(1, "a"), record(1, "a", "paired", "b"), record(2, "b"), record(2, "b", "paired", "a")],
    claims={"a": [1], "b": [2]},
    verified={"ok": True},
    guest={"dirty_mismatches": 0, "clock_backwards": 0},
    consoles="ftd-guest: ready\n",
    disks=[],
    noted=[],
    logs="INFO took over\n",
)


def test_a_good_schedule_has_no_problems() -> None:
    assert judge(GOOD) == []


@pytest.mark.parametrize(
    ("changed", "judge_", "told"),
    [
        ({"told": [Told([asked(2, 0), asked(1, 2)])]}, "S1 S4 answers", "acknowledged increments are lost"),
        ({"told": [Told([asked(1, 0), asked(1, 2)])]}, "S1 S4 answers", "value 1 was given 2 times"),
        ({"told": [Told([asked(None, 0, "ConnectionResetError: ")])]}, "S1 S4 answers", "ConnectionReset"),
        ({"told": [Told([], [line(8, 9)], 7)]}, "S1 S4 answers", "line 8 was answered as 9"),
        ({"speakers": ["two guests answered: question 5, on a and b"]}, "S3 S6 speakers", "two guests"),
        ({"records": [record(1, "a"), record(1, "b")]}, "S3 authority", "generation 1 has two owners"),
        ({"records": [record(1, "a"), record(3, "a")]}, "S3 authority", "became generation 3"),
        ({"records": [record(2, "a"), record(1, "a")]}, "S3 authority", "became generation 1"),
        ({"records": [record(1, "a"), record(2, "b", "paired", "a")]}, "S3 authority", "began as"),
        ({"claims": {"a": [1, 2], "b": [2]}}, "S3 authority", "a says that it won generation 2"),
        ({"verified": {"ok": False}}, "S2 S4 memory", "not equal"),
        ({"consoles": "dirtier: MISMATCH page 1\n"}, "S2 S4 memory", "MISMATCH"),
        ({"guest": {"dirty_mismatches": 0, "clock_backwards": 1}}, "S2 S4 memory", "clock_backwards = 1"),
        ({"disks": ["2 blocks differ"]}, "S5 disks", "2 blocks"),
        ({"noted": ["the guest has died with its daemon"]}, "S6 S7 daemons", "died"),
        ({"logs": "Traceback (most recent call last):\n"}, "S8 logs", "Traceback"),
    ],
)
def test_a_judge_finds(changed: dict[str, Any], judge_: str, told: str) -> None:
    found = judge(replace(GOOD, **changed))
    assert found
    assert all(line.startswith(judge_) for line in found)
    assert any(told in line for line in found)


def test_every_rule_has_a_judge() -> None:
    assert {rule for name in CHECKERS for rule in name.split() if rule[0] == "S" and rule[1:].isdigit()} == {
        f"S{number}" for number in range(1, 9)
    }


def test_a_life_that_was_allowed_to_end_may_break_connections_and_nothing_else() -> None:
    broken = Told([asked(1, 0), asked(None, 2, "ConnectionResetError: ")], [line(1, None, "EOFError: ")])
    broken.udp = [Sample("udp", 1, 20 * MS, 21 * MS, 0)]  # the next life's answer to a client of this one
    again = Told([asked(1, 9)])
    assert judge(replace(GOOD, told=[broken, again], excused=True)) == []
    assert judge(replace(GOOD, told=[broken, again])) != []
    assert judge(replace(GOOD, told=[again, broken], excused=True)) != []


# ---- schedules --------------------------------------------------------------------------------------------


def test_a_seed_decides_and_each_kind_comes_first_once_in_a_round() -> None:
    assert [Schedule.of(seed) for seed in range(200)] == [Schedule.of(seed) for seed in range(200)]
    others = {kind.name for kind in KINDS.values() if not kind.ends_life}
    length = 1 + len(others)
    begin = [Schedule.of(seed).steps[0].fault.kind for seed in range(4 * length)]
    for round_ in range(4):
        assert set(begin[round_ * length + 1 : (round_ + 1) * length]) == others
    assert set(begin[::length]) == set(KINDS) - others


def step(kind: str, protected_first: bool = False) -> Step:
    return Step(Fault(kind, "leader", 0.1), 0.1, protected_first)


def test_memory_may_be_lost_only_when_both_copies_can_be_gone() -> None:
    def may(*steps: Step) -> bool:
        return Schedule(0, steps).may_lose_memory

    assert not may(step("host-killed"))
    assert not may(step("link-cut"), step("host-frozen"), step("arbiter-gone"))
    assert may(step("host-killed"), step("link-cut"))
    assert may(step("link-cut"), step("qemu-killed"))
    assert not may(step("host-killed"), step("host-killed", protected_first=True))
    assert may(step("host-killed"), step("link-cut", protected_first=True), step("daemon-killed"))
    assert may(step("guest-reboots"))


# ---- small parts ------------------------------------------------------------------------------------------


def run_filter(program: str, frame: bytes) -> int:
    """Carry out a classic BPF program of the kinds that are used; returns what it returns."""
    count, *lines = program.rstrip(",").split(",")
    code = [tuple(map(int, each.split())) for each in lines]
    assert len(code) == int(count)
    a = x = at = 0
    while True:
        operation, yes, no, k = code[at]
        at += 1
        match operation:
            case 40:
                a = int.from_bytes(frame[k : k + 2], "big")
            case 32:
                a = int.from_bytes(frame[k : k + 4], "big")
            case 48:
                a = frame[k]
            case 72:
                a = int.from_bytes(frame[x + k : x + k + 2], "big")
            case 177:
                x = 4 * (frame[k] & 15)
            case 21:
                at += yes if a == k else no
            case 6:
                return k
            case _:
                raise AssertionError(operation)


def segment(source: int, destination: int, protocol: int = 6, header: int = 5) -> bytes:
    ip = bytes([0x40 + header]) + bytes(8) + bytes([protocol]) + bytes(2)
    ip += bytes([10, 78, 0, 11, 10, 78, 0, 12]) + bytes(4 * (header - 5))
    ports = source.to_bytes(2, "big") + destination.to_bytes(2, "big")
    return bytes(12) + b"\x08\x00" + ip + ports


def test_filters_lose_what_they_name_and_nothing_else() -> None:
    lost, passed = 2, 0xFFFFFFFF
    port = drop_tcp_port(7789)
    for header in (5, 8):
        assert run_filter(port, segment(7789, 40000, header=header)) == lost
        assert run_filter(port, segment(40000, 7789, header=header)) == lost
        assert run_filter(port, segment(40000, 7788, header=header)) == passed
    assert run_filter(port, segment(7789, 7789, protocol=17)) == passed
    assert run_filter(port, bytes(12) + b"\x08\x06" + bytes(40)) == passed
    for address, said in (("10.78.0.11", lost), ("10.78.0.12", lost), ("10.78.0.13", passed)):
        assert run_filter(drop_address(address), segment(1, 2)) == said
    assert run_filter(drop_address("10.78.0.11"), bytes(12) + b"\x08\x06" + bytes(40)) == passed


def test_tail_reads_whole_lines_once(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "log")
    assert tail.read() == ""
    tail.path.write_text("one\ntw")
    assert tail.read() == "one\n"
    with tail.path.open("a") as file:
        file.write("o\n")
    assert (tail.read(), tail.read()) == ("two\n", "")
    tail.path.write_text("new\n")
    assert tail.read() == "new\n"


def test_claims_are_read_from_the_flight_recorder() -> None:
    flight = (
        '{"what": "arbiter", "answer": "granted", "record": "generation 3, host-a solo"}\n'
        '{"what": "arbiter", "answer": "denied", "record": "generation 4, host-b solo"}\n'
        '{"what": "state"}\n'
    )
    assert granted(flight) == [3]
