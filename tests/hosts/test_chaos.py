"""Random schedules of faults against one pair with an etcd, under clients with full histories.

What is injected is in tests/testbed/faults.py, what has to be true in tests/testbed/judges.py. All schedules
go against one pair, so that it boots and is copied once; a failure brings a new one. A schedule alone:

    scripts/soak --schedule SEED                                                  also --count N times
    .venv/bin/python -m pytest tests/hosts/test_chaos.py -k 'schedule and SEED-'

$FTD_CHAOS_SEEDS="100-124" has other schedules than 0 to 24.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from testbed.chaos import Arena, Chaos, Trial, replay
from testbed.faults import Fault, Schedule, Step, seeds_of

# One event loop for the pair that lives through all of them. The first one waits for its guest to boot.
pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


def seeds() -> list[int]:
    return seeds_of(os.environ.get("FTD_CHAOS_SEEDS", "0-24"))


@pytest.mark.parametrize("seed", seeds(), ids=lambda seed: f"{seed}-")
async def test_schedule(
    chaos: Chaos, seed: int, record_property: Callable[[str, dict[str, Any]], None]
) -> None:
    print(f"schedule {seed}: {Schedule.of(seed)}")
    outcome = await chaos.run(seed)
    print(f"again: {outcome.again or replay(seed)}")
    record_property("chaos", outcome.told())
    print(f"{outcome.what}; evidence: {outcome.kept}")
    if outcome.problems:
        pytest.fail("\n".join(outcome.problems[:20]), pytrace=False)


async def test_a_pair_that_does_not_hold_its_output_is_caught(qemu_binary: Path) -> None:
    """That all of the above can fail: the same faults and judges, with output that leaves before its epoch is
    committed. An epoch is long and the clients are busy; and again if an answer was committed in time.
    """
    settings = {"output": {"hold": False}, "epoch": {"length_ms": 200}}
    schedule = Schedule(0, (Step(Fault("host-killed", "leader", 0.1), 0.3),))
    found: list[str] = []
    async with Arena(qemu_binary, settings) as arena:
        for _ in range(3):
            found = (await Trial(arena, schedule, patience_s=5).run()).problems
            if any(line.startswith("S1 S4 answers") for line in found):
                return
    pytest.fail(f"no judge has noticed: {found}")
