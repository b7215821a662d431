"""The copy of the disks to a backup, while the guest writes to them.

For each step of 16 MiB:

    backup's digests of 1 MiB each ── compare with own ── of those that differ: digests of 4 KiB
                                       ── compare, send what differs ── now and then close the journal

What is sent goes the way of the frames, in order with the journals that QEMU has kept since protection began.
That is enough for both disks to become the same:

* Closing the journal waits for the requests that are in it. So what is read afterwards contains all
  requests of journals that were sent before, and whatever else it contains (half of a request, say) is in a
  journal that will be sent after it, and repeated.
* A piece that is left out, since the digests are the same, was right but for requests whose journals were not
  applied yet; those are applied after.

A copy that was broken off is not lost: what it sent is found equal by the next one. The backup answers a
question after it has applied what came before; so at most a step is on the way.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ftd.disk import BLOCK, CHUNK, DIGEST_SIZE, Image, zero_digest
from ftd.errors import FtdError, LinkError
from ftd.journal import Request, RequestKind, encode_chunks
from ftd.messages import DiskDigests, DiskDigestsWanted

Piece = Literal[4096, 1048576]
Ask = Callable[[DiskDigestsWanted], Awaitable[None]]

STEP = 16 * CHUNK
"""Bytes of a disk that are compared at once: a guest that fills its journal meanwhile has to wait."""
CLOSE_SECONDS = 0.2
"""How often the journal is closed at the least: what is in it is memory here, and late on the backup."""
MESSAGE = 4 * CHUNK
"""Bytes of a disk that are read and sent at once."""


@dataclass(frozen=True)
class DiskProgress:
    """How far the copy is; bytes. total: of all disks; compared: of these; sent: what differed."""

    total: int
    compared: int
    sent: int


class Questions:
    """Questions to the backup about its disks, and what became of them. Made and used in the event loop.

    send(message) sends a control message.
    """

    def __init__(self, send: Ask) -> None:
        self._send = send
        self._seed = secrets.randbits(63)
        self._number = 0
        self._waiting: dict[int, asyncio.Future[tuple[int, list[bytes]]]] = {}

    @property
    def seed(self) -> int:
        """Of the digests: both sides need the same, and a guest must not know it."""
        return self._seed

    async def ask(self, disk: int, offsets: list[int], length: int, piece: Piece) -> tuple[int, list[bytes]]:
        """Return the digests of pieces of the backup's disk, and after which epoch they are true.

        `length` bytes at each of the offsets, or less at the end of the disk. The epoch is 0 during a copy.
        """
        self._number += 1
        number = self._number
        answer: asyncio.Future[tuple[int, list[bytes]]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        await self._send(
            DiskDigestsWanted(
                number=number, disk=disk, offsets=offsets, length=length, piece=piece, seed=self._seed
            )
        )
        return await answer

    def on_digests(self, message: DiskDigests) -> None:
        """Take an answer of the backup. Raises LinkError if it answers nothing that was asked."""
        waiting = self._waiting.pop(message.number, None)
        if waiting is None:
            raise LinkError(f"the backup sent digests of a disk that nobody asked for ({message.number})")
        try:
            data = base64.b64decode(message.digests, validate=True)
        except binascii.Error:
            raise LinkError("the backup sent digests of a disk that are not base64") from None
        if not waiting.done():
            digests = [data[at : at + DIGEST_SIZE] for at in range(0, len(data), DIGEST_SIZE)]
            waiting.set_result((message.epoch, digests))


class DiskCopy:
    """Copies `images`, in the order of the disks' numbers, to the backup. Made and used in the event loop.

    questions are put to the backup; send(bytes) sends on the frames connection and returns when that is
    done; close_journal() has QEMU close its journal and sends that; wait_for_pressure(seconds) waits, and
    says whether the journal is nearly full.
    """

    def __init__(
        self,
        images: Sequence[Image],
        generation: int,
        *,
        bytes_per_second: int,
        questions: Questions,
        send: Callable[[bytes], Awaitable[None]],
        close_journal: Callable[[], Awaitable[None]],
        wait_for_pressure: Callable[[float], Awaitable[bool]],
        on_progress: Callable[[DiskProgress], None],
    ) -> None:
        self._images = images
        self._generation = generation
        self._rate = bytes_per_second
        self._questions = questions
        self._seed = questions.seed
        self._send = send
        self._close_journal = close_journal
        self._wait_for_pressure = wait_for_pressure
        self._on_progress = on_progress
        self._compared = self._sent = 0
        self._closed = 0.0  # when the journal was
        self._total = sum(image.size for image in images)

    async def run(self) -> None:
        """Copy all disks. Raises HostError if a disk cannot be read, and what the callbacks raise."""
        self._tell()
        for number, image in enumerate(self._images):
            for start in range(0, image.size, STEP):
                length = min(STEP, image.size - start)
                await self._step(number, image, start, length)
                self._compared += length
                self._tell()

    def _tell(self) -> None:
        self._on_progress(DiskProgress(self._total, self._compared, self._sent))

    async def _step(self, number: int, image: Image, start: int, length: int) -> None:
        _, theirs = await self._questions.ask(number, [start], length, CHUNK)
        mine = await asyncio.to_thread(image.digests, start, length, CHUNK, self._seed)
        if len(theirs) != len(mine):
            raise LinkError(
                f"the backup sent {len(theirs)} digests of disk {image.name}: expected {len(mine)}"
            )
        differing = [start + at * CHUNK for at, digest in enumerate(mine) if digest != theirs[at]]
        # What is empty there needs no second look.
        empty = {
            offset
            for offset in differing
            if theirs[(offset - start) // CHUNK] == zero_digest(min(CHUNK, image.size - offset), self._seed)
        }
        fine: dict[int, list[bytes]] = {offset: [] for offset in empty}
        asked = [offset for offset in differing if offset not in empty]
        if asked:
            _, digests = await self._questions.ask(number, asked, CHUNK, BLOCK)
            at = 0
            for offset in asked:
                count = -(-min(CHUNK, image.size - offset) // BLOCK)
                fine[offset] = digests[at : at + count]
                at += count
            if at != len(digests):
                raise LinkError(f"the backup sent {len(digests)} digests of disk {image.name}: expected {at}")
        per_message = MESSAGE // CHUNK
        for at in range(0, len(differing), per_message):
            group = differing[at : at + per_message]
            requests = await asyncio.to_thread(self._differences, number, image, group, fine)
            # No journal may be closed between reading and sending.
            if requests:
                message = encode_chunks(self._generation, requests)
                await self._send(message)
                self._sent += len(message)
                self._tell()
                await self._pace(len(message))
        await self._pace(0)

    async def _pace(self, size: int) -> None:
        """Wait as long as the bandwidth asks for, and close the journal when it is time for that."""
        seconds = size / self._rate if self._rate else 0.0
        now = asyncio.get_running_loop().time()
        pressure = await self._wait_for_pressure(seconds)
        if pressure or now - self._closed > CLOSE_SECONDS:
            self._closed = now
            await self._close_journal()

    def _differences(
        self, number: int, image: Image, offsets: Sequence[int], fine: dict[int, list[bytes]]
    ) -> list[Request]:
        """Read chunks and return what of them has to be sent; in a thread."""
        requests = []
        for offset in offsets:
            size = min(CHUNK, image.size - offset)
            content = memoryview(image.read(offset, size))
            theirs = fine[offset]
            differs = np.ones(-(-size // BLOCK), dtype=np.bool_)
            if theirs:
                mine = image.digests_of(content, self._seed)
                differs = np.array([a != b for a, b in zip(mine, theirs, strict=True)], dtype=np.bool_)
            requests += _requests(number, offset, content, differs, skip_zeros=not theirs)
        return requests


def _requests(
    disk: int, offset: int, content: memoryview, differs: npt.NDArray[np.bool_], *, skip_zeros: bool
) -> list[Request]:
    """Return the requests that make the differing blocks of a chunk right; neighbours are one request."""
    requests: list[Request] = []
    at = 0
    kinds: list[RequestKind | None] = [
        None if not wanted else RequestKind.DATA if used else None if skip_zeros else RequestKind.UNMAP
        for wanted, used in zip(differs.tolist(), _used_blocks(content).tolist(), strict=True)
    ]
    while at < len(kinds):
        kind, first = kinds[at], at
        while at < len(kinds) and kinds[at] is kind:
            at += 1
        if kind is not None:
            data = content[first * BLOCK : at * BLOCK]
            requests.append(
                Request(
                    disk,
                    kind,
                    offset + first * BLOCK,
                    len(data),
                    data if kind is RequestKind.DATA else b"",
                )
            )
    return requests


def _used_blocks(content: memoryview) -> npt.NDArray[np.bool_]:
    """Return for each block whether there is anything but zeros in it."""
    data = np.frombuffer(content, dtype=np.uint8)
    if len(data) % BLOCK:
        data = np.pad(data, (0, BLOCK - len(data) % BLOCK))
    return np.asarray(data.view(np.uint64).reshape(-1, BLOCK // 8).any(axis=1), dtype=np.bool_)


def answer(wanted: DiskDigestsWanted, images: Sequence[Image], epoch: int) -> DiskDigests:
    """Return the backup's answer; in a thread. epoch: the last one that was applied, or 0.

    Raises FtdError for a question that cannot be answered.
    """
    if wanted.disk >= len(images):
        raise FtdError(f"the primary asks for disk {wanted.disk}, there are {len(images)}")
    image = images[wanted.disk]
    digests = b"".join(
        b"".join(image.digests(offset, wanted.length, wanted.piece, wanted.seed))
        for offset in wanted.offsets
        if offset < image.size
    )
    return DiskDigests(number=wanted.number, epoch=epoch, digests=base64.b64encode(digests).decode())
