"""Structured logs on stderr that read well in the journal.

One event is one line:

    warning backup lost, output held peer=10.0.0.2 generation=7 reason="connection reset"

level, what happened in plain words, then `key=value` fields. Under systemd the line carries the `<N>` prefix
of sd-daemon(3), so that `journalctl -p warning` works, and no time, since the journal has its own; elsewhere
it starts with the time in UTC. A field from a peer, a file or a guest cannot forge a second line: control
characters are escaped.

Keys are spelled the same everywhere, so that a search for one finds everything: `epoch`, `generation`,
`peer`, `state`, `role`, `reason`, `error`, `path`, `seconds`, `bytes`, `pages`, `packets`.

Plain `logging` calls of libraries come out in the same form. A traceback is printed only at debug level;
otherwise an exception is one field that names its type, message and place.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

_FIELDS = "ftd_fields"

# syslog(3) priorities, which sd-daemon(3) prefixes use.
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
_DEBUG_PRIORITY = 7


class Log:
    """A logger whose events have fields: `log.info("epoch committed", epoch=7, bytes=4096)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        """For a developer who follows one run; may be many a second."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Part of the story that an operator reads afterwards."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Protection is weaker than configured, or soon will be."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Somebody has to do something."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, exception: BaseException, **fields: object) -> None:
        """Log a failure of ours, a bug: the line says where, the traceback is there at debug level."""
        self._write(logging.ERROR, event, fields, exception)

    def _write(
        self, level: int, event: str, fields: Mapping[str, object], exception: BaseException | None = None
    ) -> None:
        # Asked first: a debug event a hundred times a second must cost nothing when nobody reads it.
        if self._logger.isEnabledFor(level):
            # stacklevel: the caller of info(), warning(), …
            self._logger.log(
                level, "%s", event, exc_info=exception, extra={_FIELDS: dict(fields)}, stacklevel=3
            )


def get(name: str) -> Log:
    """Return the logger of a module; call it with `__name__`."""
    return Log(name)


def _escape(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def format_value(value: object) -> str:
    """Write one field's value so that it is one word, or one quoted string, on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    if text and text.isprintable() and not any(character in ' "=' for character in text):
        return text
    return '"' + _escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _place(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "unknown"


class Formatter(logging.Formatter):
    """Write a record as one line.

    journal: prefix each line with its priority, leave the time to the journal.
    tracebacks: print them below the line (each line with the prefix, or the journal would take them for
    events of another level).
    """

    def __init__(self, *, journal: bool, tracebacks: bool) -> None:
        super().__init__()
        self._journal = journal
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or several with a traceback."""
        words = [record.levelname.lower(), _escape(record.getMessage())]
        fields: Mapping[str, object] = getattr(record, _FIELDS, {})
        words += [f"{key}={format_value(value)}" for key, value in fields.items()]
        exception = record.exc_info[1] if record.exc_info else None
        if exception is not None:
            summary = f"{type(exception).__name__}: {exception}"
            words += [f"exception={format_value(summary)}", f"at={_place(exception.__traceback__)}"]
        lines = [" ".join(words)]
        if exception is not None and self._tracebacks:
            lines += [_escape(line) for line in self._traceback(exception)]
        prefix = self._prefix(record)
        return "\n".join(prefix + line for line in lines)

    @staticmethod
    def _traceback(exception: BaseException) -> list[str]:
        return "".join(traceback.format_exception(exception)).splitlines()

    def _prefix(self, record: logging.LogRecord) -> str:
        if self._journal:
            for level, priority in _PRIORITIES:
                if record.levelno >= level:
                    return f"<{priority}>"
            return f"<{_DEBUG_PRIORITY}>"
        return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ ")


def goes_to_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Say whether the stream is the journal's.

    JOURNAL_STREAM is inherited by every process below the unit, so it must also name this very stream (device
    and inode): a daemon started by hand from a unit's shell with stderr on a terminal wants no prefixes.
    """
    named = environment.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def set_up(*, debug: bool = False, stream: TextIO | None = None) -> None:
    """Send all logging of the process to the stream (default: stderr). Calling it again replaces the
    first."""
    stream = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Formatter(journal=goes_to_journal(stream, os.environ), tracebacks=debug))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    # Libraries tell at info and debug what only their authors want to know: one line for each QMP message.
    for library in ("aiohttp", "asyncio", "qemu"):
        logging.getLogger(library).setLevel(logging.INFO if debug else logging.WARNING)
    logging.captureWarnings(True)
    # A log that cannot be written (pipe closed, disk full) must not print a traceback into what is left of
    # it.
    logging.raiseExceptions = debug
