"""What a node has to know after a crash or a reboot: the generation, and which part it last played.

    node.json in the state folder    Memory: the newest generation this node has seen, and its part in it
    IMAGE.ftd beside a disk image    Marker: what that image is worth

Each is one small JSON file, replaced atomically and forced to the disk, so that it is always one whole state
or the one before. An arbiter whose record is older than `Memory.generation` is refused; who starts the guest,
and so whose images are the newest, is decided by authority.at_start from the two.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftd.errors import HostError, friendly
from ftd.state import Role


class Memory(BaseModel):
    """generation: the last one that this node took part in; 0 for none. role: what it was in it.

    arbiter: whose generation it is, as arbiters.identity says; another's is no measure for it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    generation: int = Field(default=0, ge=0)
    role: Role | None = None
    arbiter: str = "none"


class Marker(BaseModel):
    """What a disk image beside which this is written is worth.

    generation: in which it was last written to. state: `current` (a guest runs, or ran last, from it),
    `committed` (equal to the disk at the end of a committed `epoch`), `syncing` (a copy of it is under way,
    and it is worth nothing).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    generation: int = Field(ge=0)
    state: Literal["current", "committed", "syncing"]
    epoch: int = Field(default=0, ge=0)


def read_marker(image: Path) -> Marker | None:
    """Return an image's marker, or None if it has none. Raises HostError if it cannot be read."""
    path = image.with_name(image.name + ".ftd")
    try:
        return Marker.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(friendly(error)) from None
    except ValidationError:
        raise HostError(
            f"{path}: is no marker of an image; remove it if the image is to be copied anew"
        ) from None


def write_marker(image: Path, marker: Marker) -> None:
    """Replace an image's marker, and return when it would survive a power loss. Raises HostError."""
    _replace(image.with_name(image.name + ".ftd"), marker)


class Durable:
    """The file `node.json` in a folder. Raises HostError, one line, for what cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "node.json"

    def read(self) -> Memory:
        """Return what was last written, or an empty memory."""
        try:
            return Memory.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return Memory()
        except OSError as error:
            raise HostError(friendly(error)) from None
        except ValidationError:
            raise HostError(
                f"{self.path}: is not a node's memory; if the peer runs the guest or no guest runs, remove it"
            ) from None

    def write(self, memory: Memory) -> None:
        """Replace what was written before, and return when it would survive a power loss."""
        _replace(self.path, memory)


def _replace(path: Path, model: BaseModel) -> None:
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
