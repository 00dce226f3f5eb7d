"""`kill -9` at each step of provisioning and of a batch, with real processes: it is finished, nothing is there twice, nothing left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from faults.role import POINT
from fleet_support import until
from hosted_service import BASE, KEY, Running, serving
from hosted_support import settings_of, tiny_adapter

from lorayard.adapters.hosting import Publications
from lorayard.adapters.peft import read_adapter
from lorayard.adapters.store import ArtifactStore
from lorayard.hosted import organisation
from lorayard.ledger.audit import audit
from lorayard.ledger.organisation import NANO
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.records import Entry
from lorayard.ledger.registry import open_ledger
from lorayard.settings import Settings

TESTS = Path(__file__).parent
DAYS_MS = 3 * 86_400_000


class Worker:
    """`lorayard worker groq`, started again whenever it has killed itself at the point that was ordered."""

    def __init__(self, folder: Path, url: str, service: Running) -> None:
        self.point = folder / "point"
        self.state = folder / "state"
        self.settings: Settings = settings_of(service, redis_url=url, state_dir=self.state, hosted_batch_poll_s=0.05)
        self._log = folder / "worker.log"
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(TESTS), str(TESTS.parent)]),
            POINT: str(self.point),
            "LORAYARD_REDIS_URL": url,
            "LORAYARD_STATE_DIR": str(self.state),
            "LORAYARD_HOSTED_URL": service.url,
            "LORAYARD_HOSTED_KEY": KEY,
            "LORAYARD_HOSTED_MODEL": BASE,
            "LORAYARD_HOSTED_PRICES": f'{{"{BASE}": [0.05, 0.08]}}',
            "LORAYARD_HOSTED_BATCH_POLL_S": "0.05",
            "LORAYARD_WORKER_NAME": "g",
            "LORAYARD_HEARTBEAT_MS": "100",
            "LORAYARD_LEASE_MS": "600",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "hosted_role", "worker", "groq"]
            self.process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, cwd=TESTS)

    def killed_at(self, point: str, when: str) -> None:
        """Order it to die there, and wait until it has; then it is started again."""
        part = self.point.with_suffix(".part")
        part.write_text(f"{point}:{when}:{signal.SIGKILL.name}")
        part.replace(self.point)
        if self.process is None:
            self.start()

    def wait_for_death(self, what: str) -> None:
        assert self.process is not None
        try:
            assert self.process.wait(20) == -signal.SIGKILL, self._log.read_text()[-3000:]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"never came to {what}: {self._log.read_text()[-3000:]}") from None
        assert not self.point.exists()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def service() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture
def worker(tmp_path: Path, store: redis.Redis, redis_url: str, service: Running) -> Iterator[Worker]:
    one = Worker(tmp_path, redis_url, service)
    try:
        yield one
    finally:
        one.close()


PROVISIONING = [
    *(("tunings", "after"), ("files", "after"), ("upload", "before"), ("upload", "after"), ("tune", "before"), ("tune", "after")),
    *(("tell", "before"), ("tell", "after")),
]
REMOVAL = [("tunings", "after"), ("delete_tuning", "before"), ("delete_tuning", "after"), ("delete_file", "after"), ("forget", "before")]


@pytest.mark.fleet
def test_an_adapter_is_provided_and_removed_once_through_a_kill_at_every_step(worker: Worker, store: redis.Redis, service: Running) -> None:
    digest = ArtifactStore.open(worker.settings).put(read_adapter(tiny_adapter()))
    publications = Publications(store, "default", BASE)
    Policies(store).set("acme", Policy(hosted=True))
    publications.ask(digest, "acme/tone")
    for point in PROVISIONING:
        worker.killed_at(*point)
        worker.wait_for_death(":".join(point))
        worker.start()
    found = until(lambda: (one := publications.get(digest)) and one.state == "ready" and one)
    assert found
    made = service.service
    assert dict(made.made) == {f"ly-{digest}.zip": 1, f"ly-{digest}": 1}
    assert [(t["id"], t["data"]["fine_tuned_model"]) for t in made.tunings.values()] == [(found.tuning_id, found.model)]
    assert [*made.files] == [found.file_id]
    publications.unask(digest, "acme/tone")
    for point in REMOVAL:
        worker.killed_at(*point)
        worker.wait_for_death(":".join(point))
        worker.start()
    until(lambda: publications.get(digest) is None)
    assert (made.files, made.tunings) == ({}, {})


BATCH = [
    *(("take", "after"), ("submit", "before"), ("submit", "after"), ("contents", "after"), ("hold", "before"), ("hold", "after")),
    *(("note", "before"), ("note", "after")),
    *(
        ("upload", "before"),
        ("upload", "after"),
        ("start_batch", "before"),
        ("start_batch", "after"),
        ("batch", "after"),
        ("content", "after"),
    ),
    *(
        ("charge", "before"),
        ("charge", "after"),
        ("finish", "before"),
        ("finish", "after"),
        ("delete_file", "before"),
        ("delete_file", "after"),
    ),
    *(("settle", "before"), ("settle", "after")),
]


@pytest.mark.fleet
def test_a_batch_is_run_once_through_a_kill_at_every_step(worker: Worker, store: redis.Redis, service: Running) -> None:
    ledger = open_ledger(store, worker.settings)
    Policies(store).set("acme", Policy(hosted=True))
    ids = [f"j{n}" for n in range(5)]
    body: dict[str, Any] = {"max_tokens": 8}
    entry = Entry("", "acme", "base@batch", 0, DAYS_MS, 0, 3, "http", "", "", b"{}", b"")
    rows = [entry._replace(id=i, request=msgspec.json.encode(body | {"messages": [{"role": "user", "content": i}]})) for i in ids]
    ledger.enqueue(rows, max_queued=99)
    epoch, claims = ledger.lead("test", 10**9), 0

    def dispatch() -> None:
        """What the scheduler does all the time: puts right what lapsed, and claims what is queued."""
        nonlocal claims
        ledger.reap()
        claims += 1
        ledger.claim(
            epoch=epoch, worker="g", most=9, batch=f"b{claims}", digest="base@batch", delivery_ms=5000, why="", takes=[("acme", 9)]
        )

    for point, when in BATCH:
        worker.killed_at(point, when)
        assert worker.process is not None
        give_up = time.monotonic() + 25
        while worker.process.poll() is None:
            dispatch()
            time.sleep(0.05)
            assert time.monotonic() < give_up, f"never came to {point}:{when}"
        worker.wait_for_death(f"{point}:{when}")
        worker.start()
    documents: list[dict[str, Any]] = []

    def over() -> bool:
        dispatch()
        documents[:] = [d for d in ledger.show("acme", ids) if d is not None]
        return all(d["status"] == "succeeded" for d in documents)

    until(over, 30)
    assert [d["response"]["choices"][0]["message"]["content"] for d in documents] == [f"{BASE} says: {i}" for i in ids]
    until(lambda: not store.zcard(f"ly:{{{ledger.pool}}}:submitted"), 10)
    made = service.service
    assert sorted(made.paid.values()) == [1] * 5, "each line was run once"
    inputs = {name: n for name, n in made.made.items() if name.startswith("lorayard-")}
    assert list(inputs.values()) == [1]
    assert made.files == {}, "neither the lines nor the results stay there"
    org = organisation(worker.settings, store)
    cost = sum(d["cost_usd"] for d in documents)
    assert org.spent(org.state(BASE).month)["acme"] / NANO == pytest.approx(cost)
    assert audit(ledger) == []
