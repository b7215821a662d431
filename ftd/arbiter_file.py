"""The record of a pair as files in a folder that both hosts mount: NFS, or any other shared file system.

    PAIR.00000001  PAIR.00000002  …     one file for each record that there ever was, numbered without gaps
    .PAIR.HOST-PID-WORD                 a record that is being written

Compare-and-set is link(2): the new record is written to a file of a private name, forced to the disk, and
linked to the number after the one that was expected. Of all who try the same number exactly one succeeds:

* link(2) does not replace. The server does it as one step, and the client never answers from a cache. It
  is the one operation with which NFS has always been locked (open(2) with O_EXCL is another since
  version 3; rename(2) replaces, and lock files would have to be broken by a timeout).
* The answer to a LINK may get lost, and its repetition then fails with "exists" although it was the first
  that succeeded. So the answer is not believed: the private file is, whose number of links is two if and only
  if it was linked; and what stands under the number is read, which has a random token.
* A number is never given away twice. Old files are removed, but the newest thousand stay; and whoever has
  linked a number looks whether there is a higher one, which would mean that it came a thousand changes late.

A record is what its file holds, and files are never written again, so a reader sees it whole or not at all.
A stale listing (NFS caches them for seconds) only makes a reader name an old record: its link fails, and then
it looks again. Mount with `lookupcache=positive` or `none`, and a short `actimeo`, to keep that rare.

All of this blocks, on a hard mount for as long as the server is away. It is done in a thread that nobody
waits for longer than the time limit, one at a time; a question that was given up on is `in_doubt`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ftd.arbiter import Answer, Record, decode_record, encode_record
from ftd.errors import ArbiterError, ArbiterUnreachable, friendly

KEPT = 1000

_T = TypeVar("_T")


class FileArbiter:
    """Keeps the record of one pair in a folder. See arbiter.Arbiter for the contract. timeout: seconds."""

    kind = "file"

    def __init__(self, folder: Path, pair: str, *, timeout: float) -> None:
        self._folder = folder
        self._pair = pair
        self._timeout = timeout
        self._pattern = re.compile(rf"{re.escape(pair)}\.(\d{{8,}})")
        self._stuck: threading.Thread | None = None
        self._linking = False  # whether a failure may have come after the link

    # ---- the contract ---------------------------------------------------------------------------------

    async def read(self) -> Record | None:
        """Return the record; see arbiter.Arbiter."""
        _, record = await self._in_thread(self._newest, writes=False)
        return record

    async def compare_and_set(self, expected: Record | None, new: Record) -> Answer:
        """Replace the record; see arbiter.Arbiter."""
        return await self._in_thread(lambda: self._compare_and_set(expected, new), writes=True)

    async def close(self) -> None:
        """Nothing is open."""

    # ---- in the thread --------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._pair}.{number:08d}"

    def _numbers(self) -> list[int]:
        return sorted(
            int(match[1])
            for name in os.listdir(self._folder)  # noqa: PTH208 - names
            if (match := self._pattern.fullmatch(name))
        )

    def _newest(self) -> tuple[int, Record | None]:
        """Return the highest number and its record; 0 and None if there is none."""
        for _ in range(10):
            numbers = self._numbers()
            if not numbers:
                return 0, None
            path = self._path(numbers[-1])
            with contextlib.suppress(FileNotFoundError):  # the listing was old, and the file is gone
                return numbers[-1], decode_record(path.read_bytes(), str(path))
        raise ArbiterError(f"{self._folder}: files of the pair {self._pair} vanish; who removes them?")

    def _compare_and_set(self, expected: Record | None, new: Record) -> Answer:
        self._linking = False
        number, record = self._newest()
        if record == new:
            return Answer(True, record)  # an earlier copy of this question has won
        if record != expected:
            return Answer(False, record)
        word = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        private = self._folder / f".{self._pair}.{word}"
        try:
            fd = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, encode_record(new))
                os.fsync(fd)
            finally:
                os.close(fd)
            self._linking = True
            with contextlib.suppress(FileExistsError):
                os.link(private, self._path(number + 1))
            won = private.stat().st_nlink == 2
        finally:
            with contextlib.suppress(OSError):
                private.unlink()
        self._sync_folder()
        highest, record = self._newest()
        if won and number + 1 <= highest - KEPT // 2:
            # The number had been given away and removed long ago: this was no win.
            self._path(number + 1).unlink(missing_ok=True)
            return Answer(False, record)
        if won:
            self._remove_old(highest)
            return Answer(True, new)
        return Answer(record == new, record)

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove_old(self, highest: int) -> None:
        with contextlib.suppress(OSError):
            for number in self._numbers():
                if number <= highest - KEPT:
                    self._path(number).unlink(missing_ok=True)

    # ---- in the event loop ----------------------------------------------------------------------------

    async def _in_thread(self, function: Callable[[], _T], *, writes: bool) -> _T:
        """Run a blocking function in a thread of its own, and give up on it when time is over.

        Not in asyncio's pool: a thread that hangs in a dead mount would keep the process from ending.
        """
        if self._stuck is not None and self._stuck.is_alive():
            raise ArbiterUnreachable(
                f"{self._folder}: an earlier question still hangs; is the file server there?", in_doubt=writes
            )
        loop = asyncio.get_running_loop()
        result: asyncio.Future[_T] = loop.create_future()

        def settle(value: _T | None, error: BaseException | None) -> None:
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)  # type: ignore[arg-type]

        def run() -> None:
            try:
                outcome: tuple[_T | None, BaseException | None] = (function(), None)
            except BaseException as error:
                outcome = (None, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, *outcome)

        thread = threading.Thread(target=run, name="ftd-arbiter", daemon=True)
        thread.start()
        try:
            return await asyncio.wait_for(result, self._timeout)
        except TimeoutError:
            self._stuck = thread
            raise ArbiterUnreachable(
                f"{self._folder}: no answer within {self._timeout:g} s; is the file server there?",
                in_doubt=writes,
            ) from None
        except OSError as error:
            raise ArbiterUnreachable(
                f"[arbiter] folder: {friendly(error)}", in_doubt=writes and self._linking
            ) from None
