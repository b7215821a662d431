"""The backup's disk is that of the committed epoch, through takeovers, copies and faults."""

import asyncio
import contextlib
import json
import os
import random
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from testbed.arbitrated import arbitrated, boot, post
from testbed.disks import (
    BLOCK,
    MIB,
    LedgerLoad,
    differing_blocks,
    disk_guest,
    file_system_faults,
    idle_guest,
    image,
    make_images,
    request,
    tool,
    wait_ledger,
)
from testbed.etcd import Etcd
from testbed.guarded import (
    console_faults,
    metric,
    wait_committed,
    wait_ended,
    wait_log,
    wait_ready,
)
from testbed.loop import CONTROL, block_device
from testbed.pair import Daemon, Pair

from ftd.disk import Image
from ftd.errors import QemuDied
from ftd.monitor import Monitor

pytestmark = pytest.mark.root
StartPair = Callable[..., Any]
GIB = 1 << 30


async def start_with_disks(
    make_pair: StartPair, guest: Any, sizes: list[int], *settings: Any, ext4: bool = True
) -> Pair:
    pair: Pair = await make_pair(guest, *settings)
    await make_images(pair, sizes, ext4=ext4)
    await start(pair)
    return pair


async def start(pair: Pair) -> None:
    await pair.backup.start()
    await wait_ready(pair.backup)
    await pair.primary.start()
    await pair.wait_protected()


async def tell_guest(daemon: Daemon, command: str) -> None:
    async with await Monitor.connect(daemon.run_dir / "operator.sock") as operator:
        await operator.execute(command)


async def assert_disks_equal(primary: Daemon, backup: Daemon, disks: int) -> None:
    """With the guest stopped and what it wrote applied, the images are the same in every block."""
    await tell_guest(primary, "stop")
    committed = (await wait_committed(primary, 3))["epoch"]["committed"]
    await backup.wait_status("the last epoch", lambda status: status["epoch"]["committed"] >= committed, 30)
    for number in range(disks):
        for _ in range(100):  # what is committed is applied a moment later
            if not (differing := differing_blocks(image(primary, number), image(backup, number))):
                break
            await asyncio.sleep(0.05)
        assert differing == [], f"disk {number}"
    await tell_guest(primary, "cont")


async def become_backup(pair: Pair) -> Daemon:
    """The host of the primary that died comes back as the backup of the one that took over."""
    pair.a.revive()
    await pair.primary.close()
    daemon = Daemon(pair.a, "backup", pair.primary.folder, pair.configuration(pair.a, pair.b, "backup"))
    pair.primary = daemon
    await daemon.start()
    return daemon


async def test_a_database_survives_takeovers_at_random_moments_and_a_power_cut(
    make_pair: StartPair, etcd: Etcd
) -> None:
    """Three disks: files and a database; sectors in disorder, by requests larger than the journal; a witness.

    Each time the backup takes over, the host that died comes back as its backup, and is copied to. At last
    both lose their power: the one that had the guest boots it from its disk by itself, since the arbiter's
    record settles that the other did not take over, and the other is copied to.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    disks: list[dict[str, Any]] = [
        {"path": "disk0.img"},
        {"path": "disk1.img", "cache": "writeback", "iothread": True},
        {"path": "disk2.img"},
    ]
    guest = await disk_guest(files=2, sectors=2, witness="vdc", disks=disks)
    settings = {"disks": {"journal_mib": 1}} | arbitrated(etcd)
    pair = await start_with_disks(make_pair, guest, [96 * MIB, 24 * MIB, MIB], settings)
    client = pair.network.client
    await wait_ledger(client)
    load = LedgerLoad(client)
    load.start()
    await load.wait_for(20)
    await assert_disks_equal(pair.primary, pair.backup, 3)
    hosts = [(pair.a, pair.primary, "a"), (pair.b, pair.backup, "b")]
    for _ in range(int(os.environ.get("FTD_DISK_TAKEOVERS", "1"))):
        (host, primary, _), (_, backup, _) = hosts
        await load.wait_for(20)
        await asyncio.sleep(moments.uniform(0, 1))
        host.kill_all()
        await backup.wait_takeover()
        await load.wait_for(20)
        host.revive()
        await primary.close()
        again = Daemon(
            host,
            "backup",
            primary.folder,
            pair.configuration(host, pair.b if host is pair.a else pair.a, "backup"),
        )
        if host is pair.a:
            pair.primary = again
        else:
            pair.backup = again
        await again.start()
        await backup.wait_state("protected")
        await again.wait_state("protected")
        assert console_faults(backup.console.text()) == []
        found = await post(backup, "verify")
        assert (found["ok"], found["disk_blocks"]) == (True, 121 * MIB // BLOCK), found
        hosts = [(pair.b if host is pair.a else pair.a, backup, ""), (host, again, "")]
        await assert_disks_equal(backup, again, 3)
        assert (await backup.status())["sync"]["disk_bytes"] == 121 * MIB
    for host, _, _ in hosts:
        host.kill_all()
    await load.abandon()
    (_, last, _), (_, other, _) = hosts
    for daemon, worth in ((last, "replicated"), (other, "copy")):
        assert json.loads(image(daemon).with_name("disk0.img.ftd").read_text())["worth"] == worth
    for host, daemon, _ in hosts:
        await boot(host, daemon)
    await last.wait_state("protected")
    assert (await other.wait_state("protected"))["role"] == "backup"
    await wait_ledger(client)
    assert await load.problems() == []
    assert console_faults(last.console.text()) == []
    await tell_guest(last, "stop")
    assert await file_system_faults(image(last)) == ""
    print(load.acknowledged)


@pytest.mark.parametrize("apply", ["committed", "early", "never"])
async def test_a_disk_of_another_epoch_is_noticed(make_pair: StartPair, apply: str) -> None:
    """The guest's own check finds a disk that is ahead of its memory, or behind, and only such a one."""
    guest = await disk_guest(witness="vda")
    settings: tuple[Any, Any] = ({"epoch": {"length_ms": 100}}, {"disks": {"apply": apply}})
    pair = await start_with_disks(make_pair, guest, [MIB], *settings, ext4=False)
    await pair.primary.console.wait_for(r"^ftd-guest: witness \d+", 60)
    pair.kill_primary_host()
    await pair.backup.wait_takeover()
    pair.backup.console.skip()
    await pair.backup.console.wait_for(r"^ftd-guest: witness (MISMATCH|\d+000)", 60)
    found = console_faults(pair.backup.console.text())
    if apply == "committed":
        assert found == []
    else:
        numbers = re.search(r"has (\d+), not (\d+)", found[0])
        assert numbers is not None
        ahead = int(numbers[1]) > int(numbers[2])
        assert ahead == (apply == "early")


async def test_a_copy_moves_what_differs_and_an_old_primary_only_comes_back_as_its_target(
    make_pair: StartPair,
) -> None:
    """8 GiB, 1 % of which is data: that much is sent. After a takeover next to nothing is, the other way."""
    pair: Pair = await make_pair(idle_guest([{"path": "disk0.img"}]))
    await make_images(pair, [8 * GIB], ext4=False)
    size = 8 * GIB
    image(pair.backup).unlink()
    with image(pair.backup).open("wb") as file:
        file.truncate(size)
    with image(pair.primary).open("r+b") as file:
        for piece in range(size // 100 // 65536):
            file.seek(piece * 100 * 65536 + 12288)
            file.write(os.urandom(65536))
    await start(pair)
    sync = (await pair.primary.status())["sync"]
    assert sync["disk_bytes"] == sync["disk_bytes_compared"] == size
    assert size * 0.01 * 0.98 <= sync["disk_bytes_sent"] <= size * 0.02
    spared = await metric(pair.primary, "ftd_disk_sync_spared_bytes_total")
    assert spared + await metric(pair.primary, "ftd_disk_sync_sent_bytes_total") == pytest.approx(
        size, rel=0.01
    )
    await request(pair.primary, "write -P 5 3G 64k")
    await wait_committed(pair.primary, 3)
    pair.kill_primary_host()
    await pair.backup.wait_takeover()
    await request(pair.backup, "read -P 5 3G 64k")
    pair.a.revive()
    assert pair.a.memory_directory.is_dir()
    await pair.primary.close()
    await pair.primary.start()
    assert await wait_ended(pair.primary) == 3
    assert "it had a backup, which may have taken over (generation 1); start this node as the backup" in (
        pair.primary.logs()
    )
    # It differs in one block of 4096 bytes.
    with image(pair.primary).open("r+b") as file:
        file.seek(5 * GIB + 4096)
        file.write(b"of no epoch")
    # What the guest writes while it has no backup.
    await request(pair.backup, "write -P 6 7G 4k")
    again = await become_backup(pair)
    await again.wait_state("protected")
    sync = (await pair.backup.status())["sync"]
    assert 0 < sync["disk_bytes_sent"] < 100_000
    assert sync["disk_bytes_compared"] == size
    with image(again).open("rb") as file:
        file.seek(5 * GIB + 4096)
        assert file.read(BLOCK) == bytes(BLOCK)
        file.seek(7 * GIB)
        assert file.read(BLOCK) == bytes([6]) * BLOCK


async def test_a_copy_ends_although_the_guest_writes_more_than_its_journal_holds(
    make_pair: StartPair,
) -> None:
    """Requests of up to 3 MiB, several at once, against a journal of 1 MiB: all the time."""
    guest = idle_guest([{"path": "disk0.img"}])
    pair: Pair = await make_pair(guest, {"disks": {"journal_mib": 1}})
    await make_images(pair, [64 * MIB], ext4=False)
    await pair.primary.start()
    await pair.primary.wait_state("solo")
    async with writes(pair.primary):
        await pair.backup.start()
        await pair.wait_protected()
        await wait_committed(pair.primary, 20)
    await request(pair.primary, "aio_flush")
    await assert_disks_equal(pair.primary, pair.backup, 1)
    assert differing_blocks(image(pair.primary), Path("/dev/null")) != []


@contextlib.asynccontextmanager
async def writes(daemon: Daemon) -> AsyncIterator[None]:
    """The guest's disk is written to meanwhile."""
    over = asyncio.Event()
    writing = asyncio.create_task(write_on(daemon, over))
    try:
        yield
    finally:
        # Not cancelled: the answer to a request under way would be what the next client reads first.
        over.set()
        await writing


async def write_on(daemon: Daemon, over: asyncio.Event) -> None:
    """Make requests until it is over."""
    random_ = random.Random(1)
    async with await Monitor.connect(daemon.run_dir / "operator.sock") as operator:
        while not over.is_set():
            sectors = random_.randrange(1, 6144)
            place = random_.randrange(131072 - sectors)
            command = f"aio_write -P {random_.randrange(1, 256)} {place * 512} {sectors * 512}"
            line = f'qemu-io -d /machine/peripheral/vd0/virtio-backend "{command}"'
            await operator.execute("human-monitor-command", command_line=line)
            await asyncio.sleep(0.005)


async def test_a_block_of_the_backup_that_is_wrong_is_found_and_mended(make_pair: StartPair) -> None:
    """While the guest writes all the time: by `ftd verify`, wherever it is."""
    guest = idle_guest([{"path": "disk0.img"}, {"path": "disk1.img"}])
    pair: Pair = await make_pair(guest, {"epoch": {"verify_every": 10}})
    await make_images(pair, [64 * MIB, GIB], ext4=False)
    await start(pair)
    blocks = (64 * MIB + GIB) // BLOCK
    async with writes(pair.primary):
        found = await post(pair.primary, "verify")
        assert (found["ok"], found["disk_blocks"], found["disk_differences"]) == (True, blocks, [])
        # What is found by itself is what the guest wrote since.
        async with asyncio.timeout(30):
            while await metric(pair.backup, "ftd_disk_verified_bytes_total") < blocks * BLOCK + MIB:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await metric(pair.primary, "ftd_disk_verify_differing_blocks_total") == 0
        with image(pair.backup, 1).open("r+b") as file:
            file.seek(GIB - 12345)
            file.write(b"\1")
        found = await post(pair.primary, "verify")
        assert not found["ok"]
        assert (found["differing"], found["disk_differing"]) == (0, 1)
        assert found["disk_differences"] == [{"disk": "vd1", "block": (GIB - 12345) // BLOCK}]
        await wait_log(pair.backup, "THE BACKUP'S DISK DIFFERS FROM THE GUEST'S")
        await wait_log(pair.primary, "differ from the guest's in 1 blocks")
        await pair.wait_protected()
        assert await metric(pair.primary, "ftd_syncs_completed_total") == 2
        found = await post(pair.primary, "verify")
        assert (found["ok"], found["disk_blocks"]) == (True, blocks)


@pytest.mark.skipif(not CONTROL.exists(), reason="this kernel has no loop devices")
async def test_block_devices_are_replicated_and_their_markers_are_in_the_state_folder(
    make_pair: StartPair,
) -> None:
    """By the names that they have in /dev for administrators: symbolic links, as those of LVM."""
    pair: Pair = await make_pair(idle_guest([{"path": "volume"}]))
    size = 32 * MIB
    with contextlib.ExitStack() as devices:
        for daemon in (pair.primary, pair.backup):
            backing = daemon.folder / "backing"
            backing.write_bytes(os.urandom(size))
            (daemon.folder / "volume").symlink_to(devices.enter_context(block_device(backing)))
        await start(pair)
        assert (await pair.primary.status())["sync"]["disk_bytes_sent"] >= size
        for command in ("write -P 1 512 512", "write -P 2 1M 3M", "discard 2M 1M", "flush"):
            await request(pair.primary, command)
        found = await post(pair.primary, "verify")
        assert (found["ok"], found["disk_blocks"]) == (True, size // BLOCK), found
        name = str(pair.primary.folder / "volume").strip("/").replace("/", "-")
        marker = pair.primary.folder / f"state/disk-{name}.ftd"
        assert json.loads(marker.read_text())["worth"] == "replicated"
        pair.kill_primary_host()
        await pair.backup.wait_takeover()
        for command in ("read -P 1 512 512", "read -P 2 1M 1M", "read -P 0 2M 1M", "read -P 2 3M 1M"):
            await request(pair.backup, command)
        await boot(pair.a, pair.primary)
        assert await wait_ended(pair.primary) == 3
        assert "it had a backup, which may have taken over" in pair.primary.logs()
        await (await become_backup(pair)).wait_state("protected")
        await request(pair.backup, "write -P 3 0 64k")
        found = await post(pair.backup, "verify")
        assert (found["ok"], found["disk_blocks"]) == (True, size // BLOCK), found
        pair.a.kill_all()
        pair.b.kill_all()


async def test_a_full_disk_on_the_backup_ends_protection_and_not_the_guest(make_pair: StartPair) -> None:
    guest = idle_guest([{"path": "disk0.img"}, {"path": "small/disk1.img", "cache": "writeback"}])
    pair: Pair = await make_pair(guest)
    small = pair.backup.folder / "small"
    small.mkdir()
    (pair.primary.folder / "small").mkdir()
    await tool("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small)
    try:
        await make_images(pair, [MIB], ext4=False)
        for daemon in (pair.primary, pair.backup):
            with (daemon.folder / "small/disk1.img").open("wb") as file:
                file.truncate(32 * MIB)
        await start(pair)
        await request(pair.primary, "write -P 1 0 16M", 1)
        status = await pair.primary.wait_status(
            "the end of protection",
            lambda status: status["state"] == "solo" and "no space left" in status["reason"],
            30,
        )
        await request(pair.primary, "write -P 2 16M 1M", 1)
        assert "has lost its copy of a disk: disk vd1" in status["reason"]
        assert status["qemu"]["running"]
        waiting = await pair.backup.wait_state("waiting")
        assert "no space left on device; free some space there" in waiting["reason"]
    finally:
        pair.b.kill_all()
        await tool("umount", small)


async def test_a_guest_that_ends_leaves_a_disk_from_which_it_is_started_again(make_pair: StartPair) -> None:
    """Both sides end, and the marker says so; the power loss of a guest without a backup changes nothing."""
    pair: Pair = await make_pair(idle_guest([{"path": "disk0.img"}]))
    await make_images(pair, [MIB], ext4=False)
    marker = image(pair.primary).with_name("disk0.img.ftd")
    await start(pair)
    assert json.loads(marker.read_text()) == {"worth": "replicated", "generation": 1, "node": "host-a"}
    copy = image(pair.backup).with_name("disk0.img.ftd")
    async with asyncio.timeout(10):
        while json.loads(copy.read_text())["worth"] != "copy":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await request(pair.primary, "write -P 3 0 64k")
    with contextlib.suppress(QemuDied):
        await tell_guest(pair.primary, "quit")
    assert await wait_ended(pair.primary) == 0
    assert await wait_ended(pair.backup) == 0
    assert json.loads(marker.read_text())["worth"] == "alone"
    await pair.primary.close()
    await pair.primary.start()
    await pair.primary.wait_state("solo")
    await request(pair.primary, "read -P 3 0 64k")
    pair.kill_primary_host()
    assert json.loads(marker.read_text())["worth"] == "alone"


@pytest.mark.parametrize("wrong", ["size", "format", "missing", "used"])
async def test_images_that_cannot_be_replicated_are_refused(make_pair: StartPair, wrong: str) -> None:
    pair: Pair = await make_pair(idle_guest([{"path": "disk0.img"}]))
    await make_images(pair, [MIB], ext4=False)
    path = image(pair.backup)
    told = {
        "size": "disk vd0: 2097152 bytes here, 1048576 bytes on the peer; make both images the same size",
        "format": f"is a qcow2 image, and only raw ones are replicated; convert it with: qemu-img convert "
        f"-O raw {path}",
        "missing": f'[[machine.disk]] number 1, path = "{path}": no such file or directory; create it',
        "used": f"disk vd0 ({path}): another program writes to it",
    }[wrong]
    other = None
    if wrong == "size":
        os.truncate(path, 2 * MIB)
    elif wrong == "format":
        path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(MIB - 8))
    elif wrong == "missing":
        path.unlink()
    else:
        other = Image("vd0", path, writable=True)
    try:
        await pair.backup.start()
        if wrong == "size":
            await wait_ready(pair.backup)
            await pair.primary.start()
            status = await pair.primary.wait_state("solo")
            assert told in status["reason"]
        else:
            assert await wait_ended(pair.backup) in (2, 3)
            assert told in pair.backup.logs()
    finally:
        if other is not None:
            other.close()
