"""A session: three connections that live and end together, with what is said over them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ftd import log
from ftd.channel import Channel, FrameChannel
from ftd.detector import Verdict
from ftd.errors import FtdError, friendly
from ftd.link.loss import Ending, LossRules, LostReason, Where
from ftd.link.options import LinkOptions
from ftd.link.pulse import Pulse
from ftd.messages import (
    ControlMessage,
    Flight,
    FlightWanted,
    Goodbye,
    Hello,
    LinkCut,
    Welcome,
    decode,
    encode,
    one_line,
)
from ftd.metrics import Connection
from ftd.paths import PathSettings, PathState
from ftd.wire import PAYLOAD_LIMITS, LinkLost, LostKind, MessageType

_log = log.get(__name__)

_CONTROL_ONLY = {MessageType.CONTROL: PAYLOAD_LIMITS[MessageType.CONTROL]}
_HEARTBEAT_ONLY = {MessageType.HEARTBEAT: PAYLOAD_LIMITS[MessageType.HEARTBEAT]}

# Control messages that wait to be received; above the first the peer is made to wait, below the second no
# longer.
_INBOX_FULL, _INBOX_ROOM = 1024, 256


class Session:
    """A pair of daemons that are connected.

    Belongs to the event loop, except for send_part (the primary's sender thread), receive_part (the backup's
    receiver thread) and post (any thread). `on_lateness(seconds)` is told for every tick of the loop how late
    it was.
    """

    def __init__(
        self,
        hello: Hello,
        welcome: Welcome,
        control: Channel,
        heartbeat: Channel,
        frames: FrameChannel,
        options: LinkOptions,
        *,
        peer_node: str,
        on_lateness: Callable[[float], None] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        dial: Callable[[PathSettings], Coroutine[Any, Any, Channel]] | None = None,
    ) -> None:
        self.id = hello.session
        self.hello = hello
        self.welcome = welcome
        self.peer = control.peer
        self.peer_node = peer_node
        self.heartbeat = hello.heartbeat.agreed(welcome.heartbeat)
        self.lost: LostReason | None = None
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._options = options
        self.on_end: Callable[[Session], None] | None = None  # the listener's, which keeps count
        # Told of each path that goes down or up: its name, which, and why.
        self.on_path: Callable[[str, bool, str], None] = lambda name, up, detail: None
        self.on_missed: Callable[[], None] = lambda: None  # told each time that the peer becomes suspect
        # Makes this side's answer to a FlightWanted.
        self.flight: Callable[[], Coroutine[Any, Any, Flight]] | None = None
        self._flights: deque[asyncio.Future[Flight]] = deque()  # that were asked for
        self._answers: set[asyncio.Task[None]] = set()
        self._control, self._heartbeat, self._frames = control, heartbeat, frames
        self._inbox: deque[ControlMessage] = deque()
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._sure = asyncio.Event()
        self._rules = LossRules()
        self._graces: list[asyncio.TimerHandle] = []
        self._farewell: asyncio.Task[None] | None = None
        self._pulse = Pulse(
            heartbeat,
            self.peer,
            self.heartbeat,
            options,
            clock=clock,
            progress=lambda: frames.progress_ns,
            unread=lambda: control.unread or heartbeat.unread,
            on_sure=self._sure.set,
            on_lateness=on_lateness,
            on_silent=lambda why: self._end(LostKind.SILENCE, why, "heartbeat"),
            on_link_silent=self._on_link_silent,
            on_goodbye=lambda reason: self._follow(self._rules.said_goodbye(reason)),
            on_said=self._on_path_said,
            on_path_lost=self._on_path_lost,
            on_path=self._on_path_change,
            on_missed=self._on_missed,
            on_failed=lambda error: self._on_channel_lost("heartbeat", error),
            dial=dial,
        )
        control.listen(_CONTROL_ONLY, self._on_control, lambda error: self._on_channel_lost("control", error))
        heartbeat.listen(
            _HEARTBEAT_ONLY,
            self._pulse.on_message,
            lambda error: self._on_channel_lost("heartbeat", error),
        )

    # ---- messages ----------------------------------------------------------------------------------------

    async def send(self, message: ControlMessage) -> None:
        """Send on control; waits if the peer reads slowly. Raises LinkLost if the session has ended."""
        self.send_nowait(message)
        await self._control.drain()

    def send_nowait(self, message: ControlMessage) -> None:
        """Send on control, or queue what the socket does not take at once. Raises LinkLost."""
        self._raise_if_lost()
        try:
            self._control.write(MessageType.CONTROL, encode(message))
        except FtdError as error:
            self._on_channel_lost("control", error)
            raise

    def post(self, message: ControlMessage) -> None:
        """Send on control from any thread. If the session has ended, the message is dropped: wait_lost()
        tells.
        """
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._post, message)

    def _post(self, message: ControlMessage) -> None:
        with suppress(FtdError):
            self.send_nowait(message)

    async def receive(self) -> ControlMessage:
        """Return the next control message of the peer.

        Raises LinkLost when the session has ended and all that came before the end was received.
        """
        while not self._inbox:
            self._raise_if_lost()
            self._news.clear()
            await self._news.wait()
        message = self._inbox.popleft()
        if len(self._inbox) == _INBOX_ROOM:
            self._control.resume()
        return message

    def _on_control(self, type_: MessageType, payload: bytearray) -> None:
        message = decode(type_, payload)
        if isinstance(message, Goodbye):
            self._end(LostKind.GOODBYE, message.reason, "control")
            return
        self._pulse.hear_link(self._clock())
        if isinstance(message, FlightWanted):
            if not self._answers:  # one at a time is enough for a person
                task = self._loop.create_task(self._send_flight())
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
            return
        if isinstance(message, Flight):
            while self._flights:
                waiting = self._flights.popleft()
                if not waiting.done():
                    waiting.set_result(message)
            return
        self._inbox.append(message)  # type: ignore[arg-type]
        self._news.set()
        if len(self._inbox) >= _INBOX_FULL:
            self._control.pause()

    async def fetch_flight(self) -> Flight:
        """Ask the peer for its flight recorder. Raises LinkLost."""
        answer: asyncio.Future[Flight] = self._loop.create_future()
        self._raise_if_lost()
        self._flights.append(answer)
        await self.send(FlightWanted())
        return await answer

    async def _send_flight(self) -> None:
        if self.flight is not None:
            try:
                message = await self.flight()
            except FtdError as error:
                _log.warning("the flight recorder was asked for", error=friendly(error))
                message = Flight(lines="", cut=True)
            self._post(message)

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise LinkLost(self.lost.kind, self.lost.detail)

    # ---- parts of frames ---------------------------------------------------------------------------------

    def send_part(self, views: Sequence[memoryview]) -> int:
        """Send the wire form of a part; return its bytes. Blocks; for the sender thread only.

        Raises LinkLost. Its kind says how this one connection ended; wait_lost() says how the session did.
        """
        try:
            return self._frames.send_part(views)
        except FtdError as error:
            self._tell_frames_lost(error)
            raise

    def receive_part(self, allocate: Callable[[int], memoryview]) -> memoryview:
        """Wait for the next part and return it whole; see FrameChannel.receive_part. For the receiver thread
        only.

        What `allocate` raises ends the session and is raised here.
        """
        try:
            return self._frames.receive_part(allocate)
        except FtdError as error:
            self._tell_frames_lost(error)
            raise
        except Exception as error:
            self._tell_frames_lost(LinkLost(LostKind.PROTOCOL, f"a part was not accepted: {friendly(error)}"))
            raise

    def _tell_frames_lost(self, error: FtdError) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._on_channel_lost, "frames", error)

    # ---- heartbeats --------------------------------------------------------------------------------------

    def set_beat(self, state: str, epoch: int) -> None:
        """What this side's heartbeats say from now on."""
        self._pulse.own_state, self._pulse.own_epoch = state, epoch

    @property
    def peer_state(self) -> str:
        """The peer's state as of its last heartbeat; "" before the first."""
        return self._pulse.peer_state

    @property
    def peer_epoch(self) -> int:
        """The peer's epoch as of its last heartbeat; 0 before the first."""
        return self._pulse.peer_epoch

    @property
    def heartbeats_missed(self) -> int:
        """How many times the peer became suspect."""
        return self._pulse.missed

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the peer was last heard."""
        return max(0, self._clock() - self._pulse.detector.last_heard_ns) / 1e9

    @property
    def verdict(self) -> Verdict:
        """What the detector thinks of the peer."""
        return self._pulse.detector.verdict

    async def until_sure(self) -> None:
        """Return at once; but after this side stood still, frozen or starved, for longer than a silent peer
        is waited for: once it has heard from the peer of now, which may have given it up. Raises LinkLost.
        """
        while self._pulse.doubts_itself(self._clock()):
            self._raise_if_lost()
            self._sure.clear()
            await self._sure.wait()

    def paths(self) -> list[PathState]:
        """How the paths are on which the peer is heard: the link first, then the further ones."""
        return self._pulse.paths.states()

    def attach_path(self, name: str, channel: Channel) -> None:
        """Take a connection that the peer made for a further path. Raises PeerError for an unknown one."""
        self._pulse.paths.attach(name, channel)

    def traffic(self) -> Mapping[Connection, tuple[int, int]]:
        """Bytes sent and received so far on each connection, without TLS's own."""
        return {
            "control": (self._control.sent_bytes, self._control.received_bytes),
            "heartbeat": (self._heartbeat.sent_bytes, self._heartbeat.received_bytes),
            "frames": (self._frames.sent_bytes, self._frames.received_bytes),
        }

    # ---- the end -----------------------------------------------------------------------------------------

    def _on_channel_lost(self, connection: Connection, error: FtdError) -> None:
        kind = error.kind if isinstance(error, LinkLost) else LostKind.PROTOCOL
        detail = error.detail if isinstance(error, LinkLost) else str(error)
        elsewhere = self._pulse.paths.living
        self._follow(self._rules.connection_ended(kind, detail, connection, elsewhere))

    def _on_link_silent(self, why: str) -> None:
        self._follow(self._rules.link_silent(why, self._pulse.paths.living))

    def _on_path_said(self, message: Goodbye | LinkCut, name: str) -> None:
        if isinstance(message, Goodbye):
            self._follow(self._rules.said_goodbye(message.reason))
        else:
            self._follow(self._rules.said_cut(message.reason, name))

    def _on_path_change(self, name: str, up: bool, detail: str) -> None:
        if self.lost is None:
            (_log.info if up else _log.warning)("heartbeat path", path=name, up=up, reason=one_line(detail))
            self.on_path(name, up, detail)

    def _on_missed(self) -> None:
        self.on_missed()

    def _on_path_lost(self, name: str) -> None:
        self._follow(self._rules.path_ended(self._pulse.paths.living))

    def _on_grace_over(self, ending: Ending) -> None:
        self._follow(self._rules.grace_over(ending, self._pulse.paths.living))

    def _follow(self, ending: Ending | None) -> None:
        """Do what the rules say."""
        if ending is None or self.lost is not None:
            return
        if ending.in_grace:
            grace = self._options.grace_seconds
            self._graces.append(self._loop.call_later(grace, self._on_grace_over, ending))
            return
        if ending.cut:
            self._pulse.paths.say(LinkCut(reason=ending.cut))
        self._end(ending.kind, ending.detail, ending.connection)

    def _end(
        self,
        kind: LostKind,
        detail: str,
        connection: Where,
        *,
        close_channels: bool = True,
    ) -> None:
        if self.lost is not None:
            return
        self._pulse.hear_progress()
        detector = self._pulse.detector
        now = self._clock()
        self.lost = LostReason(
            kind,
            one_line(detail),
            connection,
            detector.last_heard_ns,
            now,
            # A loss that follows from it is found some ticks later, at the latest when the limit is over.
            max(detector.lateness_ns, detector.stood_still_since(now - 2 * detector.limit_ns, now)),
        )
        self._pulse.stop()
        for grace in self._graces:
            grace.cancel()
        self._frames.shut()
        if close_channels:
            self._control.close()
            self._heartbeat.close()
            # The last words on further paths are to be read.
            self._farewell = self._loop.create_task(self._pulse.paths.finish(self._options.linger_seconds))
        for waiting in self._flights:
            if not waiting.done():
                waiting.set_exception(LinkLost(kind, self.lost.detail))
        self._news.set()
        self._ended.set()
        self._sure.set()
        log_it = _log.info if self.lost.planned else _log.warning
        log_it("link ended", peer=self.peer, reason=self.lost.kind, error=self.lost.detail)
        if self.on_end is not None:
            self.on_end(self)

    async def wait_lost(self) -> LostReason:
        """Wait until the session has ended, and return how. Any number of tasks may wait, at any time."""
        await self._ended.wait()
        if self.lost is None:
            raise AssertionError("a session that has ended knows why")
        return self.lost

    async def close(self, reason: str) -> None:
        """Say goodbye and close; returns when the peer has read it, after linger_seconds at most.

        A thread in send_part or receive_part is woken at once, with LinkLost(CLOSED).
        """
        if self.lost is None:
            goodbye = encode(Goodbye(reason=reason))
            with suppress(FtdError):
                self._control.write(MessageType.CONTROL, goodbye)
            with suppress(FtdError):
                self._heartbeat.write(MessageType.HEARTBEAT, goodbye)
            self._pulse.paths.say(Goodbye(reason=reason))
            self._end(LostKind.CLOSED, reason, "session", close_channels=False)
            linger = self._options.linger_seconds
            await asyncio.gather(
                self._control.finish(linger), self._heartbeat.finish(linger), self._pulse.paths.finish(linger)
            )
        self.abort(reason)

    def abort(self, reason: str) -> None:
        """Close without a goodbye: to the peer it looks as if this daemon had died."""
        self._end(LostKind.CLOSED, reason, "session")
        self._control.close()
        self._heartbeat.close()
        if self._farewell is None:
            self._pulse.paths.close()
