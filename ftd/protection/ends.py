"""How protection over one session ends."""

from __future__ import annotations

from typing import Any

from ftd.carried import Carried
from ftd.errors import FtdError
from ftd.wire import LinkLost


class ProtectionLost(FtdError):  # noqa: N818 - names what happened
    """Protection over this session has ended; the guest runs on. The text says why.

    resync: whether to begin anew at once with the same backup. aborted: one of metrics.ABORT_REASONS.
    """

    def __init__(self, reason: str, *, resync: bool, aborted: str) -> None:
        super().__init__(reason)
        self.resync = resync
        self.aborted = aborted


class Yielded(ProtectionLost):
    """The backup has taken over, as it was asked to."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, resync=False, aborted="stopped")


class Suspended(ProtectionLost):
    """A daemon of the pair is being replaced; protection is to go on over another session."""

    def __init__(self, carried: Carried) -> None:
        super().__init__("a daemon of the pair is replaced", resync=True, aborted="stopped")
        self.carried = carried


def no_disks(error: FtdError) -> ProtectionLost:
    """Return that a disk cannot be replicated: to begin anew at once would not help."""
    return ProtectionLost(f"a disk cannot be replicated: {error}", resync=False, aborted="invalid")


def most_telling(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the most telling error of a group: a reason of ours before the link's end that it caused."""
    errors: list[BaseException] = []

    def collect(one: BaseException) -> None:
        if isinstance(one, BaseExceptionGroup):
            for inner in one.exceptions:
                collect(inner)
        else:
            errors.append(one)

    collect(group)
    return min(errors, key=lambda error: (isinstance(error, LinkLost), isinstance(error, OSError)))
