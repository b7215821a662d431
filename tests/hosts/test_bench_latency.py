"""bench/latency runs, keeps its promises, and leaves nothing behind. No figure is held against a clock."""

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from testbed.benches import StartBench as Start
from testbed.benches import started_benches
from testbed.namespaces import NAMESPACES

pytestmark = pytest.mark.root


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a run keeps its files. Short, since the names of sockets may have 107 bytes only."""
    path = Path(tempfile.mkdtemp(prefix="ftd-"))
    yield path
    left = sorted(file.name for file in path.iterdir())
    shutil.rmtree(path)
    assert left == []


@pytest.fixture
def latency(qemu_binary: Path, folder: Path) -> Iterator[Start]:
    """Starts bench/latency. It has to end before the test does, with nothing left behind."""
    with started_benches(qemu_binary, folder) as start:
        yield partial(start, "latency")


def _networks(folder: Path) -> list[str]:
    """Namespaces of the run whose files are in this folder."""
    prefixes = {"-".join(path.name.split("-")[:2]) for path in folder.iterdir()}
    return [path.name for path in NAMESPACES.iterdir() if "-".join(path.name.split("-")[:2]) in prefixes]


@pytest.mark.alone
def test_rows(latency: Start) -> None:
    process = latency("--json", "--epochs-ms", "50,20", "--turns", "1", "--seconds", "0.5")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    result = json.loads(output)
    assert {"processor", "cpus", "kernel", "load_1min"} <= result["machine"].keys()
    assert result["tls"]
    assert result["left_out_epochs_s"] == []
    rows = result["rows"]
    assert [row["epoch_s"] for row in rows] == [0.02, 0.05]
    for row in rows:
        assert 0 < row["unprotected_p50_s"] <= row["unprotected_p99_s"]
        assert 0 < row["p50_s"] <= row["p99_s"]
        # An answer waits for the end of its epoch, which half of them meet in its first half.
        assert row["added_p50_s"] == pytest.approx(row["p50_s"] - row["unprotected_p50_s"])
        assert row["added_p50_s"] > row["epoch_s"] / 4
        assert row["requests_per_s"] > 0
        assert row["unprotected_requests_per_s"] > 0
        # The client is not what is measured.
        for name in ("requests_per_s", "unprotected_requests_per_s"):
            assert row[name] < result["client_ceiling_requests_per_s"]
        assert row["pause_p50_s"] > 0
        assert row["commit_latency_p50_s"] > 0
        assert row["release_latency_p50_s"] > 0
        assert 0 < row["pause_share"] < 1
        assert row["latency_aim_met"] == (row["added_p50_s"] <= row["aim_added_p50_s"])
    assert "throughput_aim_met" in rows[0]
    assert "throughput_aim_met" not in rows[1]


def test_quick(latency: Start) -> None:
    process = latency("--quick", "--epochs-ms", "20", "--seconds", "0.5")
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "epochs of 20 ms: added latency" in output
    assert "epochs of 20 ms: throughput" in output
    assert "the client can take" in output


def test_interrupted(latency: Start, folder: Path) -> None:
    process = latency("--json")
    deadline = time.monotonic() + 60
    while len(_networks(folder)) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    names = _networks(folder)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "bench/latency: interrupted"
    assert not any((NAMESPACES / name).exists() for name in names)


@pytest.mark.parametrize("words", ["0", "20,x", "4"])
def test_refused(latency: Start, words: str) -> None:
    process = latency("--epochs-ms", words)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "argument --epochs-ms: invalid list of numbers" in errors
