"""Two machines that must be the same, and what no machine may have."""

import pytest

from ftd.errors import ConfigError, QemuError
from ftd.machine import MachineDescription, guest_disks, refuse_arguments, refuse_devices

MIB = 1024 * 1024


@pytest.fixture
def machine():
    return MachineDescription(
        qemu_version="10.0.13",
        machine_type="pc-i440fx-10.0-machine",
        accelerator="kvm",
        cpu_model="host",
        cpu_features={"CPUID[0x1,0].EDX": 7, "CPUID[0x7,0].EBX": 1},
        vcpus=2,
        memory_bytes=256 * MIB,
        ram_blocks={"ftd-ram": 256 * MIB, "pc.bios": 262144},
        devices={"id nic0": "virtio-net-pci, mac 52:54:00:00:00:01", "built in, hpet": "1 of it"},
    )


# ---- differences ------------------------------------------------------------------------------------------


def test_equal_machines(machine):
    assert machine.differences(machine.model_copy()) == []


def test_description_survives_the_wire(machine):
    assert MachineDescription.model_validate_json(machine.model_dump_json()) == machine


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vcpus": 4}, "vCPUs: 2 here, 4 on the peer; set [machine] vcpus the same on both"),
        (
            {"memory_bytes": 512 * MIB},
            "memory: 256 MiB here, 512 MiB on the peer; set [machine] memory_mib the same on both",
        ),
        (
            {"accelerator": "tcg"},
            "accelerator: kvm here, tcg on the peer; set [machine] accelerator the same on both",
        ),
        (
            {"qemu_version": "10.1.0"},
            "QEMU: 10.0.13 here, 10.1.0 on the peer; install the same series on both",
        ),
        (
            {"cpu_features": {"CPUID[0x1,0].EDX": 7, "CPUID[0x7,0].EBX": 3}},
            "CPU features of model host differ in CPUID[0x7,0].EBX; "
            "set [machine] cpu to a model that both hosts offer, such as qemu64",
        ),
        (
            {"ram_blocks": {"ftd-ram": 256 * MIB, "pc.bios": 131072}},
            "memory region pc.bios: 262144 bytes here, 131072 bytes on the peer; "
            "use the same firmware files on both",
        ),
        (
            {"devices": {"built in, hpet": "1 of it"}},
            "device id nic0: virtio-net-pci, mac 52:54:00:00:00:01 here, absent on the peer; "
            "give both the same [[machine.nic]], [[machine.disk]] and arguments, in the same order",
        ),
        (
            {"disks": {"vd0": 4096}},
            "disk vd0: absent here, 4096 bytes on the peer; "
            "make both images the same size (truncate -s, lvresize)",
        ),
    ],
)
def test_difference(machine, change, expected):
    assert machine.differences(machine.model_copy(update=change)) == [expected]


def test_bugfix_versions_of_qemu_go_together(machine):
    assert machine.differences(machine.model_copy(update={"qemu_version": "10.0.14"})) == []


def test_another_cpu_model_is_told_once(machine):
    other = machine.model_copy(update={"cpu_model": "qemu64", "cpu_features": {}})
    assert machine.differences(other) == [
        "CPU model: host here, qemu64 on the peer; set [machine] cpu the same on both"
    ]


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-device", "virtio-rng-pci"],
        ["-drive", "file=/srv/a.iso,format=raw,if=virtio,readonly=on"],
        ["-drive", "file=/srv/a.iso,media=cdrom"],
        ["-netdev", "tap,id=n,ifname=tap1,script=no,vhost=off"],
        ["-netdev", "user,id=n", "-device", "e1000,netdev=n"],
        ["-device", '{"driver": "virtio-rng-pci", "id": "rng"}'],
        ["--trace", "x"],
    ],
)
def test_accepted(arguments):
    refuse_arguments(arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["-netdev", "tap,id=n,vhost=on"],
            "-netdev tap,id=n,vhost=on: moves data past QEMU, .*; write vhost=off",
        ),
        (["-netdev", '{"type": "tap", "id": "n", "vhost": true}'], "moves data past QEMU"),
        (["-netdev", "tap,id=n,vhostforce=on"], "moves data past QEMU"),
        (["-nic", "vhost-user,chardev=c"], "moves data past QEMU"),
        (["--netdev", "type=vhost-vdpa,vhostdev=/dev/x"], "moves data past QEMU"),
        (["-device", "vhost-vsock-pci,guest-cid=3"], "use the virtio device without vhost"),
        (["-device", "vfio-pci,host=01:00.0"], "state outside of QEMU, .*; use an emulated or virtio device"),
        (["-device", "driver=vfio-pci,host=01:00.0"], "state outside of QEMU"),
        (["-device", '{"driver": "vfio-pci", "host": "01:00.0"}'], "state outside of QEMU"),
        (["-device", "usb-host,hostbus=1"], "state outside of QEMU"),
        (["-device", "ivshmem-plain,memdev=m"], "shares memory that others write to"),
        (["-virtfs", "local,path=/srv"], "changes files of this host only; use .*machine.disk"),
        (["-snapshot"], "-snapshot: keeps writes in a file that the backup lacks"),
        (
            ["-drive", "file=a.img,if=virtio"],
            r"given like this is not replicated, .*; use \[\[machine.disk\]\], or write readonly=on",
        ),
        (["-blockdev", '{"driver": "file", "filename": "a.img"}'], "write readonly=on"),
        (
            ["-hda", "a.img"],
            r"given like this is not replicated, .*; use \[\[machine.disk\]\], or write readonly=on",
        ),
        (["-drive", "file=a.img,snapshot=on,readonly=on"], "write snapshot=off"),
        (["-incoming", "tcp:0:4444"], "loads a state"),
        (["-S"], "-S: leaves the guest stopped; ftd starts it"),
        (["-daemonize"], "how ftd follows the process"),
        (["-readconfig", "f"], "hides settings from these checks"),
        (["-m", "1G"], r"-m 1G: ftd sets this itself; use \[machine\] memory_mib"),
        (["-enable-kvm"], r"use \[machine\] accelerator"),
        (["virtio-rng-pci"], "virtio-rng-pci: is not an option"),
    ],
)
def test_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
        refuse_arguments(arguments)


def test_every_refusal_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        refuse_arguments(["-S", "-device", "virtio-rng-pci", "-device", "vfio-pci", "-smp", "4"])
    assert len(caught.value.problems) == 3


def test_running_machine_with_a_device_that_cannot_be_protected(machine):
    refuse_devices(machine)
    bad = machine.model_copy(update={"devices": {"id gpu": "vfio-pci"}})
    with pytest.raises(QemuError, match=r"device vfio-pci \(id gpu\): has state outside of QEMU"):
        refuse_devices(bad)


class Drives:
    """Answers query-block with one drive."""

    def __init__(self, **medium):
        self.medium = {
            "ro": False,
            "drv": "raw",
            "node-name": "disk0",
            "file": "/dev/null",
            "image": {"virtual-size": 4096},
            **medium,
        }

    async def execute(self, command):
        assert command == "query-block"
        place = "/machine/peripheral/vd0/virtio-backend"
        return [
            {"device": "", "qdev": "/machine/peripheral/cd"},
            {"device": "", "qdev": "/machine/peripheral/ro", "inserted": {**self.medium, "ro": True}},
            {"device": "unused", "inserted": self.medium},
            {"device": "", "qdev": place, "inserted": self.medium},
        ]


async def test_the_disks_of_a_machine_are_those_that_the_guest_can_write_to(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    assert await guest_disks(Drives(file=str(path))) == [("vd0", "disk0", path, 4096)]


@pytest.mark.parametrize(
    ("medium", "told"),
    [
        (
            {"drv": "qcow2", "file": "/a.qcow2"},
            r"disk vd0 \(/a.qcow2\): is of format qcow2, .*qemu-img convert -O raw",
        ),
        ({"file": "nbd://host/x"}, r"disk vd0 \(nbd://host/x\): is not a file or block device of this host"),
        ({"file": "/nowhere/a.raw"}, "is not a file or block device of this host"),
    ],
)
async def test_a_disk_that_cannot_be_replicated_is_refused(medium, told):
    with pytest.raises(QemuError, match=told):
        await guest_disks(Drives(**medium))
