"""The backup's side of the link: takes connections, checks who they are, and delivers whole sessions."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

from ftd import log
from ftd.channel import Channel, tune
from ftd.errors import FtdError, HostError, PeerError, friendly
from ftd.link.handshake import HANDSHAKE_ONLY, frame_channel
from ftd.link.options import LinkOptions
from ftd.link.ports import bind, readable
from ftd.link.session import Session
from ftd.messages import Hello, Refusal, Welcome, decode, encode, one_line
from ftd.metrics import Connection, Rejection
from ftd.paths import RETRY_SECONDS, PathSettings
from ftd.wire import PROTOCOL_VERSION, LinkLost, MessageType, VersionMismatch

_log = log.get(__name__)


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
                self._sockets.append(await bind(self._host, port, self._options.max_pending))
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
                sock = await bind(path.listen, self.ports[1], self._options.max_pending)
                break
            except HostError as error:
                if str(error) != told:
                    told = str(error)
                    _log.warning("no heartbeats on a path", path=path.name, reason=told)
                await asyncio.sleep(RETRY_SECONDS)
        self._sockets.append(sock)
        await self._accept(sock, heartbeat=True, path=path.name)

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
            await readable(listening)
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
        hello = decode(*await channel.receive(HANDSHAKE_ONLY))
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
            frame_channel(self._options, sock, forming.others["frames"].peer, next_out, next_in),
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
