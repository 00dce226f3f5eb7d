"""A row a job in Flower: through a real broker into Flower's own state; all of a job's events or none, and never a wait."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from flower.events import EventsState

from lorayard.celery_app import make_app
from lorayard.telemetry import JobEvents


@contextmanager
def listening(url: str, store: redis.Redis) -> Iterator[tuple[list[dict[str, Any]], threading.Event]]:
    """What a listener hears; the event is set by the last job's end."""
    app = make_app(url)
    heard: list[dict[str, Any]] = []
    done = threading.Event()
    connection = app.connection_for_read()

    def hear(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["uuid"] == "last" and event["type"] == "task-succeeded":
            done.set()
            receiver.should_stop = True

    receiver = app.events.Receiver(connection, handlers={"*": hear})
    thread = threading.Thread(target=lambda: receiver.capture(limit=None, timeout=30, wakeup=False), daemon=True)
    thread.start()
    for _ in range(1000):
        if store.pubsub_numpat():
            break
        done.wait(0.01)
    try:
        yield heard, done
    finally:
        thread.join(30)
        connection.release()


def run(events: JobEvents, job_id: str) -> None:
    events.received(job_id, adapter="cats", tenant="acme", batch="b1", attempt=0)
    events.started(job_id)
    events.succeeded(job_id, runtime_s=0.25, tokens=7)


def test_a_job_has_all_of_its_events_or_none_and_flower_shows_the_rows(redis_url: str, store: redis.Redis) -> None:
    events = JobEvents(make_app(redis_url), "worker@here", rows_per_s=0, burst=5)
    with listening(redis_url, store) as (heard, done):
        for job_id in ("a", "b", "c", "d", "last", "e", "f", "g"):
            run(events, job_id)
        assert done.wait(30)
    events.close()
    assert events.dropped == 3
    kinds = defaultdict(list)
    state = EventsState(max_tasks_in_memory=100)
    for event in heard:
        kinds[event["uuid"]].append(event["type"])
        state.event(event)
    assert dict(kinds) == {key: ["task-received", "task-started", "task-succeeded"] for key in ("a", "b", "c", "d", "last")}
    row = state.tasks["c"]
    assert (row.name, row.state, row.result, row.runtime, row.worker.hostname) == (
        "lorayard.infer",
        "SUCCESS",
        "7 tokens",
        0.25,
        "worker@here",
    )
    assert "cats" in row.kwargs


def test_a_broker_that_is_away_makes_nobody_wait_and_fills_no_memory() -> None:
    with socket.socket() as taken:  # bound, and never listening
        taken.bind(("127.0.0.1", 0))
        app = make_app(f"redis://127.0.0.1:{taken.getsockname()[1]}/0")
        events = JobEvents(app, "worker@here", burst=100_000, most=60)
        for i in range(1000):
            run(events, str(i))
        assert events.dropped > 1000 - 60


@pytest.mark.parametrize("end", ["failed", "retried"])
def test_a_job_that_ends_otherwise_is_told_once(end: str, redis_url: str, store: redis.Redis) -> None:
    events = JobEvents(make_app(redis_url), "worker@here")
    with listening(redis_url, store) as (heard, done):
        events.received("x", adapter=None, tenant="acme", batch="b1", attempt=1)
        getattr(events, end)("x", "worker_died")
        getattr(events, end)("x", "worker_died")
        run(events, "last")
        assert done.wait(30)
    events.close()
    told = [(event["type"], event.get("exception")) for event in heard if event["uuid"] == "x"]
    assert told == [("task-received", None), (f"task-{end}", "worker_died")]
