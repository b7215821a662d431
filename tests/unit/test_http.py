"""The HTTP side of a node, over real sockets."""

import asyncio
import errno
import json
import socket
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from unit.fake_node import PROTECTED, FakeNode

from ftd import http
from ftd.errors import HostError, LinkError
from ftd.metrics import Metrics
from ftd.state import PairState
from ftd.status import Difference, PeerFlight, Status, SyncStatus, VerifyReport


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def client(node: FakeNode, metrics: Metrics) -> AsyncIterator[TestClient]:
    async with TestClient(TestServer(http.create_app(node, metrics))) as client:
        yield client


async def test_status_is_the_model_as_json(client: TestClient, node: FakeNode) -> None:
    answer = await client.get("/status")
    assert answer.status == 200
    assert answer.content_type == "application/json"
    assert Status.model_validate_json(await answer.text()) == node.now
    assert json.loads(await answer.text())["state"] == "protected"
    assert answer.headers["Cache-Control"] == "no-store"


async def test_a_newer_daemon_can_be_read() -> None:
    newer = json.loads(PROTECTED.model_dump_json()) | {"moon": "full"}
    assert Status.model_validate(newer) == PROTECTED


async def test_metrics_are_the_text_that_prometheus_reads(client: TestClient, metrics: Metrics) -> None:
    metrics.generation.set(7)
    answer = await client.get("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    text = await answer.text()
    assert "ftd_generation 7.0" in text.splitlines()
    assert "process_resident_memory_bytes" in text


async def test_healthz(client: TestClient, node: FakeNode) -> None:
    answer = await client.get("/healthz")
    assert (answer.status, (await answer.json())["ok"]) == (200, True)
    node.unhealthy = "the sender thread died"
    answer = await client.get("/healthz")
    assert answer.status == 503
    assert await answer.json() == {"ok": False, "state": "protected", "detail": "the sender thread died"}


async def test_an_unprotected_guest_is_healthy_but_not_ready(client: TestClient, node: FakeNode) -> None:
    node.now = PROTECTED.model_copy(update={"state": PairState.SOLO, "reason": "connection reset"})
    assert (await client.get("/healthz")).status == 200
    answer = await client.get("/readyz")
    assert answer.status == 503
    assert (await answer.json())["detail"] == "solo: the guest runs without a backup (connection reset)"


async def test_a_loop_that_was_late_is_unhealthy(client: TestClient) -> None:
    assert (await client.get("/healthz")).status == 200
    await asyncio.sleep(0.05)
    time.sleep(http.LAG_LIMIT + 0.4)  # noqa: ASYNC251 - this is what it is about
    answer = await client.get("/healthz")
    assert answer.status == 503
    assert (await answer.json())["detail"].startswith("the event loop was 1.")
    lines = (await (await client.get("/metrics")).text()).splitlines()
    lag = next(float(line.split()[1]) for line in lines if line.startswith("ftd_loop_lag_seconds "))
    assert lag > http.LAG_LIMIT


@pytest.mark.parametrize(
    ("state", "changes", "why"),
    [
        (PairState.PROTECTED, {}, None),
        (PairState.TAKEN_OVER, {}, None),
        (PairState.SOLO, {"solo_intended": True}, None),
        (PairState.SOLO, {}, "solo: the guest runs without a backup"),
        (
            PairState.SYNCING,
            {"sync": SyncStatus(progress=0.42)},
            "syncing: the copy of the guest is 42% done",
        ),
        (PairState.HELD, {"solo_intended": True}, "held: it is unclear who has the authority over the guest"),
        (PairState.WAITING, {"role": "backup"}, "waiting: no primary has come yet"),
        (PairState.WAITING, {"role": "primary"}, "waiting: its guest is not up yet"),
        (PairState.STOPPED, {}, "stopped: no guest runs here any more"),
    ],
)
async def test_readyz(
    client: TestClient, node: FakeNode, state: PairState, changes: dict[str, object], why: str | None
) -> None:
    node.now = PROTECTED.model_copy(update={"state": state, "reason": "", **changes})
    answer = await client.get("/readyz")
    assert answer.status == (200 if why is None else 503)
    assert await answer.json() == {"ok": why is None, "state": state.value, "detail": why or "ok"}


async def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    answer = await client.get("/")
    assert answer.status == 200
    assert answer.content_type == "text/html"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    text = await answer.text()
    assert "://" not in text
    assert "src=" not in text
    assert "innerHTML" not in text, "words of peers and guests would become markup"
    for state in PairState:
        assert state.value in text


async def test_verify(client: TestClient, node: FakeNode) -> None:
    node.verification = VerifyReport(
        epoch=43, ok=False, pages=100, differing=1, differences=[Difference(block="ftd-ram", page=5)]
    )
    answer = await client.post("/verify")
    assert answer.status == 200
    assert VerifyReport.model_validate_json(await answer.text()) == node.verification


async def test_verify_that_is_impossible(client: TestClient, node: FakeNode) -> None:
    node.verification = LinkError("this guest is not protected now\nand more")
    answer = await client.post("/verify")
    assert answer.status == 409
    assert await answer.json() == {"error": "this guest is not protected now and more"}


async def test_verify_twice_at_once(client: TestClient, node: FakeNode) -> None:
    node.wait_for = asyncio.Event()
    first = asyncio.create_task(client.post("/verify"))
    await node.begun.wait()
    second = await client.post("/verify")
    assert second.status == 409
    assert "under way" in (await second.json())["error"]
    node.wait_for.set()
    assert (await first).status == 200
    assert (await client.post("/verify")).status == 200


async def test_the_record_of_the_peer(client: TestClient, node: FakeNode) -> None:
    node.flight = PeerFlight(node="beta", lines="{}", cut=True)
    answer = await client.get("/peer-flight")
    assert (answer.status, await answer.json()) == (200, {"node": "beta", "lines": "{}", "cut": True})
    node.flight = LinkError("no session with the peer")
    answer = await client.get("/peer-flight")
    assert (answer.status, await answer.json()) == (409, {"error": "no session with the peer"})


async def test_what_an_operator_asks_for(client: TestClient, node: FakeNode) -> None:
    for action in ("switchover", "pause-protection", "resume-protection"):
        answer = await client.post(f"/{action}")
        assert (answer.status, await answer.json()) == (200, {"detail": f"{action} is done"})
    assert (await client.post("/protect", json={"host": "10.0.0.3", "port": 7788})).status == 200
    assert (await client.post("/takeover", json={"force": True})).status == 200
    assert [action for action, _ in node.asked] == [
        "switchover",
        "pause-protection",
        "resume-protection",
        "protect",
        "takeover",
    ]
    assert node.asked[3][1]["host"] == "10.0.0.3"
    node.verification = LinkError("nobody to hand over to")
    answer = await client.post("/switchover")
    assert (answer.status, await answer.json()) == (409, {"error": "nobody to hand over to"})


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/takeover", "", 409, "without the arbiter's consent"),
        ("/takeover", '{"force": 1}', 400, "force: Input should be a valid boolean"),
        ("/protect", "", 400, "host: is missing"),
        (
            "/protect",
            '{"host": "a b"}',
            400,
            "host: is neither an address nor a name of a host, such as 10.0.",
        ),
        ("/protect", '{"host": "10.0.0..3"}', 400, "host: is neither"),
        ("/protect", '{"host": "a", "port": 0}', 400, "port: "),
        ("/switchover", "[", 400, "the body: Invalid JSON"),
        ("/switchover", '{"hosts": ""}', 400, "hosts: Extra inputs"),
    ],
)
async def test_bad_words_are_refused_and_nothing_is_done(
    client: TestClient, node: FakeNode, path: str, body: str, status: int, words: str
) -> None:
    answer = await client.post(path, data=body)
    assert answer.status == status
    assert words in (await answer.json())["error"]
    assert node.asked == []


async def test_what_changes_something_is_taken_from_this_host_only(
    client: TestClient, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp.web.BaseRequest.remote", "192.0.2.7")
    answer = await client.post("/switchover")
    assert answer.status == 403
    assert "is taken from this host only" in (await answer.json())["error"]
    assert node.asked == []


async def test_verify_without_an_end(
    client: TestClient, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "VERIFY_TIMEOUT", 0.05)
    node.wait_for = asyncio.Event()
    answer = await client.post("/verify")
    assert answer.status == 504
    assert "gave no result" in (await answer.json())["error"]


async def test_a_page_of_another_site_cannot_ask_for_a_verification(client: TestClient) -> None:
    answer = await client.post("/verify", headers={"Origin": "http://elsewhere.example"})
    assert answer.status == 403
    assert "elsewhere.example" in (await answer.json())["error"]
    same = await client.post("/verify", headers={"Origin": str(client.make_url("")).rstrip("/")})
    assert same.status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing", 404, "nothing at /nothing; there are /, /status"),
        ("GET", "/verify", 405, "/verify takes POST, not GET"),
        ("POST", "/status", 405, "/status takes GET, HEAD, not POST"),
    ],
)
async def test_refusals_are_one_line_of_json(
    client: TestClient, method: str, path: str, status: int, words: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status == status
    assert answer.content_type == "application/json"
    error = (await answer.json())["error"]
    assert error.startswith(words)
    assert "\n" not in error


async def test_a_defect_is_an_answer_and_a_line_in_the_log(
    client: TestClient, node: FakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    node.verification = RuntimeError("no such thing")
    answer = await client.post("/verify")
    assert answer.status == 500
    assert "no such thing" in (await answer.json())["error"]
    assert "HTTP request failed" in caplog.text
    assert (await client.get("/status")).status == 200


async def test_garbage_on_the_port_does_no_harm(client: TestClient) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(b"\x00\xff" * 5000 + b"\r\n\r\n")
    await writer.drain()
    assert b"400" in await reader.readline()
    writer.close()
    assert (await client.get("/status")).status == 200


async def test_serve_and_close(node: FakeNode, metrics: Metrics) -> None:
    server = await http.serve(http.create_app(node, metrics), port=0)
    async with ClientSession() as session, session.get(f"http://127.0.0.1:{server.port}/status") as answer:
        assert answer.status == 200
    await server.close()
    await server.close()
    with pytest.raises(OSError, match=str(errno.ECONNREFUSED)):
        await asyncio.open_connection("127.0.0.1", server.port)


async def test_port_in_use(node: FakeNode, metrics: Metrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(HostError) as caught:
            await http.serve(http.create_app(node, metrics), "127.0.0.1", port)
    assert str(caught.value).startswith(f"[http] port = {port}: in use on 127.0.0.1; ")


@pytest.mark.parametrize(
    ("listen", "words"),
    [("192.0.2.1", "not an address of this host"), ("no.such.host.invalid", '[http] listen = "no.such')],
)
async def test_wrong_address(node: FakeNode, metrics: Metrics, listen: str, words: str) -> None:
    with pytest.raises(HostError) as caught:
        await http.serve(http.create_app(node, metrics), listen, 0)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
