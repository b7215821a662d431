"""The paths on which the two nodes of a session hear each other: the link, and those of [[heartbeat.path]].

The link carries frames, control messages and heartbeats of its own, and its connections are the session
(ftd/link). A further path carries heartbeats only. Its connection is made by the primary beside the
session, comes and goes without ending it, and is made again for as long as the session lasts.

A path is up from the first thing heard on it until nothing was heard for interval × misses. The peer is
silent when nothing was heard on any; that is the session's own detector. What is said here:

    living      further paths that are up: somebody is there, whatever the link does
    link_down   for how long the link has been silent
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ftd import log
from ftd.channel import Channel
from ftd.config.paths import LINK_PATH
from ftd.detector import HeartbeatDetector, Verdict
from ftd.errors import FtdError, LinkError, PeerError, friendly
from ftd.messages import Goodbye, Heartbeat, HeartbeatSettings, LinkCut, decode, encode
from ftd.wire import PAYLOAD_LIMITS, LinkLost, LostKind, MessageType

_log = log.get(__name__)

# Between two attempts to connect on a path. A refusal needs a person, so it is repeated less often.
RETRY_SECONDS = 1.0
RETRY_AFTER_REFUSAL_SECONDS = 5.0

_HEARTBEAT_ONLY = {MessageType.HEARTBEAT: PAYLOAD_LIMITS[MessageType.HEARTBEAT]}


@dataclass(frozen=True)
class PathSettings:
    """A further path: its name on both nodes, this node's address on it, and the other's."""

    name: str
    listen: str
    peer: str


@dataclass(frozen=True)
class PathState:
    """How a path is. heard_age: seconds since the peer was last heard on it, None for never.

    detail: why it is down.
    """

    name: str
    up: bool
    heard_age: float | None
    detail: str


class _Path:
    """One path; `detail` says why it is down."""

    def __init__(self, name: str, detector: HeartbeatDetector, *, up: bool) -> None:
        self.name = name
        self.detector = detector
        self.up = up
        self.told: bool | None = up or None  # what on_change said last
        self.heard_ns: int | None = None
        self.down_since_ns: int | None = None
        self.detail = "no connection yet"
        self.channel: Channel | None = None
        self.lost = asyncio.Event()  # its connection has ended, or is of no use
        self.sent = self.expected = 0


class Paths:
    """All paths of a session. Belongs to the event loop.

    on_heard: something came on any path, at that time. on_said: a Goodbye or LinkCut on a further path, and
    the path's name. on_change(name, up, detail): a path went down or up. on_lost(name): the connection of a
    further path has ended, and not by close(). dial: makes the connection of a path; None on the side that
    listens.
    """

    def __init__(
        self,
        settings: Sequence[PathSettings],
        heartbeat: HeartbeatSettings,
        *,
        clock: Callable[[], int],
        allowance_seconds: float,
        on_heard: Callable[[int, Heartbeat], None],
        on_said: Callable[[Goodbye | LinkCut, str], None],
        on_lost: Callable[[str], None],
        on_change: Callable[[str, bool, str], None],
        dial: Callable[[PathSettings], Awaitable[Channel]] | None = None,
    ) -> None:
        self._heartbeat = heartbeat
        self._clock = clock
        self._on_heard, self._on_said = on_heard, on_said
        self._on_lost, self._on_change = on_lost, on_change
        # A connection takes longer to be made than a heartbeat to come.
        first = math.ceil(1000 * allowance_seconds / heartbeat.interval_ms)
        self._link = _Path(LINK_PATH, self._detector(), up=True)
        self._further = {
            each.name: _Path(each.name, self._detector(max(first, heartbeat.misses)), up=False)
            for each in settings
        }
        self._tasks: list[asyncio.Task[None]] = []
        if dial is not None:
            self._tasks = [asyncio.ensure_future(self._keep(each, dial)) for each in settings]

    def _detector(self, misses: int | None = None) -> HeartbeatDetector:
        interval_ns = self._heartbeat.interval_ms * 1_000_000
        return HeartbeatDetector(interval_ns, misses or self._heartbeat.misses, self._clock())

    @property
    def living(self) -> list[str]:
        """Names of the further paths that are up."""
        return [path.name for path in self._further.values() if path.up]

    @property
    def names(self) -> list[str]:
        """Names of the further paths."""
        return list(self._further)

    def link_down(self, now_ns: int) -> float | None:
        """Seconds for which the link has been silent, beyond what is accepted; None while it is up."""
        since = self._link.down_since_ns
        return None if since is None else (now_ns - since) / 1e9

    def states(self) -> list[PathState]:
        """Return how all paths are, the link first."""
        now = self._clock()
        return [
            PathState(
                path.name,
                path.up,
                None if path.heard_ns is None else (now - path.heard_ns) / 1e9,
                "" if path.up else path.detail,
            )
            for path in (self._link, *self._further.values())
        ]

    # ---- hearing ------------------------------------------------------------------------------------------

    def hear_link(self, now_ns: int) -> None:
        """Note a sign of life on the link."""
        self._hear(self._link, now_ns)

    def _hear(self, path: _Path, now_ns: int) -> None:
        path.heard_ns = max(now_ns, path.heard_ns or 0)
        if path.detector.verdict is Verdict.SILENT or not path.up:
            path.detector = self._detector()
        path.detector.heard(now_ns)
        if not path.up:
            path.up, path.down_since_ns = True, None
            self._tell(path, "the peer is heard on it")

    def _tell(self, path: _Path, detail: str) -> None:
        if path.told is not path.up:
            path.told = path.up
            self._on_change(path.name, path.up, detail)

    def tick(self, now_ns: int) -> None:
        """Count time; called as often as the session's own detector is."""
        for path in (self._link, *self._further.values()):
            before = path.detector.verdict
            if path.detector.tick(now_ns) is not Verdict.SILENT or before is Verdict.SILENT:
                continue
            if path.up:
                path.detail = f"nothing heard on it for {self._heartbeat.limit_ms} ms"
            path.up, path.down_since_ns = False, now_ns
            path.lost.set()  # a new connection gets through sooner than an old one's packets, once it can
            self._tell(path, path.detail)

    # ---- speaking -----------------------------------------------------------------------------------------

    def beat(self, state: str, epoch: int) -> None:
        """Send a heartbeat on each further path that takes one."""
        for path in self._further.values():
            if path.channel is not None and not path.channel.unsent_bytes:
                beat = Heartbeat(sequence=path.sent, sent_ns=self._clock(), state=state, epoch=epoch)
                path.sent += 1
                self._write(path, beat)

    def say(self, message: Goodbye | LinkCut) -> None:
        """Say something on each further path, as the last thing."""
        for path in self._further.values():
            self._write(path, message)

    def _write(self, path: _Path, message: Heartbeat | Goodbye | LinkCut) -> None:
        if path.channel is not None:
            try:
                path.channel.write(MessageType.HEARTBEAT, encode(message))
            except FtdError as error:
                self._drop(path, error)

    # ---- connections --------------------------------------------------------------------------------------

    def attach(self, name: str, channel: Channel) -> None:
        """Use a connection for a path from now on, instead of the one before.

        Raises PeerError when there is no such path here.
        """
        path = self._further.get(name)
        if path is None:
            raise PeerError(
                f"heartbeat path {name} is not known here; give the same [[heartbeat.path]] on both nodes"
            )
        if path.channel is not None:
            path.channel.close()
        path.channel, path.lost = channel, asyncio.Event()
        path.sent = path.expected = 0
        channel.listen(
            _HEARTBEAT_ONLY,
            lambda type_, payload: self._on_message(path, channel, type_, payload),
            lambda error: self._on_channel_lost(path, channel, error),
        )

    def _on_message(self, path: _Path, channel: Channel, type_: MessageType, payload: bytearray) -> None:
        if path.channel is not channel:
            return
        message = decode(type_, payload)
        if isinstance(message, Goodbye | LinkCut):
            self._on_said(message, path.name)
        elif isinstance(message, Heartbeat):
            if message.sequence != path.expected:
                raise LinkLost(
                    LostKind.PROTOCOL,
                    f"the peer sent heartbeat {message.sequence}, expected {path.expected}",
                )
            path.expected += 1
            now = self._clock()
            self._hear(path, now)
            self._on_heard(now, message)

    def _on_channel_lost(self, path: _Path, channel: Channel, error: FtdError) -> None:
        if path.channel is channel:
            self._drop(path, error)

    def _drop(self, path: _Path, error: FtdError) -> None:
        if path.channel is not None:
            path.channel.close()
            path.channel = None
        path.lost.set()
        path.detail = friendly(error)
        if path.up:
            path.up, path.down_since_ns = False, self._clock()
            self._tell(path, path.detail)
        self._on_lost(path.name)

    async def _keep(self, settings: PathSettings, dial: Callable[[PathSettings], Awaitable[Channel]]) -> None:
        """Connect on a path, again and again."""
        path = self._further[settings.name]
        told = ""
        while True:
            wait = RETRY_SECONDS
            try:
                channel = await dial(settings)
            except (LinkError, PeerError) as error:
                path.detail = friendly(error)
                if isinstance(error, PeerError):
                    wait = RETRY_AFTER_REFUSAL_SECONDS
                if path.detail != told:
                    told = path.detail
                    _log.warning("no heartbeats on a path", path=settings.name, reason=told)
            else:
                told = ""
                self.attach(settings.name, channel)
                await path.lost.wait()
            await asyncio.sleep(wait)

    def close(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            task.cancel()
        for path in self._further.values():
            if path.channel is not None:
                path.channel.close()
                path.channel = None

    async def finish(self, seconds: float) -> None:
        """Close all connections once the peer has read what was said, after so many seconds at most."""
        for task in self._tasks:
            task.cancel()
        channels = [path.channel for path in self._further.values() if path.channel is not None]
        tasks: list[Awaitable[Any]] = [channel.finish(seconds) for channel in channels]
        with suppress(FtdError):
            await asyncio.gather(*tasks)
        self.close()
