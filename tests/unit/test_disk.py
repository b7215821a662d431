import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ftd.disk import BLOCK, CHUNK, Copies, Image, check_image, digest, zero_digest
from ftd.errors import HostError
from ftd.journal import Journal, Request, RequestKind, encode

SIZE = 3 * CHUNK + 8192 + 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.img"
    with made.open("wb") as file:
        file.truncate(SIZE)
    return made


def test_random_requests_leave_what_a_plain_model_says(path: Path) -> None:
    random = np.random.default_rng(20)
    model = bytearray(SIZE)
    image = Image("vd0", path, writable=True)
    for _ in range(200):
        kind = RequestKind(int(random.integers(1, 5)))
        offset = int(random.integers(0, SIZE // 512)) * 512
        length = min(int(random.integers(1, 300)) * 512, SIZE - offset)
        if kind is RequestKind.FLUSH:
            image.apply(Request(0, kind))
            continue
        data = random.bytes(length) if kind is RequestKind.DATA else b""
        image.apply(Request(0, kind, offset, length, data))
        model[offset : offset + length] = data or bytes(length)
    image.close()
    assert path.read_bytes() == bytes(model)


def test_zeros_that_need_no_space_take_none(path: Path) -> None:
    image = Image("vd0", path, writable=True)
    image.apply(Request(0, RequestKind.DATA, 0, CHUNK, bytes([7]) * CHUNK))
    used = path.stat().st_blocks
    image.apply(Request(0, RequestKind.UNMAP, 0, CHUNK))
    assert path.stat().st_blocks < used
    image.close()


@pytest.mark.parametrize("piece", [BLOCK, CHUNK])
def test_digests_are_those_of_the_pieces_with_holes_and_a_short_end(path: Path, piece: int) -> None:
    with path.open("r+b") as file:
        for offset in (4096, CHUNK + 5000, SIZE - 600):
            file.seek(offset)
            file.write(b"something")
    content = path.read_bytes()
    image = Image("vd0", path)
    expected = [digest(content[at : at + piece], 9) for at in range(0, SIZE, piece)]
    assert image.digests(0, SIZE, piece, 9) == expected
    assert image.digests(0, SIZE + CHUNK, piece, 9) == expected
    assert image.digests(CHUNK, CHUNK, piece, 9) == expected[CHUNK // piece : 2 * CHUNK // piece]
    assert image.digests(2 * CHUNK, CHUNK, piece, 9)[0] == zero_digest(piece, 9)
    assert image.digests(0, SIZE, piece, 8) != expected
    image.close()


def test_an_image_that_is_written_to_is_locked_for_others(path: Path) -> None:
    first = Image("vd0", path, writable=True)
    with pytest.raises(HostError, match=r"disk vd1 \(.*disk.img\): another program writes to it"):
        Image("vd1", path, writable=True)
    with pytest.raises(HostError, match="another program writes to it"):
        check_image(path, name="vd1", exclusive=True)
    Image("vd1", path).close()  # to look at it harms nobody
    first.close()
    first.close()
    assert check_image(path, name="vd1", exclusive=True) == SIZE


def test_what_cannot_be_an_image_is_refused_with_the_remedy(tmp_path: Path, path: Path) -> None:
    with pytest.raises(HostError, match=r"nothing.img\): no such file or directory; create it"):
        check_image(tmp_path / "nothing.img", name="vd0")
    with pytest.raises(HostError, match="is a directory"):
        check_image(tmp_path, name="vd0")
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(
        HostError, match=r"has 1000 bytes, which is no whole number of sectors.*truncate -s 1024"
    ):
        check_image(path, name="vd0")
    with pytest.raises(HostError, match="is neither a file nor a block device"):
        check_image(Path("/dev/null"), name="vd0")
    with path.open("r+b") as file:
        file.truncate(65536)
        file.write(b"QFI\xfb\0\0\0\3")
    with pytest.raises(HostError, match=r"is a qcow2 image.*qemu-img convert -O raw \S+disk.img \S+disk.raw"):
        check_image(path, name="vd0")


def test_a_full_file_system_is_told_with_the_disk_and_the_place(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        with (folder / "disk.img").open("wb") as file:
            file.truncate(CHUNK)
        copies = Copies([("vd0", folder / "disk.img")])
        data = bytes([1]) * CHUNK
        section = encode([Request(0, RequestKind.DATA, 0, CHUNK, data)])
        with pytest.raises(
            HostError,
            match=r"disk vd0 \(\S+\): writing 1048576 bytes at 0: no space left on device; free some",
        ):
            copies.apply(Journal(memoryview(section), 1))
        copies.close()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_set_of_images_is_opened_wholly_or_not_at_all(tmp_path: Path, path: Path) -> None:
    with pytest.raises(HostError, match="no such file"):
        Copies([("vd0", path), ("vd1", tmp_path / "nothing")])
    copies = Copies([("vd0", path)])  # the lock was given back
    assert copies.sizes == [SIZE]
    asked = Journal(memoryview(encode([Request(0, RequestKind.FLUSH)])), 1)
    assert copies.apply(asked)
    copies.sync()
    copies.close()
    Image("vd0", path, writable=True).close()
    copies.open()
    with pytest.raises(HostError, match="another program writes to it"):
        Image("vd0", path, writable=True)
    copies.close()


def test_its_locks_are_given_up_though_a_call_of_another_thread_still_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    image = Image("vd0", path, writable=True)
    call = os.dup(image._fd)  # what the kernel keeps for a call that has begun
    try:
        with pytest.raises(HostError, match="another program writes to it"):
            Image("vd0", path, writable=True)
        image.close()
        Image("vd0", path, writable=True).close()
    finally:
        os.close(call)
