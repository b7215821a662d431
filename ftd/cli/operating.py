"""What operators ask of a daemon: to compare, to hand the guest over, to be replaced, and the like."""

from __future__ import annotations

import argparse
import contextlib
import json
import time

from ftd.cli.arguments import host_and_port, positive
from ftd.cli.asking import ask, url_of
from ftd.cli.commands import Commands
from ftd.cli.words import seconds_text
from ftd.errors import FtdError, HostError
from ftd.status import Done, Status, VerifyReport

# The server gives up on a verification after an hour, and says so.
_VERIFY_PATIENCE = 3610.0
# And after 60 s on what operators ask for.
_CONTROL_PATIENCE = 70.0

# While the daemon is replaced; and states in which the next one has found out what it is.
_UPGRADE_POLL = 0.1
_SETTLED = frozenset({"protected", "solo", "held", "syncing", "taken-over", "stopped"})

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


def add(commands: Commands) -> None:
    """Add the commands of this module."""
    commands.add(
        "verify",
        _verify,
        asks=True,
        help="compare all of the guest's memory with the shadow's, and its disks with the backup's",
        description="Ask the primary. Exit code 0: equal; 1: different, or could not be compared.",
    )

    for action, short, long in _ACTIONS:
        command = commands.add(action, _control, asks=True, help=short, description=long)
        command.set_defaults(action=action)
        if action == "takeover":
            command.add_argument(
                "--force", action="store_true", help="yes, although two guests may run afterwards"
            )
        elif action == "protect":
            command.add_argument(
                "--peer",
                metavar="HOST[:PORT]",
                type=host_and_port,
                required=True,
                help="where the new backup's daemon listens",
            )

    upgrade = commands.add(
        "upgrade",
        _upgrade,
        asks=True,
        help="have the daemon replaced by the ftd that is installed now, with the guest protected throughout",
        description="Ask either node; `systemctl reload` does the same. The new program is tried first, and "
        "reads the configuration anew. The process stays, output is held for the moment, and nothing is "
        "copied, if the peer waits ([node] restart_grace_ms) and both versions speak the same protocol. "
        "Otherwise it is as if the unit was restarted.",
    )
    upgrade.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive,
        default=30.0,
        help="wait this long for the new daemon (default: 30)",
    )


def _verify(arguments: argparse.Namespace) -> int:
    report = ask(VerifyReport, url_of(arguments), "/verify", method="POST", timeout=_VERIFY_PATIENCE)
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
    done = ask(
        Done,
        url_of(arguments),
        f"/{arguments.action}",
        method="POST",
        timeout=_CONTROL_PATIENCE,
        body=json.dumps(body).encode(),
    )
    print(done.model_dump_json() if arguments.json else done.detail)
    return 0


def _upgrade(arguments: argparse.Namespace) -> int:
    """Have the daemon replaced, and wait until its successor has the guest protected, or says why not."""
    url = url_of(arguments)

    def read() -> tuple[Status, float]:
        status = ask(Status, url, "/status", timeout=5.0)
        return status, time.monotonic() - status.uptime

    before, began = read()
    done = ask(Done, url, "/upgrade", method="POST", timeout=_CONTROL_PATIENCE, body=b"{}")
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
