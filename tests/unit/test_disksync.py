"""The copy of disks, between two images and with a guest that writes meanwhile; no QEMU, no link."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ftd import disksync
from ftd.disk import CHUNK, Copies, Image
from ftd.disksync import DiskCopy, DiskProgress, Questions
from ftd.errors import LinkError
from ftd.journal import Journal, Request, RequestKind, encode, parse_chunks
from ftd.messages import DiskDigests, DiskDigestsWanted

SIZE = 70 * CHUNK + 512


class World:
    """A guest's disk, a backup that applies what comes in order, and a journal in between."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.paths = [folder / "here.img", folder / "there.img"]
        for path in self.paths:
            with path.open("wb") as file:
                file.truncate(SIZE)
                for _ in range(30):
                    file.seek(int(self.random.integers(0, SIZE // 512 - 64)) * 512)
                    file.write(self.random.bytes(int(self.random.integers(1, 64)) * 512))
        self.guest = Image("vd0", self.paths[0], writable=True)
        self.copies = Copies([("vd0", self.paths[1])])
        self.journal: list[Request] = []
        self.progress: list[DiskProgress] = []
        self.sent: list[int] = []
        self.hook: Callable[[], None] = lambda: None
        self.questions = Questions(self.ask)
        self.copy = DiskCopy(
            [Image("vd0", self.paths[0])],
            1,
            bytes_per_second=0,
            questions=self.questions,
            send=self.send,
            close_journal=self.close_journal,
            wait_for_pressure=self.wait_for_pressure,
            on_progress=self.progress.append,
        )

    def write(self) -> None:
        """The guest writes something somewhere, often in the same place."""
        span = SIZE // 512 if self.random.integers(2) else 4096
        size = int(self.random.integers(1, 200)) * 512
        offset = min(int(self.random.integers(0, span)) * 512, SIZE - size)
        kind = RequestKind(int(self.random.integers(1, 4)))
        data = self.random.bytes(size) if kind is RequestKind.DATA else b""
        request = Request(0, kind, offset, size, data)
        self.guest.apply(request)
        self.journal.append(request)

    async def ask(self, wanted: DiskDigestsWanted) -> None:
        self.hook()
        self.questions.on_digests(disksync.answer(wanted, self.copies.images, 0))
        self.hook()

    async def send(self, message: bytes) -> None:
        self.sent.append(len(message))
        self.hook()
        self.copies.apply(parse_chunks(memoryview(message), 1))

    async def close_journal(self) -> None:
        requests, self.journal = self.journal, []
        self.copies.apply(Journal(memoryview(encode(requests)), len(requests)))

    async def wait_for_pressure(self, seconds: float) -> bool:
        return bool(self.random.integers(2))


@pytest.mark.parametrize("seed", range(4))
async def test_both_disks_become_the_same_while_the_guest_writes(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed)
    world.hook = lambda: [world.write() for _ in range(int(world.random.integers(0, 4)))] and None  # type: ignore[assignment]
    await world.copy.run()
    await world.close_journal()
    assert world.paths[0].read_bytes() == world.paths[1].read_bytes()
    last = world.progress[-1]
    assert (last.total, last.compared, last.sent) == (SIZE, SIZE, sum(world.sent))


async def test_a_second_copy_sends_nothing_and_a_small_difference_little(tmp_path: Path) -> None:
    world = World(tmp_path, 9)
    await world.copy.run()
    assert world.paths[0].read_bytes() == world.paths[1].read_bytes()
    first, world.sent = sum(world.sent), []
    assert first > CHUNK // 2
    await world.copy.run()
    assert world.sent == []
    world.guest.apply(Request(0, RequestKind.DATA, 5 * CHUNK + 512, 512, bytes([9]) * 512))
    await world.copy.run()
    assert 4096 <= sum(world.sent) <= 4096 + 200


async def test_it_is_the_order_that_makes_them_the_same(tmp_path: Path) -> None:
    """What the guest overwrites between reading and sending is old when it comes after its journal."""
    world = World(tmp_path, 3)
    newer = Request(0, RequestKind.DATA, 0, 4096, bytes([1]) * 4096)
    world.guest.apply(Request(0, RequestKind.DATA, 0, 4096, bytes([9]) * 4096))

    async def send_late(message: bytes) -> None:
        requests = list(parse_chunks(memoryview(message), 1))
        if requests[0].offset == 0:
            world.guest.apply(newer)
            world.journal.append(newer)
            await world.close_journal()
        world.copies.apply(parse_chunks(memoryview(message), 1))

    world.copy._send = send_late
    await world.copy.run()
    await world.close_journal()
    with world.paths[1].open("rb") as file:
        assert file.read(4096) == bytes([9]) * 4096
    with world.paths[0].open("rb") as file:
        assert file.read(4096) == newer.data


async def test_answers_that_were_not_asked_for_or_do_not_fit_end_the_session(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    with pytest.raises(LinkError, match="nobody asked for"):
        world.questions.on_digests(DiskDigests(number=1, digests=""))

    async def wrong(wanted: DiskDigestsWanted) -> None:
        world.questions.on_digests(DiskDigests(number=wanted.number, digests="AAAA"))

    world.questions._send = wrong
    with pytest.raises(LinkError, match="sent 1 digests of disk vd0: expected 16"):
        await asyncio.wait_for(world.copy.run(), 10)
