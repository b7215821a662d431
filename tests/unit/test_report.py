"""What a node tells of itself is true now, also when what it was about has ended."""

import math
import tomllib
from typing import cast

import pytest
from unit import sample

from ftd.config import Config
from ftd.metrics import Metrics
from ftd.pacing import Account, AutoPace, Limits
from ftd.report import PeerView, Report
from ftd.speculation import Speculation


class Clock:
    """The time, as the test has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("ftd.report.time.monotonic", lambda: self.now)


class Peer:
    """What is told of a session."""

    peer_node = "b"
    heartbeat_age = 0.01

    def paths(self) -> list[object]:
        return []


def report(role: str) -> Report:
    node = "a" if role == "primary" else "b"
    config = Config.model_validate(tomllib.loads(sample.text(node, role)))
    made = Report(config, Metrics(), "primary" if role == "primary" else "backup")
    made.session_began(cast(PeerView, Peer()))
    return made


def value(made: Report, name: str) -> float:
    found = made.metrics.registry.get_sample_value(name)
    assert found is not None
    return found


def test_nothing_is_told_of_epochs_that_have_ended() -> None:
    told = report("primary")
    pace = AutoPace(0.05, Limits(shortest=0.01, longest=0.5, slowdown=0.1, latency=0.1))
    pace._account = Account(slowdown=0.2, added_latency=0.07)
    told.pace(pace)
    told.epoch_length(0.4)
    told.metrics.hot_pages.set(7)
    speculation = Speculation("always")
    told.speculation(speculation)
    assert value(told, "ftd_epoch_stretch_ratio") == pytest.approx(8)
    assert value(told, "ftd_speculative_active") == 1

    told.no_epochs()
    assert value(told, "ftd_epoch_stretch_ratio") == 1
    assert value(told, "ftd_epoch_length_seconds") == told.configured_epoch
    assert value(told, "ftd_epoch_length_target_seconds") == told.configured_epoch
    assert math.isnan(value(told, "ftd_epoch_slowdown_ratio"))
    assert math.isnan(value(told, "ftd_epoch_added_latency_seconds"))
    assert value(told, "ftd_hot_pages") == 0
    assert value(told, "ftd_speculative_active") == 0
    epoch = told.status().epoch
    assert (epoch.stretch, epoch.slowdown, epoch.added_latency) == (1, None, None)
    assert not told.status().speculation.active


LAG = "ftd_disk_apply_lag_seconds"


def test_a_frame_that_waits_for_the_disks_is_told_of_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch), report("backup")
    assert math.isnan(value(told, LAG))
    told.journal(3, 4096)
    clock.now += 0.25
    assert value(told, LAG) == 0.25
    told.journal(1, 512)
    told.disks_applied(0.25)
    assert value(told, LAG) == 0.25
    clock.now += 30  # the second one hangs
    assert value(told, LAG) == 30
    told.disks_applied(30)
    told.journal(1, 512)
    told.disks_applied(0.01)
    clock.now += 5
    assert value(told, LAG) == 0.01


def test_the_applier_may_be_quicker_than_the_news_of_the_acknowledgement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, told = Clock(monkeypatch), report("backup")
    told.disks_applied(0.001)
    told.journal(1, 512)
    clock.now += 30
    assert value(told, LAG) == 0.001
    told.journal(1, 512)
    clock.now += 2
    assert value(told, LAG) == 2


def test_nobody_waits_for_the_disks_after_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch), report("backup")
    told.journal(1, 512)
    told.session_ended()
    clock.now += 30
    assert math.isnan(value(told, LAG))
    told.disks_applied(30)  # the rest is drained
    told.session_began(cast(PeerView, Peer()))
    assert math.isnan(value(told, LAG))
    told.journal(1, 512)
    clock.now += 1
    assert value(told, LAG) == 1


def test_a_primary_has_no_frames_to_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch), report("primary")
    told.journal(1, 512)
    clock.now += 1
    assert math.isnan(value(told, LAG))
