"""The link between primary and backup: three TCP connections that live and end together, as a `Session`.

    control     data port        both ways    Hello first, then acknowledgements and control messages   event
    loop
    frames      data port        to backup    parts of frames                                            a
    thread
    heartbeat   heartbeat port   both ways    signs of life, which must not wait behind a frame          event
    loop

The primary connects, the backup listens. Control comes first: its Hello is what the backup admits or refuses;
the other two show the same session id. Each connection has TLS of its own, with certificates on both sides.

How a session ends is said by `wait_lost()`, once and for good (LostKind):

    goodbye    the peer said so, on control and on heartbeat: a planned stop
    reset      control ended without it: the daemon there died. Known at once, as its kernel says so
    silence    nothing heard for interval × misses (ftd.detector), or the path takes no data: the host is gone
    stalled    the peer's daemon is there but takes or sends no bytes of a part
    protocol   the peer sent what it may not
    closed     this side called close()

Control decides: what else the peer wanted to say (that the guest shut down, say) is on its way there, and
packets of several connections overtake each other. So when frames or heartbeat end first, control gets
`grace_seconds` to end, too, before the session counts as lost for that other reason. Messages that came
before the end can still be taken with `receive()` after it, and must be, before anybody takes over.

With further paths for heartbeats, silence is silence on all of them. A link that alone is silent has
`patience_seconds` to come back; nothing is committed meanwhile, so nothing of the guest's output is released.
Control that ends by a reset counts as cut when a further path goes on for longer than the grace: the kernel
of a daemon that died resets all of its connections at once. Who gives a session up as cut says so on the
further paths, so that the other side, to which the link may look whole, comes to the same end.
"""

import asyncio
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from ftd import log
from ftd.channel import Channel, FrameChannel, tune
from ftd.detector import HeartbeatDetector, Verdict
from ftd.errors import FtdError, HostError, LinkError, NothingToResume, PeerError, friendly
from ftd.messages import (
    ControlMessage,
    Flight,
    FlightWanted,
    Goodbye,
    Heartbeat,
    HeartbeatSettings,
    Hello,
    LinkCut,
    Refusal,
    Welcome,
    decode,
    encode,
    one_line,
)
from ftd.metrics import Connection, Rejection
from ftd.paths import RETRY_SECONDS, Paths, PathSettings, PathState
from ftd.tls import Identity
from ftd.wire import (
    PAYLOAD_LIMITS,
    PROTOCOL_VERSION,
    LinkLost,
    LostKind,
    MessageType,
    VersionMismatch,
)

__all__ = [
    "LinkLost",
    "LinkOptions",
    "Listener",
    "LostKind",
    "LostReason",
    "Session",
    "connect",
]

_log = log.get(__name__)

_HANDSHAKE_ONLY = {MessageType.HANDSHAKE: PAYLOAD_LIMITS[MessageType.HANDSHAKE]}
_CONTROL_ONLY = {MessageType.CONTROL: PAYLOAD_LIMITS[MessageType.CONTROL]}
_HEARTBEAT_ONLY = {MessageType.HEARTBEAT: PAYLOAD_LIMITS[MessageType.HEARTBEAT]}

# Control messages that wait to be received; above the first the peer is made to wait, below the second no
# longer.
_INBOX_FULL, _INBOX_ROOM = 1024, 256


@dataclass(frozen=True)
class LinkOptions:
    """What both sides of the link need to know; times in seconds, sizes in bytes."""

    identity: Identity | None  # None: no TLS at all (insecure = true)
    heartbeat: HeartbeatSettings
    # For a connection to get through TCP, TLS and Hello, and for a session to get its three connections
    # together.
    handshake_seconds: float = 5.0
    # A part, once begun, may stand still for so long. Generous: a host or path that is gone is the
    # detector's.
    stall_seconds: float = 30.0
    # The kernel gives a connection up when sent data stays unacknowledged for so long: the last resort.
    user_timeout_seconds: float = 20.0
    # For a goodbye to be read by the peer before this side closes regardless.
    linger_seconds: float = 1.0
    # For control to tell why, when another connection ends first.
    grace_seconds: float = 0.25
    # Further paths for heartbeats, and for how long the link alone may be silent.
    paths: tuple[PathSettings, ...] = ()
    patience_seconds: float = 2.0
    max_part_bytes: int = PAYLOAD_LIMITS[MessageType.PART]
    # Accepted connections whose Hello has not come; above it, the oldest has to go.
    max_pending: int = 16
    max_sessions: int = 1


@dataclass(frozen=True)
class LostReason:
    """How a session ended. Times are of the session's clock (monotonic), in nanoseconds."""

    kind: LostKind
    detail: str
    connection: Connection | Literal["session"]
    last_heard_ns: int
    decided_ns: int
    # How long this side itself had stood still when the session ended.
    stood_still_ns: int = 0

    @property
    def planned(self) -> bool:
        """Whether one of the two sides wanted it: no failure, nobody takes over because of it."""
        return self.kind in (LostKind.GOODBYE, LostKind.CLOSED)

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


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
        # As of the peer's last heartbeat; "" and 0 before the first.
        self.peer_state = ""
        self.peer_epoch = 0
        self.heartbeats_missed = 0  # times that the peer became suspect
        self._own_state, self._own_epoch = "connected", 0
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._options = options
        self._on_lateness = on_lateness
        self.on_end: Callable[[Session], None] | None = None  # the listener's, which keeps count
        # Told of each path that goes down or up: its name, which, and why.
        self.on_path: Callable[[str, bool, str], None] = lambda name, up, detail: None
        # Makes this side's answer to a FlightWanted.
        self.flight: Callable[[], Coroutine[Any, Any, Flight]] | None = None
        self._flights: deque[asyncio.Future[Flight]] = deque()  # that were asked for
        self._answers: set[asyncio.Task[None]] = set()
        self._control, self._heartbeat, self._frames = control, heartbeat, frames
        self._inbox: deque[ControlMessage] = deque()
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._ending: LostReason | None = None  # what holds if control says nothing within the grace
        self._reset: str | None = None  # how control ended, while a further path goes on
        self._farewell: asyncio.Task[None] | None = None
        self._detector = HeartbeatDetector(
            self.heartbeat.interval_ms * 1_000_000, self.heartbeat.misses, clock()
        )
        self._paths = Paths(
            options.paths,
            self.heartbeat,
            clock=clock,
            allowance_seconds=options.handshake_seconds,
            on_heard=self._on_path_heard,
            on_said=self._on_path_said,
            on_lost=self._on_path_lost,
            on_change=self._on_path_change,
            dial=dial,
        )
        self._beats_sent = 0
        self._beats_heard = 0
        self._period = self._detector.period_ns / 1e9
        self._tick_at = self._loop.time()
        self._beat_due = True
        self._progress_ns = 0
        self._timers: list[asyncio.TimerHandle] = [self._loop.call_at(self._tick_at, self._tick)]
        control.listen(_CONTROL_ONLY, self._on_control, lambda error: self._on_channel_lost("control", error))
        heartbeat.listen(
            _HEARTBEAT_ONLY, self._on_heartbeat, lambda error: self._on_channel_lost("heartbeat", error)
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
        self._own_state, self._own_epoch = state, epoch

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the peer was last heard."""
        return max(0, self._clock() - self._detector.last_heard_ns) / 1e9

    def paths(self) -> list[PathState]:
        """How the paths are on which the peer is heard: the link first, then the further ones."""
        return self._paths.states()

    def attach_path(self, name: str, channel: Channel) -> None:
        """Take a connection that the peer made for a further path. Raises PeerError for an unknown one."""
        self._paths.attach(name, channel)

    @property
    def verdict(self) -> Verdict:
        """What the detector thinks of the peer."""
        return self._detector.verdict

    @property
    def stood_still(self) -> float:
        """Seconds for which this side itself has not run, beyond what is usual: frozen, or starved."""
        return self._detector.stood_still_ns(self._clock()) / 1e9

    def traffic(self) -> Mapping[Connection, tuple[int, int]]:
        """Bytes sent and received so far on each connection, without TLS's own."""
        return {
            "control": (self._control.sent_bytes, self._control.received_bytes),
            "heartbeat": (self._heartbeat.sent_bytes, self._heartbeat.received_bytes),
            "frames": (self._frames.sent_bytes, self._frames.received_bytes),
        }

    def _tick(self) -> None:
        # The loop hands out what sockets have to say before timers that are due in the same round. So
        # whatever came while this process was not scheduled has been heard before the detector is asked.
        if self.lost is not None:
            return
        now = self._clock()
        going_on = self._look(now)
        if self._on_lateness is not None:
            self._on_lateness(self._detector.lateness_ns / 1e9)
        if not going_on:
            return
        if self._beat_due:
            self._beat(now)
        self._beat_due = not self._beat_due
        if self.lost is None:
            self._tick_at = max(self._tick_at + self._period, self._loop.time())
            self._timers[0] = self._loop.call_at(self._tick_at, self._tick)

    def _look_at_deadline(self) -> None:
        if self.lost is None:
            self._look(self._clock())

    def _look(self, now: int) -> bool:
        """Ask the detectors. Returns whether the session goes on, or has been ended."""
        self._hear_progress()
        before = self._detector.verdict
        verdict = self._detector.tick(now)
        if verdict is Verdict.SILENT:
            age = (now - self._detector.last_heard_ns) / 1e6
            self._end(
                LostKind.SILENCE,
                f"nothing heard from {self.peer} for {age:.0f} ms (limit {self.heartbeat.limit_ms} ms)",
                "heartbeat",
            )
            return False
        self._paths.tick(now)
        down = self._paths.link_down(now)
        if down is not None and down >= self._options.patience_seconds:
            self._end_cut(f"nothing heard on the link for {down + self.heartbeat.limit_ms / 1000:.1f} s")
            return False
        if verdict is Verdict.SUSPECT and before is Verdict.ALIVE:
            self.heartbeats_missed += 1
            _log.debug("heartbeat missing", peer=self.peer)
        # Not half an interval later, at the next tick. A look that was too late has to wait for that all the
        # same: there is no time left then.
        left = self._detector.deadline_ns() - now
        if 0 < left < self._detector.period_ns:
            self._loop.call_later(left / 1e9, self._look_at_deadline)
        return True

    def _beat(self, now: int) -> None:
        self._paths.beat(self._own_state, self._own_epoch)
        if self._heartbeat.unsent_bytes:
            return  # the path takes nothing; old heartbeats would be worth nothing later
        beat = Heartbeat(sequence=self._beats_sent, sent_ns=now, state=self._own_state, epoch=self._own_epoch)
        self._beats_sent += 1
        try:
            self._heartbeat.write(MessageType.HEARTBEAT, encode(beat))
        except FtdError as error:
            self._on_channel_lost("heartbeat", error)

    def _hear_progress(self) -> None:
        """Bytes of a part are a sign of life, too: on a narrow path they delay the heartbeats."""
        progress = self._frames.progress_ns
        if progress != self._progress_ns:
            self._progress_ns = progress
            self._detector.heard(progress)
            self._paths.hear_link(progress)

    def _on_heartbeat(self, type_: MessageType, payload: bytearray) -> None:
        message = decode(type_, payload)
        if isinstance(message, Goodbye):
            self._await_control(LostKind.GOODBYE, message.reason, "heartbeat")
        elif isinstance(message, Heartbeat):
            if message.sequence != self._beats_heard:
                raise LinkLost(
                    LostKind.PROTOCOL,
                    f"the peer sent heartbeat {message.sequence}, expected {self._beats_heard}",
                )
            self._beats_heard += 1
            now = self._clock()
            self._detector.heard(now)
            self._paths.hear_link(now)
            self.peer_state, self.peer_epoch = message.state, message.epoch

    # ---- further paths -----------------------------------------------------------------------------------

    def _on_path_heard(self, now: int, message: Heartbeat) -> None:
        self._detector.heard(now)
        self.peer_state, self.peer_epoch = message.state, message.epoch

    def _on_path_said(self, message: Goodbye | LinkCut, name: str) -> None:
        if isinstance(message, Goodbye):
            self._await_control(LostKind.GOODBYE, message.reason, "heartbeat")
        elif self._reset is not None:
            self._end(LostKind.CUT, f"said on {name}: {message.reason}", "session")
        else:
            self._await_control(LostKind.CUT, f"said on {name}: {message.reason}", "heartbeat")

    def _on_path_change(self, name: str, up: bool, detail: str) -> None:
        if self.lost is None:
            (_log.info if up else _log.warning)("heartbeat path", path=name, up=up, reason=one_line(detail))
            self.on_path(name, up, detail)

    def _on_path_lost(self, name: str) -> None:
        if self._reset is not None and not self._paths.living:
            self._end(LostKind.RESET, self._reset, "control")

    def _end_cut(self, why: str) -> None:
        """Give the session up and say so where the peer may hear it."""
        heard = ", ".join(self._paths.living)
        self._paths.say(LinkCut(reason=why))
        self._end(LostKind.CUT, f"{why}; the peer is heard on {heard}", "session")

    def _on_control(self, type_: MessageType, payload: bytearray) -> None:
        message = decode(type_, payload)
        if isinstance(message, Goodbye):
            self._end(LostKind.GOODBYE, message.reason, "control")
            return
        now = self._clock()
        self._detector.heard(now)
        self._paths.hear_link(now)
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

    # ---- the end -----------------------------------------------------------------------------------------

    def _on_channel_lost(self, connection: Connection, error: FtdError) -> None:
        kind = error.kind if isinstance(error, LinkLost) else LostKind.PROTOCOL
        detail = error.detail if isinstance(error, LinkLost) else str(error)
        if kind is LostKind.RESET and connection != "control":
            self._await_control(kind, detail, connection)
        elif kind is LostKind.RESET and self._ending is not None and self._ending.kind is LostKind.CUT:
            self._end(LostKind.CUT, self._ending.detail, "session")
        elif kind is LostKind.RESET and self._paths.living:
            if self._reset is None:
                self._reset = detail
                self._after_grace(kind, detail, connection)
        else:
            self._end_or_cut(kind, detail, connection)

    def _await_control(self, kind: LostKind, detail: str, connection: Connection) -> None:
        if self.lost is None and self._ending is None:
            self._ending = LostReason(kind, detail, connection, self._detector.last_heard_ns, self._clock())
            self._after_grace(kind, detail, connection)

    def _after_grace(self, kind: LostKind, detail: str, connection: Connection) -> None:
        self._timers.append(
            self._loop.call_later(self._options.grace_seconds, self._end_or_cut, kind, detail, connection)
        )

    def _end_or_cut(self, kind: LostKind, detail: str, connection: Connection) -> None:
        """End the session; a connection that was lost while the peer is heard elsewhere was cut."""
        if kind in (LostKind.RESET, LostKind.SILENCE) and self._paths.living and self.lost is None:
            self._end_cut(detail)
        else:
            self._end(kind, detail, connection)

    def _end(
        self,
        kind: LostKind,
        detail: str,
        connection: Connection | Literal["session"],
        *,
        close_channels: bool = True,
    ) -> None:
        if self.lost is not None:
            return
        self._hear_progress()
        now = self._clock()
        self.lost = LostReason(
            kind,
            one_line(detail),
            connection,
            self._detector.last_heard_ns,
            now,
            max(self._detector.stood_still_ns(now), self._detector.lateness_ns),
        )
        for timer in self._timers:
            timer.cancel()
        self._frames.shut()
        if close_channels:
            self._control.close()
            self._heartbeat.close()
            # The last words on further paths are to be read.
            self._farewell = self._loop.create_task(self._paths.finish(self._options.linger_seconds))
        for waiting in self._flights:
            if not waiting.done():
                waiting.set_exception(LinkLost(kind, self.lost.detail))
        self._news.set()
        self._ended.set()
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
            self._paths.say(Goodbye(reason=reason))
            self._end(LostKind.CLOSED, reason, "session", close_channels=False)
            linger = self._options.linger_seconds
            await asyncio.gather(
                self._control.finish(linger), self._heartbeat.finish(linger), self._paths.finish(linger)
            )
        self.abort(reason)

    def abort(self, reason: str) -> None:
        """Close without a goodbye: to the peer it looks as if this daemon had died."""
        self._end(LostKind.CLOSED, reason, "session")
        self._control.close()
        self._heartbeat.close()
        if self._farewell is None:
            self._paths.close()


# ---- connecting side ---------------------------------------------------------------------------------------


async def connect(
    options: LinkOptions,
    hello: Hello,
    *,
    host: str,
    port: int,
    heartbeat_port: int,
    peer_name: str = "",
    source: str = "",
    on_lateness: Callable[[float], None] | None = None,
) -> Session:
    """Connect to the peer's listener, all three connections, within options.handshake_seconds.

    `peer_name` is what the peer's certificate must be for (default: `host`), `source` this side's address
    (default: the kernel's choice). Raises PeerError, one line, if the peer is incompatible, somebody else, or
    refused; LinkError if it cannot be reached: worth another try.
    """
    name = peer_name or host
    channels: dict[Connection, Channel] = {}
    frames: FrameChannel | None = None

    async def dial(path: PathSettings) -> Channel:
        return await _dial(options, hello, path, heartbeat_port, name)

    async def one(connection: Connection) -> Welcome:
        to = heartbeat_port if connection == "heartbeat" else port
        channels[connection] = channel = await _open(options, connection, host, to, source)
        return await _introduce(options, channel, hello.model_copy(update={"channel": connection}), name)

    try:
        async with asyncio.timeout(options.handshake_seconds):
            welcome = await one("control")
            # A TaskGroup would wrap the error in a group; the first one is all that anybody wants to read.
            await _all_or_first_error(one("frames"), one("heartbeat"))
        sock, next_out, next_in = channels.pop("frames").detach()
        frames = _frame_channel(options, sock, f"{host}:{port}", next_out, next_in)
        return Session(
            hello,
            welcome,
            channels.pop("control"),
            channels.pop("heartbeat"),
            frames,
            options,
            peer_node=welcome.node,
            on_lateness=on_lateness,
            dial=dial,
        )
    except TimeoutError:
        raise LinkError(
            f"{host}:{port}: no answer within {options.handshake_seconds:g} s; "
            "is the host up, and ftd running there?"
        ) from None
    except LinkLost as error:
        if isinstance(error, VersionMismatch):
            raise PeerError(f"{host}:{port}: {error.detail}") from None
        raise LinkError(f"cannot connect: {error.detail}") from None
    finally:
        for channel in channels.values():
            channel.close()


async def _dial(options: LinkOptions, hello: Hello, path: PathSettings, port: int, name: str) -> Channel:
    """Connect on a further path. Raises PeerError and LinkError."""
    channel: Channel | None = None
    try:
        async with asyncio.timeout(options.handshake_seconds):
            channel = await _open(options, "heartbeat", path.peer, port, path.listen)
            await _introduce(
                options, channel, hello.model_copy(update={"channel": "heartbeat", "path": path.name}), name
            )
    except TimeoutError:
        if channel is not None:
            channel.close()
        raise LinkError(f"{path.peer}:{port}: no answer within {options.handshake_seconds:g} s") from None
    except BaseException:
        if channel is not None:
            channel.close()
        raise
    return channel


async def _readable(sock: socket.socket) -> None:
    """Wait until something can be read, or accepted, from sock."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def _open(options: LinkOptions, connection: Connection, host: str, port: int, source: str) -> Channel:
    loop = asyncio.get_running_loop()
    where = f"{host}:{port}"
    sock: socket.socket | None = None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, type_, protocol, _, address = found[0]
        sock = socket.socket(family, type_, protocol)
        sock.setblocking(False)
        tune(sock, user_timeout_seconds=options.user_timeout_seconds, urgent=connection != "frames")
        if source:
            sock.bind((source, 0))
        await loop.sock_connect(sock, address)
        return Channel(sock, connection, where)
    except socket.gaierror as error:
        raise LinkError(f"peer {host}: {(error.strerror or str(error)).lower()}; give its address") from None
    except OSError as error:
        if sock is not None:
            sock.close()
        reason = (os.strerror(error.errno) if error.errno else str(error)).lower()
        remedy = "is ftd running there?" if isinstance(error, ConnectionRefusedError) else "is the path up?"
        raise LinkError(f"{where}: {reason}; {remedy}") from None
    except BaseException:
        if sock is not None:
            sock.close()
        raise


async def _introduce(options: LinkOptions, channel: Channel, hello: Hello, name: str) -> Welcome:
    if options.identity is not None:
        await channel.start_tls(options.identity, server_side=False, peer_name=name)
    channel.write(MessageType.HANDSHAKE, encode(hello))
    answer = decode(*await channel.receive(_HANDSHAKE_ONLY))
    if isinstance(answer, Refusal):
        kind = NothingToResume if answer.lost else PeerError
        raise kind(f"{channel.peer} refused: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise LinkLost(
            LostKind.PROTOCOL, f"{channel.where}: the peer answered with a {answer.kind}, expected a welcome"
        )
    if answer.protocol != PROTOCOL_VERSION:
        raise VersionMismatch(answer.protocol)
    return answer


async def _all_or_first_error(*coroutines: Coroutine[Any, Any, Welcome]) -> None:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _frame_channel(
    options: LinkOptions, sock: socket.socket, peer: str, next_out: int, next_in: int
) -> FrameChannel:
    return FrameChannel(
        sock,
        peer,
        next_out=next_out,
        next_in=next_in,
        max_part_bytes=options.max_part_bytes,
        stall_seconds=options.stall_seconds,
    )


# ---- listening side ----------------------------------------------------------------------------------------


class _RejectedError(Exception):
    """A connection is not taken; `answer` is told to the peer."""

    def __init__(self, label: Rejection, reason: str, *, answer: bool = True, lost: bool = False) -> None:
        super().__init__(reason)
        self.label: Rejection = label
        self.answer = answer
        self.lost = lost


@dataclass(eq=False)
class _Forming:
    """A session that was admitted and has not got its three connections yet."""

    hello: Hello
    welcome: Welcome
    control: Channel
    others: dict[Connection, Channel] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        for channel in (self.control, *self.others.values()):
            channel.close()


class Listener:
    """The backup's side: accepts connections on two ports, checks them, and delivers whole sessions.

    `admit(hello)` decides about a control connection, and is not asked while `max_sessions` are active. What
    it raises as FtdError becomes a refusal with that text.
    `peer_name` is what the peer's certificate must be for; None takes any of the authority.
    `on_session` gets each session at the moment it is complete. `on_rejected` is called once for each
    connection that was closed instead, after its log line.
    """

    def __init__(
        self,
        options: LinkOptions,
        *,
        host: str,
        port: int,
        heartbeat_port: int,
        peer_name: str | None,
        admit: Callable[[Hello], Welcome | Refusal],
        on_session: Callable[[Session], None],
        on_rejected: Callable[[Rejection], None] | None = None,
        on_lateness: Callable[[float], None] | None = None,
    ) -> None:
        self._options = options
        self._host = host
        self._wanted = (port, heartbeat_port)
        self._peer_name = peer_name
        self._admit = admit
        self._on_session = on_session
        self._on_rejected = on_rejected
        self._on_lateness = on_lateness
        self._sockets: list[socket.socket] = []  # data, heartbeat, and heartbeat of each further path
        self._acceptors: list[asyncio.Task[None]] = []
        self._pending: dict[asyncio.Task[None], None] = {}  # ordered: the oldest first
        self._farewells: set[asyncio.Task[None]] = set()
        self._forming: dict[UUID, _Forming] = {}
        self._sessions: dict[UUID, Session] = {}

    @property
    def ports(self) -> tuple[int, int]:
        """The data port and the heartbeat port as bound."""
        data, heartbeat = (sock.getsockname()[1] for sock in self._sockets[:2])
        return data, heartbeat

    @property
    def forming(self) -> bool:
        """Whether a session was admitted whose connections are not all there yet."""
        return bool(self._forming)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions that have not ended."""
        return tuple(self._sessions.values())

    async def start(self) -> None:
        """Bind and listen. Raises HostError, one line, when a port cannot be had."""
        try:
            for port in self._wanted:
                self._sockets.append(await self._bind(self._host, port))
        except BaseException:
            self._close_sockets()
            raise
        loop = asyncio.get_running_loop()
        for sock, connection in zip(self._sockets, ("data", "heartbeat"), strict=True):
            self._acceptors.append(loop.create_task(self._accept(sock, heartbeat=connection == "heartbeat")))
        for path in self._options.paths:
            self._acceptors.append(loop.create_task(self._listen_on(path)))

    async def _listen_on(self, path: PathSettings) -> None:
        """Accept on a further path. An interface that is down is no reason not to start: it may come up."""
        told = ""
        while True:
            try:
                sock = await self._bind(path.listen, self.ports[1])
                break
            except HostError as error:
                if str(error) != told:
                    told = str(error)
                    _log.warning("no heartbeats on a path", path=path.name, reason=told)
                await asyncio.sleep(RETRY_SECONDS)
        self._sockets.append(sock)
        await self._accept(sock, heartbeat=True, path=path.name)

    async def _bind(self, host: str, port: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as error:
            raise HostError(
                f"listen = {host}: {(error.strerror or str(error)).lower()}; give an address of this host"
            ) from None
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(self._options.max_pending)
        except OSError as error:
            sock.close()
            user = _port_user(port) if error.errno == errno.EADDRINUSE else ""
            reason = friendly(OSError(error.errno, error.strerror))
            raise HostError(f"listen = {host}, port {port}{user}: {reason}") from None
        return sock

    async def close(self) -> None:
        """Stop listening and drop what is not a session yet. Sessions go on; close them yourself."""
        tasks = [*self._acceptors, *self._pending, *self._farewells]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_sockets()
        for forming in list(self._forming.values()):
            forming.close()
        self._forming.clear()

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    async def _accept(self, listening: socket.socket, *, heartbeat: bool, path: str = "") -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Not loop.sock_accept: cancelled at the very moment at which somebody connects, it reports the
            # connection to a future that is done (InvalidStateError) and drops it. Here nothing is awaited
            # between the connection and its task.
            await _readable(listening)
            try:
                sock, address = listening.accept()
                sock.setblocking(False)
            except (BlockingIOError, InterruptedError):
                continue  # it left again
            except OSError as error:
                # Out of descriptors, or the peer left already. Neither ends the listener; the first needs a
                # rest.
                _log.warning("connection not accepted", error=friendly(error))
                await asyncio.sleep(0.1)
                continue
            if len(self._pending) >= self._options.max_pending:
                # An honest handshake takes milliseconds, so the oldest is the least likely to be one.
                next(iter(self._pending)).cancel("made room for newer connections")
                await asyncio.sleep(0)
            peer = f"{address[0]}:{address[1]}"
            task = loop.create_task(self._serve(sock, peer, heartbeat=heartbeat, path=path))
            self._pending[task] = None
            task.add_done_callback(lambda done: self._pending.pop(done, None))

    async def _serve(self, sock: socket.socket, peer: str, *, heartbeat: bool, path: str) -> None:
        """See one connection through its handshake."""
        try:
            tune(sock, user_timeout_seconds=self._options.user_timeout_seconds, urgent=heartbeat)
            channel = Channel(sock, "heartbeat" if heartbeat else "data", peer)
        except OSError as error:
            sock.close()
            self._rejected(peer, "garbage", friendly(error))
            return
        try:
            async with asyncio.timeout(self._options.handshake_seconds):
                hello = await self._read_hello(channel)
            self._take(channel, hello, heartbeat=heartbeat, path=path)
        except _RejectedError as error:
            self._reject(channel, error.label, str(error), answer=error.answer, lost=error.lost)
        except TimeoutError:
            self._reject(
                channel, "timeout", f"no hello within {self._options.handshake_seconds:g} s", answer=False
            )
        except VersionMismatch as error:
            self._reject(channel, "incompatible", error.detail)
        except LinkLost as error:
            self._reject(channel, "garbage", error.detail)
        except PeerError as error:
            self._reject(channel, "tls", str(error), answer=not channel.secure)
        except asyncio.CancelledError as error:
            channel.close()
            if not error.args:
                raise
            self._rejected(peer, "timeout", str(error))
        except BaseException:
            channel.close()
            raise

    async def _read_hello(self, channel: Channel) -> Hello:
        if self._options.identity is not None:
            await channel.start_tls(self._options.identity, server_side=True, peer_name=self._peer_name)
        hello = decode(*await channel.receive(_HANDSHAKE_ONLY))
        if not isinstance(hello, Hello):
            raise _RejectedError("garbage", f"the first message was a {hello.kind}, expected a hello")
        return hello

    def _take(self, channel: Channel, hello: Hello, *, heartbeat: bool, path: str) -> None:
        channel.name = hello.channel
        if hello.protocol != PROTOCOL_VERSION:
            raise VersionMismatch(hello.protocol)
        if (hello.channel == "heartbeat") != heartbeat:
            raise _RejectedError(
                "incompatible",
                f"a {hello.channel} connection on the {'heartbeat' if heartbeat else 'data'} port; "
                "port and heartbeat_port must be the same on both hosts",
            )
        if hello.path != path:
            raise _RejectedError(
                "incompatible",
                f"a connection for heartbeat path {hello.path or 'link'} on the address of "
                f"{path or 'link'}; [[heartbeat.path]] must name the same paths on both hosts",
            )
        if hello.channel == "heartbeat" and hello.path:
            self._take_path(channel, hello)
        elif hello.channel == "control":
            self._take_control(channel, hello)
        else:
            self._take_other(channel, hello)

    def _take_control(self, channel: Channel, hello: Hello) -> None:
        if hello.session in self._forming or hello.session in self._sessions:
            raise _RejectedError("refused", f"session {hello.session} exists already")
        if len(self._sessions) >= self._options.max_sessions:
            with_ = ", ".join(f"{session.peer_node} ({session.peer})" for session in self._sessions.values())
            raise _RejectedError("refused", f"this side is connected with {with_} already")
        try:
            answer = self._admit(hello)
        except FtdError as error:
            raise _RejectedError("refused", str(error)) from None
        except Exception as error:
            _log.exception("hello could not be judged", error, peer=channel.peer)
            raise _RejectedError("refused", "internal error, see the log of this side") from None
        if isinstance(answer, Refusal):
            raise _RejectedError("refused", answer.reason, lost=answer.lost)
        # A primary that failed half way and tries again must not have to wait for its own remains.
        while len(self._forming) >= self._options.max_sessions:
            self._give_up(next(iter(self._forming)), "another session began")
        forming = _Forming(hello, answer, channel)
        forming.timer = asyncio.get_running_loop().call_later(
            self._options.handshake_seconds,
            self._give_up,
            hello.session,
            f"its connections did not all come within {self._options.handshake_seconds:g} s",
        )
        self._forming[hello.session] = forming
        self._send_welcome(channel, answer)

    def _take_other(self, channel: Channel, hello: Hello) -> None:
        forming = self._forming.get(hello.session)
        if forming is None:
            raise _RejectedError("refused", f"session {hello.session} is not known; begin with control")
        if hello.channel in forming.others:
            raise _RejectedError("refused", f"session {hello.session} has its {hello.channel} connection")
        connection: Connection = hello.channel
        self._send_welcome(channel, forming.welcome)
        forming.others[connection] = channel
        if len(forming.others) == 2:
            self._complete(forming)

    def _take_path(self, channel: Channel, hello: Hello) -> None:
        session = self._sessions.get(hello.session)
        if session is None:
            raise _RejectedError("refused", f"session {hello.session} is not known; begin with control")
        self._send_welcome(channel, session.welcome)
        session.attach_path(hello.path, channel)

    def _forget(self, session: Session) -> None:
        self._sessions.pop(session.id, None)

    def _send_welcome(self, channel: Channel, welcome: Welcome) -> None:
        channel.write(MessageType.HANDSHAKE, encode(welcome))

    def _give_up(self, session: UUID, reason: str) -> None:
        forming = self._forming.pop(session, None)
        if forming is not None:
            forming.close()
            self._rejected(forming.control.peer, "timeout", f"session given up: {reason}")

    def _complete(self, forming: _Forming) -> None:
        del self._forming[forming.hello.session]
        if forming.timer is not None:
            forming.timer.cancel()
        try:
            sock, next_out, next_in = forming.others["frames"].detach()
        except LinkLost as error:
            forming.close()
            self._rejected(forming.control.peer, "garbage", error.detail)
            return
        session = Session(
            forming.hello,
            forming.welcome,
            forming.control,
            forming.others["heartbeat"],
            _frame_channel(self._options, sock, forming.others["frames"].peer, next_out, next_in),
            self._options,
            peer_node=forming.hello.node,
            on_lateness=self._on_lateness,
        )
        self._sessions[session.id] = session
        session.on_end = self._forget
        _log.info("link up", peer=session.peer, node=session.peer_node, session=session.id)
        self._on_session(session)

    # ---- refusing ----------------------------------------------------------------------------------------

    def _reject(
        self, channel: Channel, label: Rejection, reason: str, *, answer: bool = True, lost: bool = False
    ) -> None:
        self._rejected(channel.peer, label, reason)
        if answer:
            with suppress(FtdError):
                channel.write(MessageType.HANDSHAKE, encode(Refusal(reason=reason, lost=lost)))
        # In a task of its own: the peer's leisure must not take a place among the pending ones.
        if len(self._farewells) >= self._options.max_pending:
            channel.close()
            return
        seconds = min(self._options.linger_seconds, self._options.handshake_seconds)
        task = asyncio.get_running_loop().create_task(channel.finish(seconds))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)
        task.add_done_callback(lambda done: channel.close())

    def _rejected(self, peer: str, label: Rejection, reason: str) -> None:
        _log.warning("connection rejected", peer=peer, kind=label, reason=one_line(reason))
        if self._on_rejected is not None:
            self._on_rejected(label)


def _port_user(port: int) -> str:
    """Say which process listens on a port of this network namespace, if /proc tells; else nothing."""
    wanted = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    wanted.add(f"socket:[{fields[9]}]")
    if not wanted:
        return ""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(descriptor.readlink()) in wanted:
                process = descriptor.parent.parent
                name = (process / "comm").read_text().strip()
                return f" (held by {name}, process {process.name})"
    return ""
