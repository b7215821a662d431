"""Questions and what comes of them: every fault of an arbiter ends as an event."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit import sample
from unit.lossy_arbiter import LossyArbiter

from ftd.arbiter import NoArbiter
from ftd.arbiter_file import FileArbiter
from ftd.authority import Event
from ftd.config import load
from ftd.inquiry import Inquiry
from ftd.metrics import Metrics
from ftd.report import Report


@pytest.fixture
def arbiter(tmp_path: Path) -> LossyArbiter:
    (tmp_path / "records").mkdir()
    return LossyArbiter(tmp_path / "records", "web", timeout=5)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Inquiry]:
    config = load(sample.write(tmp_path, arbiter=sample.FILE_ARBITER))
    report = Report(config, Metrics(), "primary")

    def inquiry(arbiter: Any, me: str = "a") -> Inquiry:
        made = Inquiry(arbiter, report, me)
        made.report = report  # type: ignore[attr-defined]
        return made

    return inquiry


async def test_story_of_a_pair(arbiter: LossyArbiter, make: Callable[..., Inquiry]) -> None:
    a, b = make(arbiter, "a"), make(arbiter, "b")
    assert (await a.first(None)).granted
    assert (await b.takeover(1)).event is Event.DENIED  # not on record
    assert (await a.pairing(1, "b")).granted
    taken = await b.takeover(1)
    assert taken.granted
    assert taken.record is not None
    assert (taken.record.generation, taken.record.owner) == (2, "b")
    lost = await a.solo(1)
    assert lost.event is Event.DENIED
    assert "b has the guest: generation 2, b solo" in lost.reason
    assert (await b.stopped(2)).granted
    assert (await a.takeover(2)).event is Event.DENIED


async def test_two_sides_at_once_never_both_win(arbiter: LossyArbiter, make: Callable[..., Inquiry]) -> None:
    a, b = make(arbiter, "a"), make(FileArbiter(arbiter._folder, "web", timeout=5), "b")
    generation = 1
    await a.first(None)
    for _ in range(20):
        await a.pairing(generation, "b")
        solo, taken = await asyncio.gather(a.solo(generation), b.takeover(generation))
        assert solo.granted != taken.granted
        if taken.granted:
            a, b = b, a
            a._me, b._me = "a", "b"
            await a.force(generation + 1)
            generation += 1
        generation += 1


@pytest.mark.parametrize("losing", ["before", "after"])
async def test_doubt_is_settled_by_the_same_question(
    arbiter: LossyArbiter, make: Callable[..., Inquiry], losing: Any
) -> None:
    a = make(arbiter)
    await a.first(None)
    arbiter.losing = losing
    for _ in range(3):
        assert (await a.solo(1)).event is Event.DOUBT
    arbiter.losing = ""
    settled = await a.solo(1)
    assert settled.granted
    # Once, though it was asked four times.
    assert settled.record is not None
    assert settled.record.generation == 2
    assert await arbiter.read() == settled.record


async def test_doubt_that_another_has_settled_is_denied(
    arbiter: LossyArbiter, make: Callable[..., Inquiry]
) -> None:
    a, other = make(arbiter), FileArbiter(arbiter._folder, "web", timeout=5)
    await a.first(None)
    await a.pairing(1, "b")
    arbiter.losing = "before"
    assert (await a.solo(1)).event is Event.DOUBT
    assert (await make(other, "b").takeover(1)).granted
    arbiter.losing = ""
    assert (await a.solo(1)).event is Event.DENIED


async def test_an_arbiter_that_is_older_is_not_believed_and_told(
    arbiter: LossyArbiter, make: Callable[..., Inquiry]
) -> None:
    a = make(arbiter)
    outcome = await a.solo(5)
    assert outcome.event is Event.SILENT
    assert "the arbiter knows nothing, and this node has seen generation 5" in outcome.reason
    status = a.report.status()  # type: ignore[attr-defined]
    assert status.warnings == [outcome.reason]
    assert status.authority.error == outcome.reason
    assert await arbiter.read() is None
    # A person's word goes past it, and lifts it above what was seen.
    forced = await a.force(5)
    assert forced.record is not None
    assert forced.record.generation == 6
    assert a.report.status().warnings == []  # type: ignore[attr-defined]


async def test_without_an_arbiter_everything_is_granted_and_solo_keeps_the_generation(
    make: Callable[..., Inquiry],
) -> None:
    a = make(NoArbiter())
    assert not a.decides
    assert [
        (await question).record.generation  # type: ignore[union-attr]
        for question in (a.solo(4), a.takeover(4), a.pairing(4, "b"), a.stopped(4))
    ] == [4, 5, 4, 4]
