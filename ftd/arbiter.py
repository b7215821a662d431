"""Who decides which side may run the guest when the two lose sight of each other.

Authority is a number, the generation, that grows by one whenever it changes hands. An arbiter holds it and
lets exactly one side advance it. There is one kind so far: none.
"""

from __future__ import annotations

from typing import Protocol


class Arbiter(Protocol):
    """Holds the generation."""

    async def refusal_to_advance(self, generation: int) -> str | None:
        """Try to move the generation from `generation` to the next. None: this side won. A text: why not."""
        ...


class NoArbiter:
    """Everybody wins. Only with `accept_split_brain = true`: when the link is cut, both run the guest."""

    WARNING = "no arbiter: if only the link between the two hosts fails, both run the guest (split brain)"

    async def refusal_to_advance(self, generation: int) -> str | None:
        """Nobody is asked."""
        return None
