"""The command line: `ftd run`, `ftd status`, `ftd verify`, `ftd switchover` and others, `ftd version`.

`ftd run` becomes the program that is installed now when `ftd upgrade` asks it to: ftd/succession.py.

Exit codes are those of ftd/errors.py; besides them 0 for success, 1 for `verify` that found differences, 2
for a wrong command line (argparse's, the same as a wrong configuration), 130 after Ctrl-C and 143 after
SIGTERM. For `ftd run` both signals are a planned stop, and end with 0.

No traceback reaches the operator unless --debug is given: an error is one line on standard error.
"""

# ruff: noqa: PLC0415 - each command imports what it alone needs: `ftd status` is not to wait for numpy and QMP,
# and a guest's output not for what only asks a daemon

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from ftd import __version__, log
from ftd.errors import FtdError, HostError, friendly
from ftd.status import Done, Failure, PeerFlight, Status, VerifyReport

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ftd.config import Config

DEFAULT_URL = "http://127.0.0.1:9105"

# An answer of /status has about 2 KB; whatever sends more is not ftd.
_MAX_ANSWER = 4 * 1024 * 1024
# The server gives up on a verification after an hour, and says so.
_VERIFY_PATIENCE = 3610.0
# And after 60 s on what operators ask for.
_CONTROL_PATIENCE = 70.0

# The peer has 5 s to send its record.
_FLIGHT_PATIENCE = 10.0

# While the daemon is replaced; and states in which the next one has found out what it is.
_UPGRADE_POLL = 0.1
_SETTLED = frozenset({"protected", "solo", "held", "syncing", "taken-over", "stopped"})

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM
_BROKEN_PIPE = 128 + signal.SIGPIPE

AnyModel = TypeVar("AnyModel", bound=BaseModel)


# ---- the commands ------------------------------------------------------------------------------------------


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


def _status(arguments: argparse.Namespace) -> int:
    url = _url(arguments)

    def read() -> Status:
        return _ask(Status, url, "/status", timeout=arguments.timeout)

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


def _verify(arguments: argparse.Namespace) -> int:
    report = _ask(VerifyReport, _url(arguments), "/verify", method="POST", timeout=_VERIFY_PATIENCE)
    if arguments.json:
        print(report.model_dump_json())
    elif report.ok:
        print(f"equal: {report.pages} pages compared after epoch {report.epoch}")
        if report.disk_blocks:
            print(f"equal: {report.disk_blocks} blocks of disks compared, up to epoch {report.disk_epoch}")
    else:
        if report.differing:
            print(f"DIFFERENT: {report.differing} of {report.pages} pages after epoch {report.epoch}")
            for difference in report.differences:
                print(f"  {difference.block} page {difference.page}")
            if report.differing > len(report.differences):
                print(f"  and {report.differing - len(report.differences)} more")
        if report.disk_differing:
            print(
                f"DIFFERENT: {report.disk_differing} of {report.disk_blocks} blocks of disks, up to epoch "
                f"{report.disk_epoch}"
            )
            for block in report.disk_differences:
                print(f"  disk {block.disk} block {block.block} (of 4096 bytes)")
            if report.disk_differing > len(report.disk_differences):
                print(f"  and {report.disk_differing - len(report.disk_differences)} more")
        print("Protection is off until a full resync. This is a defect: report it with both sides' logs.")
    return 0 if report.ok else 1


def _control(arguments: argparse.Namespace) -> int:
    body: dict[str, object] = {}
    if arguments.action == "protect":
        body = {"host": arguments.peer[0], "port": arguments.peer[1]}
    elif arguments.action == "takeover":
        if not arguments.force:
            raise FtdError(
                "a takeover by hand goes past the arbiter; if you know that the guest does not run on the "
                "other host, and cannot, say --force"
            )
        body = {"force": True}
    done = _ask(
        Done,
        _url(arguments),
        f"/{arguments.action}",
        method="POST",
        timeout=_CONTROL_PATIENCE,
        body=json.dumps(body).encode(),
    )
    print(done.model_dump_json() if arguments.json else done.detail)
    return 0


def _upgrade(arguments: argparse.Namespace) -> int:
    """Have the daemon replaced, and wait until its successor has the guest protected, or says why not."""
    url = _url(arguments)

    def read() -> tuple[Status, float]:
        status = _ask(Status, url, "/status", timeout=5.0)
        return status, time.monotonic() - status.uptime

    before, began = read()
    done = _ask(Done, url, "/upgrade", method="POST", timeout=_CONTROL_PATIENCE, body=b"{}")
    if not arguments.json:
        print(done.detail, flush=True)
    deadline = time.monotonic() + arguments.timeout
    after: Status | None = None
    while time.monotonic() < deadline:
        time.sleep(_UPGRADE_POLL)
        with contextlib.suppress(FtdError):
            after, started = read()
            # The same process: only its age tells. A poll may be late.
            if started < began + _UPGRADE_POLL:
                after = None
            elif after.resumption.count or (after.state.value in _SETTLED and not after.away):
                break
    if after is None:
        raise HostError(
            f"{url}: no other daemon answers after {arguments.timeout:g} s; see its log. The guest is not "
            "touched; its output stays held until the arbiter has been asked"
        )
    if arguments.json:
        print(after.model_dump_json())
    elif after.resumption.count:
        held = after.resumption.held
        waited = f"; output waited {seconds_text(held)}" if held is not None else ""
        print(f"ftd {before.version} -> {after.version}: protection goes on, nothing was copied{waited}")
    else:
        print(f"ftd {before.version} -> {after.version}: {after.state} ({after.reason})")
    return 0


def _why(arguments: argparse.Namespace) -> int:
    from ftd import config as configuration
    from ftd import explanation, flight

    state = configuration.load(arguments.config).node.state_folder
    flights = [flight.read(state / "flight.jsonl"), *map(flight.read, arguments.peer)]
    without = ""
    if not arguments.peer:
        try:
            fetched = _ask(PeerFlight, _url(arguments), "/peer-flight", timeout=_FLIGHT_PATIENCE)
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


# ---- asking a daemon
# -----------------------------------------------------------------------------------------


def _url(arguments: argparse.Namespace) -> str:
    """Where the daemon listens: --url, or [http] of the configuration, or the default."""
    if arguments.url is not None:
        return str(arguments.url).rstrip("/")
    if arguments.config is None:
        return DEFAULT_URL
    import ipaddress

    from ftd import config as configuration

    settings = configuration.load(arguments.config).http
    host = settings.listen
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            # "all addresses" is a place to listen, not one to connect to
            host = "127.0.0.1" if address.version == 4 else "::1"
        host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.port}"


def _ask(
    model: type[AnyModel], url: str, path: str, *, timeout: float, method: str = "GET", body: bytes = b""
) -> AnyModel:
    """Return the daemon's answer. Raises HostError when none comes, FtdError when it says no or nonsense."""
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url + path, method=method, data=body if method == "POST" else None)
    # A proxy from the environment is never meant for a daemon on this or the next host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            told = answer.read(_MAX_ANSWER)
    except urllib.error.HTTPError as refusal:
        with refusal, contextlib.suppress(OSError, http.client.HTTPException):
            raise FtdError(_refusal(url, refusal.code, refusal.read(_MAX_ANSWER))) from None
        raise FtdError(_refusal(url, refusal.code, b"")) from None
    except http.client.HTTPException as error:
        raise HostError(
            f"no sensible answer from {url}: {_plain(error)}; is that ftd's [http] port?"
        ) from None
    except OSError as error:
        # URLError wraps what happened while connecting; later it comes as it is
        reason = getattr(error, "reason", None)
        cause = _plain(reason if isinstance(reason, BaseException) else error)
        raise HostError(f"no answer from {url}: {cause}; is `ftd run` running there?") from None
    try:
        return model.model_validate_json(told)
    except ValidationError:
        raise FtdError(f"{url}{path} answered with something else; is that ftd's [http] port?") from None


def _plain(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return " ".join(str(error).split()) or type(error).__name__


def _refusal(url: str, code: int, body: bytes) -> str:
    try:
        return f"{url}: {Failure.model_validate_json(body).error}"
    except ValidationError:
        return f"{url} answered with HTTP status {code}; is that ftd's [http] port?"


# ---- showing a status
# ----------------------------------------------------------------------------------------

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


def seconds_text(seconds: float) -> str:
    """Write a duration for people: three digits, the unit that fits."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def bytes_text(size: int) -> str:
    """Write a size for people."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024 or unit == "GiB":
            break
    return f"{value:.4g} {unit}"


# ---- the command line
# ----------------------------------------------------------------------------------------


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise ValueError(text)
    return value


_positive.__name__ = "number of seconds (above 0, at most 3600)"  # argparse puts this into its message


def _host_and_port(text: str) -> tuple[str, int | None]:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not text.startswith("[")):
        host, port = text, ""
    host = host.strip("[]")
    if not host or (colon and port and not 1 <= int(port) <= 65535):
        raise ValueError(text)
    return host, int(port) if port else None


_host_and_port.__name__ = "address (such as 10.0.0.3 or 10.0.0.3:7788)"


def _checked_url(text: str) -> str:
    parts = urlsplit(text)
    parts.port  # noqa: B018 - raises ValueError when it is none
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() for c in text):
        raise ValueError(text)
    return text


_checked_url.__name__ = "URL (such as http://127.0.0.1:9105)"


_ACTIONS = (
    (
        "switchover",
        "have the backup take over now: planned, and nothing is lost",
        "Ask the primary. The guest is stopped, its last epoch is committed, and the backup starts it; this "
        "host becomes the backup.",
    ),
    (
        "takeover",
        "have this node take the guest without the arbiter's consent: dangerous",
        "For a pair whose arbiter is gone for good. Ask the node that is `held` (or a backup that is "
        "`protected`): it starts its shadow, or lets its guest's output go, and tells the arbiter if that "
        "answers. DANGER: if the guest still runs on the other host, there are two of it afterwards, which "
        "both answer; what one of them has confirmed to its clients is lost. Switch the other off first.",
    ),
    (
        "pause-protection",
        "go on without a backup",
        "Ask the primary. It asks the arbiter for the authority to go on alone, and looks for no backup "
        "until `ftd resume-protection`, or until the daemon is started anew.",
    ),
    ("resume-protection", "look for the backup again", "Ask the primary, after `ftd pause-protection`."),
    (
        "protect",
        "have another backup, while the guest runs",
        "Ask the primary. It leaves its present backup and copies the guest to another, which it remembers "
        "in peer.json of its state_dir until [link] peer is changed, or named here. The new backup's own "
        "[link] peer must be this host. Stop the daemon of the backup that was.",
    ),
)


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS: --debug may stand before or after the command, and must not be reset by the one that has none.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="more in the log, and tracebacks"
    )
    parser = argparse.ArgumentParser(
        prog="ftd",
        description="Keeps a QEMU virtual machine alive through the death of its host.",
        parents=[common],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", parents=[common], help="be the daemon that a configuration describes")
    run.add_argument("config", metavar="CONFIG", type=Path, help="TOML file")
    run.add_argument("--check", action="store_true", help="check the configuration and do no more")
    run.add_argument("--succeeds", metavar="PROTOCOL", help=argparse.SUPPRESS)
    run.set_defaults(command=_run)

    asking = argparse.ArgumentParser(add_help=False)
    where = asking.add_mutually_exclusive_group()
    where.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="ask the daemon with this TOML file"
    )
    where.add_argument("--url", type=_checked_url, help=f"ask the daemon there (default: {DEFAULT_URL})")
    asking.add_argument("--json", action="store_true", help="print JSON")

    status = commands.add_parser(
        "status", parents=[common, asking], help="show how a daemon and its guest are"
    )
    status.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_positive,
        nargs="?",
        const=1.0,
        help="show it again and again (default: every second) until Ctrl-C; "
        "write CONFIG before this option, or a number after it",
    )
    status.add_argument(
        "--timeout", metavar="SECONDS", type=_positive, default=5.0, help="wait this long (default: 5)"
    )
    status.set_defaults(command=_status)

    verify = commands.add_parser(
        "verify",
        parents=[common, asking],
        help="compare all of the guest's memory with the shadow's, and its disks with the backup's",
        description="Ask the primary. Exit code 0: equal; 1: different, or could not be compared.",
    )
    verify.set_defaults(command=_verify)

    for action, short, long in _ACTIONS:
        command = commands.add_parser(action, parents=[common, asking], help=short, description=long)
        command.set_defaults(command=_control, action=action)
        if action == "takeover":
            command.add_argument(
                "--force", action="store_true", help="yes, although two guests may run afterwards"
            )
        elif action == "protect":
            command.add_argument(
                "--peer",
                metavar="HOST[:PORT]",
                type=_host_and_port,
                required=True,
                help="where the new backup's daemon listens",
            )

    upgrade = commands.add_parser(
        "upgrade",
        parents=[common, asking],
        help="have the daemon replaced by the ftd that is installed now, with the guest protected throughout",
        description="Ask either node; `systemctl reload` does the same. The new program is tried first, and "
        "reads the configuration anew. The process stays, output is held for the moment, and nothing is "
        "copied, if the peer waits ([node] restart_grace_ms) and both versions speak the same protocol. "
        "Otherwise it is as if the unit was restarted.",
    )
    upgrade.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_positive,
        default=30.0,
        help="wait this long for the new daemon (default: 30)",
    )
    upgrade.set_defaults(command=_upgrade)

    why = commands.add_parser(
        "why",
        parents=[common],
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
    why.set_defaults(command=_why)

    version = commands.add_parser(
        "version", parents=[common], help="show the versions of ftd, Python and QEMU"
    )
    version.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="with the QEMU of this TOML file"
    )
    version.set_defaults(command=_version)
    return parser


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
    arguments = _parser().parse_args(argv, argparse.Namespace())
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
