"""The record of a pair in etcd, version 3, through its JSON gateway (the same port as gRPC).

    /v3/kv/range            reading; linearizable unless asked otherwise, so a member cut off from its cluster
                            does not answer with old data
    /v3/kv/txn              compare-and-set: "if the key's value is exactly that, put this, else get it"
    /v3/auth/authenticate   user and password → a token for the header Authorization

Several endpoints are asked one after the other, but the next one is asked already when the one before has
been silent for `STAGGER_SECONDS`; the first answer counts. Asking several members the same compare-and-set is
harmless: the records are compared whole, and each has a random token, so only one copy can win, and the
others find the record that was wanted.
"""

# ruff: noqa: PLC0415 - aiohttp takes as long to import as the rest of a daemon that the guest's output waits for

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftd.arbiter import Answer, Record, decode_record, encode_record
from ftd.errors import ArbiterError, ArbiterUnreachable, HostError, friendly

if TYPE_CHECKING:
    import aiohttp

# A member of a healthy cluster answers within a few ms, or within a heartbeat of etcd's (100 ms) during an
# election; the next one is asked after this.
STAGGER_SECONDS = 0.15

_MAX_ANSWER = 1 << 20
# Of gRPC: what a wrong password, a missing or outdated token, and a missing permission are answered with.
_UNAUTHENTICATED, _PERMISSION_DENIED, _INVALID_ARGUMENT = 16, 7, 3


class _Refused(Exception):  # noqa: N818 - the name says what happened
    """A member answered with an error. It has not carried out the request, unless `maybe` says so."""

    def __init__(self, message: str, code: int, *, maybe: bool) -> None:
        super().__init__(message)
        self.code = code
        self.maybe = maybe


class EtcdArbiter:
    """Keeps the record of one pair under `key`. See arbiter.Arbiter for the contract.

    timeout: seconds for a whole question, all endpoints together. tls: None for http endpoints.
    """

    kind = "etcd"

    def __init__(
        self,
        endpoints: Sequence[str],
        key: str,
        *,
        timeout: float,
        tls: ssl.SSLContext | None = None,
        user: str = "",
        password: str = "",
    ) -> None:
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._key = base64.b64encode(key.encode()).decode()
        self._name = key
        self._timeout = timeout
        self._tls = tls
        self._user, self._password = user, password
        self._token: str | None = None
        self._session: aiohttp.ClientSession | None = None

    # ---- the contract ---------------------------------------------------------------------------------

    async def read(self) -> Record | None:
        """Return the record; see arbiter.Arbiter."""
        answer = await self._ask("/v3/kv/range", {"key": self._key}, writes=False)
        return self._record(answer.get("kvs"))

    async def compare_and_set(self, expected: Record | None, new: Record) -> Answer:
        """Replace the record; see arbiter.Arbiter."""
        compare: dict[str, Any] = {"key": self._key, "result": "EQUAL"}
        if expected is None:
            compare |= {"target": "VERSION", "version": "0"}
        else:
            compare |= {"target": "VALUE", "value": base64.b64encode(encode_record(expected)).decode()}
        value = base64.b64encode(encode_record(new)).decode()
        answer = await self._ask(
            "/v3/kv/txn",
            {
                "compare": [compare],
                "success": [{"requestPut": {"key": self._key, "value": value}}],
                "failure": [{"requestRange": {"key": self._key}}],
            },
            writes=True,
        )
        if answer.get("succeeded"):
            return Answer(True, new)
        try:
            found = answer["responses"][0]["response_range"]
        except (LookupError, TypeError):
            raise self._nonsense() from None
        record = self._record(found.get("kvs"))
        # An earlier copy of this very question has won, be it sent to another member or after a timeout.
        return Answer(record == new, record)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- asking ---------------------------------------------------------------------------------------

    async def _ask(self, path: str, body: Mapping[str, Any], *, writes: bool) -> Mapping[str, Any]:
        """Return the first answer of any endpoint.

        Raises ArbiterError if one refused for good, else ArbiterUnreachable when all failed or time is over.
        """
        tasks: list[asyncio.Task[Mapping[str, Any]]] = []
        said: dict[str, str] = {}
        sent: set[str] = set()  # to whom a write may have gone
        refusal: str | None = None
        deadline = asyncio.get_running_loop().time() + self._timeout
        todo = list(self._endpoints)
        waiting: dict[asyncio.Task[Mapping[str, Any]], str] = {}
        try:
            while todo or waiting:
                if todo:
                    endpoint = todo.pop(0)
                    task = asyncio.create_task(self._ask_one(endpoint, path, body, sent))
                    tasks.append(task)
                    waiting[task] = endpoint
                left = deadline - asyncio.get_running_loop().time()
                patience = min(STAGGER_SECONDS, left) if todo else left
                if left <= 0:
                    break
                done, _ = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    endpoint = waiting.pop(task)
                    error = task.exception()
                    if error is None:
                        self._prefer(endpoint)
                        return task.result()
                    said[endpoint] = self._words(error)
                    if isinstance(error, _Refused):
                        if not error.maybe:
                            sent.discard(endpoint)
                        if error.code in (_UNAUTHENTICATED, _PERMISSION_DENIED, _INVALID_ARGUMENT):
                            refusal = f"{endpoint}: {said[endpoint]}"
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
        if refusal is not None and not sent:
            raise ArbiterError(f"etcd {refusal}")
        for endpoint in self._endpoints:
            said.setdefault(endpoint, f"no answer within {self._timeout:g} s")
        told = "; ".join(f"{endpoint}: {text}" for endpoint, text in said.items())
        raise ArbiterUnreachable(f"etcd does not answer: {told}", in_doubt=writes and bool(sent))

    async def _ask_one(
        self, endpoint: str, path: str, body: Mapping[str, Any], sent: set[str]
    ) -> Mapping[str, Any]:
        if self._user and self._token is None:
            await self._authenticate(endpoint)
        try:
            return await self._post(endpoint, path, body, sent)
        except _Refused as refused:
            # Tokens last minutes, or until etcd starts again.
            if not self._user or refused.code not in (_UNAUTHENTICATED, _INVALID_ARGUMENT):
                raise
        self._token = None
        await self._authenticate(endpoint)
        return await self._post(endpoint, path, body, sent)

    async def _authenticate(self, endpoint: str) -> None:
        answer = await self._post(
            endpoint, "/v3/auth/authenticate", {"name": self._user, "password": self._password}, set()
        )
        token = answer.get("token")
        if not isinstance(token, str):
            raise self._nonsense()
        self._token = token

    async def _post(
        self, endpoint: str, path: str, body: Mapping[str, Any], sent: set[str]
    ) -> Mapping[str, Any]:
        import aiohttp

        headers = {"Authorization": self._token} if self._token and "/auth/" not in path else {}
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True, limit=0),
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                trust_env=False,
            )
        request = self._session.post(endpoint + path, json=body, headers=headers)
        sent.add(endpoint)
        try:
            async with request as response:
                data = await response.content.read(_MAX_ANSWER)
                status = response.status
        except aiohttp.ClientConnectorError:
            sent.discard(endpoint)  # never got there
            raise
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            told = answer if isinstance(answer, dict) else {}
            text = str(told.get("message") or told.get("error") or f"HTTP status {status}")
            code = told.get("code", 0) if isinstance(told.get("code", 0), int) else 0
            # Unavailable, deadline exceeded and the like come after a proposal that may still be agreed on.
            definite = code in (_UNAUTHENTICATED, _PERMISSION_DENIED, _INVALID_ARGUMENT) or status == 404
            raise _Refused(text, code, maybe=not definite)
        return answer

    # ---- small ----------------------------------------------------------------------------------------

    def _prefer(self, endpoint: str) -> None:
        """Ask first, the next time, who answered this time."""
        self._endpoints.remove(endpoint)
        self._endpoints.insert(0, endpoint)

    def _words(self, error: BaseException) -> str:
        import aiohttp

        if isinstance(error, _Refused):
            remedy = ""
            if error.code in (_UNAUTHENTICATED, _INVALID_ARGUMENT) and self._user:
                remedy = "; correct [arbiter] user and password_file"
            elif error.code in (_UNAUTHENTICATED, _INVALID_ARGUMENT):
                remedy = "; this etcd wants a user: set [arbiter] user and password_file"
            elif error.code == _PERMISSION_DENIED:
                remedy = f"; grant the user reading and writing of the key {self._name}"
            return f"{error}{remedy}"
        if isinstance(error, aiohttp.ClientConnectorError):
            if isinstance(error.os_error, ssl.SSLError | ssl.CertificateError):
                return f"its TLS is not trusted: {error.os_error}; correct [arbiter] authority"
            return friendly(error.os_error) if error.os_error.errno else "cannot be reached"
        if isinstance(error, asyncio.TimeoutError):
            return f"no answer within {self._timeout:g} s"
        return friendly(error)

    def _record(self, kvs: Any) -> Record | None:
        if not kvs:
            return None
        try:
            value = base64.b64decode(kvs[0]["value"], validate=True)
        except (LookupError, TypeError, binascii.Error):
            raise self._nonsense() from None
        return decode_record(value, f"etcd key {self._name}")

    def _nonsense(self) -> ArbiterError:
        return ArbiterError(
            f"etcd answers with what is no answer of version 3 ({', '.join(self._endpoints)}); "
            "give the client URLs of an etcd from 3.4 on"
        )


def tls_context(authority: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """Return the TLS settings for https endpoints. Raises HostError naming the file that cannot be used."""
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise HostError(
            f"[arbiter] authority, certificate or key cannot be used: {friendly(error)}"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
