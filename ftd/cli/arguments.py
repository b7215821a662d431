"""Kinds of arguments, and options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import urlsplit

from ftd.cli.asking import DEFAULT_URL
from ftd.config.fields import a_host


def positive(text: str) -> float:
    """Return a time in seconds. Raises ValueError, as all of these, for argparse."""
    value = float(text)
    if not 0 < value <= 3600:
        raise ValueError(text)
    return value


positive.__name__ = "number of seconds (above 0, at most 3600)"  # argparse puts this into its message


def host_and_port(text: str) -> tuple[str, int | None]:
    """Return an address and its port, None if none is given."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not text.startswith("[")):
        host, port = text, ""
    host = host.strip("[]")
    if colon and port and not 1 <= int(port) <= 65535:
        raise ValueError(text)
    return a_host(host), int(port) if port else None


host_and_port.__name__ = "address (such as 10.0.0.3 or 10.0.0.3:7788)"


def checked_url(text: str) -> str:
    """Return where a daemon listens."""
    parts = urlsplit(text)
    parts.port  # noqa: B018 - raises ValueError when it is none
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() for c in text):
        raise ValueError(text)
    return text


checked_url.__name__ = "URL (such as http://127.0.0.1:9105)"


def common() -> argparse.ArgumentParser:
    """Return what every command has."""
    # SUPPRESS: --debug may stand before or after the command, and must not be reset by the one that has none.
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="more in the log, and tracebacks"
    )
    return options


def asking() -> argparse.ArgumentParser:
    """Return what commands have that ask a daemon."""
    options = argparse.ArgumentParser(add_help=False)
    where = options.add_mutually_exclusive_group()
    where.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="ask the daemon with this TOML file"
    )
    where.add_argument("--url", type=checked_url, help=f"ask the daemon there (default: {DEFAULT_URL})")
    options.add_argument("--json", action="store_true", help="print JSON")
    return options
