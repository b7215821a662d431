"""Hosts made of network namespaces, which can be cut off and killed.

    +- switch ----------------------------------------------------+
    |   br-net    net-host-a  net-host-b  net-client              |   10.77.0.0/24: guests and clients
    |   br-link   link-host-a link-host-b                         |   10.78.0.0/24: daemons
    |   br-side   side-host-a side-host-b, if asked for           |   10.79.0.0/24: their heartbeats
    +----------------|-----------------------------|--------------+
    +- host-a -------|-----------+  +- client -----|-----------+
    |  br0: net0, tap0 …  link0  |  |  net0                    |
    +----------------------------+  +--------------------------+

Every interface is born inside a namespace and every namespace carries the prefix of its run, so runs do not
get in each other's way, and deleting the namespaces deletes everything. What a run that was killed left
behind is removed by the next one: a run holds a lock on its file in /run/ftd-testbed as long as it lives.
"""

import asyncio
import atexit
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from testbed.filters import DROP_ALL, drop_address, drop_tcp_port
from testbed.namespaces import NAMESPACES, call_in_namespace

NET = "10.77.0"
LINK = "10.78.0"
SIDE = "10.79.0"
SEGMENTS = ("net", "link", "side")
GUEST_ADDRESS = f"{NET}.100"
CLIENT_ADDRESS = f"{NET}.200"
GUEST_MAC = "52:54:00:f7:d0:01"

RUNS = Path("/run/ftd-testbed")
SHARED_MEMORY = Path("/dev/shm")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
PREFIX = "ftdt-"
NEEDED = ("ip", "tc")
MARK = "FTD_TESTBED"  # in the environment of every process of a run: its prefix

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

# Frames arrive at the switch's port when the host sends, and leave it when the host is sent to.
Direction = Literal["both", "from-host", "to-host"]
HOOKS: dict[str, tuple[str, ...]] = {
    "both": ("ingress", "egress"),
    "from-host": ("ingress",),
    "to-host": ("egress",),
}


class TestbedError(Exception):
    """The testbed cannot do what was asked; one line says why."""

    __test__ = False


@dataclass(frozen=True)
class Death:
    """What a kill did and when; times are of CLOCK_MONOTONIC, which all processes here share."""

    began_ns: int  # nothing was touched before this
    links_down_ns: int  # nothing left the host after this
    ended_ns: int  # nothing ran after this
    killed: tuple[int, ...]


def _tool(argv: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TestbedError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _batch(namespace: str, commands: Iterable[str]) -> None:
    _tool(["ip", "-n", namespace, "-batch", "-"], "\n".join(commands) + "\n")


def _add_namespace(name: str) -> int:
    """Create a namespace without IPv6 and without filtering on bridges; returns its inode number."""
    _tool(["ip", "netns", "add", name])

    def settle() -> None:
        settings = {
            # Router solicitations and the like would be noise on the wire that nobody asked for.
            "net/ipv6/conf/all/disable_ipv6": 1,
            "net/ipv6/conf/default/disable_ipv6": 1,
            "net/bridge/bridge-nf-call-iptables": 0,
            "net/bridge/bridge-nf-call-ip6tables": 0,
            "net/bridge/bridge-nf-call-arptables": 0,
        }
        for setting, value in settings.items():
            path = Path("/proc/sys") / setting
            if path.exists():  # kernels without IPv6 or br_netfilter need nothing
                path.write_text(f"{value}\n")

    call_in_namespace(name, settle)
    _batch(name, ["link set lo up"])
    return (NAMESPACES / name).stat().st_ino


def processes_in(inodes: Iterable[int]) -> list[int]:
    """The processes whose network namespace is one of these. Zombies have none any more."""
    wanted = {f"net:[{inode}]" for inode in inodes}
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if str(Path(f"/proc/{entry.name}/ns/net").readlink()) in wanted:
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or a zombie
    return found


def _signal_all(inodes: Iterable[int], number: int) -> list[int]:
    hit = []
    for pid in processes_in(inodes):
        try:
            os.kill(pid, number)
            hit.append(pid)
        except ProcessLookupError:
            continue
    return hit


def _kill_until_gone(inodes: Iterable[int], limit_s: float = 10.0) -> list[int]:
    """SIGKILL again and again, since a process may fork while it is being looked for."""
    inodes = list(inodes)
    killed: dict[int, None] = {}
    deadline = time.monotonic() + limit_s
    while alive := _signal_all(inodes, signal.SIGKILL):
        killed.update(dict.fromkeys(alive))
        if time.monotonic() > deadline:
            raise TestbedError(f"processes {alive} do not die within {limit_s:g} s")
        time.sleep(0.001)
    return list(killed)


class _Flags:
    """Switches interfaces of one namespace on and off by ioctl: starting `ip` would take far longer."""

    def __init__(self, namespace: str) -> None:
        self._socket = call_in_namespace(namespace, socket.socket, socket.AF_INET, socket.SOCK_DGRAM)

    def set(self, interface: str, up: bool) -> None:
        request = struct.pack("16sh22x", interface.encode(), 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(self._socket, SIOCGIFFLAGS, request), 16)
        flags = flags | IFF_UP if up else flags & ~IFF_UP
        fcntl.ioctl(self._socket, SIOCSIFFLAGS, struct.pack("16sh22x", interface.encode(), flags))

    def close(self) -> None:
        self._socket.close()


class Node:
    """A namespace with a name in which processes run: a host or a client."""

    def __init__(self, network: "TestNetwork", name: str, number: int) -> None:
        self.network = network
        self.name = name
        self.number = number
        self.namespace = network.namespace(name)
        self.inode = 0
        self.processor: int | None = None  # what runs here is to use no other
        self._cuts: dict[tuple[str, str], tuple[Direction, str]] = {}  # by segment and name

    @property
    def address(self) -> str:
        """The node's own address where guests and clients are."""
        return CLIENT_ADDRESS if isinstance(self, Client) else f"{NET}.{self.number}"

    def command(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs `argv` in the namespace; the process keeps its pid."""
        place = [] if self.processor is None else ["taskset", "--cpu-list", str(self.processor)]
        return [*place, "ip", "netns", "exec", self.namespace, *(os.fspath(word) for word in argv)]

    async def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: int | None = asyncio.subprocess.DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        limit: int = 1 << 20,
    ) -> asyncio.subprocess.Process:
        """Start a process in the namespace, in a session of its own. It ends with the network."""
        process = await asyncio.create_subprocess_exec(
            *self.command(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**(os.environ if env is None else env), MARK: self.network.prefix},
            cwd=cwd,
            limit=limit,
            start_new_session=True,
        )
        # `ip` enters the namespace a moment after its start; who kills the host then must find it there.
        while process.returncode is None and not self._inside(process.pid):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return process

    def _inside(self, pid: int) -> bool:
        try:
            return str(Path(f"/proc/{pid}/ns/net").readlink()) == f"net:[{self.inode}]"
        except OSError:
            return True  # it ended already

    async def output(self, argv: Sequence[str | os.PathLike[str]], timeout_s: float = 30.0) -> str:
        """Run a short command to its end and return what it prints."""
        process = await self.run(argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        try:
            out, err = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            process.kill()
            raise TestbedError(f"{argv[0]} in {self.name} does not end within {timeout_s:g} s") from None
        if process.returncode != 0:
            raise TestbedError(f"{argv[0]} in {self.name}: {err.decode(errors='replace').strip()}")
        return out.decode(errors="replace")

    def processes(self) -> list[int]:
        """Pids of everything that runs in the namespace."""
        return processes_in([self.inode])

    # How it comes into being; the network calls these.

    def _plug(self, segment: str, interface: str) -> None:
        switch = self.network.namespace("switch")
        port = f"{segment}-{self.name}"
        # A host that boots again has the network card that it had: others remember its address for a minute.
        mac = f"02:f7:d0:00:{SEGMENTS.index(segment):02x}:{self.number:02x}"
        _batch(
            switch,
            [
                f"link add {port} type veth peer name {interface} address {mac} netns {self.namespace}",
                f"link set {port} master br-{segment}",
                f"link set {port} up",
            ],
        )

    def _build(self) -> None:
        self.inode = _add_namespace(self.namespace)
        self._plug("net", "net0")
        _batch(self.namespace, [f"addr add {self.address}/24 dev net0", "link set net0 up"])


class Client(Node):
    """The namespace from which guests are asked."""


class Host(Node):
    """A host: processes, a tap for each NIC of its guest, and two cables to the switch."""

    @property
    def link_address(self) -> str:
        """The address for the traffic between the daemons."""
        return f"{LINK}.{self.number}"

    @property
    def side_address(self) -> str:
        """The address for heartbeats on a further path, in a network that has one."""
        return f"{SIDE}.{self.number}"

    @property
    def memory_directory(self) -> Path:
        """Where this host's guest memory belongs; in shared memory, and gone with the network."""
        path = SHARED_MEMORY / f"{self.network.prefix}-{self.name}"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    @property
    def taps(self) -> list[str]:
        """Names of the tap devices, all on the bridge that leads to the clients."""
        return [f"tap{number}" for number in range(self.network.taps)]

    @property
    def ports(self) -> tuple[str, ...]:
        """The host's ports on the switch: the network's, the link's, and that of the further path."""
        return tuple(f"{segment}-{self.name}" for segment in self.network.segments)

    def _build(self) -> None:
        self.inode = _add_namespace(self.namespace)
        self._plug("net", "net0")
        for segment in self.network.segments[1:]:
            self._plug(segment, f"{segment}0")
        commands = [
            "link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0",
            "link set net0 master br0",
            "link set net0 up",
        ]
        for tap in self.taps:
            commands += [f"tuntap add dev {tap} mode tap", f"link set {tap} master br0", f"link set {tap} up"]
        commands += [
            "link set br0 up",
            f"addr add {self.address}/24 dev br0",
            f"addr add {self.link_address}/24 dev link0",
            "link set link0 up",
        ]
        if "side" in self.network.segments:
            commands += [f"addr add {self.side_address}/24 dev side0", "link set side0 up"]
        _batch(self.namespace, commands)

    def _set_ports(self, up: bool) -> None:
        for port in self.ports:
            self.network._flags.set(port, up)

    def link_down(self) -> None:
        """Pull both cables: carrier is lost, the processes run on."""
        self._set_ports(False)

    def link_up(self) -> None:
        """Plug both cables in again."""
        self._set_ports(True)

    def cut_link(self, direction: Direction = "both") -> None:
        """Drop what goes over the daemons' link, silently: the carrier stays. Clients reach the guest."""
        self._cut("link", "link", direction, DROP_ALL)

    def restore_link(self) -> None:
        """Undo cut_link()."""
        self._mend("link", "link")

    def cut_from(self, other: "Host", direction: Direction = "both") -> None:
        """Drop what goes over the link between this host and another: both still reach everybody else."""
        self._cut("link", f"from {other.name}", direction, drop_address(other.link_address))

    def restore_from(self, other: "Host") -> None:
        """Undo cut_from()."""
        self._mend("link", f"from {other.name}")

    def cut_port(self, port: int, direction: Direction = "both") -> None:
        """Drop TCP segments of one port, whichever side's it is, that go over this host's link."""
        self._cut("link", f"port {port}", direction, drop_tcp_port(port))

    def restore_port(self, port: int) -> None:
        """Undo cut_port()."""
        self._mend("link", f"port {port}")

    def cut_side(self, direction: Direction = "both") -> None:
        """The same for the further path of heartbeats."""
        self._cut("side", "side", direction, DROP_ALL)

    def restore_side(self) -> None:
        """Undo cut_side()."""
        self._mend("side", "side")

    def cut_network(self, direction: Direction = "both") -> None:
        """Drop what goes over the cable to the clients; the link stays whole."""
        self._cut("net", "network", direction, DROP_ALL)

    def restore_network(self) -> None:
        """Undo cut_network()."""
        self._mend("net", "network")

    def restore_all(self) -> None:
        """Undo every cut."""
        self._cuts.clear()
        for segment in self.network.segments:
            self._drop(segment)

    def _cut(self, segment: str, name: str, direction: Direction, program: str) -> None:
        self._cuts[segment, name] = (direction, program)
        self._drop(segment)

    def _mend(self, segment: str, name: str) -> None:
        self._cuts.pop((segment, name), None)
        self._drop(segment)

    def _drop(self, segment: str) -> None:
        switch, port = self.network.namespace("switch"), f"{segment}-{self.name}"
        qdiscs = _tool(["tc", "-n", switch, "qdisc", "show", "dev", port])
        # One batch, so that both directions are cut within a fraction of a millisecond.
        lines = [f"qdisc del dev {port} clsact"] if "clsact" in qdiscs else []
        cuts = [cut for (where, _), cut in self._cuts.items() if where == segment]
        if cuts:
            lines.append(f"qdisc add dev {port} clsact")
        for preference, (direction, program) in enumerate(cuts, 1):
            lines += [
                f'filter add dev {port} {hook} pref {preference} bpf da bytecode "{program}"'
                for hook in HOOKS[direction]
            ]
        if lines:
            _tool(["tc", "-n", switch, "-batch", "-"], "\n".join(lines) + "\n")

    def limit_link(self, bits_per_second: int | None) -> None:
        """Make the link that slow in the direction that leaves this host; None: as fast as it can."""
        command = ["tc", "-n", self.namespace, "qdisc"]
        if "tbf" in _tool([*command, "show", "dev", "link0"]):
            _tool([*command, "del", "dev", "link0", "root"])
        if bits_per_second is not None:
            burst = max(bits_per_second // 8 // 250, 128 << 10)
            _tool(
                f"{' '.join(command)} add dev link0 root tbf rate {bits_per_second}bit "
                f"burst {burst} latency 50ms".split()
            )

    def freeze(self) -> list[int]:
        """SIGSTOP everything: a host that hangs. Its cables keep their carrier."""
        return _signal_all([self.inode], signal.SIGSTOP)

    def thaw(self) -> list[int]:
        """SIGCONT everything."""
        return _signal_all([self.inode], signal.SIGCONT)

    def kill_all(self) -> Death:
        """The death of the host: from one moment on nothing of it runs and nothing leaves it.

        Stopped first, cut off next and killed last: so no process reacts to the cables being pulled, and the
        kernel's farewells for the sockets of killed processes (FIN, RST) go nowhere, as those of a dead host.
        """
        began = time.monotonic_ns()
        self.freeze()
        self._set_ports(False)
        down = time.monotonic_ns()
        killed = _kill_until_gone([self.inode])
        return Death(began, down, time.monotonic_ns(), tuple(killed))

    def revive(self) -> None:
        """The dead host boots: a new, empty namespace, so no socket of its earlier life is left."""
        self.kill_all()
        self._demolish()
        self._build()

    def _demolish(self) -> None:
        self._cuts.clear()
        # The kernel takes a namespace down in the background, and the ports' names are needed again at once.
        for port in self.ports:
            _tool(["ip", "-n", self.network.namespace("switch"), "link", "del", port])
        _tool(["ip", "netns", "del", self.namespace])
        shutil.rmtree(SHARED_MEMORY / f"{self.network.prefix}-{self.name}", ignore_errors=True)


class TestNetwork:
    """Hosts, a client and a switch between them, as a context manager (`with` and `async with`).

    Attributes of use: `hosts` (by name), `client`, `directory` (for files of this run), `prefix`.
    """

    __test__ = False  # not a test, whatever pytest thinks of its name

    def __init__(
        self,
        hosts: Sequence[str] = ("host-a", "host-b"),
        *,
        taps: int = 1,
        keep: bool = False,
        side: bool = False,
    ) -> None:
        """`keep`: leave everything in place on exit, until remove_kept(). `side`: a further path."""
        for name in hosts:
            if len(name) > 10 or name in ("switch", "client"):
                raise TestbedError(
                    f"host name {name!r}: up to 10 characters, and neither 'switch' nor 'client'"
                )
        self.prefix = PREFIX + secrets.token_hex(3)
        self.taps = taps
        self.segments = SEGMENTS if side else SEGMENTS[:2]
        self.keep = keep
        self.hosts = {name: Host(self, name, 11 + number) for number, name in enumerate(hosts)}
        self.client = Client(self, "client", 200)
        self.directory = Path()
        self._record: _Record | None = None
        self._flags: _Flags

    def namespace(self, name: str) -> str:
        """Name of a node's namespace, as `ip netns` takes it."""
        return f"{self.prefix}-{name}"

    def start(self) -> Self:
        """Build everything. Raises TestbedError in one line when the machine does not allow it."""
        if os.geteuid() != 0:
            raise TestbedError("hosts are network namespaces, and making them needs root; you are not root")
        for tool in NEEDED:
            if shutil.which(tool) is None:
                raise TestbedError(f"{tool} is missing; install the Debian package iproute2")
        remove_stale()
        self.directory = Path(tempfile.mkdtemp(prefix=self.prefix + "-"))
        self._record = _Record(self.prefix, self.directory)
        atexit.register(self.close)
        try:
            switch = self.namespace("switch")
            _add_namespace(switch)
            for bridge in (f"br-{segment}" for segment in self.segments):
                _batch(
                    switch,
                    [
                        f"link add {bridge} type bridge forward_delay 0 stp_state 0 mcast_snooping 0",
                        f"link set {bridge} up",
                    ],
                )
            self._flags = _Flags(switch)
            for node in (*self.hosts.values(), self.client):
                node._build()
            self._record.write()
        except BaseException:
            self.keep = False
            self.close()
            raise
        return self

    def close(self) -> None:
        """Remove everything, whatever state it is in; safe to call twice."""
        if self._record is None:
            return
        record, self._record = self._record, None
        atexit.unregister(self.close)
        if hasattr(self, "_flags"):
            self._flags.close()
        if self.keep:
            record.write(kept=True)
        else:
            _remove(self.prefix, self.directory)
            record.path.unlink(missing_ok=True)
        record.close()

    def leftovers(self) -> list[str]:
        """What is still there of this run; empty after close()."""
        return leftovers(self.prefix, self.directory)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- what is there of a run, and its removal ----


class _Record:
    """The file that says that a run exists, locked as long as it lives."""

    def __init__(self, prefix: str, directory: Path) -> None:
        RUNS.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = RUNS / prefix
        self._directory = directory
        self._file = self.path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.write()

    def write(self, kept: bool = False) -> None:
        self._file.seek(0)
        self._file.truncate()
        json.dump({"directory": str(self._directory), "kept": kept}, self._file)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _namespaces(prefix: str) -> list[str]:
    if not NAMESPACES.is_dir():
        return []
    return sorted(path.name for path in NAMESPACES.iterdir() if path.name.startswith(prefix + "-"))


def _marked(prefix: str) -> list[int]:
    mark = f"{MARK}={prefix}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found


def control_groups() -> list[Path]:
    """The roots of all hierarchies of control groups: one, or one for each controller.

    Without that of cpuset, in which a new group has no processors and takes no process.
    """
    if (CONTROL_GROUPS / "cgroup.controllers").exists():
        return [CONTROL_GROUPS]
    return [
        path
        for path in sorted(CONTROL_GROUPS.glob("*"))
        if (path / "cgroup.procs").exists() and "cpuset" not in path.name and not path.is_symlink()
    ]


def _own_control_groups(prefix: str) -> list[Path]:
    return [path for group in control_groups() for path in group.glob(f"{prefix}-*")]


def _remove_control_group(group: Path, limit_s: float = 10.0) -> None:
    """Remove a group and those below it. A process that was killed is in its group until it is waited for."""
    deadline = time.monotonic() + limit_s
    for path in [*sorted(group.rglob("*/"), reverse=True), group]:
        while True:
            try:
                path.rmdir()
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise TestbedError(f"control group {path}: {error.strerror}") from None
                time.sleep(0.01)


def leftovers(prefix: str, directory: Path) -> list[str]:
    """Namespaces, processes, control groups and files of a run that are still there."""
    found = [f"namespace {name}" for name in _namespaces(prefix)]
    found += [f"process {pid}" for pid in _marked(prefix)]
    found += [f"control group {path}" for path in _own_control_groups(prefix)]
    found += [f"file {path}" for path in SHARED_MEMORY.glob(f"{prefix}*")]
    if directory != Path() and directory.exists():
        found.append(f"folder {directory}")
    return found


def _remove(prefix: str, directory: Path) -> None:
    names = _namespaces(prefix)
    # The inode numbers are looked up now: those of namespaces that are gone may mean somebody else's today.
    _kill_until_gone([(NAMESPACES / name).stat().st_ino for name in names])
    for name in names:
        _tool(["ip", "netns", "del", name])
    for group in _own_control_groups(prefix):
        _remove_control_group(group)
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if directory != Path():
        shutil.rmtree(directory, ignore_errors=True)


def _remove_runs(kept: bool) -> list[str]:
    """Remove runs that nobody holds: those that were left on purpose, or those that were not."""
    removed = []
    for path in RUNS.iterdir() if RUNS.is_dir() else ():
        if not path.name.startswith(PREFIX):
            continue
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    record = json.load(file)
                except ValueError:
                    record = {"directory": "", "kept": False}  # killed while it wrote the file
                if record["kept"] == kept:
                    _remove(path.name, Path(record["directory"]))
                    path.unlink(missing_ok=True)
                    removed.append(path.name)
        except OSError as error:
            # Somebody lives there, or somebody else removes it.
            if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
                raise
    return removed


def remove_stale() -> list[str]:
    """Remove what killed runs left behind; returns their prefixes. Runs that live or were kept stay."""
    return _remove_runs(kept=False)


def remove_kept() -> list[str]:
    """Remove runs that were left in place with `keep`; returns their prefixes."""
    return _remove_runs(kept=True)
