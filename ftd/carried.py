"""Protection between two sessions: what outlives one while a daemon of the pair is replaced in place.

It is always at the boundary of two epochs: all that was closed is committed, and of the epoch that runs
nothing was sent. QEMU goes on to note dirty pages and the disks' journal, and holds all output of that epoch;
so the next frame, over the next session, contains whatever happened meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ftd.disk import Image
from ftd.staging import Staging
from ftd.succession import Handed, HandedPrimary


@dataclass
class Carried:
    """Protection without a session. epoch: that the guest is in; all before it are committed.

    own: it is this side's daemon that is replaced. began, deadline: monotonic seconds, of when output began
    to wait, and until when it waits for the other side. staging, release: what QEMU shares with the daemon.
    """

    generation: int
    epoch: int
    peer_node: str
    own: bool
    began: float
    deadline: float
    staging: Staging
    release: int
    slot_pages: int
    images: list[Image] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that are left until the deadline; below 0 after it."""
        return self.deadline - time.monotonic()

    def close(self) -> None:
        """Let go of everything. QEMU must have let go of the slots before (`x-ft-end`)."""
        with suppress(OSError):
            os.close(self.release)
        self.staging.close()
        for image in self.images:
            image.close()

    def hand_on(self, node: str, qemu_pid: int, paired_with: str) -> Handed:
        """Describe it to the successor of this daemon."""
        slots = self.staging.slots
        return Handed(
            node=node,
            pid=os.getpid(),
            qemu_pid=qemu_pid,
            generation=self.generation,
            epoch=self.epoch - 1,
            peer_node=self.peer_node,
            began=self.began,
            deadline=self.deadline,
            primary=HandedPrimary(
                paired_with=paired_with,
                slots=[slot.fd for slot in slots],
                slot_bytes=slots[0].size,
                slot_pages=self.slot_pages,
                release=self.release,
            ),
        )

    @classmethod
    def take_over(cls, handed: Handed, disks: Sequence[tuple[str, Path]]) -> Self:
        """Take up what a predecessor handed on. disks: names and images of the guest's.

        Raises HostError if that is impossible.
        """
        mine = handed.primary
        assert mine is not None
        images: list[Image] = []
        try:
            for name, path in disks:
                images.append(Image(name, path))
            staging = Staging(len(mine.slots), mine.slot_bytes, mine.slots)
        except BaseException:
            for image in images:
                image.close()
            raise
        return cls(
            generation=handed.generation,
            epoch=handed.epoch + 1,
            peer_node=handed.peer_node,
            own=True,
            began=handed.began,
            deadline=handed.deadline,
            staging=staging,
            release=mine.release,
            slot_pages=mine.slot_pages,
            images=images,
        )
