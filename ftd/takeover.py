"""Starting the shadow: what happens between the decision to take over and the guest running here.

All that takes time has been done before: QEMU waits with its devices built, and guest memory is in place.
What is left is the device state and the little memory that is in no shared file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence

from ftd import log, tap
from ftd.config import Nic
from ftd.errors import FtdError, QemuError, TakeoverRefused, friendly
from ftd.monitor import Monitor
from ftd.shadow import Shadow

_log = log.get(__name__)

# Switches learn where the guest is now from packets it seems to send. The first goes out at once; the others
# are for those that lose it, or come up late.
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 10, "step": 50}


class LoadImage:
    """The image for `x-ft-load`, made in a thread while the arbiter is asked. Closed by whoever made it."""

    def __init__(self, shadow: Shadow) -> None:
        self._making = asyncio.ensure_future(asyncio.to_thread(shadow.load_image))
        self._making.add_done_callback(lambda made: made.cancelled() or made.exception())

    async def descriptor(self) -> int:
        """Return it when it is ready. Raises TakeoverRefused and HostError, as Shadow.load_image does."""
        return await asyncio.shield(self._making)

    async def close(self) -> None:
        """Give it back; waits for the thread."""
        with contextlib.suppress(FtdError):
            os.close(await asyncio.shield(self._making))


async def start_shadow(
    monitor: Monitor, shadow: Shadow, image: LoadImage, nics: Sequence[Nic], *, resume: bool = False
) -> float:
    """Load the committed epoch's state into the waiting QEMU and start it.

    image: of the shadow as it is now. resume: let it run though the state says that it was stopped, which it
    was for this takeover only. Returns when its vCPUs ran (monotonic seconds).

    All acknowledged frames must have been applied. Raises TakeoverRefused when the shadow may not be started,
    before anything is touched, and QemuError when QEMU did not take it; it must not be used then. Once the
    guest runs, nothing is raised any more.
    """
    refusal = shadow.takeover_refusal()
    if refusal is not None:
        raise TakeoverRefused(f"takeover refused: {refusal}")
    began = time.monotonic()
    # Beside the loading: it waits for a lock that everybody on this host takes who changes a network.
    connected = asyncio.ensure_future(_connect(nics))
    fd = await image.descriptor()
    imaged = time.monotonic()
    await monitor.send_descriptor("ftd-load", fd)
    loaded = await monitor.execute("x-ft-load", fd="ftd-load")
    filled = time.monotonic()
    if resume or loaded["run-state"] == "running":
        await monitor.execute("cont")
    running = time.monotonic()
    _log.info(
        "shadow started",
        epoch=shadow.committed_epoch,
        device_bytes=loaded["device-bytes"],
        pages=loaded["pages"],
        run_state=loaded["run-state"],
        image_ms=round((imaged - began) * 1000, 1),
        load_ms=round((filled - imaged) * 1000, 1),
        start_ms=round((running - filled) * 1000, 1),
    )
    # It runs: nothing that goes wrong from here on takes that back.
    await connected
    try:
        await monitor.execute("announce-self", **ANNOUNCE)
    except QemuError as error:
        _log.error("the guest runs, and its place is not announced", error=friendly(error))
    return running


async def _connect(nics: Sequence[Nic]) -> None:
    try:
        await asyncio.to_thread(tap.switch, nics, up=True)
    except Exception as error:
        # A guest that nobody reaches is still one that an operator can connect again.
        _log.error("the guest runs without its network", error=friendly(error))
