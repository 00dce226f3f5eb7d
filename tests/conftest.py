"""Servers of our own for the tests: real ones, private to the run, on free ports, gone at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lorayard import embedded
from lorayard.ledger.ledger import connect
from lorayard.settings import Settings


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private server with the settings we ship, for the whole run."""
    state: Path = tmp_path_factory.mktemp("store")
    with embedded.running(Settings(state_dir=state)) as url:
        yield url


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the private server, emptied before each test."""
    with connect(redis_url) as client:
        client.flushall()
        yield client
