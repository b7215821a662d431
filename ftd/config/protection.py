"""Sections about protection itself: epochs, staging memory, disks, and output that is held."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ftd.config.fields import Section, SettingError


class Epoch(Section):
    """How often the guest is checkpointed."""

    length_ms: int = Field(
        default=20,
        ge=5,
        le=10_000,
        description="Milliseconds that the guest runs between two checkpoints. Every answer of the guest "
        "waits half an epoch on average, so shorter ones lower latency; each costs a pause, so "
        "longer ones raise throughput. With mode `auto`, the length to begin with. Default: 20.",
    )
    mode: Literal["fixed", "auto"] = Field(
        default="fixed",
        description="`fixed`: epochs of `length_ms`. `auto`: the shortest ones that keep the guest's "
        "slowdown under `slowdown_percent`, but never such that output waits longer than `latency_ms`: if "
        "not both can be had, latency wins. Default: fixed.",
    )
    slowdown_percent: int = Field(
        default=10,
        ge=1,
        le=90,
        description="With mode `auto`: the share of its time that the guest may spend in pauses. "
        "Default: 10.",
    )
    latency_ms: int = Field(
        default=100,
        ge=5,
        le=60_000,
        description="With mode `auto`: the milliseconds that output may wait because of protection, from the "
        "beginning of an epoch until its commit. Default: 100.",
    )
    shortest_ms: int = Field(
        default=10,
        ge=5,
        le=10_000,
        description="With mode `auto`: no epoch is made shorter than this, whatever the latency is. Shorter "
        "ones cost both nodes more processor time. Default: 10.",
    )
    longest_ms: int = Field(
        default=500,
        ge=5,
        le=10_000,
        description="With mode `auto`: no epoch is made longer than this, whatever the slowdown is. "
        "Default: 500.",
    )
    speculative: Literal["off", "auto", "always"] = Field(
        default="off",
        description="Send pages before the epoch is over, so that the pause copies only what was dirtied "
        "again: `auto` does so while it pays, `always` for measurements. Costs a write fault of the guest "
        "and bytes on the link for each page that is dirtied again. Default: off.",
    )
    in_flight_mib: int = Field(
        default=256,
        ge=1,
        le=65_536,
        description="MiB of frames that may be under way to the backup: a checkpoint waits whose frame, if "
        "as large as the last one, would not fit beside them. More rides out longer hiccups of the "
        "network, and costs as much memory on the backup. "
        "At least [staging] slot_mib. Default: 256.",
    )
    verify_every: int = Field(
        default=0,
        ge=0,
        description="Compare all of guest memory on both nodes at every N-th epoch. Reading it all lengthens "
        "that pause (about 0.1 s for each GiB). 0: only when asked by `ftd verify`. Default: 0.",
    )
    tracker: Literal["auto", "ring", "ring-stock", "bitmap"] = Field(
        default="auto",
        description="How dirty pages are found. `ring`: straight from KVM's dirty rings, so that the pause "
        "does not grow with memory. `bitmap` and `ring-stock`: as QEMU's migration does it, with one thread "
        "doing everything in the pause; they are there to compare with. `auto`: the best that there is, "
        "which `ftd status` names: ring, KVM's bitmap with [machine] dirty_ring_size = 0, QEMU's own bitmaps "
        "(`generic`) under tcg. Default: auto.",
    )
    hot_epochs: int = Field(
        default=0,
        ge=0,
        le=255,
        description="With the tracker `ring`: leave pages unprotected that were dirty in so many epochs in a "
        "row, and send them with each epoch from then on, changed or not; after 32 epochs it is looked once "
        "whether they still change. Spares a guest that writes to the same pages again and again a fault for "
        "each of them in each epoch, and costs copies of those that it has left. Not measured on hardware "
        "yet. 0: every page is protected again. Default: 0.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "fixed":
            return self
        if self.shortest_ms > self.longest_ms:
            raise SettingError(
                "longest_ms",
                f"is less than shortest_ms = {self.shortest_ms}; give at least {self.shortest_ms}",
            )
        if self.latency_ms <= self.shortest_ms:
            raise SettingError(
                "latency_ms",
                f"cannot be held by epochs of shortest_ms = {self.shortest_ms} or more; give more than "
                f"{self.shortest_ms}, or shorter epochs",
            )
        if not self.shortest_ms <= self.length_ms <= self.longest_ms:
            raise SettingError(
                "length_ms",
                f"is what mode auto begins with; give a number from shortest_ms = {self.shortest_ms} "
                f"to longest_ms = {self.longest_ms}",
            )
        return self


class Staging(Section):
    """The buffers into which QEMU copies what changed: `slots` × `slot_mib` of memory on the primary."""

    slots: int = Field(
        default=3,
        ge=2,
        le=16,
        description="Number of buffers. One fills while the others are sent. Default: 3.",
    )
    slot_mib: int = Field(
        default=64,
        ge=4,
        le=4096,
        description="MiB of changed pages that one buffer holds. A checkpoint with more takes a second "
        "buffer and a longer pause. Default: 64.",
    )
    copy_threads: int = Field(
        default=2,
        ge=1,
        le=16,
        description="Threads that copy pages during the pause. More than the memory channels can feed gain "
        "nothing. Default: 2.",
    )


class Disks(Section):
    """How the guest's disks are replicated; without effect for a guest that has none."""

    journal_mib: int = Field(
        default=32,
        ge=1,
        le=256,
        description="MiB that the guest may write to its disks in an epoch before it has to wait. Each "
        "staging slot is larger by as much. Default: 32.",
    )
    sync_mib_per_s: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="MiB a second that the copy of disks may send, so that others on the link find room. "
        "0: as fast as it goes. Default: 0.",
    )
    replicate: bool = Field(
        default=True,
        description="Replicate the guest's disks. Without that a takeover goes on with whatever disk the "
        "backup has, which damages it: false is for measuring what replication costs. Default: true.",
    )
    apply: Literal["committed", "early", "never"] = Field(
        default="committed",
        description="When the backup repeats what the guest wrote. `committed`: with its epoch. The others "
        "damage the disk at a takeover, and are for tests that show just this: `early` is an epoch ahead of "
        "memory, `never` does not. Default: committed.",
    )


class Output(Section):
    """The guest's network output, which is held until its epoch is committed."""

    limit_mib: int = Field(
        default=64,
        ge=1,
        le=65_536,
        description="MiB of packets that are held for each network queue before the guest has to wait. "
        "Default: 64.",
    )
    hold: bool = Field(
        default=True,
        description="Hold output until its epoch is committed. Without that, clients see answers that a "
        "takeover undoes: false is for tests that show just this. Default: true.",
    )
