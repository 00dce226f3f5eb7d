"""Servers of our own for the tests: real ones, private to the run, on free ports, gone at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import kombu.pools
import pytest
import redis
from api_support import Api
from api_support import serving as serving_api
from hosted_service import Running, serving
from hypothesis import HealthCheck, Phase, settings
from yard_support import Yard, yard_of

from lorayard import embedded
from lorayard.ledger.connection import connect
from lorayard.settings import Settings

if TYPE_CHECKING:  # llama.cpp is loaded where a test needs it
    from lorayard_workers.llama.bindings import Model

# How long an example takes is the machine's business.
settings.register_profile("lorayard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorayard")
settings.register_profile("hunt", phases=[Phase.generate], database=None)  # for mutants: the first failure is enough

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before llama.cpp is loaded into this process: its threads would spin


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private server with the settings we ship, for the whole run."""
    state: Path = tmp_path_factory.mktemp("store")
    with embedded.running(Settings(state_dir=state)) as url:
        yield url


@pytest.fixture(scope="module", autouse=True)
def _pooled_connections() -> Iterator[None]:
    """kombu keeps the brokers' connections of all applications; closed after each file, not when the garbage collector comes by."""
    yield
    kombu.pools.reset()


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the private server, emptied before each test."""
    with connect(redis_url) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="module")
def server(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API with the settings we ship, for the tests of a file."""
    with serving_api(redis_url, tmp_path_factory.mktemp("api")) as api:
        yield api


@pytest.fixture
def api(server: Api, store: redis.Redis) -> Api:
    """The file's API over an empty store."""
    server.new_keys()
    return server


@pytest.fixture
def yard(store: redis.Redis, redis_url: str, tmp_path: Path) -> Iterator[Yard]:
    """An API and a scheduler over an empty store."""
    with yard_of(redis_url, tmp_path) as found:
        yield found


@pytest.fixture
def service() -> Iterator[Running]:
    """The stand-in for a hosted service."""
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as the llama worker serves it."""
    from lorayard_workers.llama.process import resolve_model

    return resolve_model(Settings(state_dir=tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="session")
def exact_gguf(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float16: quantized activations turn the last bits of a sum, which depend on the batch, into other answers."""
    from lorayard_workers.llama.bindings import quantize

    path = tmp_path_factory.mktemp("exact") / "float16.gguf"
    quantize(demo_gguf, path, "F16")
    return path


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """The demo model in this process, for the tests of a file; one that needs other weights names their fixture: WEIGHTS = "exact_gguf"."""
    from lorayard_workers.llama.bindings import Model

    with closing(Model(request.getfixturevalue(getattr(request.module, "WEIGHTS", "demo_gguf")))) as made:
        yield made
