"""The section that describes the guest's machine, with its network interfaces and disks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ftd.config.fields import MIB, ConfigPath, Section, SettingError

DEFAULT_FIRMWARE = (Path("/usr/share/seabios"), Path("/usr/share/qemu"), Path("/usr/lib/ipxe/qemu"))


class Nic(Section):
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


class Disk(Section):
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


class Machine(Section):
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
            raise SettingError(
                "dirty_ring_size",
                f"is not a power of two from 1024 to 65536; {nearest} would be, or 0 for the bitmap",
            )
        for key, value in (("initrd", self.initrd), ("append", self.append)):
            if value and self.kernel is None:
                raise SettingError(key, "needs a kernel; set [machine] kernel, or remove it")
        for what in ("mac", "tap"):
            values = [getattr(nic, what).lower() for nic in self.nic]
            for position, value in enumerate(values):
                if value in values[:position]:
                    raise SettingError(
                        f"nic.{position}.{what}",
                        f"is that of number {values.index(value) + 1}, too; give each its own",
                    )
        paths = [disk.path for disk in self.disk]
        for position, disk in enumerate(self.disk):
            if disk.path in paths[:position]:
                raise SettingError(
                    f"disk.{position}.path",
                    f"is that of number {paths.index(disk.path) + 1}, too; give each its own",
                )
            if disk.iothread and not disk.model.startswith("virtio-"):
                raise SettingError(
                    f"disk.{position}.iothread", "is for virtio disks only; remove it, or the other model"
                )
        return self
