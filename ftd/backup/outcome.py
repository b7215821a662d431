"""What guarding a guest comes to."""

from __future__ import annotations

from dataclasses import dataclass

from ftd.marker import Markers
from ftd.qemu import QemuProcess


@dataclass(frozen=True)
class TakenOver:
    """The guest runs here now; generation: of the authority that this side won.

    markers: of its disks, which do not say yet that they are the guest's. told: whether the arbiter knows of
    it; it may not, if a person has decided.
    """

    guest: QemuProcess
    generation: int
    markers: Markers
    told: bool = True


@dataclass(frozen=True)
class GuestEnded:
    """The guest has shut down on the primary."""

    reason: str


@dataclass(frozen=True)
class ShadowGone:
    """The shadow's QEMU has ended: protection needs a new one, the guest needs nothing."""

    reason: str
