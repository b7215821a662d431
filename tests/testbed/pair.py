"""A primary and a backup on two hosts of a TestNetwork, from configuration to takeover."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from testbed.guest import ROOT, Console, Guest
from testbed.hosts import Death, Host, TestbedError, TestNetwork
from testbed.namespaces import http_session

HTTP_PORT = 9105
POLL_S = 0.02
Table = dict[str, Any]


def to_toml(tables: Mapping[str, Any]) -> str:
    """TOML of tables of scalars, lists of scalars and lists of tables (as [machine] nic)."""
    lines: list[str] = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        nested = []
        for key, value in table.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                nested.append((key, value))
            else:
                # JSON's strings, numbers, booleans and lists of these are TOML's.
                lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        for key, items in nested:
            for item in items:
                lines.append(f"[[{name}.{key}]]")
                lines += [
                    f"{inner} = {json.dumps(value, ensure_ascii=False)}" for inner, value in item.items()
                ]
        lines.append("")
    return "\n".join(lines)


class Daemon:
    """One ftd and its QEMU on a host."""

    def __init__(self, host: Host, role: Literal["primary", "backup"], folder: Path, config: Table) -> None:
        self.host, self.role, self.folder = host, role, folder
        self.config = folder / "ftd.toml"
        self.log = folder / "ftd.log"
        self.console = Console(folder / "console")
        self.run_dir = folder / "run"
        self.data_port: int = config["link"].get("port", 7788)
        self.heartbeat_port: int = config["link"].get("heartbeat_port", 7789)
        heartbeat = config["heartbeat"]
        self.heartbeat_limit_s: float = heartbeat["interval_ms"] * heartbeat["misses"] / 1000
        self.process: asyncio.subprocess.Process | None = None
        self.last_status: Table = {}
        self.environment: dict[str, str] = {}  # of the daemon, beside this process's
        self._session: aiohttp.ClientSession | None = None
        for path in (folder, self.run_dir):
            path.mkdir(parents=True, exist_ok=True)
        self.console.path.touch()
        self.config.write_text(to_toml(config))

    async def start(self) -> None:
        """Start the daemon; it starts its QEMU."""
        with self.log.open("ab") as log:
            self.process = await self.host.run(
                [sys.executable, "-m", "ftd", "run", self.config],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
                cwd=self.folder,
            )

    async def _get(self, path: str) -> bytes:
        if self._session is None:
            self._session = http_session(self.host.namespace)
        async with self._session.get(f"http://127.0.0.1:{HTTP_PORT}{path}") as answer:
            return await answer.read()

    async def status(self) -> Table:
        """GET /status; remembered as `last_status`. Raises OSError, TimeoutError or aiohttp.ClientError."""
        self.last_status = json.loads(await self._get("/status"))
        return self.last_status

    async def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """GET /metrics: values by name and sorted labels."""
        families = text_string_to_metric_families((await self._get("/metrics")).decode())
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def ended(self) -> bool:
        """Whether the daemon was started and is no more."""
        return self.process is not None and self.process.returncode is not None

    def logs(self) -> str:
        """What the daemon logged so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def wait_status(self, what: str, condition: Callable[[Table], bool], timeout_s: float) -> Table:
        """Wait until the status fulfils a condition; `what` names it when it does not come true."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError, TimeoutError, aiohttp.ClientError):
                if condition(status := await self.status()):
                    return status
            last = self.last_status.get("state", "none")
            if self.ended() or time.monotonic() > deadline:
                reason = "it has ended" if self.ended() else f"not within {timeout_s:g} s"
                tail = " | ".join(self.logs().strip().splitlines()[-3:])
                raise TestbedError(
                    f"{self.role} on {self.host.name}: {what}: {reason} (state: {last}; log: {tail})"
                )
            await asyncio.sleep(POLL_S)

    async def wait_state(self, state: str, timeout_s: float = 60.0) -> Table:
        """Wait for a state of the pair (`protected`, …) as this daemon sees it."""
        return await self.wait_status(
            f"state {state}", lambda status: status.get("state") == state, timeout_s
        )

    async def wait_takeover(self, timeout_s: float = 30.0) -> Table:
        """Wait until this daemon has taken over; returns its status, with `takeover` filled."""
        return await self.wait_status("takeover", lambda status: bool(status.get("takeover")), timeout_s)

    def qemu_pid(self) -> int:
        """Pid of the daemon's QEMU, found by its name on this host."""
        for pid in self.host.processes():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
                    return pid
        raise TestbedError(f"no QEMU runs on {self.host.name}")

    def kill(self) -> Death:
        """SIGKILL to the daemon alone."""
        if self.process is None or self.ended():
            raise TestbedError(f"the {self.role} daemon does not run")
        return _kill(self.process.pid)

    def kill_qemu(self) -> Death:
        """SIGKILL to QEMU alone."""
        return _kill(self.qemu_pid())

    async def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, and the exit status."""
        if self.process is None:
            raise TestbedError(f"the {self.role} daemon was never started")
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), timeout_s)

    async def close(self) -> None:
        """Give back this process's connections to the daemon."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def _kill(pid: int) -> Death:
    began = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    ended = time.monotonic_ns()
    return Death(began, ended, ended, (pid,))


class Pair:
    """Both daemons, configured for one guest.

    `settings` are tables that are merged over the defaults; `backup_settings` over those, on the backup only.
    """

    def __init__(
        self,
        network: TestNetwork,
        guest: Guest,
        qemu: Path,
        settings: Mapping[str, Table] | None = None,
        backup_settings: Mapping[str, Table] | None = None,
    ) -> None:
        self.network, self.guest, self.qemu = network, guest, qemu
        self.settings = settings or {}
        self.backup_settings = backup_settings or {}
        self.a, self.b = list(network.hosts.values())[:2]
        self.primary: Daemon
        self.backup: Daemon

    def configuration(self, host: Host, peer: Host, role: str) -> Table:
        """All tables of one side's configuration."""
        folder = self.network.directory / host.name
        tls = self.network.directory / "tls"
        tables: Table = {
            "node": {
                "name": host.name,
                "role": role,
                "state_dir": str(folder / "state"),
                "run_dir": str(folder / "run"),
            },
            "link": {
                "listen": host.link_address,
                "peer": peer.link_address,
                "certificate": str(tls / f"{host.name}.pem"),
                "key": str(tls / f"{host.name}.key"),
                "authority": str(tls / "ca.pem"),
            },
            "heartbeat": {"interval_ms": 50, "misses": 6},
            "epoch": {"length_ms": 20},
            "machine": self.guest.machine(host, folder / "console", self.qemu),
            "http": {"listen": "127.0.0.1", "port": HTTP_PORT},
            "arbiter": {"kind": "none", "accept_split_brain": True},
        }
        if "side" in self.network.segments:
            path = {"name": "side", "listen": host.side_address, "peer": peer.side_address}
            tables["heartbeat"]["path"] = [path]
        for settings in (self.settings, self.backup_settings if role == "backup" else {}):
            for name, table in settings.items():
                tables[name] = {**tables.get(name, {}), **table}
        if tables["link"].get("insecure"):
            for key in ("certificate", "key", "authority"):
                del tables["link"][key]
        return tables

    async def prepare(self) -> None:
        """Make certificates and configurations; nothing is started."""
        hosts = [f"{host.name}={host.link_address}" for host in (self.a, self.b)]
        script = ROOT / "scripts/make-certificates"
        process = await asyncio.create_subprocess_exec(
            script,
            self.network.directory / "tls",
            *hosts,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        if process.returncode != 0:
            raise TestbedError(f"{script.name}: {out.decode(errors='replace').strip()}")
        folder = self.network.directory
        self.primary = Daemon(
            self.a, "primary", folder / self.a.name, self.configuration(self.a, self.b, "primary")
        )
        self.backup = Daemon(
            self.b, "backup", folder / self.b.name, self.configuration(self.b, self.a, "backup")
        )

    async def start(self) -> None:
        """Prepare, and start both daemons."""
        await self.prepare()
        await self.backup.start()
        await self.primary.start()

    async def wait_protected(self, timeout_s: float = 60.0) -> None:
        """Both sides say that the guest is protected."""
        await self.primary.wait_state("protected", timeout_s)
        await self.backup.wait_state("protected", timeout_s)

    def kill_primary_host(self) -> Death:
        """Everything on the primary's host dies at once, and its links go down."""
        return self.a.kill_all()

    def kill_primary_qemu(self) -> Death:
        """QEMU on the primary dies alone."""
        return self.primary.kill_qemu()

    def kill_primary_daemon(self) -> Death:
        """The primary's daemon dies alone; QEMU, and with it the guest, stays."""
        return self.primary.kill()

    async def close(self) -> None:
        """Give back what this process holds; the daemons end with the network."""
        for name in ("primary", "backup"):
            if hasattr(self, name):
                await getattr(self, name).close()

    async def __aenter__(self) -> "Pair":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
