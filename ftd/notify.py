"""Tell systemd how the daemon is, after sd_notify(3): READY, STATUS, STOPPING and the watchdog.

A few lines of our own rather than a library: the protocol is one datagram of `KEY=value` lines to the socket
in NOTIFY_SOCKET. Telling never fails the daemon; without systemd it does nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, MutableMapping

from ftd import log

_log = log.get(__name__)


VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""What systemd leaves in the environment."""


class Notifier:
    """Sends to systemd.

    address: the value of NOTIFY_SOCKET: a path, or `@name` in the abstract name space; "" tells nobody.
    watchdog_seconds: within which systemd wants a sign of life; None without a watchdog.
    """

    def __init__(self, address: str = "", watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._failed = False

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] | None = None) -> Notifier:
        """Read what systemd left in the environment (default: the process's) and take it out of there.

        Taken out so that QEMU and other children do not speak for the daemon.
        """
        environment = os.environ if environment is None else environment
        address, interval, pid = (environment.pop(name, "") for name in VARIABLES)
        if address and address[0] not in "/@":
            _log.warning(
                "cannot notify systemd: NOTIFY_SOCKET is neither a path nor an abstract name", value=address
            )
            address = ""
        seconds: float | None = None
        # WATCHDOG_PID names the process that is watched; the variables may be inherited by others.
        if address and interval and pid in ("", str(os.getpid())):
            if interval.isascii() and interval.isdigit() and int(interval) > 0:
                seconds = int(interval) / 1e6
            else:
                _log.warning("watchdog off: WATCHDOG_USEC is not a positive number", value=interval)
        return cls(address, seconds)

    def ready(self, status: str = "") -> None:
        """Say that the unit has started: what depends on it may start."""
        self._send("READY=1", *self._status(status))

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(*self._status(text))

    def stopping(self, status: str = "") -> None:
        """Say that the daemon is on its way out by intent."""
        self._send("STOPPING=1", *self._status(status))

    def alive(self) -> None:
        """Send the watchdog its sign of life."""
        self._send("WATCHDOG=1")

    async def watch(self, why_unhealthy: Callable[[], str | None]) -> None:
        """Send signs of life from the event loop until cancelled, three in each interval of the watchdog.

        Runs in the loop whose health is at stake: when the loop hangs, no sign goes out and systemd restarts
        the daemon (the guest is not touched). The same happens on purpose while `why_unhealthy` gives a
        reason. Three: systemd advises at least two, and one of ours may be late on a loaded host. Returns at
        once without a watchdog.
        """
        if self.watchdog_seconds is None:
            return
        while True:
            reason = why_unhealthy()
            if reason is None:
                self.alive()
            else:
                _log.error("no sign of life to the watchdog: the daemon is unhealthy", reason=reason)
                self.status(f"unhealthy: {reason}")
            await asyncio.sleep(self.watchdog_seconds / 3)

    @staticmethod
    def _status(text: str) -> list[str]:
        # A line break would begin another variable.
        return [f"STATUS={' '.join(text.split())}"] if text else []

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        try:
            # Not blocking: with a full queue this sign of life is dropped rather than the loop stopped.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.connect(self._address)
                sender.send("\n".join(lines).encode())
        except OSError as error:
            if not self._failed:
                _log.warning("cannot notify systemd", path=self._address, error=error)
            self._failed = True
        else:
            self._failed = False
