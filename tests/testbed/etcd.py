"""Real etcd members for tests: a cluster on addresses, ports and in folders of its own."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from testbed.hosts import Host, TestbedError
from testbed.namespaces import http_session


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Member:
    """One etcd. `prefix`: words before its command line, such as those that enter a namespace."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        client_port: int = 0,
        peer_port: int = 0,
        prefix: Sequence[str] = (),
        namespace: str | None = None,
        tls: Path | None = None,
    ) -> None:
        self.name, self.folder, self.prefix, self.tls = name, folder, list(prefix), tls
        self.namespace = namespace
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://{address}:{client_port or free_port()}"
        self.peer_url = f"http://{address}:{peer_port or free_port()}"
        self.log = folder.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.cluster = f"{name}={self.peer_url}"

    def start(self) -> None:
        """Start it, or start it again with the data that it has."""
        binary = shutil.which("etcd")
        if binary is None:
            raise TestbedError("etcd is not installed: run scripts/setup")
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [*self.prefix, binary, "--name", self.name, "--data-dir", str(self.folder)]
        words += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        words += ["--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url]
        words += ["--initial-cluster", self.cluster, "--initial-cluster-state", "new"]
        words += ["--heartbeat-interval", "100", "--election-timeout", "1000"]
        if self.tls is not None:
            words += ["--cert-file", str(self.tls / "etcd.pem"), "--key-file", str(self.tls / "etcd.key")]
        environment = {**os.environ, "ETCD_UNSUPPORTED_ARCH": ""}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def signal(self, number: int) -> None:
        """Send a signal: SIGSTOP and SIGCONT freeze and thaw it."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            self.process = None


class Etcd:
    """A cluster of etcd members, as an asynchronous context manager; started when it answers."""

    def __init__(self, folder: Path, members: int = 1, *, tls: Path | None = None) -> None:
        self.members = [Member(f"m{n}", folder / f"m{n}", tls=tls) for n in range(members)]
        cluster = ",".join(member.cluster for member in self.members)
        for member in self.members:
            member.cluster = cluster

    @classmethod
    def on(cls, host: Host, folder: Path) -> "Etcd":
        """A cluster of one member on a host of a test network, reached over the daemons' link."""
        made = cls(folder, 0)
        made.members.append(
            Member(
                "m0",
                folder / "m0",
                address=host.link_address,
                client_port=2379,
                peer_port=2380,
                prefix=host.command([]),
                namespace=host.namespace,
            )
        )
        return made

    @property
    def endpoints(self) -> list[str]:
        """Client URLs of all members."""
        return [member.url for member in self.members]

    async def wait_healthy(self, timeout_s: float = 60.0) -> None:
        """Wait until every running member answers linearizable reads."""
        async with asyncio.timeout(timeout_s):
            for member in self.members:
                if member.process is not None:
                    while not await self.healthy(member):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)

    async def wipe(self) -> None:
        """Have it begin anew, with nothing in it: an arbiter that has lost its data."""
        for member in self.members:
            member.kill()
            shutil.rmtree(member.folder)
            member.start()
        await self.wait_healthy()

    async def healthy(self, member: Member) -> bool:
        """Whether a member answers."""
        try:
            answer = await self.post(member, "/v3/kv/range", {"key": "AA=="})
        except (OSError, aiohttp.ClientError, TimeoutError):
            return False
        # With users switched on, a refusal is an answer, too.
        return "header" in answer or "user name is empty" in str(answer.get("error"))

    @staticmethod
    async def post(member: Member, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request to a member's JSON gateway."""
        async with (
            http_session(member.namespace, 2)
            if member.namespace is not None
            else aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
            session.post(member.url + path, json=body, ssl=False) as answer,
        ):
            told: dict[str, Any] = await answer.json(content_type=None)
            return told

    async def add_user(self, name: str, password: str, prefix: str) -> None:
        """Switch users on, with one who may use keys below a prefix."""
        import base64  # noqa: PLC0415

        def encoded(text: str) -> str:
            return base64.b64encode(text.encode()).decode()

        last = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        steps: list[tuple[str, dict[str, Any]]] = [
            ("user/add", {"name": "root", "password": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("role/add", {"name": "pair"}),
            (
                "role/grant",
                {
                    "name": "pair",
                    "perm": {"permType": "READWRITE", "key": encoded(prefix), "range_end": encoded(last)},
                },
            ),
            ("user/add", {"name": name, "password": password}),
            ("user/grant", {"user": name, "role": "pair"}),
            ("user/add", {"name": "stranger", "password": "stranger"}),
            ("enable", {}),
        ]
        await self.post(self.members[0], "/v3/auth/role/add", {"name": "root"})
        for path, body in steps:
            answer = await self.post(self.members[0], f"/v3/auth/{path}", body)
            if "error" in answer:
                raise TestbedError(f"etcd {path}: {answer['error']}")

    async def __aenter__(self) -> "Etcd":
        for member in self.members:
            member.start()
        try:
            await self.wait_healthy()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in self.members:
            if member.process is not None:
                member.signal(signal.SIGCONT)
            member.kill()
