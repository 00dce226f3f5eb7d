"""What the leader puts right at intervals, on a real server and broker."""

from __future__ import annotations

import time

import msgspec
import pytest
import redis
from api_support import run
from benchmarks.ports import free_port
from fleet_support import until
from ledger_support import make_entry

from lorayard.celery_app import RUN_BATCH, make_app, worker_queue
from lorayard.ledger.audit import audit
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard_scheduler import reconciler
from lorayard_scheduler.reconciler import Reconciler

PREFIX = "ly:{main}:"


@pytest.fixture
def ledger(store: redis.Redis) -> Ledger:
    return open_ledger(store, Settings())


@pytest.fixture
def sweeper(ledger: Ledger, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Reconciler:
    """For which everything is always due."""
    for name in ("REAP_EVERY_S", "AUDIT_EVERY_S", "AUDIT_PAUSE_S", "FORGET_EVERY_S"):
        monkeypatch.setattr(reconciler, name, 0.0)
    return Reconciler(ledger, make_app(redis_url))


def test_a_worker_that_is_gone_is_struck_off_with_its_queue(
    ledger: Ledger, sweeper: Reconciler, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, app = WorkerRegistry(ledger.client), make_app(redis_url)
    for name in ("gone", "here"):
        registry.beat(WorkerInfo(name=name, pool="main", kind="llama", incarnation="i", host="h", pid=1, ready=True))
        for _ in range(3):
            app.send_task(RUN_BATCH, args=["b-of-old"], queue=worker_queue(name), ignore_result=True)
    sweeper.sweep()
    assert len(registry.workers("main")) == 2, "neither has been silent for long"
    beat = next(worker for worker in registry.workers("main") if worker.name == "gone")
    beat.seen_ms -= reconciler.GONE_MS + 1000
    ledger.client.hset("ly:{workers}:main", "gone", msgspec.json.encode(beat))
    sweeper._due.clear()
    sweeper.sweep()
    assert until(lambda: [worker.name for worker in registry.workers("main")] == ["here"], 10)
    assert ledger.client.llen(worker_queue("gone")) == 0
    assert not list(ledger.client.scan_iter("*worker.gone*")), "nor a binding of it"
    assert ledger.client.llen(worker_queue("here")) == 3


def test_a_broker_that_is_away_holds_up_nobody_and_lost_workers_are_struck_off_when_it_is_back(
    ledger: Ledger, sweeper: Reconciler, redis_url: str
) -> None:
    registry, app = WorkerRegistry(ledger.client), make_app(redis_url)
    for name in ("one", "two"):
        app.send_task(RUN_BATCH, args=["b-of-old"], queue=worker_queue(name), ignore_result=True)
        lost = WorkerInfo(name=name, pool="main", kind="llama", incarnation="i", host="h", pid=1, ready=True)
        registry.beat(lost)
        ledger.client.hset("ly:{workers}:main", name, msgspec.json.encode(msgspec.structs.replace(lost, seen_ms=1)))
    away = Reconciler(ledger, make_app(f"redis://127.0.0.1:{free_port()}/0"))
    away._due.clear()
    began = time.monotonic()
    away.sweep()
    assert time.monotonic() - began < 1
    away._striking.join(20)
    assert [worker.name for worker in registry.workers("main")] == ["one", "two"], "else nobody would delete their queues"
    sweeper._due.clear()
    sweeper.sweep()
    assert until(lambda: not registry.workers("main"), 10)
    assert not list(ledger.client.scan_iter("*worker.*"))


def test_a_worker_that_comes_back_is_not_struck_off(ledger: Ledger) -> None:
    registry = WorkerRegistry(ledger.client)
    worker = WorkerInfo(name="w", pool="main", kind="llama", incarnation="i", host="h", pid=1, ready=True)
    registry.beat(worker)
    before = msgspec.structs.replace(worker, seen_ms=worker.seen_ms - reconciler.GONE_MS - 1)
    registry.strike_off(before)
    assert [found.name for found in registry.workers("main")] == ["w"]


def test_a_worker_gets_no_new_work_by_the_time_its_leases_run_out(ledger: Ledger) -> None:
    """It has nothing else to do then, and would be the first to get its own jobs again."""
    registry, settings = WorkerRegistry(ledger.client), Settings()
    registry.beat(WorkerInfo(name="lost", pool="main", kind="llama", incarnation="i", host="h", pid=1, ready=True))
    (worker,) = registry.workers("main")
    missed = 2 * settings.heartbeat_ms
    assert registry.alive("main", worker.seen_ms + missed), "a heartbeat may come late"
    renewed = worker.seen_ms - settings.heartbeat_ms // 2  # just before it told something for the last time
    assert not registry.alive("main", renewed + settings.lease_ms - 1000)


def test_what_the_scan_finds_is_repaired_and_the_job_runs(ledger: Ledger, sweeper: Reconciler, capsys: pytest.CaptureFixture[str]) -> None:
    ledger.enqueue([make_entry(f"j{n}") for n in range(3)], max_queued=9)
    ledger.client.zrem(f"{PREFIX}queue:base:acme", "j1")
    assert {finding.kind for finding in audit(ledger)} >= {"job_in_no_place"}
    for _ in range(50):
        sweeper.sweep()
    assert audit(ledger) == []
    assert "ledger repaired" in capsys.readouterr().out
    assert sorted(run(ledger, "acme", 9)) == ["j0", "j1", "j2"]


def test_listings_of_expired_results_are_dropped_though_older_ones_live(
    store: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(store, Settings(result_ttl_s=1))
    ledger.enqueue([make_entry(f"waits{n}", not_before_ms=60_000) for n in range(5)], max_queued=99)
    ledger.enqueue([make_entry(f"ends{n}") for n in range(5)], max_queued=99)
    run(ledger, "acme", 9)
    for n in range(5):
        store.delete(f"{PREFIX}job:acme/ends{n}")  # as its time to live would
    store.zadd(f"{PREFIX}by_tenant:acme", {f"{kind}{n}": n for kind in ("waits", "ends") for n in range(5)})
    assert ledger.forget("acme", page=2) == 5
    assert sorted(ledger.list_ids("acme", limit=99)) == [f"waits{n}" for n in range(5)]
