"""`ftd run`: be the daemon."""

# ruff: noqa: PLC0415 - each command imports what it alone needs: `ftd status` is not to wait for numpy and QMP

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from ftd import log
from ftd.cli.commands import Commands
from ftd.errors import FtdError

if TYPE_CHECKING:
    from ftd.config import Config


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    run = commands.add("run", _run, help="be the daemon that a configuration describes")
    run.add_argument("config", metavar="CONFIG", type=Path, help="TOML file")
    run.add_argument("--check", action="store_true", help="check the configuration and do no more")
    run.add_argument("--succeeds", metavar="PROTOCOL", help=argparse.SUPPRESS)


def _run(arguments: argparse.Namespace) -> int:
    from ftd import config as configuration
    from ftd import succession
    from ftd.notify import VARIABLES

    config = configuration.load(arguments.config)
    configuration.check_files(config)
    if arguments.succeeds is not None:
        refusal = succession.refusal_to_succeed(arguments.succeeds)
        if refusal is not None:
            raise FtdError(refusal)
        # It has to be whole. And what it is made of is at hand when the guest's output waits for it.
        from ftd import http, node  # noqa: F401
    if arguments.check:
        print(f"{arguments.config}: good ({config.node.role} {config.node.name})")
        return 0
    log.set_up(debug=arguments.debug)
    gc.disable()  # a tenth of the start would be looking through what modules make, which stays
    supervisor = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    try:
        return asyncio.run(_run_node(config))
    except succession.Succession as ended:
        succession.start(ended, supervisor)


async def _run_node(config: Config) -> int:
    """Run the node; SIGTERM and Ctrl-C cancel it, which is a planned stop and ends with 0.

    The node may replace both by handlers of its own, once it has something to shut down in order.
    """
    from ftd import node, succession

    # Nor later: an acknowledgement that comes meanwhile would wait for it.
    gc.freeze()
    gc.enable()
    task = asyncio.create_task(node.run(config))
    loop = asyncio.get_running_loop()
    asked: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        asked.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    succession.listen_to_signals()
    try:
        return await task
    except asyncio.CancelledError:
        if asked:
            return 0
        raise FtdError(
            "the daemon was cancelled by itself; this is a defect, please report the log"
        ) from None
