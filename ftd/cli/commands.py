"""What a module of commands adds its own to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ftd.cli.arguments import asking, common

Command = Callable[[argparse.Namespace], int]


class Commands:
    """The commands of a parser. Each has what all have; some ask a daemon."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._added = parser.add_subparsers(required=True, metavar="COMMAND")
        self._common, self._asking = common(), asking()

    def add(
        self, name: str, command: Command, *, asks: bool = False, **words: Any
    ) -> argparse.ArgumentParser:
        """Add one, and return its parser. asks: a daemon; words: help and description."""
        parents = [self._common, self._asking] if asks else [self._common]
        added = self._added.add_parser(name, parents=parents, **words)
        added.set_defaults(command=command)
        return added
