"""Long runs: takeovers, schedules of random faults, and hosts whose processors are busy.

    python -m testbed.soak [--count N] [--seed FIRST] [--kill WHAT] [--json]   takeovers (survival.py)
    python -m testbed.soak --hours N [--seed FIRST]                            chaos (chaos.py)
    python -m testbed.soak --schedule SEED [--count N]                         one schedule of it, again
    python -m testbed.soak --busy MINUTES                                      no takeover on busy hosts

Called by scripts/soak, which prepares everything.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console as Screen

from testbed.arbitrated import arbitrated
from testbed.chaos import Chaos, as_text, counted, summary
from testbed.etcd import Etcd
from testbed.faults import Schedule, seeds_of
from testbed.guarded import linux_guest, metric, wait_ready
from testbed.guest import build
from testbed.hosts import TestbedError, TestNetwork
from testbed.pair import Pair
from testbed.speakers import Speakers
from testbed.survival import KILLS, Clients, takeovers

BURN = "while :; do :; done"

_progress = Screen(stderr=True, highlight=False, markup=False, soft_wrap=True)


async def chaos(qemu: Path, seeds: Sequence[int] | None, first: int, hours: float) -> int:
    """Run schedules: those of `seeds`, or from `first` on until the time is over."""
    began = time.monotonic()
    run = Chaos(qemu)
    interrupted = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted.set)
    done = 0
    try:
        while not interrupted.is_set():
            if seeds is not None and done == len(seeds):
                break
            if seeds is None and time.monotonic() - began > hours * 3600:
                break
            seed = seeds[done] if seeds is not None else first + done
            done += 1
            outcome = await run.run(seed)
            told = f"{time.monotonic() - began:7.1f} s  {seed}: {Schedule.of(seed)}: {outcome.what}"
            if outcome.problems:
                told += f"; PROBLEMS: {'; '.join(outcome.problems[:5])}"
                told += f"; evidence: {outcome.kept}; again: {outcome.again}"
            _progress.print(told)
    finally:
        await run.close()
    failed = [outcome for outcome in run.outcomes if outcome.problems]
    rows = [outcome.told() for outcome in run.outcomes]
    # Of thousands, those that failed are what somebody wants to read.
    shown = rows if len(rows) <= 100 else [row for row in rows if row["problems"]]
    print(as_text(summary(shown), counted(rows)))
    print(f"{len(run.outcomes)} schedules in {time.monotonic() - began:.0f} s, {len(failed)} with problems")
    for outcome in failed:
        print(f"again: {outcome.again}; evidence: {outcome.kept}")
    return int(bool(failed))


async def busy(qemu: Path, minutes: float) -> int:
    """A protected Linux guest under clients, at 50 ms x 6, while every processor is kept busy by others."""
    settings = {"heartbeat": {"interval_ms": 50, "misses": 6}}
    processors = os.cpu_count() or 1
    async with (
        TestNetwork(["host-a", "host-b", "arbiter"]) as network,
        Etcd.on(network.hosts["arbiter"], network.directory / "etcd") as etcd,
    ):
        pair = Pair(network, await linux_guest(), qemu, settings | arbitrated(etcd))
        await pair.prepare()
        await pair.backup.start()
        await wait_ready(pair.backup)
        await pair.primary.start()
        await pair.wait_protected()
        await pair.primary.console.wait_for(r"^ftd-guest: ready", 120)
        clients = Clients(network.client, network.directory)
        await clients.start()
        burners = [
            await asyncio.create_subprocess_exec("sh", "-c", BURN, start_new_session=True)
            for _ in range(processors)
        ]
        seen: dict[str, Any] = {"lag": 0.0, "age": 0.0, "states": set()}
        problems: list[str] = []
        began = time.monotonic()
        try:
            async with Speakers(network) as speakers:
                while time.monotonic() - began < minutes * 60 and not problems:
                    await asyncio.sleep(1)
                    for daemon, role in ((pair.primary, "primary"), (pair.backup, "backup")):
                        status = await daemon.status()
                        seen["states"].add(f"{role} {status['state']}")
                        if status["state"] != "protected" or status["role"] != role:
                            problems.append(f"{daemon.host.name} is {status['role']} {status['state']}")
                        seen["lag"] = max(seen["lag"], await metric(daemon, "ftd_loop_lag_seconds"))
                        seen["age"] = max(seen["age"], status["peer"]["heartbeat_age"] or 0.0)
                problems += speakers.problems()
        finally:
            for burner in burners:
                burner.kill()
                await burner.wait()
        took = time.monotonic() - began
        for daemon in (pair.primary, pair.backup):
            status = await daemon.status()
            if status["generation"] != 1:
                problems.append(f"{daemon.host.name} is in generation {status['generation']}, began in 1")
        if not problems:
            await clients.stop()
            problems += await clients.problems()
        increments = len(clients.count.history().acknowledged)
        await pair.close()
    print(f"{took / 60:.1f} minutes, {processors} processors busy, heartbeats 50 ms x 6")
    print(f"oldest heartbeat seen {seen['age'] * 1000:.0f} ms, latest tick seen {seen['lag'] * 1000:.0f} ms")
    print(f"{increments} increments acknowledged; states: {', '.join(sorted(seen['states']))}")
    print("; ".join(problems) if problems else "no takeover, no loss of protection")
    return int(bool(problems))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="soak", description="Long runs of a pair.")
    parser.add_argument("--qemu", type=Path, help="the patched QEMU; default: what scripts/build-qemu built")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--hours", type=float, help="random schedules of faults for so long")
    what.add_argument("--schedule", metavar="SEED", help="one of these, or SEED-SEED, again")
    what.add_argument("--busy", type=float, metavar="MINUTES", help="no takeover while the hosts are busy")
    what.add_argument("--kill", choices=sorted(set(KILLS)), help="of takeovers; default: as the seed decides")
    parser.add_argument("--count", type=int, help="takeovers (default: 30), or of --schedule (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--json", action="store_true", help="of takeovers: JSON instead of the table")
    options = parser.parse_args(arguments)

    async def run() -> int:
        if options.qemu is None:
            options.qemu = await build("scripts/build-qemu") / "bin/qemu-system-x86_64"
        if options.busy is not None:
            return await busy(options.qemu, options.busy)
        if options.schedule is not None:
            return await chaos(options.qemu, seeds_of(options.schedule) * (options.count or 1), 0, 0)
        if options.hours is not None:
            return await chaos(options.qemu, None, options.seed, options.hours)
        options.count = options.count or 30
        return await takeovers(options)

    try:
        return asyncio.run(run())
    except TestbedError as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
