"""What an acknowledgement does, over a real link: it releases output, unless it waited for too long here."""

import asyncio
import math
import os
import threading
import time
import tomllib
from collections.abc import AsyncIterator
from typing import cast
from uuid import uuid4

import pytest
from unit import sample

from ftd import link
from ftd.config import Config
from ftd.disksync import Questions
from ftd.link import LinkLost, LinkOptions, Listener, LostKind, Session
from ftd.messages import Ack, HeartbeatSettings, Hello, Welcome
from ftd.metrics import PAUSE_PARTS, Metrics
from ftd.monitor import Monitor
from ftd.pacing import Account
from ftd.protection.comparison import Comparison
from ftd.protection.epochs import Epochs, _InFlight
from ftd.protection.gathering import Gathering
from ftd.report import Report

LIMIT = 0.5
HEARTBEAT = HeartbeatSettings(interval_ms=50, misses=10)
GENERATION = 3


class Fence:
    """What the primary says about authority."""

    def __init__(self) -> None:
        self.committed = False

    async def before_first_commit(self) -> None:
        raise AssertionError("there is no copy here")

    def on_first_commit(self) -> None:
        self.committed = True

    async def pair(self) -> None:
        raise AssertionError("there is no copy here")

    def release_at_the_end(self, committed: bool) -> bool:
        return not committed


class Pair:
    """The epochs of a primary without a QEMU, and the backup's end of its session."""

    def __init__(self, config: Config, primary: Session, backup: Session) -> None:
        self.primary, self.backup = primary, backup
        self.report = Report(config, Metrics(), "primary")
        # Nothing is asked of QEMU.
        self.gathering = Gathering(cast(Monitor, None), self.report.metrics, 1, None)
        self.gathering._release = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        comparison = Comparison(
            self.report, primary, [], Questions(primary.send), every=0, epoch=lambda: self.gathering.epoch
        )
        self.fence = Fence()
        self.epochs = Epochs(
            config,
            self.report,
            primary,
            self.gathering,
            comparison,
            self.fence,
            GENERATION,
            images=[],
            committed=False,
        )

    def close_epoch(self, epoch: int) -> None:
        self.epochs.in_flight[epoch] = _InFlight(4096, 0.0)

    def acknowledge(self, epoch: int) -> None:
        self.backup.send_nowait(Ack(generation=GENERATION, epoch=epoch, part_count=1, bytes=4096))

    async def listen(self) -> None:
        """As Protection does it, for one message."""
        message = await asyncio.wait_for(self.primary.receive(), 10)
        assert isinstance(message, Ack)
        await self.epochs.on_ack(message)

    def released(self) -> int:
        """How many epochs QEMU was told to let go of."""
        try:
            return os.eventfd_read(self.gathering.release)
        except BlockingIOError:
            return 0


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    options = LinkOptions(identity=None, heartbeat=HEARTBEAT)
    config = Config.model_validate(tomllib.loads(sample.text()))
    sessions: asyncio.Queue[Session] = asyncio.Queue()
    listener = Listener(
        options,
        host="127.0.0.1",
        port=0,
        heartbeat_port=0,
        peer_name=None,
        admit=lambda _: Welcome(software_version="0", node="b", generation=GENERATION, heartbeat=HEARTBEAT),
        on_session=sessions.put_nowait,
    )
    await listener.start()
    port, heartbeat_port = listener.ports
    hello = Hello(
        software_version="0",
        node="a",
        session=uuid4(),
        generation=GENERATION,
        epoch_ms=20,
        heartbeat=HEARTBEAT,
    )
    primary = await link.connect(options, hello, host="127.0.0.1", port=port, heartbeat_port=heartbeat_port)
    backup = await asyncio.wait_for(sessions.get(), 10)
    made = Pair(config, primary, backup)
    yield made
    os.close(made.gathering.release)
    for session in (primary, backup):
        session.abort("test is over")
    await listener.close()


def stand_still(seconds: float) -> None:
    """Let nothing of this process's loop run."""
    threading.Event().wait(seconds)


async def ticked(session: Session) -> None:
    """Return when the session has looked at the clock again."""
    before = session._pulse.detector._last_tick_ns
    async with asyncio.timeout(10):
        while session._pulse.detector._last_tick_ns == before:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_an_acknowledgement_releases_its_epoch(pair: Pair) -> None:
    pair.close_epoch(1)
    pair.acknowledge(1)
    await pair.listen()
    assert pair.released() == 1
    assert pair.fence.committed
    assert pair.report.committed == 1


@pytest.mark.parametrize("woken_by", ["ack", "timer"])
@pytest.mark.parametrize("backup", ["gone", "silent"])
async def test_what_waited_for_a_side_that_stood_still_releases_nothing(
    pair: Pair, backup: str, woken_by: str
) -> None:
    """The backup has acknowledged, and given the session up since; its end may be heard, or lost."""
    pair.close_epoch(1)
    await ticked(pair.primary)
    if woken_by == "timer":
        # The first thing that is done is to look at the clock, and the acknowledgement is read after that.
        pair.primary._control.pause()
    pair.acknowledge(1)
    if backup == "gone":
        pair.backup.abort("the primary is lost")
    else:
        pair.backup._pulse.stop()
    stand_still(LIMIT + 0.05)
    if woken_by == "timer":
        await ticked(pair.primary)
        pair.primary._control.resume()
    with pytest.raises(LinkLost) as lost:
        await pair.listen()
    assert lost.value.kind is (LostKind.RESET if backup == "gone" else LostKind.SILENCE)
    assert pair.released() == 0
    assert not pair.fence.committed


@pytest.mark.parametrize("woken_by", ["ack", "timer"])
async def test_a_backup_that_is_heard_again_has_waited(pair: Pair, woken_by: str) -> None:
    """As when both stood still: what it acknowledged before is released as soon as that is known."""
    pair.close_epoch(1)
    pair.close_epoch(2)
    await ticked(pair.primary)
    if woken_by == "timer":
        pair.primary._control.pause()
    pair.acknowledge(1)
    pair.acknowledge(2)
    stand_still(LIMIT + 0.05)
    listening = asyncio.create_task(pair.listen())
    await ticked(pair.primary)
    assert pair.primary._pulse.doubts_itself(time.monotonic_ns())
    assert pair.released() == 0
    pair.primary._control.resume()
    await listening
    await pair.listen()
    assert pair.released() == 2
    assert pair.primary.lost is None
    assert not pair.primary._pulse.doubts_itself(time.monotonic_ns())


async def test_what_is_counted_after_the_end_changes_nothing_of_now(pair: Pair) -> None:
    """The account of a checkpoint is kept a moment after it, and protection may end within that."""
    pause = dict.fromkeys([f"{part}-ns" for part in PAUSE_PARTS], 10**6) | {"total-ns": 10**6}
    pair.report.epoch_length(0.2)
    pair.epochs.end()
    pair.epochs._pace._account = Account(slowdown=0.5, added_latency=0.5)
    pair.epochs._keep_account(pause, {}, 10, 7, 4096)
    registry = pair.report.metrics.registry
    assert registry.get_sample_value("ftd_epoch_stretch_ratio") == 1
    assert registry.get_sample_value("ftd_hot_pages") == 0
    assert math.isnan(registry.get_sample_value("ftd_epoch_slowdown_ratio") or 0)
    assert registry.get_sample_value("ftd_pause_seconds_count") == 1


async def test_a_side_that_is_late_by_less_than_the_limit_stays_protected(pair: Pair) -> None:
    pair.close_epoch(1)
    pair.acknowledge(1)
    await ticked(pair.primary)
    stand_still(LIMIT / 3)
    await pair.listen()
    assert pair.released() == 1
