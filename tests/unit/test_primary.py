"""When the primary looks for a backup again, and what it asks the arbiter meanwhile.

All else of it is in tests/hosts, with real QEMUs and hosts.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from unit import sample

from ftd import mandate
from ftd import primary as module
from ftd.arbiter import NoArbiter, Record
from ftd.arbiter_file import FileArbiter
from ftd.authority import Standing
from ftd.config import load
from ftd.errors import ArbiterUnreachable, FtdError, LinkError, PeerError
from ftd.inquiry import Inquiry
from ftd.link import LinkOptions, Session
from ftd.messages import HeartbeatSettings, Resume
from ftd.metrics import Metrics
from ftd.partner import Partner
from ftd.primary import Primary
from ftd.qemu import QemuProcess
from ftd.report import Report
from ftd.state import PairState
from ftd.wire import LinkLost

CONFIG = """
[node]
name = "a"
role = "primary"
run_dir = "run"
state_dir = "state"
[link]
listen = "10.0.0.1"
peer = "10.0.0.2"
insecure = true
[arbiter]
accept_split_brain = true
"""

REFUSED = PeerError("the shadow is not ready; try again")
GONE = LinkError("no answer")


class Over(Exception):  # noqa: N818 - no error
    """Nothing more is tried."""


class Impatient(Primary):
    """Does not wait, and notes for how long it would have; finds one thing after the other at its peer's."""

    def __init__(self, *arguments: Any, found: Iterator[FtdError], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.found = found
        self.waited: list[float] = []

    async def _connect(self, resume: Resume | None = None) -> Session:
        for error in self.found:
            raise error
        raise Over

    async def _sleep(self, seconds: float) -> None:
        self.waited.append(seconds)


class Monitor:
    """Of a QEMU that does nothing."""

    async def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        names = ("packets", "bytes", "oldest-ns", "longest-ns", "pushed-back", "dropped")
        return {"output": {"holding": False, **dict.fromkeys(names, 0)}, "running": True}


@pytest.fixture
def no_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(monitor: object) -> Any:
        return []

    async def description(monitor: object) -> Any:
        return SimpleNamespace(qemu_version="10.0.0", accelerator="tcg")

    monkeypatch.setattr(module, "require_patched", nothing)
    monkeypatch.setattr(module, "guest_disks", nothing)
    monkeypatch.setattr(module, "refuse_devices", lambda machine: None)
    monkeypatch.setattr(module, "MachineDescription", SimpleNamespace(of=description))


async def waits(folder: Path, *found: FtdError) -> list[float]:
    """Return for how long a primary waits after each of these answers."""
    (folder / "a.toml").write_text(CONFIG)
    config = load(folder / "a.toml")
    report = Report(config, Metrics(), "primary")
    primary = Impatient(
        config,
        report,
        LinkOptions(identity=None, heartbeat=HeartbeatSettings(interval_ms=50, misses=6)),
        cast(QemuProcess, SimpleNamespace(monitor=Monitor(), pid=1)),
        1,
        standing=Standing.ALONE,
        inquiry=Inquiry(NoArbiter(), report, "a"),
        partner=Partner(config),
        remember=lambda generation: None,
        found=iter(found),
    )
    with pytest.raises(Over):
        await primary._prepare_and_protect()
    report.flight.close()
    return primary.waited


@pytest.mark.usefixtures("no_qemu")
async def test_a_backup_that_refuses_is_asked_again_soon_and_then_half_as_often(tmp_path: Path) -> None:
    """It may only have to end what it is at. If it goes on, a person is needed."""
    waited = await waits(tmp_path, *[REFUSED] * 9)
    assert waited[0] == min(waited) <= await first_wait_after_a_loss(tmp_path)
    assert all(0 < wait <= 5 for wait in waited)
    doubled = [later / earlier for earlier, later in pairwise(waited)]
    assert doubled[:3] == [2, 2, 2]
    assert waited[-1] == waited[-2] == max(waited)  # there is an end to it


async def first_wait_after_a_loss(folder: Path) -> float:
    return (await waits(folder, GONE))[0]


@pytest.mark.usefixtures("no_qemu")
async def test_one_that_is_not_there_is_looked_for_steadily_and_ends_the_patience(tmp_path: Path) -> None:
    waited = await waits(tmp_path, GONE, GONE, GONE, REFUSED, REFUSED, REFUSED, GONE, REFUSED, REFUSED)
    steady = waited[0]
    assert waited == [steady, steady, steady, steady, 2 * steady, 4 * steady, steady, steady, 2 * steady]


# ---- what it asks the arbiter -----------------------------------------------------------------------------

PAIRED = Record(generation=1, owner="a", state="paired", backup="b")


def in_words(record: Record | None) -> str:
    assert record is not None
    return f"{record.generation} {record.owner} {record.state}"


class Moody(FileArbiter):
    """A real one that does not answer while it is `gone`, and not before `slow` is set."""

    gone = False
    slow: asyncio.Event | None = None
    asked = 0

    async def read(self) -> Record | None:
        self.asked += 1
        if self.slow is not None:
            await self.slow.wait()
        if self.gone:
            raise ArbiterUnreachable("gone")
        return await super().read()


class Copying:
    """The part of protection that copies the guest: it ends with its session, and when told to commits."""

    commits: asyncio.Event
    epoch = 5
    uncommitted = 0
    stopped_guest = False

    def __init__(self, *arguments: Any, fence: Primary, **named: Any) -> None:
        self._fence = fence
        self._session = arguments[3]

    async def run(self) -> None:
        lost = asyncio.ensure_future(self._session.wait_lost())
        commits = asyncio.ensure_future(self.commits.wait())
        try:
            await asyncio.wait({lost, commits}, return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                await self._fence.ready_to_commit()
                self._fence.on_first_commit()
            raise await lost
        finally:
            commits.cancel()
            lost.cancel()
            self._fence.release_at_the_end(committed=False)


class FakeSession:
    """Of a backup that says nothing."""

    peer_node, peer, id = "b", "10.0.0.2:7788", "1"
    heartbeats_missed = 0
    heartbeat_age = None
    lost: LinkLost | None = None

    def __init__(self) -> None:
        self._lost: asyncio.Future[LinkLost] = asyncio.get_running_loop().create_future()

    async def close(self, reason: str) -> None:
        self.lost = LinkLost("local", reason)
        if not self._lost.done():
            self._lost.set_result(self.lost)

    async def wait_lost(self) -> LinkLost:
        return await asyncio.shield(self._lost)

    def paths(self) -> list[Any]:
        return []


class Asking(Primary):
    """Found a guest whose backup may have taken over; its backup is there when `reachable`."""

    sessions: list[FakeSession]
    reachable = True

    async def _connect(self, resume: Resume | None = None) -> Session:
        if not self.reachable:
            raise GONE
        self.sessions.append(FakeSession())
        return cast(Session, self.sessions[-1])


class Guest(SimpleNamespace):
    """A QEMU that goes when it is told to."""

    def __init__(self) -> None:
        super().__init__(monitor=Subscribed(), pid=1, gone=asyncio.Event(), shutdown=None)

    async def wait(self) -> None:
        await self.gone.wait()

    async def kill(self) -> None:
        self.gone.set()


class Subscribed(Monitor):
    """Its monitor, to which one may listen."""

    lost_reason = "gone"

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.told: list[tuple[str, dict[str, Any]]] = []

    def on(self, event: str, listener: Any) -> Any:
        return lambda: None

    async def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.told.append((command, arguments))
        return await super().execute(command, **arguments)

    @property
    def released(self) -> bool:
        return ("x-ft-end", {"output": "release"}) in self.told


class Scene:
    """A primary that is `asking`, its arbiter and its guest."""

    def __init__(self, folder: Path, record: Record = PAIRED, **named: Any) -> None:
        (folder / "records").mkdir()
        self.config = load(
            sample.write(folder, own='state_dir = "state"\nrun_dir = "run"', arbiter=sample.FILE_ARBITER)
        )
        self.arbiter = Moody(folder / "records", "web", timeout=5)
        self.record = record
        self.report = Report(self.config, Metrics(), "primary")
        self.remembered: list[int] = []
        self.guest = Guest()
        self.primary = Asking(
            self.config,
            self.report,
            LinkOptions(identity=None, heartbeat=HeartbeatSettings(interval_ms=50, misses=6)),
            cast(QemuProcess, self.guest),
            1,
            **{"standing": Standing.ASKING, **named},
            inquiry=Inquiry(self.arbiter, self.report, "a"),
            partner=Partner(self.config),
            remember=self.remembered.append,
        )
        self.primary.sessions = []
        self._run: asyncio.Task[str] | None = None

    async def __aenter__(self) -> "Scene":
        await FileArbiter.compare_and_set(self.arbiter, None, self.record)
        self._run = asyncio.ensure_future(self.primary.run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._run is not None
        self._run.cancel()
        await asyncio.wait({self._run})
        self.report.flight.close()

    async def end(self) -> str:
        """Returns why the guest ended, by the primary."""
        assert self._run is not None
        return await self._run

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():
                assert self._run is not None
                if self._run.done():
                    self._run.result()
                await asyncio.sleep(0.001)

    async def until_state(self, state: PairState) -> None:
        await self.until(lambda: self.report.machine.state is state)

    async def until_asked(self, more: int = 1) -> None:
        """The arbiter is asked so many more times."""
        asked = self.arbiter.asked
        await self.until(lambda: self.arbiter.asked >= asked + more)

    async def put_a_question(self) -> asyncio.Event:
        """One is under way, and not answered before the event is set."""
        answer = self.arbiter.slow = asyncio.Event()
        await self.until_asked()
        return answer


@contextlib.asynccontextmanager
async def copying_without_arbiter(folder: Path) -> AsyncIterator[Scene]:
    """A copy to the backup has begun while the arbiter was gone, as it still is."""
    scene = Scene(folder)
    scene.arbiter.gone = True
    async with scene:
        await scene.until_state(PairState.SYNCING)
        yield scene


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch, no_qemu: None) -> type[Copying]:
    Copying.commits = asyncio.Event()
    monkeypatch.setattr(module, "Protection", Copying)
    monkeypatch.setattr(mandate, "ASK_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    return Copying


async def test_a_guest_that_is_held_is_let_go_as_soon_as_the_arbiter_answers_in_a_copy(
    tmp_path: Path, copying: type[Copying]
) -> None:
    """A copy may take hours."""
    async with copying_without_arbiter(tmp_path) as scene:
        await scene.until_asked(3)
        assert len(scene.primary.sessions) == 1  # no answer, no harm
        assert not scene.guest.monitor.released
        scene.arbiter.gone = False
        await scene.until(lambda: len(scene.primary.sessions) == 2)
        assert in_words(await scene.arbiter.read()) == "2 a solo"
        assert scene.remembered == [2]
        await scene.until_state(PairState.SYNCING)  # another copy, in the new generation


async def test_nothing_is_committed_while_a_question_is_under_way(
    tmp_path: Path, copying: type[Copying]
) -> None:
    """It could be granted afterwards: in another generation than the one that the backup has."""
    async with copying_without_arbiter(tmp_path) as scene:
        answer = await scene.put_a_question()
        copying.commits.set()
        await scene.until(lambda: scene.primary._mandate._asking is None)  # the last answer is waited for
        assert scene.report.status().authority.standing == Standing.ASKING
        scene.arbiter.gone = False
        copying.commits = asyncio.Event()
        answer.set()
        await scene.until(lambda: len(scene.primary.sessions) == 2)
    assert scene.remembered == [2]


async def test_a_copy_is_committed_without_an_arbiter_that_answers(
    tmp_path: Path, copying: type[Copying]
) -> None:
    async with copying_without_arbiter(tmp_path) as scene:
        copying.commits.set()
        await scene.until(lambda: scene.report.status().authority.standing == Standing.PAIRED)
        assert scene.primary._mandate._asking is None  # nothing is asked any more


async def test_an_operators_word_counts_during_a_copy_too(tmp_path: Path, copying: type[Copying]) -> None:
    async with copying_without_arbiter(tmp_path) as scene:
        scene.primary.force()
        await scene.until_state(PairState.SOLO)
        assert len(scene.primary.sessions) == 1


async def test_an_operators_word_is_for_one_time(tmp_path: Path, copying: type[Copying]) -> None:
    """One that comes too late must not be remembered, and later go past an arbiter that says no."""
    async with copying_without_arbiter(tmp_path) as scene:
        answer = await scene.put_a_question()
        scene.primary.force()
        copying.commits.set()
        answer.set()
        await scene.until(lambda: scene.report.status().authority.standing == Standing.PAIRED)
        # The backup takes over.
        scene.arbiter.gone = False
        scene.primary.reachable = False
        taken = Record(generation=2, owner="b", state="solo")
        await scene.arbiter.compare_and_set(await scene.arbiter.read(), taken)
        await scene.primary.sessions[0].close("the link is cut")
        with pytest.raises(module.Deposed):
            await scene.end()
        assert in_words(await scene.arbiter.read()) == "2 b solo"


@pytest.mark.parametrize("was", ["primary", "backup"])
async def test_an_arbiter_that_was_gone_is_told_who_has_the_guest_by_force(
    tmp_path: Path, copying: type[Copying], was: str
) -> None:
    """Before that there is no protection: another side could be right to start the guest."""
    if was == "primary":
        scene = Scene(tmp_path)
    else:
        record = Record(generation=1, owner="b", state="paired", backup="a")
        scene = Scene(tmp_path, record, standing=Standing.ALONE, told=False)
    scene.arbiter.gone = True
    scene.primary.reachable = False
    async with scene:
        if was == "primary":
            await scene.until_state(PairState.HELD)
            scene.primary.force()
        await scene.until(lambda: "arbiter_not_told" in scene.report.warning_names)
        await scene.until_state(PairState.SOLO)
        scene.primary.reachable = True
        await scene.until_asked(3)
        assert not scene.primary.sessions
        scene.arbiter.gone = False
        await scene.until_state(PairState.SYNCING)
        assert in_words(await scene.arbiter.read()) == "2 a solo"
        assert "arbiter_not_told" not in scene.report.warning_names
        assert len(scene.primary.sessions) == 1


async def test_a_no_during_a_copy_ends_the_guest(tmp_path: Path, copying: type[Copying]) -> None:
    async with copying_without_arbiter(tmp_path) as scene:
        answer = scene.arbiter.slow = asyncio.Event()
        taken = Record(generation=2, owner="b", state="solo")
        await FileArbiter.compare_and_set(scene.arbiter, await FileArbiter.read(scene.arbiter), taken)
        scene.arbiter.gone = False
        answer.set()
        with pytest.raises(module.Deposed):
            await scene.end()
        assert scene.guest.gone.is_set()
        assert not scene.guest.monitor.released


async def test_a_guest_that_ends_during_a_question_has_ended(tmp_path: Path, copying: type[Copying]) -> None:
    """Rule S7: and nobody boots it again."""
    scene = Scene(tmp_path)
    async with scene:
        answer = await scene.put_a_question()
        scene.guest.shutdown = "guest-shutdown"
        scene.guest.gone.set()
        await scene.until(lambda: scene.report.status().authority.standing == Standing.ENDED)
        answer.set()
        assert await scene.end() == "the guest has ended: guest-shutdown"
        assert in_words(await scene.arbiter.read()) == "2 a stopped"


async def test_a_primary_that_is_over_does_not_write_to_disks_any_more(
    tmp_path: Path, copying: type[Copying]
) -> None:
    scene = Scene(tmp_path)
    written: list[int] = []
    scene.primary._mark_alone = lambda: written.append(1)  # type: ignore[method-assign]
    scene.primary.reachable = False
    async with scene:
        await scene.until_state(PairState.SOLO)
    assert written == [1]
    scene.report.machine.move(PairState.SYNCING, "the next primary, with a backup")
    scene.report.machine.move(PairState.SOLO, "and without")
    assert written == [1]
