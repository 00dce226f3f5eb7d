"""The mirror against a real ledger: what the planner sees is what there is."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis
from ledger_support import make_entry

from lorayard.ledger.audit import audit
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import End
from lorayard.ledger.registry import WorkerInfo, open_ledger
from lorayard.settings import Settings
from lorayard_scheduler import backlog as backlog_module
from lorayard_scheduler.backlog import UNTAKEN_MS, Backlog
from lorayard_scheduler.groups import Groups
from lorayard_scheduler.hosted_planning import HostedPlanning
from lorayard_scheduler.planner import Policy, plan

POLICY = Policy(flood_ms=10_000)


@pytest.fixture
def ledger(store: redis.Redis) -> Ledger:
    return open_ledger(store, Settings())


@pytest.fixture
def backlog(ledger: Ledger) -> Backlog:
    found = Backlog(ledger, POLICY)
    found.rebuild()
    return found


def info(name: str = "w", **more: object) -> WorkerInfo:
    fields: dict[str, Any] = {"kind": "llama", "width": 8} | more
    return WorkerInfo(name=name, pool="main", incarnation="i", host="h", pid=1, ready=True, **fields)


def hear(ledger: Ledger, backlog: Backlog) -> None:
    """All that happened, from the beginning."""
    _, events = ledger.events("0-0", 0)
    backlog.hear(events)
    backlog.refresh()


def seen(backlog: Backlog) -> dict[tuple[str, str], int]:
    return {(g.digest, g.tenant.name): g.jobs for g in backlog.groups}


def carry_out(ledger: Ledger, backlog: Backlog) -> list[tuple[str, str, int]]:
    """Plan, claim, note; (worker, digest, jobs) of each batch."""
    epoch, batches = ledger.lead("test", 60_000), []
    for n, d in enumerate(plan(backlog.view, backlog.now, POLICY)):
        batch = f"b{backlog.now}-{n}"
        answer, jobs = ledger.claim(
            epoch=epoch, worker=d.worker, most=9, batch=batch, digest=d.digest, delivery_ms=60_000, why=d.why, takes=d.takes
        )
        assert (answer, jobs) == ("ok", d.jobs)
        backlog.dispatched(batch, d.digest, d.takes, d.worker)
        batches.append((d.worker, d.digest, jobs))
    backlog.view.planned()
    return batches


def test_it_knows_what_a_worker_would_have_to_fetch(backlog: Backlog) -> None:
    backlog.meet([info(absent=["far"], loaded=["near"])])
    backlog.view.planned()
    there = backlog.roster.workers["w"]
    assert [there.temperature(digest) for digest in ("far", "near", "other")] == ["remote", "loaded", "disk"]
    backlog.stale = False
    backlog.meet([info(loaded=["near"])])
    assert backlog.stale, "it has been fetched: there may be another plan"
    assert backlog.roster.workers["w"].temperature("far") == "disk"


def test_it_follows_what_is_queued_claimed_and_ended(ledger: Ledger, backlog: Backlog) -> None:
    ledger.enqueue([make_entry(f"j{n}", digest="a" if n < 20 else "b") for n in range(23)], max_queued=99)
    hear(ledger, backlog)
    assert seen(backlog) == {("a", "acme"): 20, ("b", "acme"): 3}
    backlog.meet([info()])
    assert backlog.stale
    batches = carry_out(ledger, backlog)
    assert sorted(batches) == [("w", "a", 16), ("w", "b", 3)]
    hear(ledger, backlog)
    assert seen(backlog) == {("a", "acme"): 4}
    assert [(h.digest, h.jobs) for h in sorted(backlog.roster.workers["w"].held, key=lambda h: h.digest)] == [("a", 16), ("b", 3)]
    assert backlog.waits
    assert carry_out(ledger, backlog) == [], "no place is free"
    again = Backlog(ledger, POLICY)
    again.rebuild()
    assert seen(again) == seen(backlog)


def test_a_worker_that_vanishes_gets_nothing_more(ledger: Ledger, backlog: Backlog) -> None:
    ledger.enqueue([make_entry(f"j{n}") for n in range(3)], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info("a"), info("b")])
    backlog.meet([info("b")])
    assert {worker for worker, _, _ in carry_out(ledger, backlog)} == {"b"}


def test_a_worker_that_leaves_a_batch_lying_gets_nothing_new_until_it_is_heard_of(
    ledger: Ledger, backlog: Backlog, store: redis.Redis
) -> None:
    ledger.enqueue([make_entry("j")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info("a", seen_ms=1)])
    assert carry_out(ledger, backlog) == [("a", "base", 1)]
    store.hincrby(f"ly:{{main}}:batch:b{backlog.now}-0", "c", -UNTAKEN_MS - 500)
    ledger.enqueue([make_entry("k", digest="e"), make_entry("l", digest="f")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info("a", seen_ms=1), info("b", seen_ms=backlog.now)])
    assert {worker for worker, _, _ in carry_out(ledger, backlog)} == {"b"}, "b does all of it"
    backlog.meet([info("a", seen_ms=backlog.now + 1), info("b", seen_ms=backlog.now)])
    assert "a" in backlog.roster.workers


def test_a_worker_that_was_heard_of_since_has_missed_a_word_at_most(ledger: Ledger, backlog: Backlog, store: redis.Redis) -> None:
    ledger.enqueue([make_entry("j")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info("a", seen_ms=1), info("b", seen_ms=1)])
    assert carry_out(ledger, backlog) == [("a", "base", 1)]
    store.hincrby(f"ly:{{main}}:batch:b{backlog.now}-0", "c", -UNTAKEN_MS - 500)
    backlog.meet([info("a", seen_ms=backlog.now), info("b", seen_ms=1)])
    hear(ledger, backlog)
    assert backlog.forsaken == []
    assert "a" in backlog.roster.workers


def test_what_a_silent_worker_has_not_begun_is_for_others_where_there_are_any(ledger: Ledger, backlog: Backlog, store: redis.Redis) -> None:
    ledger.enqueue([make_entry("j"), make_entry("k")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info("a", seen_ms=1)])
    assert carry_out(ledger, backlog) == [("a", "base", 2)]
    batch = f"b{backlog.now}-0"
    hear(ledger, backlog)
    assert backlog.waits, "it may never be taken"
    store.hincrby(f"ly:{{main}}:batch:{batch}", "c", -UNTAKEN_MS - 500)
    hear(ledger, backlog)
    assert backlog.forsaken == [], "nobody else is there"
    backlog.meet([info("a", seen_ms=1), info("b", seen_ms=backlog.now)])
    assert backlog.forsaken == [batch]
    assert ledger.recall(epoch=ledger.lead("test", 60_000), batch=batch) == 2
    hear(ledger, backlog)
    assert backlog.forsaken == []
    assert carry_out(ledger, backlog) == [("b", "base", 2)]
    assert ledger.take(batch, "a", "i", 60_000) is None, "late, it finds nothing"
    assert audit(ledger) == []


def test_what_was_claimed_for_a_worker_that_had_just_vanished_is_for_others(ledger: Ledger, backlog: Backlog) -> None:
    """In the same turn, so that the batch had not been read yet when the worker was missed."""
    ledger.enqueue([make_entry("j")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info("a"), info("b")])
    assert carry_out(ledger, backlog) == [("a", "base", 1)]
    batch = f"b{backlog.now}-0"
    backlog.meet([info("b")])
    hear(ledger, backlog)
    assert backlog.forsaken == [batch]
    assert ledger.recall(epoch=ledger.lead("test", 60_000), batch=batch) == 1
    hear(ledger, backlog)
    assert backlog.forsaken == []
    assert carry_out(ledger, backlog) == [("b", "base", 1)]


def test_a_worker_that_hears_no_word_has_two_heartbeats_to_ask_before_it_is_doubted_again(
    ledger: Ledger, backlog: Backlog, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "UNTAKEN_MS", 20)
    epoch = ledger.lead("test", 60_000)

    def heartbeat() -> None:
        seconds, micros = store.time()
        now = int(seconds) * 1000 + int(micros) // 1000
        backlog.meet([info("a", seen_ms=now), info("b", seen_ms=now)])

    def left_lying(name: str) -> list[str]:
        """A batch that a worker does not take; which of its batches are to be taken back."""
        time.sleep(0.005)  # the heartbeat is over
        ledger.enqueue([make_entry(name)], max_queued=99)
        claim = {"digest": "base", "delivery_ms": 60_000, "why": "", "takes": [("acme", 1)]}
        assert ledger.claim(epoch=epoch, worker="a", most=9, batch=name, **claim) == ("ok", 1)  # type: ignore[arg-type]
        time.sleep(0.05)
        hear(ledger, backlog)
        return backlog.forsaken

    heartbeat()
    assert left_lying("first") == ["first"]
    assert ledger.recall(epoch=epoch, batch="first") == 1
    for name in ("second", "third"):
        heartbeat()
        assert left_lying(name) == []
        assert "a" in backlog.roster.workers
    heartbeat()
    assert left_lying("fourth") == ["second", "third", "fourth"], "it had its time"


def test_what_a_worker_had_begun_when_it_vanished_is_left_to_its_lease(ledger: Ledger, backlog: Backlog) -> None:
    ledger.enqueue([make_entry("j"), make_entry("k")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info("a")])
    carry_out(ledger, backlog)
    batch = f"b{backlog.now}-0"
    taken = ledger.take(batch, "a", "i", 60_000)
    assert taken is not None
    ledger.start(batch, taken.fence, ["acme/j"])
    backlog.meet([info("a"), info("b")])
    hear(ledger, backlog)
    assert backlog.forsaken == []
    backlog.meet([info("b")])
    assert backlog.forsaken == [batch]
    assert ledger.recall(epoch=ledger.lead("test", 60_000), batch=batch) == 1
    hear(ledger, backlog)
    assert backlog.forsaken == []
    assert carry_out(ledger, backlog) == [("b", "base", 1)]
    assert [document["status"] for document in ledger.show("acme", ["j", "k"]) if document] == ["running", "claimed"]


def test_a_newcomer_has_no_claim_on_the_past_and_the_ledger_keeps_that(ledger: Ledger, backlog: Backlog, store: redis.Redis) -> None:
    store.hset("ly:{main}:served", mapping={"acme": 5_000, "zeta": 100})
    ledger.enqueue([make_entry("j")], max_queued=99)
    hear(ledger, backlog)
    ledger.enqueue([make_entry("k", tenant="zeta")], max_queued=99)
    hear(ledger, backlog)
    assert backlog.groups.served("zeta") == backlog.groups.served("acme") == 5_000
    assert store.hget("ly:{main}:served", "zeta") == b"5000"


def test_who_has_all_its_jobs_at_workers_is_no_newcomer() -> None:
    groups = Groups()
    for tenant, served in (("acme", 5_000.0), ("zeta", 100.0)):
        groups.level(tenant, served)
        groups.put("a", tenant, 1, 0.0, 0.0)
    assert groups.settle([]) == {}
    for flying, raised in ((["zeta"], {}), ([], {"zeta": 5_000.0})):
        groups.put("a", "zeta", 0, 0.0, 0.0)
        assert groups.settle(flying) == {}
        groups.put("a", "zeta", 1, 0.0, 0.0)
        assert groups.settle(flying) == raised


def test_what_has_ended_of_a_batch_is_not_counted_twice(ledger: Ledger, backlog: Backlog, store: redis.Redis) -> None:
    """As served, and as still in flight."""
    ledger.enqueue([make_entry(f"j{n}") for n in range(4)], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info()])
    carry_out(ledger, backlog)
    batch, tokens = f"b{backlog.now}-0", backlog.groups.scale.work.tokens
    hear(ledger, backlog)
    assert backlog.groups.served("acme") == pytest.approx(4 * tokens, abs=1)
    taken = ledger.take(batch, "w", "i", 60_000)
    assert taken is not None
    ledger.finish(batch, taken.fence, [End(f"acme/j{n}", "succeeded", tokens=10) for n in range(3)])
    hear(ledger, backlog)
    assert backlog.groups.served("acme") == pytest.approx(30 + tokens, abs=1)


def test_when_a_flood_begins_everyone_begins_level(ledger: Ledger, backlog: Backlog, store: redis.Redis) -> None:
    ledger.enqueue([make_entry("j"), make_entry("k", tenant="zeta")], max_queued=9_999)
    hear(ledger, backlog)
    backlog.meet([info()])
    store.hset("ly:{main}:served", mapping={"acme": 70_000, "zeta": 10})
    hear(ledger, backlog)
    assert backlog.groups.served("zeta") == 10, "nobody takes what another wants"
    ledger.enqueue([make_entry(f"f{n}") for n in range(500)], max_queued=9_999)
    hear(ledger, backlog)
    assert list(backlog.groups.floods) == ["acme"]
    assert backlog.groups.served("zeta") == 70_000
    assert store.hget("ly:{main}:served", "zeta") == b"70000"


def test_a_flood_begins_level_also_with_who_is_away_or_has_all_its_jobs_at_workers(
    ledger: Ledger, backlog: Backlog, store: redis.Redis
) -> None:
    """Else a flood of somebody new would be served all that these have ever been served, before they are served anything again."""
    ledger.enqueue([make_entry("flying", tenant="zeta")], max_queued=9_999)
    hear(ledger, backlog)
    backlog.meet([info()])
    carry_out(ledger, backlog)
    store.hset("ly:{main}:served", mapping={"away": 900_000, "zeta": 70_000})
    hear(ledger, backlog)
    ledger.enqueue([make_entry(f"f{n}") for n in range(500)], max_queued=9_999)
    hear(ledger, backlog)
    assert list(backlog.groups.floods) == ["acme"]
    ledger.enqueue([make_entry("back", tenant="away"), make_entry("more", tenant="zeta")], max_queued=9_999)
    hear(ledger, backlog)
    limit = backlog.groups.limit(20_000)
    assert {group.tenant.name for group in backlog.groups.by_rank(False, limit)} == {"away", "zeta"}


def test_what_hosted_workers_compute_is_counted_apart(ledger: Ledger, backlog: Backlog, store: redis.Redis) -> None:
    """A tenant that has much computed there keeps its share at home, and the other way round."""
    ledger.enqueue([make_entry("auto", digest="base@auto"), make_entry("there", digest="base@groq"), make_entry("home")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info(), info("g", kind="hosted")])
    assert list(backlog.roster.workers) == ["w"]
    epoch, tokens = ledger.lead("test", 60_000), round(backlog.groups.scale.work.tokens)
    for worker, digest in (("g", "base@auto"), ("g", "base@groq"), ("w", "base")):
        claim = {"digest": digest, "delivery_ms": 60_000, "why": "", "takes": [("acme", 1)]}
        assert ledger.claim(epoch=epoch, worker=worker, most=9, batch=f"b-{digest}", **claim) == ("ok", 1)  # type: ignore[arg-type]
    hear(ledger, backlog)
    assert (backlog.groups.served("acme"), backlog.served_there) == (tokens, {"acme": 2 * tokens}), "in flight"
    for worker, batch, name, charged in (("g", "b-base@auto", "auto", 700), ("g", "b-base@groq", "there", 80), ("w", "b-base", "home", 9)):
        taken = ledger.take(batch, worker, "i", 60_000)
        assert taken is not None
        ledger.finish(batch, taken.fence, [End(f"acme/{name}", "succeeded", tokens=charged, hosted=worker == "g")])
    hear(ledger, backlog)
    assert (backlog.groups.served("acme"), backlog.served_there) == (9, {"acme": 780})
    assert store.hgetall("ly:{main}:served") == {b"acme": b"9", b"acme@hosted": b"780"}


def test_who_begins_to_wait_for_hosted_workers_has_no_claim_on_the_past(ledger: Ledger, backlog: Backlog, store: redis.Redis) -> None:
    planning = HostedPlanning(Settings(hosted_model="llama-3.1-8b-instant"), ledger)
    store.hset("ly:{main}:served", mapping={"acme": 5, "acme@hosted": 900_000, "zeta": 8_000_000})

    def planned(room: int) -> list[tuple[str, ...]]:
        hear(ledger, backlog)
        there = info("g", kind="hosted", room=room, loaded=["base"])
        backlog.meet([there])
        return [tuple(tenant for tenant, _ in dispatch.takes) for dispatch in planning.plan(backlog, [there])]

    ledger.enqueue([make_entry("first", digest="base@groq")], max_queued=99)
    assert planned(room=0) == []
    ledger.enqueue([make_entry(f"z{n}", tenant="zeta", digest="base@groq", wait_ms=500_000) for n in range(50)], max_queued=99)
    assert planned(room=8) == [("acme",), ("zeta",)], "it would have had 900,000 tokens before the other's job"
    assert store.hget("ly:{main}:served", "zeta@hosted") == b"900000"
    assert backlog.served_there["zeta"] == 900_000


def test_lanes_are_seen_by_those_who_may_claim_them(ledger: Ledger, backlog: Backlog) -> None:
    ledger.enqueue([make_entry(lane, digest=f"d{lane}") for lane in ("", "@auto", "@groq", "@batch")], max_queued=99)
    hear(ledger, backlog)
    assert sorted(digest for digest, _ in seen(backlog)) == ["d", "d@auto"]
    assert sorted(g.digest for g in backlog.waiting()) == ["d", "d@auto", "d@batch", "d@groq"]
    backlog.meet([info(hot=["d"])])
    assert backlog.roster.workers["w"].temperature("d@auto") == "hot"


def test_an_auto_job_joins_a_worker_that_has_its_adapter_before_others_that_have_time(ledger: Ledger, backlog: Backlog) -> None:
    low = [make_entry(f"low{n}", wait_ms=3_600_000) for n in range(14)]
    ledger.enqueue([*low, make_entry("other", digest="e")], max_queued=99)
    hear(ledger, backlog)
    backlog.meet([info()])
    assert sorted(carry_out(ledger, backlog)) == [("w", "base", 14), ("w", "e", 1)]
    ledger.enqueue([make_entry(f"more{n}", wait_ms=3_600_000) for n in range(5)], max_queued=99)
    ledger.enqueue([make_entry("auto", digest="base@auto"), make_entry("third", digest="f", wait_ms=60_000)], max_queued=99)
    hear(ledger, backlog)
    assert backlog.roster.hands["w"] == {"base", "e"}
    assert carry_out(ledger, backlog) == [("w", "base@auto", 1)]
    hear(ledger, backlog)
    assert backlog.roster.hands["w"] == {"base", "e"}, "it took no hand"
    held = sorted((held.digest, held.jobs) for held in backlog.roster.workers["w"].held)
    assert held == [("base", 1), ("base", 14), ("e", 1)]


def test_costs_are_taken_over_when_they_have_changed_enough(backlog: Backlog) -> None:
    report = {"switch_ms": {"loaded": 10.0}, "prefill_tokens_per_s": 1000.0, "step_ms": {"1": 10.0, "8": 20.0}}
    backlog.meet([info(costs=report)])
    first = backlog.roster.workers["w"].costs
    assert first.measured
    assert backlog.groups.scale.costs is first
    backlog.meet([info(costs=report | {"prefill_tokens_per_s": 1020.0})])
    assert backlog.roster.workers["w"].costs is first
    backlog.meet([info(costs=report | {"prefill_tokens_per_s": 2000.0})])
    assert backlog.roster.workers["w"].costs.prefill_ms(2000) == 1000


@pytest.mark.parametrize(("cached", "least"), [(0, 1), (8_500, 12)], ids=["each its own", "mostly shared"])
def test_what_prompts_share_is_not_work_of_every_job(ledger: Ledger, backlog: Backlog, cached: int, least: int) -> None:
    costs = {"switch_ms": {}, "prefill_tokens_per_s": 250.0, "step_ms": {"1": 15.0, "8": 40.0}}
    counters = {"finished": 10.0, "prompt_tokens": 9_000.0, "cached_tokens": float(cached), "generated_tokens": 300.0}
    backlog.meet([info(costs=costs, counters=counters)])
    assert backlog.groups.scale.work.shared == cached / 10
    ledger.enqueue([make_entry(f"j{n}") for n in range(16)], max_queued=99)
    hear(ledger, backlog)
    jobs = sum(jobs for _, _, jobs in carry_out(ledger, backlog))
    assert jobs >= least
    assert (jobs < 12) == (not cached)
