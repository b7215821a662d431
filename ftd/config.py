"""The configuration file: what each setting means, costs and defaults to, and which combinations are refused.

`load(path)` returns a `Config` or raises ConfigError with one line for each problem:

    FILE: [section] key = VALUE: what is wrong; what would be right

Only what can be told from the file alone is checked by `load`, so that a configuration can be checked on any
machine. Files and devices that it names are looked for by `check_files` and by those who use them.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ftd.errors import ConfigError, friendly

MIB = 1024 * 1024

# A pair that notices the death of its other half later than this is not what people mean by fault tolerance,
# and TCP connections of the guest's clients begin to give up.
LONGEST_DETECTION_SECONDS = 60.0

DEFAULT_FIRMWARE = (Path("/usr/share/seabios"), Path("/usr/share/qemu"), Path("/usr/lib/ipxe/qemu"))


class _WrongError(ValueError):
    """A relation between settings that does not hold: the key to blame, what is wrong, and the remedy."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def _from_the_files_folder(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return path if base is None else Path(base) / path


# A path; a relative one starts at the folder of the configuration file, whatever the daemon's own folder is.
ConfigPath = Annotated[Path, Strict(False), AfterValidator(_from_the_files_folder)]
Port = Annotated[int, Field(ge=1, le=65535)]
NonEmpty = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    # strict: 7788 and "7788" are different things, and `port = true` is a typing error, not port 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Node(_Section):
    """Who this daemon is."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,31}$",
        description="Name of this node: lower-case letters, digits and dashes, at most 32. Becomes part of "
        "folder names, metrics and log lines. Required.",
    )
    role: Literal["primary", "backup"] = Field(
        description="What this node starts as: `primary` runs the guest, `backup` holds its shadow. "
        "After a takeover the backup acts as the primary without a change here. Required."
    )
    state_dir: ConfigPath | None = Field(
        default=None,
        description="Folder for what must survive a reboot. Default: /var/lib/ftd/NAME.",
    )
    run_dir: ConfigPath | None = Field(
        default=None,
        description="Folder for sockets, the process id and the log of QEMU. Its path may have at most 90 "
        "characters, because the kernel limits socket names. Default: /run/ftd/NAME.",
    )

    @property
    def state_folder(self) -> Path:
        """`state_dir`, or its default."""
        return self.state_dir or Path("/var/lib/ftd") / self.name

    @property
    def run_folder(self) -> Path:
        """`run_dir`, or its default."""
        return self.run_dir or Path("/run/ftd") / self.name


class Link(_Section):
    """How the two nodes reach each other."""

    listen: NonEmpty = Field(description="Address of this node on the link between the two. Required.")
    peer: NonEmpty = Field(description="Address of the other node on that link. Required.")
    port: Port = Field(
        default=7788,
        description="TCP port of frames and control messages: the backup listens on it, the primary connects "
        "to it. The same on both nodes. Default: 7788.",
    )
    heartbeat_port: Port = Field(
        default=7789,
        description="TCP port of heartbeats, which have a connection of their own so that none waits behind "
        "a frame. The same on both nodes. Default: 7789.",
    )
    certificate: ConfigPath | None = Field(
        default=None, description="This node's certificate, a PEM file. Needed unless insecure."
    )
    key: ConfigPath | None = Field(
        default=None,
        description="The private key of `certificate`, a PEM file. Needed unless insecure.",
    )
    authority: ConfigPath | None = Field(
        default=None,
        description="Certificate of the authority that must have signed the peer's, a PEM file. "
        "Needed unless insecure.",
    )
    peer_name: str = Field(
        default="",
        description="Name that the peer's certificate must carry. Default: the address in `peer`.",
    )
    insecure: bool = Field(
        default=False,
        description="Run without TLS. Whoever reaches the ports can then read and replace the guest's "
        "memory: only for a cable between the two hosts, or for tests. Default: false.",
    )

    @property
    def expected_peer_name(self) -> str:
        """`peer_name`, or its default."""
        return self.peer_name or self.peer

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port == self.heartbeat_port:
            raise _WrongError(
                "heartbeat_port",
                f"is also [link] port; give the two different ports, such as {_beside(self.port)}",
            )
        files = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        if self.insecure:
            for key, path in files.items():
                if path is not None:
                    raise _WrongError(key, "is of no use with insecure = true; remove the one or the other")
        else:
            for key, path in files.items():
                if path is None:
                    raise _WrongError(
                        key,
                        "is missing; give a PEM file, or set insecure = true on a link that nobody else can "
                        "reach",
                    )
        return self


class Heartbeat(_Section):
    """How fast the loss of the other node is noticed: after `interval_ms` × `misses`."""

    interval_ms: int = Field(
        default=50,
        ge=5,
        le=10_000,
        description="Milliseconds between two heartbeats. Each costs one small packet in both directions. "
        "Default: 50.",
    )
    misses: int = Field(
        default=6,
        ge=2,
        le=100,
        description="Heartbeats in a row that may be missing before the peer is taken for lost. Fewer notice "
        "a loss sooner and mistake a busy host or network for a dead one more often. Default: 6.",
    )

    @property
    def detection_seconds(self) -> float:
        """Silence after which the peer is taken for lost, in seconds."""
        return self.interval_ms * self.misses / 1000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.detection_seconds > LONGEST_DETECTION_SECONDS:
            raise _WrongError(
                "misses",
                f"with interval_ms = {self.interval_ms} notices a loss after {self.detection_seconds:g} s; "
                f"keep interval_ms × misses within {LONGEST_DETECTION_SECONDS:g} s",
            )
        return self


class Epoch(_Section):
    """How often the guest is checkpointed."""

    length_ms: int = Field(
        default=20,
        ge=5,
        le=10_000,
        description="Milliseconds that the guest runs between two checkpoints. Every answer of the guest "
        "waits half an epoch on average, so shorter ones lower latency; each costs a pause, so "
        "longer ones raise throughput. With mode `auto`, the length to begin with. Default: 20.",
    )
    mode: Literal["fixed", "auto"] = Field(
        default="fixed",
        description="`fixed`: epochs of `length_ms`. `auto`: the shortest ones that keep the guest's "
        "slowdown under `slowdown_percent`, but never such that output waits longer than `latency_ms`: if "
        "not both can be had, latency wins. Default: fixed.",
    )
    slowdown_percent: int = Field(
        default=10,
        ge=1,
        le=90,
        description="With mode `auto`: the share of its time that the guest may spend in pauses. "
        "Default: 10.",
    )
    latency_ms: int = Field(
        default=100,
        ge=5,
        le=60_000,
        description="With mode `auto`: the milliseconds that output may wait because of protection, from the "
        "beginning of an epoch until its commit. Default: 100.",
    )
    shortest_ms: int = Field(
        default=10,
        ge=5,
        le=10_000,
        description="With mode `auto`: no epoch is made shorter than this, whatever the latency is. Shorter "
        "ones cost both nodes more processor time. Default: 10.",
    )
    longest_ms: int = Field(
        default=500,
        ge=5,
        le=10_000,
        description="With mode `auto`: no epoch is made longer than this, whatever the slowdown is. "
        "Default: 500.",
    )
    speculative: Literal["off", "auto", "always"] = Field(
        default="off",
        description="Send pages before the epoch is over, so that the pause copies only what was dirtied "
        "again: `auto` does so while it pays, `always` for measurements. Costs a write fault of the guest "
        "and bytes on the link for each page that is dirtied again. Default: off.",
    )
    in_flight_mib: int = Field(
        default=256,
        ge=1,
        le=65_536,
        description="MiB of frames that may be under way to the backup: a checkpoint waits whose frame, if "
        "as large as the last one, would not fit beside them. More rides out longer hiccups of the "
        "network, and costs as much memory on the backup. "
        "At least [staging] slot_mib. Default: 256.",
    )
    verify_every: int = Field(
        default=0,
        ge=0,
        description="Compare all of guest memory on both nodes at every N-th epoch. Reading it all lengthens "
        "that pause (about 0.1 s for each GiB). 0: only when asked by `ftd verify`. Default: 0.",
    )
    tracker: Literal["auto", "ring", "ring-stock", "bitmap"] = Field(
        default="auto",
        description="How dirty pages are found. `ring`: straight from KVM's dirty rings, so that the pause "
        "does not grow with memory. `bitmap` and `ring-stock`: as QEMU's migration does it, with one thread "
        "doing everything in the pause; they are there to compare with. `auto`: the best that there is, "
        "which `ftd status` names: ring, KVM's bitmap with [machine] dirty_ring_size = 0, QEMU's own bitmaps "
        "(`generic`) under tcg. Default: auto.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "fixed":
            return self
        if self.shortest_ms > self.longest_ms:
            raise _WrongError(
                "longest_ms",
                f"is less than shortest_ms = {self.shortest_ms}; give at least {self.shortest_ms}",
            )
        if self.latency_ms <= self.shortest_ms:
            raise _WrongError(
                "latency_ms",
                f"cannot be held by epochs of shortest_ms = {self.shortest_ms} or more; give more than "
                f"{self.shortest_ms}, or shorter epochs",
            )
        if not self.shortest_ms <= self.length_ms <= self.longest_ms:
            raise _WrongError(
                "length_ms",
                f"is what mode auto begins with; give a number from shortest_ms = {self.shortest_ms} "
                f"to longest_ms = {self.longest_ms}",
            )
        return self


class Staging(_Section):
    """The buffers into which QEMU copies what changed: `slots` × `slot_mib` of memory on the primary."""

    slots: int = Field(
        default=3,
        ge=2,
        le=16,
        description="Number of buffers. One fills while the others are sent. Default: 3.",
    )
    slot_mib: int = Field(
        default=64,
        ge=4,
        le=4096,
        description="MiB of changed pages that one buffer holds. A checkpoint with more takes a second "
        "buffer and a longer pause. Default: 64.",
    )
    copy_threads: int = Field(
        default=2,
        ge=1,
        le=16,
        description="Threads that copy pages during the pause. More than the memory channels can feed gain "
        "nothing. Default: 2.",
    )


class Disks(_Section):
    """How the guest's disks are replicated; without effect for a guest that has none."""

    journal_mib: int = Field(
        default=32,
        ge=1,
        le=256,
        description="MiB that the guest may write to its disks in an epoch before it has to wait. Each "
        "staging slot is larger by as much. Default: 32.",
    )
    sync_mib_per_s: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="MiB a second that the copy of disks may send, so that others on the link find room. "
        "0: as fast as it goes. Default: 0.",
    )
    apply: Literal["committed", "early", "never"] = Field(
        default="committed",
        description="When the backup repeats what the guest wrote. `committed`: with its epoch. The others "
        "damage the disk at a takeover, and are for tests that show just this: `early` is an epoch ahead of "
        "memory, `never` does not. Default: committed.",
    )


class Output(_Section):
    """The guest's network output, which is held until its epoch is committed."""

    limit_mib: int = Field(
        default=64,
        ge=1,
        le=65_536,
        description="MiB of packets that are held for each network queue before the guest has to wait. "
        "Default: 64.",
    )
    hold: bool = Field(
        default=True,
        description="Hold output until its epoch is committed. Without that, clients see answers that a "
        "takeover undoes: false is for tests that show just this. Default: true.",
    )


class Nic(_Section):
    """A network card of the guest. The backup needs the same cards in the same order."""

    tap: str = Field(
        pattern=r"^[^\s/,:]{1,15}$",
        description="Tap interface on this host that carries the card's traffic; it must exist. ftd sets it "
        "up where the guest runs, and down where it only waits. Required.",
    )
    mac: str = Field(
        pattern=r"^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$",
        description="Hardware address of the card, the same on both nodes, such as 52:54:00:12:34:56. "
        "Required.",
    )
    model: str = Field(
        default="virtio-net-pci",
        pattern=r"^[a-z0-9][a-z0-9-]*$",
        description="QEMU's name of the card. Default: virtio-net-pci.",
    )


class Disk(_Section):
    """A disk that the guest can write to. The backup needs the same disks in the same order."""

    path: ConfigPath = Field(
        description="Raw image or block device on this host; it must exist, and have the same size on both. "
        "On the backup it is overwritten. Required.",
    )
    model: str = Field(
        default="virtio-blk-pci",
        pattern=r"^[a-z0-9][a-z0-9-]*$",
        description="QEMU's name of the disk. Default: virtio-blk-pci.",
    )
    cache: Literal["none", "writeback"] = Field(
        default="none",
        description="`none`: what the guest writes goes past this host's page cache; `writeback`: it goes "
        "into it, for file systems that cannot do otherwise. Both are safe. Default: none.",
    )
    discard: bool = Field(
        default=True,
        description="Give space back that the guest discards. What it discarded reads as zeros. "
        "Default: true.",
    )
    iothread: bool = Field(
        default=False,
        description="Serve the disk in a thread of its own. Only for virtio disks. Default: false.",
    )


class Machine(_Section):
    """The virtual machine.

    All must match the peer, but `qemu`, `firmware`, `memory_path`, `console`, `attach`, `tap` of a card, and
    `path`, `cache` and `discard` of a disk.
    """

    qemu: ConfigPath | None = Field(
        default=None,
        description="The patched qemu-system-x86_64. Default: the one that scripts/build-qemu has built.",
    )
    firmware: tuple[ConfigPath, ...] = Field(
        default=DEFAULT_FIRMWARE,
        strict=False,
        description="Folders in which QEMU looks for the guest's firmware; missing ones are skipped. "
        f"Default: {', '.join(map(str, DEFAULT_FIRMWARE))} (where Debian puts it).",
    )
    type: str = Field(
        default="pc",
        pattern=r"^[a-z0-9][a-z0-9.-]*$",
        description="QEMU's machine type. Default: pc.",
    )
    accelerator: Literal["auto", "kvm", "tcg"] = Field(
        default="auto",
        description="`kvm` runs the guest on the processor, `tcg` translates its code (10 to 50 times "
        "slower). `auto`: kvm where /dev/kvm can be used, else tcg. Default: auto.",
    )
    dirty_ring_size: int = Field(
        default=65_536,
        ge=0,
        le=65_536,
        description="Entries of KVM's dirty ring for each vCPU, a power of two from 1024; 16 bytes each. A "
        "ring that is too small for an epoch stops the vCPU early. 0: use KVM's dirty bitmap. "
        "Without effect under tcg. Default: 65536.",
    )
    cpu: str = Field(
        default="",
        pattern=r"^(\S.*)?$",
        description="QEMU's CPU model with its flags. Default: under kvm `host` if it works here, else "
        "`qemu64`; under tcg `qemu64`. Set it when the two hosts have different processors.",
    )
    vcpus: int = Field(default=1, ge=1, le=255, description="Number of virtual processors. Default: 1.")
    memory_mib: int = Field(
        default=256,
        ge=1,
        le=16 * 1024 * 1024,
        description="MiB of guest memory, taken from `memory_path` on both nodes. Default: 256.",
    )
    memory_path: ConfigPath = Field(
        default=Path("/dev/shm"),
        description="Folder in a memory file system (tmpfs or hugetlbfs) for the file that holds the "
        "guest's memory. Huge pages make the guest faster and the start slower. Default: "
        "/dev/shm.",
    )
    kernel: ConfigPath | None = Field(
        default=None,
        description="Linux kernel or multiboot image to boot. Default: boot as the firmware does.",
    )
    initrd: ConfigPath | None = Field(
        default=None, description="Initial RAM disk for `kernel`. Default: none."
    )
    append: str = Field(default="", description="Command line for `kernel`. Default: empty.")
    console: ConfigPath | None = Field(
        default=None,
        description="File that receives what the guest writes to its first serial port. This output is not "
        "held back until commit: after a takeover some lines may be there twice. Default: none.",
    )
    arguments: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='More arguments for QEMU, one string each: ["-device", "virtio-rng-pci"]. What cannot be '
        "protected is refused. Default: none.",
    )
    nic: tuple[Nic, ...] = Field(
        default=(), strict=False, description="Network cards, each a [[machine.nic]]. Default: none."
    )
    disk: tuple[Disk, ...] = Field(
        default=(),
        strict=False,
        description="Disks that the guest can write to, each a [[machine.disk]]. Default: none.",
    )
    attach: ConfigPath | None = Field(
        default=None,
        description="QMP socket of a QEMU that runs already, to be protected instead of starting one. Only "
        "on the primary; the other settings of [machine] then say what the backup would start. "
        "Default: start one.",
    )

    @property
    def memory_bytes(self) -> int:
        """Size of guest memory in bytes."""
        return self.memory_mib * MIB

    @model_validator(mode="after")
    def _check(self) -> Self:
        ring = self.dirty_ring_size
        if ring and (ring < 1024 or ring & (ring - 1)):
            nearest = min(max(1024, 1 << ring.bit_length()), 65_536)
            raise _WrongError(
                "dirty_ring_size",
                f"is not a power of two from 1024 to 65536; {nearest} would be, or 0 for the bitmap",
            )
        for key, value in (("initrd", self.initrd), ("append", self.append)):
            if value and self.kernel is None:
                raise _WrongError(key, "needs a kernel; set [machine] kernel, or remove it")
        for what in ("mac", "tap"):
            values = [getattr(nic, what).lower() for nic in self.nic]
            for position, value in enumerate(values):
                if value in values[:position]:
                    raise _WrongError(
                        f"nic.{position}.{what}",
                        f"is that of number {values.index(value) + 1}, too; give each its own",
                    )
        paths = [disk.path for disk in self.disk]
        for position, disk in enumerate(self.disk):
            if disk.path in paths[:position]:
                raise _WrongError(
                    f"disk.{position}.path",
                    f"is that of number {paths.index(disk.path) + 1}, too; give each its own",
                )
            if disk.iothread and not disk.model.startswith("virtio-"):
                raise _WrongError(
                    f"disk.{position}.iothread", "is for virtio disks only; remove it, or the other model"
                )
        return self


class Http(_Section):
    """Metrics, health and status over HTTP. Anybody who reaches it can read them."""

    listen: NonEmpty = Field(
        default="127.0.0.1", description="Address on which to answer. Default: 127.0.0.1, this machine only."
    )
    port: Port = Field(default=9105, description="TCP port. Default: 9105.")


class Arbiter(_Section):
    """Who decides which side may run the guest when the two lose sight of each other."""

    kind: Literal["etcd", "file", "none"] = Field(
        default="none",
        description="`etcd`: a key of an etcd cluster, best with three members of which at most one is on a "
        "host of the pair. `file`: a folder that both hosts mount. `none`: nobody. Each side believes its "
        "own eyes: when only the link between the two fails, both run the guest. Default: none.",
    )
    pair: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9-]{0,31})?$",
        description="Name of the pair, the same on both nodes and no other pair's with this arbiter: "
        "lower-case letters, digits and dashes, at most 32. Needed with etcd and file. Default: none.",
    )
    accept_split_brain: bool = Field(
        default=False,
        description="Says that you know what `none` means. Required to be true with it. Default: false.",
    )
    timeout_ms: int = Field(
        default=1000,
        ge=50,
        le=60_000,
        description="Milliseconds for one question. Without an answer this side holds the guest's output "
        "and asks again; too short a time asks an arbiter that is only busy again and again. Default: 1000.",
    )
    endpoints: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='Client URLs of etcd\'s members: ["https://10.0.0.3:2379", …]. One that answers is '
        "enough; the next is asked when one has been silent for 150 ms. Needed with etcd. Default: none.",
    )
    authority: ConfigPath | None = Field(
        default=None,
        description="Certificate of the authority that must have signed etcd's, a PEM file. Default: the "
        "authorities that this host trusts.",
    )
    certificate: ConfigPath | None = Field(
        default=None,
        description="This node's certificate for etcd, a PEM file, if etcd asks for one. Default: none.",
    )
    key: ConfigPath | None = Field(
        default=None, description="The private key of `certificate`, a PEM file. Default: none."
    )
    user: str = Field(default="", max_length=255, description="User of etcd, if it has users. Default: none.")
    password_file: ConfigPath | None = Field(
        default=None,
        description="File whose first line is the password of `user`; readable by ftd alone. Default: none.",
    )
    folder: ConfigPath | None = Field(
        default=None,
        description="Folder on storage that both hosts mount, and that neither of them serves. Needed with "
        "file. Default: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "none" and not self.accept_split_brain:
            raise _WrongError(
                "accept_split_brain",
                "without an arbiter a broken link lets both nodes run the guest; set [arbiter] kind to etcd "
                "or file, or accept_split_brain = true if you accept that",
            )
        if self.kind != "none" and self.accept_split_brain:
            raise _WrongError(
                "accept_split_brain",
                f'has no place beside kind = "{self.kind}", which lets no brain split; remove it',
            )
        if self.kind != "none" and not self.pair:
            raise _WrongError("pair", f'is needed with kind = "{self.kind}"; give the pair a name')
        own: dict[str, tuple[str, object]] = {
            "endpoints": ("etcd", self.endpoints),
            "authority": ("etcd", self.authority),
            "certificate": ("etcd", self.certificate),
            "key": ("etcd", self.key),
            "user": ("etcd", self.user),
            "password_file": ("etcd", self.password_file),
            "folder": ("file", self.folder),
        }
        for name, (kind, value) in own.items():
            if value and kind != self.kind:
                raise _WrongError(name, f'belongs to kind = "{kind}" and this is "{self.kind}"; remove it')
        if self.kind == "file" and self.folder is None:
            raise _WrongError("folder", "is missing; give a folder on storage that both hosts mount")
        if self.kind == "etcd":
            self._check_etcd()
        return self

    def _check_etcd(self) -> None:
        if not self.endpoints:
            raise _WrongError("endpoints", 'is missing; give etcd\'s client URLs: ["http://10.0.0.3:2379"]')
        for number, endpoint in enumerate(self.endpoints):
            if not re.fullmatch(r"https?://[^\s/?#@]+/?", endpoint):
                raise _WrongError(
                    f"endpoints.{number}", "is no URL of an etcd member; give http(s)://HOST:PORT"
                )
        secure = [endpoint.startswith("https://") for endpoint in self.endpoints]
        if any(secure) != all(secure):
            raise _WrongError("endpoints", "mixes http and https; give URLs of one kind")
        if not all(secure):
            for name in ("authority", "certificate", "key"):
                if getattr(self, name) is not None:
                    raise _WrongError(name, "is of no use with http:// endpoints; give https:// ones")
        for one, other in (("certificate", "key"), ("key", "certificate")):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise _WrongError(other, f"is missing; {one} needs it")
        if self.user and self.password_file is None:
            raise _WrongError("password_file", "is missing; user needs it")
        if self.password_file is not None and not self.user:
            raise _WrongError("user", "is missing; password_file is a user's")


class Config(_Section):
    """A whole configuration file, checked."""

    node: Node
    link: Link
    heartbeat: Heartbeat = Heartbeat()
    epoch: Epoch = Epoch()
    staging: Staging = Staging()
    disks: Disks = Disks()
    output: Output = Output()
    machine: Machine = Machine()
    http: Http = Http()
    arbiter: Arbiter

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epoch.in_flight_mib < self.staging.slot_mib:
            raise _WrongError(
                "epoch.in_flight_mib",
                f"is less than one slot ([staging] slot_mib = {self.staging.slot_mib}), so that a full one "
                f"could never be sent; give at least {self.staging.slot_mib}",
            )
        if self.epoch.speculative != "off" and self.epoch.in_flight_mib < 2 * self.staging.slot_mib:
            raise _WrongError(
                "epoch.in_flight_mib",
                f"is less than two slots ([staging] slot_mib = {self.staging.slot_mib}), which a frame may "
                f"fill with speculative transfer; give at least {2 * self.staging.slot_mib}, or set "
                '[epoch] speculative = "off"',
            )
        if self.epoch.speculative != "off" and self.staging.slots < 3:
            raise _WrongError(
                "staging.slots",
                "is too few for speculative transfer, which needs one beside that of the checkpoint and "
                'the one being sent; give at least 3, or set [epoch] speculative = "off"',
            )
        tracker, machine = self.epoch.tracker, self.machine
        if tracker != "auto" and machine.accelerator == "tcg":
            raise _WrongError(
                "epoch.tracker", 'is for kvm, and [machine] accelerator is "tcg"; give "auto", or remove it'
            )
        if tracker == "bitmap" and machine.dirty_ring_size:
            raise _WrongError(
                "epoch.tracker", "needs KVM's dirty bitmap; set [machine] dirty_ring_size = 0 as well"
            )
        if tracker in ("ring", "ring-stock") and not machine.dirty_ring_size:
            raise _WrongError(
                "epoch.tracker",
                "needs KVM's dirty rings, and [machine] dirty_ring_size is 0; give 65536 there, or remove it",
            )
        for key in ("port", "heartbeat_port"):
            if getattr(self.link, key) == self.http.port:
                raise _WrongError(
                    "http.port", f"is also [link] {key}; choose another, such as {_beside(self.http.port)}"
                )
        if self.machine.attach is not None and self.node.role == "backup":
            raise _WrongError(
                "machine.attach", 'is for the primary only; remove it, or set [node] role = "primary"'
            )
        return self


def load(path: Path | str) -> Config:
    """Reads and checks a configuration file.

    Raises ConfigError with every problem found, one line each.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(friendly(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_problem(path, text, error)) from None
    # Otherwise the answer to a missing section would not say what has to be decided.
    data.setdefault("arbiter", {})
    try:
        return Config.model_validate(data, context={"base": path.absolute().parent})
    except ValidationError as error:
        raise ConfigError([_problem(path, data, detail) for detail in error.errors()]) from None


def check_files(config: Config) -> None:
    """Looks for every file that the configuration names, on this machine.

    Raises ConfigError with one line for each that cannot be read.
    """
    named = {
        "[link] certificate": config.link.certificate,
        "[link] key": config.link.key,
        "[link] authority": config.link.authority,
        "[machine] qemu": config.machine.qemu,
        "[machine] kernel": config.machine.kernel,
        "[machine] initrd": config.machine.initrd,
        "[arbiter] authority": config.arbiter.authority,
        "[arbiter] certificate": config.arbiter.certificate,
        "[arbiter] key": config.arbiter.key,
        "[arbiter] password_file": config.arbiter.password_file,
        **{
            f"[[machine.disk]] number {number}, path": disk.path
            for number, disk in enumerate(config.machine.disk, 1)
        },
    }
    problems = []
    for key, path in named.items():
        if path is None:
            continue
        try:
            path.open("rb").close()
        except OSError as error:
            problems.append(f'{key} = "{path}": {friendly(OSError(error.errno, ""))}')
    if not config.machine.memory_path.is_dir():
        problems.append(
            f'[machine] memory_path = "{config.machine.memory_path}": is not a folder; '
            "give one in a tmpfs or hugetlbfs"
        )
    if problems:
        raise ConfigError(problems)


# ---- the words of an error --------------------------------------------------------------------------------


def _syntax_problem(path: Path, text: str, error: tomllib.TOMLDecodeError) -> str:
    # Before Python 3.14 only the message has the place: "… (at line 3, column 7)", "… (at end of document)".
    match = re.fullmatch(r"(?s)(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error))
    message, line, column = match.groups() if match else (str(error), None, None)
    number = int(line) if line else text.count("\n") + 1
    lines = text.splitlines() or [""]
    quoted = lines[min(number, len(lines)) - 1].strip()
    place = f"line {number}" + (f", column {column}" if column else " (end of file)")
    return f"{path}: {place}: {message} in `{quoted}`; correct the TOML syntax there"


def _problem(path: Path, data: dict[str, Any], detail: ErrorDetails) -> str:
    location = list(detail["loc"])
    wrong = detail.get("ctx", {}).get("error")
    if isinstance(wrong, _WrongError):
        location += [int(part) if part.isdigit() else part for part in wrong.key.split(".")]
    where = _where(location)
    value = _value_at(data, location)
    if value is not _ABSENT:
        where += f" = {_shown(value)}"
    return f"{path}: {where}: {_explanation(location, detail, value)}"


def _explanation(location: list[int | str], detail: ErrorDetails, value: object) -> str:
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return f"is missing; {_hint(location)}"
    if kind == "extra_forbidden":
        what = "section" if len(location) == 1 and isinstance(value, dict) else "key"
        known = list(_keys_at(location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown {what}; {remedy}"
    if kind == "literal_error":
        return f"is not one of the possible values; choose {context['expected']}"
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"is out of range; {_range(location)}"
    field = _field_at(location)
    if kind == "string_pattern_mismatch":
        return f"is not well-formed; {_hint(location)}"
    if kind == "string_too_short":
        return f"is empty; {_hint(location)}"
    wanted = _wanted_type(field.annotation if field else None, location)
    return f"is {_type_name(value)}; write {wanted}"


def _range(location: list[int | str]) -> str:
    """The bounds of a number, as in `give a whole number from 5 to 10000`."""
    field = _field_at(location)
    lower = upper = None
    for rule in field.metadata if field else ():
        lower = getattr(rule, "ge", lower)
        upper = getattr(rule, "le", upper)
    return (
        f"give a whole number from {lower} to {upper}"
        if upper is not None
        else f"give a whole number from {lower} up"
    )


def _hint(location: list[int | str]) -> str:
    """What a key means, in the first sentence of its description."""
    field = _field_at(location)
    if field is None or not field.description:
        section = _model_of(field.annotation) if field else None
        keys = [key for key, entry in section.model_fields.items() if entry.is_required()] if section else []
        return f"add the section with {', '.join(keys)}" if keys else "add it"
    first = re.split(r"\.(?:\s|$)", field.description, maxsplit=1)[0]
    return f"it is: {first[0].lower()}{first[1:]}"


_TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    str: "a string in quotes",
    Path: "a path in quotes",
}


def _wanted_type(annotation: Any, location: list[int | str]) -> str:
    if annotation is None:
        return "what docs/configure.md says"
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _wanted_type(typing.get_args(annotation)[0], location)
    if origin in (typing.Union, types.UnionType):
        return _wanted_type(typing.get_args(annotation)[0], location)
    if origin is Literal:
        return "one of " + ", ".join(_shown(choice) for choice in typing.get_args(annotation))
    if origin is tuple:
        item = typing.get_args(annotation)[0]
        if isinstance(location[-1], int):
            return _wanted_type(item, location)
        model = _model_of(item)
        return f"it as [[{'.'.join(map(str, location))}]]" if model else 'a list of strings: ["…", "…"]'
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section: [{'.'.join(map(str, location))}]"
    return _TYPE_WORDS.get(annotation, "another type")


def _type_name(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number with a fraction",
        str: "a string",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), f"a {type(value).__name__}")


class _Absent:
    """The value of a key that the file does not have."""


_ABSENT = _Absent()


def _where(location: list[int | str]) -> str:
    """Writes a place as people find it in the file: `[link] port`, `[[machine.nic]] number 2, mac`."""
    if len(location) == 1:
        return f"[{location[0]}]" if location[0] in Config.model_fields else str(location[0])
    head, *rest = location
    number = next((place for place, part in enumerate(rest) if isinstance(part, int)), None)
    if number is not None and rest[0] in ("nic", "disk"):
        key = ".".join(map(str, rest[number + 1 :]))
        return f"[[{head}.{rest[0]}]] number {int(rest[number]) + 1}" + (f", {key}" if key else "")
    return f"[{head}] " + "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in rest)


def _value_at(data: Any, location: list[int | str]) -> object:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return _ABSENT
    return data


def _walk(location: list[int | str]) -> Iterator[FieldInfo]:
    model: type[BaseModel] | None = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        if field is None:
            return
        yield field
        model = _model_of(field.annotation)


def _field_at(location: list[int | str]) -> FieldInfo | None:
    fields = list(_walk(location))
    wanted = sum(isinstance(part, str) for part in location)
    return fields[-1] if fields and len(fields) == wanted else None


def _keys_at(location: list[int | str]) -> Iterator[str]:
    model: type[BaseModel] | None = Config
    for field in _walk(location):
        model = _model_of(field.annotation)
    yield from model.model_fields if model else ()


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if (model := _model_of(argument)) is not None:
            return model
    return None


def _shown(value: object) -> str:
    """Writes a value as TOML does, shortened to what fits a line."""
    if isinstance(value, dict):
        return "{…}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _beside(port: int) -> int:
    return port + 1 if port < 65535 else port - 1
