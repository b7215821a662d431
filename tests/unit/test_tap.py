"""A tap that is not there is an error with its name, unless it need not be there yet."""

import pytest

from ftd import tap
from ftd.config import Nic
from ftd.errors import HostError

NICS = [Nic(tap="ftd-none0", mac="52:54:00:00:00:01")]


@pytest.mark.parametrize("up", [True, False])
def test_a_missing_tap_is_named(up: bool) -> None:
    with pytest.raises(HostError, match=r"tap = ftd-none0: cannot be set (up|down): no such device"):
        tap.switch(NICS, up=up)


def test_a_tap_that_qemu_will_make_is_passed_over() -> None:
    tap.switch(NICS, up=False, missing_ok=True)
