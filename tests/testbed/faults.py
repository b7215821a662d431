"""What can break in a pair, drawn by chance and done for real: the vocabulary of the chaos test.

A fault begins, holds for a while, and ends. What is named by a side is resolved when the schedule begins: the
leader is the node that runs the guest then, the follower the other one.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import aiohttp

from ftd.errors import FtdError
from ftd.monitor import Monitor
from testbed.arbitrated import lives, post
from testbed.guarded import ask
from testbed.hosts import Direction, TestbedError
from testbed.namespaces import in_namespace
from testbed.pair import Daemon

if TYPE_CHECKING:
    from testbed.chaos import Trial

Side = Literal["leader", "follower", "both", "-"]
Act = Callable[["Trial", "Fault"], Awaitable[None]]
UNREACHABLE = (OSError, TimeoutError, aiohttp.ClientError, TestbedError, FtdError)


@dataclass(frozen=True)
class Kind:
    """A kind of fault. Memory is lost for good only if both copies of it are: see Schedule.may_lose_memory.

    crashes: a process of one side is killed, so one of the two copies may be gone. ends_life: the guest
    itself starts anew, so connections and what is only in its memory are gone.
    """

    name: str
    begin: Act
    end: Act
    sides: tuple[Side, ...]
    holds: tuple[float, float]
    directions: tuple[Direction, ...] = ("both",)
    crashes: bool = False
    ends_life: bool = False


KINDS: dict[str, Kind] = {}


@dataclass(frozen=True)
class Fault:
    """One fault as it was drawn."""

    kind: str
    side: Side
    hold_s: float
    direction: Direction = "both"

    def __str__(self) -> str:
        where = "" if self.side == "-" else f" {self.side}"
        way = "" if self.direction == "both" else f" {self.direction}"
        return f"{self.kind}{where}{way} {self.hold_s:.1f}s"

    @property
    def is_a(self) -> Kind:
        return KINDS[self.kind]


@dataclass(frozen=True)
class Step:
    """A fault, and what is waited for before: some seconds after the fault before, or protection."""

    fault: Fault
    after_s: float
    protected_first: bool = False

    def __str__(self) -> str:
        return f"[protected] {self.fault}" if self.protected_first else f"+{self.after_s:.1f}s {self.fault}"


@dataclass(frozen=True)
class Schedule:
    """Faults, one after the other; they overlap when a later one begins before an earlier one has ended."""

    seed: int
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, seed: int) -> Self:
        """The schedule of a seed.

        In rounds, so that a few schedules have every kind: the first of a round ends the guest's life, each
        round in another way, since a guest that boots takes its time; each of the others begins with another
        kind.
        """
        others = [kind for kind in KINDS.values() if not kind.ends_life]
        round_, place = divmod(seed, 1 + len(others))
        order = sorted(kind.name for kind in others)
        random.Random(round_).shuffle(order)
        chance = random.Random(f"schedule {seed}")
        first = order[place - 1] if place else NEW_LIVES[round_ % len(NEW_LIVES)]
        steps = [Step(_draw(chance, KINDS[first]), chance.uniform(0.1, 0.5))]
        for _ in range(chance.choice([0, 0, 0, 1, 1, 2])):
            if steps[-1].fault.is_a.ends_life:
                break
            fault = _draw(chance, KINDS[chance.choice(order)])
            steps.append(Step(fault, chance.uniform(0.0, 1.0), chance.random() < 0.3))
        return cls(seed, tuple(steps))

    def __str__(self) -> str:
        return ", ".join(map(str, self.steps))

    @property
    def ends_life(self) -> bool:
        """Whether the guest itself is made to start anew."""
        return any(step.fault.is_a.ends_life for step in self.steps)

    @property
    def may_lose_memory(self) -> bool:
        """Whether both copies of the guest may be gone at once: a crash, and another fault before the pair
        was protected again. The guest then boots from the disks of its last owner; nothing else is allowed to
        follow. With a single fault, or without a crash, its memory is never lost.
        """
        stretch: list[Fault] = []
        for step in self.steps:
            stretch = [step.fault] if step.protected_first else [*stretch, step.fault]
            if len(stretch) > 1 and any(fault.is_a.crashes for fault in stretch):
                return True
        return self.ends_life


def seeds_of(text: str) -> list[int]:
    """The seeds of `17` or `17-20`. Raises TestbedError."""
    try:
        first, _, last = text.partition("-")
        return list(range(int(first), int(last or first) + 1))
    except ValueError:
        raise TestbedError(
            f"{text}: neither a seed, such as 17, nor a range of them, such as 17-20"
        ) from None


def _draw(chance: random.Random, kind: Kind) -> Fault:
    return Fault(
        kind.name,
        chance.choice(kind.sides),
        round(chance.uniform(*kind.holds), 2),
        chance.choice(kind.directions),
    )


def _kind(
    name: str, sides: tuple[Side, ...], holds: tuple[float, float], **more: Any
) -> Callable[[Any], Any]:
    """Make a kind of a class with `begin` and `end`."""

    def make(acts: Any) -> Any:
        KINDS[name] = Kind(name, acts.begin, acts.end, sides, holds, **more)
        return acts

    return make


# In the order in which rounds begin with them.
NEW_LIVES = ("guest-reboots", "guest-panics", "hosts-off", "guest-powers-off")
SIDES: tuple[Side, ...] = ("leader", "follower")
ALSO_BOTH: tuple[Side, ...] = ("leader", "follower", "both")
WAYS: tuple[Direction, ...] = ("both", "from-host", "to-host")


# ---- processes and hosts ----------------------------------------------------------------------------------


@_kind("host-killed", SIDES, (0.1, 0.8), crashes=True)
class _HostKilled:
    """All of it dies at once; later it boots, and its daemon starts."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            trial.arena.switch_off(daemon)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.shuffled(fault):
            await trial.arena.switch_on(daemon)


@_kind("hosts-off", ("both",), (0.1, 0.5), crashes=True, ends_life=True)
class _HostsOff(_HostKilled):
    """Both hosts lose their power, and boot in any order: the owner's disks are what is left."""


@_kind("qemu-killed", SIDES, (0.1, 0.6), crashes=True)
class _QemuKilled:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            with contextlib.suppress(TestbedError, ProcessLookupError):
                daemon.kill_qemu()

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        """The daemon has to do all of it."""


@_kind("daemon-killed", ALSO_BOTH, (0.1, 1.0), crashes=True)
class _DaemonKilled:
    """SIGKILL; started again later. Its guest must outlive it, and say nothing if it was protected."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            with contextlib.suppress(TestbedError, ProcessLookupError):
                pid = daemon.qemu_pid()
                daemon.kill()
                if daemon is trial.leader:
                    trial.orphan = (daemon, pid)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        alone = len(trial.schedule.steps) == 1  # nobody else has killed or deposed it
        if trial.orphan is not None and alone:
            daemon, pid = trial.orphan
            if not lives(pid):
                trial.problems.append(f"S6: the guest on {daemon.host.name} has died with its daemon")
            elif not await holding(daemon):
                trial.problems.append(f"S6: a guest without a daemon speaks on {daemon.host.name}")
        for daemon in trial.shuffled(fault):
            await trial.arena.run(daemon)


@_kind("daemon-stopped", ALSO_BOTH, (0.1, 1.0))
class _DaemonStopped:
    """A planned stop, as for an upgrade; started again later."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            if daemon.process is not None and not daemon.ended():
                daemon.process.terminate()

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.shuffled(fault):
            if daemon.process is not None:
                with contextlib.suppress(TimeoutError):  # it may be frozen; it is continued later
                    await asyncio.wait_for(daemon.process.wait(), 10)
            await trial.arena.run(daemon)


# ---- frozen, and woken ------------------------------------------------------------------------------------


@_kind("host-frozen", SIDES, (0.1, 1.5))
class _HostFrozen:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            daemon.host.freeze()

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            daemon.host.thaw()


@_kind("daemon-frozen", SIDES, (0.1, 1.5))
class _DaemonFrozen:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            if daemon.process is not None and not daemon.ended():
                os.kill(daemon.process.pid, signal.SIGSTOP)

    end = _HostFrozen.end


@_kind("qemu-frozen", SIDES, (0.1, 1.0))
class _QemuFrozen:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            with contextlib.suppress(TestbedError, ProcessLookupError):
                os.kill(daemon.qemu_pid(), signal.SIGSTOP)

    end = _HostFrozen.end


# ---- the link ---------------------------------------------------------------------------------------------


@_kind("link-cut", SIDES, (0.1, 1.5), directions=WAYS)
class _LinkCut:
    """The cable of one host: with the peer, the arbiter is out of reach as well."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            daemon.host.cut_link(fault.direction)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        for daemon in trial.of(fault):
            daemon.host.restore_link()


@_kind("peers-cut", ("-",), (0.1, 1.5), directions=WAYS)
class _PeersCut:
    """Between the two only: both reach the arbiter, and both ask it."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.leader.host.cut_from(trial.follower.host, fault.direction)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        trial.leader.host.restore_from(trial.follower.host)


@_kind("heartbeats-cut", ("-",), (0.1, 1.5), directions=WAYS)
class _HeartbeatsCut:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.leader.host.cut_port(trial.leader.heartbeat_port, fault.direction)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        trial.leader.host.restore_port(trial.leader.heartbeat_port)


@_kind("frames-cut", ("-",), (0.1, 1.5))
class _FramesCut:
    """The one connection that carries frames: acknowledgements and heartbeats go on."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.frames_port = await frames_port(trial.leader)
        if trial.frames_port is not None:
            trial.leader.host.cut_port(trial.frames_port)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        if trial.frames_port is not None:
            trial.leader.host.restore_port(trial.frames_port)


@_kind("data-cut", ("-",), (0.1, 1.5), directions=WAYS)
class _DataCut:
    """Frames and control, and not heartbeats."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.leader.host.cut_port(trial.leader.data_port, fault.direction)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        trial.leader.host.restore_port(trial.leader.data_port)


@_kind("garbage", SIDES, (0.1, 0.3))
class _Garbage:
    """Somebody sends noise to every port of a daemon."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        noise = random.Random(trial.schedule.seed).randbytes(5000)
        for daemon in trial.of(fault):
            other = trial.follower if daemon is trial.leader else trial.leader
            for port in (daemon.data_port, daemon.heartbeat_port):
                with contextlib.suppress(OSError):
                    await in_namespace(
                        other.host.namespace, _throw, other.host.link_address, daemon, port, noise
                    )

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        """Nothing is left of it."""


def _throw(source: str, daemon: Daemon, port: int, noise: bytes) -> None:
    import socket  # noqa: PLC0415

    with socket.create_connection((daemon.host.link_address, port), 0.5, (source, 0)) as connection:
        connection.sendall(noise)


# ---- the arbiter ------------------------------------------------------------------------------------------


@_kind("arbiter-gone", ("-",), (0.3, 1.5))
class _ArbiterGone:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.arena.etcd.members[0].kill()

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        trial.arena.start_arbiter()


@_kind("arbiter-frozen", ("-",), (0.3, 1.5))
class _ArbiterFrozen:
    """Questions reach it, and are answered much later, perhaps long after nobody waits any more."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.arena.signal_arbiter(signal.SIGSTOP)

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        trial.arena.signal_arbiter(signal.SIGCONT)


# ---- what is asked for ------------------------------------------------------------------------------------


@_kind("switchover", ("-",), (0.5, 1.0))
class _Switchover:
    """May be refused, when something else is broken already."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.asked.append(asyncio.ensure_future(_post(trial.leader, "switchover")))

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        """The answer is waited for at the end."""


@_kind("protection-paused", ("-",), (0.1, 0.8))
class _ProtectionPaused:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.asked.append(asyncio.ensure_future(_post(trial.leader, "pause-protection")))

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        trial.asked.append(asyncio.ensure_future(_post(trial.leader, "resume-protection")))


async def _post(daemon: Daemon, action: str) -> None:
    with contextlib.suppress(*UNREACHABLE):
        await asyncio.wait_for(post(daemon, action), 30)


# ---- the guest --------------------------------------------------------------------------------------------


@_kind("guest-reboots", ("-",), (0.1, 0.2), ends_life=True)
class _GuestReboots:
    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        await ask(trial.arena.client, "POST", "/reboot")

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        await trial.arena.wait_new_life(trial.lives)


@_kind("guest-panics", ("-",), (0.1, 0.2), ends_life=True)
class _GuestPanics:
    """Its kernel is told to reboot a second later (panic=1)."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        await ask(trial.arena.client, "POST", "/panic")

    end = _GuestReboots.end


@_kind("guest-powers-off", ("-",), (0.1, 0.2), ends_life=True)
class _GuestPowersOff:
    """Both daemons end with code 0, nobody takes over, and the owner boots the guest when it is started."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        await ask(trial.arena.client, "POST", "/poweroff")

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        for daemon in (trial.leader, trial.follower):
            assert daemon.process is not None
            try:
                code = await asyncio.wait_for(daemon.process.wait(), 20)
            except TimeoutError:
                trial.problems.append(f"S7: {daemon.host.name} goes on after the guest has shut down")
                continue
            if code != 0:
                trial.problems.append(f"S7: {daemon.host.name} ended with code {code} as the guest shut down")
        if (record := await trial.arena.record()) is None or record.state != "stopped":
            trial.problems.append(f"S7: the guest has shut down, and the record is {record}")
        for daemon in (trial.follower, trial.leader):
            await trial.arena.run(daemon)
        await trial.arena.wait_new_life(trial.lives)


@_kind("guest-paused", ("-",), (0.1, 0.8))
class _GuestPaused:
    """By QMP, behind the daemon's back; whoever has it then goes on, wherever it is."""

    @staticmethod
    async def begin(trial: "Trial", fault: Fault) -> None:
        trial.arena.paused = True
        with contextlib.suppress(*UNREACHABLE):
            await operate(trial.leader, "stop")

    @staticmethod
    async def end(trial: "Trial", fault: Fault) -> None:
        await trial.arena.let_guests_go_on()


# ---- looking ----------------------------------------------------------------------------------------------


async def operate(daemon: Daemon, command: str) -> Any:
    """One command to a QEMU, as an operator."""
    async with (
        asyncio.timeout(5),
        await Monitor.connect(daemon.run_dir / "operator.sock") as operator,
    ):
        return await operator.execute(command)


async def holding(daemon: Daemon) -> bool:
    """Whether its QEMU holds the guest's output, or there is none that could speak."""
    try:
        return bool((await operate(daemon, "query-x-ft"))["output"]["holding"])
    except UNREACHABLE:
        return True


async def frames_port(daemon: Daemon) -> int | None:
    """The primary's own port of the connection that carries frames: the one with most bytes."""
    told = await daemon.host.output(["ss", "-tinHO", "dport", "=", f":{daemon.data_port}"])
    most: tuple[int, int] | None = None
    for line in told.splitlines():
        words = line.split()
        sent = next((int(word.partition(":")[2]) for word in words if word.startswith("bytes_sent:")), 0)
        port = int(words[3].rpartition(":")[2])
        most = max(most or (0, 0), (sent, port))
    return most[1] if most is not None else None
