"""Doing things inside a network namespace without leaving this process."""

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def _enter(namespace: str) -> None:
    """Move the calling thread into a namespace, for good."""
    # os.setns() is there from Python 3.12 on only.
    descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter network namespace {namespace}: {os.strerror(number)}")
    finally:
        os.close(descriptor)


def call_in_namespace(namespace: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a thread of its own inside the namespace, and wait for it.

    Sockets that it makes stay in the namespace, wherever they are used afterwards.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _enter(namespace)
            results.append(function(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"in-{namespace}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


async def in_namespace(namespace: str, function: Callable[..., T], *arguments: Any) -> T:
    """Like call_in_namespace(), for functions that may take long: the event loop runs on."""
    return await asyncio.to_thread(call_in_namespace, namespace, function, *arguments)


def http_session(namespace: str, timeout_s: float = 5.0) -> aiohttp.ClientSession:
    """An HTTP client of this process whose connections are made from inside the namespace."""

    def make_socket(address: Any) -> socket.socket:
        family, kind, protocol = address[:3]
        made = call_in_namespace(namespace, socket.socket, family, kind, protocol)
        made.setblocking(False)
        return made

    connector = aiohttp.TCPConnector(socket_factory=make_socket)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout_s))
