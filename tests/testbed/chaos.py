"""Schedules of random faults against one pair, one after the other, and what came of each.

    Arena      two hosts, an etcd on a third, a Linux guest with a database on a disk, clients, the probe for
               two speakers; lives through many schedules
    Trial      one schedule: its faults are done (testbed/faults.py), all is mended, the pair has to be
               protected by itself, and everything that was seen is judged (testbed/judges.py)

Called by tests/hosts/test_chaos.py and by scripts/soak. A seed says all that chance decides; what processors
and kernels make of the moments is not in it, so a seed that failed may have to be tried several times.
"""

import asyncio
import contextlib
import io
import json
import random
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from rich.console import Console as Screen
from rich.table import Table

from ftd.arbiter import Record
from testbed.arbitrated import arbitrated, free_guests, lives, post
from testbed.client import CounterClient
from testbed.disks import (
    MIB,
    LedgerLoad,
    ask_ledger,
    differing_blocks,
    disk_guest,
    image,
    make_images,
    wait_ledger,
)
from testbed.etcd import Etcd
from testbed.faults import KINDS, UNREACHABLE, Fault, Schedule, operate
from testbed.guarded import ask, wait_ready
from testbed.guest import ROOT
from testbed.history import Request, Sample
from testbed.hosts import Client, TestbedError, TestNetwork
from testbed.judges import Evidence, Recorded, Tail, Told, all_records, answers, granted, judge, since
from testbed.pair import Daemon, Pair
from testbed.speakers import Speakers

READY = "ftd-guest: ready"
PAIR = "web"
DISK_MIB = 16
EVIDENCE = ROOT / ".test-results/chaos"

# Detection within 0.4 s: with an arbiter, an accusation in error costs a takeover, and never a guest.
HEARTBEAT = {"interval_ms": 50, "misses": 8}
PROTECTED_S = 60.0
BOOT_S = 90.0
PATIENCE_S = 45.0
# Of each kind, after all is protected again.
ENOUGH = {"count": 5, "stream": 5, "udp": 5, "ping": 2}


class Load:
    """The clients of one life of the guest, in one process, and what they recorded."""

    def __init__(self, node: Client, folder: Path) -> None:
        self.client = CounterClient(node, folder, probe="all", connections=2, timeout_s=60)
        self._files = {
            "count": Recorded(folder / "count", Request),
            **{probe: Recorded(folder / probe, Sample) for probe in ("stream", "udp", "ping")},
        }
        self._records: dict[str, list[Any]] = {probe: [] for probe in self._files}
        self._judged = 0  # lines of the stream

    async def start(self) -> None:
        await self.client.start()

    async def stop(self) -> None:
        await self.client.stop(2)

    def read(self) -> None:
        """Read on."""
        for probe, file in self._files.items():
            self._records[probe] += file.records()

    def answers(self, after_ns: int) -> dict[str, int]:
        """How many of each kind came to what was asked after a moment."""
        self.read()
        return {
            probe: sum(each.value is not None and each.start_ns > after_ns for each in records)
            for probe, records in self._records.items()
        }

    def broken(self) -> list[str]:
        """Connections that ended with an error."""
        self.read()
        return [
            str(each.error) for probe in ("count", "stream") for each in self._records[probe] if each.error
        ]

    def gap_s(self, after_ns: int) -> float:
        """The longest time without any answer, of those that ended after a moment."""
        ends = sorted(
            each.end_ns for records in self._records.values() for each in records if each.value is not None
        )
        gaps = [other - one for one, other in pairwise(ends) if other > after_ns]
        return max(gaps, default=0) / 1e9

    def told(self, start_ns: int) -> Told:
        """What came after a moment, to be judged; what came before is forgotten."""
        self.read()
        self._records = {probe: since(records, start_ns) for probe, records in self._records.items()}
        stream = self._records["stream"]
        return Told(
            list(self._records["count"]),
            list(stream),
            stream[0].number - 1 if stream else 0,
            list(self._records["udp"]),
        )


class Arena:
    """The pair and everything around it; see the module."""

    def __init__(self, qemu: Path, settings: dict[str, dict[str, Any]] | None = None) -> None:
        self._qemu, self._settings = qemu, settings or {}
        self._stack = contextlib.AsyncExitStack()
        self.network: TestNetwork
        self.client: Client
        self.etcd: Etcd
        self.pair: Pair
        self.speakers: Speakers
        self.load: Load
        self.ledger: LedgerLoad
        self._off: set[str] = set()
        self._lives_of_clients = 0
        self._tails: dict[str, list[Tail]] = {}
        self._consoles: list[Tail] = []
        self._boots = 0
        self._revision = 0
        self._last_record: Record | None = None
        self.paused = False  # an operator has paused the guest, wherever it is by now
        self._heard = 0  # of the speakers' problems
        self.judged_from_ns = 0

    # ---- its life -----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        self.network = await self._stack.enter_async_context(TestNetwork(["host-a", "host-b", "arbiter"]))
        self.client = self.network.client
        self.etcd = await self._stack.enter_async_context(
            Etcd.on(self.network.hosts["arbiter"], self.network.directory / "etcd")
        )
        guest = await disk_guest(files=1)
        guest.options["sequence_ms"] = "1000"
        tables = {"heartbeat": HEARTBEAT, **arbitrated(self.etcd), **self._settings}
        self.pair = Pair(self.network, guest, self._qemu, tables)
        self._stack.push_async_callback(self.pair.close)
        await self.pair.prepare()
        await make_images(self.pair, [DISK_MIB * MIB])
        self.speakers = await self._stack.enter_async_context(
            Speakers(self.network, lambda: free_guests(self.pair), look_every_s=0.5)
        )
        for daemon in self.daemons:
            self._consoles.append(Tail(daemon.console.path))
            self._tails[daemon.host.name] = [
                Tail(daemon.console.path),
                Tail(daemon.log),
                Tail(daemon.folder / "state/flight.jsonl"),
            ]
        await self.pair.backup.start()
        await wait_ready(self.pair.backup)
        await self.pair.primary.start()
        await self.pair.wait_protected()
        await self.wait_new_life(0)
        await self.start_clients({})
        await self.wait_answers(time.monotonic_ns(), lives=self.lives())
        self.judged_from_ns = time.monotonic_ns()

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def close(self) -> None:
        """The same, without `async with`."""
        await self._stack.aclose()

    # ---- clients and lives --------------------------------------------------------------------------------

    async def start_clients(self, acknowledged: dict[int, int]) -> None:
        """The guest is up, in a life that no client knows yet."""
        await wait_ledger(self.client, BOOT_S)
        self._lives_of_clients += 1
        self.load = Load(self.client, self.network.directory / f"clients-{self._lives_of_clients}")
        self.ledger = LedgerLoad(self.client, workers=1, interval_s=0.05, acknowledged=acknowledged)
        await self.load.start()
        self.ledger.start()
        self._stack.push_async_callback(_quietly_stop, self.load, self.ledger)

    async def wait_answers(self, after_ns: int, *, lives: int, timeout_s: float = PATIENCE_S) -> None:
        """Clients of every kind have answers to what they asked after a moment.

        Raises TestbedError if not, and as soon as the guest has booted more often than `lives`.
        """
        deadline = time.monotonic() + timeout_s
        rows = self.ledger.total
        while True:
            have = self.load.answers(after_ns)
            if (
                all(have[probe] >= enough for probe, enough in ENOUGH.items())
                and self.ledger.total > rows + 1
            ):
                return
            if broken := [*self.load.broken(), *self.ledger.errors]:
                raise TestbedError(f"connections broke: {broken[:3]}")
            if self.lives() > lives:
                raise TestbedError("the guest has booted anew")
            if time.monotonic() > deadline:
                raise TestbedError(
                    f"no answers within {timeout_s:g} s: {have}, {self.ledger.total - rows} rows"
                )
            await asyncio.sleep(0.05)

    def lives(self) -> int:
        """How often the guest has booted, as both consoles say."""
        self._boots += sum(console.read().count(READY) for console in self._consoles)
        return self._boots

    async def wait_new_life(self, before: int, timeout_s: float = BOOT_S) -> None:
        """Wait until the guest has booted once more. Raises TestbedError."""
        deadline = time.monotonic() + timeout_s
        while self.lives() <= before:
            if time.monotonic() > deadline:
                raise TestbedError(f"the guest has not booted within {timeout_s:g} s")
            await asyncio.sleep(0.05)

    # ---- parts --------------------------------------------------------------------------------------------

    @property
    def daemons(self) -> tuple[Daemon, Daemon]:
        """Both, whatever their parts are."""
        return self.pair.primary, self.pair.backup

    def switch_off(self, daemon: Daemon) -> None:
        """All of its host dies."""
        self._off.add(daemon.host.name)
        daemon.host.kill_all()

    async def switch_on(self, daemon: Daemon) -> None:
        """A host that was switched off boots, and its daemon starts."""
        if daemon.host.name in self._off:
            daemon.host.revive()
            self._off.remove(daemon.host.name)
            assert daemon.host.memory_directory.is_dir()
        await self.run(daemon)

    async def run(self, daemon: Daemon) -> int | None:
        """Start a daemon that has ended, as systemd would; returns its exit code, if it had ended."""
        if daemon.host.name in self._off or daemon.process is None:
            return None
        if not daemon.ended() and lives(daemon.process.pid):
            return None
        code = await daemon.process.wait()  # one that was killed is reaped a moment later
        await daemon.close()
        await daemon.start()
        return code

    def start_arbiter(self) -> None:
        """Start etcd with the data that it has, if it does not run."""
        if self.etcd.members[0].process is None:
            self.etcd.members[0].start()

    def signal_arbiter(self, number: int) -> None:
        """Send etcd a signal, if it runs."""
        if self.etcd.members[0].process is not None:
            self.etcd.members[0].signal(number)

    async def record(self) -> Record | None:
        """What the arbiter has now."""
        records, _ = await all_records(self.etcd, PAIR, self._revision)
        return records[-1] if records else self._last_record

    async def let_guests_go_on(self) -> None:
        """`cont` to every guest that stands still by QMP, if an operator has paused one.

        Others stand still for a moment since they are handed over.
        """
        if not self.paused:
            return
        for daemon in self.daemons:
            with contextlib.suppress(*UNREACHABLE):
                if (await operate(daemon, "query-status"))["status"] == "paused":
                    await operate(daemon, "cont")

    async def mend(self) -> None:
        """Undo everything that a fault may have left."""
        for daemon in self.daemons:
            daemon.host.restore_all()
            daemon.host.thaw()
        self.start_arbiter()
        self.signal_arbiter(signal.SIGCONT)
        await self.etcd.wait_healthy()
        for daemon in self.daemons:
            await self.switch_on(daemon)

    async def wait_protected(self, notes: list[str]) -> tuple[Daemon, Daemon]:
        """The pair is whole, by itself but for daemons that end, which systemd starts again.

        Returns leader and follower. Raises TestbedError.
        """
        deadline = time.monotonic() + PROTECTED_S
        told: dict[str, Any] = {}
        while time.monotonic() < deadline:
            roles: dict[str, Daemon] = {}
            for daemon in self.daemons:
                if (code := await self.run(daemon)) is not None:
                    notes.append(f"{daemon.host.name} ended with code {code}")
                with contextlib.suppress(*UNREACHABLE):
                    status = await daemon.status()
                    told[daemon.host.name] = f"{status['role']} {status['state']}: {status['reason']}"
                    if status["state"] == "protected":
                        roles[status["role"]] = daemon
            if len(roles) == 2:
                await self.let_guests_go_on()
                self.paused = False
                return roles["primary"], roles["backup"]
            await asyncio.sleep(0.05)
        raise TestbedError(f"not protected again within {PROTECTED_S:g} s: {told}")

    # ---- evidence -----------------------------------------------------------------------------------------

    def read_texts(self) -> tuple[str, str, dict[str, list[int]]]:
        """What was added to consoles and logs, and the generations that each node says it won."""
        consoles = logs = ""
        claims = {}
        for name, (console, log, flight) in self._tails.items():
            consoles += console.read()
            logs += log.read()
            claims[name] = granted(flight.read())
        return consoles, logs, claims

    async def read_records(self) -> list[Record]:
        """All that the arbiter ever held since this was asked last, and the one before."""
        records, self._revision = await all_records(self.etcd, PAIR, self._revision)
        found = [*([self._last_record] if self._last_record is not None else []), *records]
        self._last_record = found[-1] if found else None
        return found

    def heard(self) -> list[str]:
        """What the speakers' probe found since this was asked last."""
        found = self.speakers.problems()[self._heard :]
        self._heard += len(found)
        return found

    async def unequal_disks(self, leader: Daemon, follower: Daemon) -> list[str]:
        """With the guest stopped and all that it wrote applied, both images are the same in every block."""
        self.paused = True  # should the guest move meanwhile, it is found where it then is
        await operate(leader, "stop")
        try:
            committed = (await leader.status())["epoch"]["committed"] + 2
            await follower.wait_status(
                "the last epoch", lambda status: status["epoch"]["committed"] >= committed, 20
            )
            differing: list[int] = []
            for _ in range(100):  # what is committed is applied a moment later
                differing = await asyncio.to_thread(differing_blocks, image(leader), image(follower))
                if not differing:
                    return []
                await asyncio.sleep(0.02)
            for daemon in (leader, follower):
                if (state := (await daemon.status())["state"]) != "protected":
                    raise TestbedError(f"{daemon.host.name} is {state} while disks are compared")
            return [f"{len(differing)} blocks of the images differ, the first is {differing[0]}"]
        finally:
            with contextlib.suppress(*UNREACHABLE):
                await operate(leader, "cont")

    def keep(self, name: str) -> Path:
        """Copy what is worth keeping of a failure: logs, histories, flight recorders, consoles."""
        folder = EVIDENCE / name
        shutil.rmtree(folder, ignore_errors=True)
        ignore = shutil.ignore_patterns("*.img", "*.sock", "*.fsck", "tls", "member")
        shutil.copytree(self.network.directory, folder, ignore=ignore, ignore_dangling_symlinks=True)
        return folder


async def _quietly_stop(load: Load, ledger: LedgerLoad) -> None:
    ledger.cancel()
    with contextlib.suppress(TestbedError, OSError):
        await load.stop()


@dataclass
class Outcome:
    """What came of a schedule."""

    schedule: Schedule
    problems: list[str]
    what: str = "–"
    protected_s: float | None = None
    gap_s: float | None = None
    answers: int = 0
    notes: list[str] = field(default_factory=list)
    took_s: float = 0.0
    kept: Path | None = None
    again: str = ""

    def told(self) -> dict[str, Any]:
        """A row of the tables, of what JSON has."""
        steps = self.schedule.steps
        return {
            "seed": self.schedule.seed,
            "faults": str(self.schedule),
            "kinds": [step.fault.kind for step in steps],
            "outcome": self.what,
            "protected_s": self.protected_s,
            "gap_s": self.gap_s,
            "answers": self.answers,
            "notes": self.notes,
            "took_s": self.took_s,
            "problems": self.problems,
        }


class Trial:
    """One schedule against an arena."""

    def __init__(self, arena: Arena, schedule: Schedule, patience_s: float = PATIENCE_S) -> None:
        """patience_s: for clients to be answered again."""
        self.arena, self.schedule, self._patience_s = arena, schedule, patience_s
        self._chance = random.Random(f"trial {schedule.seed}")
        self.leader, self.follower = arena.daemons
        self.lives = arena.lives()
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.asked: list[asyncio.Future[None]] = []
        self.orphan: tuple[Daemon, int] | None = None
        self.frames_port: int | None = None

    def of(self, fault: Fault) -> list[Daemon]:
        """The daemons of the fault's side."""
        sides = {"leader": [self.leader], "follower": [self.follower]}
        return sides.get(fault.side, [self.leader, self.follower])

    def shuffled(self, fault: Fault) -> list[Daemon]:
        """The same in an order of chance's."""
        found = self.of(fault)
        self._chance.shuffle(found)
        return found

    async def run(self) -> Outcome:
        """Do it all. Never raises for what the pair does: that is a problem in the outcome."""
        began = time.monotonic()
        outcome = Outcome(self.schedule, self.problems, notes=self.notes)
        try:
            await self._run(outcome)
        except (*UNREACHABLE, TimeoutError) as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        for asked in self.asked:
            asked.cancel()
        outcome.took_s = time.monotonic() - began
        return outcome

    async def _run(self, outcome: Outcome) -> None:
        arena = self.arena
        self.leader, self.follower = first_leader, _ = await arena.wait_protected(self.notes)
        generation = (await self.leader.status())["generation"]
        began_ns = time.monotonic_ns()
        await self._do_faults()
        await arena.mend()
        mended = time.monotonic()
        if self.asked:
            await asyncio.wait(self.asked)
        await arena.wait_protected(self.notes)
        outcome.protected_s = time.monotonic() - mended
        told, excused = await self._wait_clients()
        outcome.gap_s = arena.load.gap_s(began_ns)
        outcome.answers = sum(arena.load.answers(began_ns).values())
        guest = await _guest_status(arena)
        leader, verified, unequal = await self._compare()
        unequal += await _ledger_problems(arena)
        now = (await leader.status())["generation"]
        outcome.what = _what(first_leader is leader, generation, now, self.lives != arena.lives())
        told.append(arena.load.told(arena.judged_from_ns))
        consoles, logs, claims = arena.read_texts()
        evidence = Evidence(
            told=told,
            excused=excused,
            speakers=arena.heard(),
            records=await arena.read_records(),
            claims=claims,
            verified=verified,
            guest=guest,
            consoles=consoles,
            disks=unequal,
            noted=list(self.problems),
            logs=logs,
        )
        self.problems[:] = judge(evidence)
        # What this schedule saw is judged together with the next: nothing hides in the seam.
        arena.judged_from_ns = began_ns

    async def _do_faults(self) -> None:
        """Begin and end each fault at its moment; the moments are chance's, and nothing is waited for."""
        clock = asyncio.get_running_loop().time
        ends: list[tuple[float, Fault]] = []
        at = clock()

        async def until(moment: float) -> None:
            while ends and min(ends)[0] <= moment:
                due, fault = ends.pop(ends.index(min(ends, key=lambda each: each[0])))
                await asyncio.sleep(max(0.0, due - clock()))
                await fault.is_a.end(self, fault)
            if moment != float("inf"):
                await asyncio.sleep(max(0.0, moment - clock()))

        for step in self.schedule.steps:
            if step.protected_first:
                await until(float("inf"))
                await self.arena.mend()
                self.leader, self.follower = await self.arena.wait_protected(self.notes)
                self.orphan = None
                at = clock()
            at += step.after_s
            await until(at)
            await step.fault.is_a.begin(self, step.fault)
            ends.append((clock() + step.fault.hold_s, step.fault))
            at = clock()
        await until(float("inf"))

    async def _compare(self) -> tuple[Daemon, dict[str, Any], list[str]]:
        """Compare memory and disks of both sides; again, if the pair loses its protection meanwhile.

        Returns the leader, what `verify` said, and what is wrong with the disks. Raises TestbedError.
        """
        last: Exception | None = None
        for _ in range(3):
            leader, follower = await self.arena.wait_protected(self.notes)
            try:
                verified = await post(leader, "verify")
                if "ok" in verified:
                    return leader, verified, await self.arena.unequal_disks(leader, follower)
                last = TestbedError(f"verify: {verified}")
            except UNREACHABLE as error:
                last = error
            self.notes.append(f"compared again: {last}")
        raise TestbedError(f"no comparison comes to its end: {last}")

    async def _wait_clients(self) -> tuple[list[Told], bool]:
        """Clients are answered again: the same ones, or new ones if the guest had to start anew.

        Returns what the earlier ones were told, and whether that life was allowed to end.
        """
        arena = self.arena
        try:
            await arena.wait_answers(time.monotonic_ns(), lives=self.lives, timeout_s=self._patience_s)
        except TestbedError as error:
            if not self.schedule.may_lose_memory:
                told = arena.load.told(arena.judged_from_ns)
                self.problems += judge_answers_only(told)
                raise TestbedError(
                    f"{error}; the guest has {'booted anew' if arena.lives() > self.lives else 'not booted'}"
                ) from None
            await arena.wait_new_life(self.lives)
        else:
            return [], False
        before = arena.load.told(arena.judged_from_ns)
        acknowledged = arena.ledger.acknowledged
        await _quietly_stop(arena.load, arena.ledger)
        await arena.start_clients(acknowledged)
        await arena.wait_answers(time.monotonic_ns(), lives=arena.lives())
        return [before], True


def judge_answers_only(told: Told) -> list[str]:
    """What clients saw, when there is nothing else to be judged."""
    nothing: dict[str, Any] = {}
    return [
        f"S1 S4 answers: {line}"
        for line in answers(Evidence([told], False, [], [], {}, nothing, nothing, "", [], [], ""))
    ]


async def _guest_status(arena: Arena) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(await ask(arena.client, "GET", "/status"))
    return status


async def _ledger_problems(arena: Arena) -> list[str]:
    """What the database lost of what it acknowledged, and what is wrong with it."""
    found = []
    if not (check := await ask_ledger(arena.client, "check")).startswith("ok "):
        found.append(f"the database is damaged: {check}")
    for worker, count in dict(arena.ledger.acknowledged).items():
        rows, highest = map(int, (await ask_ledger(arena.client, f"has {worker}")).split())
        if rows < count or highest < count - 1:
            found.append(
                f"worker {worker}: {count} rows were acknowledged, and {rows} are there, up to {highest}"
            )
    return found


def _what(same_leader: bool, before: int, now: int, booted: bool) -> str:
    """The outcome in a few words."""
    if booted:
        return "booted anew"
    if not same_leader:
        return "taken over"
    return "kept" if before == now else f"kept, generation +{now - before}"


Row = dict[str, Any]  # what Outcome.told() returns
COLUMNS = ("seed", "faults", "outcome", "protected", "gap", "answers", "took", "problems")


def summary(rows: Iterable[Row]) -> Table:
    """The table of all schedules."""
    table = Table(
        caption="protected: from all mended to protected; gap: the longest time without any answer", box=None
    )
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for row in rows:
        problems = row["problems"]
        table.add_row(
            str(row["seed"]),
            row["faults"],
            row["outcome"] + (f" ({'; '.join(row['notes'])})" if row["notes"] else ""),
            "–" if row["protected_s"] is None else f"{row['protected_s']:.1f} s",
            "–" if row["gap_s"] is None else f"{row['gap_s']:.1f} s",
            str(row["answers"]),
            f"{row['took_s']:.1f} s",
            "; ".join(problems[:4]) + (f" … {len(problems)} in all" if len(problems) > 4 else "") or "none",
        )
    return table


def counted(rows: Iterable[Row]) -> Table:
    """How often each kind of fault was injected, and what came of the schedules that it was in."""
    rows = list(rows)
    table = Table(box=None)
    for name in ("fault", "injected", "kept", "taken over", "booted anew", "with problems"):
        table.add_column(name)
    for kind in sorted(KINDS):
        with_it = [row for row in rows if kind in row["kinds"]]
        table.add_row(
            kind,
            str(sum(row["kinds"].count(kind) for row in with_it)),
            *(
                str(sum(row["outcome"].startswith(what) for row in with_it))
                for what in ("kept", "taken over", "booted anew")
            ),
            str(sum(bool(row["problems"]) for row in with_it)),
        )
    return table


def as_text(*tables: Table, width: int = 200) -> str:
    """Tables as plain text."""
    out = io.StringIO()
    screen = Screen(width=width, highlight=False, markup=False, color_system=None, file=out)
    for table in tables:
        screen.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


class Chaos:
    """Runs schedules against one arena for as long as nothing fails; a failure costs a new arena."""

    def __init__(self, qemu: Path, settings: dict[str, dict[str, Any]] | None = None) -> None:
        self._qemu, self._settings = qemu, settings
        self._arena: Arena | None = None
        self._first = 0  # seed of the schedule that the arena began with
        self.outcomes: list[Outcome] = []

    async def run(self, seed: int) -> Outcome:
        """Run the schedule of a seed. Its problems are in what is returned, with the evidence kept."""
        schedule = Schedule.of(seed)
        if self._arena is None:
            self._arena = await Arena(self._qemu, self._settings).__aenter__()
            self._first = seed
        outcome = await Trial(self._arena, schedule).run()
        self.outcomes.append(outcome)
        if outcome.problems:
            outcome.kept = self._arena.keep(f"seed-{seed}")
            outcome.again = replay(seed, self._first)
            await self.close()
        return outcome

    async def close(self) -> None:
        """End the arena."""
        if self._arena is not None:
            arena, self._arena = self._arena, None
            await arena.close()


def replay(seed: int, first: int | None = None) -> str:
    """How one schedule is run again: alone, or after those of its pair from `first` on."""
    before = f", or with those before it --schedule {first}-{seed}" if first is not None else ""
    return f"scripts/soak --schedule {seed}{before if first != seed else ''}"
