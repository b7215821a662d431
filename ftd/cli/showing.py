"""`ftd status`: how a daemon and its guest are, for people and as JSON."""

# ruff: noqa: PLC0415 - each command imports what it alone needs: `ftd status` is not to wait for numpy and QMP

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ftd.cli.arguments import positive
from ftd.cli.asking import ask, url_of
from ftd.cli.commands import Commands
from ftd.cli.words import bytes_text, seconds_text
from ftd.errors import FtdError
from ftd.status import Status

if TYPE_CHECKING:
    from rich.console import RenderableType


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    status = commands.add("status", _status, asks=True, help="show how a daemon and its guest are")
    status.add_argument(
        "--watch",
        metavar="SECONDS",
        type=positive,
        nargs="?",
        const=1.0,
        help="show it again and again (default: every second) until Ctrl-C; "
        "write CONFIG before this option, or a number after it",
    )
    status.add_argument(
        "--timeout", metavar="SECONDS", type=positive, default=5.0, help="wait this long (default: 5)"
    )


def _status(arguments: argparse.Namespace) -> int:
    url = url_of(arguments)

    def read() -> Status:
        return ask(Status, url, "/status", timeout=arguments.timeout)

    if arguments.watch is not None:
        return _watch(read, arguments)
    _print_status(read(), arguments)
    return 0


def _print_status(status: Status, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(status.model_dump_json(), flush=True)
        return
    from rich.console import Console

    Console(highlight=False).print(_status_table(status))


def _watch(read: Callable[[], Status], arguments: argparse.Namespace) -> int:
    """Redraw until interrupted. A daemon that stops answering is shown as that: it may come back."""
    if arguments.json:
        while True:
            _print_status(read(), arguments)
            time.sleep(arguments.watch)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    first: RenderableType = _status_table(read())
    with Live(first, console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            time.sleep(arguments.watch)
            try:
                shown: RenderableType = _status_table(read())
            except FtdError as error:
                shown = Text(str(error), style="red")
            live.update(shown, refresh=True)


_COLOURS = {
    "protected": "bold green",
    "syncing": "bold yellow",
    "waiting": "bold yellow",
    "taken-over": "bold yellow",
    "solo": "bold red",
    "held": "bold red",
    "stopped": "bold red",
}


def _status_table(status: Status) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    # Text, not markup: a peer's words may hold brackets.
    table.add_column(overflow="fold")
    for name, value in _status_lines(status):
        style = {"state": _COLOURS.get(status.state.value, ""), "warning": "red"}.get(name, "")
        table.add_row(name, Text(value, style=style))
    return table


def _status_lines(status: Status) -> Iterator[tuple[str, str]]:
    epoch, pause, output = status.epoch, status.pause, status.output
    yield "node", f"{status.node}, {status.role}, ftd {status.version}, up {seconds_text(status.uptime)}"
    why = f" ({status.reason})" if status.reason else ""
    yield "state", f"{status.state} for {seconds_text(status.state_seconds)}{why}"
    yield "generation", str(status.generation)
    if status.state.value == "syncing":
        yield "copy", f"{status.sync.progress:.0%}, round {status.sync.rounds}"
    elif status.sync.seconds is not None:
        yield "copy", f"took {seconds_text(status.sync.seconds)}"
    if status.resumption.count:
        times, held = status.resumption.count, status.resumption.held
        waited = f", output waited {seconds_text(held)}" if held is not None else ""
        yield "restarted", f"{times} × without a copy, last in epoch {status.resumption.epoch}{waited}"
    if status.sync.disk_bytes:
        sync = status.sync
        yield (
            "copy of disks",
            f"{sync.disk_bytes_compared / sync.disk_bytes:.0%} of {bytes_text(sync.disk_bytes)} compared, "
            f"{bytes_text(sync.disk_bytes_sent)} sent",
        )
    yield "epoch", f"{epoch.current} running, {epoch.committed} committed, {epoch.aborted} aborted"
    stretched = f", stretched {epoch.stretch:.1f} ×" if epoch.stretch > 1.01 else ""
    chosen = f", aims at {seconds_text(epoch.target)}, decided by {epoch.decided_by}"
    yield "epoch length", f"{seconds_text(epoch.length)}{stretched}{chosen if epoch.mode == 'auto' else ''}"
    if epoch.slowdown is not None and epoch.added_latency is not None:
        latency = seconds_text(epoch.added_latency)
        yield "cost", f"guest paused {epoch.slowdown:.1%} of its time, output waits up to {latency}"
    if pause.p50 is not None and pause.p99 is not None:
        yield "pause", f"p50 {seconds_text(pause.p50)}, p99 {seconds_text(pause.p99)} (last {pause.count})"
    several = f" in {epoch.in_flight} frames" if epoch.in_flight else ""
    yield "in flight", f"{bytes_text(status.in_flight_bytes)}{several}"
    early = status.speculation
    if early.mode != "off":
        again = f", {early.pages_again / early.pages:.0%} of the pages in vain" if early.pages else ""
        doing = "in each epoch" if early.active else "only on trial"
        yield "sent early", f"{doing}, {early.rounds} rounds so far{again}"
    if output.holding:
        yield "output held", f"{output.held_packets} packets, {bytes_text(output.held_bytes)}"
    if status.peer is not None:
        age = status.peer.heartbeat_age
        heard = f", heard {seconds_text(age)} ago" if age is not None else ""
        yield "peer", f"{status.peer.address}{heard if status.peer.connected else ', not connected'}"
        for path in status.peer.paths if len(status.peer.paths) > 1 else ():
            yield f"path {path.name}", f"{path.address}, {'up' if path.up else f'DOWN: {path.detail}'}"
    qemu = status.qemu
    if qemu.pid is not None:
        doing = "running" if qemu.running else "not running"
        words = [qemu.version, qemu.accelerator, qemu.tracker, f"pid {qemu.pid}", f"guest {doing}"]
        yield "QEMU", ", ".join(word for word in words if word)
    if status.last_verify is not None:
        verify = status.last_verify
        result = f"{verify.differing} pages DIFFER" if verify.differing else "equal"
        yield "verified", f"{result} after epoch {verify.epoch}"
        if verify.disk_blocks:
            result = f"{verify.disk_differing} blocks DIFFER" if verify.disk_differing else "equal"
            yield "verified disks", f"{result}, {verify.disk_blocks} compared up to epoch {verify.disk_epoch}"
    if status.takeover is not None:
        takeover = status.takeover
        parts = (
            f"detection {seconds_text(takeover.detection)}, activation {seconds_text(takeover.activation)}"
        )
        yield "takeover", f"{takeover.at}, {takeover.trigger}, from epoch {takeover.epoch}: {parts}"
    for warning in status.warnings:
        yield "warning", warning
