"""What a node has to know after a crash or a reboot: the generation, and which part it last played.

`node.json` in the state folder is one small JSON file, replaced atomically and forced to the disk, so that it
is always one whole state or the one before. An arbiter whose record is older than `Memory.generation` is
refused; who starts the guest is decided by authority.at_start. What a disk is worth is in ftd/marker.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftd.errors import HostError, friendly
from ftd.state import Role

ModelT = TypeVar("ModelT", bound=BaseModel)


class Memory(BaseModel):
    """generation: the last one that this node took part in; 0 for none. role: what it was in it.

    arbiter: whose generation it is, as arbiters.identity says; another's is no measure for it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    generation: int = Field(default=0, ge=0)
    role: Role | None = None
    arbiter: str = "none"


class Durable:
    """The file `node.json` in a folder. Raises HostError, one line, for what cannot be read or written.

    For any thread. `write` waits for the host's disk, which may be busy for seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "node.json"
        self._lock = threading.Lock()
        self._there: Memory | None = None  # what is known to be in the file

    def read(self) -> Memory:
        """Return what was last written, or an empty memory."""
        not_one = "is not a node's memory; if the peer runs the guest or no guest runs, remove it"
        self._there = load(self.path, Memory, not_one)
        return self._there or Memory()

    def holds(self, memory: Memory) -> bool:
        """Say whether that is what was last written, or read."""
        return self._there == memory

    def write(self, memory: Memory) -> None:
        """Replace what was written before, and return when it would survive a power loss."""
        with self._lock:
            self._there = None
            replace(self.path, memory)
            self._there = memory


def load(path: Path, model: type[ModelT], not_one: str) -> ModelT | None:
    """Read what `replace` has written; None if there is no such file.

    Raises HostError: the host's own words, or PATH and `not_one` if what is there is not of that model.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(friendly(error)) from None
    except ValidationError:
        raise HostError(f"{path}: {not_one}") from None


def replace(path: Path, model: BaseModel) -> None:
    """Replace a file by a model as JSON, and return when it would survive a power loss. Raises HostError."""
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            file.write(model.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise HostError(friendly(error)) from None
