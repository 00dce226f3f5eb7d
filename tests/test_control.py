"""The control process of a worker with the real model and a real ledger, without Celery: the test plays the scheduler."""

from __future__ import annotations

import os
import random
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from fleet_support import WORDS, answer, until

from lorayard.celery_app import make_app
from lorayard.errors import Unavailable
from lorayard.ledger.audit import audit
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import Entry
from lorayard.ledger.registry import open_ledger
from lorayard.settings import Settings
from lorayard.telemetry import JobEvents
from lorayard_workers.control import Control
from lorayard_workers.llama import process
from lorayard_workers.llama.process import LlamaRunner
from lorayard_workers.retries import backoff_ms, company

pytestmark = pytest.mark.fleet
QUIET_MS = 60_000  # no heartbeat comes to a test's help


class Bench:
    """One worker and its ledger."""

    def __init__(self, store: redis.Redis, url: str, model: Path, fetch: Callable[[str, dict[str, Any]], str]) -> None:
        self.settings = Settings(worker_name="w", n_ctx=2048, width=8, contexts=1, heartbeat_ms=QUIET_MS, lease_ms=2 * QUIET_MS)
        self.ledger: Ledger = open_ledger(store, self.settings)
        self.control = Control(
            self.settings, self.ledger, LlamaRunner(self.settings, model), fetch, JobEvents(make_app(url), "w@test"), kind="llama"
        )
        self.epoch = self.ledger.lead("test", 10**7)
        self._batches = 0
        self.control.start()
        self.control.wait_ready(60)

    def put(self, job_ids: list[str], *, digest: str = "base", **request: Any) -> None:
        body = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0, "max_tokens": 4} | request
        entry = Entry("", "acme", digest, 1000, 0, 0, 3, "http", "", "", b"{}", msgspec.json.encode(body))
        self.ledger.enqueue([entry._replace(id=job_id) for job_id in job_ids], max_queued=1000)

    def dispatch(self, *, digest: str = "base", jobs: int = 99) -> str:
        """What is queued goes to the worker, as the scheduler would send it."""
        self._batches += 1
        batch = f"b{self._batches}"
        answer, _ = self.ledger.claim(
            epoch=self.epoch, worker="w", most=9, batch=batch, digest=digest, delivery_ms=5000, why="due", takes=[("acme", jobs)]
        )
        assert answer == "ok"
        self.control.run_batch(batch)
        return batch

    def job(self, job_id: str) -> dict[str, Any]:
        document = self.ledger.show("acme", [job_id])[0]
        assert document is not None
        return document

    def until(self, job_id: str, status: str, timeout_s: float = 60) -> dict[str, Any]:
        until(lambda: self.job(job_id)["status"] == status, timeout_s, every_s=0.005)
        return self.job(job_id)


@pytest.fixture
def bench(store: redis.Redis, redis_url: str, demo_gguf: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(fetch: Callable[[str, dict[str, Any]], str] = lambda digest, base: digest) -> Bench:
        made.append(Bench(store, redis_url, demo_gguf, fetch))
        return made[-1]

    yield make
    for one in made:
        one.control.close()


def test_a_cancelled_sequence_stops_within_a_decode_step(bench: Callable[..., Bench]) -> None:
    """What is computed beside another job says so in that job's width."""
    one = bench()
    one.put(["long", "gone"], **WORDS | {"max_tokens": 900})
    one.dispatch()
    one.until("long", "running")
    one.until("gone", "running")
    assert one.ledger.cancel("acme", ["long"]) == ["cancelled"]
    assert one.ledger.delete("acme", ["gone"]) == ["deleted"]
    until(lambda: not one.control._leases.held, 10, every_s=0.005)
    one.put(["next"])
    one.dispatch()
    assert one.until("next", "succeeded")["width"] == 1
    assert one.ledger.counts().get("stale", 0) == 0
    assert audit(one.ledger) == []


def test_an_adapter_that_is_out_of_reach_puts_jobs_off_at_no_cost(bench: Callable[..., Bench]) -> None:
    def away(digest: str, base: dict[str, Any]) -> str:
        raise Unavailable("the artifact store does not answer", code="artifacts_unavailable")

    one = bench(away)
    one.put(["a"], digest="d" * 64)
    before = one.ledger.snapshot().now
    one.dispatch(digest="d" * 64)
    document = one.until("a", "delayed")
    assert (document["attempts"], document["postponed"]) == (0, 1)
    assert before + 500 <= document["not_before_ms"] <= one.ledger.snapshot().now + 1500
    one.put(["b"])
    one.dispatch()
    assert answer(one.until("b", "succeeded")), "others go on"


def test_a_batch_that_keeps_killing_its_process_is_cut_into_smaller_ones(bench: Callable[..., Bench]) -> None:
    """The test plays the poison: whenever that job runs, the process dies. Its mates must not be taken for poison."""
    one = bench()
    mates = [f"mate-{n}" for n in range(7)]
    one.put([*mates, "poison"], **WORDS | {"max_tokens": 60})
    beside = []
    for attempt in range(1, 4):
        while (poison := one.job("poison"))["attempts"] < attempt:
            feed(one)
        assert poison["status"] == "running"
        seen = [one.job(mate) for mate in mates]
        assert attempt > 1 or [mate["attempts"] for mate in seen] == [1] * 7, "all begin at once; some may have ended by now"
        beside.append(sum(mate["status"] == "running" for mate in seen))
        os.kill(one.control._runner._child.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        until(lambda: one.job("poison")["status"] != "running", 30)
    assert one.until("poison", "failed")["error"]["code"] == "worker_died"
    while not all(one.job(mate)["status"] == "succeeded" for mate in mates):
        feed(one)
    assert beside[1] <= company(1, 3, 8) - 1 == 2
    assert beside[2] == 0
    assert one.ledger.list_ids("acme", limit=9, dead=True) == ["poison"]
    assert max(one.job(mate)["attempts"] for mate in mates) <= 3
    assert audit(one.ledger) == []


STALLING = """
    import sys
    from lorayard_workers.llama import bindings, process
    tokenize = bindings.Model.tokenize
    def stall_on_poison(self, text):
        while b"poison" in text: pass
        return tokenize(self, text)
    bindings.Model.tokenize = stall_on_poison
    process.main(sys.argv[1:])
"""


def test_a_request_that_is_never_read_to_its_end_fails_alone(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stalling_llama.py").write_text(textwrap.dedent(STALLING))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process, "_MODULE", "stalling_llama")
    monkeypatch.setattr(process, "_READ_S", 1.5)
    one = bench()
    mates = [f"mate-{n}" for n in range(6)]
    one.put(mates[:3])
    one.put(["poison"], messages=[{"role": "user", "content": "poison"}])
    one.put(mates[3:])
    while not all(one.job(job)["status"] in ("succeeded", "failed") for job in (*mates, "poison")):
        feed(one)
    assert one.job("poison")["error"]["code"] == "worker_died"
    assert {one.job(mate)["status"] for mate in mates} == {"succeeded"}
    assert one.ledger.list_ids("acme", limit=9, dead=True) == ["poison"]
    assert max(one.job(mate)["attempts"] for mate in mates) == 1
    assert audit(one.ledger) == []


def feed(one: Bench) -> None:
    """Whatever waits goes to the worker."""
    time.sleep(0.005)
    one.ledger.reap()
    if one.control.info.ready and any(g.jobs for g in one.ledger.snapshot().groups):
        one.dispatch()


@pytest.mark.parametrize(("most", "width"), [(2, 16), (3, 16), (3, 8), (5, 16), (10, 64), (3, 1)])
def test_companies_shrink_to_one_by_the_last_attempt(most: int, width: int) -> None:
    sizes = [company(attempts, most, width) for attempts in range(1, most)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(1 <= size <= width for size in sizes)
    assert company(0, most, width) == 0
    assert sizes[-1] == 1
    if most > 2 and width > 1:
        assert sizes[0] < width


def test_backoff_doubles_up_to_a_cap_and_no_two_workers_come_at_once() -> None:
    random.seed(1)
    for kind, low, high in (("worker_died", 100, 5000), ("later", 1000, 60_000), ("anything", 500, 30_000)):
        for before in range(40):
            base = min(high, low * 2**before)
            waits = {backoff_ms(kind, before) for _ in range(50)}
            assert all(0.5 * base - 1 <= wait <= 1.5 * base + 1 for wait in waits)
            assert len(waits) > 20
