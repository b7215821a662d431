"""What a primary may say for its guest: asked of a real arbiter, one of files, that can be out of reach.

When it is asked, as the primary goes from one session to the next, is in test_primary.py.
"""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from unit import sample
from unit.lossy_arbiter import LossyArbiter

from ftd import mandate as module
from ftd.arbiter import NoArbiter, Record
from ftd.arbiter_file import FileArbiter
from ftd.authority import Event, Standing
from ftd.config import load
from ftd.errors import Deposed, QemuDied
from ftd.inquiry import Inquiry
from ftd.link import Session
from ftd.mandate import Mandate
from ftd.metrics import Metrics
from ftd.protection import ProtectionLost
from ftd.report import Report

PAIRED = Record(generation=1, owner="a", state="paired", backup="b")
TAKEN = Record(generation=2, owner="b", state="solo")


class Scene:
    """Node a has the guest in generation 1, and b is its backup by the arbiter's record."""

    def __init__(self, folder: Path) -> None:
        (folder / "records").mkdir()
        self.report = Report(
            load(sample.write(folder, arbiter=sample.FILE_ARBITER)), Metrics(), role="primary"
        )
        self.arbiter = LossyArbiter(folder / "records", "web", timeout=5)
        self.won: list[int] = []
        self.replicated: list[int] = []
        self.closed = asyncio.Event()

    def mandate(self, standing: Standing, *, told: bool = True, arbiter: Any = None) -> Mandate:
        async def replicated(generation: int) -> None:
            self.replicated.append(generation)

        return Mandate(
            self.report,
            Inquiry(arbiter or self.arbiter, self.report, "a"),
            1,
            standing,
            told=told,
            won=self.won.append,
            replicated=replicated,
        )

    def session(self) -> Session:
        async def close(reason: str) -> None:
            self.closed.set()

        return cast(Session, SimpleNamespace(peer_node="b", close=close))

    async def record(self) -> str:
        return str(await FileArbiter.read(self.arbiter))

    async def asked_in_vain(self, times: int) -> None:
        """Until the arbiter could not be reached so often."""
        for _ in range(times):
            await asyncio.wait_for(self.arbiter.unreached.get(), 10)

    async def b_takes_over(self) -> None:
        assert (await FileArbiter.compare_and_set(self.arbiter, PAIRED, TAKEN)).won


@pytest.fixture
async def scene(tmp_path: Path) -> Scene:
    made = Scene(tmp_path)
    await FileArbiter.compare_and_set(made.arbiter, None, PAIRED)
    return made


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_AGAIN_SECONDS", 0.001)


async def test_a_question_that_is_granted_makes_a_generation_and_frees_the_output(scene: Scene) -> None:
    mandate = scene.mandate(Standing.ASKING)
    assert not mandate.flows
    assert (await mandate.ask()).granted
    assert (mandate.standing, mandate.generation, scene.won) == (Standing.ALONE, 2, [2])
    assert mandate.flows
    assert await scene.record() == "generation 2, a solo"


@pytest.mark.parametrize("losing", ["all", "before", "after"])
async def test_without_an_answer_nothing_may_go_and_the_generation_stays(scene: Scene, losing: Any) -> None:
    mandate = scene.mandate(Standing.ASKING)
    scene.arbiter.losing = losing
    for _ in range(3):
        assert not (await mandate.ask()).granted
        assert mandate.standing is (Standing.ASKING if losing == "all" else Standing.UNSURE)
        assert not mandate.flows
        assert mandate.may_be_forced
    assert (mandate.generation, scene.won) == (1, [])
    scene.arbiter.losing = ""
    await mandate.ask()
    assert (mandate.standing, mandate.generation, scene.won) == (Standing.ALONE, 2, [2])


async def test_a_guest_that_the_other_side_has_is_given_up(scene: Scene) -> None:
    await scene.b_takes_over()
    mandate = scene.mandate(Standing.ASKING)
    with pytest.raises(Deposed, match="b has the guest"):
        await mandate.ask()
    assert mandate.standing is Standing.DEPOSED
    assert not mandate.flows
    assert not mandate.release_at_the_end(committed=True)


async def test_force_counts_at_once_and_is_told_to_the_arbiter_when_it_answers(scene: Scene) -> None:
    mandate = scene.mandate(Standing.ASKING)
    scene.arbiter.losing = "all"
    mandate.force()
    assert mandate.forced
    await mandate.ask()
    assert (mandate.standing, mandate.told, mandate.forced) == (Standing.ALONE, False, False)
    assert mandate.flows
    assert any("taken by force" in warning for warning in scene.report.status().warnings)

    scene.arbiter.losing = ""
    assert (await mandate.ask()).granted
    assert (mandate.told, mandate.generation, scene.won) == (True, 2, [2])
    assert scene.report.status().warnings == []
    assert await scene.record() == "generation 2, a solo"


async def test_without_an_arbiter_there_is_nobody_to_be_told(scene: Scene) -> None:
    assert scene.mandate(Standing.ALONE, told=False, arbiter=NoArbiter()).told
    assert not scene.mandate(Standing.ALONE, told=False).told


async def test_a_backup_is_on_record_before_a_commit_counts(scene: Scene) -> None:
    """Which waits for the arbiter, however long that takes, unless it has the same on record from before."""
    mandate = scene.mandate(Standing.ALONE)
    await FileArbiter.compare_and_set(scene.arbiter, PAIRED, Record(generation=1, owner="a", state="solo"))
    async with mandate.over_session(scene.session()):
        await mandate.before_first_commit()
        assert scene.replicated == [1]
        mandate.on_first_commit()
        scene.arbiter.losing = "all"
        pairing = asyncio.ensure_future(mandate.pair())
        await scene.asked_in_vain(3)
        assert not pairing.done()
        scene.arbiter.losing = ""
        await asyncio.wait_for(pairing, 10)
        assert mandate.paired_with == "b"
        assert await scene.record() == str(PAIRED)
    scene.arbiter.losing = "all"
    async with mandate.over_session(scene.session()):
        await asyncio.wait_for(mandate.pair(), 10)
    assert mandate.standing is Standing.PAIRED


async def test_a_backup_that_has_taken_over_is_not_put_on_record_again(scene: Scene) -> None:
    await scene.b_takes_over()
    mandate = scene.mandate(Standing.PAIRED)
    async with mandate.over_session(scene.session()):
        with pytest.raises(Deposed, match="generation 2, b solo"):
            await mandate.pair()


async def test_what_is_settled_during_a_copy_ends_it(scene: Scene) -> None:
    """It was of a generation that is over."""
    mandate = scene.mandate(Standing.ASKING)
    async with mandate.over_session(scene.session()):
        await asyncio.wait_for(scene.closed.wait(), 10)
        with pytest.raises(ProtectionLost, match="another copy is needed"):
            await mandate.ready_to_commit()
    assert (mandate.standing, mandate.generation) == (Standing.ALONE, 2)


async def test_what_is_not_settled_during_a_copy_lets_it_be_committed(scene: Scene) -> None:
    """And nobody asks any more from then on: a late grant would make a generation of one's own."""
    mandate = scene.mandate(Standing.ASKING)
    scene.arbiter.losing = "all"
    async with mandate.over_session(scene.session()):
        await scene.asked_in_vain(2)
        await mandate.ready_to_commit()
        scene.arbiter.losing = ""
        mandate.held = True
        mandate.on_first_commit()
        assert not mandate.held
        await asyncio.sleep(0)
        assert (mandate.standing, scene.closed.is_set()) == (Standing.PAIRED, False)
    assert await scene.record() == str(PAIRED)


async def test_nobody_asks_during_a_copy_of_a_guest_that_is_nobody_elses(scene: Scene) -> None:
    mandate = scene.mandate(Standing.ALONE)
    async with mandate.over_session(scene.session()):
        await mandate.ready_to_commit()
    assert await scene.record() == str(PAIRED)


@pytest.mark.parametrize(
    ("arbiter", "held", "flows"),
    [
        pytest.param(None, False, False, id="the-arbiter-is-asked-first"),
        pytest.param(NoArbiter(), False, True, id="nobody-to-ask"),
        pytest.param(NoArbiter(), True, False, id="held-until-a-person-says-so"),
    ],
)
async def test_output_at_the_end_of_a_protection(scene: Scene, arbiter: Any, held: bool, flows: bool) -> None:
    mandate = scene.mandate(Standing.PAIRED, arbiter=arbiter)
    mandate.held = held
    assert mandate.release_at_the_end(committed=True) is flows
    assert mandate.standing is (Standing.ALONE if flows else Standing.ASKING)
    assert mandate.may_be_forced is not flows


async def test_a_guest_that_has_ended_by_itself_is_nobody_elses_any_more(scene: Scene) -> None:
    mandate = scene.mandate(Standing.PAIRED)
    await mandate.guest_has_ended()
    assert mandate.standing is Standing.ENDED
    assert await scene.record() == "generation 1, a stopped"
    assert not mandate.release_at_the_end(committed=True)


async def test_nothing_changes_once_the_guest_is_gone(scene: Scene) -> None:
    mandate = scene.mandate(Standing.ASKING)
    mandate.over = True
    with pytest.raises(QemuDied, match="the guest has ended"):
        await mandate.ask()
    assert mandate.standing is Standing.ASKING
    with pytest.raises(QemuDied, match="the guest has ended"):
        mandate.happened(Event.COMMITTED)
