"""Arbiters: of many who want the next generation exactly one gets it, whatever happens to the arbiter.

The contract is tried on each kind; etcd is the real one.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path

import pytest
import trustme
from testbed.etcd import Etcd

from ftd.arbiter import Answer, Arbiter, NoArbiter, Record
from ftd.arbiter_etcd import EtcdArbiter, tls_context
from ftd.arbiter_file import KEPT, FileArbiter
from ftd.errors import ArbiterError, ArbiterUnreachable

ROOT = Path(__file__).parents[2]
MakeArbiter = Callable[..., Arbiter]


def etcd_arbiter(etcd: Etcd, **settings: object) -> EtcdArbiter:
    return EtcdArbiter(etcd.endpoints, "/ftd/web/authority", **{"timeout": 2.0, **settings})  # type: ignore[arg-type]


@pytest.fixture(params=["etcd", "file"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MakeArbiter]:
    """Makes arbiters, each with connections of its own, of the same pair."""
    made: list[Arbiter] = []

    @asynccontextmanager
    async def place() -> AsyncIterator[MakeArbiter]:
        if request.param == "file":
            yield lambda: FileArbiter(tmp_path, "web", timeout=5)
        else:
            async with Etcd(tmp_path) as etcd:
                yield lambda: etcd_arbiter(etcd)

    async with place() as one:

        def keep() -> Arbiter:
            made.append(one())
            return made[-1]

        yield keep
        for arbiter in made:
            await arbiter.close()


def next_of(record: Record | None, owner: str) -> Record:
    return Record(generation=record.generation + 1 if record else 1, owner=owner, state="solo")


# ---- the contract -----------------------------------------------------------------------------------------


async def test_record_is_what_was_set_last(make: MakeArbiter) -> None:
    arbiter, other = make(), make()
    assert await arbiter.read() is None
    first = next_of(None, "a")
    assert await arbiter.compare_and_set(None, first) == Answer(True, first)
    assert await other.read() == first
    second = first.model_copy(update={"state": "paired", "backup": "b", "token": "x"})
    assert await other.compare_and_set(first, second) == Answer(True, second)
    assert await arbiter.read() == second


async def test_whoever_expects_another_record_loses_and_is_told_the_one_there(make: MakeArbiter) -> None:
    arbiter = make()
    first = next_of(None, "a")
    await arbiter.compare_and_set(None, first)
    # Of the same meaning, but another write: not the same record.
    twin = first.model_copy(update={"token": "another"})
    for expected in (None, twin, next_of(first, "b")):
        assert await arbiter.compare_and_set(expected, next_of(first, "b")) == Answer(False, first)
    assert await arbiter.read() == first


async def test_the_same_question_again_finds_out_that_it_had_won(make: MakeArbiter) -> None:
    arbiter = make()
    first = next_of(None, "a")
    assert (await arbiter.compare_and_set(None, first)).won
    assert (await make().compare_and_set(None, first)).won
    second = next_of(first, "b")
    assert (await arbiter.compare_and_set(first, second)).won
    assert await arbiter.compare_and_set(None, first) == Answer(False, second)


async def test_of_many_at_once_exactly_one_wins_each_generation(make: MakeArbiter) -> None:
    arbiters = [make() for _ in range(8)]
    record: Record | None = None
    for _ in range(12):
        wanted = [next_of(record, f"node-{number}") for number in range(len(arbiters))]
        answers = await asyncio.gather(
            *(a.compare_and_set(record, w) for a, w in zip(arbiters, wanted, strict=True))
        )
        winners = [w for w, answer in zip(wanted, answers, strict=True) if answer.won]
        assert len(winners) == 1
        assert {answer.record for answer in answers} == {winners[0]}
        assert await arbiters[0].read() == winners[0]
        record = winners[0]


async def test_what_is_there_and_no_record_is_refused_with_the_remedy(
    make: MakeArbiter, tmp_path: Path
) -> None:
    arbiter = make()
    if isinstance(arbiter, FileArbiter):
        (tmp_path / "web.00000001").write_bytes(b"\x00garbage")
    else:
        assert isinstance(arbiter, EtcdArbiter)
        await arbiter._post(
            arbiter._endpoints[0], "/v3/kv/put", {"key": arbiter._key, "value": "AGdhcmJhZ2U="}, set()
        )
    with pytest.raises(ArbiterError, match=r"no record of ftd .*; give the pair a name of its own"):
        await arbiter.read()


async def test_none_lets_everybody_win() -> None:
    arbiter = NoArbiter()
    record = next_of(None, "a")
    assert await arbiter.compare_and_set(None, record) == Answer(True, record)
    assert await arbiter.compare_and_set(None, next_of(None, "b")) != Answer(False, record)
    assert await arbiter.read() is None


# ---- etcd -------------------------------------------------------------------------------------------------


async def test_etcd_killed_in_the_middle_never_grants_a_generation_twice(tmp_path: Path) -> None:
    """One member of one, killed and started at random while five proposers contend; nobody may assume."""
    chance = random.Random(20)
    granted: dict[int, set[str]] = {}
    doubted: set[int] = set()
    async with Etcd(tmp_path) as etcd:
        member = etcd.members[0]
        done = asyncio.Event()

        async def propose(name: str) -> None:
            arbiter = etcd_arbiter(etcd, timeout=0.3)
            pending: tuple[Record | None, Record] | None = None
            while not done.is_set():
                try:
                    if pending is None:
                        record = await arbiter.read()
                        pending = record, next_of(record, name)
                    expected, new = pending
                    answer = await arbiter.compare_and_set(expected, new)
                    if answer.won:
                        granted.setdefault(new.generation, set()).add(name)
                    pending = None
                except ArbiterUnreachable as error:
                    if error.in_doubt and pending is not None:
                        doubted.add(pending[1].generation)
                    await asyncio.sleep(0.01)
            await arbiter.close()

        tasks = [asyncio.create_task(propose(f"node-{number}")) for number in range(5)]
        for _ in range(4):
            before = max(granted, default=0)
            async with asyncio.timeout(20):
                while max(granted, default=0) < before + 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await asyncio.sleep(chance.uniform(0, 0.05))
            member.kill()
            member.start()
        await etcd.wait_healthy()
        done.set()
        await asyncio.gather(*tasks)
        arbiter = etcd_arbiter(etcd)
        last = await arbiter.read()
        await arbiter.close()
    assert doubted, "no question was caught by a kill: the test shows nothing"
    assert last is not None
    assert all(len(names) == 1 for names in granted.values())
    # A win that nobody heard of: in doubt, and others went on from there before the question was repeated.
    assert set(range(1, last.generation + 1)) - set(granted) <= doubted


async def until_answered(arbiter: Arbiter, expected: Record | None, new: Record) -> Answer:
    """Ask again while there is no answer, as a node does: the others may have a leader to elect first."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await arbiter.compare_and_set(expected, new)
            except ArbiterUnreachable:
                await asyncio.sleep(0.1)


async def test_etcd_with_one_member_of_three_down_answers(tmp_path: Path) -> None:
    async with Etcd(tmp_path, 3) as etcd:
        etcd.members[0].kill()
        arbiter = etcd_arbiter(etcd)
        first = next_of(None, "a")
        assert (await until_answered(arbiter, None, first)).won
        # A frozen one takes the connection and is silent: the next is asked beside it.
        etcd.members[0].start()
        await etcd.wait_healthy()
        etcd.members[1].signal(signal.SIGSTOP)
        second = next_of(first, "b")
        fresh = EtcdArbiter([etcd.endpoints[1], etcd.endpoints[2]], "/ftd/web/authority", timeout=5)
        assert (await until_answered(fresh, first, second)).won
        assert await fresh.read() == second
        await fresh.close()
        # Without a majority nobody answers, and a write is in doubt.
        etcd.members[0].kill()
        with pytest.raises(ArbiterUnreachable) as caught:
            await etcd_arbiter(etcd, timeout=0.5).compare_and_set(second, next_of(second, "a"))
        assert caught.value.in_doubt
        with pytest.raises(ArbiterUnreachable):
            await etcd_arbiter(etcd, timeout=0.5).read()
        await arbiter.close()


async def test_etcd_that_is_not_there_leaves_no_doubt() -> None:
    arbiter = EtcdArbiter(["http://127.0.0.1:9"], "/ftd/web/authority", timeout=0.5)
    with pytest.raises(ArbiterUnreachable, match=r"http://127.0.0.1:9: connection refused") as caught:
        await arbiter.compare_and_set(None, next_of(None, "a"))
    assert not caught.value.in_doubt
    await arbiter.close()


async def test_what_is_not_etcd_is_told() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    arbiter = EtcdArbiter([f"http://127.0.0.1:{port}"], "/ftd/web/authority", timeout=1)
    with pytest.raises(ArbiterUnreachable, match="HTTP status 200"):
        await arbiter.read()
    await arbiter.close()
    server.close()


async def test_users_and_tls(tmp_path: Path) -> None:
    """The right password over TLS works, also after etcd forgot its tokens; a wrong one is told at once."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.private_key_pem.write_to_path(tmp_path / "etcd.key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "etcd.pem")
    tls = tls_context(tmp_path / "ca.pem", None, None)
    async with Etcd(tmp_path / "data", tls=tmp_path) as etcd:
        await etcd.add_user("web", "secret", "/ftd/web/")
        right = etcd_arbiter(etcd, tls=tls, user="web", password="secret")
        first = next_of(None, "a")
        assert (await right.compare_and_set(None, first)).won
        etcd.members[0].kill()
        etcd.members[0].start()
        await etcd.wait_healthy()
        assert await right.read() == first
        await right.close()
        remedy = r"; correct \[arbiter\] user and password_file"
        cases = [
            ({"user": "web", "password": "wrong"}, rf"authentication failed.*{remedy}"),
            ({"user": "", "password": ""}, r"set \[arbiter\] user and password_file"),
            ({"user": "stranger", "password": "stranger"}, r"permission denied; grant the user .* /ftd/web/"),
        ]
        for settings, message in cases:
            wrong = etcd_arbiter(etcd, tls=tls, **settings)
            for question in (wrong.read(), wrong.compare_and_set(first, next_of(first, "b"))):
                with pytest.raises(ArbiterError, match=message) as caught:
                    await question
                assert not isinstance(caught.value, ArbiterUnreachable)
            await wrong.close()
        untrusting = etcd_arbiter(etcd, tls=tls_context(None, None, None), user="web", password="secret")
        with pytest.raises(ArbiterUnreachable, match=r"certificate.*; correct \[arbiter\] authority"):
            await untrusting.read()
        await untrusting.close()


# ---- file -------------------------------------------------------------------------------------------------

CONTENDER = """
import asyncio, json, sys
from pathlib import Path
from ftd.arbiter import Record
from ftd.arbiter_file import FileArbiter

async def main(folder, name, rounds):
    arbiter = FileArbiter(Path(folder), "web", timeout=20)
    won = []
    while True:
        record = await arbiter.read()
        if record and record.generation >= rounds:
            break
        new = Record(generation=record.generation + 1 if record else 1, owner=name, state="solo")
        if (await arbiter.compare_and_set(record, new)).won:
            won.append(new.generation)
    print(json.dumps(won))

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.root
def test_processes_in_two_mount_namespaces_contend_for_a_folder(tmp_path: Path) -> None:
    """Two hosts see the same folder in two places; six processes on them win each generation once."""
    shared = tmp_path / "export"
    shared.mkdir()
    rounds, processes = 150, []
    for number in range(6):
        place = tmp_path / f"mounted-{number % 2}"
        place.mkdir(exist_ok=True)
        program = f'mount --bind "{shared}" "{place}" && exec "$@"'
        words = [sys.executable, "-c", CONTENDER, str(place), f"node-{number}", str(rounds)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", program, "sh", *words],
                stdout=subprocess.PIPE,
                env=environment,
            )
        )
    won = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(chain(*won)) == list(range(1, rounds + 1))
    assert sum(bool(each) for each in won) > 1, "nobody contended: the test shows nothing"
    assert list(shared.glob(".*")) == []


async def test_old_files_are_removed_and_their_numbers_not_given_away_again(tmp_path: Path) -> None:
    arbiter = FileArbiter(tmp_path, "web", timeout=20)
    record: Record | None = None
    old: Record | None = None
    for number in range(KEPT + 5):
        new = next_of(record, "a")
        # Sooner than by a thousand real writes.
        (tmp_path / f"web.{number + 1:08d}").write_text(new.model_dump_json())
        record, old = new, record if number == 1 else old
    last = next_of(record, "a")
    assert (await arbiter.compare_and_set(record, last)).won
    assert len(list(tmp_path.glob("web.*"))) == KEPT  # noqa: ASYNC240
    # A node that slept through all of this, and sees a listing from then.
    newest = arbiter._newest
    arbiter._newest = lambda: (1, old)  # type: ignore[method-assign]
    link = os.link

    def link_then_see(source: Path, target: Path) -> None:
        link(source, target)
        arbiter._newest = newest  # type: ignore[method-assign]

    os.link = link_then_see  # type: ignore[assignment]
    try:
        assert await arbiter.compare_and_set(old, next_of(old, "late")) == Answer(False, last)
    finally:
        os.link = link
    assert await arbiter.read() == last


async def test_a_lost_answer_to_link_is_found_out(tmp_path: Path) -> None:
    """NFS repeats a request whose answer was lost, and the repetition says that the file exists."""
    arbiter = FileArbiter(tmp_path, "web", timeout=20)
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    os.link = twice  # type: ignore[assignment]
    try:
        first = next_of(None, "a")
        assert await arbiter.compare_and_set(None, first) == Answer(True, first)
    finally:
        os.link = link


async def test_a_folder_that_is_not_there_leaves_no_doubt(tmp_path: Path) -> None:
    arbiter = FileArbiter(tmp_path / "missing", "web", timeout=5)
    with pytest.raises(ArbiterUnreachable, match=r"\[arbiter\] folder: .*missing: no such file") as caught:
        await arbiter.compare_and_set(None, next_of(None, "a"))
    assert not caught.value.in_doubt


async def test_a_server_that_hangs_is_given_up_on_in_doubt(tmp_path: Path) -> None:
    """A FIFO in place of the newest record blocks whoever opens it, as a dead hard mount does."""
    os.mkfifo(tmp_path / "web.00000001")
    arbiter = FileArbiter(tmp_path, "web", timeout=0.1)
    with pytest.raises(ArbiterUnreachable, match=r"no answer within 0.1 s"):
        await arbiter.read()
    with pytest.raises(ArbiterUnreachable, match="an earlier question still hangs") as caught:
        await arbiter.compare_and_set(None, next_of(None, "a"))
    assert caught.value.in_doubt
    (tmp_path / "web.00000001").open("wb").close()  # the server is back
    assert arbiter._stuck is not None
    await asyncio.to_thread(arbiter._stuck.join)
    (tmp_path / "web.00000001").unlink()
    assert await arbiter.read() is None
