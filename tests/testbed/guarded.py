"""What tests of a whole pair ask of its guest, its daemons and their logs."""

import asyncio
import json
import re
from typing import Any, Literal

import aiohttp

from testbed.guest import KVM, Guest, build
from testbed.hosts import GUEST_ADDRESS, Node, TestbedError
from testbed.namespaces import http_session
from testbed.pair import Daemon, Pair

# What only a defect of a daemon writes: Python's words, and those of ftd's own log for them.
DEFECTS = re.compile(
    r"Traceback|never retrieved|never awaited|Exception ignored|exception=|a defect|internal error"
)


async def bare_guest(
    accelerator: Literal["kvm", "tcg", "any"] = "any", vcpus: int = 1, memory_mib: int = 64, **options: object
) -> Guest:
    """The bare-metal guest, under KVM where that is possible unless told otherwise."""
    if accelerator == "any":
        accelerator = "kvm" if await asyncio.to_thread(KVM.exists) else "tcg"
    words = {
        "pages": "128",  # every epoch has some, and others have a processor
        "rounds_per_second": "100",
        **{name: str(value) for name, value in options.items()},
    }
    folder = await build("guests/bare/build")
    return Guest("bare", accelerator, "asked for", folder, vcpus=vcpus, memory_mib=memory_mib, options=words)


async def linux_guest(**options: object) -> Guest:
    """The Linux guest under TCG."""
    words = {name: str(value) for name, value in options.items()}
    folder = await build("guests/linux/build")
    return Guest("linux", "tcg", "asked for", folder, memory_mib=128, options=words)


# ---- the guest's own checks -------------------------------------------------------------------------------

ROUND = r"^round (\d+)(?:/(\d+))? tsc \d+ bad (\d+)"


def console_faults(text: str) -> list[str]:
    """Lines in which either guest complains about its memory or its clocks.

    A panic that a test asked for, through sysrq, is none.
    """
    whole = text[: text.rfind("\n") + 1]
    panic = r"Kernel panic - not syncing: (?!sysrq)"
    faults = re.findall(rf"^.*(?:MISMATCH|BACKWARDS|{panic}|Oops).*$", whole, re.MULTILINE)
    return faults + [match[0] for match in re.finditer(ROUND, whole, re.MULTILINE) if match[3] != "0"]


async def assert_bare_guest_goes_on(daemon: Daemon, lines: int = 5) -> int:
    """The guest counts on at this console, and none of its checks failed; returns the number of its round."""
    last = -1
    daemon.console.skip()
    for _ in range(lines):
        match = await daemon.console.wait_for(ROUND, 30)
        assert int(match[1]) > last, "the guest's rounds do not grow"
        last = int(match[1])
    assert console_faults(daemon.console.text()) == []
    return last


async def ask(node: Node, method: str, target: str, timeout_s: float = 30.0) -> str:
    """One request to the Linux guest's service."""
    async with (
        http_session(node.namespace, timeout_s) as session,
        session.request(method, f"http://{GUEST_ADDRESS}{target}") as answer,
    ):
        text = await answer.text()
        if answer.status != 200:
            raise TestbedError(f"{method} {target}: {answer.status} {text.strip()}")
        return text


async def assert_linux_guest_is_sound(pair: Pair) -> dict[str, Any]:
    """The guest verifies all pages of its dirtier, and never saw a wrong one or a clock run backwards."""
    client = pair.network.client
    wanted = int(await ask(client, "GET", "/verify"))
    async with asyncio.timeout(60):
        while (status := json.loads(await ask(client, "GET", "/status")))["verify_done"] < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (status["dirty_mismatches"], status["clock_backwards"]) == (0, 0)
    return status


# ---- the daemons ------------------------------------------------------------------------------------------


async def metric(daemon: Daemon, name: str, **labels: str) -> float:
    """A metric's value; 0 when it is not there."""
    return (await daemon.metrics()).get((name, tuple(sorted(labels.items()))), 0.0)


async def wait_committed(daemon: Daemon, more: int, timeout_s: float = 60.0) -> dict[str, Any]:
    """Wait for so many more committed epochs."""
    first = (await daemon.status())["epoch"]["committed"]
    return await daemon.wait_status(
        f"{more} more epochs", lambda status: status["epoch"]["committed"] >= first + more, timeout_s
    )


async def wait_ready(backup: Daemon) -> None:
    """The backup has its shadow, and waits for a primary."""
    await backup.wait_status(
        "a shadow", lambda status: status["state"] == "waiting" and status["qemu"]["pid"] is not None, 30
    )


async def wait_log(daemon: Daemon, pattern: str, timeout_s: float = 30.0) -> str:
    """Wait for a line in the daemon's log; returns it."""
    async with asyncio.timeout(timeout_s):
        while not (match := re.search(rf"^.*(?:{pattern}).*$", daemon.logs(), re.MULTILINE)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return match[0]


async def wait_ended(daemon: Daemon, timeout_s: float = 30.0) -> int:
    """Wait until the daemon has ended; returns its exit status."""
    assert daemon.process is not None
    return await asyncio.wait_for(daemon.process.wait(), timeout_s)


async def assert_takeover(pair: Pair, trigger: str, *, committed: int) -> dict[str, Any]:
    """The backup takes over because of `trigger`, from a committed epoch: at least the one that was known."""
    status = await pair.backup.wait_takeover()
    taken = status["takeover"]
    assert taken["trigger"] == trigger
    assert taken["epoch"] >= committed
    assert (status["role"], status["generation"]) == ("primary", 2)
    return status


def defects(daemon: Daemon) -> list[str]:
    """Lines of the daemon's log that no fault of the outside may cause."""
    return [line for line in daemon.logs().splitlines() if DEFECTS.search(line)]


UNREACHABLE = (OSError, TimeoutError, aiohttp.ClientError)
