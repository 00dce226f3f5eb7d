"""Quotes: what they are made from, that they come true, and how they look to whoever submits and polls. What jobs wait for, in words."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from api_support import job
from benchmarks import eta
from simulation_support import COSTS, trace
from yard_support import SLOW, Yard, eventually, quoted, yard_of

from lorayard.client import Client
from lorayard.hosted import organisation
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.records import End
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry
from lorayard_scheduler import traces
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.forecasts import Forecaster, Seen
from lorayard_scheduler.groups import Groups, Scale
from lorayard_scheduler.planner import Dispatch, View
from lorayard_scheduler.planner import Policy as Planning
from lorayard_scheduler.quotes import Forecast, Since, Situation
from lorayard_scheduler.quoting import Quoting
from lorayard_scheduler.reasons import held_up
from lorayard_scheduler.roster import Held, Roster, WorkerView
from lorayard_scheduler.simulator import Fleet, WorkerSpec

# -- coming true -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_four_of_five_simulated_jobs_end_by_their_80th_percentile_and_it_is_not_padded(load: float) -> None:
    rate = load * 3 * 1000 / (60 + 20 * 4.0)  # of three workers at full width
    mix = traces.Mix(adapters=12, tenants=3, targets_ms=((0.2, 10_000.0), (0.8, 60_000.0)))
    jobs = traces.build(traces.poisson(9_000, rate), [(60, 20), (20, 5), (100, 35)], mix)
    ours = eta.Quoted()
    outcome = Fleet(jobs, [WorkerSpec(COSTS)] * 3, ours).run()
    judged = eta.judge(eta.rows(ours, outcome, jobs.arrivals[-1] / 4))
    assert 0.75 <= judged["eta_coverage"] <= 0.85
    assert 0.45 <= judged["eta_median_coverage"] <= 0.6
    assert judged["eta_sharpness"] <= 1.25


class Placed(eta.Quoted):
    """Remembers what was predicted of each job of the first tenant as it came."""

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.placed: dict[int, Situation] = {}

    def arrived(self, job: int) -> None:
        super().arrived(job)
        if self.fleet.trace.tenants[job] == 0:
            since = Since(*[self._by_tenant["t0"]] * 3)
            self.placed[job] = self.forecast.place("a0", "t0", 60_000.0, now=self.fleet.now, since=since)


def test_what_whoever_floods_is_served_before_a_tenants_share_is_in_its_quotes() -> None:
    jobs = trace([(0.0, 1, 50, 20, 1, 3.6e6)] * 2_000 + [(60_000.0 + 10 * n, 0, 50, 20, 0) for n in range(400)])
    ours = Placed(Planning(slack_tokens=2_000))
    outcome = Fleet(jobs, [WorkerSpec(COSTS)], ours).run()
    for number, place in list(ours.placed.items())[200:]:
        assert place.kind == "share"
        assert place.predicted == pytest.approx(outcome.ended[number] - jobs.arrivals[number], rel=0.15)


def beside_a_flood(served: dict[str, float], jobs: dict[str, int], adapter: str = "a") -> Groups:
    """Tenants of 70 tokens a job that have jobs and were served as much; `flood` floods."""
    groups = Groups(Scale(costs=COSTS, work=Work(50, 0, 20)))
    for tenant, tokens in served.items():
        groups.level(tenant, tokens)
    for tenant, many in {"flood": 9_000, **jobs}.items():
        groups.put(adapter if tenant != "flood" else "f", tenant, many, 1e6 + 60_000, 1e6)
    return groups


def test_who_was_served_more_than_a_flood_waits_for_its_share_and_keeps_nobody_else_waiting() -> None:
    now, full = 1e6, (Held("b1", "x", 4), Held("b2", "y", 4))

    def told(served: float, **jobs: int) -> tuple[Forecaster, Groups, Forecast]:
        groups, forecaster = beside_a_flood({"t": served, "flood": 1_000, "gone": 2_400}, jobs), Forecaster()
        view = View(groups, Roster([WorkerView("w", COSTS, full)]))
        return forecaster, groups, forecaster.make(view, now, Planning(slack_tokens=7_000), ended=0)

    def place(of: Forecast, tenant: str = "t", **more: Any) -> Situation:
        return of.place("a", tenant, 60_000.0, now=now, **more)

    _, _, level = told(1_000, t=5)
    assert place(level).kind == "turn"
    assert place(level, since=Since(5, 5, 5)).kind == "turn", "it may have 100 jobs more than the flood"
    ahead = [place(told(8_000 + 70 * n, t=5)[2]) for n in (0, 100, 500)]
    assert [(at.kind, at.before) for at in ahead] == [("share", 5 + 5 + n) for n in (0, 100, 500)], "its own, and as many of the flood"
    forecaster, groups, over = told(15_000, t=5, other=1)
    assert place(over, before=0).before == pytest.approx(100), "its first job as well"
    assert place(over, "other").kind == "turn"
    assert place(over, "other").before <= 1, "what is held back does not go before it"
    assert over.served == {"t": pytest.approx(200), "gone": pytest.approx(20)}, "also of those that will come back"
    words = "for its tenant's share, for beside those who flood nobody is served much more than they, and "
    assert held_up(place(over), over).startswith(words)
    assert forecaster.dispatched(groups, Dispatch("w", "a", (("t", 1),), ""), now + 9_000, in_hand=False).startswith(words)
    assert forecaster.make(View(groups, Roster()), now + 9_000, Planning(), ended=0).turns == {}, "nobody else waits as long for a hand"


def test_what_is_nearly_due_to_planner_and_forecast_is_one_rule() -> None:
    now, policy = 1e6, Planning(slack_tokens=7_000)

    def left(floods_due: float, due: float | None, served: float = 0.0) -> tuple[float, float, bool]:
        """In seconds."""
        groups = Groups(Scale(costs=COSTS, work=Work(50, 0, 20)))
        groups.level("t", served)
        groups.put("f", "flood", 9_000, now + floods_due, now)
        if due is not None:
            groups.put("a", "t", 9_000 // 30, now + due, now)
        view = View(groups, Roster([WorkerView("w", COSTS)]))
        calm = Forecaster().make(view, now, policy, ended=0).calm
        planner, others = (round(view.left_ms(now, policy, floods=floods) / 1000, 0) for floods in (True, False))
        return planner, others, calm

    assert left(-5_000, None) == (-5, math.inf, True), "whoever comes is before it"
    assert left(-5_000, 80_000) == (80, 80, True), "now it is behind somebody"
    assert left(200_000, 1_000) == (1, 1, False)
    assert left(200_000, 1_000, served=7_001) == (200, math.inf, True), "held back, it keeps nobody waiting"


def test_a_flood_that_was_served_more_than_another_comes_after_it_in_its_quotes() -> None:
    found = {}
    for served in (0, 70_000, 700_000):
        groups = beside_a_flood({"t": served}, {"t": 10_000})
        forecast = Forecaster().make(View(groups, Roster([WorkerView("w", COSTS)])), 1e6, Planning(), ended=0)
        place = forecast.place("a", "t", 60_000.0, now=1e6)
        found[served] = place.kind, round(place.before)
    assert found == {0: ("flood", 10_000 + 9_000), 70_000: ("share", 10_000 + 9_000), 700_000: ("share", 10_000 + 9_000)}
    less = beside_a_flood({"flood": 350_000}, {"t": 10_000})
    forecast = Forecaster().make(View(less, Roster([WorkerView("w", COSTS)])), 1e6, Planning(), ended=0)
    assert forecast.place("a", "t", 60_000.0, now=1e6).before == pytest.approx(10_000 + 5_000), "it catches up first"


def test_what_was_learnt_is_bounded_and_goes_on_with_the_next_scheduler() -> None:
    forecaster = Forecaster()
    for n in range(3_000):
        place = Situation("turn", 100.0, n % 20, n % 30)
        forecaster.saw(Seen(place, f"a{n}", 200.0, 50.0, (200.0, 300.0)))
    known = forecaster.make(View(Groups(), Roster()), 5.0, Planning(), ended=0)
    assert max(len(known.counts), len(known.services)) <= 512
    again = Forecaster.going_on(known).make(View(Groups(), Roster()), 6.0, Planning(), ended=0)
    assert again.quote(Situation("turn", 100.0)) == known.quote(Situation("turn", 100.0))
    assert known.quote(Situation("turn", 100.0)).median == pytest.approx(200, rel=0.15), "such jobs take twice what is predicted"


def test_risk_grows_as_the_deadline_comes_nearer_and_what_runs_has_its_time_behind_it() -> None:
    forecast = Forecast(0.0)
    place = Situation("worker", 1_000.0)
    risks = [forecast.quote(place, deadline).risk or 0.0 for deadline in (10, 500, 1_000, 2_000, 60_000)]
    assert risks == sorted(risks, reverse=True)
    assert risks[0] > 0.99
    assert risks[-1] < 0.01
    assert forecast.quote(place).risk is None
    later = forecast.quote(place, elapsed=900.0)
    assert later.median < forecast.quote(place).median
    assert later.median + 900 > forecast.quote(place).median


def test_the_situation_of_a_job_follows_from_what_is_in_hand_and_what_waits() -> None:
    held, full_up = (Held("b1", "a", 1), Held("b2", "b", 2)), (Held("b1", "a", 4), Held("b2", "b", 4))
    policy, now = Planning(), 1_000_000.0

    def forecast(waiting: dict[str, tuple[int, float]], *held: Held) -> Forecast:
        groups = Groups(Scale(costs=COSTS, workers=1))
        for digest, (jobs, due_in) in waiting.items():
            groups.put(digest, "t", jobs, round(now + due_in), now)
        return Forecaster().make(View(groups, Roster([WorkerView("w", COSTS, held)])), now, policy, ended=0)

    def kind(of: Forecast, digest: str, **more: Any) -> str:
        return of.place(digest, "t", 120_000.0, now=now, **more).kind

    empty, busy, queued = forecast({}), forecast({}, *held), forecast({"b": (20, 100_000.0), "c": (3, 100_000.0)}, *full_up)
    assert kind(empty, "a") == "free"
    assert kind(busy, "a") == "joins"
    assert kind(busy, "a", since=Since(group=9)) == kind(queued, "a") == kind(queued, "b") == "own"
    assert kind(busy, "c") == kind(queued, "c") == kind(queued, "d") == "turn"
    assert kind(empty, "a", since=Since(pool=50)) == "turn", "those that came a moment ago have taken the room"
    assert kind(forecast({"c": (1, 1_000.0)}, *held), "a") == "behind", "something is nearly due: nothing joins that is due later"
    assert kind(forecast({"c": (1, 1_000.0)}, *held), "d") == "late"
    assert kind(empty, "a@groq") == "hosted"
    assert kind(empty, "a", since=Since(tenant=100_000)) == "flood"
    ahead = [queued.place("b", "t", 120_000.0, now=now, since=Since(group=n)).predicted for n in (0, 10, 100)]
    assert ahead == sorted(set(ahead)), "whoever is farther behind waits longer"


def test_a_pool_of_unlike_workers_is_quoted_by_what_they_do_and_floods_where_the_planner_says_so() -> None:
    slow = Costs(4, COSTS.switch_ms, 100.0, {1: 100.0, 4: 160.0}, measured=True)
    scale = Scale.of(4_000.0, 120_000.0, [COSTS, slow, slow, slow], Work())
    groups, roster = Groups(scale), Roster([WorkerView("w", COSTS), *(WorkerView(f"s{n}", slow) for n in range(3))])
    forecast = Forecaster().make(View(groups, roster), 0.0, Planning(), ended=0)
    assert forecast.flood_jobs == pytest.approx(120_000 * 1.3 / COSTS.job_ms(Work()), rel=0.01), "three that take ten times as long"
    for jobs, floods in ((math.floor(forecast.flood_jobs), False), (math.ceil(forecast.flood_jobs) + 1, True)):
        groups.put("a", "t", jobs, 0.0, 0.0)
        assert groups.tenants["t"].floods == floods


def test_what_a_group_waits_for_is_what_its_first_job_does() -> None:
    """Which is not itself, nor those behind it."""
    now, scale = 1_000_000.0, Scale(costs=COSTS, workers=1)

    def told(jobs: int, due_in: float, *held: Held, others: int = 0) -> str:
        groups, forecaster = Groups(scale), Forecaster()
        groups.put("a", "t", jobs, round(now + due_in), now)
        if others:
            groups.put("z", "t", others, round(now + 500), now)
        forecaster.make(View(groups, Roster([WorkerView("w", COSTS, held)])), now, Planning(), ended=0)
        return forecaster.dispatched(groups, Dispatch("w", "a", (("t", 1),), ""), now + 2_000, in_hand=True)

    own, busy = Held("b1", "a", 4), (Held("b1", "b", 4), Held("b2", "c", 4))
    for jobs in (1, 300):
        assert told(jobs, 100_000.0, own) == told(jobs, 1_000.0, own) == "for room beside what runs of its adapter"
        for due_in in (1_000.0, 100_000.0):
            assert told(jobs, due_in, *busy) == "for a switch until a worker has a hand free for another adapter"
    assert told(300, 1_000.0, own, others=40).startswith("behind ")
    assert " s of work that is due sooner" in told(300, 1_000.0, *busy, others=40)


@pytest.mark.parametrize(("before", "words"), [(0, "for room beside"), (1, "behind 1 job of its own"), (2, "behind 2 jobs of its own")])
def test_one_job_is_no_jobs(before: int, words: str) -> None:
    assert held_up(Situation("own", 100.0, before=before), Forecast(0.0)).startswith(words)


# -- submitting and polling --------------------------------------------------------------------------------------------------------------


def test_jobs_are_quoted_when_they_are_submitted_and_polled_until_they_end(yard: Yard) -> None:
    (row,) = yard.api.post(job())
    assert set(row) == {"id", "status"}, "no worker is there, nobody can tell"
    assert yard.show(row["id"])["eta"] is None
    yard.hire("w")
    quoted(yard)
    began = 1000 * time.time()
    rows = yard.api.post(*[job() for _ in range(60)])
    assert len({tuple(row["eta"].items()) for row in rows}) == 1, "they are due at the same time: nobody knows which of them is first"
    assert rows[0]["eta"]["p80_ms"] - began > 20_000
    assert yard.api.post(job())[0]["eta"]["median_ms"] > rows[0]["eta"]["median_ms"] + 10_000, "those are before it"
    assert all(began < row["eta"]["median_ms"] < row["eta"]["p80_ms"] for row in rows)
    assert {row["eta"]["risk"] for row in rows} == {None}
    waiting = [d for row in rows if (d := yard.show(row["id"]))["status"] == "queued"]
    waiting.sort(key=lambda d: d["position"])  # those that came in one call are in no order
    assert [d["position"] for d in waiting] == list(range(waiting[0]["position"], waiting[-1]["position"] + 1))
    assert waiting[-1]["eta"]["p80_ms"] > waiting[0]["eta"]["p80_ms"] + 10_000
    with Client(yard.api.url, yard.api.keys["acme"], settings=yard.api.settings) as client:
        assert client.submit([job()])[0]["eta"]["p80_ms"] > began
    _, _, refs = eventually(yard.begin)[0]
    running = yard.show(refs[0].partition("/")[2])
    assert running["status"] == "running"
    assert running["eta"]["p80_ms"] > running["claimed_ms"]


def test_workers_hear_which_adapters_are_planned_next(yard: Yard) -> None:
    yard.enqueue(1, "late", wait_ms=300_000)
    yard.enqueue(2, "soon", wait_ms=60_000)
    yard.enqueue(2, "soon", tenant="other", wait_ms=200_000)
    info = WorkerInfo(name="w", pool="main", kind="llama", incarnation="i", host="h", pid=1)
    give_up = time.monotonic() + 10
    while yard.registry.beat(info).digests != ["soon", "late"]:
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_quotes_learn_from_the_jobs_that_end(yard: Yard) -> None:
    yard.hire("w", costs=SLOW | {"prefill_tokens_per_s": 1e6, "step_ms": {"1": 0.01, "2": 0.01}})  # it takes itself for very fast
    first = quoted(yard)
    before = first["eta"]["median_ms"] - 1000 * time.time()
    for _ in range(20):
        quoted(yard)
        eventually(lambda: yard.ledger.outstanding("w"))
        yard.run(ms=200)
    forecast = eventually(lambda: found if (found := Quoting(yard.ledger).forecast()) and sum(found.counts.get("", ())) > 3 else None)
    assert forecast.at_worker > 100
    after = quoted(yard)["eta"]["median_ms"] - 1000 * time.time()
    assert after > before + 50, "by now it is known to take some 200 ms"


def test_a_job_that_would_be_late_is_refused_if_it_says_so_and_the_quote_is_named(yard: Yard) -> None:
    yard.hire("w")
    assert quoted(yard, deadline_s=600, max_risk=0.5)["eta"]["risk"] < 0.1
    yard.enqueue(80, "base")
    refused = eventually(lambda: yard.api.post(job(deadline_s=3, max_risk=0.3))[0].get("error"))
    assert refused["code"] == "deadline_unmet"
    assert refused["param"] == "deadline_s"
    assert refused["eta"]["risk"] > 0.3
    assert "deadline_s is 3" in refused["message"]
    assert f"{refused['eta']['risk']:.2f}" in refused["message"]
    alone = yard.api.call("POST", "/v1/jobs", json=job(deadline_s=3, max_risk=0.3))
    assert (alone.status_code, alone.json()["error"]["code"]) == (422, "deadline_unmet")
    late = quoted(yard, deadline_s=3)
    assert late["status"] == "queued", "without max_risk it is accepted all the same"
    assert late["eta"]["risk"] > 0.3
    with Client(yard.api.url, yard.api.keys["acme"], settings=yard.api.settings) as client:
        (answer,) = client.submit([job(deadline_s=3, max_risk=0.3)])
    assert answer["error"]["code"] == "deadline_unmet"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"max_risk": 0.5}, "max_risk"), ({"deadline_s": 9, "max_risk": 1}, "max_risk"), ({"deadline_s": 9, "max_risk": -0.1}, "max_risk")],
)
def test_a_risk_is_a_probability_of_missing_a_deadline(yard: Yard, fields: dict[str, Any], param: str) -> None:
    error = yard.api.post(job(**fields))[0]["error"]
    assert (error["code"], error["param"]) == ("invalid_request", param)


def test_with_route_auto_a_job_that_would_be_late_leaves_home_at_once(store: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    with yard_of(redis_url, tmp_path, hosted_model="llama-3.1-8b-instant") as yard:
        Policies(yard.ledger.client).set("acme", Policy(hosted=True))
        yard.hire("w")
        quoted(yard)
        yard.enqueue(80, "base")
        eventually(lambda: yard.api.post(job(deadline_s=3))[0]["eta"]["risk"] > 0.5)
        lanes = {}
        choices: dict[str, dict[str, Any]] = {"sure": {"max_risk": 0.1}, "any": {}, "time": {"max_risk": 0.5, "deadline_s": 3_000}}
        for name, fields in choices.items():
            (row,) = yard.api.post(job(**{"route": "auto", "deadline_s": 3, **fields}))
            lanes[name] = yard.show(row["id"])["lane"]
        assert lanes == {"sure": "groq", "any": "auto", "time": "auto"}


# -- in words ----------------------------------------------------------------------------------------------------------------------------


def test_what_keeps_a_job_from_running_is_said_in_a_sentence(yard: Yard) -> None:
    (waiting,) = yard.enqueue(1, "base")
    yard.until(waiting, "Waits for a worker: none of pool 'main'")
    for what, words in (("pool", "the pool"), ("tenant:acme", "its tenant"), ("adapter:base", "its adapter")):
        yard.ledger.pause(what)
        yard.until(waiting, f"Waits for the end of a pause of {words} ('lorayard resume {what}')")
        assert yard.show(waiting)["eta"] is None
        yard.ledger.resume(what)
    (later,) = yard.enqueue(1, "base", not_before_ms=60_000)
    yard.until(later, "Waits for its not_before, ", "s from now")


def test_a_job_that_came_back_says_when_and_why_it_is_tried_again(yard: Yard) -> None:
    yard.hire("w")
    failed, later = yard.enqueue(2, "base")
    eventually(lambda: yard.ledger.outstanding("w"))
    (batch,) = yard.ledger.outstanding("w")
    taken = yard.ledger.take(batch, "w", "i", 60_000)
    assert taken is not None
    yard.ledger.finish(
        batch, taken.fence, [End(f"acme/{failed}", "retry", delay_ms=60_000), End(f"acme/{later}", "later", delay_ms=60_000)]
    )
    yard.until(failed, "Waits for its retry time, ", "after attempt 1 failed")
    yard.until(later, "could not be had (put off 1 times")


def test_who_waits_for_room_or_a_switch_or_what_is_due_sooner_says_so(yard: Yard) -> None:
    yard.hire("w")
    own = yard.enqueue(40, "a")
    yard.until(own[-1], "Waits behind", "jobs of its own adapter and tenant")
    yard.enqueue(30, "b")
    (third,) = yard.enqueue(1, "c", tenant="globex")
    yard.until(third, "Waits for a switch", "until a worker has a hand free", who="globex")
    yard.enqueue(9, "d", wait_ms=10_000)
    yard.until(third, "s of work that is due sooner", who="globex")
    time.sleep(1.5)  # some forecasts
    give_up = time.monotonic() + 20
    while yard.show(third, "globex")["status"] != "succeeded":
        yard.run(ms=50)
        assert time.monotonic() < give_up
    ended = yard.show(third, "globex")["explanation"]
    assert ended.startswith("Waited ")
    assert " s in its queue, " in ended
    assert "chosen: its turn" in ended


def test_who_floods_waits_for_its_share(yard: Yard) -> None:
    yard.hire("w")
    ids = yard.enqueue(1000, "a")
    yard.until(ids[-1], "Waits for its tenant's share, for the tenant has ", " s of work queued")


def test_who_was_served_more_than_a_flood_waits_for_its_share(yard: Yard) -> None:
    yard.hire("w")
    yard.enqueue(1000, "a", tenant="globex")
    yard.enqueue(1, "b")
    eventually(lambda: (found := Quoting(yard.ledger).forecast()) and found.floods)
    yard.ledger.client.hincrby("ly:{main}:served", "acme", 30_000)
    (second,) = yard.enqueue(1, "c")
    found = yard.until(second, "Waits for its tenant's share, for beside those who flood nobody is served much more than they, and ")
    assert found["eta"]["median_ms"] > found["enqueued_ms"] + 10_000, "some 40 jobs of the flood come first, two at a time"


def test_a_job_at_a_worker_and_one_that_ended_say_what_they_waited_for(yard: Yard) -> None:
    yard.hire("w")
    (one,) = yard.enqueue(1, "a")
    yard.until(one, "ait", "(chosen: its turn", "since then it waits at w until what runs there makes room")
    yard.begin()
    yard.until(one, "it runs on w.")
    (gone,) = yard.enqueue(1, "a", deadline_ms=300)
    yard.ledger.pause("pool")
    (late,) = yard.enqueue(1, "a", deadline_ms=300)
    yard.until(late, "Its deadline passed while it waited, ", " s after it came")
    (cancelled,) = yard.enqueue(1, "a")
    yard.ledger.cancel("acme", [cancelled])
    yard.until(cancelled, "It was cancelled while it waited")
    assert gone


def test_hosted_jobs_say_what_of_the_service_they_wait_for(store: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    with yard_of(redis_url, tmp_path, hosted_model="llama-3.1-8b-instant", hosted_rpm=30) as yard:
        (one,) = yard.enqueue(1, "base@groq")
        yard.until(one, "Waits for a hosted worker: none is up")
        registry = WorkerRegistry(yard.ledger.client)
        info = WorkerInfo(name="g", pool="main", kind="hosted", incarnation="i", host="h", pid=1, ready=True)

        def beat() -> bool:
            registry.beat(info)
            return "room" in yard.show(one)["explanation"]

        eventually(beat)
        org = organisation(yard.api.settings, yard.ledger.client)
        org.block("llama-3.1-8b-instant", 60_000, "429")
        registry.beat(info)
        yard.until(one, "Waits for the hosted service, which is asked for nothing for ", "(429)")
