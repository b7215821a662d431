"""The test guests as a daemon's configuration describes them, and their consoles."""

import asyncio
import ctypes
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from testbed.hosts import GUEST_ADDRESS, GUEST_MAC, Host, TestbedError

ROOT = Path(__file__).parents[2]
KVM = Path("/dev/kvm")
# What an emulated processor would spend a fifth of the boot on: see guests/README.md.
FAST_BOOT = "mitigations=off nokaslr tsc=reliable no_timer_check cryptomgr.notests"

# Even with nothing to do, a build asks apt for the newest package, which takes a second or more.
_built: dict[str, Path] = {}


async def build(script: str) -> Path:
    """Run a build script of this repository, once in this process's life; returns the folder it prints.

    `script` is relative to the repository: guests/linux/build, guests/bare/build, scripts/build-qemu.
    """
    if script in _built:
        return _built[script]
    process = await asyncio.create_subprocess_exec(ROOT / script, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    lines = out.decode().split("\n")
    if process.returncode != 0 or not any(lines):
        raise TestbedError(f"{script} failed, see above")
    _built[script] = Path([line for line in lines if line][-1])
    return _built[script]


def hardware_virtualisation() -> bool:
    """Does KVM run guest code on the processor? Without these flags KVM emulates it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return bool({"vmx", "svm"} & set(line.split()))
    return False


@dataclass
class Guest:
    """A guest: which, how accelerated, and what its [machine] is on a host."""

    kind: Literal["linux", "bare"]
    accelerator: Literal["tcg", "kvm"]
    reason: str
    folder: Path
    vcpus: int = 1
    memory_mib: int = 256
    options: dict[str, str] = field(default_factory=dict)  # ftd.… of the kernel or opt/ftd/… of the firmware
    disks: list[dict[str, Any]] = field(
        default_factory=list
    )  # [[machine.disk]], with the name of a file as path

    def machine(self, host: Host, console: Path, qemu: Path) -> dict[str, Any]:
        """The [machine] table for one host."""
        table: dict[str, Any] = {
            "qemu": str(qemu),
            "type": "pc",
            "accelerator": self.accelerator,
            "vcpus": self.vcpus,
            "memory_mib": self.memory_mib,
            "memory_path": str(host.memory_directory),
            "console": str(console),
        }
        if self.disks:
            table["disk"] = [{**disk, "path": str(console.parent / disk["path"])} for disk in self.disks]
        if self.kind == "linux":
            words = {"ftd.ip": f"{GUEST_ADDRESS}/24", **{f"ftd.{k}": v for k, v in self.options.items()}}
            table["kernel"] = str(self.folder / "vmlinuz")
            table["initrd"] = str(self.folder / "initramfs.cpio")
            extra = " ".join(f"{name}={value}" for name, value in words.items())
            table["append"] = f"console=ttyS0 quiet panic=1 {FAST_BOOT} {extra}"
            table["nic"] = [{"tap": host.taps[0], "mac": GUEST_MAC, "model": "virtio-net-pci"}]
        else:
            table["arguments"] = ["-bios", str(self.folder / "ftd-bare.bin")]
            for name, value in self.options.items():
                table["arguments"] += ["-fw_cfg", f"name=opt/ftd/{name},string={value}"]
        return table


async def choose(accelerator: Literal["auto", "tcg", "kvm"] = "auto", **settings: Any) -> Guest:
    """The guest that shows most on this machine, and the reason. Builds it when needed."""
    hardware, device = hardware_virtualisation(), await asyncio.to_thread(KVM.exists)
    if accelerator == "kvm" and not device:
        raise TestbedError(f"{KVM} does not exist here; use --accel tcg")
    if accelerator == "kvm" and not hardware:
        reason = "KVM emulates the guest's code here (the processor has no vmx or svm), too slow for Linux"
        return Guest("bare", "kvm", reason, await build("guests/bare/build"), **settings)
    folder = await build("guests/linux/build")
    if device and hardware and accelerator != "tcg":
        return Guest("linux", "kvm", "the processor runs guests itself", folder, **settings)
    reason = "asked for"
    if accelerator == "auto":
        reason = "KVM emulates the guest's code here" if device else f"there is no {KVM}"
    return Guest("linux", "tcg", reason, folder, **settings)


_libc = ctypes.CDLL(None, use_errno=True)
IN_MODIFY, IN_CREATE, IN_MOVED_TO = 0x2, 0x100, 0x80


class Watch:
    """inotify on the folder of a file: wakes up when anything in it is written, created or moved there."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = IN_MODIFY | IN_CREATE | IN_MOVED_TO
        if self._descriptor < 0 or _libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot watch {folder}: {os.strerror(number)}")
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._wake)

    def _wake(self) -> None:
        os.read(self._descriptor, 65536)
        self._changed.set()

    async def changed(self) -> None:
        """Wait for the next change since the last call."""
        await self._changed.wait()
        self._changed.clear()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)


class Console:
    """Reads what a guest prints into a file, as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def text(self) -> str:
        """All that was printed so far."""
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def find_all(self, pattern: str) -> list[re.Match[str]]:
        """All places where the pattern (multi-line) is found."""
        return list(re.finditer(pattern, self.text(), re.MULTILINE))

    def skip(self) -> None:
        """wait_for() shall only look at what comes from now on."""
        self._offset = len(self.text())

    async def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first match after the last one that was waited for. TestbedError when none comes in time."""
        watch = Watch(self.path.parent)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    # Only whole lines, so that a number is not cut in two.
                    text = self.text()
                    whole = text[: text.rfind("\n") + 1]
                    if match := re.compile(pattern, re.MULTILINE).search(whole, self._offset):
                        self._offset = match.end()
                        return match
                    await watch.changed()
        except TimeoutError:
            last = self.text().strip().split("\n")[-1]
            raise TestbedError(
                f"{self.path}: no {pattern!r} within {timeout_s:g} s; last: {last!r}"
            ) from None
        finally:
            watch.close()


class Rounds:
    """Records when each `round N` of the bare-metal guest appears on a console: (monotonic ns, N)."""

    PATTERN = r"^round (\d+)"

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seen: list[tuple[int, int]] = []

    async def record(self) -> None:
        """Run as a task until cancelled. What is on the console already is left out."""
        self.console.skip()  # nobody knows when that was printed
        while True:
            match = await self.console.wait_for(self.PATTERN, 3600)
            self.seen.append((time.monotonic_ns(), int(match[1])))
