"""Taking over: the arbiter is asked for the guest, and the shadow is started if it grants it (rule S3)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ftd import log
from ftd.authority import Event, Standing
from ftd.backup.judgement import Loss
from ftd.backup.outcome import GuestEnded, ShadowGone, TakenOver
from ftd.backup.standby import ShadowVm, Standby
from ftd.errors import HostError, QemuDied, QemuError, TakeoverRefused, friendly
from ftd.inquiry import Outcome
from ftd.state import PairState
from ftd.takeover import LoadImage, start_shadow

_log = log.get(__name__)

T = TypeVar("T")

# Between two questions to an arbiter that does not answer.
ASK_AGAIN_SECONDS = 0.5

# For a primary that lives behind a link that is cut to have asked the arbiter before this side does.
FIRST_SAY_SECONDS = 2.0


async def take_over(
    standby: Standby,
    vm: ShadowVm,
    loss: Loss,
    generation: int,
    on_running: Callable[[int], None] | None = None,
) -> TakenOver | GuestEnded | ShadowGone | None:
    """Start the shadow, if the arbiter grants it. generation: of the shadow. on_running: told of the one won.

    Returns None when that is refused, or when the primary is back first. Raises QemuDied if the guest was won
    and cannot be started.

    Cancelled while the arbiter is asked, or after that, it is so only when the guest runs, or is not granted.
    """
    _log.warning(
        "the primary is lost",
        trigger=loss.trigger,
        detail=loss.detail,
        applied_ms=round((time.monotonic() - loss.decided) * 1000, 1),
    )
    authority = standby.authority
    if authority.knows(Event.LOST) and authority.standing is not Standing.EMPTY:
        authority.on(Event.LOST)
    image = LoadImage(vm.shadow)  # while the arbiter is asked
    try:
        refusal = vm.shadow.takeover_refusal()
        if refusal is not None:
            _refuse(standby, refusal)
            return None
        return await _claim(standby, vm, image, loss, generation, on_running)
    finally:
        await image.close()


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Return what comes of it. Cancelled, raise that when the work is done, unless it has failed."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    result = task.result()
    if cancelled:
        raise asyncio.CancelledError
    return result


# ---- asking -----------------------------------------------------------------------------------------------


async def _claim(
    standby: Standby,
    vm: ShadowVm,
    image: LoadImage,
    loss: Loss,
    generation: int,
    on_running: Callable[[int], None] | None,
) -> TakenOver | GuestEnded | ShadowGone | None:
    """Ask for the guest until the arbiter answers, and do what that means.

    Returns None also when the primary is back first; ShadowGone when there is nothing to start.
    """
    lost, wait = f"the primary is lost ({loss.detail})", 0.0
    if loss.trigger == "link-cut":
        lost, wait = f"the link is lost ({loss.detail})", FIRST_SAY_SECONDS
    reason = "the primary lives, and may ask the arbiter first"

    async def ask_and_start() -> TakenOver | Outcome:
        """Return what it was if it was not granted."""
        if standby.forced.done():
            won, told = await _force(standby, generation)
        else:
            outcome = await standby.inquiry.takeover(generation)
            standby.authority.on(outcome.event)
            if not outcome.granted:
                return outcome
            won, told = outcome.record.generation if outcome.record is not None else generation + 1, True
        taken_over = await _start(standby, vm, image, loss, won, told)
        if on_running is not None:
            on_running(won)
        await standby.remember(won, "primary")
        return taken_over

    while True:
        if wait:
            gone = await _hold(standby, vm, f"{lost}: {reason}", wait)
            if gone is not None or not standby.arrived.empty():
                return gone
        wait = ASK_AGAIN_SECONDS
        # Whoever stops this daemon meanwhile stops no guest: if it is granted, nobody else will start it.
        answer = await _to_the_end(ask_and_start())
        if isinstance(answer, TakenOver):
            return answer
        if answer.event is Event.DENIED:
            return _denied(standby, answer)
        reason = answer.reason


async def _force(standby: Standby, generation: int) -> tuple[int, bool]:
    """Take the guest whatever the arbiter says, as an operator wants it.

    Returns the generation, and whether the arbiter knows.
    """
    outcome = await standby.inquiry.force(generation)
    standby.authority.on(Event.FORCED)
    if outcome.granted and outcome.record is not None:
        return outcome.record.generation, True
    _log.error("taken over by force, and the arbiter does not know", reason=outcome.reason)
    return generation + 1, False


async def _hold(standby: Standby, vm: ShadowVm, why: str, seconds: float) -> ShadowGone | None:
    """Be `held` for so long, or until something happens."""
    standby.report.machine.move(PairState.HELD, why)
    standby.busy = False  # a primary that is back is welcome, if the standing allows it
    standby.arrival.clear()
    arrival = asyncio.ensure_future(standby.arrival.wait())
    try:
        waits: set[asyncio.Future[Any]] = {vm.gone, standby.forced, arrival}
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        standby.busy = True
        arrival.cancel()
    if not vm.gone.done():
        return None
    if standby.authority.standing is Standing.DOUBTING:
        # The question may still be granted, and the daemon's next start finds out.
        raise QemuError("the shadow's QEMU has ended while the arbiter was being asked")
    return standby.shadow_gone("it ended while the arbiter was being asked")


# ---- what the answer means --------------------------------------------------------------------------------


def _denied(standby: Standby, answer: Outcome) -> GuestEnded | None:
    record = answer.record
    if record is not None and record.state == "stopped":
        standby.report.machine.move(PairState.STOPPED, f"the guest has stopped: {record}")
        return GuestEnded(str(record))
    _refuse(standby, answer.reason)
    return None


def _refuse(standby: Standby, refusal: str) -> None:
    standby.spoiled()
    standby.report.metrics.takeovers_refused.inc()
    _log.error("takeover refused", reason=refusal)
    standby.report.machine.move(PairState.WAITING, f"the primary is lost, and takeover is refused: {refusal}")


async def _start(
    standby: Standby, vm: ShadowVm, image: LoadImage, loss: Loss, generation: int, told: bool
) -> TakenOver:
    """Start the shadow. generation: that was won; told: whether the arbiter knows."""
    report, monitor = standby.report, vm.qemu.monitor
    epoch = vm.shadow.committed_epoch
    assert epoch is not None
    vm.disks.copies.close()  # QEMU wants the locks
    try:
        nics = standby.config.machine.nic
        running = await start_shadow(monitor, vm.shadow, image, nics, resume=loss.resume)
    except (TakeoverRefused, QemuError, HostError) as error:
        # This side has the authority by now, and a QEMU that is of no use: no session can follow.
        report.metrics.takeovers_refused.inc()
        remedy = (
            "start the daemon again to have the guest boot here"
            if standby.inquiry.decides
            else "the guest is not running here, and nobody knows whether it runs on the other host"
        )
        raise QemuDied(
            f"this node has won the guest, and could not start it from epoch {epoch}: "
            f"{friendly(error)}; {remedy}"
        ) from None
    standby.runs_here = True
    report.set_generation(generation)
    report.committed = epoch
    with contextlib.suppress(QemuError):  # its end is the primary's to see
        status = await monitor.execute("query-status")
        report.qemu = report.qemu.model_copy(update={"running": status["running"]})
    detection = max(0.0, loss.decided - loss.heard)
    activation = running - loss.decided
    report.took_over(
        loss.trigger, epoch, detection=detection, activation=activation, total=detection + activation
    )
    report.machine.move(PairState.TAKEN_OVER, f"{loss.trigger}: {loss.detail}")
    _log.warning(
        "took over",
        epoch=epoch,
        trigger=loss.trigger,
        detection_ms=round(detection * 1000, 1),
        activation_ms=round(activation * 1000, 1),
    )
    return TakenOver(vm.qemu, generation, vm.disks.markers, told)
