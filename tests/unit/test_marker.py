import asyncio
import threading
from pathlib import Path

import pytest

from ftd import durable
from ftd.disk import Image
from ftd.errors import HostError
from ftd.marker import Marker, Markers, Note, Worth, mark


@pytest.fixture
def marker(tmp_path: Path) -> Marker:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    return Marker(image, tmp_path / "state")


def test_it_lies_beside_the_image_and_is_replaced_as_a_whole(marker: Marker) -> None:
    assert marker.path == marker.image.with_name("disk.img.ftd")
    assert marker.read() is None
    for worth in Worth:
        mark([marker], worth, 3, "host-a")
        assert marker.read() == Note(worth=worth, generation=3, node="host-a")
    assert {each.name for each in marker.path.parent.iterdir()} == {"disk.img", "disk.img.ftd"}


def test_that_of_a_block_device_is_in_the_folder_that_survives(tmp_path: Path) -> None:
    devices = [each for each in Path("/dev").iterdir() if each.is_block_device()]
    if not devices:
        pytest.skip("there is no block device here")
    marker = Marker(devices[0], tmp_path)
    assert marker.path == tmp_path / f"disk-dev-{devices[0].name}.ftd"


@pytest.mark.parametrize(
    ("worth", "words"),
    [
        (None, None),
        (Worth.ALONE, None),
        (Worth.REPLICATED, "it had a backup, which may have taken over"),
        (Worth.SYNCING, "it is the target of a copy that is not complete"),
        (Worth.COPY, "it is a backup's copy, which is started by taking over"),
    ],
)
def test_only_a_disk_that_nothing_can_be_newer_than_is_started_from(
    marker: Marker, worth: Worth | None, words: str | None
) -> None:
    if worth is not None:
        mark([marker], worth, 4, "host-a")
    refusal = marker.refusal_to_start()
    if words is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert f"{words} (generation 4); start this node as the backup" in refusal
        assert refusal.endswith(f"remove {marker.path}")


def test_an_arbiter_settles_whether_a_backup_has_taken_over(marker: Marker) -> None:
    for worth in Worth:
        mark([marker], worth, 4, "host-a")
        assert (marker.refusal_to_start(4) is None) == (worth in (Worth.ALONE, Worth.REPLICATED))
        assert (marker.refusal_to_start(5) is None) == (worth in (Worth.ALONE, Worth.REPLICATED))
        assert (marker.refusal_to_start(3) is None) == (worth is Worth.ALONE)


async def test_they_are_written_in_the_order_in_which_that_was_asked_for(
    marker: Marker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each takes its time, and whoever asked may go away meanwhile."""
    began, written = threading.Event(), []
    go_on = threading.Event()

    def slow(path: Path, note: Note) -> None:
        began.set()
        assert go_on.wait(10)
        written.append((note.worth, note.generation))
        durable.replace(path, note)

    monkeypatch.setattr("ftd.marker.replace", slow)
    markers = Markers([marker], "host-a")
    markers.start(Worth.ALONE, 1)
    impatient = asyncio.create_task(markers.write(Worth.REPLICATED, 1))
    await asyncio.to_thread(began.wait, 10)
    assert written == []
    impatient.cancel()
    last = asyncio.create_task(markers.write(Worth.ALONE, 2))
    await asyncio.sleep(0)
    go_on.set()
    await markers.settle()
    assert last.done()
    assert written == [(Worth.ALONE, 1), (Worth.REPLICATED, 1), (Worth.ALONE, 2)]
    assert marker.read() == Note(worth=Worth.ALONE, generation=2, node="host-a")


async def test_what_cannot_be_written_is_said_to_who_waits(tmp_path: Path) -> None:
    (tmp_path / "disk.img.ftd").mkdir()
    (tmp_path / "disk.img").touch()
    markers = Markers([Marker(tmp_path / "disk.img", tmp_path)], "host-a")
    with pytest.raises(HostError):
        await markers.write(Worth.REPLICATED, 1)
    await Markers([], "host-a").write(Worth.REPLICATED, 1)


def test_a_newer_disk_is_not_overwritten_with_an_older_one(marker: Marker) -> None:
    mark([marker], Worth.ALONE, 4, "host-a")
    assert marker.refusal_to_overwrite(4) is None
    refusal = marker.refusal_to_overwrite(3)
    assert refusal is not None
    assert "is newer (generation 4) than the peer's (generation 3)" in refusal
    mark([marker], Worth.REPLICATED, 4, "host-a")
    assert marker.refusal_to_overwrite(3) is None


def test_a_marker_that_cannot_be_read_is_not_taken_for_none(marker: Marker) -> None:
    marker.path.write_text("{}")
    with pytest.raises(HostError, match="is not the marker of a disk"):
        marker.refusal_to_start()


@pytest.mark.parametrize("after", [Worth.ALONE, Worth.REPLICATED])
@pytest.mark.parametrize(
    ("before", "durable"),
    [
        (Worth.COPY, True),
        (Worth.SYNCING, True),
        ("{", True),  # nobody knows
        (Worth.REPLICATED, False),
        (Worth.ALONE, False),
        (None, False),
    ],
)
def test_what_a_backup_has_written_is_durable_before_a_guest_is_started_from_it(
    marker: Marker, monkeypatch: pytest.MonkeyPatch, before: Worth | str | None, durable: bool, after: Worth
) -> None:
    """What QEMU has written for a guest is durable when the guest wants that."""
    if isinstance(before, Worth):
        mark([marker], before, 3, "host-b")
    elif before is not None:
        marker.path.write_text(before)
    there = marker.path.read_bytes() if before is not None else None
    synced: list[bytes | None] = []
    monkeypatch.setattr(
        Image, "sync", lambda _: synced.append(marker.path.read_bytes() if before is not None else None)
    )
    mark([marker], after, 4, "host-b")
    assert synced == ([there] if durable else [])  # while the marker said what it was
    assert marker.read() == Note(worth=after, generation=4, node="host-b")


def test_a_copy_that_cannot_be_made_durable_is_not_marked_as_the_newest(
    marker: Marker, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark([marker], Worth.COPY, 3, "host-b")

    def fails(_: Image) -> None:
        raise HostError("disk disk.img: input/output error")

    monkeypatch.setattr(Image, "sync", fails)
    with pytest.raises(HostError, match="input/output error"):
        mark([marker], Worth.ALONE, 4, "host-b")
    assert marker.read() == Note(worth=Worth.COPY, generation=3, node="host-b")
