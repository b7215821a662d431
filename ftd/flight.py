"""The flight recorder: what a node saw, asked and decided, kept over crashes, and read by `ftd why`.

    state_dir/flight.jsonl      one JSON object a line, the newest last
    state_dir/flight.jsonl.1    the ones before; together at most 2 × LIMIT_BYTES

Lines have `at` (seconds since 1970, for comparing two hosts whose clocks are set by NTP), `node`, `what`, and
fields of their own. They are written and forced to the disk by a thread: the event loop never waits for it.
Epochs are thinned: one line in ten seconds, and the last one before whatever ended protection.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import os
import queue
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftd import log
from ftd.errors import HostError, PeerError, friendly

_log = log.get(__name__)

LIMIT_BYTES = 1 << 20
# Of the newest lines, what is given to the other node.
TAIL_BYTES = 256 << 10
EPOCHS_EVERY = 10.0
# For what was noted to be on a slow disk, before the file is read.
WRITE_PATIENCE = 1.0


class FlightRecorder:
    """Writes one node's flight. Belongs to the event loop; what cannot be written is lost, and said once."""

    def __init__(self, folder: Path, node: str) -> None:
        self._path = folder / "flight.jsonl"
        self._node = node
        self._queue: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._epoch: dict[str, Any] | None = None  # the last one that was not written
        self._epoch_due = 0.0

    def note(self, what: str, **fields: Any) -> None:
        """Record something, and the epoch before it."""
        if self._epoch is not None:
            self._put(self._epoch)
            self._epoch = None
        self._put({"at": round(time.time(), 4), "node": self._node, "what": what, **fields})

    def epoch(self, epoch: int, generation: int) -> None:
        """Record a committed epoch, perhaps."""
        now = time.monotonic()
        self._epoch = {
            "at": round(time.time(), 4),
            "node": self._node,
            "what": "committed",
            "epoch": epoch,
            "generation": generation,
        }
        if now >= self._epoch_due:
            self._epoch_due = now + EPOCHS_EVERY
            self._put(self._epoch)
            self._epoch = None

    async def tail(self) -> tuple[bytes, bool]:
        """Return the newest lines, at most TAIL_BYTES of them, and whether there are older ones.

        Raises HostError if they cannot be read.
        """
        if self._epoch is not None:
            self._put(self._epoch)
            self._epoch = None
        if self._thread is not None:
            written = threading.Event()
            self._queue.put(written)
            await asyncio.to_thread(written.wait, WRITE_PATIENCE)
        return await asyncio.to_thread(tail, self._path)

    def close(self) -> None:
        """Return when everything is on the disk."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _put(self, line: dict[str, Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="ftd-flight", daemon=True)
            self._thread.start()
        self._queue.put(json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n")

    def _write_all(self) -> None:
        told = ended = False
        while not ended:
            taken = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while taken[-1] is not None:
                    taken.append(self._queue.get_nowait())
            ended = taken[-1] is None
            lines = [line for line in taken if isinstance(line, bytes)]
            try:
                if lines:
                    self._write(b"".join(lines))
            except OSError as error:
                if not told:
                    told = True
                    _log.error("the flight recorder cannot write", error=friendly(error))
            for waiting in taken:
                if isinstance(waiting, threading.Event):
                    waiting.set()

    def _write(self, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size + len(data) > LIMIT_BYTES:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


# ---- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of a flight. at: seconds since 1970."""

    at: float
    node: str
    what: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(
            [self.what, *(f"{key}={log.format_value(value)}" for key, value in self.fields.items())]
        )


def _bytes_of(path: Path) -> bytes:
    """Return a flight, the file before it included. Raises HostError."""
    parts = []
    for file in (path.with_name(path.name + ".1"), path):
        try:
            parts.append(file.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise HostError(friendly(error)) from None
    if not parts:
        raise HostError(
            f"{path}: no such file; nothing was recorded there, or it is another node's state_dir"
        )
    return b"".join(parts)


def parse(data: bytes) -> list[Entry]:
    """Return the entries of a flight's lines. Lines that are none, as those cut by a crash, are left out."""
    entries = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            told = json.loads(line)
            entries.append(Entry(float(told.pop("at")), str(told.pop("node")), str(told.pop("what")), told))
    return entries


def read(path: Path) -> list[Entry]:
    """Return the entries of a flight, the file before it included. Raises HostError if it cannot be read."""
    return parse(_bytes_of(path))


def tail(path: Path, limit: int = TAIL_BYTES) -> tuple[bytes, bool]:
    """Return the newest whole lines of a flight, so many bytes at most, and whether there are older ones.

    Raises HostError if it cannot be read.
    """
    data = _bytes_of(path)
    if len(data) <= limit:
        return data, False
    cut = data[-limit:]
    return cut[cut.find(b"\n") + 1 :], True


def pack(lines: bytes) -> str:
    """Compress lines for the link."""
    return base64.b64encode(zlib.compress(lines)).decode()


def unpack(packed: str, limit: int = TAIL_BYTES) -> bytes:
    """Undo `pack`. Raises PeerError for what it has not made, or would be more than so many bytes."""
    try:
        inflate = zlib.decompressobj()
        lines = inflate.decompress(base64.b64decode(packed, validate=True), limit)
    except (binascii.Error, zlib.error) as error:
        raise PeerError(f"the peer sent a record that cannot be unpacked: {error}") from None
    if inflate.unconsumed_tail or not inflate.eof:
        raise PeerError(f"the peer sent a record of more than {limit} bytes; give its file with --peer")
    return lines


def merge(flights: Iterable[list[Entry]]) -> list[Entry]:
    """Return the entries of several nodes in the order of their times."""
    return sorted((entry for flight in flights for entry in flight), key=lambda entry: entry.at)
