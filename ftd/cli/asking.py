"""Asking a daemon: where it listens, its answer, and what is wrong when there is none."""

# ruff: noqa: PLC0415 - each command imports what it alone needs: `ftd status` is not to wait for numpy and QMP,
# and a guest's output not for what only asks a daemon

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ftd.errors import FtdError, HostError
from ftd.status import Failure

DEFAULT_URL = "http://127.0.0.1:9105"

# An answer of /status has about 2 KB; whatever sends more is not ftd.
_MAX_ANSWER = 4 * 1024 * 1024

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def url_of(arguments: argparse.Namespace) -> str:
    """Where the daemon listens: --url, or [http] of the configuration, or the default."""
    if arguments.url is not None:
        return str(arguments.url).rstrip("/")
    if arguments.config is None:
        return DEFAULT_URL
    import ipaddress

    from ftd import config as configuration

    settings = configuration.load(arguments.config).http
    host = settings.listen
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            # "all addresses" is a place to listen, not one to connect to
            host = "127.0.0.1" if address.version == 4 else "::1"
        host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.port}"


def ask(
    model: type[AnyModel], url: str, path: str, *, timeout: float, method: str = "GET", body: bytes = b""
) -> AnyModel:
    """Return the daemon's answer. Raises HostError when none comes, FtdError when it says no or nonsense."""
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url + path, method=method, data=body if method == "POST" else None)
    # A proxy from the environment is never meant for a daemon on this or the next host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            told = answer.read(_MAX_ANSWER)
    except urllib.error.HTTPError as refusal:
        with refusal, contextlib.suppress(OSError, http.client.HTTPException):
            raise FtdError(_refusal(url, refusal.code, refusal.read(_MAX_ANSWER))) from None
        raise FtdError(_refusal(url, refusal.code, b"")) from None
    except http.client.HTTPException as error:
        raise HostError(
            f"no sensible answer from {url}: {_plain(error)}; is that ftd's [http] port?"
        ) from None
    except OSError as error:
        # URLError wraps what happened while connecting; later it comes as it is
        reason = getattr(error, "reason", None)
        cause = _plain(reason if isinstance(reason, BaseException) else error)
        raise HostError(f"no answer from {url}: {cause}; is `ftd run` running there?") from None
    try:
        return model.model_validate_json(told)
    except ValidationError:
        raise FtdError(f"{url}{path} answered with something else; is that ftd's [http] port?") from None


def _plain(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return " ".join(str(error).split()) or type(error).__name__


def _refusal(url: str, code: int, body: bytes) -> str:
    try:
        return f"{url}: {Failure.model_validate_json(body).error}"
    except ValidationError:
        return f"{url} answered with HTTP status {code}; is that ftd's [http] port?"
