"""The QMP monitor: commands to QEMU, and events from it.

A thin layer over qemu.qmp that adds what ftd needs: events and the loss of QEMU are called back at once,
without a task that polls; file descriptors can be sent; every error is one of ours.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import logging
import socket
import struct
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)
from qemu.qmp.message import Message
from qemu.qmp.util import flush

from ftd.errors import QemuDied, QemuError, friendly

log = logging.getLogger(__name__)

# The largest answer of QEMU that is understood, in bytes. `query-qmp-schema`, the largest in practice, has
# 0.3 MB.
LONGEST_MESSAGE = 64 * 1024 * 1024

Event = dict[str, Any]
Callback = Callable[[Event], None]


def _quiet_logger() -> logging.Logger:
    """qemu.qmp logs as an error what it also raises; here all of that is help for debugging and no more."""
    logger = logging.getLogger(f"{__name__}.qmp")

    def demote(record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logger.isEnabledFor(logging.DEBUG)

    if not logger.filters:
        logger.addFilter(demote)
    return logger


# An event that QEMU emits while it accepts the connection comes before its greeting, now and then.
_TRIES = 3


class _Client(QMPClient):
    """QMPClient with its hooks used."""

    def __init__(self, dispatch: Callable[[Event], None]) -> None:
        super().__init__(readbuflen=LONGEST_MESSAGE)
        self.logger = _quiet_logger()
        self._dispatch = dispatch

    # The inherited two write every message as indented JSON for the log, whether or not it is logged, which
    # would cost time in each of the calls of an epoch.
    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    # The inherited one keeps every event of the session in memory.
    async def _event_dispatch(self, msg: Message) -> None:
        self._dispatch(dict(msg))

    async def write_out(self) -> None:
        """Waits until every queued byte is with the kernel."""
        if self._writer is not None:
            await flush(self._writer)

    @property
    def written_out(self) -> bool:
        """Whether every byte that the transport was given is with the kernel."""
        return self._writer is None or self._writer.transport.get_write_buffer_size() == 0


class _NoGreeting(QemuError):  # noqa: N818 - names what happened
    """Something else was said first."""


class Monitor:
    """A QMP connection to one QEMU. Belongs to the event loop in which it was made.

    `lost` is set as soon as the connection ends, whoever ended it; `lost_reason` then says why.
    Commands may be given concurrently. A command that is cancelled leaves the connection usable: QEMU still
    carries it out, and its answer is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self._callbacks: defaultdict[str, list[Callback]] = defaultdict(list)
        self._client = _Client(self._dispatch)
        self._socket: socket.socket | None = None
        self._descriptor_lock = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._closing = False

    @classmethod
    async def connect(cls, path: Path | str, timeout: float = 10.0) -> Self:
        """Connects to the QMP socket at `path`, waiting at most `timeout` seconds for QEMU's greeting.

        Raises QemuError if there is no socket, nobody answers, or what answers is not QMP.
        """
        for _ in range(_TRIES - 1):
            try:
                return await cls._try_to_connect(path, timeout)
            except _NoGreeting:
                pass
        return await cls._try_to_connect(path, timeout)

    @classmethod
    async def _try_to_connect(cls, path: Path | str, timeout: float) -> Self:
        self = cls(Path(path))
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await self._connect(connection, timeout)
        except BaseException:
            connection.close()
            if self._socket is not None:
                self._socket.close()
            raise
        self._watcher = asyncio.create_task(self._watch(), name=f"monitor {self.path}")
        return self

    async def _connect(self, connection: socket.socket, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_connect(connection, str(self.path))
                # asyncio owns `connection` from here on and offers no way to send a descriptor through it.
                self._socket = connection.dup()
                try:
                    await self._client.connect(connection)
                except AssertionError:
                    # That of qemu.qmp when QEMU is gone at the very moment at which the session is there.
                    with contextlib.suppress(Exception):
                        await self._client.disconnect()  # otherwise nobody hears what its tasks ended with
                    raise QemuDied(
                        f"{self.path}: QEMU closed the connection after its greeting; see its log"
                    ) from None
        except FileNotFoundError:
            raise QemuError(
                f"{self.path}: no such socket; is QEMU running with -qmp unix:{self.path},server=on,wait=off?"
            ) from None
        except ConnectionRefusedError:
            raise QemuError(
                f"{self.path}: no QEMU listens on this socket; it has ended, start it again"
            ) from None
        except (TimeoutError, BlockingIOError):
            raise QemuError(
                f"{self.path}: no QMP greeting within {timeout:g} s; a QMP socket serves one client at a "
                "time, so look for another one that holds it"
            ) from None
        except ConnectError as error:
            cause = error.exc
            if isinstance(cause, EOFError | ConnectionError):
                raise QemuDied(
                    f"{self.path}: QEMU closed the connection before its greeting; see its log"
                ) from None
            raise _NoGreeting(
                f"{self.path}: what answers there does not speak QMP; give the path of a QMP socket"
            ) from None
        except OSError as error:
            raise QemuError(f"{self.path}: {friendly(OSError(error.errno, ''))}") from None

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Has QEMU carry out a command, and returns its answer.

        Underscores in the names of arguments become dashes.

        Raises QemuError with QEMU's own words if it refuses, and QemuDied if the connection ends before the
        answer.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        # An argument that JSON cannot hold would otherwise fail in qemu.qmp's writer and end the connection.
        json.dumps(named)
        try:
            return await self._client.execute(command, named or None)
        except ExecuteError as error:
            raise QemuError(
                f"QEMU refused {command}: {error}",
                qmp_class=error.error_class,
                description=str(error),
            ) from None
        except (ExecInterruptedError, StateError):
            # StateError is the answer to a command that is given when the connection is gone already.
            await self.lost.wait()
            raise QemuDied(f"{command}: {self.lost_reason}") from None
        except QMPError as error:
            raise QemuError(f"QEMU's answer to {command} is not QMP: {_first_line(error)}") from None

    async def send_descriptor(self, name: str, fd: int) -> None:
        """Gives QEMU a copy of an open file under a name, for a command that takes one.

        `fd` stays open here. A name that QEMU holds already gets the new file.

        Raises QemuError and QemuDied as `execute` does.
        """
        # QEMU keeps the descriptors of one message until `getfd` fetches them; a second one would close them.
        async with self._descriptor_lock:
            await self._send_rights(fd)
            await self.execute("getfd", fdname=name)

    async def _send_rights(self, fd: int) -> None:
        while self._socket is not None and not self.lost.is_set():
            if not self._client.written_out:
                # The blank that carries the descriptor must not land inside a half-written command.
                try:
                    await self._client.write_out()
                except OSError:
                    await self.lost.wait()
                continue
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            try:
                self._socket.sendmsg([b" "], rights)
            except BlockingIOError:
                await self._wait_writable(self._socket)
            except ConnectionError:
                await self.lost.wait()
            except OSError as error:
                raise QemuError(f"cannot give file descriptor {fd} to QEMU: {friendly(error)}") from None
            else:
                return
        raise QemuDied(f"getfd: {self.lost_reason}")

    async def _wait_writable(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(connection, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(connection)

    def on(self, name: str, callback: Callback) -> Callable[[], None]:
        """Calls `callback` with every event of that name, in the order of arrival; "*" means all events.

        An event is the dictionary that QEMU sent: "event", "data", "timestamp". The callback runs in the
        event loop, before any answer that QEMU sent later is seen, and must not block. Returns a function
        that undoes it.
        """
        self._callbacks[name].append(callback)

        def remove() -> None:
            with suppress(ValueError):
                self._callbacks[name].remove(callback)

        return remove

    def _dispatch(self, event: Event) -> None:
        name = str(event.get("event", ""))
        for callback in [*self._callbacks[name], *self._callbacks["*"]]:
            try:
                callback(event)
            except Exception:
                # An exception here would end qemu.qmp's reader, and so the connection.
                log.exception("a callback for QEMU's event %s failed", name)

    async def _watch(self) -> None:
        """Turns the end of the connection into `lost`."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        reason = "QEMU has ended, or closed its monitor"
        try:
            await self._client.disconnect()
        except (EOFError, ConnectionError):
            pass
        except Exception as error:  # whatever qemu.qmp's reader stumbled over
            reason = f"QEMU's monitor sent what is not QMP ({_first_line(error)})"
        self.lost_reason = "the monitor was closed by ftd" if self._closing else f"{self.path}: {reason}"
        self._close_socket()
        self.lost.set()

    async def close(self) -> None:
        """Ends the connection; the guest is not touched. May be called more than once."""
        self._closing = self._closing or not self.lost.is_set()
        if self._watcher is None or self.lost.is_set():
            return
        # Whoever still waits for an answer learns that it will not come. Ending the socket, not the client,
        # leaves one single way in which connections end.
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        await self.lost.wait()

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def peer_pid(self) -> int:
        """Process id of the QEMU that listens on the socket, as the kernel tells it."""
        if self._socket is None:
            raise QemuDied(self.lost_reason)
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return cast(int, struct.unpack("3i", credentials)[0])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
