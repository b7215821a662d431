"""The backup's part in replacing a daemon: what the two sides agree on, and how long the shadow is kept.

    the primary's    it says Restarting when nothing is under way; the backup answers, and waits for a session
                     that goes on from there
    the backup's     it says Restarting; the primary answers when nothing is under way any more, and the
                     shadow is handed on

The primary's part is in ftd/protection/suspension.py. What a backup does when the time is over is in
ftd/backup/interim.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any

from ftd import log
from ftd.errors import FtdError, friendly
from ftd.link import Session
from ftd.messages import Hello, RestartAgreed, Restarting
from ftd.shadow import Shadow
from ftd.succession import Handed, HandedBackup, Succession
from ftd.wire import LinkLost

_log = log.get(__name__)

# For the primary to have everything committed and to say that it waits for this side's next daemon; and for a
# session to end after that was agreed.
LEAVE_SECONDS = 12.0

# For what is acknowledged to be applied.
APPLY_SECONDS = 30.0


@dataclass(frozen=True)
class Away:
    """A daemon of the pair is being replaced, and the shadow of `epoch` is kept for that long.

    own: it was this one. since, deadline: monotonic seconds.
    """

    peer_node: str
    generation: int
    epoch: int
    own: bool
    since: float
    deadline: float

    def fits(self, hello: Hello) -> bool:
        """Say whether a primary wants to go on from this very epoch."""
        return hello.resume is not None and (hello.node, hello.generation, hello.resume.epoch) == (
            self.peer_node,
            self.generation,
            self.epoch,
        )

    def __str__(self) -> str:
        who = "this daemon was replaced" if self.own else f"the daemon of {self.peer_node} is being replaced"
        grace = self.deadline - self.since
        return f"{who}: the shadow of epoch {self.epoch} is kept, and waits up to {grace:g} s"


async def wait_applied(shadow: Shadow, epoch: int) -> None:
    """Return when the shadow is equal to an epoch that is acknowledged, while the session goes on.

    Raises TimeoutError.
    """
    async with asyncio.timeout(APPLY_SECONDS):
        while (shadow.committed_epoch or 0) < epoch:  # noqa: ASYNC110 - the applier's thread is at it
            await asyncio.sleep(0.001)


async def agree_to_wait(session: Session, asked: Restarting, shadow: Shadow, grace_ms: int) -> Away | None:
    """Tell the primary whether this side waits for its next daemon. Returns None if it does not.

    grace_ms: how long this side would wait at most; 0: it does not.
    """
    grace = min(asked.grace_ms, grace_ms)
    try:
        if grace:
            await wait_applied(shadow, asked.epoch)
            if shadow.takeover_refusal() is not None or shadow.committed_epoch != asked.epoch:
                grace = 0
        # Before the answer: the primary's time begins earlier, and so is over earlier.
        now = time.monotonic()
        await session.send(RestartAgreed(epoch=asked.epoch, grace_ms=grace))
    except (LinkLost, TimeoutError):
        return None
    if not grace:
        return None
    generation = session.hello.generation
    return Away(session.peer_node, generation, asked.epoch, False, now, now + grace / 1000)


async def leave(
    session: Session,
    messages: asyncio.Future[Any],
    shadow: Shadow,
    grace_ms: int,
    node: str,
    qemu_pid: int,
) -> Succession | None:
    """Have the primary wait for this daemon's successor, and end the session.

    messages: the next of the primary's messages that matters. Returns what to raise; None if the primary says
    something else, or the session ends: that comes first.
    """
    handed: Handed | None = None
    try:
        async with asyncio.timeout(LEAVE_SECONDS):
            await session.send(Restarting(epoch=0, grace_ms=grace_ms))
            answer = await asyncio.shield(messages)
            if not isinstance(answer, RestartAgreed):
                return None
            if answer.grace_ms:
                handed = await _hand_on(session, shadow, answer, node, qemu_pid)
    except (FtdError, TimeoutError) as error:
        if session.lost is not None:
            return None
        _log.error("the next daemon begins with a copy", reason=friendly(error))
    await session.close("this daemon is being replaced")
    return Succession(handed)


async def _hand_on(
    session: Session, shadow: Shadow, agreed: RestartAgreed, node: str, qemu_pid: int
) -> Handed | None:
    now = time.monotonic()
    await wait_applied(shadow, agreed.epoch)
    if shadow.committed_epoch != agreed.epoch:
        return None
    image = await asyncio.to_thread(shadow.load_image)
    return Handed(
        node=node,
        pid=os.getpid(),
        qemu_pid=qemu_pid,
        generation=session.hello.generation,
        epoch=agreed.epoch,
        peer_node=session.peer_node,
        began=now,
        deadline=now + agreed.grace_ms / 1000,
        backup=HandedBackup(image=image),
    )
