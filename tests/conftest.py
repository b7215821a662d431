"""Several tests at once (pytest-xdist, `-n`): those that need the machine for themselves get it.

A test marked `alone` measures time, or counts on nobody else. It waits until no other test of this run is
under way, and all others wait for it. Such tests come last, so that no process waits for long.
"""

import fcntl
import signal
from collections.abc import Generator
from pathlib import Path
from typing import IO

import pytest


def pytest_configure() -> None:
    """A run that is ended from outside cleans up after itself, as with Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def _locked(path: Path, how: int) -> IO[str]:
    file = path.open("a")
    fcntl.flock(file, how)
    return file


# Outermost, so that the waiting is not taken for the test's own time, which is limited.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    if not hasattr(item.config, "workerinput"):  # one process runs all tests
        return (yield)
    assert item.config.cache is not None
    folder = item.config.cache.mkdir("alone")
    alone = item.get_closest_marker("alone") is not None
    # Everybody passes the gate, and who wants to be alone stands in it meanwhile: so others do not pass by.
    gate = _locked(folder / "gate", fcntl.LOCK_EX)
    try:
        running = _locked(folder / "running", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    finally:
        gate.close()
    with running:
        return (yield)
