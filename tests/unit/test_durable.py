"""What survives a crash: whole states only."""

import os

import pytest

from ftd.durable import Durable, Memory
from ftd.errors import HostError


def test_nothing_written_is_an_empty_memory(tmp_path):
    assert Durable(tmp_path / "missing").read() == Memory(generation=0, role=None)


def test_what_was_written_is_read(tmp_path):
    Durable(tmp_path / "new" / "folder").write(Memory(generation=7, role="primary"))
    assert Durable(tmp_path / "new" / "folder").read() == Memory(generation=7, role="primary")


def test_a_write_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    durable = Durable(tmp_path)
    durable.write(Memory(generation=1, role="backup"))

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(HostError, match="no space left"):
        durable.write(Memory(generation=2, role="primary"))
    monkeypatch.undo()
    assert durable.read() == Memory(generation=1, role="backup")
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"]


@pytest.mark.parametrize("text", ["", "{", '{"generation": -1}', '{"generation": 1, "role": "king"}', "[]"])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, text):
    (tmp_path / "node.json").write_text(text)
    with pytest.raises(HostError, match=r"node\.json: is not a node's memory; .*remove it"):
        Durable(tmp_path).read()
