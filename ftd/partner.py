"""Which node is the other one: that of [link] peer, or another that `ftd protect --peer` has named since.

The choice is kept in `state_dir/peer.json` and so outlives the daemon. The configuration file stays the
operator's, who has the last word there: a choice holds for as long as [link] peer is what it was when the
choice was made. To name that one again ends it, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ftd import log
from ftd.config import Config
from ftd.config.fields import a_host
from ftd.config.paths import same_address
from ftd.durable import load, replace
from ftd.errors import FtdError, HostError, friendly

_log = log.get(__name__)


class Choice(BaseModel):
    """The file. instead_of: [link] peer when the choice was made."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str = Field(min_length=1, max_length=255)
    port: int = Field(ge=1, le=65535)
    instead_of: str


@dataclass(frozen=True)
class Address:
    """Where the other node is. name: what its certificate must be for. chosen: by `ftd protect`."""

    host: str
    port: int
    name: str
    chosen: bool = False


class Partner:
    """The other node of the pair. Raises HostError, one line, for a file that cannot be read."""

    def __init__(self, config: Config) -> None:
        self._link = config.link
        self.path = config.node.state_folder / "peer.json"
        self._choice = self._read()

    def _read(self) -> Choice | None:
        not_one = f"is no choice of `ftd protect`; remove it to have [link] peer = {self._link.peer} again"
        choice = load(self.path, Choice, not_one)
        if choice is None:
            return None
        try:
            a_host(choice.host)
        except ValueError as error:
            _log.warning(
                f"the peer is that of the configuration: the one in {self.path} {error}",
                peer=self._link.peer,
                chosen=choice.host,
            )
            return None
        if choice.instead_of != self._link.peer:
            _log.warning(
                "the peer is that of the configuration, which was changed since `ftd protect`",
                peer=self._link.peer,
                chosen=choice.host,
            )
            return None
        return choice

    @property
    def address(self) -> Address:
        """Where the other node is now."""
        if self._choice is None:
            return Address(self._link.peer, self._link.port, self._link.expected_peer_name)
        return Address(self._choice.host, self._choice.port, self._choice.host, chosen=True)

    def choose(self, host: str, port: int | None) -> str:
        """Have another node from now on; returns in words what was noted.

        Raises HostError if that cannot be kept, FtdError if it is no host.
        """
        try:
            a_host(host)
        except ValueError as error:
            raise FtdError(f"{host}: {error}") from None
        wanted = port or self._link.port
        if same_address(host, self._link.peer) and wanted == self._link.port:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                raise HostError(friendly(error)) from None
            self._choice = None
            return "as [link] peer says"
        choice = Choice(host=host, port=wanted, instead_of=self._link.peer)
        replace(self.path, choice)
        self._choice = choice
        return (
            f"noted in {self.path}, and remembered until [link] peer is changed in the configuration or "
            f"`ftd protect --peer {self._link.peer}` is asked for"
        )

    def in_words(self) -> str | None:
        """Say that the peer is not the configured one, or return None."""
        if self._choice is None:
            return None
        return (
            f"the peer is {self._choice.host}, as `ftd protect` chose, and not [link] peer = "
            f"{self._link.peer} ({self.path}); change [link] peer once it is to stay"
        )
