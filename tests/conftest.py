"""Fixtures that more than one file of tests uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub of the test's own; see tests/hub_server."""
    with HubServer() as server:
        yield server
