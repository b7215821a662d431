"""What a virtual machine is made of: compared between the two sides, checked for what cannot be protected.

Both sides describe their QEMU in the same words. If the descriptions differ, the shadow could not take the
primary's state, and that has to be found when the two meet, not at the takeover.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from ftd.config import MIB
from ftd.disk import is_image
from ftd.errors import ConfigError, QemuError
from ftd.monitor import Monitor


class MachineDescription(BaseModel):
    """One virtual machine as its QEMU tells it. Sent to the peer as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    qemu_version: str = Field(description="Version of QEMU, such as 10.0.13.")
    machine_type: str = Field(description="Machine type with its version, such as pc-i440fx-10.0-machine.")
    accelerator: str = Field(description="kvm or tcg.")
    cpu_model: str = Field(description="CPU model without flags, such as qemu64.")
    cpu_features: dict[str, int] = Field(description="Feature words of the first vCPU that are not zero.")
    vcpus: int = Field(description="Number of virtual processors.")
    memory_bytes: int = Field(description="Size of guest memory in bytes.")
    ram_blocks: dict[str, int] = Field(description="Maximal length in bytes of every RAM block, by name.")
    devices: dict[str, str] = Field(
        description="What is at each place: PCI address, device id, or built-in type."
    )
    disks: dict[str, int] = Field(
        default={}, description="Size in bytes of every disk that the guest can write to, by its device."
    )

    @classmethod
    async def of(cls, monitor: Monitor) -> Self:
        """Asks QEMU. Takes about 30 commands, some 10 ms; the guest is not disturbed."""
        version = (await monitor.execute("query-version"))["qemu"]
        cpus = await monitor.execute("query-cpus-fast")
        memory = await monitor.execute("query-memory-size-summary")
        first_cpu = cpus[0]["qom-path"]
        cpu_type = await monitor.execute("qom-get", path=first_cpu, property="type")
        return cls(
            qemu_version=f"{version['major']}.{version['minor']}.{version['micro']}",
            machine_type=await monitor.execute("qom-get", path="/machine", property="type"),
            accelerator="kvm" if (await monitor.execute("query-kvm"))["enabled"] else "tcg",
            cpu_model=re.sub(r"-(x86_64|i386)-cpu$", "", cpu_type),
            cpu_features=await _cpu_features(monitor, first_cpu),
            vcpus=len(cpus),
            memory_bytes=memory["base-memory"] + memory.get("plugged-memory", 0),
            ram_blocks=await _ram_blocks(monitor),
            devices=await _devices(monitor),
            disks={disk.name: disk.size for disk in await guest_disks(monitor)},
        )

    def differences(self, peer: MachineDescription) -> list[str]:
        """Returns why the state of one machine cannot be loaded into the other: one line each, or none."""
        lines = [
            f"{words}: {_shown(key, mine)} here, {_shown(key, theirs)} on the peer; {remedy}"
            for key, words, remedy in _SCALARS
            if (mine := getattr(self, key)) != (theirs := getattr(peer, key))
        ]
        if _series(self.qemu_version) != _series(peer.qemu_version):
            lines.append(
                f"QEMU: {self.qemu_version} here, {peer.qemu_version} on the peer; "
                "install the same series on both"
            )
        features = [
            word
            for word in sorted(self.cpu_features.keys() | peer.cpu_features.keys())
            if self.cpu_features.get(word, 0) != peer.cpu_features.get(word, 0)
        ]
        if features and self.cpu_model == peer.cpu_model:
            lines.append(
                f"CPU features of model {self.cpu_model} differ in {', '.join(features)}; "
                "set [machine] cpu to a model that both hosts offer, such as qemu64"
            )
        mine, theirs = (
            {name: f"{length} bytes" for name, length in side.ram_blocks.items()} for side in (self, peer)
        )
        lines += _mapping_differences("memory region", mine, theirs, "use the same firmware files on both")
        lines += _mapping_differences(
            "device",
            self.devices,
            peer.devices,
            "give both the same [[machine.nic]], [[machine.disk]] and arguments, in the same order",
        )
        mine, theirs = ({name: f"{size} bytes" for name, size in side.disks.items()} for side in (self, peer))
        lines += _mapping_differences(
            "disk", mine, theirs, "make both images the same size (truncate -s, lvresize)"
        )
        return lines


_SCALARS = (
    ("machine_type", "machine type", "set [machine] type the same on both"),
    ("accelerator", "accelerator", "set [machine] accelerator the same on both"),
    ("cpu_model", "CPU model", "set [machine] cpu the same on both"),
    ("vcpus", "vCPUs", "set [machine] vcpus the same on both"),
    ("memory_bytes", "memory", "set [machine] memory_mib the same on both"),
)


def _shown(key: str, value: object) -> str:
    if key == "memory_bytes" and isinstance(value, int) and value % MIB == 0:
        return f"{value // MIB} MiB"
    return str(value)


def _series(version: str) -> str:
    """The part of a version within which QEMU keeps the device state loadable: 10.0 of 10.0.13."""
    return ".".join(version.split(".")[:2])


def _mapping_differences(
    what: str, mine: Mapping[str, str], theirs: Mapping[str, str], remedy: str
) -> Iterator[str]:
    for name in sorted(mine.keys() | theirs.keys()):
        here, there = mine.get(name, "absent"), theirs.get(name, "absent")
        if here != there:
            yield f"{what} {name}: {here} here, {there} on the peer; {remedy}"


# ---- asking QEMU ------------------------------------------------------------------------------------------


async def _cpu_features(monitor: Monitor, cpu: str) -> dict[str, int]:
    features = {}
    for word in await monitor.execute("qom-get", path=cpu, property="feature-words"):
        if word["features"]:
            leaf = f"CPUID[{word['cpuid-input-eax']:#x}"
            if "cpuid-input-ecx" in word:
                leaf += f",{word['cpuid-input-ecx']}"
            features[f"{leaf}].{word['cpuid-register']}"] = word["features"]
    return features


async def _ram_blocks(monitor: Monitor) -> dict[str, int]:
    try:
        status = await monitor.execute("query-x-ft")
    except QemuError as error:
        if error.qmp_class != "CommandNotFound":
            raise
        # An unpatched QEMU can be looked at, but `require_patched` keeps it from being protected.
        return {}
    return {block["name"]: block["max-length"] for block in status["blocks"]}


async def _devices(monitor: Monitor) -> dict[str, str]:
    devices: dict[str, str] = {}
    for bus in await monitor.execute("query-pci"):
        devices.update(_pci_devices(bus["devices"]))
    for child in await _children(monitor, "/machine/peripheral"):
        path = f"/machine/peripheral/{child.name}"
        devices[f"id {child.name}"] = child.type + await _mac(monitor, path)
    anonymous = await _children(monitor, "/machine/peripheral-anon")
    for child in anonymous:
        path = f"/machine/peripheral-anon/{child.name}"
        devices[f"without id, {child.name}"] = child.type + await _mac(monitor, path)
    # Numbered in the order in which they were made, which says nothing: only how many there are counts.
    built_in = Counter(
        child.type
        for child in await _children(monitor, "/machine/unattached")
        if child.name.startswith("device[")
    )
    devices.update({f"built in, {type_}": f"{count} of it" for type_, count in built_in.items()})
    return devices


def _pci_devices(devices: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for device in devices:
        identity, kind = device["id"], device["class_info"].get("desc", "device")
        place = f"PCI {device['bus']:02x}:{device['slot']:02x}.{device['function']}"
        yield place, f"{identity['vendor']:04x}:{identity['device']:04x} {kind}"
        yield from _pci_devices(device.get("pci_bridge", {}).get("devices", []))


class _Child(NamedTuple):
    name: str
    type: str


async def _children(monitor: Monitor, path: str) -> list[_Child]:
    entries = await monitor.execute("qom-list", path=path)
    pairs = ((entry["name"], re.fullmatch(r"child<(.*)>", entry["type"])) for entry in entries)
    return sorted(_Child(name, match[1]) for name, match in pairs if match)


async def _mac(monitor: Monitor, path: str) -> str:
    try:
        return f", mac {(await monitor.execute('qom-get', path=path, property='mac')).lower()}"
    except QemuError as error:
        if not error.qmp_class:
            raise
        return ""  # not a network card


# ---- what cannot be protected -----------------------------------------------------------------------------

# Settings of ftd's own, and what to use in place of the argument.
_OWNED = {
    "m": "[machine] memory_mib",
    "mem-path": "[machine] memory_path",
    "mem-prealloc": "[machine] memory_path in a hugetlbfs",
    "smp": "[machine] vcpus",
    "cpu": "[machine] cpu",
    "machine": "[machine] type",
    "M": "[machine] type",
    "accel": "[machine] accelerator",
    "enable-kvm": "[machine] accelerator",
    "kernel": "[machine] kernel",
    "initrd": "[machine] initrd",
    "append": "[machine] append",
    "L": "[machine] firmware",
    "name": "[node] name",
}

_BYPASSES_QEMU = "moves data past QEMU, so that it cannot be held back until its epoch is committed"
_NOT_SAVED = "has state outside of QEMU, which cannot be taken to the backup"


class _Rule(NamedTuple):
    """Arguments that are refused: the options, what their value looks like, why, and the remedy."""

    options: frozenset[str] | None
    value: str
    reason: str
    remedy: str


_NETWORK = frozenset({"netdev", "nic", "net"})
_DISKS = frozenset(
    {"drive", "blockdev", "hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "pflash", "mtdblock"}
)
_RULES = (
    _Rule(
        _DISKS,
        r"^(?!.*(\bread-?only=on\b|\bmedia=cdrom\b))",
        "a disk that is given like this is not replicated, so a takeover would go on with another one",
        "use [[machine.disk]], or write readonly=on",
    ),
    _Rule(None, r"(^|,)vhost(force)?=on\b", _BYPASSES_QEMU, "write vhost=off"),
    _Rule(_NETWORK, r"^vhost-", _BYPASSES_QEMU, "use [[machine.nic]] or a tap without vhost"),
    _Rule(frozenset({"device"}), r"^vhost-", _BYPASSES_QEMU, "use the virtio device without vhost"),
    _Rule(frozenset({"device"}), r"^vfio-", _NOT_SAVED, "use an emulated or virtio device"),
    _Rule(frozenset({"device"}), r"^usb-(host|redir)\b", _NOT_SAVED, "use an emulated device"),
    _Rule(frozenset({"device"}), r"^ivshmem-", "shares memory that others write to", "remove it"),
    _Rule(frozenset({"device"}), r"^virtio-9p-", "changes files of this host only", "use [[machine.disk]]"),
    _Rule(frozenset({"fsdev", "virtfs"}), r"", "changes files of this host only", "use [[machine.disk]]"),
    _Rule(frozenset({"snapshot"}), r"", "keeps writes in a file that the backup lacks", "remove it"),
    _Rule(None, r"(^|,)snapshot=on\b", "keeps writes in a file that the backup lacks", "write snapshot=off"),
    _Rule(frozenset({"readconfig"}), r"", "hides settings from these checks", "write them as arguments"),
    _Rule(frozenset({"incoming", "loadvm"}), r"", "loads a state; the state is ftd's to load", "remove it"),
    _Rule(frozenset({"S", "preconfig"}), r"", "leaves the guest stopped; ftd starts it", "remove it"),
    _Rule(frozenset({"daemonize", "pidfile"}), r"", "is how ftd follows the process", "remove it"),
    _Rule(frozenset({"no-shutdown"}), r"", "hides the end of the guest", "remove it"),
)


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Checks `[machine] arguments`.

    Raises ConfigError with one line for each argument that ftd sets itself, or that gives the guest something
    that cannot be protected.
    """
    problems = []
    for option, value in _options(arguments):
        shown = f"-{option} {value}".rstrip()
        if option in _OWNED:
            problems.append(f"[machine] arguments: {shown}: ftd sets this itself; use {_OWNED[option]}")
            continue
        plain = _plain(value)
        for rule in _RULES:
            if (rule.options is None or option in rule.options) and re.search(rule.value, plain):
                problems.append(f"[machine] arguments: {shown}: {rule.reason}; {rule.remedy}")
                break
    if problems:
        raise ConfigError(problems)


def refuse_devices(description: MachineDescription) -> None:
    """Checks a machine that was not started by ftd.

    Raises QemuError naming the first device that cannot be protected.
    """
    for place, device in description.devices.items():
        for rule in _RULES:
            if rule.options == frozenset({"device"}) and re.search(rule.value, device):
                raise QemuError(
                    f"device {device} ({place}): {rule.reason}; {rule.remedy}, and start QEMU again"
                )


class GuestDisk(NamedTuple):
    """A disk that the guest can write to: its device, QEMU's name of the image, its file, its bytes."""

    name: str
    node_name: str
    path: Path
    size: int


async def guest_disks(monitor: Monitor) -> list[GuestDisk]:
    """Return the disks that the guest can write to, in the order in which both sides number them.

    Raises QemuError naming the first one that cannot be replicated.
    """
    disks = []
    for drive in await monitor.execute("query-block"):
        medium = drive.get("inserted")
        place = drive.get("qdev")
        if medium is None or medium["ro"] or not place:
            continue
        match = re.search(r"/(?:peripheral|peripheral-anon)/([^/]+)", place)
        name = match[1] if match else place
        file = medium.get("file", "?")
        if medium["drv"] != "raw":
            raise QemuError(
                f"disk {name} ({file}): is of format {medium['drv']}, and only raw images are replicated; "
                f"stop the guest, convert it with qemu-img convert -O raw, and start QEMU with format=raw"
            )
        path = Path(file)
        if not path.is_absolute() or not is_image(path):
            raise QemuError(
                f"disk {name} ({file}): is not a file or block device of this host; start QEMU with a raw "
                "image or a logical volume, given by its absolute path"
            )
        disks.append(GuestDisk(name, medium["node-name"], path, medium["image"]["virtual-size"]))
    return sorted(disks)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs each option, without its dashes, with its value, or with an empty one."""
    position = 0
    while position < len(arguments):
        option = arguments[position]
        position += 1
        if not option.startswith("-"):
            raise ConfigError(
                f"[machine] arguments: {option}: is not an option; each option and its value are strings "
                'of their own: ["-device", "virtio-rng-pci"]'
            )
        value = ""
        if position < len(arguments) and not arguments[position].startswith("-"):
            value = arguments[position]
            position += 1
        yield option.removeprefix("-").removeprefix("-"), value


def _plain(value: str) -> str:
    """Turns QEMU's JSON form of an argument into the other one: driver first, then `,key=value`."""
    if not value.lstrip().startswith("{"):
        return re.sub(r"^(driver|type)=", "", value)
    try:
        members = json.loads(value)
    except ValueError:
        return value  # QEMU will say what is wrong with it
    words = {True: "on", False: "off"}
    first = [str(members.pop(key)) for key in ("driver", "type", "qom-type") if key in members]
    return ",".join(
        first
        + [
            f"{key}={words.get(item, item) if isinstance(item, bool) else item}"
            for key, item in members.items()
        ]
    )
