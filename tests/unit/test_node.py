"""What a daemon finds at its start."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftd.config import Config, load
from ftd.node import _find
from ftd.succession import Handed, HandedBackup, HandedPrimary

CONFIG = """
[node]
name = "a"
role = "primary"
run_dir = "run"
[link]
listen = "10.0.0.1"
peer = "10.0.0.2"
insecure = true
[arbiter]
accept_split_brain = true
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "a.toml").write_text(CONFIG)
    return load(tmp_path / "a.toml")


def ended(words: str) -> int:
    """A process of ours that has ended and was not waited for, as a QEMU after execve."""
    process = subprocess.Popen([sys.executable, "-c", words])
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    process.returncode = 0  # this object is not to wait for it
    return process.pid


def handed(qemu: int, *, role: str = "primary") -> Handed:
    # Descriptors that are not open: closing them is tried, and does no harm.
    slots = HandedPrimary(paired_with="b", slots=[9001], slot_bytes=4096, slot_pages=1, release=9002)
    return Handed(
        node="a",
        pid=1,
        qemu_pid=qemu,
        generation=3,
        epoch=4,
        peer_node="b",
        began=0,
        deadline=5,
        primary=slots if role == "primary" else None,
        backup=HandedBackup(image=9001) if role == "backup" else None,
    )


@pytest.mark.parametrize(
    ("words", "wanted"), [("pass", True), ("import os; os.abort()", False), ("raise SystemExit(1)", False)]
)
async def test_a_guest_that_ended_while_its_daemon_was_replaced(
    config: Config, words: str, wanted: bool
) -> None:
    """With success: it has ended by itself, which is no failure (rule S7). Else QEMU is lost."""
    qemu = ended(words)
    found = await _find(config, handed(qemu))
    assert (found.role, found.qemu, found.handed, found.ended) == ("primary", None, None, wanted)
    assert f"QEMU (process {qemu}) ended while the daemon was replaced" in str(found.lost)
    with pytest.raises(ProcessLookupError):
        os.kill(qemu, 0)  # it was waited for


async def test_a_shadow_that_ended_meanwhile_is_made_anew(config: Config) -> None:
    found = await _find(config, handed(ended("pass"), role="backup"))
    assert (found.role, found.lost, found.ended) == ("primary", None, False)


async def test_a_daemon_that_finds_nothing_is_what_is_configured(config: Config) -> None:
    assert (await _find(config, None)).role == "primary"
