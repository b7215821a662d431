"""Load for a real Redis by its usual client library, and whether it still knows what it acknowledged.

    python -m testbed.redis_load count ADDRESS --history FILE --connections N

Every connection increments one counter of all, then writes a batch of keys of its own in one pipeline, as
redis-benchmark -P does, and so on until SIGTERM, or until the first error: a connection that breaks is not
replaced. Nothing is asked twice.
"""

import argparse
import asyncio
import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import redis
import redis.asyncio
import redis.retry
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from testbed.client import REQUEST_TIMEOUT_S, CounterClient
from testbed.guest import Guest, build
from testbed.history import History, Request
from testbed.hosts import Node
from testbed.namespaces import in_namespace

PORT = 6379
COUNTER = "hits"
BATCH = 8
PADDING = 64


def _key(worker: int, number: int) -> str:
    return f"key:{worker}:{number}"


def _content(number: int) -> str:
    return str(number).rjust(PADDING, ".")


async def load(worker: int, address: str, out: TextIO, stop: asyncio.Event) -> None:
    """One connection's load."""
    async with redis.asyncio.Redis(
        host=address,
        port=PORT,
        socket_timeout=REQUEST_TIMEOUT_S,
        socket_connect_timeout=REQUEST_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        single_connection_client=True,
    ) as client:
        number = 0
        while not stop.is_set():
            start = time.monotonic_ns()
            made = Request("increment", worker, 1, start, start)
            try:
                value = await client.incr(COUNTER)
                out.write(replace(made, end_ns=time.monotonic_ns(), value=value).line() + "\n")
                made = Request("write", worker, 1, time.monotonic_ns(), start)
                async with client.pipeline(transaction=False) as pipeline:
                    for each in range(number, number + BATCH):
                        pipeline.set(_key(worker, each), _content(each))
                    assert await pipeline.execute() == [True] * BATCH
                for each in range(number, number + BATCH):
                    out.write(replace(made, end_ns=time.monotonic_ns(), value=each).line() + "\n")
                number += BATCH
            except (redis.RedisError, OSError) as raised:
                error = f"{type(raised).__name__}: {raised}"
                out.write(replace(made, end_ns=time.monotonic_ns(), error=error).line() + "\n")
                return


class RedisClient(CounterClient):
    """Runs the load in a node's namespace."""

    module = "testbed.redis_load"

    def _all(self) -> tuple[Request, ...]:
        return super().history().requests

    def history(self) -> History:
        """Increments of the counter, and the errors of all."""
        return History(tuple(each for each in self._all() if each.kind == "increment" or each.error))

    def writes(self) -> list[Request]:
        """Acknowledged writes of keys; the value is the key's number."""
        return [each for each in self._all() if each.kind == "write" and each.value is not None]

    async def problems(self) -> list[str]:
        """What the server should know, and does not."""
        counter, wrong = await in_namespace(self.node.namespace, _compare, self.address, self.writes())
        return [*self.history().problems(0, counter), *wrong]


def _compare(address: str, writes: Sequence[Request]) -> tuple[int, list[str]]:
    problems = []
    with redis.Redis(host=address, port=PORT, socket_timeout=REQUEST_TIMEOUT_S) as client:
        for start in range(0, len(writes), 500):
            batch = writes[start : start + 500]
            found = client.mget([_key(each.worker, each.value or 0) for each in batch])
            for each, value in zip(batch, found, strict=True):
                if value != _content(each.value or 0).encode():
                    problems.append(f"{_key(each.worker, each.value or 0)} is lost: {value!r}")
        return int(client.get(COUNTER) or 0), problems


async def redis_guest() -> Guest:
    """The Linux guest with Redis, under TCG."""
    folder = await build("guests/redis/build")
    return Guest("linux", "tcg", "asked for", folder, memory_mib=128, options={"redis": "1"})


async def wait_redis(node: Node, address: str, timeout_s: float) -> None:
    """Wait until the server answers."""

    def pings() -> bool:
        never = redis.retry.Retry(NoBackoff(), 0)
        with (
            contextlib.suppress(redis.RedisError),
            redis.Redis(host=address, socket_timeout=5, retry=never) as client,
        ):
            return bool(client.ping())
        return False

    async with asyncio.timeout(timeout_s):
        while not await in_namespace(node.namespace, pings):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _main(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with Path(options.history).open("w", buffering=1) as out:  # noqa: ASYNC230
        workers = (load(worker, options.address, out, stop) for worker in range(options.connections))
        await asyncio.gather(*workers)


def main() -> None:
    parser = argparse.ArgumentParser(prog="testbed.redis_load", description="Writes to the guest's Redis.")
    parser.add_argument("probe", choices=("count",))
    parser.add_argument("address")
    parser.add_argument("--history", required=True, help="file for the JSON lines")
    parser.add_argument("--connections", type=int, default=4)
    asyncio.run(_main(parser.parse_known_args()[0]))


if __name__ == "__main__":
    main()
