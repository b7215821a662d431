"""The command line as an operator meets it: programs run, their output and their exit codes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from unit import sample
from unit.fake_node import PROTECTED, FakeNode, serving

from ftd import __version__, cli
from ftd.cli import versions
from ftd.cli.words import bytes_text, seconds_text
from ftd.errors import FtdError
from ftd.state import PairState
from ftd.status import (
    Difference,
    DiskDifference,
    Done,
    PathStatus,
    PeerFlight,
    PeerStatus,
    ResumptionStatus,
    Status,
    VerifyReport,
)

REPOSITORY = Path(__file__).parents[2]

COMPLETE = """
[node]
name = "alpha"
role = "primary"
[link]
listen = "127.0.0.1"
peer = "127.0.0.1"
insecure = true
[arbiter]
kind = "none"
accept_split_brain = true
[http]
listen = "{listen}"
port = {port}
"""


def environment(**changes: str) -> dict[str, str]:
    # A proxy, as on many hosts of operators: it must not be asked for a daemon.
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "http_proxy": "http://127.0.0.1:1", **changes}


def ftd(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ftd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment(**changes),
    )


def one_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The complaint of a command that failed as it should: one line, nothing else, this exit code."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("ftd: error: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr.removeprefix("ftd: error: ").rstrip()


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def url(node: FakeNode) -> Iterator[str]:
    with serving(node) as url:
        yield url


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port that is taken, and on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def config(folder: Path, *, listen: str = "127.0.0.1", port: int = 9105) -> Path:
    path = folder / "alpha.toml"
    path.write_text(COMPLETE.format(listen=listen, port=port))
    return path


# ---- status ----------------------------------------------------------------------------------------------


def test_status_for_people(url: str) -> None:
    result = ftd("status", "--url", url, COLUMNS="160")
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "alpha, primary, ftd 1.2.3, up 62 min",
        "protected for 12.5 s (first epoch committed)",
        "42 running, 41 committed, 0 aborted",
        "50 ms, stretched 2.5 ×",
        "p50 800 µs, p99 2.1 ms (last 1000)",
        "3 MiB",
        "3 packets, 2 KiB",
        "10.0.0.2, heard 12 ms ago",
        "10.0.13, kvm, generic, pid 4711, guest running",
        "equal after epoch 40",
        "2026-01-02T03:04:05Z, silence, from epoch 9: detection 300 ms, activation 20 ms",
        "no arbiter [red]really[/red]",
    ):
        assert words in result.stdout
    assert "\x1b" not in result.stdout, "no colours where nobody sees them"


def test_status_as_json(url: str) -> None:
    result = ftd("status", "--url", url + "/", "--json")
    assert result.returncode == 0
    assert Status.model_validate_json(result.stdout) == PROTECTED


def test_status_of_a_configuration(node: FakeNode, tmp_path: Path) -> None:
    with serving(node) as url:
        path = config(tmp_path, listen="0.0.0.0", port=int(url.rsplit(":", 1)[1]))
        result = ftd("status", path, "--json")
    assert json.loads(result.stdout)["node"] == "alpha"


def test_no_daemon(nobody: int) -> None:
    line = one_line(ftd("status", "--url", f"http://127.0.0.1:{nobody}"), 3)
    assert line == (
        f"no answer from http://127.0.0.1:{nobody}: connection refused; is `ftd run` running there?"
    )


def test_a_daemon_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        line = one_line(ftd("status", "--url", url, "--timeout", "0.3"), 3)
    assert "timed out" in line


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", 3, "no sensible answer from"),
        (b"", 3, "no sensible answer from"),
        (b"HTTP/1.0 200 OK\r\n\r\n<html>", 1, "answered with something else"),
        (b"HTTP/1.0 404 Not Found\r\n\r\n<html>", 1, "answered with HTTP status 404"),
    ],
)
def test_something_else_on_the_port(answer: bytes, code: int, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        line = one_line(ftd("status", "--url", f"http://127.0.0.1:{other.getsockname()[1]}"), code)
        thread.join(10)
    assert words in line


@pytest.mark.parametrize("what", ["status", "verify"])
def test_a_configuration_that_is_not_there(what: str, tmp_path: Path) -> None:
    assert "missing.toml" in one_line(ftd(what, tmp_path / "missing.toml"), 2)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_watching_ends_cleanly(url: str, how: signal.Signals) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "ftd", "status", "--json", "--watch", "0.05", "--url", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert program.stdout is not None
    first, second = program.stdout.readline(), program.stdout.readline()
    assert json.loads(first)["node"] == json.loads(second)["node"] == "alpha"
    program.send_signal(how)
    _, complaints = program.communicate(timeout=10)
    assert program.returncode == 128 + how
    assert complaints == ""


def test_a_reader_that_has_enough(url: str) -> None:
    command = f"{sys.executable} -m ftd status --json --watch 0.02 --url {url} | head -1"
    result = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env=environment(),
    )
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "141"


def test_watching_for_people_shows_a_daemon_that_went_away(nobody: int) -> None:
    # not reachable from the start: an error, not an empty screen
    one_line(ftd("status", "--watch", "--url", f"http://127.0.0.1:{nobody}"), 3)


# ---- verify ----------------------------------------------------------------------------------------------


def test_verify_equal(url: str) -> None:
    result = ftd("verify", "--url", url)
    assert (result.returncode, result.stdout) == (0, "equal: 65536 pages compared after epoch 42\n")


def test_verify_different(node: FakeNode, url: str) -> None:
    node.verification = VerifyReport(
        epoch=43, ok=False, pages=100, differing=3, differences=[Difference(block="ftd-ram", page=5)]
    )
    result = ftd("verify", "--url", url)
    assert result.returncode == 1
    assert result.stdout.splitlines()[:3] == [
        "DIFFERENT: 3 of 100 pages after epoch 43",
        "  ftd-ram page 5",
        "  and 2 more",
    ]
    result = ftd("verify", "--url", url, "--json")
    assert result.returncode == 1
    assert VerifyReport.model_validate_json(result.stdout) == node.verification


def test_verify_disks(node: FakeNode, url: str) -> None:
    node.verification = VerifyReport(epoch=43, ok=True, pages=100, disk_epoch=45, disk_blocks=512)
    result = ftd("verify", "--url", url)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "equal: 100 pages compared after epoch 43",
        "equal: 512 blocks of disks compared, up to epoch 45",
    ]
    node.verification = node.verification.model_copy(
        update={
            "ok": False,
            "disk_differing": 2,
            "disk_differences": [DiskDifference(disk="vd0", block=7)],
        }
    )
    result = ftd("verify", "--url", url)
    assert result.returncode == 1
    assert result.stdout.splitlines()[:3] == [
        "DIFFERENT: 2 of 512 blocks of disks, up to epoch 45",
        "  disk vd0 block 7 (of 4096 bytes)",
        "  and 1 more",
    ]


@pytest.mark.parametrize(
    ("words", "action"),
    [
        (["switchover"], "switchover"),
        (["pause-protection"], "pause-protection"),
        (["resume-protection"], "resume-protection"),
        (["protect", "--peer", "10.0.0.3:7799"], "protect"),
        (["takeover", "--force"], "takeover"),
    ],
)
def test_what_an_operator_asks_for(node: FakeNode, url: str, words: list[str], action: str) -> None:
    result = ftd(*words, "--url", url)
    assert (result.returncode, result.stdout) == (0, f"{action} is done\n")
    assert [asked for asked, _ in node.asked] == [action]
    if action == "protect":
        assert (node.asked[0][1]["host"], node.asked[0][1]["port"]) == ("10.0.0.3", 7799)


def test_what_cannot_be_a_host_is_refused_before_anybody_is_asked(node: FakeNode, url: str) -> None:
    result = ftd("protect", "--peer", "10.0.0..3", "--url", url)
    assert result.returncode == 2
    assert "invalid address (such as 10.0.0.3 or 10.0.0.3:7788) value: '10.0.0..3'" in result.stderr
    assert node.asked == []


def test_status_shows_the_paths_when_there_are_several(node: FakeNode, url: str) -> None:
    paths = [
        PathStatus(name="link", address="10.0.0.2", up=True, heartbeat_age=0.01),
        PathStatus(name="side", address="10.1.0.2", detail="nothing heard on it for 300 ms"),
    ]
    node.now = node.now.model_copy(update={"peer": PeerStatus(address="10.0.0.2", paths=paths)})
    shown = ftd("status", "--url", url).stdout
    assert "10.0.0.2, up" in shown
    assert "10.1.0.2, DOWN: nothing heard on it for 300 ms" in shown
    node.now = node.now.model_copy(update={"peer": PeerStatus(address="10.0.0.2", paths=paths[:1])})
    assert "path" not in ftd("status", "--url", url).stdout


def test_why_has_the_peers_record_fetched(node: FakeNode, url: str, tmp_path: Path) -> None:
    port = url.rpartition(":")[2]
    config = sample.write(tmp_path, "b", "backup", own='state_dir = "."', more=f"[http]\nport = {port}\n")
    line = '{"at": 1.5, "node": "%s", "what": "session-lost", "reason": "lost by %s"}\n'
    (tmp_path / "flight.jsonl").write_text(line % ("b", "b"))
    node.flight = PeerFlight(node="a", lines=line % ("a", "a") + "no line\n")
    result = ftd("why", str(config))
    assert (result.returncode, result.stderr) == (0, "")
    assert "lost by a" in result.stdout
    assert "lost by b" in result.stdout
    node.flight = FtdError("no session with the peer at 10.0.0.1 now: this node is solo")
    result = ftd("why", str(config))
    assert result.returncode == 0
    assert "lost by b" in result.stdout
    assert result.stderr == (
        f"ftd: without the other node's record: {url}: "
        "no session with the peer at 10.0.0.1 now: this node is solo\n"
    )


class Replaced(FakeNode):
    """Its daemon is replaced by one of another version when that is asked for."""

    resumes = True

    async def control(self, action: str, arguments: Mapping[str, Any]) -> Done:
        done = await super().control(action, arguments)
        after: dict[str, Any] = {"version": "1.3.0", "uptime": self.now.uptime / 1000}
        if self.resumes:
            after["resumption"] = ResumptionStatus(count=1, epoch=43, held=0.84)
        else:
            after |= {"state": PairState.SOLO, "reason": "no backup"}
        self.now = self.now.model_copy(update=after)
        return done


def test_upgrade_waits_for_the_next_daemon_and_tells_what_that_cost() -> None:
    node = Replaced()
    with serving(node) as url:
        result = ftd("upgrade", "--url", url)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines() == [
            "upgrade is done",
            "ftd 1.2.3 -> 1.3.0: protection goes on, nothing was copied; output waited 840 ms",
        ]
        told = Status.model_validate_json(ftd("upgrade", "--url", url, "--json", "--timeout", "1").stdout)
        assert told.version == "1.3.0"
        shown = ftd("status", "--url", url).stdout
        assert "1 × without a copy, last in epoch 43, output waited 840 ms" in shown


def test_upgrade_says_that_there_was_nothing_to_go_on_with() -> None:
    node = Replaced()
    node.resumes = False
    with serving(node) as url:
        result = ftd("upgrade", "--url", url)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "ftd 1.2.3 -> 1.3.0: solo (no backup)"


class Staying(FakeNode):
    """Gets older."""

    def status(self) -> Status:
        return self.now.model_copy(update={"uptime": time.monotonic()})


def test_upgrade_complains_about_a_daemon_that_stays() -> None:
    with serving(Staying()) as url:
        result = ftd("upgrade", "--url", url, "--timeout", "0.3")
    assert result.returncode == 3
    assert "no other daemon answers after 0.3 s; see its log" in result.stderr


def test_takeover_by_hand_needs_the_word(node: FakeNode, url: str) -> None:
    assert "say --force" in one_line(ftd("takeover", "--url", url), 1)
    assert node.asked == []
    assert "DANGER" in ftd("takeover", "--help").stdout


def test_verify_impossible(node: FakeNode, url: str) -> None:
    node.verification = FtdError("the guest is not protected; ask again when it is")
    assert (
        one_line(ftd("verify", "--url", url), 1) == f"{url}: the guest is not protected; ask again when it is"
    )


# ---- run and version -------------------------------------------------------------------------------------


def test_check_a_good_configuration(tmp_path: Path) -> None:
    path = config(tmp_path)
    result = ftd("run", "--check", path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{path}: good (primary alpha)\n", "")


def test_check_tells_every_problem_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "alpha.toml"
    path.write_text(COMPLETE.format(listen="127.0.0.1", port=0) + "spped = 3\n")
    result = ftd("run", "--check", path)
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"ftd: error: {path}: [http] ") for line in lines)


# `ftd run` with a node that only says that it runs; what is run is in `node`.
WITH_NODE = """
import asyncio, sys, types
import ftd
from ftd.errors import HostError

async def waits(config):
    print("running", flush=True)
    await asyncio.sleep(60)

async def fails(config):
    raise HostError("no space in /dev/shm; free some")

async def breaks(config):
    return {}["missing"]

async def cancels(config):
    raise asyncio.CancelledError

async def ends(config):
    return 4

module = types.ModuleType("ftd.node")
module.run = globals()[sys.argv.pop(1)]
sys.modules["ftd.node"] = ftd.node = module
from ftd.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_running_ends_cleanly(tmp_path: Path, how: signal.Signals) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", WITH_NODE, "waits", "run", str(config(tmp_path))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "running\n"
    program.send_signal(how)
    _, complaints = program.communicate(timeout=10)
    assert (program.returncode, complaints) == (0, "")


@pytest.mark.parametrize(
    ("node", "code", "complaint"),
    [
        ("ends", 4, ""),
        ("fails", 3, "ftd: error: no space in /dev/shm; free some\n"),
        ("breaks", 1, "ftd: error: KeyError: 'missing' (a defect of ftd or something unforeseen: --debug "),
        ("cancels", 1, "ftd: error: the daemon was cancelled by itself; this is a defect"),
    ],
)
def test_running_ends_with_a_code(tmp_path: Path, node: str, code: int, complaint: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITH_NODE, node, "run", str(config(tmp_path))],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment(),
    )
    assert result.returncode == code
    assert result.stderr.startswith(complaint)
    assert len(result.stderr.splitlines()) == (1 if complaint else 0)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for arguments in (["--debug", "run"], ["run", "--debug"]):
        result = ftd(*arguments, tmp_path / "missing.toml")
        assert result.returncode != 0
        assert "Traceback" in result.stderr


def test_version() -> None:
    result = ftd("version")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"ftd {__version__}"
    assert lines[1].startswith("Python 3.")
    assert re.match(r"QEMU (\d+\.|not found: \S)", lines[2])
    assert len(lines) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["status", "--watch", "0"],
        ["status", "--watch", "never"],
        ["status", "--timeout", "nan"],
        ["status", "--url", "ftp://x"],
        ["status", "--url", "http://x:99999"],
        ["status", "--url", "127.0.0.1:9105"],
        ["status", "alpha.toml", "--url", "http://x"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line(arguments: list[str]) -> None:
    result = ftd(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("ftd")


def test_the_command_lines_in_use_are_found_quickly() -> None:
    # `ftd status` runs in prompts and probes: it is not to import what only the daemon needs
    code = "import sys, ftd.cli; print(sorted({'aiohttp', 'numpy', 'qemu.qmp', 'rich'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert result.stdout == "[]\n"


# ---- what main() does with what commands raise -----------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "complaint"),
    [
        (KeyboardInterrupt(), 130, ""),
        (FtdError("one thing\nand another"), 1, "ftd: error: one thing\nftd: error: and another\n"),
        (ZeroDivisionError("a / b"), 1, "ftd: error: ZeroDivisionError: a / b (a defect of ftd or something"),
        (PermissionError(13, "", "/run/ftd"), 1, "ftd: error: /run/ftd: permission denied; "),
    ],
)
def test_errors_become_text_and_number(
    raised: BaseException,
    code: int,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: object) -> int:
        raise raised

    monkeypatch.setattr(versions, "_version", fail)
    assert cli.main(["version"]) == code
    assert capsys.readouterr().err.startswith(complaint)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 µs"), (0.00042, "420 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (600, "10 min"), (9000, "2.5 h")],
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (5 << 40, "5120 GiB")],
)
def test_bytes_text(size: int, text: str) -> None:
    assert bytes_text(size) == text
