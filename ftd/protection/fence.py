"""What protection asks of whoever holds the authority."""

from __future__ import annotations

from typing import Protocol


class Fence(Protocol):
    """What ftd/mandate.py says about authority; the rules are in ftd/authority.py."""

    async def before_first_commit(self) -> None:
        """The backup may take over once a frame is on its way: return when that is noted for the disks.

        Raises HostError if it cannot be noted.
        """

    async def ready_to_commit(self) -> None:
        """The first frame is next: return when no question to the arbiter is under way any more.

        Raises ProtectionLost if one was answered: the copy was begun for something that is not so any more.
        """

    def on_first_commit(self) -> None:
        """The backup holds the guest: from now on this side may be deposed."""

    async def pair(self) -> None:
        """Return when the backup may be relied on. Raises FtdError when this side has lost the guest."""

    def release_at_the_end(self, committed: bool) -> bool:
        """Protection over this session has ended: say whether all that is held may go at once."""
        ...
