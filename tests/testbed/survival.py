"""Takeovers at random moments under clients of every kind, and what the clients say of them.

A seed decides everything that chance decides. scripts/soak does many of them.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Console as Screen
from rich.table import Table

from testbed.client import REQUEST_TIMEOUT_S, CounterClient, read_counter
from testbed.guarded import console_faults, defects, linux_guest, wait_ready
from testbed.guest import Guest
from testbed.history import History, as_reads, stream_problems, value_problems
from testbed.hosts import Death, Node, TestbedError, TestNetwork
from testbed.pair import Pair
from testbed.speakers import Speakers

Kill = Literal["primary-host", "primary-qemu", "primary-daemon"]
# The death of the host is what all of this is for, so it comes most often.
KILLS: tuple[Kill, ...] = ("primary-host", "primary-host", "primary-qemu", "primary-daemon")
# As in tests/hosts: a busy machine that does not run a daemon for a moment has not lost it.
PATIENT = {"interval_ms": 100, "misses": 12}

# Answers of each kind that have to come after a takeover.
ENOUGH = {"count": 40, "stream": 40, "udp": 20, "ping": 5}
WAIT_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What chance decided: when and how the primary dies, and how long epochs are."""

    seed: int
    kill: Kill
    epoch_ms: int
    moment_s: float  # after the first answers of all clients
    dirty_pages_per_second: int

    @classmethod
    def of(cls, seed: int, kill: Kill | None = None) -> Self:
        chance = random.Random(seed)
        return cls(
            seed,
            epoch_ms=chance.choice([5, 10, 20, 50, 100]),
            moment_s=chance.uniform(0, 2.5),
            dirty_pages_per_second=chance.choice([0, 0, 2000]),
            kill=kill or chance.choice(KILLS),
        )

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Tables of the daemons' configuration."""
        return {"epoch": {"length_ms": self.epoch_ms}}

    async def guest(self) -> Guest:
        """The guest to be protected."""
        return await linux_guest(dirty_pages_per_second=self.dirty_pages_per_second)


class Clients:
    """Clients of every kind, all at once: increments, a numbered stream, datagrams and pings."""

    def __init__(self, node: Node, folder: Path, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self.node = node
        self.count = CounterClient(node, folder / "count", connections=4, timeout_s=timeout_s)
        self.stream = CounterClient(
            node, folder / "stream", probe="stream", interval_s=0.002, timeout_s=timeout_s
        )
        self.udp = CounterClient(node, folder / "udp", probe="udp", interval_s=0.002)
        self.ping = CounterClient(node, folder / "ping", probe="ping", interval_s=0.02)
        self.all = (self.count, self.stream, self.udp, self.ping)

    async def start(self) -> None:
        """Start all, and wait until all have answers."""
        for client in self.all:
            await client.start()
        await self.wait_answers()

    async def wait_answers(self, after_ns: int = 0) -> None:
        """Every kind has enough answers to what was asked after a moment."""
        for client in self.all:
            await client.wait_answers(ENOUGH[client.probe], WAIT_S, after_ns=after_ns)

    async def stop(self) -> None:
        """Let all of them finish what is in flight."""
        await asyncio.gather(*(client.stop() for client in self.all))

    @property
    def counted(self) -> History:
        """Increments, and what datagrams told of the counter: whatever they say has to fit together.

        So an answer to a datagram that knows an increment which the survivor does not shows as well as an
        increment that was lost itself.
        """
        return History((*self.count.history().requests, *as_reads(self.udp.samples())))

    async def problems(self) -> list[str]:
        """What the clients may never see, once all have stopped: lost, repeated, wrong, or broken off."""
        after = await read_counter(self.node)
        return [
            *self.counted.problems(0, after),
            *value_problems(self.udp.samples()),
            *stream_problems(self.stream.samples()),
        ]


@dataclass
class Outcome:
    """One takeover and what came of it."""

    plan: Plan
    death: Death
    takeover: dict[str, Any]  # of the survivor's status
    clients: Clients
    problems: list[str]

    def told(self) -> dict[str, Any]:
        """Numbers of it."""
        history = self.clients.count.history()
        downtime = history.downtime(self.death.began_ns)
        return {
            **asdict(self.plan),
            "trigger": self.takeover["trigger"],
            "takeover_s": self.takeover["total"],
            "client_gap_s": downtime.gap.seconds if downtime else None,
            "increments": len(history.acknowledged),
            "lines": len(self.clients.stream.samples()),
            "datagrams": len(self.clients.udp.samples()),
            "pings": len(self.clients.ping.samples()),
            "problems": self.problems,
        }


def kill(pair: Pair, what: Kill) -> Death:
    """Kill it."""
    match what:
        case "primary-host":
            return pair.kill_primary_host()
        case "primary-qemu":
            return pair.kill_primary_qemu()
        case "primary-daemon":
            return pair.kill_primary_daemon()


async def survive(pair: Pair, plan: Plan) -> Outcome:
    """A guarded guest is asked by all clients, its primary dies, and they go on asking the survivor."""
    await pair.primary.console.wait_for(r"^ftd-guest: ready", WAIT_S)
    clients = Clients(pair.network.client, pair.network.directory)
    await clients.start()
    await asyncio.sleep(plan.moment_s)  # the random moment itself: nothing is waited for
    death = kill(pair, plan.kill)
    status = await pair.backup.wait_takeover()
    try:
        await clients.wait_answers(after_ns=death.ended_ns)
    except TestbedError as error:
        return Outcome(plan, death, status["takeover"], clients, [str(error)])
    await clients.stop()
    problems = await clients.problems() + console_faults(pair.backup.console.text())
    return Outcome(plan, death, status["takeover"], clients, problems)


# ---- many of them -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def protected_pair(
    guest: Guest, qemu: Path, settings: dict[str, dict[str, Any]]
) -> AsyncIterator[Pair]:
    """A pair on hosts of its own whose guest is protected."""
    async with TestNetwork() as network, contextlib.AsyncExitStack() as stack:
        pair = Pair(network, guest, qemu, {"heartbeat": PATIENT, **settings})
        stack.push_async_callback(pair.close)
        await pair.prepare()
        await pair.backup.start()
        await wait_ready(pair.backup)
        await pair.primary.start()
        await pair.wait_protected()
        async with Speakers(network) as speakers:
            yield pair
    if found := speakers.problems():
        raise TestbedError("; ".join(found[:3]))


async def _one(plan: Plan, qemu: Path) -> dict[str, Any]:
    try:
        async with protected_pair(await plan.guest(), qemu, plan.settings) as pair:
            outcome = await survive(pair, plan)
            outcome.problems += defects(pair.primary) + defects(pair.backup)
            return outcome.told()
    except (TestbedError, TimeoutError) as error:
        return {**asdict(plan), "problems": [f"{type(error).__name__}: {error}"]}


COLUMNS = ("seed", "kill", "epoch", "moment", "trigger", "takeover", "gap", "answers", "problems")


def _row(told: dict[str, Any]) -> list[str]:
    if "trigger" not in told:
        return [str(told["seed"]), told["kill"], *["–"] * (len(COLUMNS) - 3), "; ".join(told["problems"])]
    answers = "/".join(str(told[name]) for name in ("increments", "lines", "datagrams", "pings"))
    gap = "–" if told["client_gap_s"] is None else f"{told['client_gap_s']:.2f} s"
    return [
        str(told["seed"]),
        told["kill"],
        f"{told['epoch_ms']} ms",
        f"{told['moment_s']:.3f} s",
        told["trigger"],
        f"{told['takeover_s'] * 1000:.0f} ms",
        gap,
        answers,
        "; ".join(told["problems"]) or "none",
    ]


async def takeovers(options: argparse.Namespace) -> int:
    """Do `options.count` of them and print a table; returns an exit code."""
    progress = Screen(stderr=True, highlight=False)
    rows = []
    began = time.monotonic()
    for number, seed in enumerate(range(options.seed, options.seed + options.count), 1):
        plan = Plan.of(seed, options.kill)
        rows.append(await _one(plan, options.qemu))
        progress.print(
            f"{time.monotonic() - began:6.1f} s  {number}/{options.count}: {', '.join(_row(rows[-1]))}",
            soft_wrap=True,
        )
    failed = sum(bool(row["problems"]) for row in rows)
    if options.json:
        json.dump({"rows": rows, "failed": failed}, sys.stdout, indent=2)
        print()
        return int(failed > 0)
    table = Table(caption="answers: increments / lines of the stream / datagrams / pings")
    for name in COLUMNS:
        table.add_column(name)
    for row in rows:
        table.add_row(*_row(row))
    Screen(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    print(f"{len(rows)} takeovers, {failed} with problems")
    return int(failed > 0)
