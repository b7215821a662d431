"""The disks of a shadow: what they are worth, noted beside them, and that they survive a loss of power.

What happens to them after a takeover is the primary's: the guest writes to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ftd import log
from ftd.disk import Copies
from ftd.errors import HostError, friendly
from ftd.marker import Marker, Markers, Worth

_log = log.get(__name__)

# How often what was written to the disks is made durable.
DISK_SYNC_SECONDS = 2.0


class Disks:
    """The disks of the shadow, and their markers. node: the name of this one, which is noted."""

    def __init__(self, copies: Copies, markers: list[Marker], node: str) -> None:
        self.copies = copies
        self.markers = Markers(markers, node)

    async def mark(self, worth: Worth, generation: int) -> bool:
        """Note what the disks here are worth. Returns whether that was possible."""
        try:
            await self.markers.write(worth, generation)
        except HostError as error:
            _log.error("the disks are not marked", worth=worth, reason=friendly(error))
            return False
        return True

    async def keep(
        self, copied: asyncio.Event, generation: int, on_failed: Callable[[str, bool], None]
    ) -> None:
        """Mark the copy as complete, and make it durable again and again.

        Nobody waits for it: a backup that loses its power is not taken over to, and is copied anew. But
        should this host take over and lose its power, too, the less is lost, the more is durable.
        """
        if not self.copies.images:
            return
        await copied.wait()
        await self.mark(Worth.COPY, generation)
        while True:
            await asyncio.sleep(DISK_SYNC_SECONDS)
            try:
                await asyncio.to_thread(self.copies.sync)
            except HostError as error:
                on_failed(friendly(error), True)
                return
