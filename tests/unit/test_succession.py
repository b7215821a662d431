"""A process becomes the next program, and hands on what that goes on with."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from unit import sample

from ftd import succession
from ftd.errors import FtdError, HostError
from ftd.succession import Handed, HandedBackup, HandedPrimary
from ftd.wire import PROTOCOL_VERSION

ROOT = Path(__file__).parents[2]

# The first time it hands a file on, the second time it says what it has got.
PROGRAM = """#!{python}
import json, os, signal, sys, time
from ftd.succession import Handed, HandedBackup, Succession, listen_to_signals, start, take

handed = take("b")
if handed is None and "SECOND" not in os.environ:
    os.environ["SECOND"] = "yes"
    image = os.memfd_create("image")
    os.write(image, b"the shadow")
    now = time.monotonic()
    print(os.getpid(), flush=True)
    left = Handed(node=sys.argv[1], pid=os.getpid(), qemu_pid=2, generation=3, epoch=4, peer_node="a",
        began=now, deadline=now + 3600, backup=HandedBackup(image=image))
    start(Succession(left), {{"NOTIFY_SOCKET": "@here"}})
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append("TERM"))
os.kill(os.getpid(), signal.SIGTERM)
blocked = list(stopped)
listen_to_signals()
left = handed is not None and handed.began < time.monotonic() < handed.deadline
print(json.dumps({{"pid": os.getpid(), "left": left,
    "image": handed and os.pread(handed.backup.image, 100, 0).decode(),
    "inheritable": handed and os.get_inheritable(handed.backup.image),
    "notify": os.environ.get("NOTIFY_SOCKET"), "variable": os.environ.get("FTD_SUCCESSION"),
    "blocked": blocked, "stopped": stopped}}))
"""


def handed(**changes: Any) -> Handed:
    now = time.monotonic()
    values: dict[str, Any] = {
        "node": "a",
        "pid": os.getpid(),
        "qemu_pid": 17,
        "generation": 3,
        "epoch": 41,
        "peer_node": "b",
        "began": now,
        "deadline": now + 5,
        "primary": HandedPrimary(paired_with="b", slots=[5, 6], slot_bytes=8192, slot_pages=1, release=7),
    }
    return Handed(**values | changes)


def run_program(folder: Path, node: str) -> list[str]:
    program = folder / "ftd"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    done = subprocess.run(
        [program, node],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.splitlines()


def test_descriptors_survive_and_a_signal_waits_for_its_handler(tmp_path: Path) -> None:
    pid, told = run_program(tmp_path, "b")
    assert json.loads(told) == {
        "pid": int(pid),
        "left": True,
        "image": "the shadow",
        "inheritable": False,
        "notify": "@here",
        "variable": None,
        "blocked": [],
        "stopped": ["TERM"],
    }


def test_what_another_node_has_left_is_not_used(tmp_path: Path) -> None:
    said = json.loads(run_program(tmp_path, "c")[-1])
    assert (said["image"], said["variable"]) == (None, None)


def test_a_program_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(succession, "command", lambda: (str(tmp_path / "ftd"), ["ftd", "run"]))
    with pytest.raises(HostError, match=r"the next daemon cannot be started: .*ftd: no such file"):
        succession.start(succession.Succession(None), {})
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(HostError, match="the next daemon cannot be started"):
        asyncio.run(succession.check())


@pytest.mark.parametrize(
    ("left", "complaint"),
    [
        (b"{", "not understood"),
        (handed(primary=None, backup=HandedBackup(image=987)).model_dump_json().encode(), "is gone"),
        (b"[]", "not understood"),
        (handed().model_dump_json().replace('"format":1', '"format":2').encode(), "not understood"),
        (handed().model_dump_json().replace('"epoch":41', '"epoch":-1').encode(), "not understood"),
        (handed(pid=1, primary=None, backup=None).model_dump_json().encode(), "another daemon's"),
        (handed(node="x", primary=None, backup=None).model_dump_json().encode(), "another daemon's"),
    ],
)
def test_what_is_not_understood_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: bytes, complaint: str
) -> None:
    note = os.memfd_create("note")
    os.write(note, left)
    monkeypatch.setenv(succession.VARIABLE, str(note))
    assert succession.take("a") is None
    assert succession.VARIABLE not in os.environ
    assert complaint in caplog.text


def test_nothing_is_left_by_most_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert succession.take("a") is None
    monkeypatch.setenv(succession.VARIABLE, "999")  # of a process long gone
    assert succession.take("a") is None
    monkeypatch.setenv(succession.VARIABLE, "many")
    assert succession.take("a") is None


def test_each_part_is_handed_on_by_its_role() -> None:
    primary = handed()
    assert (primary.role, primary.descriptors) == ("primary", [5, 6, 7])
    backup = handed(primary=None, backup=HandedBackup(image=9))
    assert (backup.role, backup.descriptors) == ("backup", [9])
    assert Handed.model_validate_json(primary.model_dump_json()) == primary


# ---- whether it may succeed -------------------------------------------------------------------------------


def check(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(
        succession, "command", lambda: (sys.executable, [sys.executable, "-m", "ftd", *words])
    )
    asyncio.run(succession.check())


def test_a_successor_is_asked_whether_it_would_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = sample.write(tmp_path)
    text = config.read_text()
    check(monkeypatch, "run", str(config))
    config.write_text(text.replace('"primary"', '"queen"'))
    with pytest.raises(FtdError, match=r"the next daemon would not start: .*role.*; this one goes on"):
        check(monkeypatch, "run", str(config))
    config.write_text(text)
    # As a daemon of another protocol would ask.
    monkeypatch.setattr(succession, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    told = f"version {PROTOCOL_VERSION}.1, and the running daemon {PROTOCOL_VERSION + 1}.1: protection cannot"
    with pytest.raises(FtdError, match=re.escape(told)):
        check(monkeypatch, "run", str(config))
