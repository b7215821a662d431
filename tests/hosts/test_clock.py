"""The guest's clocks: pauses take nothing from them, and no takeover sets them back.

Drift is the rate of a clock of the guest against the host's, with protection, compared with the rate of the
same clock without it in the same run: what an emulated timer loses or gains by itself is not protection's
doing. A rate is seen between two spans of time. In each the clock is looked at many times, and the look that
was delayed least counts, since delays have one sign only.
"""

import asyncio
import json
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from testbed.guarded import (
    assert_bare_guest_goes_on,
    assert_linux_guest_is_sound,
    assert_takeover,
    bare_guest,
    linux_guest,
    wait_committed,
    wait_ready,
)
from testbed.hosts import GUEST_ADDRESS, Host
from testbed.namespaces import call_in_namespace
from testbed.pair import Pair

pytestmark = [pytest.mark.root, pytest.mark.alone]
StartPair = Callable[..., Any]

# The issue's own claim, for epochs of 20 ms.
MOST_DRIFT_MS_PER_MINUTE = 1.0
SETTINGS = {"epoch": {"length_ms": 20}}
SPAN_S = 4.0


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


# ---- a Linux guest, over its network ----------------------------------------------------------------------


def ask_status(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """When the question went out, and the answer."""
    asked = time.monotonic_ns()
    connection.sendall(b"GET /status HTTP/1.1\r\nHost: guest\r\n\r\n")
    answer = b""
    while True:
        part = connection.recv(65536)
        assert part, "the guest closed the connection"
        answer += part
        head, end, body = answer.partition(b"\r\n\r\n")
        if end and len(body) >= int(head.partition(b"Content-Length: ")[2].split(b"\r", 1)[0]):
            return asked, json.loads(body)


def look_at_linux(connection: socket.socket, clock: str) -> Look:
    """The look with the shortest way from question to guest. Answers are held back; questions are not."""
    looks = []
    end = time.monotonic() + SPAN_S
    while time.monotonic() < end:
        asked, status = ask_status(connection)
        looks.append(Look(asked, status[clock]))
    return min(looks, key=lambda look: look.guest - look.host)


async def test_a_linux_guest_keeps_its_time_and_no_takeover_sets_it_back(make_pair: StartPair) -> None:
    pair: Pair = await make_pair(await linux_guest(dirty_pages_per_second=2000), SETTINGS)
    await pair.primary.start()
    await pair.primary.console.wait_for(r"^ftd-guest: ready", 90)
    connection = call_in_namespace(
        pair.network.client.namespace, socket.create_connection, (GUEST_ADDRESS, 80), 60
    )
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        async def look() -> Look:
            return await asyncio.to_thread(look_at_linux, connection, "wall_ns")

        first = await look()
        await asyncio.sleep(4)  # a length of time is what is measured
        without = rate(first, await look())
        await pair.backup.start()
        await wait_ready(pair.backup)
        await pair.wait_protected()
        epochs = (await wait_committed(pair.primary, 5))["epoch"]["committed"]
        first = await look()
        await asyncio.sleep(10)
        within = rate(first, await look())
        status = await pair.primary.status()
        assert status["epoch"]["committed"] - epochs > 100, "it was not protected all the time"
        drift = drift_ms_per_minute(within, without)
        paused = status["epoch"]["slowdown"] * 60_000
        print(f"drift {drift:+.3f} ms/min; the pauses of a minute are {paused:.0f} ms")
        assert abs(drift) <= MOST_DRIFT_MS_PER_MINUTE
        assert paused > 10 * MOST_DRIFT_MS_PER_MINUTE, "too few pauses to show anything"

        _, before = await asyncio.to_thread(ask_status, connection)
        pair.kill_primary_host()
        await assert_takeover(pair, "silence", committed=status["epoch"]["committed"])
        _, after = await asyncio.to_thread(ask_status, connection)
    for clock in ("wall_ns", "monotonic_ns"):
        assert after[clock] >= before[clock], f"{clock} stepped back"
    # Looked at every 10 ms inside the guest, and never smaller than the time before.
    assert (await assert_linux_guest_is_sound(pair))["clock_backwards"] == 0


# ---- the bare-metal guest, through its memory -------------------------------------------------------------

CLOCKS = 0x9000  # guests/README.md
LAYOUT = struct.Struct("<IIQQII")


@dataclass(frozen=True)
class Clocks:
    """What the guest wrote to its memory."""

    sequence: int
    has_kvmclock: bool
    tsc: int
    kvmclock_ns: int
    tsc_backwards: int
    kvmclock_backwards: int


@contextmanager
def clocks_of(host: Host) -> Iterator[Callable[[], Clocks]]:
    """Reads the clocks of the guest on a host."""
    (path,) = host.memory_directory.glob("*.ram")
    fd = os.open(path, os.O_RDONLY)
    with mmap.mmap(fd, 4096, prot=mmap.PROT_READ, offset=CLOCKS) as memory:
        os.close(fd)

        def read() -> Clocks:
            while True:
                found = Clocks(*LAYOUT.unpack_from(memory))
                if not found.sequence & 1 and LAYOUT.unpack_from(memory)[0] == found.sequence:
                    return found

        yield read


def look_at_bare(read: Callable[[], Clocks]) -> tuple[Look, Look]:
    """Time stamp counter and kvmclock: of each the look that came soonest after the guest's own."""
    looks = []
    end = time.monotonic() + SPAN_S / 2  # there are many in a second, and hardly delayed
    sequence = read().sequence
    while time.monotonic() < end:
        now = read()
        if now.sequence == sequence:
            time.sleep(0.0002)
            continue
        looks.append((time.monotonic_ns(), now))
        sequence = now.sequence
    assert len(looks) > 20
    best = max(looks, key=lambda look: look[1].kvmclock_ns - look[0])
    return Look(best[0], best[1].tsc), Look(best[0], best[1].kvmclock_ns)


@pytest.mark.kvm
async def test_the_clocks_of_a_kvm_guest_keep_their_time_and_are_not_set_back(make_pair: StartPair) -> None:
    pair: Pair = await make_pair(await bare_guest("kvm", pages=1024), SETTINGS)
    await pair.primary.start()
    await assert_bare_guest_goes_on(pair.primary)
    with clocks_of(pair.a) as read:
        assert read().has_kvmclock
        first = await asyncio.to_thread(look_at_bare, read)
        await asyncio.sleep(4)
        last = await asyncio.to_thread(look_at_bare, read)
        without = [rate(*looks) for looks in zip(first, last, strict=True)]
        await pair.backup.start()
        await wait_ready(pair.backup)
        await pair.wait_protected()
        await wait_committed(pair.primary, 5)
        first = await asyncio.to_thread(look_at_bare, read)
        await asyncio.sleep(4)
        last = await asyncio.to_thread(look_at_bare, read)
        within = [rate(*looks) for looks in zip(first, last, strict=True)]
        drifts = [drift_ms_per_minute(*rates) for rates in zip(within, without, strict=True)]
        print("drift of TSC and kvmclock, ms/min:", ", ".join(f"{drift:+.3f}" for drift in drifts))
        assert all(abs(drift) <= MOST_DRIFT_MS_PER_MINUTE for drift in drifts)
    committed = (await wait_committed(pair.primary, 5))["epoch"]["committed"]
    pair.kill_primary_host()
    await assert_takeover(pair, "silence", committed=committed)
    await assert_bare_guest_goes_on(pair.backup)  # which also looks for its complaints on the console
    with clocks_of(pair.b) as read:
        before = read()
        assert (before.tsc_backwards, before.kvmclock_backwards) == (0, 0)
        await assert_bare_guest_goes_on(pair.backup)
        after = read()
    assert after.tsc > before.tsc
    assert after.kvmclock_ns > before.kvmclock_ns
