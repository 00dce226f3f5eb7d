"""What a worker's control process makes of what its runner tells: leases, attempts, commits. The test plays runner and scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from fleet_support import until
from ledger_support import POOL, PREFIX, START_MS, ClockedLedger, dump, make_entry, serving

from lorayard.celery_app import make_app
from lorayard.errors import BadRequest, Unavailable
from lorayard.ledger.audit import audit
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import Planned, WorkerInfo, WorkerRegistry
from lorayard.settings import Settings
from lorayard.telemetry import JobEvents
from lorayard_workers import control
from lorayard_workers.control import Control
from lorayard_workers.runner import Died, Event, Outcome, Progress, Ready, Started, Work

LEASE = 5000
READY = Ready({}, 8, 1000, 16, 1)
ANSWER: dict[str, Any] = {"object": "chat.completion", "choices": [], "usage": {"total_tokens": 7}}


class HandRunner:
    """A runner that computes what the test says."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.cancelled: list[str] = []
        self.killed: list[str] = []
        self.emit: Callable[[Event], None] = lambda event: None

    def start(self, emit: Callable[[Event], None]) -> None:
        self.emit = emit

    def submit(self, work: Work) -> None:
        self.works.append(work)

    def cancel(self, batch: str, refs: Sequence[str]) -> None:
        self.cancelled += refs

    def kill(self, reason: str) -> None:
        self.killed.append(reason)

    def close(self) -> None:
        """Nothing computes."""


class Bench:
    """One worker, `w`, and its ledger, by the clock of the test."""

    def __init__(self, client: redis.Redis, events_url: str, fetch: Callable[[str, dict[str, Any]], str], **settings: Any) -> None:
        options: dict[str, Any] = {"pool": POOL, "worker_name": "w", "heartbeat_ms": 50, "lease_ms": LEASE} | settings
        self.ledger = ClockedLedger(client)
        self.now = START_MS
        self.advance(0)
        self.ledger.install()
        self.epoch = self.ledger.lead("test", 10**9)
        self.runner = HandRunner()
        self.expected: list[Planned] = []
        events = JobEvents(make_app(events_url), "w@test")
        self.control = Control(Settings(**options), self.ledger, self.runner, fetch, events, expect=self.expect)
        self.batches = 0

    def expect(self, planned: Planned, base: dict[str, Any]) -> list[str]:
        self.expected.append(planned)
        return planned.digests[:1]

    def start(self) -> None:
        self.control.start()
        self.runner.emit(READY)
        self.control.wait_ready(10)

    def advance(self, ms: int) -> None:
        self.now += ms
        self.ledger.set_clock(self.now)

    def put(self, *ids: str, **changes: Any) -> list[str]:
        self.ledger.enqueue([make_entry(i, **changes) for i in ids], max_queued=99)
        return [f"acme/{i}" for i in ids]

    def claim(self, n: int = 99, digest: str = "base") -> str:
        self.batches += 1
        batch = f"b{self.batches}"
        answer, _ = self.ledger.claim(
            epoch=self.epoch, worker="w", most=9, batch=batch, digest=digest, delivery_ms=5000, why="due", takes=[("acme", n)]
        )
        assert answer == "ok"
        return batch

    def dispatch(self, n: int = 99, digest: str = "base") -> str:
        """Claim a batch, and see that the worker has it, or is done with it: the ledger's word may be faster than the call here."""
        batch = self.claim(n, digest)
        self.control.run_batch(batch)
        until(lambda: batch in {work.batch for work in self.runner.works} or batch not in self.ledger.outstanding("w"), 10, every_s=0.001)
        return batch

    def begin(self, batch: str, *refs: str) -> None:
        self.runner.emit(Started(batch, list(refs)))
        for ref in refs:
            self.until(ref, "running")
            until(lambda ref=ref: ref in self.control._leases.held[batch].begun, 10, every_s=0.005)  # type: ignore[misc]

    def job(self, ref: str) -> dict[str, Any]:
        document = self.ledger.show("acme", [ref.removeprefix("acme/")])[0]
        assert document is not None
        return document

    def told(self) -> WorkerInfo:
        """What the worker's last heartbeat said."""
        found = WorkerRegistry(self.ledger.client).find(POOL, "w")
        assert found is not None
        return found

    def until(self, ref: str, status: str, attempts: int | None = None) -> dict[str, Any]:
        until(lambda: self.job(ref)["status"] == status, 10, every_s=0.005)
        document = self.job(ref)
        assert attempts in (None, document["attempts"])
        return document

    def expiry(self, batch: str) -> int:
        leases: Any = dump(self.ledger.client).get("leases", ({}, False))[0]
        return int(leases.get(batch, 0))


def no_adapter(digest: str, base: dict[str, Any]) -> str:
    raise AssertionError("no adapter is wanted here")


@pytest.fixture
def bench(store: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    monkeypatch.setattr(control, "DRAIN_S", 0.3)
    made: list[Bench] = []

    def make(fetch: Callable[[str, dict[str, Any]], str] = no_adapter, *, client: redis.Redis = store, **settings: Any) -> Bench:
        made.append(Bench(client, redis_url, fetch, **settings))
        return made[-1]

    yield make
    for one in made:
        one.control.close()
        assert one.ledger.client is not store or audit(one.ledger) == []


@pytest.fixture
def one(bench: Callable[..., Bench]) -> Bench:
    made = bench()
    made.start()
    return made


def test_what_a_worker_has_is_renewed_begun_or_not(one: Bench) -> None:
    a, _ = one.put("a", "b")
    running, on_deck = one.dispatch(1), one.dispatch(1)
    one.begin(running, a)
    for _ in range(3):
        one.advance(LEASE - 1)
        until(lambda: min(one.expiry(running), one.expiry(on_deck)) == one.now + LEASE, 10, every_s=0.005)
        assert not any(one.ledger.reap())


def test_a_result_is_stored_once_and_its_tokens_are_charged(one: Bench) -> None:
    (a,) = one.put("a")
    batch = one.dispatch()
    one.begin(batch, a)
    one.control.run_batch(batch)
    assert [work.batch for work in one.runner.works] == [batch], "a message that comes twice does nothing"
    one.runner.emit(Outcome(batch, a, response=ANSWER, width=3))
    document = one.until(a, "succeeded", attempts=1)
    assert (document["worker"], document["batch"], document["width"]) == ("w", batch, 3)
    assert one.ledger.snapshot().served == {"acme": 7}
    until(lambda: not one.control._leases.held, 10)


def test_a_lost_lease_stops_what_it_covered_and_its_late_result_is_not_stored(one: Bench) -> None:
    a, b = one.put("a", "b")
    batch = one.dispatch()
    one.begin(batch, a)
    one.advance(LEASE - 1)
    until(lambda: one.expiry(batch) == one.now + LEASE, 10)
    while one.ledger.reap().lapsed == 0:  # a heartbeat may come in between
        one.advance(LEASE)
    until(lambda: sorted(one.runner.cancelled) == [a, b], 10)
    one.runner.emit(Started(batch, [b]))
    until(lambda: one.runner.cancelled.count(b) == 2, 10)
    one.runner.emit(Outcome(batch, a, response=ANSWER))
    again = one.dispatch()
    one.begin(again, a, b)
    one.runner.emit(Outcome(again, b, error={"message": "no", "code": "bad"}))
    one.until(b, "failed", attempts=1)
    one.runner.emit(Outcome(again, a, response=ANSWER))
    assert one.until(a, "succeeded", attempts=2)["batch"] == again


def test_a_dead_process_costs_what_had_begun_an_attempt_and_nothing_else(one: Bench) -> None:
    a, b, c = one.put("a", "b", "c")
    first, on_deck = one.dispatch(2), one.dispatch(1)
    one.begin(first, a)
    one.runner.emit(Died("killed", [a], [b, c]))
    one.until(a, "delayed", attempts=1)
    for ref in (b, c):
        one.until(ref, "queued", attempts=0)
    assert one.expiry(first) == one.expiry(on_deck) == 0
    one.dispatch()
    assert len(one.runner.works) == 2, "while the model is loaded, batches go back"
    for ref in (b, c):
        one.until(ref, "queued", attempts=0)
    one.runner.emit(READY)
    until(lambda: one.control.info.ready, 10)
    one.dispatch()
    assert [item.ref for item in one.runner.works[-1].items] == [b, c]


def test_a_process_that_died_before_any_job_had_begun_died_of_the_first_batch(one: Bench) -> None:
    a, b = one.put("a", "b")
    one.dispatch(1)
    one.dispatch(1)
    one.runner.emit(Died("killed", [], [a, b]))
    one.until(a, "delayed", attempts=1)
    one.until(b, "queued", attempts=0)


@pytest.mark.parametrize(
    ("outcome", "status", "attempts", "postponed"),
    [({}, "failed", 1, None), ({"retryable": True}, "delayed", 1, 0), ({"later": True}, "delayed", 0, 1)],
)
def test_what_becomes_of_an_error(one: Bench, outcome: dict[str, Any], status: str, attempts: int, postponed: int | None) -> None:
    (a,) = one.put("a")
    batch = one.dispatch()
    one.begin(batch, a)
    one.runner.emit(Outcome(batch, a, error={"message": "no", "code": "bad"}, **outcome))
    document = one.until(a, status, attempts)
    assert document.get("postponed") == postponed


@pytest.mark.parametrize(
    ("more", "timings", "status"),
    [
        ({"usage": "abc"}, {}, "succeeded"),
        ({"usage": {"total_tokens": -5}}, {}, "succeeded"),
        ({"usage": {"total_tokens": 10**30}}, {}, "succeeded"),
        ({}, {"decode": float("inf"), "prefill": float("nan"), "adapter_load": -1.0}, "succeeded"),
        ({"choices": "\ud800"}, {}, "failed"),
    ],
    ids=["no usage", "negative tokens", "too many tokens", "no times", "no text"],
)
def test_a_strange_answer_holds_nothing_up(one: Bench, more: dict[str, Any], timings: dict[str, float], status: str) -> None:
    strange, plain = one.put("strange", "plain")
    batch = one.dispatch()
    one.begin(batch, strange, plain)
    strange_end = Outcome(batch, strange, response=ANSWER | more, timings_ms=timings)
    one.control._commits.hear(strange_end)  # as neighbours, most likely committed together
    one.runner.emit(Outcome(batch, plain, response=ANSWER))
    document = one.until(strange, status, attempts=1)
    assert all(ms >= 0 for ms in document["latencies_ms"].values())
    assert (document["error"] or {}).get("code") == (None if status == "succeeded" else "unstorable_answer")
    assert one.until(plain, "succeeded", attempts=1)
    until(lambda: not one.control._leases.held, 10)


@pytest.mark.parametrize(
    ("error", "status"), [(Unavailable("away"), "delayed"), (BadRequest("no adapter of this base"), "failed"), (OSError("disk"), "delayed")]
)
def test_an_adapter_that_cannot_be_had(bench: Callable[..., Bench], error: Exception, status: str) -> None:
    def fetch(digest: str, base: dict[str, Any]) -> str:
        raise error

    one = bench(fetch)
    one.start()
    (a,) = one.put("a", digest="d1")
    one.dispatch(digest="d1")
    one.until(a, status, attempts=1 if status == "failed" else 0)
    assert one.runner.works == []


def test_the_scheduler_is_told_what_switches_cost_here(bench: Callable[..., Bench]) -> None:
    def fetch(_digest: str, _base: dict[str, Any]) -> str:
        time.sleep(0.05)
        return "adapter.gguf"

    one = bench(fetch)
    one.start()
    one.put("a", digest="d" * 8)
    one.dispatch(digest="d" * 8)
    costs = {"prefill_tokens_per_s": 400.0, "step_ms": {"8": 30.5}, "switch_ms": {"hot": 0.0, "loaded": 1.5}}
    one.runner.emit(Progress(1, [], [], {}, costs=costs))
    until(lambda: one.told().costs.get("step_ms"), 10, every_s=0.01)
    told = one.told().costs
    assert told["prefill_tokens_per_s"] == 400.0
    assert told["step_ms"] == {"8": 30.5}
    assert told["switch_ms"].keys() == {"hot", "loaded", "remote"}
    assert 50 <= told["switch_ms"]["remote"] < 5000


def test_a_cancelled_job_is_stopped_and_its_namesake_in_another_batch_is_not(one: Bench) -> None:
    x, y = one.put("x", "y", idem="", body_hash="")
    old = one.dispatch()
    assert one.ledger.delete("acme", ["x"]) == ["deleted"]
    until(lambda: one.runner.cancelled == [x], 10)
    one.put("x")
    one.dispatch()
    one.ledger.client.publish(f"{PREFIX}to:w", f"stop {old} {x}")  # the same word, come late
    assert one.ledger.cancel("acme", ["y"]) == ["cancelled"]
    until(lambda: y in one.runner.cancelled, 10)
    assert one.runner.cancelled == [x, y]
    assert [*one.control._leases.held] == ["b2"]


def test_what_is_recalled_is_dropped_at_once_and_comes_again_in_another_batch(bench: Callable[..., Bench]) -> None:
    one = bench(heartbeat_ms=600_000)  # so that only the ledger's word can tell
    one.start()
    a, b, c = one.put("a", "b", "c")
    running, on_deck = one.dispatch(2), one.dispatch(1)
    one.begin(running, a)
    assert [one.ledger.recall(epoch=one.epoch, batch=batch) for batch in (running, on_deck)] == [1, 1]
    until(lambda: one.runner.cancelled == [b, c], 10)
    assert [*one.control._leases.held] == [running]
    again = one.dispatch()
    one.begin(again, b, c)
    for batch, ref in ((running, a), (again, b), (again, c)):
        one.runner.emit(Outcome(batch, ref, response=ANSWER))
    for ref in (a, b, c):
        one.until(ref, "succeeded", attempts=1)


def test_what_begins_as_it_is_recalled_is_stopped(one: Bench) -> None:
    (a,) = one.put("a")
    batch = one.dispatch()
    assert one.ledger.recall(epoch=one.epoch, batch=batch) == 1
    one.runner.emit(Started(batch, [a]))
    one.runner.emit(Outcome(batch, a, response=ANSWER))
    until(lambda: one.job(a)["status"] == "queued" and not one.control._leases.held, 10)
    assert one.job(a)["attempts"] == 0
    again = one.dispatch()
    one.runner.emit(Outcome(again, a, response=ANSWER))
    one.until(a, "succeeded", attempts=1)


def test_what_an_earlier_process_had_is_queued_at_the_start(bench: Callable[..., Bench]) -> None:
    one = bench()
    (a,) = one.put("a")
    assert one.ledger.take(one.claim(), "w", "before", LEASE) is not None
    one.control.start()
    one.until(a, "queued")
    one.runner.emit(READY)


def test_a_model_that_tells_nothing_for_too_long_is_killed(bench: Callable[..., Bench]) -> None:
    one = bench(hang_s=0.3)
    one.start()
    (a,) = one.put("a")
    one.begin(one.dispatch(), a)
    until(lambda: one.runner.killed, 10)


def test_results_are_kept_while_the_ledger_is_away(bench: Callable[..., Bench], tmp_path: Path) -> None:
    with serving(tmp_path) as server, connect(server.url) as client:
        one = bench(client=client)
        one.start()
        a, b = one.put("a", "b")
        batch = one.dispatch()
        one.begin(batch, a)
        server.kill()
        one.runner.emit(Outcome(batch, a, response=ANSWER))
        one.runner.emit(Started(batch, [b]))
        server.start()
        one.until(a, "succeeded", attempts=1)
        one.until(b, "running", attempts=1)
        one.runner.emit(Outcome(batch, b, response=ANSWER))
        one.until(b, "succeeded", attempts=1)
        one.control.close()


def test_leaving_gives_back_what_has_not_begun_and_puts_off_what_takes_too_long(one: Bench) -> None:
    begun, unstarted = one.put("begun", "unstarted", max_attempts=1)
    one.begin(one.dispatch(), begun)
    one.control.close()
    assert one.until(begun, "queued", attempts=0)["postponed"] == 1
    assert one.until(unstarted, "queued", attempts=0)["postponed"] == 0
    assert {*one.runner.cancelled} == {begun, unstarted}
    one.control.run_batch(one.claim())
    assert len(one.runner.works) == 1, "it takes nothing any more"


def test_leaving_waits_for_what_has_begun(one: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "DRAIN_S", 60)
    (a,) = one.put("a")
    batch = one.dispatch()
    one.begin(batch, a)
    leaving = threading.Thread(target=one.control.close)
    leaving.start()
    until(one.control._closing.is_set, 10)
    one.advance(LEASE - 1)
    until(lambda: one.expiry(batch) == one.now + LEASE, 10, every_s=0.005)  # it is held, and renewed, while it is waited for
    one.runner.emit(Outcome(batch, a, response=ANSWER))
    leaving.join(10)
    assert one.until(a, "succeeded", attempts=1)
    assert one.runner.cancelled == []


def test_what_a_worker_does_without_is_told(one: Bench) -> None:
    registry = WorkerRegistry(one.ledger.client)
    one.runner.emit(Ready({}, 8, 1000, 16, 2, fallback="without the GPU, because"))
    until(lambda: (info := registry.find(POOL, "w")) is not None and info.fallback == "without the GPU, because", 10)
    one.runner.emit(READY)
    until(lambda: (info := registry.find(POOL, "w")) is not None and not info.fallback, 10)


def test_what_is_planned_is_passed_on_with_every_heartbeat(one: Bench) -> None:
    registry = WorkerRegistry(one.ledger.client)
    registry.announce_next(POOL, ["d2", "d1"], {"d1": "w", "d2": "v"})
    until(lambda: one.expected and one.expected[-1] == (["d2", "d1"], ["d1"]), 10)
    until(lambda: (info := registry.find(POOL, "w")) is not None and info.absent == ["d2"], 10)
    registry.announce_next(POOL, ["d1"], {})
    until(lambda: one.expected[-1] == (["d1"], []), 10)
