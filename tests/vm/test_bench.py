"""bench/pause runs, says what it promises, and leaves nothing behind. No figure is compared with a clock."""

import json
import signal
import time

import pytest

PARTS = ("stop", "drain", "harvest", "copy", "device", "digest", "resume")


@pytest.mark.alone
def test_rows(bench):
    process = bench(
        "pause", "--quick", "--json", "--accel", "tcg", "--pages", "64,512", "--copy-threads", "1,2"
    )
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    result = json.loads(output)
    assert {"processor", "cpus", "kernel", "load_1min"} <= result["machine"].keys()
    rows = result["rows"]
    assert [(row["accel"], row["pages"], row["copy_threads"]) for row in rows] == [
        ("tcg", 64, 1),
        ("tcg", 64, 2),
        ("tcg", 512, 1),
        ("tcg", 512, 2),
    ]
    for row in rows:
        # The guest's own pages come on top: stack, counters.
        assert 0.97 * row["pages"] <= row["pages_measured"] <= row["pages"] + 16
        assert row["epochs"] >= 16
        assert row["epoch_s"] >= 0.02
        assert 0 < row["pause_p50_s"] <= row["pause_p99_s"]
        assert row["memcpy_s"] > 0
        assert row["device_bytes"] > 1000
        parts = {part: row[f"{part}_s"] for part in PARTS}
        # Medians of parts and of the whole come from different epochs.
        assert all(0 <= seconds <= 1.1 * row["pause_p50_s"] for seconds in parts.values()), parts
        if row["pages"] == 512 and row["copy_threads"] == 2:
            # Devices are saved beside the copy, where there are pages enough for two threads.
            assert parts["device"] <= 1.1 * parts["copy"]
        assert parts["digest"] == 0
        assert parts["copy"] > 0
    # One memcpy of eight times as many bytes.
    assert rows[2]["memcpy_s"] > rows[0]["memcpy_s"]


def test_interrupted(bench, folder):
    process = bench("pause", "--json", "--accel", "tcg", "--pages", "64")
    deadline = time.monotonic() + 60
    while not list(folder.glob("ftd-bench-*/qemu.pid")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "bench/pause: interrupted"
    assert not list(folder.glob("ftd-bench-*"))


@pytest.mark.parametrize("words", [("--pages", "0"), ("--pages", "64,x"), ("--copy-threads", "17")])
def test_refused(bench, words):
    process = bench("pause", *words)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert f"argument {words[0]}: invalid list of numbers" in errors
