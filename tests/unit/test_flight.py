"""The flight recorder: bounded, kept over crashes, and told as a story."""

import subprocess
import sys
from pathlib import Path

import pytest
from unit import sample

from ftd import flight
from ftd.errors import HostError, PeerError
from ftd.flight import Entry, FlightRecorder


def test_what_was_noted_is_read_in_order(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "state", "a")
    recorder.note("state", to="solo", reason='a "reason"\nof two lines')
    for epoch in range(1, 100):
        recorder.epoch(epoch, 3)
    recorder.note("session-lost", reason="silence")
    recorder.close()
    entries = flight.read(tmp_path / "state/flight.jsonl")
    # Epochs are thinned to the first, and the last one before something else.
    assert [(e.what, e.fields.get("epoch")) for e in entries] == [
        ("state", None),
        ("committed", 1),
        ("committed", 99),
        ("session-lost", None),
    ]
    assert all(entry.node == "a" and entry.at > 1e9 for entry in entries)
    assert "\n" not in str(entries[0])


def test_it_is_bounded_and_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "LIMIT_BYTES", 2000)
    for number in range(60):
        recorder = FlightRecorder(tmp_path, "a")
        recorder.note("state", number=number, text="x" * 50)
        recorder.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 2000
    numbers = [entry.fields["number"] for entry in flight.read(tmp_path / "flight.jsonl")]
    assert numbers == list(range(numbers[0], 60))
    assert len(numbers) > 10


def test_a_line_that_a_crash_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "flight.jsonl"
    path.write_text('{"at": 1.5, "node": "a", "what": "state", "to": "solo"}\n{"at": 2.5, "no')
    assert flight.read(path) == [Entry(1.5, "a", "state", {"to": "solo"})]


def test_no_flight_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"flight\.jsonl: no such file; nothing was recorded"):
        flight.read(tmp_path / "flight.jsonl")


async def test_what_the_other_node_gets_is_new_whole_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = FlightRecorder(tmp_path, "a")
    for number in range(50):
        recorder.note("state", number=number)
    recorder.epoch(7, 3)
    recorder.epoch(8, 3)  # thinned, and yet the last thing that is known
    lines, cut = await recorder.tail()
    assert not cut
    entries = flight.parse(lines)
    assert entries[-1].fields["epoch"] == 8
    lines, cut = flight.tail(tmp_path / "flight.jsonl", limit=500)
    assert cut
    assert len(lines) <= 500
    assert flight.parse(lines) == entries[-len(flight.parse(lines)) :]
    assert flight.unpack(flight.pack(lines)) == lines
    recorder.close()


@pytest.mark.parametrize(
    ("packed", "told"),
    [
        ("%%%", "cannot be unpacked"),
        ("AAAA", "cannot be unpacked"),
        (flight.pack(b"x" * (flight.TAIL_BYTES + 1)), f"more than {flight.TAIL_BYTES} bytes"),
        (flight.pack(b"x" * 1000)[:-8], "more than|cannot be unpacked"),
    ],
)
def test_what_the_other_node_sends_is_not_believed(packed: str, told: str) -> None:
    with pytest.raises(PeerError, match=told):
        flight.unpack(packed)


def test_why_reads_both_nodes(tmp_path: Path) -> None:
    config = sample.write(tmp_path, "b", "backup", own='state_dir = "state"')
    for node, folder in (("b", "state"), ("a", "other")):
        recorder = FlightRecorder(tmp_path / folder, node)
        recorder.note("session-lost", reason=f"{node} lost the other")
        recorder.close()
    words = [sys.executable, "-m", "ftd", "why", str(config), "--peer", str(tmp_path / "other/flight.jsonl")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "b lost the other" in done.stdout
    assert "a lost the other" in done.stdout
    assert "No takeover after a lost its peer" in done.stdout
