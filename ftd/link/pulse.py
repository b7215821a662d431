"""The heartbeats of a session: sent, heard, and judged by the detector, on the link and on further paths."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ftd import log
from ftd.channel import Channel
from ftd.detector import HeartbeatDetector, Verdict
from ftd.errors import FtdError
from ftd.link.options import LinkOptions
from ftd.messages import Goodbye, Heartbeat, HeartbeatSettings, LinkCut, decode, encode
from ftd.paths import Paths, PathSettings
from ftd.wire import LinkLost, LostKind, MessageType

_log = log.get(__name__)


class Pulse:
    """Beats, and listens for the peer's heartbeats, until `stop`. Belongs to the event loop.

    channel: the session's connection for heartbeats; who owns it has it deliver to `on_message`. peer: what
    the peer is called in messages.
    progress: when a byte of a part last moved, monotonic ns. unread: whether anything of the peer has
    arrived that was not read yet. on_sure(): this side no longer doubts itself. on_lateness(seconds): how
    late a tick was.
    on_silent(why): nothing was heard on any path. on_link_silent(why): nothing on the link, for longer than
    is accepted, and the peer is heard elsewhere. on_said(message, path): a Goodbye or a LinkCut on a further
    path. on_goodbye(reason): likewise on the channel. on_path_lost, on_path: see Paths. on_missed(): the
    peer has become suspect. on_failed(error): the channel does not take a heartbeat.
    """

    def __init__(
        self,
        channel: Channel,
        peer: str,
        agreed: HeartbeatSettings,
        options: LinkOptions,
        *,
        clock: Callable[[], int],
        progress: Callable[[], int],
        unread: Callable[[], bool],
        on_sure: Callable[[], None],
        on_lateness: Callable[[float], None] | None,
        on_silent: Callable[[str], None],
        on_link_silent: Callable[[str], None],
        on_goodbye: Callable[[str], None],
        on_said: Callable[[Goodbye | LinkCut, str], None],
        on_path_lost: Callable[[str], None],
        on_path: Callable[[str, bool, str], None],
        on_missed: Callable[[], None],
        on_failed: Callable[[FtdError], None],
        dial: Callable[[PathSettings], Coroutine[Any, Any, Channel]] | None,
    ) -> None:
        self._channel = channel
        self._peer = peer
        self._agreed = agreed
        self._patience_seconds = options.patience_seconds
        self._clock = clock
        self._progress = progress
        self._unread, self._on_sure = unread, on_sure
        # This side stood still for longer than the peer waits, and has not heard from the peer of now since;
        # and whether it has read all that came before it woke.
        self._doubt = self._caught_up = False
        self._on_lateness = on_lateness
        self._on_silent, self._on_link_silent = on_silent, on_link_silent
        self._on_goodbye, self._on_failed = on_goodbye, on_failed
        self._on_missed = on_missed
        # As of the peer's last heartbeat; "" and 0 before the first.
        self.peer_state = ""
        self.peer_epoch = 0
        self.missed = 0  # times that the peer became suspect
        # What this side's heartbeats say.
        self.own_state, self.own_epoch = "connected", 0
        self.detector = HeartbeatDetector(agreed.interval_ms * 1_000_000, agreed.misses, clock())
        self.paths = Paths(
            options.paths,
            agreed,
            clock=clock,
            allowance_seconds=options.handshake_seconds,
            on_heard=self._on_path_heard,
            on_said=on_said,
            on_lost=on_path_lost,
            on_change=on_path,
            dial=dial,
        )
        self.sent = 0
        self.heard = 0
        self._progress_ns = 0
        self._beat_due = True
        self._stopped = False
        self._period = self.detector.period_ns / 1e9
        self._loop = asyncio.get_running_loop()
        self._tick_at = self._loop.time()
        self._timer = self._loop.call_at(self._tick_at, self._tick)

    def stop(self) -> None:
        """Beat and judge no more. The paths remain, for last words."""
        self._stopped = True
        self._timer.cancel()

    # ---- judging -----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        # The loop hands out what sockets have to say before timers that are due in the same round. So
        # whatever came while this process was not scheduled has been heard before the detector is asked.
        if self._stopped:
            return
        now = self._clock()
        going_on = self._look(now)
        if self._on_lateness is not None:
            self._on_lateness(self.detector.lateness_ns / 1e9)
        if not going_on:
            return
        if self._beat_due:
            self._beat(now)
        self._beat_due = not self._beat_due
        if not self._stopped:
            self._tick_at = max(self._tick_at + self._period, self._loop.time())
            self._timer = self._loop.call_at(self._tick_at, self._tick)

    def _look_at_deadline(self) -> None:
        if not self._stopped:
            self._look(self._clock())

    def _look(self, now: int) -> bool:
        """Ask the detectors. Returns whether the session goes on, or has been ended."""
        self.hear_progress()
        before = self.detector.verdict
        verdict = self.detector.tick(now)
        if self.detector.stood_still_since(now - 1, now):
            self._doubt, self._caught_up = True, False
        if self._doubt and not self._caught_up:
            self._caught_up = not self._unread()
        if verdict is Verdict.SILENT:
            age = (now - self.detector.last_heard_ns) / 1e6
            self._on_silent(
                f"nothing heard from {self._peer} for {age:.0f} ms (limit {self._agreed.limit_ms} ms)"
            )
            return False
        self.paths.tick(now)
        down = self.paths.link_down(now)
        if down is not None and down >= self._patience_seconds:
            self._on_link_silent(f"nothing heard on the link for {down + self._agreed.limit_ms / 1000:.1f} s")
            return False
        if verdict is Verdict.SUSPECT and before is Verdict.ALIVE:
            self.missed += 1
            _log.debug("heartbeat missing", peer=self._peer)
            self._on_missed()
        # Not half an interval later, at the next tick. A look that was too late has to wait for that all the
        # same: there is no time left then.
        left = self.detector.deadline_ns() - now
        if 0 < left < self.detector.period_ns:
            self._loop.call_later(left / 1e9, self._look_at_deadline)
        return True

    # ---- beating -----------------------------------------------------------------------------------------

    def _beat(self, now: int) -> None:
        self.paths.beat(self.own_state, self.own_epoch)
        if self._channel.unsent_bytes:
            return  # the path takes nothing; old heartbeats would be worth nothing later
        beat = Heartbeat(sequence=self.sent, sent_ns=now, state=self.own_state, epoch=self.own_epoch)
        self.sent += 1
        try:
            self._channel.write(MessageType.HEARTBEAT, encode(beat))
        except FtdError as error:
            self._on_failed(error)

    # ---- hearing -----------------------------------------------------------------------------------------

    def hear_link(self, now: int) -> None:
        """Note a sign of life on the link."""
        self.detector.heard(now)
        self.paths.hear_link(now)
        if self._doubt and self._caught_up and not self.detector.stood_still_since(now, now):
            self._doubt = False
            self._on_sure()

    def doubts_itself(self, now: int) -> bool:
        """Whether this side stood still for so long that the peer may have given it up, and does not know.

        What it reads first when it wakes was said before; what comes once it has read all of that is said by
        a peer that still holds to the session.
        """
        return self._doubt or self.detector.stood_still_since(now, now) > 0

    def hear_progress(self) -> None:
        """Bytes of a part are a sign of life, too: on a narrow path they delay the heartbeats."""
        progress = self._progress()
        if progress != self._progress_ns:
            self._progress_ns = progress
            self.hear_link(progress)

    def on_message(self, type_: MessageType, payload: bytearray) -> None:
        """Take what came on the channel. Raises LinkLost when it may not be said."""
        message = decode(type_, payload)
        if isinstance(message, Goodbye):
            self._on_goodbye(message.reason)
        elif isinstance(message, Heartbeat):
            if message.sequence != self.heard:
                raise LinkLost(
                    LostKind.PROTOCOL,
                    f"the peer sent heartbeat {message.sequence}, expected {self.heard}",
                )
            self.heard += 1
            self.hear_link(self._clock())
            self.peer_state, self.peer_epoch = message.state, message.epoch

    def _on_path_heard(self, now: int, message: Heartbeat) -> None:
        self.detector.heard(now)
        self.peer_state, self.peer_epoch = message.state, message.epoch
