"""Replacing the daemon's program in place: what it hands on, and how its successor finds that.

    daemon       nothing is under way to the backup, and the peer waits ── execve ──>
    successor    the same process id, QEMU its child as before, memory files still open ── resumes

The process stays and its program is exchanged, so systemd sees no restart, and what QEMU and the daemon share
survives without a name in any file system. A description (`Handed`) lies in a memory file whose number is in
the environment. It says nothing of who has the guest: that is the arbiter's, and a successor that cannot
resume does what a daemon does that finds the guest of an earlier one.

Nothing here is needed for safety. If the successor never comes, output stays held in QEMU (rule S6), and the
peer, which waits for a bounded time, asks the arbiter.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftd import log
from ftd.errors import FtdError, HostError, friendly
from ftd.state import Role
from ftd.wire import PROTOCOL_VERSION

_log = log.get(__name__)

VARIABLE = "FTD_SUCCESSION"

# Changes with whatever makes a Handed of one version useless to another.
FORMAT: Literal[1] = 1

# For the successor's program to be looked at: it is only started, and reads a file.
CHECK_SECONDS = 40.0

# Signals that are a planned stop: they wait until the successor can take them.
STOPPING = (signal.SIGTERM, signal.SIGINT)

_LONGEST = 1 << 20

Descriptor = Annotated[int, Field(ge=3)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HandedPrimary(_Model):
    """What QEMU shares with the daemon that protects its guest. paired_with: the backup on record."""

    paired_with: str
    slots: list[Descriptor] = Field(min_length=1, max_length=16)
    slot_bytes: int = Field(ge=4096)
    slot_pages: int = Field(ge=1)
    release: Descriptor


class HandedBackup(_Model):
    """What the shadow is besides its memory files. image: as Shadow.load_image makes it."""

    image: Descriptor


class Handed(_Model):
    """What a daemon hands to its successor. epoch: the last one that is committed.

    began, deadline: monotonic seconds, of when output began to wait, and until when the peer waits.
    """

    format: Literal[1] = FORMAT
    node: str
    pid: int
    qemu_pid: int
    generation: int = Field(ge=0)
    epoch: int = Field(ge=0)
    peer_node: str
    began: float
    deadline: float
    primary: HandedPrimary | None = None
    backup: HandedBackup | None = None

    @property
    def role(self) -> Role:
        """Which part this node plays."""
        return "primary" if self.primary is not None else "backup"

    @property
    def descriptors(self) -> list[int]:
        """All that are handed on."""
        mine = [*self.primary.slots, self.primary.release] if self.primary is not None else []
        return [*mine, *([self.backup.image] if self.backup is not None else [])]

    def close(self) -> None:
        """Give all of it back: it is not needed."""
        for fd in self.descriptors:
            with suppress(OSError):
                os.close(fd)


class Succession(Exception):  # noqa: N818 - names what happens
    """The daemon's part is over, and its successor is to be started.

    handed: what that goes on with; None: it starts as any daemon does.
    """

    def __init__(self, handed: Handed | None) -> None:
        super().__init__("the daemon is replaced in place")
        self.handed = handed


def command() -> tuple[str, list[str]]:
    """Return the program that this process was started as, and its arguments.

    A script is started by its own name: where `ftd` is a link to the present version, the next one is found.
    """
    words = list(sys.orig_argv)
    if len(words) > 1 and os.access(words[1], os.X_OK) and Path(words[1]).is_file():
        return words[1], words[1:]
    return sys.executable, words


async def check() -> None:
    """Have the successor's program say whether it can start, and go on with what this one has begun.

    Raises FtdError with what it says, in one line.
    """
    program, words = command()
    asked = [program, *words[1:], "--check", "--succeeds", compatibility()]
    try:
        process = await asyncio.create_subprocess_exec(
            *asked,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise _cannot_start(program, error) from None
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            _, told = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise HostError(f"the next daemon ({program}) said nothing for {CHECK_SECONDS:g} s") from None
    if process.returncode:
        lines = told.decode(errors="replace").strip().splitlines()
        last = re.sub(r"^ftd: error: ", "", lines[-1]) if lines else f"exit status {process.returncode}"
        raise FtdError(f"the next daemon would not start: {last}; this one goes on")


def _cannot_start(program: str, error: OSError) -> HostError:
    return HostError(f"the next daemon cannot be started: {friendly(OSError(error.errno, '', program))}")


def compatibility() -> str:
    """Return what a successor has to have in common with this program: protocol and format, as `3.1`."""
    return f"{PROTOCOL_VERSION}.{FORMAT}"


def refusal_to_succeed(other: str) -> str | None:
    """Return why this program cannot go on with what one of another `compatibility` has begun."""
    if other == compatibility():
        return None
    return (
        f"it speaks protocol version {compatibility()}, and the running daemon {other}: protection cannot go "
        "on; restart the daemons of both hosts instead, which copies everything anew"
    )


def start(succession: Succession, environment: Mapping[str, str]) -> NoReturn:
    """Become the successor. environment: what was taken out of the process's and belongs to the daemon.

    Raises HostError if its program cannot be started.
    """
    program, words = command()
    told = dict(os.environ) | dict(environment)
    told.pop(VARIABLE, None)
    handed = succession.handed
    # It would be ended by a signal that comes before it has said what that means to it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        if handed is not None:
            note = os.memfd_create("ftd-succession", os.MFD_CLOEXEC)
            os.write(note, handed.model_dump_json().encode())
            for fd in (note, *handed.descriptors):
                os.set_inheritable(fd, True)
            told[VARIABLE] = str(note)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(program, words, told)
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        raise _cannot_start(program, error) from None


def listen_to_signals() -> None:
    """Take signals that came since the predecessor's end; to be called when they have their handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def take(node: str) -> Handed | None:
    """Return what a predecessor of this node has left, and take it out of the environment. None: nothing.

    What is not understood is not used, and said: the daemon then starts as any other does.
    """
    number = os.environ.pop(VARIABLE, "")
    if not number:
        return None
    try:
        note = int(number)
        with open(note, "rb") as file:
            file.seek(0)
            handed = Handed.model_validate_json(file.read(_LONGEST))
    except (OSError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else friendly(error)
        _log.error("what the daemon before this one has left is not understood", reason=reason)
        return None
    if (handed.node, handed.pid) != (node, os.getpid()):
        # Its descriptors are not ours to close: the numbers mean something else here.
        _log.error("what was left here is another daemon's", node=handed.node, pid=handed.pid)
        return None
    try:
        _keep_from_children(handed.descriptors)
    except OSError as error:
        _log.error("what the daemon before this one has left is gone", reason=friendly(error))
        return None
    return handed


def _keep_from_children(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.set_inheritable(fd, False)
