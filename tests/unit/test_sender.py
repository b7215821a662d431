import asyncio
from collections.abc import Sequence

from unit.frame_builder import Spec

from ftd.sender import Sender
from ftd.staging import Slot, Staging


class Session:
    """What the sender asks of a session."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def send_part(self, views: Sequence[memoryview]) -> int:
        self.sent.append(sum(len(view) for view in views))
        return self.sent[-1]

    async def close(self, reason: str) -> None:
        self.closed.set_result(reason)


def fill(slot: Slot, content: bytes) -> None:
    with open(f"/proc/self/fd/{slot.fd}", "r+b") as file:  # noqa: PTH123
        file.write(content)


async def test_a_slot_that_holds_no_part_ends_the_session_and_comes_back() -> None:
    with Staging(2, 1 << 20) as staging:
        session = Session()
        sizes: list[int] = []
        sender = Sender(session, staging, sizes.append)  # type: ignore[arg-type]
        good, bad = await staging.acquire_free(), await staging.acquire_free()
        fill(good, bytes(Spec().slot()))
        fill(bad, b"no part")
        sender.send(good)
        sender.send(bad)
        reason = await asyncio.wait_for(session.closed, 10)
        assert f"slot {bad.index}" in reason
        assert "magic" in reason
        async with asyncio.timeout(10):
            while staging.free < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await sender.close()
        assert sizes == session.sent == [len(Spec().wire())]
