"""bench/trackers and bench/scale run, say what they promise, and leave nothing behind."""

import csv
import json
import signal
import time

import pytest

PARTS = ("early", "stop", "registers", "drain", "harvest", "reset", "copy", "device", "resume")


def assert_pauses(row: dict) -> None:
    """What both programs tell of a system's checkpoints."""
    # The guest's own pages come on top: stack, counters.
    assert 0.97 * row["pages"] <= row["pages_measured"] <= row["pages"] + 32
    assert row["epochs"] >= 2
    assert 0 < row["pause_p50_s"] <= row["pause_p99_s"]
    assert row["cpu_s_per_epoch"] > 0
    parts = {part: row[f"{part}_s"] for part in PARTS}
    assert all(0 <= seconds <= 1.2 * row["pause_p50_s"] for seconds in parts.values()), parts
    assert parts["copy"] > 0
    # Only what reads the rings itself tells how long it takes to protect pages again.
    assert (parts["reset"] > 0) == (row["tracker"] == "ring")
    if row["tracker"] == "bitmap":
        assert row["pause_p50_s"] >= 0.8 * (parts["harvest"] + parts["copy"] + parts["device"])


@pytest.mark.alone
@pytest.mark.kvm
def test_trackers(bench, folder):
    names = ["bitmap", "ring", "bitmap-parallel"]
    process = bench(
        "trackers", "--json", "--csv", folder / "rows.csv", "--trackers", ",".join(names),
        "--ram-gib", "1", "--pages", "64,512", "--vcpus", "2", "--epochs-ms", "20", "--seconds", "0.4",
    )  # fmt: skip
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    result = json.loads(output)
    assert {"processor", "cpus", "kernel", "load_1min"} <= result["machine"].keys()
    assert ("emulates" in (result["caveat"] or "")) != result["machine"]["hardware_virtualisation"]
    rows = result["rows"]
    assert [(row["pages"], row["tracker"]) for row in rows] == [(p, n) for p in (64, 512) for n in names]
    for row in rows:
        assert (row["ram_gib"], row["vcpus"], row["epoch_s"]) == (1, 2, 0.02)
        assert_pauses(row)
        assert row["guest_progress"] > 0
        assert len(row["turn_pause_p50_s"]) >= 2
    aims = result["aims"]
    assert [(aim["pages"], aim["against"], aim["of"]) for aim in aims] == [
        (pages, *what)
        for pages in (64, 512)
        for what in (("bitmap", "pause"), ("bitmap", "guest_progress"), ("bitmap-parallel", "pause"))
    ]
    for aim in aims:
        if aim["of"] == "pause":
            of = {row["tracker"]: row["pause_p50_s"] for row in rows if row["pages"] == aim["pages"]}
            assert aim["better_by"] == pytest.approx(1 - of["ring"] / of[aim["against"]])
        if aim["against"] == "bitmap":
            assert aim["aim"] == (0.3 if aim["of"] == "pause" else 0)
            least = aim["aim"] or -aim["noise"]
            assert aim["met"] == (aim["better_by"] >= least)
    with (folder / "rows.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["pause_p50_s"]) for row in written] == [row["pause_p50_s"] for row in rows]


@pytest.mark.alone
@pytest.mark.kvm
def test_scale(bench):
    process = bench(
        "scale", "--json", "--no-commit", "--ram-gib", "2,1", "--pages", "256", "--seconds", "0.4",
        "--trackers", "ring,bitmap",
    )  # fmt: skip
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    result = json.loads(output)
    rows = result["rows"]
    assert [(row["ram_gib"], row["tracker"]) for row in rows] == [
        (1, "ring"), (1, "bitmap"), (2, "ring"), (2, "bitmap"),
    ]  # fmt: skip
    for row in rows:
        assert_pauses(row)
        assert row["commit_mean_s"] is None
    assert result["commit_left_out"] == "not asked for"
    ring, bitmap = result["growth"]
    assert (ring["tracker"], ring["from_gib"], ring["to_gib"]) == ("ring", 1, 2)
    assert ring["pause"] == pytest.approx(rows[2]["pause_p50_s"] / rows[0]["pause_p50_s"])
    assert ring["met"] == (ring["pause"] <= ring["aim"] + ring["noise"])
    assert "met" not in bitmap


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["trackers", "scale"])
def test_interrupted(bench, folder, name):
    process = bench(name, "--json", "--ram-gib", "1")
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ftd-bench-*/qemu.pid"))) < 2:  # a second VM is there
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == f"bench/{name}: interrupted"
    assert not list(folder.glob("ftd-bench-*"))


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("trackers", ("--pages", "0"), "argument --pages: invalid list of numbers from 2 to 32768"),
        ("trackers", ("--vcpus", "3"), "argument --vcpus: invalid list of numbers from 1 to 2"),
        ("trackers", ("--trackers", "ring,rong"), "argument --trackers: invalid list of bitmap, ring-stock"),
        ("trackers", ("--plot", "x.txt"), "--plot: x.txt is neither .svg nor .png"),
        ("trackers", ("--seconds", "0"), "--seconds: from 0.2 to 3600"),
        ("scale", ("--ram-gib", "x"), "argument --ram-gib: invalid list of numbers from 1 to 256"),
        ("scale", ("--trackers", "ring-no-defer"), "--trackers: ring-no-defer: a daemon cannot run this"),
    ],
)
def test_refused(bench, name, words, told):
    process = bench(name, *words)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert told in errors
