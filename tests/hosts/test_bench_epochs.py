"""bench/epochs runs, says what it promises, and leaves nothing behind. No figure is held against a clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftd.pacing import REASONS

pytestmark = pytest.mark.root

EPOCHS = Path(__file__).parents[2] / "bench" / "epochs"
PHASES = ["idle", "busy", "slow link", "idle again"]


def test_rows(qemu_binary: Path, tmp_path: Path) -> None:
    plot = tmp_path / "epochs.svg"
    words = ["--json", "--seconds", "1", "--plot", plot, "--qemu", qemu_binary]
    done = subprocess.run(
        [sys.executable, EPOCHS, *words], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = result["rows"]
    assert [(row["mode"], row["phase"]) for row in rows] == [
        (mode, phase) for mode in ("auto", "fixed") for phase in PHASES
    ]
    for row in rows:
        assert row["epoch_s"] > 0
        assert 0 < row["slowdown"] < 1
        assert row["pause_s"] > 0
        assert row["decided_by"] in (REASONS if row["mode"] == "auto" else ["configured"])
        assert row["mode"] == "auto" or row["target_s"] == 0.02
    assert plot.read_text().startswith("<?xml")


def test_refused() -> None:
    done = subprocess.run(
        [sys.executable, EPOCHS, "--seconds", "0.5"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--seconds: 1 at the least" in done.stderr
