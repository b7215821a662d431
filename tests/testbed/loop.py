"""Block devices for tests, made of files."""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from testbed.hosts import TestbedError

CONTROL = Path("/dev/loop-control")
# linux/loop.h, struct loop_config: a descriptor, the size of a block, a loop_info64 with flags in it.
_GET_FREE, _CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C0A, 4
_CONFIG = struct.Struct("<II5Q4I64s64s32s2Q8Q")
_ATTEMPTS = 20


@contextlib.contextmanager
def block_device(image: Path) -> Iterator[Path]:
    """A block device over an image; it goes away with whoever has it open last, even if tests are killed."""
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        path, device = _configure(backing)
    finally:
        os.close(backing)
    try:
        yield path
    finally:
        os.close(device)


def _configure(backing: int) -> tuple[Path, int]:
    config = _CONFIG.pack(backing, 512, *[0] * 5, 0, 0, 0, _AUTOCLEAR, b"ftd-test", b"", b"", *[0] * 10)
    with CONTROL.open("rb") as control:
        for _ in range(_ATTEMPTS):
            path = Path(f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}")
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else was faster
                    raise
                continue
            return path, device
    raise TestbedError(f"no free loop device in {_ATTEMPTS} attempts")
