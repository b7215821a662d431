"""What can go wrong, by whose fault, and the exit code that says so.

    Exception
     +-- FtdError            1  anything below that has no code of its own
          +-- ConfigError    2  the operator's: a configuration that cannot work; starting again will not help
          +-- HostError      3  this machine's: a device, permission, port or space that is missing
          +-- QemuError      4  QEMU's: it did not start, refused a command, or cannot be protected
          |    +-- QemuDied  7  it is gone; the backup has the guest, so nothing may be started in its place
          +-- PeerError      5  the other side's: incompatible, or it refused us
          |    +-- NothingToResume     it no longer holds what an earlier session committed: copied anew
          +-- TakeoverRefused 6 nobody's: the shadow may not be started here
          +-- Deposed        1  nobody's: the other side has the guest; handled, never the end of the daemon
          +-- ArbiterError   1  the arbiter's: it does not answer, refuses us, or knows less than we do
          |    +-- ArbiterUnreachable  no answer; asked again, and never the end of a daemon
          |    +-- ArbiterStale        its data are older than this node's: a person has to look
          +-- LinkError      1  the connection to the peer broke; handled, never the end of the daemon
          +-- FrameError     1  the bytes of a frame are not a frame; the shadow was not touched

Exit codes are an interface (systemd units and scripts act on them) and never change their meaning.

The text of an error is one line for the operator: the thing, its value, and the remedy. Only ConfigError may
have several lines, one for each problem.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import ClassVar


class FtdError(Exception):
    """Whatever ftd reports to a person without a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(FtdError):
    """A configuration that cannot work. `problems` holds one line for each thing to correct."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class HostError(FtdError):
    """This machine lacks something: a device, a permission, a free port, space."""

    exit_code = 3


class QemuError(FtdError):
    """QEMU did not start, refused a command, or runs a guest that cannot be protected.

    When QEMU itself answered with an error, `qmp_class` is its class ("GenericError", "CommandNotFound", …)
    and `description` its own words; both are empty otherwise.
    """

    exit_code = 4

    def __init__(self, message: str, *, qmp_class: str = "", description: str = "") -> None:
        super().__init__(message)
        self.qmp_class = qmp_class
        self.description = description


class QemuDied(QemuError):  # noqa: N818 — the name says what happened
    """The monitor connection is gone: QEMU ended, or no longer speaks QMP on it.

    A code of its own, since a supervisor that starts the daemon again would start a second guest beside the
    one that the backup has taken over.
    """

    exit_code = 7


class PeerError(FtdError):
    """The peer is incompatible, is not who it should be, or refused us."""

    exit_code = 5


class NothingToResume(PeerError):  # noqa: N818 - the name says what happened
    """The peer no longer holds what an earlier session has committed."""


class TakeoverRefused(FtdError):  # noqa: N818 — the name says what happened
    """The shadow may not be started: nothing is committed, it is damaged, or another side has the guest."""

    exit_code = 6


class Deposed(FtdError):  # noqa: N818 - the name says what happened
    """The other side has the guest; the one here was killed. This node becomes the backup."""


class ArbiterError(FtdError):
    """The arbiter refuses us, or answers with what is no answer. Nothing was changed by the question."""


class ArbiterUnreachable(ArbiterError):  # noqa: N818 - the name says what happened
    """The arbiter gave no answer in time. in_doubt: a write was sent, and may take effect now or later."""

    def __init__(self, message: str, *, in_doubt: bool = False) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


class ArbiterStale(ArbiterError):  # noqa: N818 - the name says what happened
    """The arbiter's record is older than what this node has seen: it was restored, or emptied."""


class LinkError(FtdError):
    """A connection to the peer broke or stalled. The guest goes on."""


class FrameError(FtdError):
    """Bytes that should have been a frame are not one. Nothing of them was applied."""


# What the kernel's words for these do not tell an operator.
_REMEDIES = {
    errno.EACCES: "run ftd as a user that may use it",
    errno.EPERM: "run ftd as root, or give it the missing capability",
    errno.ENOENT: "create it, or correct the path",
    errno.ENOSPC: "free some space there",
    errno.EADDRINUSE: "stop the program that holds it, or choose another port",
    errno.EADDRNOTAVAIL: "give an address of this machine",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EROFS: "choose a path that can be written to",
    errno.EMFILE: "raise the limit of open files (LimitNOFILE= in the unit)",
}


def friendly(exception: BaseException) -> str:
    """Returns one line that names the thing, what went wrong and, where it is known, the remedy."""
    if isinstance(exception, FtdError):
        return str(exception)
    if isinstance(exception, OSError) and exception.errno is not None:
        thing = f"{os.fsdecode(exception.filename)}: " if isinstance(exception.filename, str | bytes) else ""
        remedy = _REMEDIES.get(exception.errno)
        reason = os.strerror(exception.errno)
        return f"{thing}{reason[:1].lower()}{reason[1:]}" + (f"; {remedy}" if remedy else "")
    if isinstance(exception, TimeoutError):
        return str(exception) or "timed out"
    text = " ".join(str(exception).split())
    return f"{type(exception).__name__}: {text}" if text else type(exception).__name__
