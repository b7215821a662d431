"""Who decides which side may run the guest when the two lose sight of each other.

An arbiter keeps one record for each pair, and changes it only by compare-and-set: a writer names the record
that it believes to be there and the one that is to follow it, and of all who name the same one exactly one
wins. That is all that safety rests on (rule S3); no clock and no timeout has to be right.

    kind    where the record is                                              module
    etcd    a key of an etcd cluster, version 3                              arbiter_etcd
    file    a folder on storage that both hosts mount, NFS included          arbiter_file
    none    nowhere: everybody wins. Only with `accept_split_brain = true`   this one

`Arbiter` is the whole interface. A write that was sent and not answered may still take effect, or may never.
`ArbiterUnreachable.in_doubt` says so; whoever asked must not act as if it had won, nor as if it had not. It
asks again with the same two records, since an answered question settles all earlier ones: either the
record is what was wanted, and this side has won, or it has moved on, and no copy of the question can win.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftd.errors import ArbiterError, ArbiterUnreachable

__all__ = [
    "Answer",
    "Arbiter",
    "ArbiterError",
    "ArbiterUnreachable",
    "NoArbiter",
    "Record",
    "decode_record",
    "encode_record",
]

RecordState = Literal["solo", "paired", "stopped"]
RECORD_STATES: tuple[RecordState, ...] = get_args(RecordState)

# A record has about 150 bytes; whatever is larger is not one.
MAX_RECORD_BYTES = 4096


class Record(BaseModel):
    """What an arbiter keeps for a pair.

    generation: grows by one whenever authority changes hands, or is taken back from a backup. owner: the node
    that may run the guest. state:

        solo      the owner may let all of the guest's output go
        paired    the owner may let go what `backup` has committed; `backup` may take over
        stopped   the guest has ended by itself; nobody may take over, and the owner starts it the next time

    token: a random word, so that no two writes of the same meaning are the same record.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    generation: int = Field(ge=1, le=(1 << 63) - 1)
    owner: str = Field(min_length=1, max_length=64)
    state: RecordState
    backup: str = Field(default="", max_length=64)
    token: str = Field(default_factory=lambda: secrets.token_hex(8), max_length=64)

    def __str__(self) -> str:
        paired = f" with {self.backup}" if self.state == "paired" else ""
        return f"generation {self.generation}, {self.owner} {self.state}{paired}"


@dataclass(frozen=True)
class Answer:
    """An arbiter's answer to compare-and-set. record: what is there now, in either case."""

    won: bool
    record: Record | None


class Arbiter(Protocol):
    """Keeps the record of one pair. Belongs to the event loop; its calls return within `timeout_ms`."""

    kind: str

    async def read(self) -> Record | None:
        """Return the record, as of a moment during this call; None if there never was one.

        Raises ArbiterUnreachable, or ArbiterError for an answer that is none.
        """
        ...

    async def compare_and_set(self, expected: Record | None, new: Record) -> Answer:
        """Replace the record by `new` if it is `expected`, and say whether it was.

        To ask again with the same records is allowed, and finds out what became of the first time. Raises
        ArbiterUnreachable, whose `in_doubt` says whether the write may have happened or may still happen;
        ArbiterError for an answer that is none.
        """
        ...

    async def close(self) -> None:
        """Give back what is held open. May be called more than once."""
        ...


def encode_record(record: Record) -> bytes:
    """Return the bytes of a record as arbiters keep it: JSON on one line."""
    return record.model_dump_json().encode()


def decode_record(data: bytes, where: str) -> Record:
    """Return the record in these bytes. Raises ArbiterError naming `where` if they are none."""
    try:
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"{len(data)} bytes")
        return Record.model_validate_json(data)
    except (ValidationError, ValueError):
        raise ArbiterError(
            f"{where}: what is there is no record of ftd (it begins with {data[:20]!r}); "
            "give the pair a name of its own in [arbiter] pair"
        ) from None


class NoArbiter:
    """Everybody wins. Only with `accept_split_brain = true`: when the link is cut, both run the guest."""

    kind = "none"
    WARNING = "no arbiter: if only the link between the two hosts fails, both run the guest (split brain)"

    async def read(self) -> Record | None:
        """Nobody keeps a record."""
        return None

    async def compare_and_set(self, expected: Record | None, new: Record) -> Answer:
        """Nobody is asked."""
        return Answer(True, new)

    async def close(self) -> None:
        """Nothing is open."""
