"""An arbiter that is real, and cannot be relied on to answer."""

import asyncio
from typing import Any, Literal

from ftd.arbiter import Answer, Record
from ftd.arbiter_file import FileArbiter
from ftd.errors import ArbiterUnreachable


class LossyArbiter(FileArbiter):
    """Loses what passes between it and its node while `losing` says so.

    "all": nothing gets there, and that is known. "before" and "after": a change is lost on its way there, or
    its answer on the way back, and nobody can tell which of the two it was.
    """

    losing: Literal["", "all", "before", "after"] = ""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.unreached: asyncio.Queue[None] = asyncio.Queue()  # an item for each that did not get there

    async def read(self) -> Record | None:
        """See Arbiter."""
        self._reach()
        return await super().read()

    async def compare_and_set(self, expected: Record | None, new: Record) -> Answer:
        """See Arbiter."""
        self._reach()
        if self.losing == "before":
            raise ArbiterUnreachable("lost on the way there", in_doubt=True)
        answer = await super().compare_and_set(expected, new)
        if self.losing == "after":
            raise ArbiterUnreachable("lost on the way back", in_doubt=True)
        return answer

    def _reach(self) -> None:
        if self.losing == "all":
            self.unreached.put_nowait(None)
            raise ArbiterUnreachable("nobody answers")
