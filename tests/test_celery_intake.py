"""A plain Celery application, without our code, sends `lorayard.infer` by name and reads results; the scheduler's intake takes it in."""

from __future__ import annotations

import contextlib
import gc
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from api_support import job, run
from celery import Celery
from celery.result import AsyncResult
from kombu import Connection

from lorayard import embedded
from lorayard.celery_app import INFER, INFER_QUEUE, infer_queue, make_app
from lorayard.ledger.connection import connect
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import open_ledger
from lorayard.settings import Settings
from lorayard_scheduler.celery_intake import CeleryIntake
from lorayard_scheduler.reconciler import Reconciler

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")  # of redis-py, at what Celery calls

PRODUCER = """
import sys
from celery import Celery
app = Celery(broker=sys.argv[1], backend=sys.argv[1])
message = {"role": "user", "content": "How many?"}
result = app.send_task("lorayard.infer", kwargs={"request": {"messages": [message]}, "priority": "high"}, queue="lorayard.infer")
print(result.id, flush=True)
print(result.get(timeout=30)["response"]["choices"][0]["message"]["content"])
assert not any(name.startswith("lorayard") for name in sys.modules)
"""


class Intake:
    """A scheduler's Celery intake in its two threads, started and stopped at will."""

    def __init__(self, redis_url: str, ledger: Ledger) -> None:
        self.url = redis_url
        self.ledger = ledger
        self.running: CeleryIntake | None = None
        self.threads: list[threading.Thread] = []
        self.open = contextlib.ExitStack()

    def start(self, **settings: Any) -> None:
        self.running = CeleryIntake(Settings(**settings), self.ledger, self.open.enter_context(make_app(self.url)))
        self.threads = [threading.Thread(target=loop) for loop in (self.running.run, self.running.publish)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        if self.running is not None:
            self.running.stop()
            for thread in self.threads:
                thread.join()
            self.running = None
        self.open.close()

    def show(self, job_id: str, tenant: str = "default") -> dict[str, Any] | None:
        return self.ledger.show(tenant, [job_id])[0]


@pytest.fixture
def intake(redis_url: str, store: redis.Redis, tmp_path: Path) -> Iterator[Intake]:
    with connect(redis_url) as client:
        made = Intake(redis_url, open_ledger(client, Settings(state_dir=tmp_path)))
        yield made
        made.stop()


@pytest.fixture
def producer(redis_url: str, store: redis.Redis) -> Iterator[Celery]:
    with Celery(broker=redis_url, backend=redis_url, set_as_current=False) as app:
        yield app
        gc.collect()  # results of Celery's talk to the server when they are dropped
        app.backend.result_consumer.stop()
        app.backend.client.connection_pool.disconnect()


def send(app: Celery, task_id: str | None = None, **kwargs: Any) -> AsyncResult[Any]:
    return app.send_task(INFER, kwargs=kwargs, queue=INFER_QUEUE, task_id=task_id)


def until(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    give_up = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)
    return answer


def all_taken(app: Celery, intake: Intake) -> None:
    """Wait until every message sent before has been dealt with: the broker keeps their order."""
    last = send(app, **job("last", not_before_s=1000))
    until(lambda: intake.show(last.id))


def test_a_producer_without_our_code_gets_its_answer(intake: Intake) -> None:
    intake.start()
    with subprocess.Popen([sys.executable, "-c", PRODUCER, intake.url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        task_id = process.stdout.readline().strip()
        document = until(lambda: intake.show(task_id))
        assert (document["id"], document["status"], document["priority"]) == (task_id, "queued", "high")
        assert run(intake.ledger, "default") == [task_id]
        assert process.stdout.readline() == "seven\n"
    assert process.returncode == 0


@pytest.mark.parametrize("ending", ["succeeded", "cancelled"])
def test_the_result_is_the_document_and_stays_as_long(intake: Intake, producer: Celery, ending: str) -> None:
    intake.start(result_ttl_s=1234)
    result = send(producer, **job(metadata={"n": 1}))
    until(lambda: intake.show(result.id))
    assert result.state == "PENDING"
    if ending == "succeeded":
        run(intake.ledger, "default")
    else:
        intake.ledger.cancel("default", [result.id])
    document = result.get(timeout=20)
    assert document == intake.show(result.id)
    assert document["status"] == ending
    assert document["metadata"] == {"n": 1}
    left: Any = intake.ledger.client.ttl(f"celery-task-meta-{result.id}")
    assert 1200 < left <= 1234


def test_a_message_that_comes_again_is_the_same_job(intake: Intake, producer: Celery) -> None:
    results = [send(producer, "the-task", **job()) for _ in range(3)]
    intake.start()
    all_taken(producer, intake)
    send(producer, "the-task", **job())
    all_taken(producer, intake)
    assert intake.ledger.counts() == {"queued": 1, "enqueued": 3}
    run(intake.ledger, "default")
    assert results[0].get(timeout=20)["id"] == "the-task"
    send(producer, "the-task", **job())
    all_taken(producer, intake)
    assert intake.ledger.counts()["enqueued"] == 4
    assert results[0].get(timeout=20)["status"] == "succeeded"


def test_what_is_no_job_fails_with_the_reason_and_holds_nothing_up(intake: Intake, producer: Celery) -> None:
    bad: list[tuple[AsyncResult[Any], str]] = [
        (send(producer, requests={}), "unknown field 'requests'; did you mean 'request'?"),
        (send(producer), "missing required field `request`"),
        (send(producer, **job(adapter="nope")), "no adapter named 'nope'"),
        (send(producer, **job(route="groq")), "no hosted worker"),
        (send(producer, **job("\ud800")), "cannot be written as JSON"),
        (send(producer, "no id", **job()), "id: use 1 to 100"),
        (producer.send_task(INFER, args=[1], queue=INFER_QUEUE), "keyword arguments only"),
        (producer.send_task("other.task", kwargs=job(), queue=INFER_QUEUE), "takes the task lorayard.infer only"),
    ]
    with Connection(intake.url) as connection, connection.Producer() as raw:
        raw.publish(b"not json", routing_key=INFER_QUEUE, content_type="application/json", headers={"task": INFER, "id": "raw-1"})
        raw.publish({"task": INFER, "id": "raw-2", "kwargs": job()}, routing_key=INFER_QUEUE)  # Celery's first message protocol
        raw.publish([[], "kwargs", {}], routing_key=INFER_QUEUE, headers={"task": INFER, "id": "raw-3"})
    bad += [(producer.AsyncResult("raw-1"), "cannot decode"), (producer.AsyncResult("raw-3"), "keyword arguments only")]
    good = send(producer, **job())
    intake.start()
    until(lambda: intake.show(good.id))
    for result, words in bad:
        with pytest.raises(Exception, match=re.escape(words)) as failure:
            result.get(timeout=20)
        assert type(failure.value).__name__ in ("BadRequest", "NotFound")
        assert result.state == "FAILURE"
    all_taken(producer, intake)
    assert intake.ledger.counts() == {"queued": 1, "enqueued": 2}


def test_a_full_backlog_leaves_messages_with_the_broker(intake: Intake, producer: Celery) -> None:
    results = [send(producer, **job(str(i))) for i in range(3)]
    intake.start(max_queued=2)
    until(lambda: intake.ledger.counts().get("queued") == 2)
    time.sleep(1.5)  # it comes, and is left, at least once more
    assert [result.state for result in results] == ["PENDING"] * 3
    ended = set(run(intake.ledger, "default", 2))
    (last,) = {result.id for result in results} - ended
    assert until(lambda: intake.show(last))["status"] == "queued"
    run(intake.ledger, "default")
    assert [result.get(timeout=20)["status"] for result in results] == ["succeeded"] * 3


def test_while_the_ledgers_server_is_away_messages_stay_with_the_broker(redis_url: str, producer: Celery, tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    with embedded.running(settings) as url:
        client = connect(url)
        intake = Intake(redis_url, open_ledger(client, settings))
    try:
        intake.start()
        result = send(producer, **job())
        time.sleep(1.5)
        assert result.state == "PENDING"
        with embedded.running(settings):
            assert until(lambda: intake.show(result.id))["status"] == "queued"
            run(intake.ledger, "default")
            assert result.get(timeout=20)["status"] == "succeeded"
            intake.stop()
    finally:
        intake.stop()
        client.close()


@pytest.mark.parametrize("earlier", [False, True], ids=["of this version", "of one that noted all pools' together"])
def test_jobs_that_end_while_no_scheduler_runs_are_published_by_the_next(intake: Intake, producer: Celery, earlier: bool) -> None:
    intake.start()
    results = [send(producer, **job(str(i))) for i in range(3)]
    until(lambda: intake.ledger.counts().get("queued") == 3)
    intake.stop()
    run(intake.ledger, "default", 3)
    assert [result.state for result in results] == ["PENDING"] * 3
    client = intake.ledger.client
    if earlier:
        client.rename("ly:{celery}:pending:main", "ly:{celery}:pending")
        client.sadd("ly:{celery}:pending", "another-pools")
    intake.start()
    assert {result.get(timeout=20)["status"] for result in results} == {"succeeded"}
    until(lambda: not client.scard("ly:{celery}:pending:main"))
    assert client.smembers("ly:{celery}:pending") == ({b"another-pools"} if earlier else set())


@pytest.fixture
def two_pools(redis_url: str, intake: Intake, tmp_path: Path) -> Iterator[tuple[Intake, Intake]]:
    """`main` and `other`, which share broker and server; both take tasks by now."""
    with connect(redis_url) as client:
        other = Intake(redis_url, open_ledger(client, Settings(state_dir=tmp_path, pool="other")))
        try:
            intake.start()
            other.start(pool="other")
            until(lambda: client.scard("lorayard.pools") == 2)
            yield intake, other
        finally:
            other.stop()


def test_a_task_goes_to_the_pool_it_names_whoever_takes_it(two_pools: tuple[Intake, Intake], producer: Celery) -> None:
    results = {pool: [send(producer, **job(f"{pool}-{n}", pool=pool)) for n in range(20)] for pool in ("main", "other")}
    squeezed = producer.send_task(INFER, kwargs=job("squeezed", pool="other"), queue=INFER_QUEUE, compression="zlib")
    direct = producer.send_task(INFER, kwargs=job("direct"), queue=infer_queue("other"))
    results["other"] += [squeezed, direct]
    for pool, one in zip(("main", "other"), two_pools, strict=True):
        until(lambda one=one, pool=pool: one.ledger.counts().get("queued") == len(results[pool]))  # type: ignore[misc]
        assert set(run(one.ledger, "default", 99)) == {result.id for result in results[pool]}
        assert {result.get(timeout=20)["status"] for result in results[pool]} == {"succeeded"}
    nowhere = send(producer, **job(pool="nowhere"))
    with pytest.raises(Exception, match="no pool named 'nowhere' here"):
        nowhere.get(timeout=20)


def test_each_pool_publishes_the_ends_of_its_own_tasks(
    two_pools: tuple[Intake, Intake], producer: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by its sweeps, which find nothing of another's jobs in their ledger and must not take them for deleted."""
    monkeypatch.setattr("lorayard_scheduler.celery_intake.SWEEP_S", 0.05)
    results = [send(producer, **job(str(n))) for n in range(40)]
    until(lambda: sum(one.ledger.counts().get("queued", 0) for one in two_pools) == 40)
    time.sleep(1)  # sweeps
    for one in two_pools:
        if queued := one.ledger.counts().get("queued"):
            run(one.ledger, "default", queued)
    assert {result.get(timeout=20)["status"] for result in results} == {"succeeded"}


def test_a_tenant_whose_jobs_come_as_tasks_alone_is_known_to_the_reconciler(
    intake: Intake, producer: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listing would grow for ever."""
    monkeypatch.setattr("lorayard_scheduler.reconciler.FORGET_EVERY_S", 0.0)
    intake.start(celery_tenant="acme")
    result = send(producer, **job())
    until(lambda: intake.show(result.id, "acme"))
    run(intake.ledger, "acme")
    result.get(timeout=20)
    intake.stop()
    client = intake.ledger.client
    client.delete(f"ly:{{main}}:job:acme/{result.id}")  # as its time to live would
    client.zadd("ly:{main}:by_tenant:acme", {result.id: 1})
    assert intake.ledger.list_ids("acme", limit=9) == [result.id]
    with make_app(intake.url) as app:
        Reconciler(intake.ledger, app).sweep()
    assert intake.ledger.list_ids("acme", limit=9) == []


def test_threads_share_a_result_backend_and_none_of_its_connections_outlives_the_application(redis_url: str, store: redis.Redis) -> None:
    def connections() -> set[str]:
        return {client["id"] for client in store.client_list()}

    before = connections()
    with make_app(redis_url) as app, ThreadPoolExecutor(8) as pool:
        together = threading.Barrier(8)
        backends = set(pool.map(lambda n: (together.wait(), id(app.backend), app.backend.store_result(str(n), n, "SUCCESS"))[1], range(8)))
        assert len(backends) == 1
        assert app.AsyncResult("3").get(timeout=20) == 3
        assert connections() - before
    until(lambda: not connections() - before)


def test_the_tenant_is_a_setting(intake: Intake, producer: Celery) -> None:
    intake.start(celery_tenant="acme")
    result = send(producer, **job())
    until(lambda: intake.show(result.id, "acme"))
    assert intake.show(result.id) is None
    run(intake.ledger, "acme")
    assert result.get(timeout=20) == intake.show(result.id, "acme")
