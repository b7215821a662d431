"""The entry: from words to a command, and from its error to text and exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ftd.cli import explaining, operating, running, showing, versions
from ftd.cli.arguments import common
from ftd.cli.commands import Commands
from ftd.errors import FtdError, friendly

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM
_BROKEN_PIPE = 128 + signal.SIGPIPE


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    made = argparse.ArgumentParser(
        prog="ftd",
        description="Keeps a QEMU virtual machine alive through the death of its host.",
        parents=[common()],
    )
    commands = Commands(made)
    for module in (running, showing, operating, explaining, versions):
        module.add(commands)
    return made


class _Terminated(BaseException):
    """SIGTERM; not an Exception, so that nothing on the way takes it for an error."""


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _complain(text: str) -> None:
    # After "ftd: error:", one line for each thing to correct; control characters cannot forge another.
    with contextlib.suppress(OSError):
        for line in text.splitlines():
            print(f"ftd: error: {line}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; the only place where errors become text and number."""
    arguments = parser().parse_args(argv, argparse.Namespace())
    arguments.debug = getattr(arguments, "debug", False)
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except _Terminated:
        return _TERMINATED
    except BrokenPipeError:
        # Whoever read the output has enough (`ftd status | head -1`). Python would complain once more at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except FtdError as error:
        if arguments.debug:
            raise
        _complain(str(error))
        return error.exit_code
    except Exception as error:
        if arguments.debug:
            raise
        _complain(f"{friendly(error)} (a defect of ftd or something unforeseen: --debug tells where)")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
