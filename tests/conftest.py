"""Fixtures that more than one file of tests uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub of the test's own; see tests/hub_server."""
    with HubServer() as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with the longest tests first: a worker runs a file alone, and the last ones should be short."""
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += sum(
            10 if mark.name == "long" else 1 for mark in item.iter_markers() if mark.name in ("slow", "long")
        )
    items.sort(key=lambda item: -weights[item.path])
