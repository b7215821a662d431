"""A pair with an etcd on a third host, and what is asked of both sides."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ftd.errors import FtdError
from ftd.monitor import Monitor
from testbed.etcd import Etcd
from testbed.hosts import GUEST_MAC, Host
from testbed.namespaces import http_session
from testbed.pair import HTTP_PORT, Daemon, Pair


def arbitrated(etcd: Etcd) -> dict[str, Any]:
    return {
        "arbiter": {
            "kind": "etcd",
            "pair": "web",
            "endpoints": etcd.endpoints,
            "accept_split_brain": False,
            "timeout_ms": 500,
        }
    }


# A guest of its own would use it; here it is what QEMU holds output of.
NIC = {"machine": {"nic": [{"tap": "tap0", "mac": GUEST_MAC}], "dirty_ring_size": 0}}


async def boot(host: Host, daemon: Daemon) -> None:
    """The dead host boots, and its daemon starts."""
    host.revive()
    assert host.memory_directory.is_dir()
    await daemon.close()
    await daemon.start()


async def free_guests(pair: Pair) -> list[str]:
    """Hosts on which a guest runs whose output is not held, as their QEMUs say."""
    free = []
    for daemon in (pair.primary, pair.backup):
        with contextlib.suppress(OSError, FtdError, TimeoutError):
            async with (
                asyncio.timeout(1),
                await Monitor.connect(daemon.run_dir / "operator.sock") as operator,
            ):
                if (await operator.execute("query-status"))["status"] != "running":
                    continue
                if not (await operator.execute("query-x-ft"))["output"]["holding"]:
                    free.append(daemon.host.name)
    return free


@contextlib.asynccontextmanager
async def one_speaks(pair: Pair) -> AsyncIterator[None]:
    """Somebody looks all the time whether both sides speak, which is a failure at the end."""
    both: list[list[str]] = []

    async def watch() -> None:
        while True:
            free = await free_guests(pair)
            if len(free) > 1:
                both.append(free)
            await asyncio.sleep(0.05)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    assert both == [], "two guests spoke"


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for somebody to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def post(daemon: Daemon, action: str, body: str = "") -> dict[str, Any]:

    async with (
        http_session(daemon.host.namespace, 60) as session,
        session.post(f"http://127.0.0.1:{HTTP_PORT}/{action}", data=body) as answer,
    ):
        told: dict[str, Any] = await answer.json()
        return told | {"code": answer.status}
