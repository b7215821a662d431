"""The comparison of disks while a guest writes to them: exact, wherever the writes fall; no QEMU, no link."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from ftd import disksync
from ftd.disk import BLOCK, CHUNK, Copies, Image
from ftd.disksync import Questions
from ftd.diskverify import DiskChecks, DiskVerifier
from ftd.errors import HostError, LinkError
from ftd.journal import Journal, Request, RequestKind, encode
from ftd.messages import DiskDigests, DiskDigestsWanted, DiskVerifyResult

SIZE = 9 * CHUNK + 512
SECOND = 80 * CHUNK


class World:
    """A guest that writes all the time, epochs that are closed, and a backup some epochs behind."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        paths: list[list[Path]] = [[], []]
        for number, size in enumerate((SIZE, SECOND)):
            content = bytearray(size)
            for _ in range(20):
                at = int(self.random.integers(0, SIZE // 512 - 64)) * 512
                content[at : at + 4096] = self.random.bytes(4096)
            for side in range(2):
                paths[side].append(folder / f"{number}-{side}.img")
                with paths[side][number].open("wb") as file:
                    file.truncate(size)
                    file.write(content[:SIZE])
        self.there = paths[1]
        self.guest = [Image(path.stem, path, writable=True) for path in paths[0]]
        self.images = [Image(f"vd{number}", path) for number, path in enumerate(paths[0])]
        self.copies = Copies([(f"vd{number}", path) for number, path in enumerate(paths[1])])
        self.epoch = 1
        self.committed = self.applied = 0
        self.running: list[Request] = []
        self.half: list[Request] = []  # of the running epoch: recorded, and not made yet
        self.frames: list[Journal] = []
        self.changed = asyncio.Event()
        self.questions = Questions(self.ask)
        self.verifier = DiskVerifier(
            self.images, self.questions, epoch=lambda: self.epoch, wait_committed=self.wait_committed
        )

    def write(self) -> None:
        disk = int(self.random.integers(2))
        size = int(self.random.integers(1, 300)) * 512
        span = 64 if self.random.integers(2) else (SIZE - size) // 512
        kind = RequestKind(int(self.random.integers(1, 5)))
        offset = int(self.random.integers(0, span)) * 512
        if kind is RequestKind.FLUSH:
            offset = size = 0
        data = self.random.bytes(size) if kind is RequestKind.DATA else b""
        request = Request(disk, kind, offset, size, data)
        self.running.append(request)
        self.half.append(request)
        if self.random.integers(3) == 0:
            self.make()

    def make(self) -> None:
        for request in self.half:
            self.guest[request.disk].apply(request)
        self.half = []

    def close_epoch(self) -> None:
        """Close the journal with its requests made; commit what is an epoch older, apply some of that."""
        self.make()
        journal = Journal(memoryview(encode(self.running)), len(self.running))
        self.running = []
        self.frames.append(journal)
        self.verifier.on_journal(self.epoch, journal)
        self.epoch += 1
        self.committed = self.epoch - 2
        while self.applied < self.committed - int(self.random.integers(0, 3)):
            self.apply()
        self.changed.set()

    def apply(self) -> None:
        self.copies.apply(self.frames[self.applied])
        self.applied += 1

    async def run_guest(self) -> None:
        while True:
            for _ in range(int(self.random.integers(0, 12))):
                self.write()
                await asyncio.sleep(0)
            self.close_epoch()
            await asyncio.sleep(0.001)

    async def ask(self, wanted: DiskDigestsWanted) -> None:
        self.questions.on_digests(disksync.answer(wanted, self.copies.images, self.applied))

    async def wait_committed(self, epoch: int) -> None:
        while self.committed < epoch:
            self.changed.clear()
            await self.changed.wait()

    async def compare(self, chunks: list[Iterable[int]] | None = None) -> DiskVerifyResult:
        guest = asyncio.create_task(self.run_guest())
        try:
            return await asyncio.wait_for(self.verifier.run(chunks), 60)
        finally:
            guest.cancel()


@pytest.mark.parametrize("seed", range(6))
async def test_a_copy_that_is_right_is_found_right_while_the_guest_writes(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed)
    found = await world.compare()
    assert found == DiskVerifyResult(
        epoch=found.epoch, ok=True, blocks=-(-SIZE // BLOCK) + SECOND // BLOCK, differing=0, differences=[]
    )
    assert 1 < found.epoch <= world.committed


@pytest.mark.parametrize("seed", range(3))
async def test_a_byte_that_is_wrong_is_found_while_the_guest_writes(tmp_path: Path, seed: int) -> None:
    """In data, in a hole, and in the sector at the end; the guest writes to none of these places."""
    world = World(tmp_path, seed)
    world.write = lambda: None  # type: ignore[method-assign]
    for disk, place in ((0, 700 * 512), (0, SIZE - 1), (1, 70 * CHUNK + 5)):
        with world.there[disk].open("r+b") as file:
            file.seek(place)
            was = file.read(1)[0]
            file.seek(place)
            file.write(bytes([was ^ 1]))
    found = await world.compare()
    assert not found.ok
    assert found.differing == 3
    assert [(one.disk, one.block) for one in found.differences] == [
        ("vd0", 700 * 512 // BLOCK),
        ("vd0", SIZE // BLOCK),
        ("vd1", 70 * CHUNK // BLOCK),
    ]


async def test_a_request_that_was_not_repeated_is_found(tmp_path: Path) -> None:
    world = World(tmp_path, 1)
    world.write = lambda: None  # type: ignore[method-assign]
    world.guest[1].apply(Request(1, RequestKind.DATA, 3 * CHUNK - 512, 1024, bytes([7]) * 1024))
    found = await world.compare()
    assert [one.block for one in found.differences] == [3 * 256 - 1, 3 * 256]


async def test_only_some_chunks_are_compared_if_that_is_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.there[0].open("r+b") as file:
        file.write(b"wrong")
    found = await world.compare([{1, 9}, [70]])
    assert (found.ok, found.blocks) == (True, 256 + 1 + 256)
    found = await world.compare([[0], []])
    assert (found.ok, found.differing) == (False, 1)


async def test_an_answer_of_the_wrong_length_ends_the_session(tmp_path: Path) -> None:
    world = World(tmp_path, 1)

    async def wrong(wanted: DiskDigestsWanted) -> None:
        answer = DiskDigests(number=wanted.number, epoch=1 << 40, digests="AAAA")
        world.questions.on_digests(answer)

    world.questions._send = wrong
    with pytest.raises(LinkError, match=r"sent 1 digests of disk vd[01]: expected \d+"):
        await world.compare()


async def test_what_was_written_since_the_last_time_is_compared_and_all_of_it_when_asked(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, 4)
    results: asyncio.Queue[DiskVerifyResult] = asyncio.Queue()
    checks = DiskChecks(
        world.images,
        world.questions,
        epoch=lambda: world.epoch,
        wait_committed=world.wait_committed,
        remember=True,
        on_result=results.put,
    )
    world.verifier = checks  # type: ignore[assignment]
    world.running = [Request(1, RequestKind.ZEROES, 2 * CHUNK - 512, 1024)]
    world.close_epoch()
    world.write = lambda: None  # type: ignore[method-assign]
    running = asyncio.create_task(checks.run())
    guest = asyncio.create_task(world.run_guest())
    try:
        async with asyncio.timeout(30):
            checks.changed()
            assert (await results.get()).blocks == 2 * 256
            checks.changed()  # nothing
            assert (await checks.whole()).blocks == -(-SIZE // BLOCK) + SECOND // BLOCK
            assert (await results.get()).ok
            assert results.empty()
            whole = world.images[0]
            world.images[0] = Image("vd0", tmp_path / "0-0.img")
            world.images[0].close()
            with pytest.raises(HostError, match=r"disk vd0 .*: reading at \d+: bad file descriptor"):
                await checks.whole()
            world.images[0] = whole
            assert (await checks.whole()).ok
            running.cancel()
            waiting = asyncio.create_task(checks.whole())
            await asyncio.sleep(0)
            checks.close(LinkError("gone"))
            with pytest.raises(LinkError, match="gone"):
                await waiting
            with pytest.raises(LinkError, match="gone"):
                await checks.whole()
    finally:
        running.cancel()
        guest.cancel()
