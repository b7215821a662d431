"""The journal of disks in a real QEMU; requests are made by QEMU's own `qemu-io`, as if by the guest."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from ftd.disk import Copies
from ftd.errors import QemuError
from ftd.frame import Part
from ftd.journal import Request, RequestKind
from ftd.monitor import Monitor
from ftd.qemu import QemuProcess
from ftd.staging import Staging, slot_size

MIB = 1 << 20
KIB = 1 << 10
DISK_SIZE = 16 * MIB


class Machine:
    """A QEMU with disks, checkpointed by the test."""

    def __init__(self, qemu: QemuProcess, paths: list[Path], staging: Staging) -> None:
        self.qemu = qemu
        self.monitor: Monitor = qemu.monitor
        self.paths = paths
        self.staging = staging
        self.epoch = 0
        self.slot = 0
        self.between = False  # two parts of a frame
        self.events: list[str] = []

    async def begin(self, limit: int = 4 * MIB, **more: object) -> None:
        for slot in self.staging.slots:
            await self.monitor.send_descriptor(slot.name, slot.fd)
        for name in ("X_FT_JOURNAL_FULL", "X_FT_ABANDONED"):
            self.monitor.on(name, lambda event: self.events.append(event["event"]))
        arguments = {"disks": [f"disk{number}" for number in range(len(self.paths))], **more}
        await self.monitor.execute(
            "x-ft-begin",
            generation=1,
            slots=[slot.name for slot in self.staging.slots],
            journal_limit=limit,
            **arguments,
        )

    async def io(self, command: str, disk: int = 0) -> None:
        """A request to a disk of the guest."""
        line = f'qemu-io -d /machine/peripheral/vd{disk}/virtio-backend "{command}"'
        said = await self.monitor.execute("human-monitor-command", command_line=line)
        assert "error" not in said.lower(), said
        assert "failed" not in said.lower(), said

    async def gather(self, command: str = "x-ft-checkpoint", **more: object) -> tuple[list[Request], bool]:
        """One part: its requests, and whether it is complete."""
        if not self.between:
            self.epoch += 1
        slot = self.staging.slots[self.slot]
        part = await self.monitor.execute(command, slot=slot.index, epoch=self.epoch, **more)
        read = Part.from_slot(slot.view)
        read.verify()
        requests = [each._replace(data=bytes(each.data)) for each in read.journal]
        assert part["journal-requests"] == len(requests)
        assert part["journal-bytes"] == read.header.section("journal").size
        self.between = command == "x-ft-checkpoint" and not part["complete"]
        self.slot = (self.slot + 1) % len(self.staging.slots)
        return requests, part["complete"]

    async def checkpoint(self) -> list[Request]:
        """All requests of an epoch."""
        requests, complete = await self.gather()
        while not complete:
            more, complete = await self.gather()
            requests += more
        return requests


@pytest.fixture
async def make_machine(make_config, folder):
    """Makes a machine; takes how many disks it has, and their settings."""
    made: list[tuple[QemuProcess, Staging]] = []

    async def make(disks: int = 1, **settings: object) -> Machine:
        paths = [folder / f"disk{number}.img" for number in range(disks)]
        for path in paths:
            with path.open("wb") as file:
                file.truncate(DISK_SIZE)
        config = make_config(machine={"disk": [{"path": str(path), **settings} for path in paths]})
        qemu = await QemuProcess.start(config)
        info = await qemu.monitor.execute("query-x-ft")
        memory = sum(block["max-length"] for block in info["blocks"])
        staging = Staging(2, slot_size(64 * MIB, memory, 4 * MIB))
        made.append((qemu, staging))
        return Machine(qemu, paths, staging)

    yield make
    for qemu, staging in made:
        await qemu.kill()
        staging.close()


async def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("settings", [{}, {"cache": "writeback"}, {"iothread": True}])
async def test_requests_are_recorded_in_the_epoch_in_which_they_were_made(make_machine, settings) -> None:
    machine = await make_machine(2, **settings)
    await machine.begin()
    await machine.gather("x-ft-collect")
    assert await machine.checkpoint() == []
    await machine.io("write -P 7 512 512")
    await machine.io("write -P 8 0 8k", disk=1)
    await machine.io("write -P 9 1024 3k")
    first = await machine.checkpoint()
    await machine.io("write -z 4096 4096")
    await machine.io("write -z -u 8192 12288")
    await machine.io("discard 1M 64k", disk=1)
    await machine.io("flush")
    second = await machine.checkpoint()
    # QEMU adds flushes of its own at times, with an iothread for one.
    assert [each for each in first if each.kind is not RequestKind.FLUSH] == [
        Request(0, RequestKind.DATA, 512, 512, b"\x07" * 512),
        Request(1, RequestKind.DATA, 0, 8192, b"\x08" * 8192),
        Request(0, RequestKind.DATA, 1024, 3072, b"\x09" * 3072),
    ]
    assert [each for each in second if each.kind is not RequestKind.FLUSH] == [
        Request(0, RequestKind.ZEROES, 4096, 4096),
        Request(0, RequestKind.UNMAP, 8192, 12288),
        Request(1, RequestKind.UNMAP, MIB, 65536),
    ]
    assert second[-1] == Request(0, RequestKind.FLUSH)
    assert await machine.checkpoint() == []


async def test_a_live_round_takes_the_journal_and_if_asked_nothing_else(make_machine) -> None:
    machine = await make_machine()
    await machine.begin()
    await machine.io("write -P 1 0 4k")
    requests, complete = await machine.gather("x-ft-collect", memory=False)
    assert complete
    assert requests == [Request(0, RequestKind.DATA, 0, 4096, b"\x01" * 4096)]
    part = Part.from_slot(machine.staging.slots[0].view)
    assert (len(part.pages), len(part.zeros)) == (0, 0)
    # All of memory is still to be named by the next.
    requests, _ = await machine.gather("x-ft-collect")
    part = Part.from_slot(machine.staging.slots[1].view)
    assert requests == []
    assert len(part.pages) + len(part.zeros) > 32 * MIB // 4096
    await machine.checkpoint()
    # From now on the journal belongs to checkpoints, unless it is asked for.
    await machine.io("write -P 2 0 4k")
    assert (await machine.gather("x-ft-collect"))[0] == []
    assert len((await machine.gather("x-ft-collect", memory=False))[0]) == 1
    assert await machine.checkpoint() == []


async def test_repeating_what_was_recorded_makes_the_same_disk_and_the_filter_leaves_no_trace(
    make_machine, folder
) -> None:
    """With requests that overlap and are under way at once, in epochs that end in between."""
    machine = await make_machine()
    copy = folder / "copy.img"
    copy.write_bytes(machine.paths[0].read_bytes())
    await machine.begin(256 * KIB)
    await machine.gather("x-ft-collect")
    requests = await machine.checkpoint()
    for number in range(1, 60):
        await machine.io(f"aio_write -P {number} {number % 7 * 512} {number % 5 * 1024 + 512}")
        await machine.io(f"aio_write -P {number + 100} {number % 11 * 4096} 64k")
        if number % 10 == 0:
            await machine.io(f"aio_write -z {number * 512} 64k")
            requests += await machine.checkpoint()
    await machine.io("aio_flush")
    requests += await machine.checkpoint()
    await machine.monitor.execute("x-ft-end")
    copies = Copies([("copy", copy)])
    for request in requests:
        copies.images[0].apply(request)
    copies.close()
    assert copy.read_bytes() == machine.paths[0].read_bytes()
    nodes = await machine.monitor.execute("query-named-block-nodes")
    assert "ft-journal" not in {node["drv"] for node in nodes}


async def test_a_request_larger_than_the_journal_waits_for_a_checkpoint_and_is_whole(make_machine) -> None:
    machine = await make_machine()
    await machine.begin(64 * KIB)
    await machine.gather("x-ft-collect")
    await machine.checkpoint()
    await machine.io("aio_write -P 5 512 8M")
    await wait_for(lambda: "X_FT_JOURNAL_FULL" in machine.events)
    requests: list[Request] = []
    while sum(each.length for each in requests) < 8 * MIB:
        requests += await machine.checkpoint()
    await machine.io("aio_flush")
    assert sum(each.length for each in requests) == 8 * MIB
    assert max(each.length for each in requests) <= MIB
    assert b"".join(each.data for each in requests) == b"\x05" * (8 * MIB)
    assert machine.paths[0].read_bytes()[: 9 * MIB] == bytes(512) + b"\x05" * (8 * MIB) + bytes(MIB - 512)


async def test_many_requests_that_wait_at_a_checkpoint_belong_to_it_in_several_parts(make_machine) -> None:
    machine = await make_machine()
    await machine.begin(64 * KIB)
    await machine.gather("x-ft-collect")
    await machine.checkpoint()
    for number in range(8):
        await machine.io(f"aio_write -P {number + 1} {number}M 1M")
    parts = 0
    requests: list[Request] = []
    complete = False
    while not complete:
        more, complete = await machine.gather()
        requests += more
        parts += 1
    assert parts > 1
    assert sum(each.length for each in requests) == 8 * MIB


async def test_without_a_daemon_the_guest_writes_on_and_protection_is_given_up(make_machine) -> None:
    """Nobody closes epochs any more: a request waits, and is made after a while."""
    machine = await make_machine()
    await machine.begin(64 * KIB)
    await machine.io("write -P 1 0 60k")
    await machine.io("aio_write -P 2 1M 64k")
    await wait_for(lambda: "X_FT_ABANDONED" in machine.events)
    await machine.io("aio_flush")
    assert machine.paths[0].read_bytes()[MIB : MIB + 65536] == b"\x02" * 65536
    with pytest.raises(QemuError, match="a frame was lost"):
        await machine.gather()
    await machine.monitor.execute("x-ft-end")
    await machine.begin()


async def test_disks_that_are_not_in_the_list_are_refused_and_none_can_be_plugged_in(
    make_machine, folder
) -> None:
    machine = await make_machine(2)
    with pytest.raises(QemuError, match=r"can write to disk '.*vd1.*', which is not among those"):
        await machine.begin(disks=["disk0"])
    with pytest.raises(QemuError, match="there is no block node 'disk9'"):
        await machine.begin(disks=["disk0", "disk9"])
    with pytest.raises(QemuError, match="'disk0' is not a disk that the guest can write to, or it was named"):
        await machine.begin(disks=["disk0", "disk1", "disk0"])
    with pytest.raises(QemuError, match="journal-limit is 1, it has to be from 65536 to"):
        await machine.begin(1)
    await machine.begin()
    await machine.gather("x-ft-collect")
    await machine.checkpoint()
    with pytest.raises(QemuError, match=r"[Rr]esize|permission|Conflicts"):
        await machine.monitor.execute("block_resize", node_name="disk0", size=DISK_SIZE * 2)
    (folder / "late.img").write_bytes(bytes(MIB))
    late = {"driver": "file", "filename": str(folder / "late.img")}
    await machine.monitor.execute("blockdev-add", driver="raw", node_name="late", file=late)
    disk = {"driver": "virtio-blk-pci", "id": "late", "drive": "late"}
    for command, arguments in (("device_add", disk), ("device_del", {"id": "vd0"})):
        with pytest.raises(QemuError, match=rf"{command} not allowed while the guest is being checkpointed"):
            await machine.monitor.execute(command, **arguments)
    await machine.checkpoint()
    assert machine.paths[0].stat().st_size == DISK_SIZE


async def test_the_end_of_protection_lets_go_what_waits(make_machine) -> None:
    machine = await make_machine()
    await machine.begin(64 * KIB)
    await machine.io("write -P 1 0 60k")
    await machine.io("aio_write -P 2 1M 8M")
    await wait_for(lambda: "X_FT_JOURNAL_FULL" in machine.events)
    await machine.monitor.execute("x-ft-end")
    await machine.io("aio_flush")
    assert machine.paths[0].read_bytes()[MIB : 9 * MIB] == b"\x02" * (8 * MIB)
    assert "X_FT_ABANDONED" not in machine.events


async def test_a_guest_that_ends_while_it_is_protected_ends_in_good_order(make_machine) -> None:
    machine = await make_machine(2)
    await machine.begin()
    await machine.gather("x-ft-collect")
    await machine.io("write -P 1 0 4k")
    await machine.checkpoint()
    await machine.io("write -P 2 0 4k")
    await machine.qemu.quit()
    assert machine.qemu.exit_status == 0


async def test_requests_to_several_disks_that_wait_do_not_hold_up_a_checkpoint(make_machine) -> None:
    """Those of the disk that is drained last still find no room when the first one is."""
    machine = await make_machine(3, iothread=True)
    await machine.begin(64 * KIB)
    await machine.gather("x-ft-collect")
    await machine.checkpoint()
    for number in range(4):
        for disk in range(3):
            await machine.io(f"aio_write -P {number + 1} {number * 2}M 2M", disk)
    requests: list[Request] = []
    async with asyncio.timeout(30):
        while sum(each.length for each in requests) < 3 * 8 * MIB:
            requests += await machine.checkpoint()
    assert sum(each.length for each in requests) == 3 * 8 * MIB
