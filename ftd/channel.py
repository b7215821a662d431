"""One connection between two daemons, in its two ways of working.

`Channel` is non-blocking and belongs to the event loop: handshakes, control messages, heartbeats.
`FrameChannel` blocks and belongs to one thread: it carries parts of frames, in one direction only, because
two threads may not use one TLS connection at once. Acknowledgements therefore travel on control.

Both sit on a plain or a TLS socket, used directly rather than through asyncio's streams. A connection begins
in the event loop with a handshake and may then go on in a thread, which a TLS connection made by asyncio
cannot; and messages are no slower (bench/link measures both).
"""

import asyncio
import errno
import fcntl
import os
import socket
import ssl
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ftd import tls
from ftd.errors import FtdError, PeerError
from ftd.wire import (
    HEADER_SIZE,
    PAYLOAD_LIMITS,
    LinkLost,
    LostKind,
    MessageHeader,
    MessageType,
    VersionMismatch,
    check_begin,
    decode_header,
    encode_header,
)

# Unsent bytes at which write() gives up on a peer that reads nothing: nobody needs a queue of old
# acknowledgements.
MAX_UNSENT = 8 << 20
# Unsent bytes above which drain() waits.
HIGH_WATER = 256 << 10
# Messages handed over before other work of the event loop gets a turn.
_TURN = 64
# sendmsg() takes at most 1024 buffers; views smaller than this are joined, so that TLS makes no tiny records.
_SMALL = 16 << 10
_MAX_VIEWS = 1024

_RESETS = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN)
_TLS_HANDSHAKE = b"\x16\x03"


def tune(sock: socket.socket, *, user_timeout_seconds: float, urgent: bool) -> None:
    """Set a TCP socket's options: no Nagle, and the kernel gives up on a path that takes no data.

    Buffer sizes are left to the kernel: a size set by hand switches its tuning off and is capped by wmem_max,
    and was not faster on loopback. `urgent` lets small messages pass frames in this host's own queue.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout_seconds * 1000))
    if urgent:
        with suppress(OSError):  # a preference; some network sandboxes forbid it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 6)  # TC_PRIO_INTERACTIVE


def prefer_this_thread() -> None:
    """Let the calling thread run before everything else that wants a processor, like the event loop's.

    For threads that carry what clients wait for. Real-time, since niceness does not count between sessions
    (autogroups). Where that is not allowed, nothing: the node has said so.
    """
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def shut(sock: socket.socket) -> None:
    """Shut a connection in both directions, which wakes a thread that is blocked on it.

    Not SSLSocket.shutdown(): that one drops the TLS state first, and a thread in the middle of its sends
    would go on in plain text for a moment.
    """
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _translate(error: OSError, where: str) -> FtdError:
    """Say in our words what a socket said. Where foreign errors become ours; nothing else of `socket`
    leaks.
    """
    if isinstance(error, ssl.SSLEOFError):
        return LinkLost(LostKind.RESET, f"{where}: closed without a goodbye")
    if isinstance(error, ssl.SSLError):
        explained = tls.explain(error, where)
        return explained if isinstance(explained, PeerError) else LinkLost(LostKind.PROTOCOL, str(explained))
    text = (error.strerror or str(error) or type(error).__name__).lower()
    kind = LostKind.RESET if error.errno in _RESETS else LostKind.SILENCE
    return LinkLost(kind, f"{where}: {text}")


class Channel:
    """A connection in the event loop. Not to be used from other threads.

    Every method that touches the socket raises LinkLost when the connection ends, and PeerError when TLS says
    that the peer is not who it should be. After either, only close() is left.
    """

    def __init__(self, sock: socket.socket, name: str, peer: str) -> None:
        sock.setblocking(False)
        self.name = name
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._limits: Mapping[MessageType, int] = PAYLOAD_LIMITS
        self._next_in = 0
        self._next_out = 0
        self._header: MessageHeader | None = None
        self._buffer = bytearray(HEADER_SIZE)
        self._have = 0
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._waiting = False  # for room in the socket
        self._drained: asyncio.Future[None] | None = None
        self._on_message: Callable[[MessageType, bytearray], None] | None = None
        self._on_lost: Callable[[FtdError], None] | None = None
        self._paused = False
        self._closed = False

    @property
    def where(self) -> str:
        """The connection in words, for messages."""
        return f"{self.name} connection with {self.peer}"

    @property
    def secure(self) -> bool:
        """Whether TLS is in use."""
        return isinstance(self._socket, ssl.SSLSocket)

    @property
    def unread(self) -> bool:
        """Whether bytes of the peer have arrived that were not handed over yet."""
        if self._closed:
            return False
        if self._has_more():
            return True
        [count] = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, bytes(4)))
        return bool(count)

    # ---- TLS ---------------------------------------------------------------------------------------------

    async def start_tls(self, identity: tls.Identity, *, server_side: bool, peer_name: str | None) -> None:
        """Do the TLS handshake and check the peer's name (None: any name of the authority; accepting side
        only).
        """
        try:
            self._socket = sock = (
                identity.server.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
                if server_side
                else identity.client.wrap_socket(
                    self._socket, server_hostname=peer_name, do_handshake_on_connect=False
                )
            )
            while True:
                try:
                    sock.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await self._wait(self._loop.add_reader, self._loop.remove_reader)
                except ssl.SSLWantWriteError:
                    await self._wait(self._loop.add_writer, self._loop.remove_writer)
        except ssl.SSLCertVerificationError as error:
            raise tls.explain(error, self.where, expected=peer_name or "") from None
        except OSError as error:
            if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
                # The peer speaks in plain text, so it is told in plain text; OpenSSL says nothing to it.
                self._socket = socket.socket(fileno=self._socket.detach())
                self._socket.setblocking(False)
            raise _translate(error, self.where) from None
        if peer_name is not None:
            try:
                tls.check_peer_name(sock.getpeercert(), peer_name)
            except PeerError as error:
                raise PeerError(f"{self.where}: {error}") from None

    async def _wait(self, add: Callable[..., Any], remove: Callable[[int], Any]) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        descriptor = self._socket.fileno()
        add(descriptor, _set, ready)
        try:
            await ready
        finally:
            remove(descriptor)

    # ---- receiving ---------------------------------------------------------------------------------------

    def _next_message(self) -> tuple[MessageType, bytearray] | None:
        """Return a message if one is there, without waiting.

        Reads exactly to the end of a message and never beyond, so that after the handshake the rest of the
        connection can be given to a thread.
        """
        while True:
            if self._have < len(self._buffer):
                try:
                    count = self._socket.recv_into(memoryview(self._buffer)[self._have :])
                except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
                    return None
                except ssl.SSLWantWriteError:
                    # TLS wants to answer something and the socket is full; there is no event to wait for.
                    self._loop.call_later(0.001, self._on_readable)
                    return None
                except OSError as error:
                    raise _translate(error, self.where) from None
                if count == 0:
                    raise self._ended_early()
                self.received_bytes += count
                self._have += count
                if self._header is None:
                    self._check_begin()
                continue
            if self._header is None:
                try:
                    header = decode_header(self._buffer, sequence=self._next_in, limits=self._limits)
                except VersionMismatch:
                    raise
                except LinkLost as error:
                    raise LinkLost(error.kind, f"{self.where}: {error.detail}") from None
                self._next_in += 1
                self._header, self._buffer, self._have = header, bytearray(header.length), 0
                continue
            message = (self._header.type, self._buffer)
            self._header, self._buffer, self._have = None, bytearray(HEADER_SIZE), 0
            return message

    def _ended_early(self) -> FtdError:
        size = len(self._buffer)
        partly = f" in the middle of a message ({self._have} of {size} bytes)" if self._have else ""
        return LinkLost(LostKind.RESET, f"{self.where}: closed without a goodbye{partly}")

    def _check_begin(self) -> None:
        """Refuse what is no message before 32 bytes of it are there; they might never come."""
        begin = memoryview(self._buffer)[: self._have]
        if self._next_in == 0 and begin[:2] == _TLS_HANDSHAKE[: len(begin)] and not self.secure:
            # The most likely mistake of operators.
            raise PeerError(f"{self.where}: TLS came; insecure must be the same on both hosts")
        try:
            check_begin(begin)
        except LinkLost as error:
            raise LinkLost(error.kind, f"{self.where}: {error.detail}") from None

    async def receive(
        self, limits: Mapping[MessageType, int] = PAYLOAD_LIMITS
    ) -> tuple[MessageType, bytearray]:
        """Wait for one message of the types in `limits`. For handshakes; later, listen()."""
        self._limits = limits
        while True:
            message = self._next_message()
            if message is not None:
                return message
            await self._wait(self._loop.add_reader, self._loop.remove_reader)

    def listen(
        self,
        limits: Mapping[MessageType, int],
        on_message: Callable[[MessageType, bytearray], None],
        on_lost: Callable[[FtdError], None],
    ) -> None:
        """Hand every message to `on_message` from now on, and the end, once, to `on_lost`.

        `on_message` may raise LinkLost to say that the message was not acceptable.
        """
        self._limits = limits
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop.add_reader(self._socket.fileno(), self._on_readable)
        # What TLS has already decrypted makes no socket readable.
        self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        if not self._may_read() or self._on_message is None:
            return
        try:
            for _ in range(_TURN):
                message = self._next_message()
                if message is None:
                    return
                self._on_message(*message)
                if not self._may_read() or not self._has_more():
                    return
        except FtdError as error:
            self._lose(error)
            return
        self._loop.call_soon(self._on_readable)

    def _has_more(self) -> bool:
        """Whether to look for another message without being called: TLS may hold bytes that epoll cannot see.

        What is still in the socket makes it readable again. To try and find nothing costs more,
        because of the exception that says so.
        """
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def _may_read(self) -> bool:
        return not (self._closed or self._paused)

    def pause(self) -> None:
        """Read nothing more until resume(): the peer is made to wait by TCP itself."""
        if not self._paused and not self._closed:
            self._paused = True
            self._loop.remove_reader(self._socket.fileno())

    def resume(self) -> None:
        """Undo pause()."""
        if self._paused and not self._closed:
            self._paused = False
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
            self._loop.call_soon(self._on_readable)

    def _lose(self, error: FtdError) -> None:
        if not self._closed:
            self._loop.remove_reader(self._socket.fileno())
            self._paused = True
            on_lost, self._on_lost = self._on_lost, None
            if on_lost is not None:
                on_lost(error)

    # ---- sending -----------------------------------------------------------------------------------------

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait for room in the socket."""
        return self._unsent_bytes

    def write(self, type_: MessageType, payload: bytes) -> None:
        """Send a message, or queue what the socket does not take at once."""
        if self._closed:
            raise LinkLost(LostKind.CLOSED, f"{self.where}: closed by this side")
        if self._unsent_bytes + len(payload) > MAX_UNSENT:
            raise LinkLost(LostKind.STALLED, f"{self.where}: the peer reads nothing")
        message = encode_header(type_, self._next_out, len(payload)) + payload
        self._next_out += 1
        self._unsent.append(message)
        self._unsent_bytes += len(message)
        if len(self._unsent) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._unsent:
            head = self._unsent[0]
            try:
                count = self._socket.send(head)
            except (BlockingIOError, InterruptedError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._loop.add_writer(self._socket.fileno(), self._on_writable)
                self._waiting = True
                return
            except OSError as error:
                raise _translate(error, self.where) from None
            self.sent_bytes += count
            self._unsent_bytes -= count
            if count == len(head):
                self._unsent.popleft()
            else:
                self._unsent[0] = head[count:]
        if self._waiting:
            self._loop.remove_writer(self._socket.fileno())
            self._waiting = False

    def _on_writable(self) -> None:
        if self._closed:
            return
        try:
            self._flush()
        except FtdError as error:
            self._loop.remove_writer(self._socket.fileno())
            self._lose(error)
        if self._unsent_bytes <= HIGH_WATER and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def drain(self) -> None:
        """Wait until at most HIGH_WATER bytes are unsent."""
        if self._unsent_bytes > HIGH_WATER and not self._closed:
            if self._drained is None or self._drained.done():
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)

    # ---- the end -----------------------------------------------------------------------------------------

    def detach(self) -> tuple[socket.socket, int, int]:
        """Give the socket away, between two messages; with the next sequence numbers (out, in)."""
        if self._have or self._header or self._unsent:
            raise LinkLost(LostKind.PROTOCOL, f"{self.where}: data outside of the handshake")
        self._closed = True
        self._remove_callbacks()
        return self._socket, self._next_out, self._next_in

    async def finish(self, seconds: float) -> None:
        """Close so that the last words arrive: send what is queued, then wait for the peer's end, at most
        `seconds`.

        Closing at once would do harm: if anything of the peer is still unread, the kernel answers with a
        reset, and a reset overtakes data.
        """
        if self._closed:
            return
        self._on_message = self._on_lost = None
        self._remove_callbacks()
        with suppress(OSError, TimeoutError, FtdError):
            async with asyncio.timeout(seconds):
                while self._unsent:
                    await self._wait(self._loop.add_writer, self._loop.remove_writer)
                    self._flush()
                socket.socket.shutdown(self._socket, socket.SHUT_WR)
                await self._discard()
        self.close()

    async def _discard(self) -> None:
        descriptor = os.dup(self._socket.fileno())
        # A second view of the same connection: its bytes are of no interest, decrypted or not.
        with socket.socket(fileno=descriptor) as raw:
            raw.setblocking(False)
            scratch = bytearray(65536)
            while await self._loop.sock_recv_into(raw, scratch):
                pass

    def close(self) -> None:
        """Close at once. Harmless when closed already."""
        if self._closed:
            return
        self._closed = True
        self._remove_callbacks()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        shut(self._socket)
        self._socket.close()

    def _remove_callbacks(self) -> None:
        if self._socket.fileno() >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class FrameChannel:
    """A connection in a thread. shut() may be called from any thread; the other methods by one thread at a
    time.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        *,
        next_out: int,
        next_in: int,
        max_part_bytes: int,
        stall_seconds: float,
    ) -> None:
        self.peer = peer
        self.where = f"frames connection with {peer}"
        self.sent_bytes = 0
        self.received_bytes = 0
        self.progress_ns = 0  # monotonic time at which bytes last came in; read by the detector's loop
        self._socket = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._next_out = next_out
        self._next_in = next_in
        self._limits = {MessageType.PART: min(max_part_bytes, PAYLOAD_LIMITS[MessageType.PART])}
        self._stall_seconds = stall_seconds
        # Protects the three below: the descriptor may only be closed when no thread is inside a call with it,
        # or the thread could go on with a descriptor of the same number that belongs to something else.
        self._guard = threading.Lock()
        self._busy = False
        self._shut = threading.Event()
        self._broken = False

    def send_part(self, views: Sequence[memoryview]) -> int:
        """Send the views as one part; return the bytes sent. Blocks.

        Raises LinkLost: CLOSED when shut() was called meanwhile, STALLED when the peer took nothing for
        `stall_seconds`, else as the connection ended.
        """
        pieces = [view.cast("B") for view in views if view.nbytes]
        length = sum(piece.nbytes for piece in pieces)
        if length > self._limits[MessageType.PART]:
            raise ValueError(
                f"a part of {length} bytes is over the limit of {self._limits[MessageType.PART]}"
            )
        with self._using("send"):
            header = memoryview(encode_header(MessageType.PART, self._next_out, length))
            self._next_out += 1
            self._socket.settimeout(self._stall_seconds)
            pieces = _join_small([header, *pieces])
            if self._tls:
                self._send_each(pieces)
            else:
                self._send_all(pieces)
            self.sent_bytes += length + HEADER_SIZE
            return length

    def _send_each(self, pieces: list[memoryview]) -> None:
        # OpenSSL takes one record of 16 KiB from each call, whatever it is offered, so larger chunks gain
        # nothing.
        for piece in pieces:
            rest = piece
            while rest:
                rest = rest[self._socket.send(rest) :]

    def _send_all(self, pieces: list[memoryview]) -> None:
        while pieces:
            count = self._socket.sendmsg(pieces[:_MAX_VIEWS])
            done = 0
            while done < len(pieces) and count >= pieces[done].nbytes:
                count -= pieces[done].nbytes
                done += 1
            pieces = pieces[done:]
            if count:
                pieces[0] = pieces[0][count:]

    def receive_part(self, allocate: Callable[[int], memoryview]) -> memoryview:
        """Wait for a part, without a time limit, and return it whole; blocks.

        `allocate(length)` is asked for a writable view of at least `length` bytes once the header is checked,
        and may raise to refuse; the connection is of no use then, as the part's bytes stay unread. A part
        that does not arrive whole is never returned. Raises LinkLost as send_part does, PROTOCOL for what is
        not a part.
        """
        with self._using("receive"):
            header_bytes = memoryview(bytearray(HEADER_SIZE))
            self._socket.settimeout(None)
            self._receive_into(header_bytes[:1], "before a part")
            self._socket.settimeout(self._stall_seconds)
            self._receive_into(header_bytes[1:], "in a header")
            header = decode_header(header_bytes, sequence=self._next_in, limits=self._limits)
            self._next_in += 1
            view = allocate(header.length).cast("B")
            if view.readonly or view.nbytes < header.length:
                raise ValueError(
                    f"allocate({header.length}) gave {view.nbytes} bytes, readonly={view.readonly}"
                )
            part = view[: header.length]
            self._receive_into(part, "in a part")
            self.received_bytes += header.length + HEADER_SIZE
            return part

    def _receive_into(self, view: memoryview, place: str) -> None:
        have, size = 0, view.nbytes
        while have < size:
            count = self._socket.recv_into(view[have:])
            if count == 0:
                middle = f" {place} ({have} of {size} bytes)" if place != "before a part" else ""
                raise LinkLost(LostKind.RESET, f"{self.where}: closed{middle}")
            have += count
            self.progress_ns = time.monotonic_ns()

    @contextmanager
    def _using(self, what: str) -> Iterator[None]:
        with self._guard:
            if self._busy:
                raise RuntimeError(f"{self.where} is in use by another thread")
            if self._shut.is_set():
                raise LinkLost(LostKind.CLOSED, f"{self.where}: closed by this side")
            if self._broken:
                raise LinkLost(LostKind.PROTOCOL, f"{self.where}: broken by an earlier error")
            self._busy = True
        whole = False
        try:
            yield
            whole = True
        except (OSError, LinkLost) as error:
            # Set before the socket is shut, so that it is seen with the error that this causes.
            if self._shut.is_set():
                raise LinkLost(LostKind.CLOSED, f"{self.where}: closed by this side") from None
            if isinstance(error, LinkLost):
                raise
            if isinstance(error, TimeoutError) and error.errno is None:
                raise LinkLost(
                    LostKind.STALLED, f"{self.where}: no progress for {self._stall_seconds:g} s in {what}"
                ) from None
            raise _translate(error, self.where) from None
        finally:
            with self._guard:
                self._busy = False
                # Half a message is on the wire: nothing after it would be understood.
                self._broken = self._broken or not whole
                if self._shut.is_set():
                    self._socket.close()

    def shut(self) -> None:
        """End the connection at once and wake the thread that is blocked on it. May be repeated."""
        with self._guard:
            if not self._shut.is_set():
                self._shut.set()
                shut(self._socket)
                if not self._busy:
                    self._socket.close()


def _join_small(pieces: list[memoryview]) -> list[memoryview]:
    """Join neighbours that are small together; large views are left where they are."""
    joined: list[memoryview] = []
    pending: list[memoryview] = []
    size = 0
    for piece in pieces:
        if size + piece.nbytes > _SMALL:
            if pending:
                joined.append(pending[0] if len(pending) == 1 else memoryview(b"".join(pending)))
            pending, size = [], 0
        if piece.nbytes > _SMALL:
            joined.append(piece)
        else:
            pending.append(piece)
            size += piece.nbytes
    if pending:
        joined.append(memoryview(b"".join(pending)))
    return joined
