"""Sections about the two nodes: who this one is, how it reaches the other, and who decides between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ftd.config.fields import ConfigPath, Host, HostOrNone, Port, Section, SettingError, another_port


class Node(Section):
    """Who this daemon is."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,31}$",
        description="Name of this node: lower-case letters, digits and dashes, at most 32. Becomes part of "
        "folder names, metrics and log lines. Required.",
    )
    role: Literal["primary", "backup"] = Field(
        description="What this node starts as: `primary` runs the guest, `backup` holds its shadow. "
        "After a takeover the backup acts as the primary without a change here. Required."
    )
    state_dir: ConfigPath | None = Field(
        default=None,
        description="Folder for what must survive a reboot. Default: /var/lib/ftd/NAME.",
    )
    run_dir: ConfigPath | None = Field(
        default=None,
        description="Folder for sockets, the process id and the log of QEMU. Its path may have at most 90 "
        "characters, because the kernel limits socket names. Default: /run/ftd/NAME.",
    )
    restart_grace_ms: int = Field(
        default=5000,
        ge=0,
        le=8000,
        description="Milliseconds that a pair waits for a daemon that is being replaced in place (`ftd "
        "upgrade`, `systemctl reload`), with the guest's output held. Both nodes' values count, the smaller "
        "one holds. If the primary's host dies within this time, the backup takes over only after it. "
        "0: does not wait; everything is copied anew. Default: 5000.",
    )

    @property
    def state_folder(self) -> Path:
        """`state_dir`, or its default."""
        return self.state_dir or Path("/var/lib/ftd") / self.name

    @property
    def run_folder(self) -> Path:
        """`run_dir`, or its default."""
        return self.run_dir or Path("/run/ftd") / self.name


class Link(Section):
    """How the two nodes reach each other."""

    listen: Host = Field(description="Address of this node on the link between the two. Required.")
    peer: Host = Field(description="Address of the other node on that link. Required.")
    port: Port = Field(
        default=7788,
        description="TCP port of frames and control messages: the backup listens on it, the primary connects "
        "to it. The same on both nodes. Default: 7788.",
    )
    heartbeat_port: Port = Field(
        default=7789,
        description="TCP port of heartbeats, which have a connection of their own so that none waits behind "
        "a frame. The same on both nodes. Default: 7789.",
    )
    certificate: ConfigPath | None = Field(
        default=None, description="This node's certificate, a PEM file. Needed unless insecure."
    )
    key: ConfigPath | None = Field(
        default=None,
        description="The private key of `certificate`, a PEM file. Needed unless insecure.",
    )
    authority: ConfigPath | None = Field(
        default=None,
        description="Certificate of the authority that must have signed the peer's, a PEM file. "
        "Needed unless insecure.",
    )
    peer_name: HostOrNone = Field(
        default="",
        description="Name that the peer's certificate must carry. Default: the address in `peer`.",
    )
    insecure: bool = Field(
        default=False,
        description="Run without TLS. Whoever reaches the ports can then read and replace the guest's "
        "memory: only for a cable between the two hosts, or for tests. Default: false.",
    )
    stall_s: int = Field(
        default=20,
        ge=1,
        le=300,
        description="Seconds for which one connection may stand still while heartbeats arrive, as when a "
        "firewall drops some of the packets. The guest's clients get no answers so long; a backup whose "
        "disks are slow needs as long. Default: 20.",
    )

    @property
    def expected_peer_name(self) -> str:
        """`peer_name`, or its default."""
        return self.peer_name or self.peer

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port == self.heartbeat_port:
            raise SettingError(
                "heartbeat_port",
                f"is also [link] port; give the two different ports, such as {another_port(self.port)}",
            )
        files = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        if self.insecure:
            for key, path in files.items():
                if path is not None:
                    raise SettingError(key, "is of no use with insecure = true; remove the one or the other")
        else:
            for key, path in files.items():
                if path is None:
                    raise SettingError(
                        key,
                        "is missing; give a PEM file, or set insecure = true on a link that nobody else can "
                        "reach",
                    )
        return self


class Arbiter(Section):
    """Who decides which side may run the guest when the two lose sight of each other."""

    kind: Literal["etcd", "file", "none"] = Field(
        default="none",
        description="`etcd`: a key of an etcd cluster, best with three members of which at most one is on a "
        "host of the pair. `file`: a folder that both hosts mount. `none`: nobody. Each side believes its "
        "own eyes: when only the link between the two fails, both run the guest. Default: none.",
    )
    pair: str = Field(
        default="",
        pattern=r"^([a-z0-9][a-z0-9-]{0,31})?$",
        description="Name of the pair, the same on both nodes and no other pair's with this arbiter: "
        "lower-case letters, digits and dashes, at most 32. Needed with etcd and file. Default: none.",
    )
    accept_split_brain: bool = Field(
        default=False,
        description="Says that you know what `none` means. Required to be true with it. Default: false.",
    )
    timeout_ms: int = Field(
        default=1000,
        ge=50,
        le=60_000,
        description="Milliseconds for one question. Without an answer this side holds the guest's output "
        "and asks again; too short a time asks an arbiter that is only busy again and again. Default: 1000.",
    )
    endpoints: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='Client URLs of etcd\'s members: ["https://10.0.0.3:2379", …]. One that answers is '
        "enough; the next is asked when one has been silent for 150 ms. Needed with etcd. Default: none.",
    )
    authority: ConfigPath | None = Field(
        default=None,
        description="Certificate of the authority that must have signed etcd's, a PEM file. Default: the "
        "authorities that this host trusts.",
    )
    certificate: ConfigPath | None = Field(
        default=None,
        description="This node's certificate for etcd, a PEM file, if etcd asks for one. Default: none.",
    )
    key: ConfigPath | None = Field(
        default=None, description="The private key of `certificate`, a PEM file. Default: none."
    )
    user: str = Field(default="", max_length=255, description="User of etcd, if it has users. Default: none.")
    password_file: ConfigPath | None = Field(
        default=None,
        description="File whose first line is the password of `user`; readable by ftd alone. Default: none.",
    )
    folder: ConfigPath | None = Field(
        default=None,
        description="Folder on storage that both hosts mount, and that neither of them serves. Needed with "
        "file. Default: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "none" and not self.accept_split_brain:
            raise SettingError(
                "accept_split_brain",
                "without an arbiter a broken link lets both nodes run the guest; set [arbiter] kind to etcd "
                "or file, or accept_split_brain = true if you accept that",
            )
        if self.kind != "none" and self.accept_split_brain:
            raise SettingError(
                "accept_split_brain",
                f'has no place beside kind = "{self.kind}", which lets no brain split; remove it',
            )
        if self.kind != "none" and not self.pair:
            raise SettingError("pair", f'is needed with kind = "{self.kind}"; give the pair a name')
        own: dict[str, tuple[str, object]] = {
            "endpoints": ("etcd", self.endpoints),
            "authority": ("etcd", self.authority),
            "certificate": ("etcd", self.certificate),
            "key": ("etcd", self.key),
            "user": ("etcd", self.user),
            "password_file": ("etcd", self.password_file),
            "folder": ("file", self.folder),
        }
        for name, (kind, value) in own.items():
            if value and kind != self.kind:
                raise SettingError(name, f'belongs to kind = "{kind}" and this is "{self.kind}"; remove it')
        if self.kind == "file" and self.folder is None:
            raise SettingError("folder", "is missing; give a folder on storage that both hosts mount")
        if self.kind == "etcd":
            self._check_etcd()
        return self

    def _check_etcd(self) -> None:
        if not self.endpoints:
            raise SettingError("endpoints", 'is missing; give etcd\'s client URLs: ["http://10.0.0.3:2379"]')
        for number, endpoint in enumerate(self.endpoints):
            if not re.fullmatch(r"https?://[^\s/?#@]+/?", endpoint):
                raise SettingError(
                    f"endpoints.{number}", "is no URL of an etcd member; give http(s)://HOST:PORT"
                )
        secure = [endpoint.startswith("https://") for endpoint in self.endpoints]
        if any(secure) != all(secure):
            raise SettingError("endpoints", "mixes http and https; give URLs of one kind")
        if not all(secure):
            for name in ("authority", "certificate", "key"):
                if getattr(self, name) is not None:
                    raise SettingError(name, "is of no use with http:// endpoints; give https:// ones")
        for one, other in (("certificate", "key"), ("key", "certificate")):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise SettingError(other, f"is missing; {one} needs it")
        if self.user and self.password_file is None:
            raise SettingError("password_file", "is missing; user needs it")
        if self.password_file is not None and not self.user:
            raise SettingError("user", "is missing; password_file is a user's")


class Http(Section):
    """Metrics, health and status over HTTP. Anybody who reaches it can read them."""

    listen: Host = Field(
        default="127.0.0.1", description="Address on which to answer. Default: 127.0.0.1, this machine only."
    )
    port: Port = Field(default=9105, description="TCP port. Default: 9105.")
