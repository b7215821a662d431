"""Tests on hosts made of network namespaces; they need root and say so when they are skipped."""

import os
from collections.abc import Iterator

import pytest
from testbed.hosts import TestNetwork


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="network namespaces need root")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(skip)


@pytest.fixture
def network() -> Iterator[TestNetwork]:
    """Two hosts and a client, as TestNetwork makes them; nothing of it may be left afterwards."""
    with TestNetwork() as made:
        yield made
    assert made.leftovers() == []
