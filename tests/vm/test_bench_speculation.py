"""bench/speculation runs, says what it promises, and leaves nothing behind."""

import json

import pytest


@pytest.mark.alone
@pytest.mark.parametrize("accelerator", ["tcg", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_rows(bench, accelerator):
    process = bench("speculation", "--json", "--accel", accelerator, "--pages", "500", "--seconds", "0.4")
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    result = json.loads(output)
    assert {"processor", "cpus", "kernel", "load_1min"} <= result["machine"].keys()
    rows = result["rows"]
    assert [(row["guest"], row["speculative"]) for row in rows] == [
        (guest, early) for guest in ("new", "same", "busy") for early in (False, True)
    ]
    for row in rows:
        # Under TCG a guest that never rests dirties all of its pages in any epoch: then there are few.
        assert row["epochs"] >= (1 if row["guest"] == "busy" else 4)
        assert 0 < row["copy_s"] <= row["pause_p50_s"] <= row["pause_p99_s"]
        assert row["sent_bytes"] >= 4096 * row["pages_in_pause"] / 2
        assert row["written_pages_per_s"] > 0
        assert (row["early_pages"] > 0) == row["speculative"]
    of = {(row["guest"], row["speculative"]): row for row in rows}
    # What was sent early and stays as it was is not in the pause; what is dirty again is in both.
    assert of["new", True]["pages_in_pause"] < 0.8 * of["new", False]["pages_in_pause"]
    assert of["new", True]["again"] < 0.5 < of["same", True]["again"]
    assert of["same", True]["sent_bytes"] > 1.3 * of["same", False]["sent_bytes"]
    for one, off, on in zip(result["compared"], rows[::2], rows[1::2], strict=True):
        assert one["pause_shorter_by"] == pytest.approx(1 - on["pause_p50_s"] / off["pause_p50_s"])
        assert (one["progress_more_by"] is not None) == (one["guest"] == "busy")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--pages", "6001"), "argument --pages: invalid list of numbers from 64 to 6000"),
        (("--epoch-ms", "4"), "--epoch-ms: from 5 to 1000"),
    ],
)
def test_refused(bench, words, told):
    process = bench("speculation", *words)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert told in errors
