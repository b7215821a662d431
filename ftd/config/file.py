"""A whole configuration file: reading it, relations between its sections, and the files that it names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Self

from pydantic import ValidationError, model_validator

from ftd.config.fields import Section, SettingError, another_port
from ftd.config.machine import Machine
from ftd.config.pair import Arbiter, Http, Link, Node
from ftd.config.paths import Heartbeat, every_address, same_address
from ftd.config.problems import problem, syntax_problem
from ftd.config.protection import Disks, Epoch, Output, Staging
from ftd.errors import ConfigError, friendly


class Config(Section):
    """A whole configuration file, checked."""

    node: Node
    link: Link
    heartbeat: Heartbeat = Heartbeat()
    epoch: Epoch = Epoch()
    staging: Staging = Staging()
    disks: Disks = Disks()
    output: Output = Output()
    machine: Machine = Machine()
    http: Http = Http()
    arbiter: Arbiter

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epoch.in_flight_mib < self.staging.slot_mib:
            raise SettingError(
                "epoch.in_flight_mib",
                f"is less than one slot ([staging] slot_mib = {self.staging.slot_mib}), so that a full one "
                f"could never be sent; give at least {self.staging.slot_mib}",
            )
        if self.epoch.speculative != "off" and self.epoch.in_flight_mib < 2 * self.staging.slot_mib:
            raise SettingError(
                "epoch.in_flight_mib",
                f"is less than two slots ([staging] slot_mib = {self.staging.slot_mib}), which a frame may "
                f"fill with speculative transfer; give at least {2 * self.staging.slot_mib}, or set "
                '[epoch] speculative = "off"',
            )
        if self.epoch.speculative != "off" and self.staging.slots < 3:
            raise SettingError(
                "staging.slots",
                "is too few for speculative transfer, which needs one beside that of the checkpoint and "
                'the one being sent; give at least 3, or set [epoch] speculative = "off"',
            )
        tracker, machine = self.epoch.tracker, self.machine
        if tracker != "auto" and machine.accelerator == "tcg":
            raise SettingError(
                "epoch.tracker", 'is for kvm, and [machine] accelerator is "tcg"; give "auto", or remove it'
            )
        if tracker == "bitmap" and machine.dirty_ring_size:
            raise SettingError(
                "epoch.tracker", "needs KVM's dirty bitmap; set [machine] dirty_ring_size = 0 as well"
            )
        if tracker in ("ring", "ring-stock") and not machine.dirty_ring_size:
            raise SettingError(
                "epoch.tracker",
                "needs KVM's dirty rings, and [machine] dirty_ring_size is 0; give 65536 there, or remove it",
            )
        if self.epoch.hot_epochs and (tracker not in ("auto", "ring") or not machine.dirty_ring_size):
            raise SettingError(
                "epoch.hot_epochs",
                'is for the tracker ring; give 0, or [epoch] tracker = "ring" and [machine] dirty_ring_size',
            )
        for key in ("port", "heartbeat_port"):
            if getattr(self.link, key) == self.http.port:
                raise SettingError(
                    "http.port",
                    f"is also [link] {key}; choose another, such as {another_port(self.http.port)}",
                )
        for number, path in enumerate(self.heartbeat.path):
            for key in ("listen", "peer"):
                if same_address(getattr(path, key), getattr(self.link, key)):
                    raise SettingError(
                        f"heartbeat.path.{number}.{key}",
                        f"is also [link] {key}, on which heartbeats go anyway; give an address on another "
                        "path, or remove this one",
                    )
            if every_address(self.link.listen):
                raise SettingError(
                    "link.listen",
                    "is every address of this host, and [[heartbeat.path]] wants to tell paths apart; give "
                    "the one on the link",
                )
        if self.machine.attach is not None and self.node.role == "backup":
            raise SettingError(
                "machine.attach", 'is for the primary only; remove it, or set [node] role = "primary"'
            )
        return self


def load(path: Path | str) -> Config:
    """Reads and checks a configuration file.

    Raises ConfigError with every problem found, one line each.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(friendly(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(syntax_problem(path, text, error)) from None
    # Otherwise the answer to a missing section would not say what has to be decided.
    data.setdefault("arbiter", {})
    try:
        return Config.model_validate(data, context={"base": path.absolute().parent})
    except ValidationError as error:
        raise ConfigError([problem(Config, path, data, detail) for detail in error.errors()]) from None


def check_files(config: Config) -> None:
    """Looks for every file that the configuration names, on this machine.

    Raises ConfigError with one line for each that cannot be read.
    """
    named = {
        "[link] certificate": config.link.certificate,
        "[link] key": config.link.key,
        "[link] authority": config.link.authority,
        "[machine] qemu": config.machine.qemu,
        "[machine] kernel": config.machine.kernel,
        "[machine] initrd": config.machine.initrd,
        "[arbiter] authority": config.arbiter.authority,
        "[arbiter] certificate": config.arbiter.certificate,
        "[arbiter] key": config.arbiter.key,
        "[arbiter] password_file": config.arbiter.password_file,
        **{
            f"[[machine.disk]] number {number}, path": disk.path
            for number, disk in enumerate(config.machine.disk, 1)
        },
    }
    problems = []
    for key, path in named.items():
        if path is None:
            continue
        try:
            path.open("rb").close()
        except OSError as error:
            problems.append(f'{key} = "{path}": {friendly(OSError(error.errno, ""))}')
    if not config.machine.memory_path.is_dir():
        problems.append(
            f'[machine] memory_path = "{config.machine.memory_path}": is not a folder; '
            "give one in a tmpfs or hugetlbfs"
        )
    if problems:
        raise ConfigError(problems)
