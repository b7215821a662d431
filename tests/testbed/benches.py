"""Programs of bench/, started by a test that looks at what they say and leave behind."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
# Takes the program's name and its arguments.
StartBench = Callable[..., "subprocess.Popen[str]"]


@contextmanager
def started_benches(qemu: Path, folder: Path) -> Iterator[StartBench]:
    """Give what starts them, with their files in `folder`. None may go on for longer than the block."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: str | Path) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, BENCH / name, "--qemu", qemu, *arguments],
            env=os.environ | {"TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
