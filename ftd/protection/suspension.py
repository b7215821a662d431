"""Protection that ends with one session and goes on over the next, while a daemon of the pair is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from ftd import log
from ftd.carried import Carried
from ftd.disk import Image
from ftd.link import Session
from ftd.messages import RestartAgreed, Restarting
from ftd.protection.ends import ProtectionLost, Suspended
from ftd.protection.epochs import Epochs
from ftd.protection.firstcopy import SMALL_ENOUGH
from ftd.protection.gathering import Gathering
from ftd.report import Report
from ftd.state import PairState

_log = log.get(__name__)

# For the backup to say that it waits for this side's next daemon, or to leave when it was told so.
SUSPEND_SECONDS = 5.0

# What was dirtied while there was no session is sent in live rounds before the first checkpoint, up to so
# many bytes: they all belong to one frame, which the backup has to hold.
BACKLOG_BYTES = 256 << 20


class Suspension:
    """Wanted at some time, by this side or by the other; `run` then agrees on it between two epochs.

    grace_ms: for how long this side waits at most; 0: not at all.
    """

    def __init__(
        self,
        session: Session,
        gathering: Gathering,
        epochs: Epochs,
        images: Sequence[Image],
        generation: int,
        grace_ms: int,
    ) -> None:
        self._session = session
        self._gathering = gathering
        self._epochs = epochs
        self._images = images
        self._generation = generation
        self._grace_ms = grace_ms
        self._own = False  # this side's daemon is to be replaced
        self._peer: Restarting | None = None
        self._agreed: asyncio.Future[RestartAgreed] = asyncio.get_running_loop().create_future()
        # What goes on over another session, as soon as that is agreed.
        self.carried: Carried | None = None

    @property
    def wanted(self) -> bool:
        """Whether a daemon of the pair is to be replaced."""
        return self._own or self._peer is not None

    def want(self) -> None:
        """This side's daemon is to be replaced."""
        self._own = True

    def on_restarting(self, message: Restarting) -> None:
        """The other side's daemon is to be replaced."""
        self._peer = message

    def on_agreed(self, message: RestartAgreed) -> None:
        """The other side has answered."""
        if not self._agreed.done():
            self._agreed.set_result(message)

    async def run(self) -> None:
        """Agree with the backup to go on over another session. Nothing of the running epoch was sent yet.

        Returns when this side does not wait for the backup's daemon. Otherwise raises Suspended, or
        ProtectionLost if nothing was agreed; or the session's end comes first, with `carried` set.
        """
        last = self._gathering.epoch - 1
        mine = self._grace_ms
        peer = self._peer
        if peer is not None and not mine:
            self._peer = None
            await self._session.send(RestartAgreed(epoch=last, grace_ms=0))
            return
        await self._gathering.wait_for(lambda: not self._epochs.in_flight)
        began = time.monotonic()
        if peer is not None:
            grace = min(peer.grace_ms, mine)
            self.carried = self._carry(began, grace, own=False)
            await self._session.send(RestartAgreed(epoch=last, grace_ms=grace))
            await asyncio.sleep(SUSPEND_SECONDS)  # the session's end comes first
            self.carried = None
            why = "said that it restarts, and stayed"
        else:
            await self._session.send(Restarting(epoch=last, grace_ms=mine))
            why = f"did not say within {SUSPEND_SECONDS:g} s whether it waits for the next daemon"
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(self._agreed, SUSPEND_SECONDS)
                if answer.grace_ms and answer.epoch == last:
                    self.carried = self._carry(began, answer.grace_ms, own=True)
                    raise Suspended(self.carried)
                why = "does not wait for the next daemon"
        raise ProtectionLost(f"{self._session.peer_node} {why}", resync=True, aborted="stopped")

    def _carry(self, began: float, grace_ms: int, *, own: bool) -> Carried:
        return Carried(
            generation=self._generation,
            epoch=self._gathering.epoch,
            peer_node=self._session.peer_node,
            own=own,
            began=began,
            deadline=began + grace_ms / 1000,
            staging=self._gathering.staging,
            release=self._gathering.release,
            slot_pages=self._gathering.slot_pages,
            images=list(self._images),
        )


async def resume(
    carried: Carried, report: Report, session: Session, gathering: Gathering, epochs: Epochs
) -> float:
    """Have the backup commit all that happened since an earlier session, as one frame.

    Returns when the next epoch began.
    """
    epochs.begin(counted=not carried.own)
    epoch = gathering.epoch
    await _send_backlog(gathering, epochs)
    began, _ = await epochs.checkpoint()
    await gathering.wait_for(lambda: epoch not in epochs.in_flight)
    held = time.monotonic() - carried.began
    who = "this daemon" if carried.own else f"the daemon of {session.peer_node}"
    report.resumed(epoch, held)
    _log.info("protection goes on without a copy", epoch=epoch, restarted=who, held_s=round(held, 3))
    report.machine.move(
        PairState.PROTECTED,
        f"epoch {epoch} is committed on {session.peer_node}: no copy was needed after {who} was restarted",
    )
    return began


async def _send_backlog(gathering: Gathering, epochs: Epochs) -> None:
    """Send most of what became dirty without a session while the guest runs, to keep the pause short."""
    last = 0
    while epochs.backlog < BACKLOG_BYTES:
        slot = await gathering.free_slot()
        part = await gathering.gather("x-ft-collect", slot)
        pages = part["pages"] + part["zero-pages"]
        epochs.backlog += part["slot-bytes"]
        gathering.send(slot)
        if not part["complete"]:
            continue
        if pages <= gathering.slot_pages * SMALL_ENOUGH or (last and pages > 0.9 * last):
            return
        last = pages
