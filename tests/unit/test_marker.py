from pathlib import Path

import pytest

from ftd.errors import HostError
from ftd.marker import Marker, Note, Worth, mark


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
