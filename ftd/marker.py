"""The marker of a disk: what its image is worth, in a file beside it, which survives a power loss.

    alone       the guest's disk, and no copy can be newer                     a guest may be started from it
    replicated  the guest's disk, with a backup that may have taken over       not, after a crash: it may be
                                                                               ahead of what the backup goes
                                                                               on with, and behind it
    syncing     the target of a copy that is not complete                      never
    copy        the disk of a committed epoch on a backup                      only by taking over

An arbiter settles the second row: a node that was the owner in its record, in that generation or a later one,
and wins the next, knows that nobody took over, and that its disk has all that was acknowledged.

A disk that is not to be started from comes back as the target of a new copy: as the backup of the host that
runs the guest. Without a marker an image is what its operator says it is.

The marker of the image DISK is DISK.ftd; that of a block device is in `[node] state_dir`, since /dev does not
survive. It is written before what it warns of can happen, and taken back after that. After a takeover a copy
is the guest's disk, and before that is noted all that is in it is made durable: the guest believes that of
what it has flushed.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ftd.disk import Image
from ftd.durable import load, replace
from ftd.errors import HostError


class Worth(StrEnum):
    """What an image is worth; the table is above."""

    ALONE = "alone"
    REPLICATED = "replicated"
    SYNCING = "syncing"
    COPY = "copy"


GUESTS = (Worth.ALONE, Worth.REPLICATED)
"""That a guest writes to the image, or has."""


class Note(BaseModel):
    """What a marker says: the image's worth, in which generation, and which node wrote it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    worth: Worth
    generation: int = Field(ge=0)
    node: str = ""


class Marker:
    """The marker of one image. Raises HostError, one line, for what cannot be read or written."""

    def __init__(self, image: Path, state_folder: Path) -> None:
        self.image = image
        try:
            block = stat.S_ISBLK(image.stat().st_mode)
        except OSError:
            block = False
        if block:
            self.path = state_folder / f"disk-{str(image.absolute()).strip('/').replace('/', '-')}.ftd"
        else:
            self.path = image.with_name(image.name + ".ftd")

    def read(self) -> Note | None:
        """Return what was last written, or None."""
        not_one = (
            f"is not the marker of a disk; if you know that {self.image} is the newest copy of the disk, "
            "remove it"
        )
        return load(self.path, Note, not_one)

    def write(self, note: Note) -> None:
        """Replace the marker, and return when it would survive a power loss."""
        replace(self.path, note)

    def make_durable(self) -> None:
        """Have what a backup has written to the image survive a power loss, if it was one that wrote it last.

        What QEMU writes for a guest it makes durable itself, when the guest wants that.
        """
        try:
            note = self.read()
        except HostError:
            pass  # nobody knows
        else:
            if note is None or note.worth in GUESTS:
                return
        image = Image(self.image.name, self.image)
        try:
            image.sync()
        finally:
            image.close()

    def refusal_to_start(self, settled: int = -1) -> str | None:
        """Return why no guest may be started from the image, or None if one may.

        settled: up to this generation it is known that no backup has taken over from this node.
        """
        note = self.read()
        if note is None or note.worth is Worth.ALONE:
            return None
        if note.worth is Worth.REPLICATED and note.generation <= settled:
            return None
        why = {
            Worth.REPLICATED: "it had a backup, which may have taken over",
            Worth.SYNCING: "it is the target of a copy that is not complete",
            Worth.COPY: "it is a backup's copy, which is started by taking over",
        }[note.worth]
        return (
            f"disk {self.image}: {why} (generation {note.generation}); start this node as the backup of the "
            f"one that runs the guest, or, if none does and this is the newest copy, remove {self.path}"
        )

    def refusal_to_overwrite(self, generation: int) -> str | None:
        """Return why the image may not become a copy of one of that generation, or None if it may."""
        note = self.read()
        if note is None or note.worth is not Worth.ALONE or note.generation <= generation:
            return None
        return (
            f"disk {self.image}: is newer (generation {note.generation}) than the peer's (generation "
            f"{generation}), and would be overwritten; if that is meant, remove {self.path}"
        )


class Markers:
    """The markers of all disks of a guest. For the event loop: what is asked for is written in that order.

    Writing waits for the host's disk, so it goes on in a thread.
    """

    def __init__(self, markers: Sequence[Marker], node: str) -> None:
        self._markers = list(markers)
        self._node = node
        self._lock = asyncio.Lock()  # whoever waits for it first has it first
        self._under_way: set[asyncio.Task[None]] = set()

    def start(self, worth: Worth, generation: int) -> asyncio.Task[None]:
        """Begin to write the same to all markers; the task raises HostError, and may not be cancelled."""
        task = asyncio.create_task(self._write(worth, generation))
        self._under_way.add(task)
        task.add_done_callback(self._done)
        return task

    async def write(self, worth: Worth, generation: int) -> None:
        """Return when all markers say it, and would after a power loss. Raises HostError."""
        await asyncio.shield(self.start(worth, generation))

    async def settle(self) -> None:
        """Return when nothing is being written any more."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # somebody may have stopped waiting

    async def _write(self, worth: Worth, generation: int) -> None:
        async with self._lock:
            if self._markers:
                await asyncio.to_thread(mark, self._markers, worth, generation, self._node)


def mark(markers: list[Marker], worth: Worth, generation: int, node: str) -> None:
    """Write the same to all markers. Raises HostError.

    If they are the guest's from now on, images that were copies are made durable before: that may take as
    long as a disk is busy.
    """
    if worth in GUESTS:
        for marker in markers:
            marker.make_durable()
    for marker in markers:
        marker.write(Note(worth=worth, generation=generation, node=node))
