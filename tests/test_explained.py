"""What jobs waited for, once that is over, and what hosted ones wait for: in words, and in their quotes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from api_support import job
from yard_support import HOSTED, Yard, eventually, quoted, yard_of

from lorayard.hosted import organisation
from lorayard.ledger.explained import pause, waited
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.records import End
from lorayard_scheduler.forecasts import Forecaster, Seen
from lorayard_scheduler.groups import Groups
from lorayard_scheduler.planner import Policy as Planning
from lorayard_scheduler.planner import View
from lorayard_scheduler.quotes import Hosted, Situation
from lorayard_scheduler.reasons import Pauses
from lorayard_scheduler.roster import Roster

# -- pauses ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "words"), [("pool", "the pool"), ("group:base:acme", "its adapter for its tenant")])
def test_a_job_that_waited_through_a_pause_says_so_when_it_is_over(yard: Yard, what: str, words: str) -> None:
    yard.hire("w")
    yard.drain(quoted(yard)["id"])
    yard.ledger.pause(what)
    (one,) = yard.enqueue(1, "base")
    yard.until(one, f"pause of {words} (")
    time.sleep(1.5)
    yard.ledger.resume(what)
    found = yard.until(one, "since then it waits")["explanation"]
    assert f"s of it for a pause of {words} (chosen: " in found
    yard.run()
    (other,) = yard.enqueue(1, "base")
    assert "pause" not in yard.until(other, "since then it waits")["explanation"]


def test_a_job_says_its_own_part_of_a_pause() -> None:
    document: dict[str, Any] = {"why": f"{pause('the pool', 10_000, 16_000)}, behind 3.0 s of work that is due sooner: its turn"}
    document |= {"status": "running", "attempts": 1, "worker": "w"}

    def told(enqueued: float, claimed: float) -> str:
        return waited(document | {"enqueued_ms": enqueued, "latencies_ms": {"queued": claimed - enqueued}})

    assert told(12_000, 17_000).startswith("Waited 5.00 s in its queue, 4.00 s of it for a pause of the pool, behind 3.0 s of work")
    assert told(5_000, 17_000).startswith("Waited 12 s in its queue, 6.00 s of it for a pause of the pool, behind")
    assert told(16_500, 17_000).startswith("Waited 0.50 s in its queue, behind 3.0 s of work that is due sooner (chosen: its turn)")


def test_pauses_are_remembered_for_a_while_and_not_without_end() -> None:
    pauses = Pauses()
    pauses.see(["adapter:a"], 1_000)
    pauses.see([], 5_000)
    assert pauses.held_up("a@auto", "t", 6_000) == pause("its adapter", 1_000, 5_000)
    assert pauses.held_up("b", "t", 6_000) == ""
    pauses.see(["pool"], 7_000)
    assert pauses.held_up("a", "t", 8_000) == pause("its adapter", 1_000, 5_000), "the longest"
    assert pauses.held_up("a", "t", 20_000) == pause("the pool", 7_000, 20_000), "one that has just ended was not seen to"
    pauses.see([], 20_000)
    assert pauses.held_up("a", "t", 20_000 + 3_600_001) == ""
    for n in range(3_000):
        pauses.see([f"adapter:{n}"], 30_000 + n)
    assert len(pauses._over) <= 1_000


def test_a_job_that_expired_says_what_it_waited_for(yard: Yard) -> None:
    yard.enqueue(3, "a", wait_ms=100)
    (behind,) = yard.enqueue(1, "a", deadline_ms=300)
    (first,) = yard.enqueue(1, "b", deadline_ms=300)
    yard.until(behind, "Its deadline passed while it waited, ", " s after it came, behind 3 jobs of its own adapter and tenant.")
    yard.until(first, "; it was the first of its adapter and tenant, and no worker took it before.")
    yard.ledger.pause("adapter:base")
    (paused,) = yard.enqueue(1, "base", deadline_ms=300)
    (later,) = yard.enqueue(1, "base", deadline_ms=300, not_before_ms=60_000)
    yard.until(paused, "Its deadline passed while it waited, ", " s after it came, for a pause of its adapter.")
    yard.until(later, "Its deadline passed while it waited, ", " s after it came, until a later time.")


# -- hosted ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosted(store: redis.Redis, redis_url: str, tmp_path: Path) -> Iterator[Yard]:
    with yard_of(redis_url, tmp_path, hosted_model=HOSTED, hosted_prices={HOSTED: (1.0, 1.0)}) as found:
        Policies(found.ledger.client).set("acme", Policy(hosted=True))
        yield found


def test_what_hosted_workers_have_is_quoted_by_their_speed_and_not_by_that_of_local_ones() -> None:
    forecaster = Forecaster()
    for _ in range(30):
        forecaster.saw(Seen(Situation("hosted", 1_000.0), "base@auto", 250.0, 200.0, (900.0, 1_500.0), hosted=True))
        forecaster.saw(Seen(Situation("free", 8_000.0), "base", 9_000.0, 8_000.0, (8_000.0, 9_000.0)))
    forecast = forecaster.make(View(Groups(), Roster()), 0.0, Planning(), ended=0, there=Hosted(workers=["g"]))
    there, here = (forecast.quote(forecast.working("base@auto", name)) for name in ("g", "w"))
    assert there.p80 < 500
    assert here.median > 5_000
    assert forecast.place("base@groq", "t", 1e4, now=0.0).predicted < 1_000


def test_a_block_is_in_quotes_and_in_what_is_said_of_jobs_that_are_at_a_worker_already(hosted: Yard) -> None:
    hosted.host(room=100)
    assert "id" in quoted(hosted, route="groq", deadline_s=20, max_risk=0.3)
    row = quoted(hosted, route="groq", deadline_s=600)
    organisation(hosted.api.settings, hosted.ledger.client).block(HOSTED, 60_000, "302")
    hosted.until(row["id"], "since then it waits at g for the hosted service, which is asked for nothing for ", "(302)")
    left = eventually(lambda: left if (left := hosted.left(row["id"]))["median"] > 50_000 else None)
    assert left["median"] < left["p80"]
    assert left["risk"] < 0.1
    refused = eventually(lambda: hosted.api.post(job(route="groq", deadline_s=20, max_risk=0.3))[0].get("error"))
    assert refused["code"] == "deadline_unmet"
    assert refused["eta"]["risk"] > 0.9


def test_trouble_of_calls_is_said(hosted: Yard) -> None:
    hosted.host(counters={"breaker_open": 1.0}, room=0)
    (one,) = hosted.enqueue(1, "base@groq")
    hosted.until(one, "Waits for the hosted service: most of the last calls failed")
    hosted.host(counters={"limits_unanswered": 1.0}, room=0)
    hosted.until(one, "Waits for an answer about limits and money")
    hosted.host(doubted=["base"], room=0)
    hosted.until(one, "Waits for the hosted service, where calls of its adapter fail")


def test_an_auto_job_that_only_hosted_workers_can_take_is_told_as_one(hosted: Yard) -> None:
    hosted.host(room=0)
    (one,) = hosted.enqueue(1, "base@auto")
    hosted.until(one, "Waits for a hosted worker to have room.")
    assert hosted.show(one)["eta"]["p80_ms"] > 0
    assert eventually(lambda: "eta" in hosted.api.post(job(route="auto"))[0])


def test_who_has_no_money_left_is_quoted_no_time_and_told_why(hosted: Yard) -> None:
    hosted.host()
    (one,) = hosted.enqueue(1, "base@groq")
    (batch,) = eventually(lambda: hosted.ledger.outstanding("g"))
    taken = hosted.ledger.take(batch, "g", "i", 60_000)
    assert taken is not None
    hosted.ledger.finish(batch, taken.fence, [End(f"acme/{one}", "later", delay_ms=60_000)])
    assert hosted.until(one, "Waits to be tried again")["eta"] is not None
    Policies(hosted.ledger.client).set("acme", Policy(hosted=True, monthly_usd=0.0))
    found = hosted.until(one, "it also waits for money: this month's for hosted calls is spent")
    assert found["eta"] is None


# -- what came before --------------------------------------------------------------------------------------------------------------------


def test_what_put_a_job_off_and_what_made_it_fail_is_in_its_sentence() -> None:
    document: dict[str, Any] = {"why": "hosted: its route", "status": "succeeded", "attempts": 1, "worker": "g", "enqueued_ms": 0}
    document |= {"latencies_ms": {"queued": 1_500.0, "network": 100.0}, "error": None, "postponed": 2}
    document["postponed_why"] = {"code": "over_capacity", "message": "the service is over capacity."}
    told = waited(document)
    assert told.startswith("Waited 1.50 s in its queue (chosen: hosted: its route); computing took 0.10 s.")
    assert told.endswith(" Before that it had been put off 2 times, the last time because: the service is over capacity.")
    assert waited(document | {"postponed": None, "postponed_why": None}).endswith("took 0.10 s.")
    failed = {"status": "failed", "error": {"code": "hosted_rejected", "message": "messages: too long"}, "postponed": None}
    assert waited(document | failed).endswith("; failed (hosted_rejected): messages: too long.")
    failed["error"] = {"message": "messages: too long"}
    assert waited(document | failed).endswith("; failed: messages: too long.")
