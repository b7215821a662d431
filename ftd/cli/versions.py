"""`ftd version`: that of ftd, and of what it stands on."""

# ruff: noqa: PLC0415 - each command imports what it alone needs: `ftd status` is not to wait for numpy and QMP

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
from pathlib import Path

from ftd import __version__
from ftd.cli.commands import Commands
from ftd.errors import FtdError, friendly


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    version = commands.add("version", _version, help="show the versions of ftd, Python and QEMU")
    version.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="with the QEMU of this TOML file"
    )


def _version(arguments: argparse.Namespace) -> int:
    print(f"ftd {__version__}")
    print(f"Python {platform.python_version()} ({sys.executable})")
    print(f"QEMU {_qemu_found(arguments.config)}")
    return 0


def _qemu_found(config: Path | None) -> str:
    """Describe the QEMU of a configuration, or the one that `ftd run` starts when none is named."""
    import subprocess

    from ftd import config as configuration
    from ftd import qemu

    named = configuration.load(config).machine.qemu if config is not None else None
    try:
        path = asyncio.run(qemu.find_qemu(named))
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (FtdError, OSError, subprocess.SubprocessError) as error:
        return f"not found: {friendly(error)}"
    first = (answer.stdout.splitlines() or ["of an unknown version"])[0]
    return f"{first.removeprefix('QEMU emulator version ')} at {path}"
