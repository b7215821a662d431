"""What clients saw, and what follows from it. Pure functions over recorded requests.

Times are nanoseconds of CLOCK_MONOTONIC, which every process of a machine shares, whatever its namespace.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

Kind = Literal["increment", "read", "write"]  # write: of something else than the counter


@dataclass(frozen=True)
class Request:
    """One request and what became of it: a value, or an error when no answer came."""

    kind: Kind
    worker: int  # which of the concurrent clients
    connection: int  # which TCP connection of that client, from 1
    start_ns: int  # before its first byte was handed to the kernel
    end_ns: int  # after the answer was read, or the error was seen
    value: int | None = None
    error: str | None = None  # "ConnectionResetError: …"

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Gap:
    """A stretch without any answer: from one answer to the next."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class Downtime:
    """How long clients got no answer, beyond what they were used to."""

    seconds: float  # the gap less the typical gap, not below 0
    gap: Gap
    typical_s: float


@dataclass(frozen=True)
class History:
    """Everything a run of clients recorded, in any order."""

    requests: tuple[Request, ...]

    @classmethod
    def read(cls, path: Path) -> "History":
        """Read a file of JSON lines. A last line that was not written whole is left out."""
        return cls(tuple(_parse(path.read_text().splitlines())))

    @property
    def acknowledged(self) -> list[Request]:
        """Increments that were answered, by the time of the answer."""
        answered = [each for each in self.requests if each.kind == "increment" and each.value is not None]
        return sorted(answered, key=lambda each: each.end_ns)

    @property
    def answered(self) -> list[Request]:
        """All requests that were answered, by the time of the answer."""
        return sorted(
            (each for each in self.requests if each.value is not None), key=lambda each: each.end_ns
        )

    @property
    def errors(self) -> list[Request]:
        """Requests without an answer."""
        return [each for each in self.requests if each.error is not None]

    @property
    def resets(self) -> list[Request]:
        """Requests whose connection the other side ended: reset, or closed in place of an answer."""
        kinds = ("ConnectionResetError", "BrokenPipeError", "IncompleteReadError", "ConnectionAbortedError")
        return [each for each in self.errors if (each.error or "").startswith(kinds)]

    @property
    def connections(self) -> int:
        """How many TCP connections were used; as many as clients, when none broke."""
        return len({(each.worker, each.connection) for each in self.requests})

    @property
    def last_value(self) -> int | None:
        """The highest counter that a client was told, or None."""
        return max((each.value for each in self.requests if each.value is not None), default=None)

    def duplicates(self) -> dict[int, int]:
        """Values that more than one increment was answered with, and how many."""
        seen = Counter(each.value for each in self.acknowledged)
        return {value: count for value, count in seen.items() if value is not None and count > 1}

    def backwards(self) -> list[tuple[Request, Request]]:
        """Pairs (earlier, later): the later began after the earlier was answered, and yet was told less.

        An increment has to be told more than anything answered before, a read at least as much. Concurrent
        requests are in no order, so nothing follows from them. For each later request: the earlier one with
        the highest value.
        """
        earlier = self.answered
        ends = [each.end_ns for each in earlier]
        highest: list[Request] = []
        for each in earlier:
            highest.append(each if not highest or _value(each) > _value(highest[-1]) else highest[-1])
        pairs = []
        for later in sorted(self.answered, key=lambda each: each.start_ns):
            before = bisect_right(ends, later.start_ns - 1)
            if before and _contradicts(later, _value(highest[before - 1])):
                pairs.append((highest[before - 1], later))
        return pairs

    def lost(self, before: int | None = None, after: int | None = None) -> int:
        """How many acknowledged increments are missing, as far as it can be shown: at least so many.

        Shown by any of: an answer that came later and knows less; two increments with one value; the counter
        `after` (read once all was over) below a value that was told; and, when the counter `before` is known
        too, fewer counted than were acknowledged.
        """
        acknowledged = self.acknowledged
        by_order = self._lost_by_order(after)
        spare = sum(count - 1 for count in self.duplicates().values())
        by_count = 0 if before is None or after is None else len(acknowledged) - (after - before)
        return max(by_order, spare, by_count, 0)

    def _lost_by_order(self, after: int | None) -> int:
        later = sorted(self.answered, key=lambda each: each.start_ns)
        starts = [each.start_ns for each in later]
        # What the counter was at most before each request: an increment to v found v - 1.
        found = [_value(each) - (each.kind == "increment") for each in later]
        lowest = [after] * (len(later) + 1)
        for index in range(len(later) - 1, -1, -1):
            following = lowest[index + 1]
            lowest[index] = found[index] if following is None else min(found[index], following)
        lost = 0
        for each in self.acknowledged:
            least = lowest[bisect_right(starts, each.end_ns)]
            lost += least is not None and least < _value(each)
        return lost

    def gaps(self) -> list[Gap]:
        """The stretches between answers, whichever client got them, in order."""
        return [Gap(one.end_ns, other.end_ns) for one, other in pairwise(self.answered)]

    def downtime(self, after_ns: int = 0) -> Downtime | None:
        """The downtime that clients saw: the longest gap between two answers less the typical gap.

        Only gaps that end after `after_ns` (the moment of the kill) count; the one that contains the moment
        does. The typical gap is the median of all those that ended before the longest began, or of all others
        when there is none. None when fewer than two answers came, or none after that moment.
        """
        gaps = self.gaps()
        candidates = [gap for gap in gaps if gap.end_ns > after_ns]
        if not candidates:
            return None
        longest = max(candidates, key=lambda gap: gap.end_ns - gap.start_ns)
        usual = [gap.seconds for gap in gaps if gap.end_ns <= longest.start_ns]
        usual = usual or [gap.seconds for gap in gaps if gap is not longest]
        typical = median(usual) if usual else 0.0
        return Downtime(max(longest.seconds - typical, 0.0), longest, typical)

    def latencies(self) -> list[float]:
        """Seconds from request to answer, in the order of the answers."""
        return [(each.end_ns - each.start_ns) / 1e9 for each in self.answered]

    def problems(self, before: int | None = None, after: int | None = None) -> list[str]:
        """What a client may never see, one line each; empty for a right history."""
        lines = [
            f"value {value} was given {count} times" for value, count in sorted(self.duplicates().items())
        ]
        lines += [
            f"value {later.value} at {later.start_ns} after {earlier.value} at {earlier.end_ns}"
            for earlier, later in self.backwards()
        ]
        if lost := self.lost(before, after):
            lines.append(f"{lost} acknowledged increments are lost")
        lines += [f"connection {each.worker}/{each.connection}: {each.error}" for each in self.errors]
        return lines


def _value(request: Request) -> int:
    assert request.value is not None
    return request.value


def _contradicts(later: Request, known: int) -> bool:
    return _value(later) <= known if later.kind == "increment" else _value(later) < known


def _parse(lines: list[str]) -> Iterator[Request]:
    for number, line in enumerate(lines):
        try:
            yield Request(**json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise


# ---- numbered streams and datagrams, as guests/linux answers on port 7000 ----


@dataclass(frozen=True)
class Sample:
    """A probe (line of a stream, datagram, ping) and its answer; `number`: the client's own count from 1."""

    probe: Literal["stream", "udp", "ping"]
    number: int
    start_ns: int
    end_ns: int
    value: int | None = None
    error: str | None = None

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})


def read_samples(path: Path) -> list[Sample]:
    """Read a file of JSON lines; a last line that was not written whole is left out."""
    lines = path.read_text().splitlines()
    samples = []
    for number, line in enumerate(lines):
        try:
            samples.append(Sample(**json.loads(line)))
        except ValueError:
            if number + 1 < len(lines):
                raise
    return samples


def stream_problems(samples: Iterable[Sample], before: int = 0) -> list[str]:
    """A stream over one connection must answer line N with the number N, each once and in order.

    `before`: lines of the stream that were judged already.
    """
    lines = []
    expected = before
    for sample in samples:
        if sample.probe != "stream":
            continue
        expected += 1
        if sample.error is not None:
            lines.append(f"line {sample.number}: {sample.error}")
        elif sample.value != expected:
            lines.append(f"line {sample.number} was answered as {sample.value}, expected {expected}")
    return lines


def value_problems(samples: Iterable[Sample]) -> list[str]:
    """Answers to datagrams carry the counter: one that falls shows an answer from an epoch that was lost.

    Datagrams that were lost on the way are no problem, they may be.
    """
    lines = []
    highest: Sample | None = None
    for sample in sorted((each for each in samples if each.value is not None), key=lambda each: each.end_ns):
        if highest is not None and sample.start_ns > highest.end_ns and _less(sample, highest):
            lines.append(
                f"datagram {sample.number} knows {sample.value}, {highest.number} knew {highest.value}"
            )
        if highest is None or _less(highest, sample):
            highest = sample
    return lines


def as_reads(samples: Iterable[Sample]) -> tuple[Request, ...]:
    """Answers to datagrams as what they are, readings of the counter: to be judged with the increments."""
    return tuple(
        Request("read", 0, 0, each.start_ns, each.end_ns, each.value)
        for each in samples
        if each.probe == "udp" and each.value is not None
    )


def _less(one: Sample, other: Sample) -> bool:
    return (one.value or 0) < (other.value or 0)
