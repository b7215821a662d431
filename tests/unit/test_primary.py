"""When the primary looks for a backup again. All else of it is in tests/hosts, with real QEMUs and hosts."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ftd import primary as module
from ftd.arbiter import NoArbiter
from ftd.authority import Standing
from ftd.config import load
from ftd.errors import FtdError, LinkError, PeerError
from ftd.inquiry import Inquiry
from ftd.link import LinkOptions, Session
from ftd.messages import HeartbeatSettings, Resume
from ftd.metrics import Metrics
from ftd.partner import Partner
from ftd.primary import Primary
from ftd.qemu import QemuProcess
from ftd.report import Report

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
        return {"output": {"holding": False}, "running": True}


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
