"""Daemons that a real systemd starts, reloads and restarts, by the units in systemd/.

Each host has a systemd of its own: process 1 of a process namespace in the host's network namespace, with
control groups, /run, /etc and /var/lib of its own. It knows no units but ftd's and the few targets that these
name, so nothing else of this machine is started by it.
"""

import asyncio
import contextlib
import os
import shlex
import sys
from pathlib import Path

from testbed.guest import ROOT
from testbed.hosts import Host, TestbedError, control_groups
from testbed.pair import Daemon, Table, to_toml

SYSTEMD = Path("/lib/systemd/systemd")
TARGETS = ("basic", "multi-user", "network-online", "shutdown", "sysinit", "umount")
START_TIMEOUT_S = 20.0

# What is mounted is seen by this systemd and what it starts, and gone with them.
SETUP = """
mount -t tmpfs -o mode=755 tmpfs "$FOLDER/own"
for place in etc var/lib; do
    upper=$FOLDER/own/$place work=$FOLDER/own/work/$place
    mkdir -p "$upper" "$work"
    mount -t overlay -o "lowerdir=/$place,upperdir=$upper,workdir=$work" overlay "/$place"
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/ftd /etc/ftd
mount --bind "$FOLDER/run" /run/ftd
cp "$FOLDER"/*.toml /etc/ftd/
exec "$SYSTEMD" --system --unit=multi-user.target --log-target=null --show-status=0
"""


class SystemdMissingError(TestbedError):
    """No systemd can run in a namespace here; one line says why."""


class Systemd:
    """The systemd of one host; it ends with the host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.folder = host.network.directory / f"systemd-{host.name}"
        self.units = self.folder / "units"
        self._pid = 0  # as seen from outside

    async def start(self) -> None:
        """Start it, with ftd's units. Raises SystemdMissingError if this machine does not allow that."""
        if not SYSTEMD.exists():  # noqa: ASYNC240
            raise SystemdMissingError(f"{SYSTEMD} is missing; install the Debian package systemd")
        for name in ("units", "bin", "run", "own"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for target in TARGETS:
            (self.units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        for unit in (ROOT / "systemd").glob("*.service"):
            (self.units / unit.name).write_bytes(unit.read_bytes())
            dropped = self.units / f"{unit.name}.d"
            dropped.mkdir(exist_ok=True)
            # No journal runs here, and ftd is the one that is tested.
            (dropped / "testbed.conf").write_text(
                "[Service]\n"
                f"Environment=PATH={self.folder / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin PYTHONPATH={ROOT}\n"
                f"StandardOutput=append:{self.folder / 'ftd.log'}\n"
                f"StandardError=append:{self.folder / 'ftd.log'}\n"
            )
        program = self.folder / "bin/ftd"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ftd "$@"\n')
        program.chmod(0o755)
        unshare = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--cgroup",
            "--uts",
        ]
        process = await self.host.run(
            ["sh", "-ec", 'read moved; exec "$@"', "sh", *unshare, "sh", "-ec", SETUP],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"],
                "FOLDER": str(self.folder),
                "SYSTEMD": str(SYSTEMD),
                "SYSTEMD_UNIT_PATH": str(self.units),
                "SYSTEMD_GENERATOR_PATH": "",
                "container": "ftd-testbed",
            },
        )
        # Into control groups of its own, which are the root of those that it is going to see.
        for group in control_groups():
            own = group / self.host.namespace
            own.mkdir()
            (own / "cgroup.procs").write_text(str(process.pid))
        assert process.stdin is not None
        process.stdin.write(b"moved\n")
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while await self._state() not in ("running", "degraded"):
                    if process.returncode is not None:
                        assert process.stderr is not None
                        said = (await process.stderr.read()).decode(errors="replace").strip()
                        raise SystemdMissingError(f"systemd does not run in a namespace here: {said}")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TestbedError(f"systemd on {self.host.name} is not up in {START_TIMEOUT_S:g} s") from None

    async def _state(self) -> str:
        for pid in self.host.processes() if not self._pid else ():
            with contextlib.suppress(OSError):
                if inside(pid) == 1 and _name(pid) == "systemd":
                    self._pid = pid
        if not self._pid:
            return ""
        return (await self._control("is-system-running"))[1].strip()

    async def _control(self, *words: str) -> tuple[int, str]:
        process = await self.host.run(
            ["nsenter", "-t", str(self._pid), "--mount", "--pid", "systemctl", "--no-pager", *words],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(errors="replace")

    async def control(self, *words: str) -> str:
        """What `systemctl WORDS` prints. Raises TestbedError if it fails."""
        code, said = await self._control(*words)
        if code:
            raise TestbedError(f"systemctl {' '.join(words)} on {self.host.name}: {said.strip()}")
        return said

    async def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return (await self.control("show", "--value", "--property", name, unit)).strip()


def inside(pid: int) -> int:
    """A process's number in its innermost process namespace. Raises OSError if it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


class Unit(Daemon):
    """A daemon that is an instance of one of ftd's units."""

    def __init__(self, systemd: Systemd, daemon: Daemon, tables: Table) -> None:
        # Where the units have systemd make them; outside, the first is another folder.
        node = {
            **tables["node"],
            "run_dir": f"/run/ftd/{daemon.host.name}",
            "state_dir": f"/var/lib/ftd/{daemon.host.name}",
        }
        super().__init__(daemon.host, daemon.role, daemon.folder, tables)
        self.systemd = systemd
        self.log = systemd.folder / "ftd.log"
        self.run_dir = systemd.folder / "run" / daemon.host.name
        self.unit = f"ftd-{daemon.role}@{daemon.host.name}.service"
        systemd.folder.mkdir(parents=True, exist_ok=True)
        self.config = systemd.folder / f"{daemon.host.name}.toml"
        self.config.write_text(to_toml({**tables, "node": node}))

    async def start(self) -> None:
        """`systemctl start`, which returns when the daemon has said that it is ready."""
        await self.systemd.control("start", self.unit)
