"""bench/takeover runs, and says what it promises. No figure is held against a clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

TAKEOVER = Path(__file__).parents[2] / "bench" / "takeover"


def test_all_of_it_once(qemu_binary: Path, tmp_path: Path) -> None:
    plot = tmp_path / "takeover.svg"
    # A busy machine that does not run a daemon for a moment has not lost it.
    words = ["--turns", "1", "--interval-ms", "100", "--misses", "12", "--json", "--plot", plot]
    done = subprocess.run(
        [sys.executable, TAKEOVER, *words, "--qemu", qemu_binary],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for name in ("takeover_s", "reset_s", "switchover_s", "standstill_s", "datagram_s", "colo_s"):
        assert len(result[name]) == 1, name
        assert 0 < result[name][0] < 60, name
    assert result["detection_setting_s"] == 1.2
    # The host is silent for the whole of it, but for the age of its last heartbeat; the others are told.
    assert result["takeover_s"][0] > 1
    assert result["detection_s"]["switchover"] == [0]
    for kind, aim in (("takeover", 1.25), ("reset", 0.1), ("switchover", 0.06)):
        assert result["aims"][kind] == {"p95_s": aim, "met": result[f"{kind}_s"][0] <= aim}
        assert len(result["activation_s"][kind]) == 1
    assert b"ftd switchover" in plot.read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "tea"], "list of takeover, reset, switchover, colo"),
        (["--misses", "1"], "--misses: from 2 to 100"),
    ],
)
def test_refused(words: list[str], told: str) -> None:
    done = subprocess.run([sys.executable, TAKEOVER, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
