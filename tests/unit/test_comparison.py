"""Who asks for a comparison gets an answer, also when protection ends meanwhile; no QEMU, no link."""

import asyncio
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
from unit import sample

from ftd.config import Config
from ftd.disk import CHUNK, Image
from ftd.disksync import Questions
from ftd.link import Session
from ftd.messages import VerifyResult
from ftd.metrics import Metrics
from ftd.protection.comparison import Comparison
from ftd.protection.ends import ProtectionLost
from ftd.report import Report


async def unheard(_: Any) -> None:
    """The backup says nothing any more."""


def comparison(images: list[Image]) -> Comparison:
    report = Report(Config.model_validate(tomllib.loads(sample.text())), Metrics(), "primary")
    # The session is there to tell results of disks, and there are none.
    return Comparison(report, cast(Session, None), images, Questions(unheard), every=0, epoch=lambda: 7)


async def test_who_asked_before_the_end_is_told() -> None:
    compared = comparison([])
    asked = asyncio.create_task(compared.verify())
    await asyncio.sleep(0)
    compared.close()
    with pytest.raises(ProtectionLost, match="protection ended first"):
        await asyncio.wait_for(asked, 10)


async def test_who_asks_after_the_end_is_told_at_once() -> None:
    """The node is still `protected` while the session says goodbye."""
    compared = comparison([])
    compared.close()
    with pytest.raises(ProtectionLost, match="protection ended first"):
        await asyncio.wait_for(compared.verify(), 10)


async def test_disks_are_not_waited_for_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(CHUNK))
    compared = comparison([Image("vda", path)])
    asked = asyncio.create_task(compared.verify())
    try:
        async with asyncio.TaskGroup() as group:
            compared.start(group, unheard)
            await asyncio.sleep(0)
            assert compared.begin_checkpoint(7, committed=True)
            compared.end_checkpoint(7)
            raise ProtectionLost("the backup is lost", resync=False, aborted="link")
    except* ProtectionLost:
        pass
    # Its memory was found equal, and before it is the disks' turn nobody compares them any more.
    compared.on_verified(VerifyResult(epoch=7, ok=True, pages=1, differing=0, differences=[]))
    compared.close()
    with pytest.raises(ProtectionLost, match="protection ended first"):
        await asyncio.wait_for(asked, 10)
