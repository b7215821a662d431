"""The sender: a thread that puts staging slots on the wire, in order, and gives them back.

The event loop hands slots over and never waits for the network; QEMU fills one slot while another is sent.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from ftd import log
from ftd.channel import prefer_this_thread
from ftd.errors import FrameError, FtdError
from ftd.frame import Kind, parse_header, wire_views
from ftd.link import Session
from ftd.staging import Slot, Staging

_log = log.get(__name__)


class _Message(NamedTuple):
    data: bytes
    sent: asyncio.Future[None]


class Sender:
    """Sends slots over one session until that ends. Made and used in the event loop; `close` ends the thread.

    `on_sent(bytes)` is called in the event loop after each part. A slot that holds no part ends the session:
    its frame can never be committed, and nobody else would notice.
    """

    def __init__(self, session: Session, staging: Staging, on_sent: Callable[[int], None]) -> None:
        self._session = session
        self._staging = staging
        self._on_sent = on_sent
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Slot | _Message | None] = queue.SimpleQueue()
        self._ending: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._run, name="ftd-sender", daemon=True)
        self._thread.start()

    def send(self, slot: Slot) -> None:
        """Send what QEMU gathered into the slot, and then give the slot back."""
        self._queue.put(slot)

    async def send_message(self, data: bytes) -> None:
        """Send other bytes in order with the slots, and return when they are sent, or the session ended."""
        sent: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(_Message(data, sent))
        await sent

    async def close(self) -> None:
        """Return when the thread has ended. The session must have ended, or it waits for the network."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        broken = preferred = False
        while (slot := self._queue.get()) is not None:
            size = 0
            if isinstance(slot, _Message):
                if not broken:
                    try:
                        size = self._session.send_part([memoryview(slot.data)])
                    except FtdError:
                        broken = True
                self._loop.call_soon_threadsafe(self._message_done, slot, size)
                continue
            if not broken:
                try:
                    header = parse_header(slot.view, limit=1 << 62)
                    if header.kind is Kind.CHECKPOINT and not preferred:
                        # The first copy may take its time, the guest comes before it. From now on clients
                        # wait.
                        prefer_this_thread()
                        preferred = True
                    views = wire_views(slot.view, header)
                    size = self._session.send_part(views)
                except FrameError as error:
                    broken = True
                    reason = f"QEMU filled slot {slot.index} with what is no part: {error}"
                    self._loop.call_soon_threadsafe(self._end_session, reason)
                except FtdError:
                    # The session tells everybody; slots still have to come back.
                    broken = True
                finally:
                    views = []
            self._loop.call_soon_threadsafe(self._done, slot, size)

    def _end_session(self, reason: str) -> None:
        _log.error("a frame cannot be sent", reason=reason)
        self._ending = asyncio.ensure_future(self._session.close(reason))

    def _done(self, slot: Slot, size: int) -> None:
        self._staging.release(slot)
        if size:
            self._on_sent(size)

    def _message_done(self, message: _Message, size: int) -> None:
        if not message.sent.done():
            message.sent.set_result(None)
        if size:
            self._on_sent(size)
