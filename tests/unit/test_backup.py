"""The backup's decisions that no real pair can be brought to at will."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from unit import sample
from unit.frame_builder import BLOCKS, GENERATION, RAM, Spec

import ftd.backup.claim
from ftd.absence import Away
from ftd.arbiter import Record
from ftd.arbiter_file import FileArbiter
from ftd.arbiters import open_arbiter
from ftd.assembly import Frame
from ftd.authority import Event, Standing
from ftd.backup import Backup
from ftd.backup.admission import may_resume
from ftd.backup.claim import take_over
from ftd.backup.disks import Disks
from ftd.backup.interim import give_up_waiting, next_session
from ftd.backup.judgement import Loss
from ftd.backup.standby import ShadowVm
from ftd.config import load
from ftd.disk import Copies
from ftd.errors import FtdError, HostError, QemuDied, QemuError, TakeoverRefused
from ftd.inquiry import Inquiry
from ftd.link import LinkOptions
from ftd.messages import HeartbeatSettings, Hello, Resume
from ftd.metrics import Metrics
from ftd.partner import Partner
from ftd.qemu import QemuProcess
from ftd.report import Report
from ftd.shadow import Shadow
from ftd.state import PairState


class NoQemu:
    """For what does not come to be asked: every use is a failure of the test."""

    monitor = None


@pytest.fixture
def shadow(tmp_path: Path) -> Shadow:
    """A shadow that holds a committed epoch."""
    file = tmp_path / "ram"
    file.touch()
    with file.open("r+b") as ram:
        ram.truncate(RAM.used_length)
    made = Shadow({RAM.name: file}, generation=GENERATION)
    part = Spec(blocks=BLOCKS).whole().received()
    part.verify()
    made.apply(Frame(GENERATION, 1, (part,)))
    return made


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Backup]]:
    """A backup that holds a committed epoch, with one arbiter or another; its record names it."""
    (tmp_path / "records").mkdir()
    reports: list[Report] = []

    def backup(arbiter: str = "file") -> Backup:
        kind = sample.FILE_ARBITER if arbiter == "file" else sample.NO_ARBITER
        config = load(sample.write(tmp_path, "b", "backup", own='state_dir = "state"', arbiter=kind))
        report = Report(config, Metrics(), "backup")
        reports.append(report)
        options = LinkOptions(identity=None, heartbeat=HeartbeatSettings(interval_ms=50, misses=6))
        inquiry = Inquiry(open_arbiter(config.arbiter), report, "b")
        made = Backup(config, report, options, inquiry, Partner(config))
        made._standby.authority.on(Event.COMMITTED)
        made._standby.claimable = True
        for state in (PairState.SYNCING, PairState.PROTECTED):
            report.machine.move(state, "for this test")
        return made

    yield backup
    for report in reports:
        report.flight.close()


async def record_names_b(folder: Path) -> FileArbiter:
    arbiter = FileArbiter(folder / "records", "web", timeout=5)
    await arbiter.compare_and_set(None, Record(generation=GENERATION, owner="a", state="paired", backup="b"))
    return arbiter


@pytest.mark.parametrize(
    "error",
    [
        TakeoverRefused("takeover refused: its memory differs"),
        QemuError("x-ft-load: no"),
        HostError("load image: memfd_create failed"),
    ],
)
async def test_a_won_guest_that_cannot_be_started_ends_the_backup(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Backup],
    shadow: Shadow,
    error: Exception,
) -> None:
    """The arbiter has given it the guest by then: the next session would meet a standing without a row."""
    arbiter = await record_names_b(tmp_path)
    backup = make()

    async def fails(*_: Any, **__: Any) -> float:
        raise error

    monkeypatch.setattr(ftd.backup.claim, "start_shadow", fails)
    now = time.monotonic()
    loss = Loss("silence", "nothing heard", now, now)
    with pytest.raises(QemuDied, match=rf"has won the guest, and could not start it from epoch 1: {error}"):
        await take_over(backup._standby, waiting_vm(shadow), loss, GENERATION)
    assert backup._standby.authority.standing is Standing.ALONE
    record = await arbiter.read()
    assert record is not None
    assert (record.owner, record.generation) == ("b", GENERATION + 1)
    shadow.close()


async def test_a_primary_that_hands_over_hears_of_it_though_this_daemon_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Backup], shadow: Shadow
) -> None:
    """Without an arbiter it would let its guest run again."""
    await record_names_b(tmp_path)
    backup = make()
    loading = asyncio.Event()

    async def start(*_: Any, **__: Any) -> float:
        loading.set()
        await asyncio.sleep(0.01)
        return time.monotonic()

    class Qemu:
        monitor = SimpleNamespace(execute=lambda _: asyncio.sleep(0, {"running": True}))

    monkeypatch.setattr(ftd.backup.claim, "start_shadow", start)
    vm = replace(waiting_vm(shadow), qemu=cast(QemuProcess, Qemu()))
    now = time.monotonic()
    told: list[int] = []
    loss = Loss("switchover", "asked for", now, now, resume=True)
    work = asyncio.ensure_future(take_over(backup._standby, vm, loss, GENERATION, told.append))
    await loading.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert told == [GENERATION + 1]
    assert backup._standby.runs_here
    shadow.close()


# ---- a daemon of the pair is replaced ---------------------------------------------------------------------


def pending() -> asyncio.Future[int | None]:
    return asyncio.get_running_loop().create_future()


def waiting_vm(shadow: Shadow) -> ShadowVm:
    nothing: Any = NoQemu()
    return ShadowVm(nothing, shadow, Disks(Copies([]), [], "b"), memory_limit=0, gone=pending())


def nobody() -> bool:
    return False


class Door:
    """Stands for the listener: whether somebody is on the threshold."""

    def __init__(self) -> None:
        self.looks = 0
        self.last = 0
        self.arrives: Callable[[], None] = lambda: None

    def forming(self) -> bool:
        self.looks += 1
        if self.looks == self.last:
            self.arrives()
        return self.looks < self.last


def waits(backup: Backup, seconds: float, *, own: bool = False) -> None:
    now = time.monotonic()
    backup._standby.away = Away("a", GENERATION, 41, own, now, now + seconds)


def hello(**changes: Any) -> Hello:
    values: dict[str, Any] = {
        "software_version": "1",
        "node": "a",
        "session": uuid4(),
        "generation": GENERATION,
        "epoch_ms": 20,
        "heartbeat": HeartbeatSettings(interval_ms=50, misses=6),
        "resume": Resume(epoch=41),
    }
    return Hello(**values | changes)


async def test_only_the_primary_that_left_and_only_from_its_last_epoch_may_go_on(
    make: Callable[[], Backup],
) -> None:
    backup = make()
    assert not may_resume(backup._standby, hello())  # nobody is away
    waits(backup, 60)
    assert may_resume(backup._standby, hello())
    for wrong in (
        {"node": "c"},
        {"generation": GENERATION + 1},
        {"resume": Resume(epoch=40)},
        {"resume": Resume(epoch=42)},
    ):
        assert not may_resume(backup._standby, hello(**wrong)), wrong
    backup._standby.authority.on(Event.LOST)  # it has begun to claim
    assert not may_resume(backup._standby, hello())


async def test_a_session_that_was_admitted_in_time_is_waited_for(make: Callable[[], Backup]) -> None:
    """The primary may take it for one already: the backup must not claim at the same time."""
    backup = make()
    waits(backup, 0)
    door = Door()
    session: Any = object()
    door.last, door.arrives = 4, lambda: backup._standby.arrived.put_nowait(session)
    assert await next_session(backup._standby, pending(), door.forming) is session


async def test_the_wait_ends_with_its_time_an_operator_or_qemu(make: Callable[[], Backup]) -> None:
    backup = make()
    waits(backup, 0.01)
    assert await next_session(backup._standby, pending(), nobody) is None
    waits(backup, 60)
    backup.force()
    assert await next_session(backup._standby, pending(), nobody) is None
    backup._standby.forced = asyncio.get_running_loop().create_future()
    gone = pending()
    gone.set_result(1)
    assert await next_session(backup._standby, gone, nobody) is None


@pytest.mark.parametrize(
    ("arbiter", "own", "starts"),
    [("file", False, True), ("file", True, True), ("none", False, True), ("none", True, False)],
)
async def test_when_the_time_is_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[str], Backup],
    shadow: Shadow,
    arbiter: str,
    own: bool,
    starts: bool,
) -> None:
    """The shadow is started if the arbiter allows it; without one, only by the side that never was away."""
    await record_names_b(tmp_path)
    backup = make(arbiter)
    waits(backup, 0, own=own)
    started: list[str] = []

    async def start(*_: Any, **__: Any) -> float:
        started.append("it")
        raise QemuError("for this test, that is enough")

    monkeypatch.setattr(ftd.backup.claim, "start_shadow", start)
    away = backup._standby.away
    assert away is not None
    work = asyncio.ensure_future(give_up_waiting(backup._standby, waiting_vm(shadow), away))
    if starts:
        with pytest.raises(QemuDied, match="could not start it from epoch 1"):
            await work
        assert started == ["it"]
    else:
        while backup._report.machine.state is not PairState.HELD:  # noqa: ASYNC110 - in the same loop
            await asyncio.sleep(0)
        assert "it may run the guest alone" in backup._report.machine.reason
        backup._standby.arrived.put_nowait(object())  # type: ignore[arg-type]
        assert await work is None
        assert started == []
    shadow.close()


# ---- this daemon is to be replaced ------------------------------------------------------------------------


async def test_a_daemon_is_replaced_over_a_session_or_when_there_is_nothing_to_lose(
    make: Callable[[], Backup],
) -> None:
    backup = make()
    standby = backup._standby
    waits(backup, 60)  # for the primary's next daemon
    with pytest.raises(FtdError, match=r"now: .*; this node is protected \(for this test\), try"):
        backup.restart()
    standby.away = None
    backup._report.machine.move(PairState.HELD, "the primary is lost (nothing heard): no answer")
    with pytest.raises(FtdError, match=r"this node is held \(the primary is lost \(nothing heard\)"):
        backup.restart()
    assert not standby.leaving.done()
    standby.guarding = True
    backup._report.peer_name = "the primary"
    assert backup.restart() == "the primary is asked to wait up to 5 s for it"
    assert standby.leaving.done()
    standby.claimable = False  # it copies, or nobody has come
    assert backup.restart() is None


async def test_one_that_came_too_late_keeps_no_primary_away(
    tmp_path: Path, make: Callable[[], Backup], shadow: Shadow
) -> None:
    arbiter = FileArbiter(tmp_path / "records", "web", timeout=5)
    await arbiter.compare_and_set(None, Record(generation=GENERATION + 1, owner="a", state="solo"))
    backup = make()
    backup._listener = SimpleNamespace(forming=False)  # type: ignore[assignment]
    backup._standby.leaving.set_result(None)
    waits(backup, 0)
    assert await backup._with_session(waiting_vm(shadow)) is None  # the claim is denied
    assert backup._report.machine.state is PairState.WAITING
    assert not backup._standby.leaving.done()
    shadow.close()
