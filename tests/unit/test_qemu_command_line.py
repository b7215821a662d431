"""QEMU's command line, and what this host is asked before it is made."""

import errno
import json
import os
from pathlib import Path

import pytest

from ftd import qemu
from ftd.config import Config
from ftd.errors import HostError
from ftd.qemu import Choices, choose_accelerator, command_line, create_memory_file

MIB = 1024**2
GIB = 1024**3


def config(**machine) -> Config:
    return Config.model_validate(
        {
            "node": {"name": "web", "role": "primary"},
            "link": {"listen": "10.0.0.1", "peer": "10.0.0.2", "insecure": True},
            "machine": machine,
            "arbiter": {"accept_split_brain": True},
        }
    )


def words(
    *, incoming: bool = False, accelerator: str = "tcg", run_dir: str = "/run/ftd/web", **machine
) -> list[str]:
    disks = ((20 * GIB, False), (MIB, True))[: len(machine.get("disk", ()))]
    choices = Choices(Path("/opt/qemu"), (Path("/usr/share/seabios"),), accelerator, "qemu64", disks)
    memory_file = Path("/dev/shm/ftd-web-0.ram")
    return command_line(
        config(**machine), choices, incoming=incoming, run_dir=Path(run_dir), memory_file=memory_file
    )


def values(line: list[str], option: str) -> list[str]:
    return [line[place + 1] for place, word in enumerate(line) if word == option]


# ---- the line ---------------------------------------------------------------------------------------------


def test_disks():
    line = words(
        disk=[
            {"path": "/srv/a,b.raw"},
            {"path": "/dev/vg/b", "cache": "writeback", "discard": False, "iothread": True},
        ]
    )
    first, second = map(json.loads, values(line, "-blockdev"))
    assert first == {
        "driver": "raw",
        "node-name": "disk0",
        "cache": {"direct": True, "no-flush": False},
        "discard": "unmap",
        "file": {
            "driver": "file",
            "filename": "/srv/a,b.raw",
            "cache": {"direct": True, "no-flush": False},
            "discard": "unmap",
            "drop-cache": False,
        },
    }
    assert (second["node-name"], second["file"]["driver"]) == ("disk1", "host_device")
    assert (second["discard"], second["file"]["discard"]) == ("ignore", "ignore")
    assert not second["cache"]["direct"]
    # The geometry is the same on both hosts, whatever is on the disks.
    assert values(line, "-device") == [
        "virtio-blk-pci,id=vd0,drive=disk0,cyls=16383,heads=16,secs=63",
        "virtio-blk-pci,id=vd1,drive=disk1,cyls=2,heads=16,secs=63,iothread=disk1-thread",
    ]
    assert "iothread,id=disk1-thread" in values(line, "-object")


def test_whole_line():
    assert words(memory_mib=64, vcpus=2) == [
        "/opt/qemu",
        *("-name", "guest=web,debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-msg", "timestamp=on"),
        "-only-migratable",
        *("-L", "/usr/share/seabios"),
        *(
            "-machine",
            "pc,memory-backend=ftd-ram",
            "-accel",
            "tcg",
            "-cpu",
            "qemu64",
            "-smp",
            "2",
            "-m",
            "64M",
        ),
        "-object",
        "memory-backend-file,id=ftd-ram,share=on,size=67108864,mem-path=/dev/shm/ftd-web-0.ram",
        *("-serial", "null"),
        *("-qmp", "unix:/run/ftd/web/qmp.sock,server=on,wait=off"),
        *("-qmp", "unix:/run/ftd/web/operator.sock,server=on,wait=off"),
        *("-pidfile", "/run/ftd/web/qemu.pid"),
    ]


def test_shadow_waits_for_its_state_and_is_the_same_otherwise():
    primary, shadow = words(), words(incoming=True)
    assert values(shadow, "-incoming") == ["defer"]
    assert [word for word in shadow if word not in ("-incoming", "defer")] == primary


def test_dirty_ring_is_for_kvm_only():
    assert values(words(accelerator="kvm", dirty_ring_size=2048), "-accel") == ["kvm,dirty-ring-size=2048"]
    assert values(words(accelerator="kvm", dirty_ring_size=0), "-accel") == ["kvm"]
    assert values(words(accelerator="tcg", dirty_ring_size=2048), "-accel") == ["tcg"]


def test_network_cards_bypass_nothing_and_bring_no_boot_rom():
    line = words(
        nic=[{"tap": "tap0", "mac": "52:54:00:00:00:0A"}, {"tap": "tap1", "mac": "52:54:00:00:00:0b"}]
    )
    assert values(line, "-netdev") == [
        "tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=off",
        "tap,id=net1,ifname=tap1,script=no,downscript=no,vhost=off",
    ]
    assert values(line, "-device") == [
        "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:00:00:0a,romfile=",
        "virtio-net-pci,id=nic1,netdev=net1,mac=52:54:00:00:00:0b,romfile=",
    ]


def test_kernel():
    line = words(kernel=Path("/boot/vmlinuz"), initrd=Path("/boot/initrd"), append="console=ttyS0 quiet")
    assert values(line, "-kernel") == ["/boot/vmlinuz"]
    assert values(line, "-initrd") == ["/boot/initrd"]
    assert values(line, "-append") == ["console=ttyS0 quiet"]


def test_commas_in_paths_do_not_end_the_value():
    line = words(console=Path("/srv/a,b/console"), run_dir="/run/c,d")
    assert values(line, "-chardev") == ["file,id=console,path=/srv/a,,b/console,append=on"]
    assert values(line, "-serial") == ["chardev:console"]
    assert values(line, "-qmp")[0] == "unix:/run/c,,d/qmp.sock,server=on,wait=off"


def test_more_arguments_come_last():
    assert words(arguments=["-device", "virtio-rng-pci"])[-2:] == ["-device", "virtio-rng-pci"]


# ---- accelerator ------------------------------------------------------------------------------------------


def test_auto_takes_kvm_where_the_device_opens(tmp_path):
    device = tmp_path / "kvm"
    device.touch()
    assert choose_accelerator("auto", device) == ("kvm", f"{device} can be used")


def test_auto_falls_back_to_tcg_and_says_why(tmp_path):
    device = tmp_path / "kvm"
    assert choose_accelerator("auto", device) == ("tcg", f"{device}: no such file or directory")


def test_kvm_without_its_device_is_an_error(tmp_path):
    device = tmp_path / "kvm"
    with pytest.raises(
        HostError, match=r'kvm: no such file .*; load the module .*, or set .* accelerator = "tcg"'
    ):
        choose_accelerator("kvm", device)


def test_kvm_without_permission_names_the_group(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match="/dev/kvm: permission denied; add ftd's user to the group kvm"):
        choose_accelerator("kvm")


# ---- the program ------------------------------------------------------------------------------------------


async def test_qemu_that_is_no_program(tmp_path):
    with pytest.raises(HostError, match="is not a program; give the path of qemu-system-x86_64"):
        await qemu.find_qemu(tmp_path / "none")


async def test_firmware_that_is_nowhere(tmp_path):
    program = tmp_path / "qemu"
    program.touch(mode=0o755)
    with pytest.raises(
        HostError, match=r"\[machine\] firmware: none of .* is a folder; install the firmware"
    ):
        await qemu.choose(config(qemu=program, firmware=[tmp_path / "none"]))


# ---- the memory file --------------------------------------------------------------------------------------


class Space:
    """What os.statvfs says of a file system."""

    def __init__(self, free: int, page: int = 4096, blocks: int | None = None) -> None:
        self.f_bsize = self.f_frsize = page
        self.f_bavail = free // page
        self.f_blocks = self.f_bavail if blocks is None else blocks


@pytest.fixture
def file_system(monkeypatch):
    def pretend(kind: str, space: Space, free_huge_pages: int = 0) -> None:
        monkeypatch.setattr(qemu, "_file_system", lambda folder: kind)
        monkeypatch.setattr(os, "statvfs", lambda folder: space)
        monkeypatch.setattr(qemu, "_free_huge_pages", lambda page: free_huge_pages)

    return pretend


def test_memory_file_is_sparse_and_private(tmp_path):
    path = tmp_path / "a.ram"
    create_memory_file(path, 1024 * 1024)
    status = path.stat()
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (1024 * 1024, 0, 0o600)


def test_memory_file_never_replaces_another(tmp_path):
    path = tmp_path / "a.ram"
    path.write_text("precious")
    with pytest.raises(HostError, match=r"cannot create the file for guest memory: .*a\.ram: file exists"):
        create_memory_file(path, 4096)
    assert path.read_text() == "precious"


def test_full_disk(tmp_path, file_system):
    file_system("tmpfs", Space(free=GIB // 2))
    with pytest.raises(HostError) as caught:
        create_memory_file(tmp_path / "a.ram", GIB)
    assert str(caught.value) == (
        f"{tmp_path}: guest memory needs 1024 MiB and 512 MiB are free; enlarge it (mount -o remount,size=… "
        f"{tmp_path}), or lower [machine] memory_mib"
    )
    assert list(tmp_path.iterdir()) == []


def test_tmpfs_without_a_limit(tmp_path, file_system):
    file_system("tmpfs", Space(free=0, blocks=0))
    create_memory_file(tmp_path / "a.ram", 4096)


def test_odd_size_on_huge_pages(tmp_path, file_system):
    file_system("hugetlbfs", Space(free=GIB, page=2 * 1024 * 1024), free_huge_pages=512)
    with pytest.raises(
        HostError, match=r"memory_mib = 33 is no multiple of the 2 MiB huge pages of .*; give 34"
    ):
        create_memory_file(tmp_path / "a.ram", 33 * 1024 * 1024)


def test_too_few_huge_pages(tmp_path, file_system):
    file_system("hugetlbfs", Space(free=0, page=2 * 1024 * 1024, blocks=0), free_huge_pages=8)
    with pytest.raises(HostError, match=r"needs 32 MiB and 16 MiB are free; raise vm.nr_hugepages"):
        create_memory_file(tmp_path / "a.ram", 32 * 1024 * 1024)


def test_memory_on_a_disk_is_warned_of(tmp_path, file_system, caplog):
    file_system("ext4", Space(free=GIB))
    create_memory_file(tmp_path / "a.ram", 4096)
    assert "is on ext4: guest memory will be written to its disk" in caplog.text


def test_folder_that_is_missing(tmp_path):
    with pytest.raises(HostError, match=r"memory_path = .*/none: no such file or directory; create it"):
        create_memory_file(tmp_path / "none" / "a.ram", 4096)


def test_stale_files_of_this_node_only_are_removed(tmp_path, caplog):
    names = ["ftd-web-0123abcd.ram", "ftd-web-b-0123abcd.ram", "ftd-web-0123abcd.txt", "other.ram"]
    for name in names:
        (tmp_path / name).touch()
    qemu.remove_stale_memory_files(config(memory_path=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    assert "left behind by an earlier QEMU" in caplog.text


def test_own_names_are_known_as_own():
    path = qemu.memory_file_path(config())
    assert qemu.OWN_MEMORY_FILE.fullmatch(path.name)
