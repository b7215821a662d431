"""A real QEMU for the tests in this folder, and the promise that nothing of it is left behind."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from testbed.benches import started_benches

from ftd.config import Config

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def qemu_binary() -> Path:
    """The QEMU to test with: $FTD_QEMU, or what scripts/build-qemu has built. A missing one is a failure."""
    if given := os.environ.get("FTD_QEMU"):
        binary = Path(given)
        if not os.access(binary, os.X_OK):
            pytest.fail(f"FTD_QEMU={given} is not a program", pytrace=False)
        return binary
    built = subprocess.run(
        [REPOSITORY / "scripts/build-qemu", "--print"], capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        pytest.fail("no QEMU to test with: run scripts/build-qemu, or set FTD_QEMU", pytrace=False)
    return Path(built.stdout.strip()) / "bin/qemu-system-x86_64"


@pytest.fixture
def folder():
    """A folder for one test. Short, since the names of sockets may have 107 bytes only.

    Afterwards no process may be left whose command line names it, nor a file in its memory folder.
    """
    path = Path(tempfile.mkdtemp(prefix="ftd-"))
    memory = Path(tempfile.mkdtemp(prefix="ftd-test-", dir="/dev/shm"))
    (path / "memory").symlink_to(memory)
    yield path
    left = _processes_of(path)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    files = [file.name for file in memory.iterdir()]
    shutil.rmtree(memory)
    shutil.rmtree(path)
    assert not left, f"processes left behind: {left}"
    assert not files, f"files of guest memory left behind: {files}"


def _processes_of(path: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = int(process.name) == os.getpid()
            if not ours and os.fsencode(path) in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(path)) == 0


@pytest.fixture
def make_config(qemu_binary, folder):
    """Makes a configuration of a small guest under tcg; sections are given as keyword arguments."""

    def make(**sections: dict) -> Config:
        machine = {
            "qemu": qemu_binary,
            "accelerator": "tcg",
            "memory_mib": 32,
            "memory_path": (folder / "memory").resolve(),
        }
        return Config.model_validate(
            {
                "node": {"name": "a", "role": "primary", "run_dir": folder / "run"},
                "link": {"listen": "127.0.0.1", "peer": "127.0.0.1", "insecure": True},
                "arbiter": {"accept_split_brain": True},
                **sections,
                "machine": machine | sections.get("machine", {}),
            }
        )

    return make


@pytest.fixture
def run_qemu(qemu_binary, folder):
    """Runs QEMU without ftd: takes more arguments, returns the process and its QMP socket.

    Every process is ended after the test.
    """
    started: list[subprocess.Popen] = []

    def run(*arguments: str) -> tuple[subprocess.Popen, Path]:
        path = folder / f"plain{len(started)}.sock"
        words = [qemu_binary, "-nodefaults", "-no-user-config", "-display", "none", "-S"]
        for firmware in ("/usr/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu"):
            words += ["-L", firmware]
        words += ["-accel", "tcg", "-qmp", f"unix:{path},server=on,wait=off"]
        process = subprocess.Popen([*words, *arguments], stderr=subprocess.PIPE, text=True)
        started.append(process)
        deadline = time.monotonic() + 20
        while not _listens(path):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"QEMU did not start: {process.stderr.read()}")
            time.sleep(0.01)
        return process, path

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def bench(qemu_binary, folder):
    """Starts a program of bench/ with all of its files in `folder`, which is looked through afterwards."""
    with started_benches(qemu_binary, folder) as start:
        yield lambda name, *arguments: start(name, "--memory-path", folder / "memory", *arguments)
