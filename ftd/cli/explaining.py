"""`ftd why`: what both nodes saw and decided."""

# ruff: noqa: PLC0415 - each command imports what it alone needs: `ftd status` is not to wait for numpy and QMP

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ftd.cli.asking import ask, url_of
from ftd.cli.commands import Commands
from ftd.errors import FtdError
from ftd.status import PeerFlight

# The peer has 5 s to send its record.
_FLIGHT_PATIENCE = 10.0


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    why = commands.add(
        "why",
        _why,
        help="show what both nodes saw and decided, and explain the last takeover, or why there was none",
        description="Reads flight.jsonl in the node's state_dir, and has the daemon fetch the newest lines "
        "of the other node's over the link. Where that is not possible, as a daemon or the link is down, "
        "it says so and explains with what there is; --peer takes a copy of the other node's file instead. "
        "Times are UTC, of each node's own clock.",
    )
    why.add_argument("config", metavar="CONFIG", type=Path, help="TOML file of this node")
    why.add_argument(
        "--peer",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="flight.jsonl of the other node, instead of asking it",
    )
    why.set_defaults(url=None)
    why.add_argument("--last", metavar="N", type=int, default=40, help="show so many lines (default: 40)")
    why.add_argument("--json", action="store_true", help="print JSON, one object a line")


def _why(arguments: argparse.Namespace) -> int:
    from ftd import config as configuration
    from ftd import explanation, flight

    state = configuration.load(arguments.config).node.state_folder
    flights = [flight.read(state / "flight.jsonl"), *map(flight.read, arguments.peer)]
    without = ""
    if not arguments.peer:
        try:
            fetched = ask(PeerFlight, url_of(arguments), "/peer-flight", timeout=_FLIGHT_PATIENCE)
            flights.append(flight.parse(fetched.lines.encode()))
        except FtdError as error:
            without = f"ftd: without the other node's record: {error}"
    entries = flight.merge(flights)
    if without:
        print(without, file=sys.stderr, flush=True)
    if arguments.json:
        for entry in entries[-arguments.last :]:
            print(json.dumps({"at": entry.at, "node": entry.node, "what": entry.what, **entry.fields}))
        return 0
    for entry in entries[-arguments.last :]:
        at = time.strftime("%H:%M:%S", time.gmtime(entry.at)) + f".{int(entry.at % 1 * 1000):03d}"
        print(f"{at}  {entry.node:12}  {entry}")
    print()
    print(explanation.explain(entries))
    return 0
