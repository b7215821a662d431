"""The guest's clocks: pauses take nothing from them, and no takeover sets them back.

Drift is the rate of a clock of the guest against the host's, with protection, compared with the rate of the
same clock without it in the same run: what an emulated timer loses or gains by itself is not protection's
doing. The guests leave in their memory what their clocks say, and the tests read it there. A rate is seen
between two windows of time. In each the clock is looked at many times, and the look that was delayed least
counts, since delays have one sign only.
"""

import asyncio
import json
import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from testbed.guarded import (
    ask,
    assert_bare_guest_goes_on,
    assert_linux_guest_is_sound,
    assert_takeover,
    bare_guest,
    linux_guest,
    wait_committed,
    wait_ready,
)
from testbed.hosts import Host
from testbed.pair import Pair

pytestmark = [pytest.mark.root, pytest.mark.alone]
StartPair = Callable[..., Any]

# The issue's own claim, for epochs of 20 ms.
MOST_DRIFT_MS_PER_MINUTE = 1.0
SETTINGS = {"epoch": {"length_ms": 20}}
WINDOW_S = 2.0


@dataclass(frozen=True)
class Look:
    """A clock of the guest, looked at: both clocks in ns, or in ticks of the guest's."""

    host: int
    guest: int


def rate(first: Look, last: Look) -> float:
    """How much the guest's clock advances per nanosecond of the host."""
    return (last.guest - first.guest) / (last.host - first.host)


def drift_ms_per_minute(protected: float, unprotected: float) -> float:
    return (protected / unprotected - 1) * 60_000


@contextmanager
def page_of(host: Host, offset: int) -> Iterator[mmap.mmap]:
    """One page of the memory of the guest on a host, to be read."""
    (path,) = host.memory_directory.glob("*.ram")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ, offset=offset) as page:
        yield page


def look_at(read: Callable[[], tuple[int, ...]]) -> list[Look]:
    """All clocks that `read` returns, at the moment that came soonest after the guest's own look at them.

    Args:
        read: What the guest's clocks said when it looked last; the last of them in ns.
    """
    moments = []
    end = time.monotonic() + WINDOW_S
    last = read()
    while time.monotonic() < end:
        now = read()
        if now == last:
            time.sleep(0.0002)
            continue
        moments.append((time.monotonic_ns(), now))
        last = now
    assert len(moments) > 20
    host, clocks = max(moments, key=lambda moment: moment[1][-1] - moment[0])
    return [Look(host, clock) for clock in clocks]


async def rates(read: Callable[[], tuple[int, ...]], span_s: float) -> list[float]:
    first = await asyncio.to_thread(look_at, read)
    await asyncio.sleep(span_s)  # a length of time is what is measured
    last = await asyncio.to_thread(look_at, read)
    return [rate(*looks) for looks in zip(first, last, strict=True)]


async def measure_drift(pair: Pair, read: Callable[[], tuple[int, ...]]) -> list[float]:
    """Drift of each clock by protection, in ms per minute. Begins without a backup, ends protected."""
    without = await rates(read, 3)
    await pair.backup.start()
    await wait_ready(pair.backup)
    await pair.wait_protected()
    epochs = (await wait_committed(pair.primary, 5))["epoch"]["committed"]
    within = await rates(read, 5)
    status = await pair.primary.status()
    assert status["epoch"]["committed"] - epochs > 100, "it was not protected all the time"
    drifts = [drift_ms_per_minute(*pair_of_rates) for pair_of_rates in zip(within, without, strict=True)]
    paused = status["epoch"]["slowdown"] * 60_000
    print("drift in ms/min:", *(f"{drift:+.3f}" for drift in drifts))
    print(f"the pauses of a minute: {paused:.0f} ms")
    assert paused > 10 * MOST_DRIFT_MS_PER_MINUTE, "too few pauses to show anything"
    return drifts


# ---- a Linux guest ----------------------------------------------------------------------------------------

LINUX_MAGIC = b"f-clocks"  # guests/README.md
LINUX_LAYOUT = struct.Struct("<8sqq")


def find_linux_clocks(host: Host) -> int:
    """Where in its memory the guest leaves its clocks."""
    (path,) = host.memory_directory.glob("*.ram")
    memory = path.read_bytes()
    found = [page for page in range(0, len(memory), 4096) if memory.startswith(LINUX_MAGIC, page)]
    assert len(found) == 1
    return found[0]


async def test_a_linux_guest_keeps_its_time_and_no_takeover_sets_it_back(make_pair: StartPair) -> None:
    pair: Pair = await make_pair(await linux_guest(dirty_pages_per_second=2000), SETTINGS)
    await pair.primary.start()
    await pair.primary.console.wait_for(r"^ftd-guest: ready", 90)
    offset = await asyncio.to_thread(find_linux_clocks, pair.a)

    def wall_clock() -> tuple[int]:
        return (LINUX_LAYOUT.unpack_from(page)[2],)

    with page_of(pair.a, offset) as page:
        (drift,) = await measure_drift(pair, wall_clock)
        assert abs(drift) <= MOST_DRIFT_MS_PER_MINUTE
        before = json.loads(await ask(pair.network.client, "GET", "/status"))
        committed = (await wait_committed(pair.primary, 1))["epoch"]["committed"]
        pair.kill_primary_host()
        await assert_takeover(pair, "silence", committed=committed)
        after = json.loads(await ask(pair.network.client, "GET", "/status"))
    for clock in ("wall_ns", "monotonic_ns"):
        assert after[clock] >= before[clock], f"{clock} stepped back"
    # Looked at every 10 ms inside the guest, and never smaller than the time before.
    assert (await assert_linux_guest_is_sound(pair))["clock_backwards"] == 0


# ---- the bare-metal guest ---------------------------------------------------------------------------------

BARE_OFFSET = 0x9000  # guests/README.md
BARE_LAYOUT = struct.Struct("<IIQQII")


@dataclass(frozen=True)
class Clocks:
    """What the guest wrote to its memory."""

    sequence: int
    has_kvmclock: bool
    tsc: int
    kvmclock_ns: int
    tsc_backwards: int
    kvmclock_backwards: int


def bare_clocks(page: mmap.mmap) -> Clocks:
    while True:
        found = Clocks(*BARE_LAYOUT.unpack_from(page))
        if not found.sequence & 1 and BARE_LAYOUT.unpack_from(page)[0] == found.sequence:
            return found


@pytest.mark.kvm
async def test_the_clocks_of_a_kvm_guest_keep_their_time_and_are_not_set_back(make_pair: StartPair) -> None:
    pair: Pair = await make_pair(await bare_guest("kvm", pages=1024), SETTINGS)
    await pair.primary.start()
    await assert_bare_guest_goes_on(pair.primary)
    with page_of(pair.a, BARE_OFFSET) as page:
        assert bare_clocks(page).has_kvmclock

        def tsc_and_kvmclock() -> tuple[int, int]:
            clocks = bare_clocks(page)
            return clocks.tsc, clocks.kvmclock_ns

        drifts = await measure_drift(pair, tsc_and_kvmclock)
    assert all(abs(drift) <= MOST_DRIFT_MS_PER_MINUTE for drift in drifts)
    committed = (await wait_committed(pair.primary, 5))["epoch"]["committed"]
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)  # which also looks for its complaints on the console
    with page_of(pair.b, BARE_OFFSET) as page:
        before = bare_clocks(page)
        assert (before.tsc_backwards, before.kvmclock_backwards) == (0, 0)
        await assert_bare_guest_goes_on(pair.backup)
        after = bare_clocks(page)
    assert after.tsc > before.tsc
    assert after.kvmclock_ns > before.kvmclock_ns
