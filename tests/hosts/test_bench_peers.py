"""bench/peers runs both systems and says what it promises. No figure is held against a clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(180)]

PEERS = Path(__file__).parents[2] / "bench" / "peers"


def test_both_systems(qemu_binary: Path) -> None:
    words = [sys.executable, PEERS, "--quick", "--json", "--seconds", "1", "--qemu", qemu_binary]
    done = subprocess.run([*words], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for name in ("ftd", "colo"):
        each = result[name]
        assert 0 < each["pause_p50_s"] <= each["pause_p99_s"]
        assert each["guest_progress"] > 0
        assert each["takeover_s"] > 0
        assert each["checkpoints"] > 0
    assert result["pause_ratio"] == result["colo"]["pause_p50_s"] / result["ftd"]["pause_p50_s"]
    assert result["aim_met"] == (result["pause_ratio"] >= 20)


def test_refused() -> None:
    done = subprocess.run(
        [sys.executable, PEERS, "--epoch-ms", "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--epoch-ms: from 5 to 10000" in done.stderr
