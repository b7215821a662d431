"""What this node knows of itself, kept up to date by whoever does the work, and told as a `Status`.

One `Report` lives as long as the daemon; primary and backup write to it, the HTTP side reads it. It belongs
to the event loop's thread. Writing here does nothing but tell: no decision is taken from it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import ftd
from ftd import log
from ftd.arbiter import Record
from ftd.authority import Row, Standing
from ftd.config import Config
from ftd.config.paths import LINK_PATH
from ftd.disk import BLOCK
from ftd.disksync import DiskProgress
from ftd.errors import FtdError, PeerError
from ftd.flight import FlightRecorder, pack, unpack
from ftd.messages import DiskVerifyResult, Flight, VerifyResult
from ftd.metrics import PAUSE_PARTS, Metrics, PausePart, Trigger, Warning_
from ftd.pacing import Account, FixedPace
from ftd.paths import PathState
from ftd.speculation import Round, Speculation
from ftd.state import Move, PairState, Role, StateMachine
from ftd.status import (
    AuthorityStatus,
    Difference,
    DiskDifference,
    EpochStatus,
    OutputStatus,
    PathStatus,
    PauseStatus,
    PeerFlight,
    PeerStatus,
    QemuStatus,
    ResumptionStatus,
    SpeculationStatus,
    Status,
    SyncStatus,
    TakeoverStatus,
    VerifyReport,
)

_log = log.get(__name__)

KEPT_PAUSES = 1000

# For the peer to send its flight recorder.
FLIGHT_TIMEOUT = 5.0


class PeerView(Protocol):
    """What is told of a session with the peer; link.Session is one."""

    peer_node: str
    on_path: Callable[[str, bool, str], None]
    on_missed: Callable[[], None]
    flight: Callable[[], Coroutine[Any, Any, Flight]] | None

    async def fetch_flight(self) -> Flight:
        """Ask the peer for its flight recorder."""
        ...

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the peer was last heard."""
        ...

    def paths(self) -> list[PathState]:
        """Return how the paths are."""
        ...


def with_disks(report: VerifyReport, result: DiskVerifyResult) -> VerifyReport:
    """Return the result of comparing memory with that of comparing disks in it."""
    return report.model_copy(
        update={
            "ok": not report.differing and result.ok,
            "disk_epoch": result.epoch,
            "disk_blocks": result.blocks,
            "disk_differing": result.differing,
            "disk_differences": [DiskDifference(disk=d.disk, block=d.block) for d in result.differences],
        }
    )


class _ApplyLag:
    """How late frames are on the backup's disks: those that wait for it, and the last one that was."""

    def __init__(self) -> None:
        self._waiting: deque[float] = deque()  # when they were acknowledged, monotonic; oldest first
        # Applied before their acknowledgement was heard of here: the news come from two threads.
        self._ahead = 0
        self._last: float | None = None

    def acknowledged(self) -> None:
        """A frame is to be applied, after those before it."""
        if self._ahead:
            self._ahead -= 1
        else:
            self._waiting.append(time.monotonic())

    def applied(self, seconds: float) -> None:
        """The oldest one was, so long after its acknowledgement."""
        if self._waiting:
            self._waiting.popleft()
        else:
            self._ahead += 1
        self._last = seconds

    def now(self) -> float | None:
        """Seconds by which the last one was late, or the oldest is by now; None before the first."""
        if not self._waiting:
            return self._last
        return max(time.monotonic() - self._waiting[0], self._last or 0.0)


class Report:
    """The node's account of itself. `machine` is its state; `metrics` are its series."""

    def __init__(self, config: Config, metrics: Metrics, role: Role) -> None:
        self.config = config
        self.metrics = metrics
        self.machine = StateMachine(role)
        self.flight = FlightRecorder(config.node.state_folder, config.node.name)
        self.standing = Standing.EMPTY
        self._asked: dict[str, str] = {}
        self.note = ""  # why a node that waits does so
        self._authority = AuthorityStatus(arbiter=config.arbiter.kind)
        self.generation = 0
        self.epoch = 0
        self.committed = 0
        self.in_flight_bytes = 0
        self.qemu = QemuStatus()
        self.solo_intended = False
        self.peer_name = ""
        self.peer_connected = False
        self._peer: PeerView | None = None
        self._apply_lag = _ApplyLag()  # of this session
        self._paths_down: dict[str, str] = {}
        self._peer_address = config.link.peer
        self._peer_chosen = False
        self.last_verify: VerifyReport | None = None
        self._takeover: TakeoverStatus | None = None
        self._pauses: deque[float] = deque(maxlen=KEPT_PAUSES)
        self._parts: dict[PausePart, deque[float]] = {part: deque(maxlen=KEPT_PAUSES) for part in PAUSE_PARTS}
        self._epoch_length = self._target = self.configured_epoch
        self._decided_by = "configured"
        self._account: Account | None = None
        self._in_flight_epochs = 0
        self._speculation = SpeculationStatus(mode=config.epoch.speculative)
        self._begun = 0
        self._aborted = 0
        self._sync = SyncStatus()
        self._sync_began = 0.0
        self._resumption = ResumptionStatus()
        self.went_on = asyncio.Event()  # protection did so after a daemon was replaced
        self.away = ""  # whose daemon is being replaced, while this one waits for it
        self._output = OutputStatus()
        self._warnings: dict[Warning_, str] = {}
        self._started = self._moved = time.monotonic()
        self.machine.listen(self._on_move)
        metrics.set_role(self.machine.role)
        metrics.set_state(self.machine.state)
        metrics.set_heartbeat_age_source(self._heartbeat_age)
        metrics.set_disk_apply_lag_source(lambda: self._apply_lag.now() if self._peer is not None else None)
        metrics.set_paths(path.name for path in config.heartbeat.path)
        metrics.in_flight_limit.set(config.epoch.in_flight_mib << 20)
        metrics.set_epoch_length(self.configured_epoch, self.configured_epoch)

    @property
    def configured_epoch(self) -> float:
        """The configured length of an epoch, in seconds."""
        return self.config.epoch.length_ms / 1000

    def _heartbeat_age(self) -> float | None:
        return self._peer.heartbeat_age if self._peer is not None else None

    # ---- the session --------------------------------------------------------------------------------------

    def session_began(self, peer: PeerView) -> None:
        """There is a session; what is shown of the peer is asked of it until `session_ended`."""
        self._peer = peer
        self._apply_lag = _ApplyLag()
        self.peer_name, self.peer_connected = peer.peer_node, True
        peer.on_path = self._on_path
        peer.on_missed = self.metrics.heartbeats_missed.inc
        peer.flight = self._own_flight
        for path in peer.paths():
            self.metrics.set_path(path.name, path.up)

    async def _own_flight(self) -> Flight:
        lines, cut = await self.flight.tail()
        return Flight(lines=pack(lines), cut=cut)

    async def peer_flight(self) -> PeerFlight:
        """Fetch the newest lines of the peer's flight recorder over the link.

        Raises FtdError, one line, when there is no session, or no answer in time.
        """
        peer = self._peer
        if peer is None:
            raise FtdError(
                f"no session with the peer at {self._peer_address} now: this node is {self.machine.state}"
            )
        try:
            async with asyncio.timeout(FLIGHT_TIMEOUT):
                flight = await peer.fetch_flight()
        except TimeoutError:
            raise PeerError(f"{peer.peer_node} did not send its record within {FLIGHT_TIMEOUT:g} s") from None
        lines = unpack(flight.lines) if flight.lines else b""
        if not lines:
            raise PeerError(f"{peer.peer_node} cannot read its own record; its log says why")
        return PeerFlight(node=peer.peer_node, lines=lines.decode(errors="replace"), cut=flight.cut)

    def set_peer_address(self, address: str, warning: str | None) -> None:
        """Show where the peer is; warning: that it is not the one of the configuration."""
        self._peer_address, self._peer_chosen = address, warning is not None
        self._show_no_paths()
        if warning is not None:
            self.warn("other_peer", warning)
        else:
            self.clear_warning("other_peer")

    def session_ended(self) -> None:
        """There is no session any more."""
        self._peer = None
        self.peer_connected = False
        self._show_no_paths()
        self._paths_down.clear()
        self.clear_warning("path_down")

    def _show_no_paths(self) -> None:
        self.metrics.set_path(LINK_PATH, False)
        for path in self.config.heartbeat.path:
            # Towards another peer than that of the configuration there is no such path, and no alert.
            self.metrics.set_path(path.name, None if self._peer_chosen else False)

    def _on_path(self, name: str, up: bool, detail: str) -> None:
        """Tell that a path went down or up, while the peer is heard on another, or on this one again."""
        self.metrics.set_path(name, up, lost=not up)
        self.flight.note("path", path=name, up=up, reason=detail)
        if up:
            self._paths_down.pop(name, None)
        else:
            self._paths_down[name] = detail
        if self._paths_down:
            self.warn(
                "path_down",
                "; ".join(f"heartbeat path {path} is down: {why}" for path, why in self._paths_down.items()),
            )
        else:
            self.clear_warning("path_down")

    def _on_move(self, move: Move) -> None:
        self._moved = time.monotonic()
        self.metrics.set_state(move.to)
        self.metrics.state_moves.labels(state=move.to.value).inc()
        self.flight.note("state", to=move.to.value, was=move.origin.value, role=move.role, reason=move.reason)
        self.metrics.set_role(self.machine.role)

    def set_generation(self, generation: int) -> None:
        """Note the generation; epochs are counted anew in it."""
        if generation != self.generation:
            self.generation = generation
            self.epoch = self.committed = 0
        self.metrics.generation.set(generation)

    def on_authority(self, row: Row) -> None:
        """Log and show a change of the standing; the listener of an Authority."""
        if row.to is not row.standing:
            self.flight.note("standing", to=row.to.value, was=row.standing.value, reason=row.why)
            _log.info("standing changed", standing=row.to.value, was=row.standing.value, reason=row.why)
        self.set_standing(row.to)

    def set_standing(self, standing: Standing) -> None:
        """Show the standing towards the arbiter."""
        self.standing = standing
        self.metrics.set_standing(standing)

    def arbiter_answered(self, question: str, answer: str, seconds: float, record: Record | None) -> None:
        """Count a question to the arbiter, and show the record that it has."""
        self.metrics.arbiter_questions.labels(answer=answer).inc()
        self.metrics.arbiter_answer.observe(seconds)
        told = {"question": question, "answer": answer}
        if told != self._asked or answer in ("granted", "denied"):
            # An arbiter that does not answer is asked twice a second.
            self._asked = told
            self.flight.note(
                "arbiter", **told, seconds=round(seconds, 4), record=str(record) if record is not None else ""
            )
        if answer in ("granted", "denied"):
            self.clear_warning("arbiter_unreachable")
            self.clear_warning("arbiter_stale")
            self._authority = self._authority.model_copy(
                update={
                    "error": "",
                    "owner": record.owner if record is not None else "",
                    "record": str(record) if record is not None else "",
                }
            )

    def arbiter_seen(self, record: Record | None) -> None:
        """Show the arbiter's record, which was looked at."""
        self.clear_warning("arbiter_unreachable")
        self.clear_warning("arbiter_stale")
        self._authority = self._authority.model_copy(
            update={
                "error": "",
                "owner": record.owner if record is not None else "",
                "record": str(record) if record is not None else "",
            }
        )

    def arbiter_failed(self, reason: str, *, stale: bool = False) -> None:
        """Show that the arbiter did not answer, or that what it answered is not believed."""
        self.warn("arbiter_stale" if stale else "arbiter_unreachable", reason)
        self._authority = self._authority.model_copy(update={"error": reason})

    def warn(self, name: Warning_, text: str) -> None:
        """Show a warning for as long as the daemon runs."""
        self._warnings[name] = text
        self.metrics.set_warning(name, True)

    @property
    def warning_names(self) -> frozenset[Warning_]:
        """The warnings that are shown now."""
        return frozenset(self._warnings)

    def clear_warning(self, name: Warning_) -> None:
        """Stop to show a warning."""
        self._warnings.pop(name, None)
        self.metrics.set_warning(name, False)

    # ---- protection ---------------------------------------------------------------------------------------

    def begin_sync(self) -> None:
        """A copy of all memory begins."""
        self._sync = SyncStatus()
        self._sync_began = time.monotonic()
        self.metrics.sync_progress.set(0)

    def sync_round(self, progress: float, size: int) -> None:
        """A live round was gathered. progress: 0 to 1; size: bytes of the round."""
        self._sync = self._sync.model_copy(
            update={
                "progress": min(max(progress, self._sync.progress), 1.0),
                "seconds": time.monotonic() - self._sync_began,
                "rounds": self._sync.rounds + 1,
                "bytes_sent": self._sync.bytes_sent + size,
            }
        )
        self.metrics.sync_progress.set(self._sync.progress)

    def end_sync(self) -> None:
        """The guest is protected."""
        seconds = time.monotonic() - self._sync_began
        self._sync = self._sync.model_copy(update={"progress": 1.0, "seconds": seconds})
        self.metrics.sync_progress.set(1)
        self.metrics.sync_seconds.set(seconds)
        self.metrics.syncs.inc()

    def resumed(self, epoch: int, held: float | None) -> None:
        """Protection went on without a copy. held: seconds for which output waited; None on a backup."""
        self._resumption = ResumptionStatus(count=self._resumption.count + 1, epoch=epoch, held=held)
        self.metrics.resumptions.inc()
        if held is not None:
            self.metrics.resumption_seconds.set(held)
        self.went_on.set()
        waited = {} if held is None else {"held": round(held, 4)}
        self.flight.note("resumed", epoch=epoch, generation=self.generation, **waited)

    def begin_epoch(self, epoch: int) -> None:
        """An epoch is running."""
        self.epoch = epoch
        self._begun += 1
        self.metrics.epochs_begun.inc()

    def no_epochs(self) -> None:
        """No epoch runs any more: what the last ones were like is not how it is now."""
        self._epoch_length = self._target = self.configured_epoch
        self._decided_by, self._account = "configured", None
        self._speculation = self._speculation.model_copy(update={"active": False})
        metrics = self.metrics
        metrics.set_epoch_length(self.configured_epoch, self.configured_epoch)
        metrics.epoch_slowdown.set(math.nan)
        metrics.epoch_added_latency.set(math.nan)
        metrics.hot_pages.set(0)
        metrics.speculative_active.set(0)

    def epoch_aborted(self, reason: str, count: int = 1) -> None:
        """So many epochs will never be committed. reason: one of metrics.ABORT_REASONS."""
        self._aborted += count
        self.metrics.epochs_aborted.labels(reason=reason).inc(count)

    def epoch_length(self, seconds: float) -> None:
        """Note how long the last epoch was."""
        self._epoch_length = seconds
        self.metrics.set_epoch_length(seconds, self.configured_epoch, self._target)

    def pace(self, pace: FixedPace) -> None:
        """Note how long epochs shall be, why, and what they cost."""
        self._target = pace.length
        self._decided_by = pace.reason
        self._account = account = pace.account
        if account is not None:
            self.metrics.epoch_slowdown.set(account.slowdown)
            if account.added_latency is not None:
                self.metrics.epoch_added_latency.set(account.added_latency)

    def speculation(self, speculation: Speculation, one: Round | None = None) -> None:
        """Note a round of speculative transfer, if there was one, and what is decided now."""
        self._speculation = SpeculationStatus(
            mode=speculation.mode,
            active=speculation.active,
            gain=speculation.average_gain,
            rounds=self._speculation.rounds + (one is not None),
            pages=self._speculation.pages + (one.early if one else 0),
            pages_again=self._speculation.pages_again + (one.again if one else 0),
        )
        metrics = self.metrics
        metrics.speculative_active.set(speculation.active)
        metrics.speculative_gain.set(speculation.average_gain)
        if one is not None:
            metrics.speculative_rounds.inc()
            metrics.speculative_pages.inc(one.early)
            metrics.speculative_pages_again.inc(one.again)

    def pause(self, pause_ns: Mapping[str, int]) -> None:
        """Note the pause of a checkpoint, as QEMU's FtPause tells it, summed over the parts of its frame."""
        parts = {part: pause_ns[f"{part}-ns"] for part in PAUSE_PARTS}
        self.metrics.observe_pause(pause_ns["total-ns"], parts)
        self._pauses.append(pause_ns["total-ns"] / 1e9)
        for part, ns in parts.items():
            self._parts[part].append(ns / 1e9)

    def committed_epoch(self, epoch: int, latency: float | None = None) -> None:
        """Note that an epoch is committed. latency: seconds from the guest running again to the ack."""
        self.committed = epoch
        self.metrics.epochs_committed.inc()
        self.metrics.epoch_committed.set(epoch)
        self.flight.epoch(epoch, self.generation)
        if latency is not None:
            self.metrics.commit_latency.observe(latency)

    def output(self, output: Mapping[str, Any], latency: float | None) -> None:
        """Note what QEMU's FtOutput says. latency: seconds from the last ack until its output was let go."""
        metrics = self.metrics
        held = OutputStatus(
            holding=output["holding"],
            held_packets=output["packets"],
            held_bytes=output["bytes"],
            longest_hold=output["longest-ns"] / 1e9,
            pushed_back=output["pushed-back"],
            dropped=output["dropped"],
        )
        # QEMU counts for as long as it lives, and a daemon may have been restarted meanwhile.
        metrics.output_pushed_back.inc(max(0, held.pushed_back - self._output.pushed_back))
        metrics.output_held_packets.set(held.held_packets)
        metrics.output_held.set(held.held_bytes)
        metrics.output_longest_hold.set(held.longest_hold)
        if latency is not None:
            metrics.release_latency.observe(latency)
        self._output = held

    def no_output(self) -> None:
        """Nothing is known of the output any more: protection has ended."""
        self._output = OutputStatus(pushed_back=self._output.pushed_back)
        self.metrics.output_held_packets.set(0)
        self.metrics.output_held.set(0)

    def disk_sync(self, progress: DiskProgress) -> None:
        """Note how far the copy of the disks is."""
        self.metrics.disk_sync(progress.total, progress.compared, progress.sent)
        self._sync = self._sync.model_copy(
            update={
                "disk_bytes": progress.total,
                "disk_bytes_compared": progress.compared,
                "disk_bytes_sent": progress.sent,
            }
        )

    def journal(self, requests: int, size: int) -> None:
        """Note what the guest did to its disks in an epoch. size: bytes of its journal.

        On a backup: of an epoch that was acknowledged now, and is to be applied to the disks.
        """
        self.metrics.epoch_disk_requests.observe(requests)
        self.metrics.epoch_journal_bytes.observe(size)
        if self.machine.role == "backup":
            self._apply_lag.acknowledged()

    def disks_applied(self, seconds: float) -> None:
        """Note how long after its acknowledgement the next frame was on the disks."""
        self._apply_lag.applied(seconds)

    def set_in_flight(self, size: int, epochs: int = 0) -> None:
        """Note the bytes under way to the backup, and how many closed epochs they belong to."""
        self.in_flight_bytes = size
        self._in_flight_epochs = epochs
        self.metrics.in_flight.set(size)

    def verified(self, result: VerifyResult) -> VerifyReport:
        """Note the result of a comparison of memory, and return it as operators see it."""
        differences = [Difference(block=one.block, page=one.page) for one in result.differences]
        report = VerifyReport(
            epoch=result.epoch,
            ok=result.ok,
            pages=result.pages,
            differing=result.differing,
            differences=differences,
        )
        self.last_verify = report
        self.metrics.epochs_verified.inc()
        self.metrics.verify_differences.inc(report.differing)
        if not result.ok:
            _log.error(
                "THE SHADOW DIFFERS FROM THE GUEST",
                epoch=result.epoch,
                differing=result.differing,
                pages=" ".join(f"{one.block}:{one.page}" for one in differences[:16]),
            )
        return report

    def verified_disks(self, result: DiskVerifyResult) -> None:
        """Note the result of a comparison of disks, beside that of the last one of memory."""
        self.last_verify = with_disks(self.last_verify or VerifyReport(epoch=result.epoch, ok=True), result)
        self.metrics.disk_verified.inc(result.blocks * BLOCK)
        self.metrics.disk_verify_differences.inc(result.differing)
        if not result.ok:
            _log.error(
                "THE BACKUP'S DISK DIFFERS FROM THE GUEST'S",
                epoch=result.epoch,
                differing=result.differing,
                blocks=" ".join(f"{one.disk}:{one.block}" for one in result.differences[:16]),
            )

    def took_over(
        self, trigger: Trigger, epoch: int, *, detection: float, activation: float, total: float
    ) -> None:
        """Note a takeover; seconds."""
        self._takeover = TakeoverStatus(
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            trigger=trigger,
            epoch=epoch,
            detection=detection,
            activation=activation,
            total=total,
        )
        self.flight.note(
            "took-over",
            trigger=trigger,
            epoch=epoch,
            detection=round(detection, 4),
            activation=round(activation, 4),
        )
        self.metrics.count_takeover(trigger, detection=detection, activation=activation, total=total)

    # ---- telling ------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Return a snapshot of everything."""
        peer = PeerStatus(
            address=self._peer_address,
            name=self.peer_name,
            connected=self.peer_connected,
            heartbeat_age=self._heartbeat_age(),
            paths=self._path_status(),
        )
        values: dict[str, Any] = {
            "epoch": EpochStatus(
                current=self.epoch,
                committed=self.committed,
                begun=self._begun,
                aborted=self._aborted,
                length=self._epoch_length,
                configured=self.configured_epoch,
                stretch=max(1.0, self._epoch_length / self._target),
                mode=self.config.epoch.mode,
                target=self._target,
                decided_by=self._decided_by,
                slowdown=self._account.slowdown if self._account else None,
                added_latency=self._account.added_latency if self._account else None,
                in_flight=self._in_flight_epochs,
            ),
            "speculation": self._speculation,
            "resumption": self._resumption,
            "away": bool(self.away),
            "pause": self._pause_status(),
            "sync": self._sync_now(),
        }
        now = time.monotonic()
        return Status(
            node=self.config.node.name,
            version=ftd.__version__,
            role=self.machine.role,
            state=self.machine.state,
            reason=self._reason(),
            solo_intended=self.solo_intended,
            state_seconds=now - self._moved,
            uptime=now - self._started,
            generation=self.generation,
            authority=self._authority.model_copy(update={"standing": self.standing.value}),
            in_flight_bytes=self.in_flight_bytes,
            output=self._output,
            peer=peer,
            qemu=self.qemu,
            takeover=self._takeover,
            last_verify=self.last_verify,
            warnings=list(self._warnings.values()),
            **values,
        )

    def _path_status(self) -> list[PathStatus]:
        addresses = {LINK_PATH: self._peer_address}
        if not self._peer_chosen:
            addresses |= {path.name: path.peer for path in self.config.heartbeat.path}
        known = {path.name: path for path in self._peer.paths()} if self._peer is not None else {}
        return [
            PathStatus(
                name=name,
                address=address,
                up=name in known and known[name].up,
                heartbeat_age=known[name].heard_age if name in known else None,
                detail=known[name].detail if name in known else "no session with the peer",
            )
            for name, address in addresses.items()
        ]

    def _reason(self) -> str:
        if self.away:
            return self.away
        waits = self.machine.state is PairState.WAITING
        return self.note if waits and self.machine.reason == "started" and self.note else self.machine.reason

    def _sync_now(self) -> SyncStatus:
        if self.machine.state is not PairState.SYNCING:
            return self._sync
        return self._sync.model_copy(update={"seconds": time.monotonic() - self._sync_began})

    def _pause_status(self) -> PauseStatus:
        return PauseStatus(
            count=len(self._pauses),
            p50=_percentile(self._pauses, 50),
            p99=_percentile(self._pauses, 99),
            parts_p50={part: _percentile(values, 50) or 0.0 for part, values in self._parts.items()},
            parts_p99={part: _percentile(values, 99) or 0.0 for part, values in self._parts.items()},
        )


def _percentile(values: deque[float], percent: int) -> float | None:
    """Return the nearest-rank percentile, or None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100) - 1))]
