"""Heartbeats: how fast a loss is noticed, and over which paths between the two nodes."""

from __future__ import annotations

import ipaddress
from typing import Self

from pydantic import Field, model_validator

from ftd.config.fields import Host, Section, SettingError

# A pair that notices the death of its other half later than this is not what people mean by fault tolerance,
# and TCP connections of the guest's clients begin to give up.
LONGEST_DETECTION_SECONDS = 60.0

# The path that frames take, in metrics and messages.
LINK_PATH = "link"


class HeartbeatPath(Section):
    """A further path on which the nodes hear each other, beside the link."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,31}$",
        description="Name of the path, the same on both nodes: lower-case letters, digits and dashes. "
        "Becomes a label of metrics. Required.",
    )
    listen: Host = Field(description="Address of this node on the path. Required.")
    peer: Host = Field(description="Address of the other node on the path. Required.")


class Heartbeat(Section):
    """How fast the loss of the other node is noticed: after `interval_ms` × `misses`."""

    interval_ms: int = Field(
        default=50,
        ge=5,
        le=10_000,
        description="Milliseconds between two heartbeats. Each costs one small packet in both directions. "
        "Default: 50.",
    )
    misses: int = Field(
        default=6,
        ge=2,
        le=100,
        description="Heartbeats in a row that may be missing before the peer is taken for lost. Fewer notice "
        "a loss sooner and mistake a busy host or network for a dead one more often. Default: 6.",
    )
    path: tuple[HeartbeatPath, ...] = Field(
        default=(),
        strict=False,
        max_length=8,
        description="Further paths for heartbeats, each a [[heartbeat.path]], the same on both nodes. The "
        "peer is lost when nothing is heard on any. Default: none.",
    )
    link_patience_ms: int = Field(
        default=2000,
        ge=0,
        le=15_000,
        description="With further paths: milliseconds for which output is held and nothing else is done, "
        "when only the link is silent. If it comes back within these, no copy is needed; after them the "
        "guest goes on alone. 0: at once. Default: 2000.",
    )

    @property
    def detection_seconds(self) -> float:
        """Silence after which the peer is taken for lost, in seconds."""
        return self.interval_ms * self.misses / 1000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.detection_seconds > LONGEST_DETECTION_SECONDS:
            raise SettingError(
                "misses",
                f"with interval_ms = {self.interval_ms} notices a loss after {self.detection_seconds:g} s; "
                f"keep interval_ms × misses within {LONGEST_DETECTION_SECONDS:g} s",
            )
        for number, path in enumerate(self.path):
            if path.name == LINK_PATH:
                raise SettingError(
                    f"path.{number}.name", "is the name of the path that frames take; choose another"
                )
            if same_address(path.listen, path.peer):
                raise SettingError(
                    f"path.{number}.peer", "is this node's own address on the path; give the other node's"
                )
            for key in ("name", "listen", "peer"):
                values = [address(getattr(other, key)) for other in self.path[:number]]
                if address(getattr(path, key)) in values:
                    place = values.index(address(getattr(path, key))) + 1
                    raise SettingError(
                        f"path.{number}.{key}",
                        f"is that of number {place}, too; give each its own",
                    )
        return self


def address(text: str) -> str:
    """Return an address in the one way to write it; a name as it is, in lower case."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text.lower()


def same_address(one: str, other: str) -> bool:
    """Say whether two texts are the same address."""
    return address(one) == address(other)


def every_address(text: str) -> bool:
    """Say whether an address to listen on means all that the host has."""
    try:
        return ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False
