"""The QEMU process: how it is started, found again, watched and ended.

QEMU is started in a session of its own and outlives ftd: a daemon that starts again attaches to it through
its QMP socket. Guest memory is a file in a memory file system, which both QEMU and the daemon map; it is
unlinked when QEMU has ended.

In the run folder of a node:

    qmp.sock        QMP for ftd              operator.sock   QMP for people and other programs
    qemu.pid        process id               qemu.log        what QEMU printed; qemu.log.1: the start before
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import ftd
from ftd.config import MIB, Config, Disk
from ftd.disk import check_image
from ftd.errors import HostError, QemuDied, QemuError, friendly
from ftd.machine import refuse_arguments
from ftd.monitor import Event, Monitor

log = logging.getLogger(__name__)

RAM_ID = "ftd-ram"
# struct sockaddr_un has 108 bytes, the last of which is zero.
LONGEST_SOCKET_PATH = 107
KVM = Path("/dev/kvm")
OWN_MEMORY_FILE = re.compile(r"ftd-.+-[0-9a-f]{8}\.ram")


@dataclass(frozen=True)
class Choices:
    """What of a command line depends on this host."""

    qemu: Path
    firmware: tuple[Path, ...]
    accelerator: str
    cpu: str
    # Size in bytes of each disk, and whether it is a block device, in the order of the configuration.
    disks: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class RunFiles:
    """The files of one QEMU in its run folder."""

    folder: Path

    @property
    def qmp_socket(self) -> Path:
        """QMP for ftd. It serves one client at a time."""
        return self.folder / "qmp.sock"

    @property
    def operator_socket(self) -> Path:
        """QMP for people and other programs."""
        return self.folder / "operator.sock"

    @property
    def pid_file(self) -> Path:
        """Process id, written and locked by QEMU."""
        return self.folder / "qemu.pid"

    @property
    def log(self) -> Path:
        """What QEMU printed."""
        return self.folder / "qemu.log"


# ---- the command line -------------------------------------------------------------------------------------


def command_line(
    config: Config, choices: Choices, *, incoming: bool, run_dir: Path, memory_file: Path
) -> list[str]:
    """Returns QEMU's argument vector. Depends on nothing but its arguments.

    `incoming`: QEMU waits with an empty machine until a state is loaded, as the shadow does.
    """
    machine, files = config.machine, RunFiles(run_dir)
    accelerator = choices.accelerator
    if accelerator == "kvm" and machine.dirty_ring_size:
        accelerator += f",dirty-ring-size={machine.dirty_ring_size}"
    memory = f"memory-backend-file,id={RAM_ID},share=on,size={machine.memory_bytes}"
    memory += f",mem-path={_escaped(memory_file)}"
    words: list[str | Path] = [choices.qemu]
    words += ["-name", f"guest={config.node.name},debug-threads=on"]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]
    words += ["-msg", "timestamp=on"]
    # A device whose state cannot be saved is refused at the start rather than at the first checkpoint.
    words += ["-only-migratable"]
    for folder in choices.firmware:
        words += ["-L", folder]
    words += [
        "-machine",
        f"{machine.type},memory-backend={RAM_ID}",
        "-accel",
        accelerator,
        "-cpu",
        choices.cpu,
    ]
    words += ["-smp", str(machine.vcpus), "-m", f"{machine.memory_mib}M", "-object", memory]
    if machine.kernel is not None:
        words += ["-kernel", machine.kernel]
        if machine.initrd is not None:
            words += ["-initrd", machine.initrd]
        if machine.append:
            words += ["-append", machine.append]
    # The serial port is there with and without a console file, so that both sides have the same devices.
    if machine.console is None:
        words += ["-serial", "null"]
    else:
        words += ["-chardev", f"file,id=console,path={_escaped(machine.console)},append=on"]
        words += ["-serial", "chardev:console"]
    for number, nic in enumerate(machine.nic):
        words += ["-netdev", f"tap,id=net{number},ifname={nic.tap},script=no,downscript=no,vhost=off"]
        # Without a boot ROM: it would be one more region of memory that must be equal on both hosts.
        words += ["-device", f"{nic.model},id=nic{number},netdev=net{number},mac={nic.mac.lower()},romfile="]
    for number, (disk, (size, device)) in enumerate(zip(machine.disk, choices.disks, strict=True)):
        words += _disk(number, disk, size, device)
    for path in (files.qmp_socket, files.operator_socket):
        words += ["-qmp", f"unix:{_escaped(path)},server=on,wait=off"]
    words += ["-pidfile", files.pid_file]
    if incoming:
        words += ["-incoming", "defer"]
    return [str(word) for word in (*words, *machine.arguments)]


def _disk(number: int, disk: Disk, size: int, device: bool) -> Iterator[str]:
    direct = disk.cache == "none"
    node = {
        "driver": "raw",
        "node-name": f"disk{number}",
        "cache": {"direct": direct, "no-flush": False},
        "discard": "unmap" if disk.discard else "ignore",
        "file": {
            "driver": "host_device" if device else "file",
            "filename": str(disk.path),
            "cache": {"direct": direct, "no-flush": False},
            "discard": "unmap" if disk.discard else "ignore",
            # Or a takeover waits for the kernel to write out what the daemon has put there.
            "drop-cache": False,
        },
    }
    yield from ("-blockdev", json.dumps(node))
    # The geometry would otherwise be guessed from the disk's first sector, which a shadow's disk may not have
    # yet.
    cylinders = min(16383, max(2, size // (512 * 16 * 63)))
    options = f"{disk.model},id=vd{number},drive=disk{number},cyls={cylinders},heads=16,secs=63"
    if disk.iothread:
        yield from ("-object", f"iothread,id=disk{number}-thread")
        options += f",iothread=disk{number}-thread"
    yield from ("-device", options)


def _escaped(path: Path) -> str:
    """QEMU ends a value at a comma unless it is doubled."""
    return str(path).replace(",", ",,")


# ---- what this host offers --------------------------------------------------------------------------------


async def choose(config: Config) -> Choices:
    """Finds out what depends on this host: QEMU, firmware, accelerator, CPU model.

    Raises HostError if something that the configuration asks for is not there.
    """
    machine = config.machine
    qemu = await find_qemu(machine.qemu)
    firmware = tuple(folder for folder in machine.firmware if folder.is_dir())
    if machine.firmware and not firmware:
        raise HostError(
            f"[machine] firmware: none of {', '.join(map(str, machine.firmware))} is a folder; "
            "install the firmware (on Debian: seabios, ipxe-qemu, qemu-system-data), or say where it is"
        )
    accelerator, reason = choose_accelerator(machine.accelerator)
    cpu = machine.cpu
    if not cpu:
        cpu = "qemu64"
        # Under tcg, qemu64 rather than max: it is the same in every version of QEMU, and Linux boots no
        # slower with its few features (2.3 to 3.2 s against 3.4 s when measured).
        if accelerator == "kvm" and await _host_cpu_works(qemu, machine.type, firmware):
            cpu = "host"
    log.info("QEMU %s with accelerator %s (%s) and CPU model %s", qemu, accelerator, reason, cpu)
    disks = tuple(
        (check_image(disk.path, name=f"vd{number}", exclusive=True), disk.path.is_block_device())
        for number, disk in enumerate(machine.disk)
    )
    return Choices(qemu, firmware, accelerator, cpu, disks)


async def find_qemu(path: Path | None) -> Path:
    """Returns the QEMU at `path`, or without one the QEMU that scripts/build-qemu has built.

    Raises HostError if there is none that can be run.
    """
    if path is not None:
        if not _is_program(path):
            raise HostError(f"[machine] qemu = {path}: is not a program; give the path of qemu-system-x86_64")
        return path
    script = Path(ftd.__file__).parents[1] / "scripts" / "build-qemu"
    if not script.is_file():
        raise HostError(
            "[machine] qemu is not set, and ftd runs outside of its source tree; give QEMU's path"
        )
    process = await asyncio.create_subprocess_exec(
        script, "--print", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    printed, _ = await process.communicate()
    built = Path(printed.decode().strip()) / "bin" / "qemu-system-x86_64"
    if process.returncode != 0 or not _is_program(built):
        raise HostError("the patched QEMU is not built yet; run scripts/build-qemu, or set [machine] qemu")
    return built


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def choose_accelerator(wanted: str, device: Path = KVM) -> tuple[str, str]:
    """Returns the accelerator, `kvm` or `tcg`, and why it was chosen.

    Raises HostError if `wanted` is kvm and the device cannot be opened.
    """
    if wanted == "tcg":
        return "tcg", "as configured"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        reason = f"{device}: {os.strerror(error.errno or 0).lower()}"
        if wanted == "kvm":
            remedy = (
                "load the module kvm_intel or kvm_amd, and switch virtualization on in the firmware"
                if isinstance(error, FileNotFoundError)
                else "add ftd's user to the group kvm"
            )
            raise HostError(f'{reason}; {remedy}, or set [machine] accelerator = "tcg"') from None
        return "tcg", reason
    return "kvm", "as configured" if wanted == "kvm" else f"{device} can be used"


async def _host_cpu_works(qemu: Path, machine_type: str, firmware: tuple[Path, ...]) -> bool:
    """Tries `-cpu host`: nested or emulated KVM lacks registers that it needs, and only QEMU can tell."""
    words: list[str | Path] = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "32M"]
    words += ["-machine", machine_type, "-accel", "kvm", "-cpu", "host", "-qmp", "stdio"]
    for folder in firmware:
        words += ["-L", folder]
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=null, stderr=null)
    try:
        async with asyncio.timeout(20):
            await process.communicate(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode == 0


# ---- the file that holds guest memory ---------------------------------------------------------------------


def memory_file_path(config: Config) -> Path:
    """Returns a new name for the file of guest memory, one that `remove_stale_memory_files` knows."""
    return config.machine.memory_path / f"ftd-{config.node.name}-{secrets.token_hex(4)}.ram"


def create_memory_file(path: Path, size: int) -> None:
    """Creates a sparse file of `size` bytes for guest memory, readable by its owner only.

    Raises HostError if it cannot be created, if the space is not there, or if `size` does not fit huge pages.
    """
    _check_space(path.parent, size)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot create the file for guest memory: {friendly(error)}") from None
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = str(path)
        raise HostError(f"cannot size the file for guest memory: {friendly(error)}") from None
    finally:
        os.close(fd)


def _check_space(folder: Path, size: int) -> None:
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise HostError(f"[machine] memory_path = {folder}: {friendly(OSError(error.errno, ''))}") from None
    kind = _file_system(folder)
    free = status.f_bavail * status.f_frsize
    unlimited = status.f_blocks == 0
    if kind == "hugetlbfs":
        page = status.f_bsize
        if size % page:
            fitting = -(-size // page) * page // MIB
            raise HostError(
                f"[machine] memory_mib = {size // MIB} is no multiple of the {page // MIB} MiB huge pages of "
                f"{folder}; give {fitting}"
            )
        pool = _free_huge_pages(page) * page
        free, unlimited = (pool if unlimited else min(free, pool)), False
    elif kind != "tmpfs":
        log.warning(
            "memory_path %s is on %s: guest memory will be written to its disk; give a tmpfs", folder, kind
        )
    if not unlimited and free < size:
        remedy = (
            "raise vm.nr_hugepages"
            if kind == "hugetlbfs"
            else f"enlarge it (mount -o remount,size=… {folder})"
        )
        raise HostError(
            f"{folder}: guest memory needs {size // MIB} MiB and {free // MIB} MiB are free; "
            f"{remedy}, or lower [machine] memory_mib"
        )


def _free_huge_pages(page: int) -> int:
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page // 1024}kB")
    try:
        free, reserved = ((pool / name).read_text() for name in ("free_hugepages", "resv_hugepages"))
    except OSError:
        return 0
    return int(free) - int(reserved)


def _file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, such as tmpfs."""
    device = folder.stat().st_dev
    kind = "an unknown file system"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        major, _, minor = left.split()[2].partition(":")
        if os.makedev(int(major), int(minor)) == device:
            kind = right.split()[0]
    return kind


def remove_stale_memory_files(config: Config) -> None:
    """Removes memory files of this node that no process maps any more: what a crash of both left behind."""
    hexadecimal = "[0-9a-f]" * 8
    for path in config.machine.memory_path.glob(f"ftd-{config.node.name}-{hexadecimal}.ram"):
        if not any(_maps(pid, path) for pid in Path("/proc").glob("[0-9]*")):
            log.warning("removing %s, left behind by an earlier QEMU", path)
            path.unlink(missing_ok=True)


def _maps(process: Path, file: Path) -> bool:
    try:
        return f" {file}\n" in (process / "maps").read_text(errors="replace")
    except OSError:
        return False  # it has ended, or is not ours to look at


# ---- the process ------------------------------------------------------------------------------------------


class QemuProcess:
    """A QEMU that runs, with the monitor connected. Made by `start` or `attach`; belongs to one event loop.

    `ended` is set once the process is gone; `exit_status` is then its exit code, or minus the signal, or None
    if it was not started by this daemon. Its memory file, if ftd made it, is unlinked at that moment.
    """

    def __init__(
        self, pid: int, monitor: Monitor, memory_files: Mapping[str, Path], *, child: _Child | None
    ) -> None:
        self.pid = pid
        self.monitor = monitor
        #: The files of guest memory, by the name of their RAM block.
        self.memory_files = dict(memory_files)
        self.attached = child is None
        #: QEMU's reason for its end, as its event SHUTDOWN says it; None until then.
        self.shutdown: str | None = None
        monitor.on("SHUTDOWN", self._on_shutdown)
        self._child = child or _Child(pid, ours=False)
        for path in self.memory_files.values():
            if OWN_MEMORY_FILE.fullmatch(path.name):
                self._child.unlink_at_end(path)

    @classmethod
    async def start(cls, config: Config, *, incoming: bool = False, timeout: float = 60.0) -> Self:
        """Starts QEMU as the configuration says, and returns when it answers on its monitor.

        Raises HostError if this machine lacks something, ConfigError for arguments that cannot be protected,
        and QemuError with QEMU's own last words if it ends at once. After a failure nothing is left behind.
        """
        refuse_arguments(config.machine.arguments)
        files = _prepare_run_folder(config.node.run_folder)
        choices = await choose(config)
        remove_stale_memory_files(config)
        memory_file = memory_file_path(config)
        create_memory_file(memory_file, config.machine.memory_bytes)
        words = command_line(
            config, choices, incoming=incoming, run_dir=files.folder, memory_file=memory_file
        )
        try:
            child = _spawn(words, files.log)
        except BaseException:
            memory_file.unlink(missing_ok=True)
            raise
        for path in (memory_file, files.qmp_socket, files.operator_socket, files.pid_file):
            child.unlink_at_end(path)
        try:
            monitor = await _first_answer(child, files, timeout)
        except BaseException:
            child.kill()
            await child.ended.wait()
            raise
        log.info("QEMU started: pid %d, guest memory in %s", child.pid, memory_file)
        return cls(child.pid, monitor, {RAM_ID: memory_file}, child=child)

    @classmethod
    async def attach(cls, path: Path) -> Self:
        """Connects to the QMP socket of a QEMU that runs already, whoever started it.

        Raises QemuError if nothing answers there, or if guest memory is not in files that ftd can map.
        """
        monitor = await Monitor.connect(path)
        try:
            pid = monitor.peer_pid
            memory_files = await _shared_memory_files(monitor)
            for file in memory_files.values():
                # Killing the wrong process must be impossible: a manager may have opened the socket for QEMU.
                if not _maps(Path(f"/proc/{pid}"), file):
                    raise QemuError(
                        f"{path}: process {pid}, which opened this socket, does not map {file}; "
                        "start QEMU so that it opens its QMP socket and its memory file itself"
                    )
            # After a restart in place it is still this process's to wait for.
            child = _Child(pid, ours=True) if _parent(pid) == os.getpid() else None
            process = cls(pid, monitor, memory_files, child=child)
            process.attached = True
        except BaseException:
            await monitor.close()
            raise
        log.info("attached to QEMU: pid %d", pid)
        return process

    @property
    def memory_file(self) -> Path:
        """The file of guest memory; the first, if there are several."""
        return next(iter(self.memory_files.values()))

    @property
    def ended(self) -> asyncio.Event:
        """Set when the process is gone."""
        return self._child.ended

    @property
    def exit_status(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs and for an attached one."""
        return self._child.exit_status

    def _on_shutdown(self, event: Event) -> None:
        self.shutdown = str(event.get("data", {}).get("reason", "unknown"))

    async def wait(self) -> int | None:
        """Waits until the process is gone, and returns `exit_status`."""
        await self.ended.wait()
        return self.exit_status

    async def kill(self) -> None:
        """Ends QEMU at once, and returns when it is gone. The guest learns nothing.

        Does nothing after `detach`.
        """
        if self._child.followed:
            self._child.kill()
            await self.ended.wait()
        await self.monitor.close()

    async def quit(self, timeout: float = 10.0) -> None:
        """Has QEMU write out its disks and end; kills it after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                with suppress(QemuDied):
                    await self.monitor.execute("quit")
                await self.ended.wait()
        except (TimeoutError, QemuError) as error:
            log.warning("QEMU %d does not quit (%s), killing it", self.pid, friendly(error))
        await self.kill()

    async def detach(self) -> None:
        """Lets go of QEMU, which goes on running with its guest."""
        self._child.let_go()
        await self.monitor.close()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def is_running(config: Config) -> bool:
    """Tells whether a QEMU of this node runs, which `QemuProcess.attach` can take over."""
    return listens(RunFiles(config.node.run_folder).qmp_socket)


async def require_patched(monitor: Monitor) -> None:
    """Raises QemuError unless QEMU has the commands of ftd's patches."""
    commands = {entry["name"] for entry in await monitor.execute("query-commands")}
    if "x-ft-begin" not in commands:
        raise QemuError(
            f"{monitor.path}: this QEMU lacks ftd's patches (no command x-ft-begin); "
            "build the patched one with scripts/build-qemu and run the guest in it"
        )


async def _shared_memory_files(monitor: Monitor) -> dict[str, Path]:
    """Returns the files of guest memory by block name, or raises QemuError if some is not in such a file."""
    remedy = (
        "start it with -object memory-backend-file,id=ftd-ram,mem-path=FILE,size=SIZE,share=on "
        "-machine …,memory-backend=ftd-ram, where FILE is a file in a tmpfs or hugetlbfs"
    )
    files: dict[str, Path] = {}
    for entry in await monitor.execute("qom-list", path="/objects"):
        name, kind = entry["name"], entry["type"]
        if not kind.startswith("child<memory-backend-"):
            continue
        path = f"/objects/{name}"
        if kind != "child<memory-backend-file>":
            raise QemuError(f"{monitor.path}: guest memory {name} is not in a file ({kind[6:-1]}); {remedy}")
        if not await monitor.execute("qom-get", path=path, property="share"):
            raise QemuError(
                f"{monitor.path}: guest memory {name} has share=off, so ftd cannot write it; {remedy}"
            )
        file = Path(await monitor.execute("qom-get", path=path, property="mem-path"))
        if not _is_file(file):
            raise QemuError(
                f"{monitor.path}: guest memory {name} is in {file}, which is not a file (any more); {remedy}"
            )
        files[name] = file
    if not files:
        raise QemuError(f"{monitor.path}: guest memory is private to QEMU; {remedy}")
    return files


def _is_file(path: Path) -> bool:
    return path.is_file()


def _prepare_run_folder(folder: Path) -> RunFiles:
    files = RunFiles(folder)
    longest = len(os.fsencode(files.operator_socket))
    if longest > LONGEST_SOCKET_PATH:
        raise HostError(
            f"[node] run_dir = {folder}: is {longest - LONGEST_SOCKET_PATH} bytes too long for its sockets; "
            "choose a shorter path"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if listens(files.qmp_socket):
            raise HostError(
                f"{files.qmp_socket}: a QEMU of this node runs already; attach to it, or end it first"
            )
        if files.log.exists():
            files.log.rename(files.log.with_name("qemu.log.1"))
    except OSError as error:
        raise HostError(f"[node] run_dir: {friendly(error)}") from None
    return files


def listens(path: Path) -> bool:
    """Tells whether somebody has opened a socket and not gone since."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True  # its queue is full of clients, so somebody has opened it
        except OSError:
            return False
    return True


def _spawn(words: list[str], log_file: Path) -> _Child:
    """Starts a program in a session of its own, so that no signal to ftd's terminal or group reaches it."""
    try:
        pid = os.posix_spawn(
            words[0],
            words,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            # Python ignores these, and a program inherits that.
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
    except OSError as error:
        raise HostError(f"cannot start QEMU: {friendly(OSError(error.errno, '', words[0]))}") from None
    with suppress(OSError):
        # A daemon without real-time priority has made itself less nice, which is inherited.
        os.setpriority(os.PRIO_PROCESS, pid, 0)
    return _Child(pid, ours=True)


async def _first_answer(child: _Child, files: RunFiles, timeout: float) -> Monitor:
    """Waits for QEMU's monitor, or for the end of QEMU, whichever comes first."""
    deadline = time.monotonic() + timeout
    delay = 0.005
    while True:
        try:
            return await Monitor.connect(files.qmp_socket, timeout=max(0.1, deadline - time.monotonic()))
        except QemuError as error:
            # This is the rule until QEMU has opened its socket: only the end of QEMU or of the time counts.
            if child.ended.is_set():
                raise QemuError(
                    f"QEMU ended at its start ({child.how_it_ended()}): {_last_words(files.log)}"
                ) from None
            if time.monotonic() > deadline:
                raise QemuError(
                    f"QEMU does not answer {timeout:g} s after its start ({error}); see {files.log}"
                ) from None
        with suppress(TimeoutError):
            await asyncio.wait_for(child.ended.wait(), delay)
        delay = min(delay * 1.5, 0.1)


def _last_words(log_file: Path) -> str:
    """The last line that QEMU printed, without the time and its own name."""
    try:
        lines = log_file.read_text(errors="replace").split("\n")
    except OSError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    last = re.sub(r"^\d{4}-\d\d-\d\dT[\d:.]+Z ", "", last)
    last = re.sub(r"^qemu-system-x86_64: ", "", last)
    return f"{last} (see {log_file})" if last else f"it printed nothing to {log_file}"


class _Child:
    """A process followed through a pidfd, which cannot come to mean another process."""

    def __init__(self, pid: int, *, ours: bool) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self.exit_status: int | None = None
        self._ours = ours
        self._unlink: set[Path] = set()
        self._loop = asyncio.get_running_loop()
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise HostError(f"cannot follow QEMU's process {pid}: {friendly(error)}") from None
        self._loop.add_reader(self._pidfd, self._on_end)

    @property
    def followed(self) -> bool:
        return self._pidfd >= 0

    def unlink_at_end(self, path: Path) -> None:
        self._unlink.add(path)

    def kill(self) -> None:
        if self.followed:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def let_go(self) -> None:
        if self.followed:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def how_it_ended(self) -> str:
        if self.exit_status is None:
            return "its exit status is not ours to know"
        if self.exit_status < 0:
            return signal.Signals(-self.exit_status).name
        return f"exit status {self.exit_status}"

    def _on_end(self) -> None:
        self.let_go()
        if self._ours:
            with suppress(ChildProcessError):  # somebody else in this process has waited for it
                _, status = os.waitpid(self.pid, 0)
                self.exit_status = os.waitstatus_to_exitcode(status)
        for path in self._unlink:
            path.unlink(missing_ok=True)
        self.ended.set()
