"""bench/disk says what it promises, and leaves nothing behind. No figure is held against a clock."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

DISK = Path(__file__).parents[2] / "bench" / "disk"
WORKLOADS = ["sequential-write", "random-write", "fsync", "paced-write"]


def test_rows(qemu_binary: Path) -> None:
    words = [sys.executable, DISK, "--json", "--turns", "1", "--rounds", "1", "--qemu", qemu_binary]
    # Short, since the names of sockets may have 107 bytes only.
    with tempfile.TemporaryDirectory(prefix="ftd-") as folder:
        environment = os.environ | {"TMPDIR": folder}
        done = subprocess.run(
            [*words], capture_output=True, text=True, timeout=150, check=False, env=environment
        )
        left = [path.name for path in Path(folder).iterdir()]
    assert done.returncode == 0, done.stderr
    assert left == []
    result = json.loads(done.stdout)
    assert {"processor", "cpus", "kernel", "load_1min"} <= result["machine"].keys()
    assert [row["workload"] for row in result["rows"]] == WORKLOADS
    for row in result["rows"]:
        assert min(row["protected_per_s"], row["memory_only_per_s"], row["unprotected_per_s"]) > 0
        assert row["ratio"] == row["protected_per_s"] / row["unprotected_per_s"]
        # Of one turn, the median is its own.
        assert row["added_by_disks"] == row["memory_only_per_s"] / row["protected_per_s"] - 1
        assert row["added_by_checkpoints"] == row["unprotected_per_s"] / row["memory_only_per_s"] - 1
        assert min(row[f"{phase}_cpu_s"] for phase in ("protected", "memory_only", "unprotected")) > 0
        assert row["aim_met"] == (row["added_by_disks"] <= 0.05)
    for name in ("protected", "memory_only"):
        pauses = result["pauses"][name]
        assert 0 < pauses["drain_p50_s"] < pauses["p50_s"] <= pauses["p99_s"]
        assert 0 < pauses["share"] < 1


def test_refused() -> None:
    done = subprocess.run(
        [sys.executable, DISK, "--epoch-ms", "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--epoch-ms: from 5 to 10000" in done.stderr
