"""What has to be true after a schedule of faults, rule by rule of the project's eight.

    answers      S1 S4   what clients were told, the guest that is there now knows; no answer twice, none from
                         an epoch that was lost, no connection broken
    speakers     S3 S6   one question was never answered on two hosts (testbed/speakers.py)
    authority    S3      in all that the arbiter ever held, generations grow by one, each has one owner, and
                         each node claims only those that it won
    memory       S2 S4   all memory of guest and shadow is equal; the guest never saw a wrong page, or a clock
                         that ran backwards
    disks        S5      each row that the guest's database acknowledged is there, the database is whole, and
                         the images of both hosts are equal in every block
    daemons      S6 S7   a guest outlives its daemon in silence; both daemons end when it shuts down. Noted
                         while the faults are done, by testbed/faults.py
    logs         S8      no log holds what only a defect writes

`excused` says that the guest lost its memory as it was allowed to: connections may have broken, once.
"""

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from ftd.arbiter import Record, decode_record
from testbed.etcd import Etcd
from testbed.guarded import DEFECTS, console_faults
from testbed.history import History, Request, Sample, as_reads, stream_problems, value_problems

T = TypeVar("T", Request, Sample)


@dataclass
class Told:
    """What clients of one life of the guest recorded, as far as it is to be judged."""

    requests: list[Request] = field(default_factory=list)
    stream: list[Sample] = field(default_factory=list)
    stream_before: int = 0  # lines that were judged earlier
    udp: list[Sample] = field(default_factory=list)


@dataclass
class Evidence:
    """Everything that one schedule left behind. See the module for the rules."""

    told: list[Told]  # of each life, the last one last
    excused: bool
    speakers: list[str]
    records: list[Record]
    claims: dict[str, list[int]]  # by node: generations that the arbiter granted to it, as it noted itself
    verified: dict[str, Any]
    guest: dict[str, Any]  # its own /status
    consoles: str
    disks: list[str]
    noted: list[str]
    logs: str


def answers(evidence: Evidence) -> list[str]:
    """S1, S4."""
    found = []
    for number, told in enumerate(evidence.told):
        over = evidence.excused and number < len(evidence.told) - 1
        requests = [each for each in told.requests if each.error is None or not over]
        stream = [each for each in told.stream if each.error is None or not over]
        udp = told.udp
        if over:
            # Datagrams know no connection: later ones may be the next life's.
            last = max((each.end_ns for each in (*requests, *stream) if each.value is not None), default=0)
            udp = [each for each in udp if each.end_ns <= last]
        found += History((*requests, *as_reads(udp))).problems()
        found += value_problems(udp)
        found += stream_problems(stream, told.stream_before)
    return found


def speakers(evidence: Evidence) -> list[str]:
    """S3, S6."""
    return evidence.speakers


def authority(evidence: Evidence) -> list[str]:
    """S3."""
    found = []
    for one, other in pairwise(evidence.records):
        if other.generation == one.generation + 1:
            if other.state != "solo":
                found.append(f"a generation began as {other}")
        elif other.generation != one.generation:
            found.append(f"{one} became {other}")
        elif other.owner != one.owner:
            found.append(f"generation {one.generation} has two owners: {one} and {other}")
    owners = {record.generation: record.owner for record in evidence.records}
    for node, generations in evidence.claims.items():
        found += [
            f"{node} says that it won generation {generation}, which is {owners[generation]}'s"
            for generation in generations
            if owners.get(generation, node) != node
        ]
    return found


def memory(evidence: Evidence) -> list[str]:
    """S2, S4."""
    found = console_faults(evidence.consoles)
    if not evidence.verified.get("ok"):
        found.append(f"guest and shadow are not equal: {evidence.verified}")
    found += [
        f"the guest says {name} = {evidence.guest[name]}"
        for name in ("dirty_mismatches", "clock_backwards")
        if evidence.guest[name]
    ]
    return found


def disks(evidence: Evidence) -> list[str]:
    """S5."""
    return evidence.disks


def daemons(evidence: Evidence) -> list[str]:
    """S6, S7."""
    return evidence.noted


def logs(evidence: Evidence) -> list[str]:
    """S8."""
    return [line for line in evidence.logs.splitlines() if DEFECTS.search(line)]


CHECKERS: dict[str, Callable[[Evidence], list[str]]] = {
    "S1 S4 answers": answers,
    "S3 S6 speakers": speakers,
    "S3 authority": authority,
    "S2 S4 memory": memory,
    "S5 disks": disks,
    "S6 S7 daemons": daemons,
    "S8 logs": logs,
}


def judge(evidence: Evidence) -> list[str]:
    """Every problem that any checker finds, with the rule in front."""
    return [f"{name}: {line}" for name, check in CHECKERS.items() for line in check(evidence)]


# ---- gathering it -----------------------------------------------------------------------------------------


class Tail:
    """What was added to a text file since it was asked last; whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0

    def read(self) -> str:
        try:
            with self.path.open("rb") as file:
                if self.path.stat().st_size < self._offset:
                    self._offset = 0  # another file of that name
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return ""
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace")


class Recorded(Tail):
    """The same of a client's history."""

    def __init__(self, path: Path, kind: type[Any]) -> None:
        super().__init__(path)
        self._kind = kind

    def records(self) -> list[Any]:
        return [self._kind(**json.loads(line)) for line in self.read().splitlines()]


def since(records: Iterable[T], start_ns: int) -> list[T]:
    """Those that were answered, or failed, after a moment."""
    return [each for each in records if each.end_ns >= start_ns]


async def all_records(etcd: Etcd, pair: str, after: int) -> tuple[list[Record], int]:
    """Every record that etcd ever held after a revision, oldest first, and the newest revision."""
    member = etcd.members[0]
    key = base64.b64encode(f"/ftd/{pair}/authority".encode()).decode()
    now = await etcd.post(member, "/v3/kv/range", {"key": key})
    newest = int(now["header"]["revision"])
    found = []
    for revision in range(max(after, 1) + 1, newest + 1):
        then = await etcd.post(member, "/v3/kv/range", {"key": key, "revision": str(revision)})
        for value in then.get("kvs", []):
            found.append(decode_record(base64.b64decode(value["value"]), "etcd"))
    return found, newest


def granted(flight: str) -> list[int]:
    """Generations that a node's flight recorder says were granted to it."""
    found = []
    for line in flight.splitlines():
        note = json.loads(line)
        if note["what"] == "arbiter" and note.get("answer") == "granted":
            words: Sequence[str] = note["record"].replace(",", " ").split()
            found += [int(word) for before, word in pairwise(words) if before == "generation"]
    return found
