import asyncio
import fcntl
import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from unit.frame_builder import Spec

from ftd.errors import HostError
from ftd.frame import Part, parse_header
from ftd.staging import DEVICE_BYTES, Slot, Staging, slot_size

SIZE = 1 << 20


def open_descriptors() -> int:
    gc.collect()  # what a failed test before this one left in its traceback
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_size_holds_data_tables_device_state_and_digests() -> None:
    size = slot_size(64 << 20, 1 << 30)
    assert size % 4096 == 0
    least = 4096 + 320 * 256 + 2 * 8 * 16384 + (64 << 20) + DEVICE_BYTES + 8 * 262144
    assert least <= size <= least + 3 * 4096
    assert slot_size(4096, 4096) > DEVICE_BYTES
    # The journal, and always the largest request.
    assert slot_size(64 << 20, 1 << 30, 8 << 20) - size >= 8 << 20
    assert slot_size(64 << 20, 1 << 30, 65536) - size >= (1 << 20) + 32


def test_a_slot_cannot_be_resized_or_sealed_but_written_by_who_has_the_descriptor() -> None:
    with Staging(1, SIZE) as staging:
        slot = staging.slots[0]
        assert os.fstat(slot.fd).st_size == SIZE
        for size in (0, SIZE - 4096, SIZE + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(slot.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(slot.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        writer = mmap.mmap(slot.fd, SIZE)
        writer[0:4] = b"QEMU"
        assert bytes(slot.view[:4]) == b"QEMU"
        assert slot.view.readonly
        writer.close()


def test_a_part_is_read_from_a_slot_where_it_lies() -> None:
    with Staging(1, SIZE) as staging:
        slot = staging.slots[0]
        image = Spec(pages={(0, 1): 3}).slot()
        os.pwrite(slot.fd, image, 0)
        part = Part.from_slot(slot.view)
        part.verify()
        assert np.shares_memory(part.data, np.frombuffer(slot.view, dtype=np.uint8))
        assert parse_header(slot.view) == part.header
        del part


async def test_slots_are_given_out_once_and_in_the_order_they_came_back() -> None:
    with Staging(3, SIZE) as staging:
        slots = [await staging.acquire_free() for _ in range(3)]
        assert [slot.index for slot in slots] == [0, 1, 2]
        assert (staging.free, staging.busy) == (0, 3)
        assert staging.acquire_free_nowait() is None
        staging.release(slots[2])
        staging.release(slots[0])
        assert (staging.free, staging.busy) == (2, 1)
        assert [(await staging.acquire_free()).index for _ in range(2)] == [2, 0]


async def test_whoever_waited_first_gets_the_slot_and_nobody_overtakes() -> None:
    with Staging(1, SIZE) as staging:
        slot = await staging.acquire_free()
        order: list[str] = []

        async def waiter(name: str) -> None:
            got = await staging.acquire_free()
            order.append(name)
            staging.release(got)

        tasks = [asyncio.create_task(waiter(name)) for name in ("first", "second")]
        await asyncio.sleep(0)
        staging.release(slot)
        assert staging.acquire_free_nowait() is None
        await asyncio.gather(*tasks)
        assert order == ["first", "second"]
        assert staging.free == 1


async def test_a_cancelled_waiter_loses_no_slot() -> None:
    with Staging(1, SIZE) as staging:
        slot = await staging.acquire_free()
        before = asyncio.create_task(staging.acquire_free())
        await asyncio.sleep(0)
        before.cancel()
        await asyncio.gather(before, return_exceptions=True)
        # cancelled after the slot was handed to it, before it woke up
        after = asyncio.create_task(staging.acquire_free())
        await asyncio.sleep(0)
        staging.release(slot)
        after.cancel()
        await asyncio.gather(after, return_exceptions=True)
        assert staging.free == 1


async def test_a_thread_releases_through_the_loop() -> None:
    with Staging(1, SIZE) as staging:
        slot = await staging.acquire_free()
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(staging.acquire_free())
        await asyncio.sleep(0)
        await asyncio.to_thread(loop.call_soon_threadsafe, staging.release, slot)
        assert await asyncio.wait_for(waiting, 10) is slot


async def test_a_slot_released_twice_or_foreign_is_refused() -> None:
    with Staging(1, SIZE) as staging, Staging(1, SIZE) as other:
        slot = await staging.acquire_free()
        staging.release(slot)
        with pytest.raises(ValueError, match="slot 0 is not busy"):
            staging.release(slot)
        foreign = await other.acquire_free()
        with pytest.raises(ValueError, match="slot 0 is not busy"):
            staging.release(foreign)


async def test_close_frees_everything_and_wakes_whoever_waits() -> None:
    staging = Staging(2, SIZE)
    descriptors = [slot.fd for slot in staging.slots]
    slot = await staging.acquire_free()
    kept = slot.view[:4096]
    await staging.acquire_free()
    waiting = asyncio.create_task(staging.acquire_free())
    await asyncio.sleep(0)
    staging.close()
    staging.close()
    with pytest.raises(HostError, match="staging is closed"):
        await waiting
    with pytest.raises(HostError, match="staging is closed"):
        await staging.acquire_free()
    staging.release(slot)
    for fd in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    # A view that a sender still holds is no danger.
    assert bytes(kept[:1]) == b"\0"


def test_memory_that_is_not_to_be_had_is_a_host_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    with pytest.raises(HostError, match=r"staging slot .* cannot be (made|mapped)"):
        Staging(2, 1 << 63 - 1)

    real = Slot

    def second_fails(index: int, size: int, fd: int | None = None) -> Slot:
        if index == 1:
            raise HostError("staging slot ftd-slot-1: memfd_create failed: Too many open files")
        return real(index, size)

    monkeypatch.setattr("ftd.staging.Slot", second_fails)
    with pytest.raises(HostError, match="Too many open files"):
        Staging(2, SIZE)
    assert open_descriptors() == before
