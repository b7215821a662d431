"""The demo: a guest survives the death of its host. Called by scripts/demo, which prepares everything."""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
from rich.console import Console as Screen
from rich.table import Table

from testbed.client import CounterClient, read_counter
from testbed.guest import Guest, Rounds, build, choose
from testbed.history import Downtime, Gap, History, Request
from testbed.hosts import GUEST_ADDRESS, Death, TestbedError, TestNetwork, remove_kept
from testbed.pair import Pair

RUN_S = 5.0  # of epochs, once protected
AFTER_S = 2.0  # of counting on the other host

KILLS = {
    "primary-host": "everything on the primary's host dies and its links go down",
    "primary-qemu": "QEMU on the primary dies",
    "primary-daemon": "ftd on the primary dies",
}

screen = Screen(stderr=True, highlight=False)
started = time.monotonic()
# asyncio kills a child process whose last reference goes away; what is to stay is held here to the end.
_kept: list[Pair] = []


def say(text: str) -> None:
    screen.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  {text}")


@dataclass
class Observed:
    """What a counter's watcher saw: the history, and the counter before the kill and at the end."""

    history: History
    before: int
    after: int


def rounds_as_history(*consoles: Rounds) -> History:
    """A console's rounds as answers, so that gaps are measured in the same way."""
    seen = sorted(entry for rounds in consoles for entry in rounds.seen)
    return History(tuple(Request("read", 0, 1, when, when, value) for when, value in seen))


async def poll(pair: Pair, last: dict[str, Any]) -> None:
    """Keep the primary's latest status: after the kill nobody can be asked."""
    while True:
        with contextlib.suppress(OSError, TimeoutError, aiohttp.ClientError):
            last["status"] = await pair.primary.status()
        await asyncio.sleep(0.1)


async def observe_http(pair: Pair, kill: Any) -> tuple[Observed, Death]:
    client = CounterClient(
        pair.network.client, pair.network.directory / "history", reconnect=True, timeout_s=10
    )
    await client.start()
    await client.wait_answers(10, 30)
    say(f"the client counts; the pair runs for {RUN_S:g} s")
    await asyncio.sleep(RUN_S)
    death: Death = kill()
    await pair.backup.wait_takeover()
    say("the backup has taken over; the client counts on")
    await client.wait_answers(20, 60, after_ns=death.ended_ns)
    await asyncio.sleep(AFTER_S)
    await client.stop()
    history = client.history()
    told = [each.value for each in history.acknowledged if each.end_ns <= death.began_ns]
    after = await read_counter(pair.network.client)
    return Observed(history, max((value for value in told if value is not None), default=0), after), death


async def observe_console(pair: Pair, kill: Any) -> tuple[Observed, Death]:
    primary, backup = Rounds(pair.primary.console), Rounds(pair.backup.console)
    tasks = [asyncio.create_task(each.record()) for each in (primary, backup)]
    try:
        say(f"rounds are read from the console; the pair runs for {RUN_S:g} s")
        await asyncio.sleep(RUN_S)
        death: Death = kill()
        await pair.backup.wait_takeover()
        say("the backup has taken over; its guest's console is read")
        deadline = time.monotonic() + 60
        while len(backup.seen) < 10:
            if time.monotonic() > deadline:
                raise TestbedError("the guest prints no rounds after the takeover")
            await asyncio.sleep(0.05)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    before = primary.seen[-1][1] if primary.seen else 0
    return Observed(rounds_as_history(primary, backup), before, backup.seen[-1][1]), death


def not_covered(guest: Guest, kill: str, holding: bool) -> list[str]:
    """What the numbers do not show, honestly."""
    lines = []
    if not holding and guest.kind != "bare":
        lines.append("network output was not held back: a client may have seen what the survivor never did")
    if guest.kind == "bare":
        lines.append(
            "rounds on a console are not output-committed: some may show twice; nothing goes over a network"
        )
    if guest.accelerator == "tcg":
        lines.append("the guest runs under TCG: pauses of a KVM guest differ, and its dirty ring is not used")
    lines.append(
        "both hosts are namespaces of one machine: the link has no latency, and they share processors"
    )
    if kill == "primary-daemon":
        lines.append(
            "the primary's QEMU outlived its daemon: its guest runs on unheard, since its output stays held"
        )
    lines.append("no arbiter (kind none): a cut link would make two primaries")
    lines.append("no disk is protected")
    return lines


def result(
    guest: Guest,
    kill: str,
    sync_s: float | None,
    last: dict[str, Any],
    status: dict[str, Any],
    seen: Observed,
    death: Death,
) -> dict[str, Any]:
    """The JSON object; the table is made from it."""
    final = last.get("status", {})
    takeover = status.get("takeover") or {}
    pause = final.get("pause") or {}
    downtime: Downtime | None = seen.history.downtime(death.began_ns)
    console = guest.kind == "bare"
    # A console acknowledges nothing to anybody: missing is what the survivor's count falls short of.
    lost = max(seen.before - seen.after, 0) if console else seen.history.lost(after=seen.after)
    problems = [] if console else seen.history.problems(after=seen.after)[:5]
    holding = bool((final.get("output") or {}).get("holding"))
    gap: Gap | None = downtime.gap if downtime else None
    return {
        "guest": guest.kind,
        "accel": guest.accelerator,
        "accel_reason": guest.reason,
        "kill": kill,
        "first_sync_s": (final.get("sync") or {}).get("seconds") or sync_s,
        "epochs_committed": (final.get("epoch") or {}).get("committed"),
        "pause_p50_s": pause.get("p50"),
        "pause_p99_s": pause.get("p99"),
        "pause_parts_p50_s": pause.get("parts_p50", {}),
        "pause_parts_p99_s": pause.get("parts_p99", {}),
        "detection_s": takeover.get("detection"),
        "activation_s": takeover.get("activation"),
        "total_s": takeover.get("total"),
        "takeover_epoch": takeover.get("epoch"),
        "takeover_trigger": takeover.get("trigger"),
        "client_downtime_s": downtime.seconds if downtime else None,
        "client_longest_gap_s": gap.seconds if gap else None,
        "client_resets": len(seen.history.resets),
        "counter_source": "console" if console else "http",
        "counter_before": seen.before,
        "counter_after": seen.after,
        "lost": lost,
        "output_commit": holding,
        "problems": problems,
        "not_covered": not_covered(guest, kill, holding),
    }


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value * 1e3:.2f} ms"


def show(found: dict[str, Any], out: Screen) -> None:
    """The table for people."""
    table = Table(title="A guest and the death of its host", title_justify="left", show_header=False)
    guest = f"{'Linux' if found['guest'] == 'linux' else 'bare metal'} under {found['accel'].upper()}"
    table.add_row("guest", f"{guest}: {found['accel_reason']}")
    table.add_row("killed", KILLS[found["kill"]])
    sync = found["first_sync_s"]
    table.add_row("first sync", "–" if sync is None else f"{sync:.2f} s")
    table.add_row("epochs committed", str(found["epochs_committed"]))
    table.add_row(
        "pause p50 / p99", f"{milliseconds(found['pause_p50_s'])} / {milliseconds(found['pause_p99_s'])}"
    )
    for part, p50 in found["pause_parts_p50_s"].items():
        if p99 := found["pause_parts_p99_s"][part]:
            table.add_row(f"    {part}", f"{milliseconds(p50)} / {milliseconds(p99)}")
    table.add_row("detection", milliseconds(found["detection_s"]))
    table.add_row("activation", milliseconds(found["activation_s"]))
    table.add_row("downtime as the client saw it", milliseconds(found["client_downtime_s"]))
    table.add_row("counter before / after", f"{found['counter_before']} / {found['counter_after']}")
    table.add_row("lost", str(found["lost"]))
    out.print(table)
    if found["problems"]:
        out.print("What no client should see:")
        for line in found["problems"]:
            out.print(f"  - {line}")
    out.print("Not covered by these numbers:")
    for line in found["not_covered"]:
        out.print(f"  - {line}")


def look_around(pair: Pair, out: Screen) -> None:
    """What --keep leaves, and how to see it."""
    network, b = pair.network, pair.b
    out.print(f"\nAll of it is left running, under the name {network.prefix}:")
    out.print(f"  ip netns exec {b.namespace} {sys.executable} -m ftd status --watch")
    out.print(f"  ip netns exec {network.client.namespace} curl http://{GUEST_ADDRESS}/increment")
    out.print(f"  ls {network.directory}    # configurations, logs, consoles")
    out.print("  scripts/demo --clean      # removes it")


async def demo(options: argparse.Namespace) -> dict[str, Any]:
    qemu_folder = await build("scripts/build-qemu")
    extra = {"area": "4096", "pages": "512"} if options.accel == "kvm" else {}
    guest = await choose(options.accel)
    if guest.kind == "bare":
        guest.options = extra
    say(f"guest: {guest.kind} under {guest.accelerator}: {guest.reason}")
    with TestNetwork(keep=options.keep) as network:
        pair = Pair(network, guest, qemu_folder / "bin" / "qemu-system-x86_64")
        say(f"two hosts and a client are made ({network.prefix}); starting the daemons")
        try:
            return await with_pair(pair, guest, options)
        except BaseException:
            network.keep = False
            raise
        finally:
            await pair.close()


async def with_pair(pair: Pair, guest: Guest, options: argparse.Namespace) -> dict[str, Any]:
    await pair.start()
    begun = time.monotonic()
    await pair.wait_protected(90)
    sync_s = time.monotonic() - begun
    say("the pair is protected")
    if guest.kind == "linux":
        await read_counter(pair.network.client, timeout_s=60)
        say("the guest answers")
    last: dict[str, Any] = {}
    poller = asyncio.create_task(poll(pair, last))
    kills = {
        "primary-host": pair.kill_primary_host,
        "primary-qemu": pair.kill_primary_qemu,
        "primary-daemon": pair.kill_primary_daemon,
    }

    def kill() -> Death:
        poller.cancel()
        told = last.get("status", {})
        if told.get("state") != "protected":
            # Killing it now would show something else than what this is about.
            raise TestbedError(
                f"the guest is not protected any more, before anything was killed: {told.get('reason')}"
            )
        say(f"[bold]now {KILLS[options.kill]}[/bold]")
        return kills[options.kill]()

    try:
        observe = observe_http if guest.kind == "linux" else observe_console
        seen, death = await observe(pair, kill)
    finally:
        poller.cancel()
    status = await pair.backup.status()
    found = result(guest, options.kill, sync_s, last, status, seen, death)
    if options.keep:
        _kept.append(pair)
        look_around(pair, screen)
    return found


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """demo(), ended by SIGTERM in the same way as by Ctrl-C: everything is removed."""
    task = asyncio.ensure_future(demo(options))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="A guest survives the death of its host."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--kill", choices=list(KILLS), default="primary-host", help="what dies")
    parser.add_argument("--accel", choices=("auto", "tcg", "kvm"), default="auto")
    parser.add_argument("--keep", action="store_true", help="leave it running, and say how to look around")
    parser.add_argument("--clean", action="store_true", help="remove what --keep left, and do no more")
    options = parser.parse_args()
    try:
        if options.clean:
            print("\n".join(f"removed {prefix}" for prefix in remove_kept()) or "nothing was kept")
            return 0
        found = asyncio.run(run(options))
    except (TestbedError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("demo: interrupted; everything is removed", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(found))
    else:
        show(found, Screen(highlight=False))
    status = 1 if found["problems"] or (found["lost"] and found["counter_source"] == "http") else 0
    if _kept:
        sys.stdout.flush()
        os._exit(status)  # without the clean-up of Python, which would end the daemons
    return status


if __name__ == "__main__":
    sys.exit(main())
