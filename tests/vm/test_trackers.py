"""Every tracker finds every page: a shadow built from the frames is compared page by page with the guest.

No daemon and no network: a guest is checkpointed over QMP, its parts go through the same assembler and shadow
as on a backup, and every few epochs QEMU takes a digest of each page inside the pause. FTD_TRACKER_EPOCHS
sets the number of epochs for each combination.
"""

import asyncio
import contextlib
import itertools
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from testbed.guest import Console, build

from ftd.assembly import Frame, FrameAssembler
from ftd.errors import QemuError
from ftd.frame import Part
from ftd.qemu import QemuProcess
from ftd.shadow import Difference, Shadow
from ftd.staging import Staging, slot_size

EPOCHS = int(os.environ.get("FTD_TRACKER_EPOCHS", "20"))
EVERY = 5 if EPOCHS < 100 else 10
EPOCH_SECONDS = 0.03
MEMORY = 32 << 20
SLOT_PAGES = 2048
DEVICE_START, DEVICE_PAGES = 8 << 20, 8
HOT_TERM = 32  # epochs, as in QEMU
ROUND = re.compile(r"^round (\d+)", re.MULTILINE)

GUEST = {
    "pages": 400,
    "area": 1500,
    "pattern": "random",
    "rounds_per_second": 50,
    "device_pages": DEVICE_PAGES,
}

TRACKERS = [
    ("tcg", 0, "generic"),
    ("kvm", 0, "bitmap"),
    ("kvm", 65536, "ring-stock"),
    ("kvm", 65536, "ring"),
]

SWITCHES = ("serial-pause", "early-registers", "streaming-copy")
RING_SWITCHES = ("early-harvest", "defer-reset", "parallel-harvest", "dirty-groups")


def trackers(*names: str) -> Any:
    """The accelerator, ring size and tracker, for each of the named trackers; all if none is named."""
    return pytest.mark.parametrize(
        ("accelerator", "ring", "tracker"),
        [
            pytest.param(*row, id=row[2], marks=pytest.mark.kvm if row[0] == "kvm" else ())
            for row in TRACKERS
            if not names or row[2] in names
        ],
    )


class Mirror:
    """A guest that is checkpointed, and its shadow."""

    def __init__(self, qemu: QemuProcess, staging: Staging, shadow: Shadow, console: Console) -> None:
        self.qemu, self.shadow, self.console = qemu, shadow, console
        self.events: list[dict[str, Any]] = []
        self.pressed = asyncio.Event()
        self.pages = 0
        self.told: dict[str, Any] = {}
        self.epoch = 1
        self._staging = staging
        self._assembler = FrameAssembler(1, limit=1 << 30)
        self._slots = itertools.cycle(staging.slots)
        qemu.monitor.on("X_FT_DIRTY_PRESSURE", self._on_pressure)

    def _on_pressure(self, event: dict[str, Any]) -> None:
        self.events.append(event["data"])
        self.pressed.set()

    async def begin(self, **arguments: Any) -> dict[str, Any]:
        """Begins, and copies all of memory. Returns the status."""
        for slot in self._staging.slots:
            await self.qemu.monitor.send_descriptor(slot.name, slot.fd)
        names = [slot.name for slot in self._staging.slots]
        status: dict[str, Any] = await self.qemu.monitor.execute(
            "x-ft-begin", generation=1, slots=names, **arguments
        )
        self._assembler = FrameAssembler(1, limit=1 << 30)
        self.epoch = 1
        self.shadow.begin_sync(1)
        await self.live_round()
        await self.checkpoint()
        return status

    async def live_round(self) -> None:
        """Gathers what is dirty while the guest runs."""
        while not (await self._gather("x-ft-collect"))[0]["complete"]:
            pass

    async def checkpoint(self, *, digest: bool = False) -> list[Difference]:
        """Closes an epoch; what differs between guest and shadow, if that is compared."""
        while True:
            told, frame = await self._gather("x-ft-checkpoint", digest=digest)
            self.pages += told["pages"]
            if told["complete"]:
                break
        self.told = told
        assert frame is not None
        self.shadow.apply(frame)
        self.epoch += 1
        return self.shadow.verify(frame) if digest else []

    async def _gather(self, command: str, **arguments: Any) -> tuple[dict[str, Any], Frame | None]:
        slot = next(self._slots)
        told: dict[str, Any] = await self.qemu.monitor.execute(
            command, slot=slot.index, epoch=self.epoch, **arguments
        )
        # As if it had come over the wire: the slot is written to again.
        part = Part.from_slot(bytes(slot.view))
        part.verify()
        fed = self._assembler.feed(part)
        if isinstance(fed, Part):
            self.shadow.apply_live(fed)
            fed = None
        return told, fed

    def rounds(self) -> int:
        """How many rounds the guest has told of."""
        found = ROUND.findall(self.console.text())
        return int(found[-1]) if found else 0

    async def wait_rounds(self, count: int) -> None:
        """Waits until the guest has told of so many rounds."""
        while self.rounds() < count:
            await self.console.wait_for(ROUND.pattern, 60)


@pytest.fixture
async def mirror(make_config: Any, folder: Path) -> AsyncIterator[Any]:
    """Starts a bare guest, with its shadow in a file beside the guest's memory."""
    bare = await build("guests/bare/build")
    async with contextlib.AsyncExitStack() as stack:

        async def start(accelerator: str, ring: int, *, vcpus: int = 1, **options: object) -> Mirror:
            console = folder / "console"
            arguments = ["-bios", str(bare / "ftd-bare.bin")]
            for name, value in (GUEST | options).items():
                arguments += ["-fw_cfg", f"name=opt/ftd/{name},string={value}"]
            machine = {
                "accelerator": accelerator,
                "dirty_ring_size": ring,
                "vcpus": vcpus,
                "console": console,
            }
            qemu = await QemuProcess.start(make_config(machine=machine | {"arguments": arguments}))
            stack.push_async_callback(qemu.kill)
            memory = folder / "memory" / "shadow"
            with memory.open("wb") as file:
                file.truncate(MEMORY)
            stack.callback(memory.unlink)
            shadow = Shadow({"ftd-ram": memory})
            stack.callback(shadow.close)
            status = await qemu.monitor.execute("query-x-ft")
            blocks = sum(block["max-length"] for block in status["blocks"])
            staging = Staging(2, slot_size(SLOT_PAGES * 4096, blocks))
            stack.callback(staging.close)
            mirror = Mirror(qemu, staging, shadow, Console(console))
            await mirror.wait_rounds(1)
            return mirror

        yield start


async def run_epochs(guest: Mirror, *, live: bool = False, count: int = EPOCHS) -> list[Difference]:
    """Lets epochs pass; returns what differed first, if anything did."""
    for number in range(1, count + 1):
        await asyncio.sleep(EPOCH_SECONDS)
        if live:
            await guest.live_round()
            await asyncio.sleep(EPOCH_SECONDS / 2)
        if found := await guest.checkpoint(digest=number % EVERY == 0):
            return found
    return []


@trackers()
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("live", [False, True], ids=["pauses", "live-rounds"])
async def test_every_page_is_found(
    mirror: Any, accelerator: str, ring: int, tracker: str, vcpus: int, live: bool
) -> None:
    """Under a random writer, and a device that writes, before and after a reset of the guest."""
    guest = await mirror(accelerator, ring, vcpus=vcpus)
    status = await guest.begin(tracker=tracker)
    assert status["tracker"] == tracker
    rounds = guest.rounds()
    assert await run_epochs(guest, live=live) == []
    device = bytes(guest.shadow.memory("ftd-ram")[DEVICE_START : DEVICE_START + 4096])
    assert any(device), "no device has written to memory"
    await guest.wait_rounds(rounds + 5)
    assert await run_epochs(guest, live=live, count=EVERY) == []
    assert bytes(guest.shadow.memory("ftd-ram")[DEVICE_START : DEVICE_START + 4096]) != device
    assert guest.pages >= 5 * GUEST["pages"]

    await guest.qemu.monitor.execute("system_reset")
    assert await run_epochs(guest, live=live) == []


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("ring", "tracker", "name"),
    [
        *((ring, tracker, name) for _, ring, tracker in TRACKERS[1:] for name in SWITCHES),
        *((65536, "ring", name) for name in RING_SWITCHES),
    ],
)
async def test_every_switch_finds_every_page(mirror: Any, ring: int, tracker: str, name: str) -> None:
    """The other way round than it is by default, with two vCPUs and full rings of work."""
    guest = await mirror("kvm", ring, vcpus=2, pages=1500, rounds_per_second=100)
    status = await guest.begin(tracker=tracker)
    default = status["switches"][name]
    await guest.qemu.monitor.execute("x-ft-end")
    status = await guest.begin(tracker=tracker, switches={name: not default})
    assert status["switches"][name] is not default
    assert await run_epochs(guest, count=EVERY) == []


@trackers()
@pytest.mark.parametrize("fault", ["skip-entry", "reset-before-harvest"])
async def test_mistake_is_found(mirror: Any, accelerator: str, ring: int, tracker: str, fault: str) -> None:
    """What these tests are worth: a tracker that makes a mistake on purpose does not pass."""
    guest = await mirror(accelerator, ring, vcpus=2)
    await guest.begin(tracker=tracker, switches={"x-fault": fault})
    assert await run_epochs(guest, count=10 * EVERY)


@pytest.mark.kvm
@pytest.mark.parametrize("fault", ["none", "only-early"])
async def test_writes_after_the_early_harvest(mirror: Any, fault: str) -> None:
    """They count, too. The guest never halts, and its epochs are too short for it to come round to each page:
    so it writes, between the early harvest and the pause, to pages that it had not written to before."""
    busy = {"pages": 3900, "area": 3900, "pattern": "sequential", "rounds_per_second": 0}
    guest = await mirror("kvm", 65536, vcpus=2, **busy)
    await guest.begin(tracker="ring", switches={"x-fault": fault})
    found: list[Difference] = []
    for _ in range(EPOCHS if fault == "none" else 20 * EPOCHS):
        await asyncio.sleep(EPOCH_SECONDS / 10)
        if found := await guest.checkpoint(digest=True):
            break
    assert bool(found) == (fault != "none")


async def run_until_hot(guest: Mirror, *, live: bool, pages: int) -> None:
    """Lets epochs pass until so many pages are hot."""
    for _ in range(10 * HOT_TERM):
        assert await run_epochs(guest, live=live, count=EVERY) == []
        if guest.told["hot-pages"] >= pages:
            return
    pytest.fail(f"only {guest.told['hot-pages']} pages are hot")


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("ring", "vcpus", "live"),
    [
        pytest.param(65536, 1, False, id="pauses"),
        pytest.param(65536, 2, True, id="live-rounds"),
        pytest.param(4096, 2, False, id="without-early-harvest"),
    ],
)
async def test_hot_pages(mirror: Any, ring: int, vcpus: int, live: bool) -> None:
    """Left unprotected, they are dirty in each epoch, until their term is over and nobody writes to them."""
    guest = await mirror("kvm", ring, vcpus=vcpus)
    await guest.begin(tracker="ring", switches={"hot-epochs": 2})
    await run_until_hot(guest, live=live, pages=GUEST["pages"] // 4)
    assert await run_epochs(guest, live=live, count=max(EPOCHS, HOT_TERM + 10)) == []

    await guest.qemu.monitor.execute("stop")
    for _ in range(HOT_TERM + 1):
        await guest.checkpoint()
    assert await guest.checkpoint(digest=True) == []
    assert guest.told["hot-pages"] == 0
    assert guest.told["pages"] + guest.told["zero-pages"] == 0

    await guest.qemu.monitor.execute("cont")
    await guest.qemu.monitor.execute("system_reset")
    await run_until_hot(guest, live=live, pages=1)


@pytest.mark.kvm
async def test_hot_pages_that_are_forgotten_are_missed(mirror: Any) -> None:
    """That is: the shadow of a test like the one above hangs on their being taken for dirty."""
    guest = await mirror("kvm", 65536, vcpus=2)
    await guest.begin(tracker="ring", switches={"hot-epochs": 2, "x-fault": "forget-hot"})
    assert await run_epochs(guest, count=10 * EVERY)


@pytest.mark.kvm
@pytest.mark.parametrize("vcpus", [1, 2])
async def test_smallest_ring_loses_nothing(mirror: Any, vcpus: int) -> None:
    """A ring that fills asks for an early checkpoint, and one that overflows makes all memory dirty."""
    guest = await mirror("kvm", 1024, vcpus=vcpus, pages=1500, rounds_per_second=100)
    await guest.begin(tracker="ring")
    assert await run_epochs(guest) == []
    assert "ring-full" in {event["reason"] for event in guest.events}
    rounds = guest.rounds()
    for number in range(1000):
        if guest.rounds() > rounds:
            break
        assert await run_epochs(guest, count=1) == [], number
    else:
        pytest.fail("the guest stands still")


@pytest.mark.kvm
async def test_ring_asks_for_a_checkpoint_before_it_is_full(mirror: Any) -> None:
    """At three quarters, while the vCPU still runs."""
    guest = await mirror("kvm", 65536, pages=1000, rounds_per_second=0)
    await guest.begin(tracker="ring")
    await asyncio.wait_for(guest.pressed.wait(), 60)
    part, _ = await guest._gather("x-ft-checkpoint")
    assert guest.events[0]["reason"] == "ring-full"
    assert part["pages"] < 4000, "all memory counts as dirty: the ring had overflowed"


@pytest.mark.parametrize(
    ("accelerator", "ring", "arguments", "words"),
    [
        ("tcg", 0, {"tracker": "ring"}, "tracker 'ring' is for guests that run with KVM"),
        ("tcg", 0, {"switches": {"defer-reset": True}}, "are for tracker 'ring', not for 'generic'"),
        ("tcg", 0, {"switches": {"hot-epochs": 3}}, "are for tracker 'ring', not for 'generic'"),
        pytest.param("kvm", 0, {"tracker": "ring"}, "needs dirty rings: start QEMU", marks=pytest.mark.kvm),
        pytest.param(
            "kvm", 4096, {"tracker": "bitmap"}, "start QEMU without dirty-ring-size", marks=pytest.mark.kvm
        ),
        pytest.param("kvm", 4096, {"tracker": "generic"}, "run without KVM", marks=pytest.mark.kvm),
        pytest.param(
            "kvm",
            4096,
            {"switches": {"early-harvest": False, "x-fault": "only-early"}},
            "x-fault 'only-early' is for early-harvest",
            marks=pytest.mark.kvm,
        ),
        pytest.param(
            "kvm",
            4096,
            {"switches": {"x-fault": "forget-hot"}},
            "x-fault 'forget-hot' is for hot-epochs",
            marks=pytest.mark.kvm,
        ),
    ],
)
async def test_wrong_combination_is_refused(
    mirror: Any, accelerator: str, ring: int, arguments: dict[str, Any], words: str
) -> None:
    """In words that name the remedy; and the guest can be checkpointed after that."""
    guest = await mirror(accelerator, ring)
    with pytest.raises(QemuError, match=re.escape(words)):
        await guest.begin(**arguments)
    assert not (await guest.qemu.monitor.execute("query-x-ft"))["active"]
    await guest.begin()


@trackers("generic", "bitmap", "ring")
async def test_best_tracker_is_chosen(mirror: Any, accelerator: str, ring: int, tracker: str) -> None:
    """Without being asked for, none has the serial pause of the systems that we compare with."""
    guest = await mirror(accelerator, ring)
    status = await guest.begin()
    assert status["tracker"] == tracker
    assert status["switches"]["serial-pause"] is False


@pytest.mark.kvm
@pytest.mark.parametrize("ring", [0, 65536], ids=["bitmap", "ring"])
async def test_processor_is_started_again_and_again(mirror: Any, ring: int) -> None:
    """One processor starts the other all the time, also while that one's registers are read.

    An INIT that is carried out twice, or is put back as pending, has the second processor run the firmware,
    which boots the guest anew. One that is lost leaves the second processor where it was.
    """
    told = r"^round \d+ .* restarts (?P<restarts>\d+) lost (?P<lost>\d+)$"
    guest = await mirror("kvm", ring, vcpus=2, pages=2, area=2, rounds_per_second=0, restart=1)
    await guest.begin()
    for _ in range(500):
        await guest.checkpoint()
    guest.console.skip()
    match = await guest.console.wait_for(told, 60)
    assert len(guest.console.find_all("ftd-bare: ready")) == 1, "the guest has booted anew"
    assert int(match["lost"]) == 0
    assert int(match["restarts"]) >= 50
