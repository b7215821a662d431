"""All metrics of the daemon, in one place.

Naming rule: `ftd_` + the thing + what is measured + the base unit (`_seconds`, `_bytes`, `_ratio`), and
`_total` at the end of what only grows. Pages, packets, epochs and the like are counts and name themselves. No
name holds a host, a guest or a number. A label has few values, all known beforehand, and every one of its
series exists from the start: a dashboard shows zero failures rather than nothing. A gauge of which there is
no value yet is NaN, which compares false in every alert.

Code observes through the attributes and methods of `Metrics`. The names are an interface: renaming one is a
change that operators have to hear of, and tests/unit/test_metrics.py holds the whole list. `python -m
ftd.metrics` prints docs/metrics.md.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ftd import __version__
from ftd.authority import Standing
from ftd.state import ROLES, PairState, Role

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

# The `_created` companion of each series doubles the page and says when the process started, which
# process_start_time_seconds says already. The library has only this process-wide switch.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

# ---- label values ----------------------------------------------------------------------------------------

PausePart = Literal["stop", "drain", "harvest", "copy", "device", "digest", "resume"]
PAUSE_PARTS: tuple[PausePart, ...] = ("stop", "drain", "harvest", "copy", "device", "digest", "resume")

Connection = Literal["frames", "control", "heartbeat"]
CONNECTIONS: tuple[Connection, ...] = ("frames", "control", "heartbeat")

Rejection = Literal["garbage", "tls", "incompatible", "refused", "timeout"]
REJECTIONS: tuple[Rejection, ...] = ("garbage", "tls", "incompatible", "refused", "timeout")

AbortReason = Literal["link", "abandoned", "invalid", "stopped"]
ABORT_REASONS: tuple[AbortReason, ...] = ("link", "abandoned", "invalid", "stopped")

Trigger = Literal[
    "connection-reset", "qemu-died", "silence", "switchover", "forced", "link-cut", "restart-overdue"
]
TRIGGERS: tuple[Trigger, ...] = (
    "connection-reset", "qemu-died", "silence", "switchover", "forced", "link-cut", "restart-overdue"
)  # fmt: skip

ArbiterAnswer = Literal["granted", "denied", "silent", "doubt"]
ARBITER_ANSWERS: tuple[ArbiterAnswer, ...] = ("granted", "denied", "silent", "doubt")

Warning_ = Literal[
    "accept_split_brain", "insecure_link", "output_not_held", "disks_not_replicated", "arbiter_unreachable",
    "arbiter_stale", "arbiter_not_told", "path_down", "other_peer",
]  # fmt: skip
WARNINGS: tuple[Warning_, ...] = (
    "accept_split_brain", "insecure_link", "output_not_held", "disks_not_replicated", "arbiter_unreachable",
    "arbiter_stale", "arbiter_not_told", "path_down", "other_peer",
)  # fmt: skip

# ---- buckets ---------------------------------------------------------------------------------------------

# A pause is half a millisecond of fixed cost plus a copy at about 7 GB/s: 0.6 ms for a quiet guest, 3 ms for
# 16 MiB, 10 ms for 64 MiB. The steps are finest there, at most a factor of two apart, so that a p99 drawn
# from them is off by less than that. Above 40 ms it is a failure whose exact size matters little, up to the
# default pause limit of 1 s.
PAUSE_BUCKETS = (
    0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02,
    0.04, 0.1, 0.3, 1,
)  # fmt: skip

# Parts begin at ten microseconds (stop, resume) and may be the whole pause (copy), so these steps are wider.
PART_BUCKETS = (
    0.00001, 0.00003, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.04, 0.1, 1,
)  # fmt: skip

# From a few pages of an idle guest to all of the memory of a small one (262144 pages are 1 GiB), a factor of
# four apart: bench/pause looks at 64, 512, 4096 and 16384 pages, and they fall into different buckets.
PAGE_BUCKETS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)

# The same span as the pages, in bytes, with room below for frames of device state only.
FRAME_BUCKETS = (16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864, 268435456, 1073741824)

# From an idle guest's none to what a fast disk does in a long epoch, a factor of four apart.
REQUEST_BUCKETS = (0, 1, 4, 16, 64, 256, 1024, 4096)

# Commit is a trip over the link: 0.2 ms for an empty frame in one rack, 15 ms for 16 MiB at 10 Gbit/s, 150 ms
# at 1 Gbit/s, and as long as a slow link takes. It is what output waits for, so the steps are a factor of two
# apart.
COMMIT_BUCKETS = (
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.004,
    0.008,
    0.016,
    0.032,
    0.064,
    0.128,
    0.25,
    0.5,
    1,
    2,
    5,
    10,
)

# One trip to the arbiter: a few ms where it writes to a fast disk, tens on a slow one, up to `timeout_ms`.
ARBITER_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 5)

# Releasing is one QMP call, about 0.8 ms; anything above 10 ms means that the event loop was late.
RELEASE_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.05, 0.2, 1)


@dataclass(frozen=True)
class Description:
    """What a metric is, for the page of documentation and the test that holds the list.

    name: as on /metrics, for a histogram without `_bucket`, `_sum` and `_count`.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Metrics:
    """The metrics of one daemon, in a registry of their own.

    Attributes are prometheus-client objects. Those that go together, or that are observed for every epoch,
    have a method. Everything may be called from any thread.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self._descriptions: list[Description] = []
        ProcessCollector(registry=self.registry)

        # Pause
        self.pause = self._histogram(
            "ftd_pause_seconds",
            "Downtime of an epoch, as measured inside QEMU: vCPUs stopped until vCPUs running again.",
            PAUSE_BUCKETS,
        )
        self.pause_part = self._histogram(
            "ftd_pause_part_seconds",
            "Parts of the pause. copy and device run side by side, so the parts may add up to more than "
            "the pause.",
            PART_BUCKETS,
            part=PAUSE_PARTS,
        )

        # Epochs
        self.epochs_begun = self._counter(
            "ftd_epochs_begun_total",
            "Epochs that were closed with a checkpoint and whose frame was to be sent.",
        )
        self.epochs_committed = self._counter(
            "ftd_epochs_committed_total",
            "Epochs committed: on the primary acknowledged by the backup, on the backup held whole and "
            "verified.",
        )
        self.epochs_aborted = self._counter(
            "ftd_epochs_aborted_total",
            "Epochs given up before their commit. link: the connection broke; abandoned: QEMU gave up a "
            "half-gathered frame; invalid: the frame failed a check; stopped: protection ended in between.",
            reason=ABORT_REASONS,
        )
        self.epoch_committed = self._gauge("ftd_epoch_committed", "Number of the last committed epoch.")
        self.epoch_dirty_pages = self._histogram(
            "ftd_epoch_dirty_pages",
            "Pages of 4096 bytes that a frame holds, zero pages included.",
            PAGE_BUCKETS,
        )
        self.hot_pages = self._gauge(
            "ftd_hot_pages",
            "Pages that are left unprotected, and sent with each epoch: see [epoch] hot_epochs.",
        )
        self.epoch_frame_bytes = self._histogram(
            "ftd_epoch_frame_bytes", "Bytes of a frame on the wire, all of its parts together.", FRAME_BUCKETS
        )
        self.commit_latency = self._histogram(
            "ftd_commit_latency_seconds",
            "From the checkpoint's end (vCPUs running again) until the acknowledgement of the frame arrived.",
            COMMIT_BUCKETS,
        )
        self.epoch_length = self._gauge(
            "ftd_epoch_length_seconds",
            "Length of the epochs now: how long the guest runs between checkpoints.",
        )
        self.epoch_length_configured = self._gauge(
            "ftd_epoch_length_configured_seconds", "Length of the epochs as configured: [epoch] length_ms."
        )
        self.epoch_length_target = self._gauge(
            "ftd_epoch_length_target_seconds",
            "Length that the epochs aim at: the configured one, or the one that [epoch] mode auto chose.",
        )
        self.epoch_stretch = self._gauge(
            "ftd_epoch_stretch_ratio",
            "Length of the epochs now against the one aimed at: 1 when they keep to it, more when the "
            "link or the backup is slower than the guest dirties its memory. 1 without protection, too.",
        )
        self.epochs_stretched = self._counter(
            "ftd_epochs_stretched_total",
            "Epochs that lasted longer than they should because earlier frames were not yet on the other "
            "side.",
        )
        self.epoch_slowdown = self._gauge(
            "ftd_epoch_slowdown_ratio",
            "Share of its time that the guest spent in pauses during the last few epochs; NaN before, and "
            "without protection.",
        )
        self.epoch_added_latency = self._gauge(
            "ftd_epoch_added_latency_seconds",
            "From the beginning of an epoch until its commit, as most of the last few epochs kept to it: the "
            "longest that output waited because of protection; NaN before, and without protection.",
        )

        # Speculative transfer
        self.speculative_active = self._gauge(
            "ftd_speculative_active", "1 while pages are sent before their epoch is over, in each epoch."
        )
        self.speculative_rounds = self._counter(
            "ftd_speculative_rounds_total", "Rounds in which pages were sent before their epoch was over."
        )
        self.speculative_pages = self._counter(
            "ftd_speculative_pages_total", "Pages sent in these rounds, those of zeros included."
        )
        self.speculative_pages_again = self._counter(
            "ftd_speculative_pages_again_total",
            "Of these pages, those that were dirty again at the checkpoint: they were sent in vain.",
        )
        self.speculative_gain = self._gauge(
            "ftd_speculative_gain_pages",
            "Pages of pause that a round saves on average, what was sent in vain deducted: the decision "
            "follows it.",
        )

        # Link
        self.in_flight = self._gauge(
            "ftd_in_flight_bytes", "Bytes of frames that were gathered and are not yet acknowledged."
        )
        self.in_flight_limit = self._gauge(
            "ftd_in_flight_limit_bytes", "The most that may be in flight: [epoch] in_flight_mib."
        )
        self.link = self._counter(
            "ftd_link_bytes_total",
            "Bytes sent to and received from the peer, without what TLS and TCP add.",
            connection=CONNECTIONS,
            direction=("sent", "received"),
        )
        self.link_rejected = self._counter(
            "ftd_link_rejected_connections_total",
            "Connections to our ports that were closed. garbage: did not speak our protocol; tls: no or a "
            "wrong certificate; incompatible: other version, machine, CPU or memory; refused: a known peer "
            "at the wrong moment; timeout: said too little for too long.",
            reason=REJECTIONS,
        )
        self.heartbeat_age = self._gauge(
            "ftd_heartbeat_age_seconds", "Time since the peer was last heard; NaN without a peer."
        )
        self.heartbeats_missed = self._counter(
            "ftd_heartbeats_missed_total",
            "Times that nothing was heard of the peer for one and a half intervals of heartbeats: one was "
            "late or lost. After [heartbeat] misses of them in a row the peer counts as lost.",
        )

        # The link is there always; set_paths() adds those of the configuration.
        self.path_up = self._gauge(
            "ftd_heartbeat_path_up",
            "1 while the peer is heard on a path, 0 while it is not, or there is no peer: the link, and each "
            "[[heartbeat.path]] by its name; NaN while `ftd protect` has another peer, to which it does not "
            "lead.",
            path=("link",),
        )
        self.path_losses = self._counter(
            "ftd_heartbeat_path_losses_total", "Times that a path went silent, or its connection was lost.",
            path=("link",),
        )  # fmt: skip

        # First copy
        self.sync_progress = self._gauge(
            "ftd_sync_progress_ratio",
            "How much of the guest's memory is copied in the first copy, or in a new one: 0 to 1; 1 while "
            "protected. A backup does not know, and tells 0 until it is done.",
        )
        self.sync_seconds = self._gauge(
            "ftd_sync_last_seconds", "How long the last complete copy took; NaN before the first."
        )
        self.syncs = self._counter("ftd_syncs_completed_total", "Copies that led to a protected guest.")
        self.resumptions = self._counter(
            "ftd_resumptions_total",
            "Times that protection went on without a copy after a daemon of the pair was replaced in place.",
        )
        self.resumption_seconds = self._gauge(
            "ftd_resumption_last_seconds",
            "How long the guest's output waited while a daemon was replaced, the last time; "
            "NaN before the first, and on a backup.",
        )

        # Disks
        self.epoch_disk_requests = self._histogram(
            "ftd_epoch_disk_requests",
            "Requests of the guest to its disks in an epoch: writes, discards and flushes.",
            REQUEST_BUCKETS,
        )
        self.epoch_journal_bytes = self._histogram(
            "ftd_epoch_journal_bytes",
            "Bytes of an epoch's journal of disks. An epoch whose journal reaches [disks] journal_mib makes "
            "the guest wait.",
            FRAME_BUCKETS,
        )
        self.disk_apply_lag = self._gauge(
            "ftd_disk_apply_lag_seconds",
            "On a backup: how long after its acknowledgement the last frame was on the disks, or how long "
            "the oldest one waits for that by now, if that is longer; NaN before the first of a session, "
            "and without one.",
        )
        self.disk_sync_progress = self._gauge(
            "ftd_disk_sync_progress_ratio",
            "How much of the disks has been compared with the backup's copy in this copy, or the last: 0 to "
            "1; NaN before the first, and on a backup. Memory follows when it is 1.",
        )
        self.disk_sync_sent = self._counter(
            "ftd_disk_sync_sent_bytes_total", "Bytes of disks that were copied, since they differed."
        )
        self.disk_sync_spared = self._counter(
            "ftd_disk_sync_spared_bytes_total",
            "Bytes of disks that were not copied, since the backup had them, or they were empty.",
        )

        # Pair
        self.pair_state = self._gauge(
            "ftd_pair_state",
            "State of the pair as this node sees it: 1 for the state it is in, 0 for the others.",
            state=[state.value for state in PairState],
        )
        self.pair_state_number = self._gauge(
            "ftd_pair_state_number",
            "The same as a number, which never changes its meaning: "
            + ", ".join(f"{state.number} {state.value}" for state in PairState)
            + ".",
        )
        self.role = self._gauge(
            "ftd_role",
            "Role of this node: 1 for the one it has, 0 for the other. After a takeover the backup is the "
            "primary.",
            role=ROLES,
        )
        self.state_moves = self._counter(
            "ftd_pair_state_moves_total",
            "Moves of this node into a state.",
            state=[state.value for state in PairState],
        )
        self.standing = self._gauge(
            "ftd_authority_standing",
            "Standing of this node towards the arbiter: 1 for the one it has, 0 for the others. alone: "
            "all of the guest's output may go; paired: what is committed; asking, unsure: none, until the "
            "arbiter answers; claiming, doubting: a backup asks for the guest.",
            standing=[standing.value for standing in Standing],
        )
        self.arbiter_questions = self._counter(
            "ftd_arbiter_questions_total",
            "Questions to the arbiter by what came of them. silent: no answer, and nothing was changed; "
            "doubt: no answer, and it may have been carried out.",
            answer=ARBITER_ANSWERS,
        )
        self.arbiter_answer = self._histogram(
            "ftd_arbiter_answer_seconds",
            "How long a question took, those that were not answered included.",
            ARBITER_BUCKETS,
        )
        self.generation = self._gauge(
            "ftd_generation",
            "Generation of the authority that this node knows of; it grows when authority moves.",
        )

        # Takeover
        self.takeovers = self._counter(
            "ftd_takeovers_total", "Takeovers made by this node, by what led to them.", trigger=TRIGGERS
        )
        self.takeovers_refused = self._counter(
            "ftd_takeovers_refused_total",
            "Times the primary was lost and this node did not start the shadow: nothing was committed yet, "
            "or the other side kept the authority.",
        )
        # A gauge, not a histogram: a process takes over once in its life, seldom twice.
        self.takeover = self._gauge(
            "ftd_takeover_seconds",
            "The last takeover made by this node; NaN before the first. detection: last sign of life of "
            "the primary until the decision; activation: decision until the vCPUs run; total: from the one "
            "to the other.",
            phase=("detection", "activation", "total"),
        )

        # Verification
        self.epochs_verified = self._counter(
            "ftd_epochs_verified_total", "Epochs whose digests of all memory were compared with the shadow's."
        )
        self.verify_differences = self._counter(
            "ftd_verify_differing_pages_total",
            "Pages of the shadow that differed from the primary's. Anything but 0 is a defect.",
        )
        self.disk_verified = self._counter(
            "ftd_disk_verified_bytes_total", "Bytes of the disks that were compared with the backup's."
        )
        self.disk_verify_differences = self._counter(
            "ftd_disk_verify_differing_blocks_total",
            "Blocks of 4096 bytes of the backup's disks that differed from the primary's. Anything but 0 is "
            "a defect, or somebody else wrote to them.",
        )

        # Network output
        self.output_held_packets = self._gauge(
            "ftd_output_held_packets", "Packets from the guest that wait for the commit of their epoch."
        )
        self.output_held = self._gauge("ftd_output_held_bytes", "Bytes of these packets.")
        self.output_longest_hold = self._gauge(
            "ftd_output_longest_hold_seconds",
            "The longest that a packet has been held since protection began.",
        )
        self.output_pushed_back = self._counter(
            "ftd_output_pushed_back_total",
            "Times the guest was made to wait because the buffer of its output was full.",
        )
        self.release_latency = self._histogram(
            "ftd_output_release_latency_seconds",
            "From the arrival of an acknowledgement until QEMU had let the output of that epoch go.",
            RELEASE_BUCKETS,
        )

        # The daemon
        self.warnings = self._gauge(
            "ftd_warning",
            "1 while a promise is given away, or something is not as configured. accept_split_brain: no "
            "arbiter, both sides may run the guest after a network failure; insecure_link: the link is not "
            "encrypted; output_not_held: network output leaves before its epoch is committed; "
            "disks_not_replicated: a takeover damages the guest's disks; "
            "arbiter_unreachable: it did not answer the last question; arbiter_stale: it is older than this "
            "node, and is not believed; arbiter_not_told: the guest was taken by force, and what the arbiter "
            "says of it is not so; path_down: nothing is heard on one of several paths; other_peer: "
            "`ftd protect` chose another backup than the configuration names.",
            warning=WARNINGS,
        )
        self.loop_lag = self._gauge(
            "ftd_loop_lag_seconds",
            "The worst lateness of the daemon's event loop during the last ten seconds.",
        )
        self._gauge(
            "ftd_build_info",
            "Always 1; the labels tell the version of the daemon and of Python.",
            version=[__version__],
            python=[platform.python_version()],
        ).labels(version=__version__, python=platform.python_version()).set(1)

        # labels() looks its series up under a lock; the pause's parts are observed for every epoch.
        self._parts = {part: self.pause_part.labels(part=part) for part in PAUSE_PARTS}
        self._links = {
            (connection, direction): self.link.labels(connection=connection, direction=direction)
            for connection in CONNECTIONS
            for direction in ("sent", "received")
        }
        for phase in ("detection", "activation", "total"):
            self.takeover.labels(phase=phase).set(math.nan)
        self.sync_seconds.set(math.nan)
        self.resumption_seconds.set(math.nan)
        self.disk_apply_lag.set(math.nan)
        self.disk_sync_progress.set(math.nan)
        self._disk_compared = self._disk_sent = 0  # in this copy
        self._disk_sent_open = 0  # of a step that is not compared to its end
        self.heartbeat_age.set(math.nan)
        self.epoch_stretch.set(1)
        self.epoch_slowdown.set(math.nan)
        self.epoch_added_latency.set(math.nan)
        self.set_state(PairState.WAITING)
        self.set_standing(Standing.EMPTY)

    # ---- observing ---------------------------------------------------------------------------------------

    def observe_pause(self, total_ns: int, parts_ns: Mapping[PausePart, int]) -> None:
        """Count one checkpoint's pause and its parts, in nanoseconds as QEMU gives them."""
        self.pause.observe(total_ns / 1e9)
        for part, nanoseconds in parts_ns.items():
            self._parts[part].observe(nanoseconds / 1e9)

    def observe_frame(self, pages: int, size: int) -> None:
        """Count a gathered frame: its pages (zero pages included) and its bytes on the wire."""
        self.epoch_dirty_pages.observe(pages)
        self.epoch_frame_bytes.observe(size)

    def disk_sync(self, total: int, compared: int, sent: int) -> None:
        """Note how far a copy of disks is, in bytes; each begins with nothing compared and nothing sent."""
        if compared < self._disk_compared or sent < self._disk_sent:
            self._disk_compared = self._disk_sent = self._disk_sent_open = 0
        self.disk_sync_sent.inc(sent - self._disk_sent)
        self._disk_sent_open += sent - self._disk_sent
        if compared > self._disk_compared:
            self.disk_sync_spared.inc(max(0, compared - self._disk_compared - self._disk_sent_open))
            self._disk_sent_open = 0
        self.disk_sync_progress.set(compared / total if total else 1.0)
        self._disk_compared, self._disk_sent = compared, sent

    def add_link_bytes(self, connection: Connection, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes that went over a connection."""
        self._links[connection, "sent"].inc(sent)
        self._links[connection, "received"].inc(received)

    def set_epoch_length(self, now: float, configured: float, target: float | None = None) -> None:
        """Set the epoch length in seconds, now, as configured, and as aimed at; and with them the stretch."""
        self.epoch_length.set(now)
        self.epoch_length_configured.set(configured)
        target = configured if target is None else target
        self.epoch_length_target.set(target)
        self.epoch_stretch.set(now / target)

    def set_paths(self, names: Iterable[str]) -> None:
        """Make the series of the paths that the configuration has."""
        for name in names:
            self.path_up.labels(path=name)
            self.path_losses.labels(path=name)

    def set_path(self, name: str, up: bool | None, *, lost: bool = False) -> None:
        """Show whether a path is up, None: is none with this peer; lost: count that it went down."""
        self.path_up.labels(path=name).set(math.nan if up is None else up)
        if lost:
            self.path_losses.labels(path=name).inc()

    def set_state(self, state: PairState) -> None:
        """Set the pair's state: one series 1, the others 0."""
        for each in PairState:
            self.pair_state.labels(state=each.value).set(each is state)
        self.pair_state_number.set(state.number)

    def set_role(self, role: Role) -> None:
        """Set this node's role."""
        for each in ROLES:
            self.role.labels(role=each).set(each == role)

    def set_warning(self, warning: Warning_, on: bool) -> None:
        """Say whether the configuration gives this promise away."""
        self.warnings.labels(warning=warning).set(on)

    def set_heartbeat_age_source(self, age: Callable[[], float | None]) -> None:
        """Ask for the heartbeat's age at each scrape: a value set by a loop that hangs would stay young.

        age: seconds since the peer was last heard, None without a peer; called from the scraping thread.
        """

        self.heartbeat_age.set_function(_nan_if_none(age))

    def set_disk_apply_lag_source(self, lag: Callable[[], float | None]) -> None:
        """Ask for the lag of the disks at each scrape: it grows while nothing is applied that could tell.

        lag: in seconds, None when there is none to tell of; called from the scraping thread.
        """
        self.disk_apply_lag.set_function(_nan_if_none(lag))

    def set_standing(self, standing: Standing) -> None:
        """Show the standing towards the arbiter."""
        for each in Standing:
            self.standing.labels(standing=each.value).set(each is standing)

    def count_takeover(self, trigger: Trigger, *, detection: float, activation: float, total: float) -> None:
        """Count a takeover that this node made; durations in seconds."""
        self.takeovers.labels(trigger=trigger).inc()
        for phase, seconds in (("detection", detection), ("activation", activation), ("total", total)):
            self.takeover.labels(phase=phase).set(seconds)

    # ---- reading -----------------------------------------------------------------------------------------

    def render(self) -> bytes:
        """Return the text that Prometheus reads; its type is CONTENT_TYPE."""
        return generate_latest(self.registry)

    def descriptions(self) -> tuple[Description, ...]:
        """Return what there is, in the order of this file."""
        return tuple(self._descriptions)

    # ---- making ------------------------------------------------------------------------------------------

    def _counter(self, name: str, text: str, **labels: Sequence[str]) -> Counter:
        self._describe(Description(name, "counter", text, labels))
        metric = Counter(name, text, list(labels), registry=self.registry)
        for values in _combinations(labels):
            metric.labels(*values)
        return metric

    def _gauge(self, name: str, text: str, **labels: Sequence[str]) -> Gauge:
        self._describe(Description(name, "gauge", text, labels))
        metric = Gauge(name, text, list(labels), registry=self.registry)
        for values in _combinations(labels):
            metric.labels(*values)
        return metric

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], **labels: Sequence[str]
    ) -> Histogram:
        self._describe(Description(name, "histogram", text, labels))
        metric = Histogram(name, text, list(labels), registry=self.registry, buckets=buckets)
        for values in _combinations(labels):
            metric.labels(*values)
        return metric

    def _describe(self, description: Description) -> None:
        if (description.kind == "counter") != description.name.endswith("_total"):
            raise ValueError(f"{description.name}: the names of counters, and of nothing else, end in _total")
        self._descriptions.append(description)


def _nan_if_none(source: Callable[[], float | None]) -> Callable[[], float]:
    def value() -> float:
        seconds = source()
        return math.nan if seconds is None else seconds

    return value


def _combinations(labels: Mapping[str, Sequence[str]]) -> Iterable[tuple[str, ...]]:
    return product(*labels.values()) if labels else ()


# ---- the page of documentation
# -------------------------------------------------------------------------------

_PAGE = """\
# Metrics

Served on `/metrics` of the address in `[http]`, for Prometheus. Made by `python -m ftd.metrics` from
`ftd/metrics.py`; do not edit by hand. Times are in seconds, sizes in bytes, a page has 4096 bytes. A gauge
without a value yet is NaN. Besides these there are `process_*`, the daemon's own memory, CPU time and open
files.

An example for Prometheus is in `configs/prometheus.example.yml`, alerts in `configs/alerts.example.yml` with
their [runbooks](runbooks.md), a Grafana dashboard in `configs/grafana-ftd.json`.

| name | type | labels | meaning |
|---|---|---|---|
"""

# Values that differ from installation to installation, and must not make the page differ.
_OPEN_LABELS = {"ftd_build_info"}


def page() -> str:
    """Return docs/metrics.md."""
    return _PAGE + "".join(_table_row(each) for each in Metrics(CollectorRegistry()).descriptions())


def _table_row(metric: Description) -> str:
    if metric.name in _OPEN_LABELS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
    else:
        labels = "; ".join(
            f"`{label}`: {', '.join(f'`{value}`' for value in values)}"
            for label, values in metric.labels.items()
        )
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} |\n"


if __name__ == "__main__":
    sys.stdout.write(page())
