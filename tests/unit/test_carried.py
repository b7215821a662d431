"""What protection is between two sessions, and how the next daemon gets it."""

import os
import time
from pathlib import Path

import pytest

from ftd.carried import Carried
from ftd.errors import HostError
from ftd.staging import Staging
from ftd.succession import Handed

SIZE = 1 << 20


def carried() -> Carried:
    now = time.monotonic()
    return Carried(
        generation=3,
        epoch=42,
        peer_node="b",
        own=True,
        began=now,
        deadline=now + 3600,
        staging=Staging(2, SIZE),
        release=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
        slot_pages=200,
    )


def as_next_process(handed: Handed) -> Handed:
    """The same with descriptors of its own, as after execve."""
    assert handed.primary is not None
    mine = handed.primary.model_copy(
        update={
            "slots": [os.dup(fd) for fd in handed.primary.slots],
            "release": os.dup(handed.primary.release),
        }
    )
    return Handed.model_validate_json(handed.model_copy(update={"primary": mine}).model_dump_json())


def test_the_next_daemon_has_the_same_slots_and_the_same_epoch(tmp_path: Path) -> None:
    disk = tmp_path / "disk0.img"
    disk.write_bytes(bytes(4096))
    before = carried()
    handed = before.hand_on("a", 17, "b")
    assert (handed.epoch, handed.qemu_pid, handed.role) == (41, 17, "primary")
    after = Carried.take_over(as_next_process(handed), [("disk0", disk)])
    assert (after.generation, after.epoch, after.own, after.slot_pages) == (3, 42, True, 200)
    assert after.deadline == before.deadline
    assert 0 < after.left <= 3600
    assert after.staging.free == 2
    # QEMU writes to the slot, and adds to the eventfd's reader: both are those of the daemon before.
    os.pwrite(before.staging.slots[1].fd, b"page", 4096)
    assert bytes(after.staging.slots[1].view[4096:4100]) == b"page"
    os.eventfd_write(after.release, 1)
    assert os.eventfd_read(before.release) == 1
    assert [image.name for image in after.images] == ["disk0"]
    for one in (before, after):
        one.close()


def test_a_disk_that_is_gone_is_a_host_error_and_the_slots_can_still_be_given_back(tmp_path: Path) -> None:
    before = carried()
    handed = as_next_process(before.hand_on("a", 17, "b"))
    with pytest.raises(HostError, match="no such file"):
        Carried.take_over(handed, [("disk0", tmp_path / "disk0.img")])
    handed.close()
    before.close()
