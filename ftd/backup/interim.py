"""Between two sessions: waiting for a primary, or for the next daemon of one whose shadow is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ftd import log
from ftd.absence import Away
from ftd.authority import Event
from ftd.backup.claim import ASK_AGAIN_SECONDS, take_over
from ftd.backup.judgement import Loss
from ftd.backup.outcome import GuestEnded, ShadowGone, TakenOver
from ftd.backup.standby import ShadowVm, Standby
from ftd.errors import FtdError, friendly
from ftd.link import Session
from ftd.shadow import Shadow
from ftd.state import PairState
from ftd.succession import Handed

_log = log.get(__name__)

# Between two looks at a session that was admitted and is not complete, when the time to wait is over.
FORMING_SECONDS = 0.05


async def next_session(
    standby: Standby, gone: asyncio.Future[int | None], forming: Callable[[], bool]
) -> Session | None:
    """Return the next session; None when QEMU has ended, or there is no time left to wait for one.

    forming: whether a session was admitted that is not complete.
    """
    arrival = asyncio.ensure_future(standby.arrived.get())
    loop = asyncio.get_running_loop()
    try:
        while True:
            away = standby.away
            waits: set[asyncio.Future[Any]] = {arrival, gone}
            left: float | None = None
            if away is not None:
                waits.add(standby.forced)
                left = max(0.0, away.deadline - loop.time())
                if not left and forming():
                    # It was admitted in time. The primary may take it for a session already.
                    left = FORMING_SECONDS
            await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if arrival.done() and not gone.done():
                return arrival.result()
            if gone.done() or away is None or standby.forced.done():
                return None
            if loop.time() >= away.deadline and not forming() and standby.arrived.empty():
                return None
    finally:
        if not arrival.done():
            arrival.cancel()


async def take_up(standby: Standby, handed: Handed, shadow: Shadow) -> None:
    """Go on with what a predecessor has handed on: a shadow that nothing was done to since."""
    assert handed.backup is not None
    generation, epoch = handed.generation, handed.epoch
    try:
        await standby.guards(generation)
        await asyncio.to_thread(shadow.restore, handed.backup.image, generation, epoch)
    except (FtdError, OSError) as error:
        _log.error("the shadow does not go on", reason=friendly(error))
        standby.spoiled()
        return
    finally:
        handed.close()
        standby.busy = False
    report = standby.report
    report.set_generation(generation)
    report.epoch, report.committed = epoch + 1, epoch
    report.peer_name = handed.peer_node
    standby.claimable = True
    report.machine.move(
        PairState.PROTECTED, f"the daemon was replaced, and has kept the shadow of epoch {epoch}"
    )
    now = time.monotonic()
    left = max(0.0, handed.deadline - handed.began)
    standby.wait_for_next_daemon(Away(handed.peer_node, generation, epoch, True, now, now + left))


async def give_up_waiting(
    standby: Standby, vm: ShadowVm, away: Away
) -> TakenOver | GuestEnded | ShadowGone | None:
    """The time that was agreed is over, or an operator does not want to wait for its end."""
    decided = time.monotonic()
    waited = f"{away.peer_node} did not come back within {decided - away.since:.1f} s"
    loss = Loss("restart-overdue", waited, away.since, decided)
    if not standby.forced.done() and away.own and not standby.inquiry.decides:
        # It is this side that was away, and the primary has gone on alone. There is nobody to ask.
        reason = f"this daemon was replaced, and {waited}: it may run the guest alone"
        held = await _hold_unasked(standby, vm, reason)
        if held is not None or not standby.forced.done():
            return held
        decided = time.monotonic()
    if standby.forced.done():
        loss = Loss("forced", "asked for by an operator", decided, decided)
    standby.report.flight.note("session-lost", reason=f"{loss.trigger}: {waited}")
    return await take_over(standby, vm, loss, away.generation)


async def _hold_unasked(standby: Standby, vm: ShadowVm, reason: str) -> ShadowGone | None:
    """Be `held` until a primary comes, or an operator decides, or the shadow's QEMU has ended."""
    standby.authority.on(Event.LOST)
    standby.report.machine.move(PairState.HELD, reason)
    standby.busy = False
    waits: set[asyncio.Future[Any]] = {vm.gone, standby.forced}
    while standby.arrived.empty():
        await asyncio.wait(waits, timeout=ASK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if vm.gone.done():
            return standby.shadow_gone("it ended while this node was held")
        if standby.forced.done():
            standby.busy = True
            break
    return None
