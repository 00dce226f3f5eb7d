"""A row of the report for each test here, and the report at the end of the run."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from faults.report import Row, write
from faults.witness import Witness
from faults.yard import Yard

REPORT = "LORAYARD_FAULTS_REPORT"
"""Where to write the report, without a suffix; none unless it is set."""

_rows: list[Row] = []


@pytest.fixture
def row(request: pytest.FixtureRequest, quick: bool) -> Iterator[Row]:
    """The first line of the test's docstring names the fault. The same seed makes the same choices."""
    seed = int(os.environ.get("LORAYARD_TEST_SEED", time.time_ns() % 1_000_000))
    fault = (request.function.__doc__ or request.node.name).partition("\n")[0].rstrip(".")
    made = Row(fault=fault, test=request.node.originalname, seed=seed, quick=quick)
    print(f"{request.node.name}: LORAYARD_TEST_SEED={seed}")
    _rows.append(made)
    began = time.monotonic()
    yield made
    made.seconds = round(time.monotonic() - began, 1)
    print(made)


@pytest.fixture
def rng(row: Row) -> random.Random:
    return random.Random(row.seed)


@pytest.fixture
def fleet(tmp_path: Path, rng: random.Random) -> Iterator[Callable[..., tuple[Yard, Witness]]]:
    """Makes fleets and who watches them: `fleet(workers=2, schedulers=1, adapters=True, broker_db=0, store_options=(), **settings)`."""
    with ExitStack() as stack:

        def make(*, workers: int = 2, schedulers: int = 1, adapters: bool = True, **options: Any) -> tuple[Yard, Witness]:
            folder = tmp_path / f"yard-{len(list(tmp_path.iterdir()))}"
            yard = stack.enter_context(Yard(folder, **options)).open(workers=workers, schedulers=schedulers, adapters=adapters)
            witness = Witness(yard, rng)
            stack.callback(witness.close)
            return yard, witness

        yield make


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    if call.when == "call" and "row" in getattr(item, "funcargs", {}):
        row: Row = item.funcargs["row"]  # type: ignore[attr-defined]
        row.outcome = outcome.get_result().outcome
        if call.excinfo is not None:
            row.notes.append(f"{call.excinfo.typename}: {str(call.excinfo.value)[:400]}")


def pytest_sessionfinish() -> None:
    if _rows and (path := os.environ.get(REPORT)):
        write(_rows, Path(path))
