"""Digests of single pages: the comparison of a shadow's memory with what the guest's memory was.

A digest is the XXH3-64 (seed 0) of the 4096 bytes of a page. One costs about 0.5 µs in Python, half of it
the hash.
"""

import errno
import os
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import xxhash

from ftd.frame import PAGE_SIZE, ByteArray, U64Array

ZERO_PAGE_DIGEST = xxhash.xxh3_64_intdigest(bytes(PAGE_SIZE))

_CHUNK = 256
"""Pages hashed between two chances for other threads, 0.1 to 0.3 ms: for a page, xxhash keeps the GIL.

Measured beside a thread that wakes up often: it waits 0.1 ms (median) for its turn, and 5 to 8 ms without the
sleep.
"""

# Called by map itself: a Python function around it would cost a fifth more. The ignore: numpy tells type
# checkers that an array is a buffer only from Python 3.12 on.
_digest: Callable[[ByteArray], int] = xxhash.xxh3_64_intdigest  # type: ignore[assignment,unused-ignore]


def page_digests(memory: ByteArray) -> U64Array:
    """Return the digest of each page of `memory`, whole pages; shape (n,). Holds the GIL throughout."""
    rows = memory.reshape(-1, PAGE_SIZE)
    return np.array(list(map(_digest, rows)), dtype=np.uint64)


def differing_pages(memory: ByteArray, expected: U64Array) -> npt.NDArray[np.int64]:
    """Return the numbers of the pages of `memory` whose digest is not the expected one, ascending.

    `memory` has at least as many pages as `expected` has digests. Lets other threads run every fraction of a
    millisecond: the sleep is what lets go of the GIL, whatever sys.setswitchinterval says.
    """
    found: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(expected), _CHUNK):
        part = expected[start : start + _CHUNK]
        digests = page_digests(memory[start * PAGE_SIZE : (start + len(part)) * PAGE_SIZE])
        bad = np.flatnonzero(digests != part)
        if bad.size:
            found.append(bad.astype(np.int64) + start)
        time.sleep(0)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def next_data(fd: int, page: int, end: int) -> tuple[int, int]:
    """Return (first, last + 1): the pages of a file's next piece of data from `page` on, but before `end`.

    What is not in such a piece is a hole; (end, end) says that there is nothing but a hole. A file system
    that cannot tell is all data. Reading a hole of a tmpfs file through a mapping would fill it with a page
    of real memory; asking does not.
    """
    try:
        first = os.lseek(fd, page * PAGE_SIZE, os.SEEK_DATA) // PAGE_SIZE
        last = -(-os.lseek(fd, max(first, page) * PAGE_SIZE, os.SEEK_HOLE) // PAGE_SIZE)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing from here to the end of the file
            return end, end
        return page, end
    return min(max(first, page), end), min(max(last, page + 1), end)
