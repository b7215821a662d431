"""Which primaries may come: the answer to a hello."""

from __future__ import annotations

import time

import ftd
from ftd.authority import Standing, may_begin_session
from ftd.backup.standby import Standby
from ftd.errors import PeerError
from ftd.machine import MachineDescription
from ftd.messages import HeartbeatSettings, Hello, Refusal, Welcome

# A copy that fails, since a disk here is full, is not tried again at once: it keeps both hosts busy.
AFTER_DISK_FAILURE_SECONDS = 60.0


def admit(standby: Standby, hello: Hello) -> Welcome | Refusal:
    """Answer a hello. Raises PeerError when it is no use to try again as things are configured."""
    return _not_now(standby, hello) or _welcome(standby, hello)


def may_resume(standby: Standby, hello: Hello) -> bool:
    """Whether the shadow is what the primary has left off with, and nobody has asked for it since."""
    guards = standby.authority.standing is Standing.GUARDING
    return guards and standby.away is not None and standby.away.fits(hello)


def _not_now(standby: Standby, hello: Hello) -> Refusal | None:
    if not may_begin_session(standby.authority.standing):
        return Refusal(reason="the arbiter has not answered a question of this node; try again")
    if standby.description is None or standby.busy or standby.leaving.done():
        return Refusal(reason="the shadow is not ready; try again")
    if hello.resume is not None and not may_resume(standby, hello):
        return Refusal(reason="what was committed before is not held here any more", lost=True)
    if standby.disk_failure and time.monotonic() - standby.disk_failed_at < AFTER_DISK_FAILURE_SECONDS:
        return Refusal(reason=f"waiting a while after a failure: {standby.disk_failure}")
    return None


def _welcome(standby: Standby, hello: Hello) -> Welcome:
    config, own = standby.config, standby.description
    assert own is not None
    for marker in standby.markers:
        refusal = marker.refusal_to_overwrite(hello.generation)
        if refusal is not None:
            raise PeerError(refusal)
    try:
        peer = MachineDescription.model_validate(hello.description)
    except ValueError:
        raise PeerError(
            f"{hello.node} describes its machine in a way that this version does not understand; "
            "install the same version of ftd on both hosts"
        ) from None
    differences = own.differences(peer)
    if differences:
        raise PeerError(
            f"the machine of {hello.node} is not the one configured on {config.node.name}: "
            + "; ".join(differences)
        )
    return Welcome(
        software_version=ftd.__version__,
        node=config.node.name,
        generation=hello.generation,
        heartbeat=HeartbeatSettings(interval_ms=config.heartbeat.interval_ms, misses=config.heartbeat.misses),
        description=own.model_dump(mode="json"),
    )
