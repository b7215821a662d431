"""The backup's decisions that no real pair can be brought to at will."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from unit.frame_builder import BLOCKS, GENERATION, RAM, Spec

import ftd.backup
from ftd.arbiter import Record
from ftd.arbiter_file import FileArbiter
from ftd.assembly import Frame
from ftd.authority import Event, Standing
from ftd.backup import Backup, _Loss
from ftd.config import load
from ftd.disk import Copies
from ftd.errors import HostError, QemuDied, QemuError, TakeoverRefused
from ftd.inquiry import Inquiry
from ftd.link import LinkOptions
from ftd.messages import HeartbeatSettings
from ftd.metrics import Metrics
from ftd.partner import Partner
from ftd.report import Report
from ftd.shadow import Shadow
from ftd.state import PairState

CONFIG = """
[node]
name = "b"
role = "backup"
state_dir = "state"
[link]
listen = "10.0.0.2"
peer = "10.0.0.1"
insecure = true
[arbiter]
kind = "file"
pair = "web"
folder = "records"
"""


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


@pytest.mark.parametrize(
    "error",
    [
        TakeoverRefused("takeover refused: its memory differs"),
        QemuError("x-ft-load: no"),
        HostError("load image: memfd_create failed"),
    ],
)
async def test_a_won_guest_that_cannot_be_started_ends_the_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shadow: Shadow, error: Exception
) -> None:
    """The arbiter has given it the guest by then: the next session would meet a standing without a row."""
    (tmp_path / "b.toml").write_text(CONFIG)
    (tmp_path / "records").mkdir()
    arbiter = FileArbiter(tmp_path / "records", "web", timeout=5)
    await arbiter.compare_and_set(None, Record(generation=GENERATION, owner="a", state="paired", backup="b"))
    config = load(tmp_path / "b.toml")
    report = Report(config, Metrics(), "backup")
    options = LinkOptions(identity=None, heartbeat=HeartbeatSettings(interval_ms=50, misses=6))
    backup = Backup(config, report, options, Inquiry(arbiter, report, "b"), Partner(config))
    backup._authority.on(Event.COMMITTED)
    for state in (PairState.SYNCING, PairState.PROTECTED):
        report.machine.move(state, "for this test")

    async def fails(*_: Any, **__: Any) -> float:
        raise error

    monkeypatch.setattr(ftd.backup, "start_shadow", fails)
    take_over: Callable[..., Awaitable[Any]] = backup._take_over
    now = time.monotonic()
    loss = _Loss("silence", "nothing heard", now, now)
    gone: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
    with pytest.raises(QemuDied, match=rf"has won the guest, and could not start it from epoch 1: {error}"):
        await take_over(loss, NoQemu(), shadow, Copies([]), GENERATION, gone)
    assert backup._authority.standing is Standing.ALONE
    record = await arbiter.read()
    assert record is not None
    assert (record.owner, record.generation) == ("b", GENERATION + 1)
    shadow.close()
    report.flight.close()
