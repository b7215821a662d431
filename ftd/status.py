"""What a node tells about itself: the answer of GET /status and POST /verify, and the source behind them.

The JSON of these models is an interface: fields are added, never renamed and never given another meaning. A
reader ignores what it does not know, so that an older `ftd status` can read a newer daemon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from ftd.state import PairState, Role


class Model(BaseModel):
    """Base of everything below."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class QemuStatus(Model):
    """The QEMU process of this node. accelerator: kvm or tcg; tracker: how dirty pages are found."""

    pid: int | None = None
    version: str = ""
    accelerator: str = ""
    tracker: str = ""
    running: bool = False
    """Whether the vCPUs run: true for a guest, false for a shadow."""


class PauseStatus(Model):
    """Pause of the last `count` checkpoints, at most 1000; seconds. parts_*: the same of its parts."""

    count: int = 0
    p50: float | None = None
    p99: float | None = None
    parts_p50: dict[str, float] = {}
    parts_p99: dict[str, float] = {}


class EpochStatus(Model):
    """Epochs of this generation; lengths in seconds.

    current: the epoch that is running; committed: the last committed one; 0 for none. begun = committed +
    aborted + in_flight + 1, the one that is running. configured: [epoch] length_ms; target: the length aimed
    at, the same unless mode is auto; decided_by: what it follows from (see ftd.pacing). stretch: length
    against target, 1 when the epochs keep to it. slowdown: share of the guest's time spent in pauses;
    added_latency: from the beginning of an epoch until its commit; both of the last few epochs, None before.
    in_flight: epochs closed and not yet committed.
    """

    current: int = 0
    committed: int = 0
    begun: int = 0
    aborted: int = 0
    length: float = 0.0
    configured: float = 0.0
    stretch: float = 1.0
    mode: str = "fixed"
    target: float = 0.0
    decided_by: str = "configured"
    slowdown: float | None = None
    added_latency: float | None = None
    in_flight: int = 0


class SpeculationStatus(Model):
    """Pages sent before their epoch was over. mode: that of [epoch] speculative.

    active: whether it is done now, since it pays or is configured. gain: pages of pause that a round saves on
    average, what was sent in vain deducted. pages: sent early; pages_again: of these, dirty again at the
    checkpoint.
    """

    mode: str = "off"
    active: bool = False
    gain: float = 0.0
    rounds: int = 0
    pages: int = 0
    pages_again: int = 0


class SyncStatus(Model):
    """The copy under way, or the last one. progress: 0 to 1; seconds: how long it has taken so far, or
    took."""

    progress: float = Field(default=0.0, ge=0.0, le=1.0)
    seconds: float | None = None
    rounds: int = 0
    bytes_sent: int = 0
    disk_bytes: int = 0
    """Of all disks; 0 for a guest without."""
    disk_bytes_compared: int = 0
    disk_bytes_sent: int = 0


class PathStatus(Model):
    """A path on which the peer is heard: `link`, or a [[heartbeat.path]]. address: the peer's on it.

    heartbeat_age: seconds since it was last heard there, None when never in this session. detail: why it is
    down.
    """

    name: str
    address: str
    up: bool = False
    heartbeat_age: float | None = None
    detail: str = ""


class ResumptionStatus(Model):
    """How often protection went on without a copy after a daemon was replaced, and the last time of it.

    epoch: the first that was committed afterwards; held: seconds for which output had waited.
    """

    count: int = 0
    epoch: int | None = None
    held: float | None = None


class PeerStatus(Model):
    """The other node. heartbeat_age: seconds since it was last heard on any path, None when never."""

    address: str
    name: str = ""
    connected: bool = False
    heartbeat_age: float | None = None
    paths: list[PathStatus] = []


class OutputStatus(Model):
    """Network output of the guest. holding: whether output commit is in force."""

    holding: bool = False
    held_packets: int = 0
    held_bytes: int = 0
    longest_hold: float = 0.0
    pushed_back: int = 0
    dropped: int = 0
    """Packets lost from a NIC that cannot wait, because the buffer was full."""


class TakeoverStatus(Model):
    """The last takeover made by this node; seconds, except `at`, which is UTC in ISO 8601."""

    at: str
    trigger: str
    epoch: int
    detection: float
    activation: float
    total: float


class AuthorityStatus(Model):
    """Who may speak for the guest. arbiter: its kind; standing: see ftd/authority.py.

    owner, record: of the arbiter's record as last seen. error: why the last question was not answered.
    """

    arbiter: str = "none"
    standing: str = "empty"
    owner: str = ""
    record: str = ""
    error: str = ""


class Difference(Model):
    """A page of the shadow that differs from the primary's; page counts from 0 within the block."""

    block: str
    page: int


class DiskDifference(Model):
    """A block of 4096 bytes of the backup's disk that differs from the primary's; it counts from 0."""

    disk: str
    block: int


class VerifyReport(Model):
    """Result of comparing all memory after an epoch, and then the disks, as of epochs up to disk_epoch.

    The lists hold the first few of `differing` pages and `disk_differing` blocks. disk_blocks is 0 when no
    disk was compared, and not that of all disks after an epoch of [epoch] verify_every: then only what was
    written since the one before is compared.
    """

    epoch: int
    ok: bool
    pages: int = 0
    differing: int = 0
    differences: list[Difference] = []
    disk_epoch: int = 0
    disk_blocks: int = 0
    disk_differing: int = 0
    disk_differences: list[DiskDifference] = []


class Status(Model):
    """Everything that `ftd status` shows."""

    node: str
    version: str
    role: Role
    state: PairState
    reason: str = ""
    """Why the node is in this state, in one line."""
    state_seconds: float = 0.0
    """How long it has been in this state."""
    solo_intended: bool = False
    """Whether somebody wants this node to run alone: a guest that is meant to have no backup for now."""
    uptime: float = 0.0
    generation: int = 0
    authority: AuthorityStatus = AuthorityStatus()
    epoch: EpochStatus = EpochStatus()
    sync: SyncStatus = SyncStatus()
    resumption: ResumptionStatus = ResumptionStatus()
    away: bool = False
    """Whether a daemon of the pair is being replaced, and this one waits for the other to come back."""
    in_flight_bytes: int = 0
    peer: PeerStatus | None = None
    output: OutputStatus = OutputStatus()
    pause: PauseStatus = PauseStatus()
    speculation: SpeculationStatus = SpeculationStatus()
    qemu: QemuStatus = QemuStatus()
    takeover: TakeoverStatus | None = None
    last_verify: VerifyReport | None = None
    warnings: list[str] = []


class PeerFlight(Model):
    """The newest lines of the peer's flight recorder. cut: there are older ones, which it has kept."""

    node: str
    lines: str
    cut: bool = False


class Failure(Model):
    """Body of every answer that is not a success."""

    error: str


class Done(Model):
    """Body of the answer to what an operator asked for. detail: what was done, in one line."""

    detail: str


class Health(Model):
    """Body of /healthz and /readyz."""

    ok: bool
    state: PairState
    detail: str = "ok"


class StatusSource(Protocol):
    """What the HTTP side needs of the node. Called in the event loop's thread; only `verify` may take
    time."""

    def status(self) -> Status:
        """Return a snapshot."""
        ...

    def why_unhealthy(self) -> str | None:
        """Say in one line why this process should be restarted, or None.

        A lost peer or an unprotected guest is no reason: a restart would not mend it.
        """
        ...

    async def verify(self) -> VerifyReport:
        """Compare all memory with the shadow at the next epoch's end. Raises FtdError when that is impossible
        now."""
        ...

    async def peer_flight(self) -> PeerFlight:
        """Fetch the peer's flight recorder. Raises FtdError when the peer cannot be asked."""
        ...

    async def control(self, action: str, arguments: Mapping[str, Any]) -> Done:
        """Carry out what an operator asks for. Raises FtdError that says why not."""
        ...


def why_not_ready(status: Status) -> str | None:
    """Say in one line why the node is not as it should be, or None when it is.

    Ready is a pair whose guest is protected (both its nodes are), and a node that serves alone because that
    is meant: it took over, or its operator wants it so. A guest that is alone because its backup failed is
    served all the same, but one more failure ends it; a rollout or a drain that waits for readiness must wait
    here.
    """
    because = f" ({status.reason})" if status.reason else ""
    match status.state:
        case PairState.PROTECTED | PairState.TAKEN_OVER:
            return None
        case PairState.SOLO if status.solo_intended:
            return None
        case PairState.SOLO:
            return f"solo: the guest runs without a backup{because}"
        case PairState.SYNCING:
            return f"syncing: the copy of the guest is {status.sync.progress:.0%} done{because}"
        case PairState.HELD:
            return f"held: it is unclear who has the authority over the guest{because}"
        case PairState.WAITING:
            wanted = "its guest is not up yet" if status.role == "primary" else "no primary has come yet"
            return f"waiting: {wanted}{because}"
        case PairState.STOPPED:
            return f"stopped: no guest runs here any more{because}"
