"""What all sections of the configuration have in common: kinds of values, and how a wrong one is reported."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationInfo

MIB = 1024 * 1024


class SettingError(ValueError):
    """A relation between settings that does not hold: the key to blame, what is wrong, and the remedy."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def _from_the_files_folder(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    return path if base is None else Path(base) / path


NO_HOST = "is neither an address nor a name of a host, such as 10.0.0.3"

_NAME = re.compile(r"(?!.{254})([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?")


def a_host(text: str) -> str:
    """Return the text if it can be looked up: an IP address, or a name by the rules of DNS.

    Raises ValueError, with NO_HOST. What is all numbers and no whole address is a typing error.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        try:
            name = text.encode("idna").decode()  # as the resolver's caller does
        except UnicodeError:
            name = ""
        if not _NAME.fullmatch(name) or name.rstrip(".").rpartition(".")[2].isdigit():
            raise ValueError(NO_HOST) from None
    return text


# A path; a relative one starts at the folder of the configuration file, whatever the daemon's own folder is.
ConfigPath = Annotated[Path, Strict(False), AfterValidator(_from_the_files_folder)]
Port = Annotated[int, Field(ge=1, le=65535)]
NonEmpty = Annotated[str, Field(min_length=1)]
Host = Annotated[NonEmpty, AfterValidator(a_host)]
HostOrNone = Annotated[str, AfterValidator(lambda text: a_host(text) if text else text)]  # "": none is given


class Section(BaseModel):
    """A section of the file; whatever it does not know is refused."""

    # strict: 7788 and "7788" are different things, and `port = true` is a typing error, not port 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def another_port(port: int) -> int:
    """A port to propose in place of one that is taken."""
    return port + 1 if port < 65535 else port - 1
