"""Log lines: one event, one line, readable in the journal."""

import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftd import log


@pytest.fixture(autouse=True)
def root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    logging.raiseExceptions = True


def written(*, journal: bool = False, debug: bool = False) -> tuple[log.Log, io.StringIO]:
    stream = io.StringIO()
    log.set_up(debug=debug, stream=stream)
    handler = logging.getLogger().handlers[0]
    handler.setFormatter(log.Formatter(journal=journal, tracebacks=debug))
    return log.get("ftd.test"), stream


def test_a_line_on_a_terminal_has_time_level_event_and_fields() -> None:
    events, stream = written()
    events.warning("backup lost", peer="10.0.0.2", generation=7, reason="connection reset", seconds=0.1234567)
    time, line = stream.getvalue().split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time)
    assert line == (
        'warning backup lost peer=10.0.0.2 generation=7 reason="connection reset" seconds=0.123457\n'
    )


@pytest.mark.parametrize(("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)])
def test_a_line_in_the_journal_has_its_priority_and_no_time(level: str, priority: int) -> None:
    events, stream = written(journal=True, debug=True)
    getattr(events, level)("event", epoch=1)
    assert stream.getvalue() == f"<{priority}>{level} event epoch=1\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (True, "yes"),
        (None, "None"),
        (0.05, "0.05"),
        ("", '""'),
        ("two words", '"two words"'),
        ('say "x"', '"say \\"x\\""'),
        ("a=b", '"a=b"'),
        ("back\\slash", "back\\slash"),
        ("line\nbreak", '"line\\nbreak"'),
        ("\x1b[31mred", '"\\x1b[31mred"'),
        (Path("/run/ftd"), "/run/ftd"),
    ],
)
def test_values(value: object, text: str) -> None:
    assert log.format_value(value) == text


def test_a_peer_cannot_forge_a_line() -> None:
    events, stream = written(journal=True)
    events.info("peer said\n<2>critical all is lost", reason="x\n<2>critical all is lost\r\x1b[2J")
    logging.getLogger("library").warning("got %s", "a\nb")
    assert len(stream.getvalue().splitlines()) == 2
    assert "\x1b" not in stream.getvalue()


def test_libraries_come_out_in_the_same_form() -> None:
    _, stream = written(journal=True)
    logging.getLogger("asyncio").warning("task took %d s", 2)
    logging.getLogger("asyncio").info("not worth a line")
    assert stream.getvalue() == "<4>warning task took 2 s\n"


def test_an_exception_is_one_line_unless_debugging() -> None:
    for debug in (False, True):
        events, stream = written(journal=True, debug=debug)
        try:
            raise ValueError("broken\nthing")
        except ValueError as exception:
            events.exception("loop ended", exception, epoch=4)
        lines = stream.getvalue().splitlines()
        assert re.fullmatch(
            r'<3>error loop ended epoch=4 exception="ValueError: broken\\nthing" at=test_log\.py:\d+',
            lines[0],
        )
        if debug:
            assert all(line.startswith("<3>") for line in lines)
            assert "Traceback" in lines[1]
        else:
            assert len(lines) == 1


def test_debug_is_silent_by_default() -> None:
    events, stream = written()
    events.debug("frame sent")
    assert stream.getvalue() == ""


def test_setting_up_twice_does_not_double_lines() -> None:
    log.set_up(stream=io.StringIO())
    events, stream = written(journal=True)
    events.info("once")
    assert stream.getvalue() == "<6>info once\n"


def test_the_journal_is_recognised_by_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        status = os.fstat(stream.fileno())
        assert log.goes_to_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        assert not log.goes_to_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
        assert not log.goes_to_journal(stream, {})
    assert not log.goes_to_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})
