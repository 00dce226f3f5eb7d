"""What is recalled from workers for something urgent, and what is left where it is: by hand, simulated, and by a real scheduler."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from fleet_support import until
from ledger_support import make_entry
from simulation_support import COSTS, simulate

from lorayard.celery_app import make_app
from lorayard.ledger.audit import audit
from lorayard.ledger.connection import connect
from lorayard.ledger.records import Taken
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.dispatcher import Dispatcher
from lorayard_scheduler.groups import Groups, Scale
from lorayard_scheduler.planner import Policy, View
from lorayard_scheduler.quoting import Board
from lorayard_scheduler.recall import recalls
from lorayard_scheduler.roster import Held, Roster, WorkerView
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Fleet

NOW = 1_000_000.0
POLICY = Policy(patience_ms=10, flood_ms=60_000)
WORK = Work(prompt=10, shared=0, output=10)
"""On four places, a job takes 10 ms and its part of ten steps of 16: 50 ms. Another adapter has to be loaded: 50 more."""
FULL = Held("running", "a", 4)


def view(due: float, *held: Held, others: Iterable[WorkerView] = (), jobs: int = 1, tenant: str = "t") -> View:
    """A worker that has these batches, and so many urgent jobs, due in so many ms."""
    groups = Groups(Scale(POLICY.patience_ms, POLICY.flood_ms, COSTS, WORK, 1))
    groups.put("urgent", tenant, jobs, NOW + due, NOW)
    return View(groups, Roster([WorkerView("w", COSTS, held), *others]))


def deck(batch: str = "deck", digest: str = "b", *, jobs: int = 8, waiting: int = 8, due: float = 60_000) -> Held:
    return Held(batch, digest, jobs, waiting=waiting, due=NOW + due)


def back(seen: View, policy: Policy = POLICY) -> list[tuple[str, ...]]:
    return [recall.batches for recall in recalls(seen, NOW, policy)]


def test_what_is_on_deck_comes_back_where_that_makes_a_due_time_and_only_there() -> None:
    # Behind both it begins after 12 - 4 + 1 jobs and its adapter, in 500 ms; behind what runs alone, in 100.
    assert back(view(300, FULL, deck())) == [("deck",)]
    assert back(view(500, FULL, deck())) == [], "it is in time as it is"
    assert back(view(99, FULL, deck())) == [], "it is late whatever is done"
    assert back(view(-1, FULL, deck())) == []


def test_what_has_begun_stays() -> None:
    assert back(view(300, FULL, deck(waiting=0))) == []
    assert back(view(300, Held("half", "a", 12, waiting=8, due=NOW + 60_000))) == [("half",)], "the half of it that has not"
    assert back(view(300, Held("half", "a", 12, waiting=3, due=NOW + 60_000))) == [], "which is too little"


def test_what_is_due_sooner_or_would_be_late_itself_stays() -> None:
    assert back(view(300, FULL, deck(due=290))) == []
    assert back(view(300, FULL, deck(due=400), jobs=8)) == [], "behind the urgent jobs it would be late"
    assert back(view(300, FULL, deck(due=2_000), jobs=8)) == [("deck",)]


def test_no_more_comes_back_than_has_to_and_what_has_most_time_first() -> None:
    held = [FULL, deck("soon", due=5_000, jobs=4, waiting=4), deck("late", due=90_000, jobs=4, waiting=4)]
    assert back(view(350, *held)) == [("late",)]
    assert back(view(200, *held)) == [("late", "soon")]


def test_nothing_comes_back_while_another_worker_has_room() -> None:
    free = WorkerView("free", COSTS, (Held("x", "c", 3),))
    assert back(view(300, FULL, deck(), others=[free])) == []
    assert back(view(300, FULL, deck(), others=[WorkerView("full", COSTS, (Held("x", "c", 30),))])) == [("deck",)]


def test_a_flood_recalls_nothing_and_nothing_is_recalled_twice_for_the_same_news() -> None:
    assert back(view(300, FULL, deck(), jobs=2000)) == []
    seen = view(300, FULL, deck())
    seen.planned()
    assert back(seen) == []


def test_it_goes_where_it_begins_first() -> None:
    longer = WorkerView("longer", COSTS, (Held("r", "c", 6), deck("other", "d")))
    assert back(view(300, FULL, deck(), others=[longer])) == [("deck",)]


def slowed(times: float, *others: WorkerView, held: Iterable[Held] = ()) -> View:
    """Nothing waits; a worker that takes so many times as long as the others has these batches."""
    steps = {width: times * ms for width, ms in COSTS.step_ms.items()}
    costs = Costs(COSTS.width, COSTS.switch_ms, COSTS.prefill_tokens_per_s / times, steps, measured=True)
    groups = Groups(Scale(POLICY.patience_ms, POLICY.flood_ms, COSTS, WORK, 1))
    return View(groups, Roster([WorkerView("w", costs, tuple(held) or (FULL, deck())), *others]))


def test_what_a_slowed_worker_has_not_begun_comes_back_for_one_that_has_nothing_to_do() -> None:
    idle, busy = WorkerView("idle", COSTS), WorkerView("busy", COSTS, (Held("x", "c", 3),))
    # It would end eight in 450 ms, with loading; the slow one all its twelve in so many times 600.
    assert back(slowed(4, idle)) == [("deck",)]
    assert back(slowed(1.4, idle)) == [], "not twice as soon"
    assert back(slowed(4, busy)) == [], "nobody is idle"
    assert back(slowed(4, WorkerView("idle", Costs(4)))) == [], "of the other nothing is measured"
    assert back(slowed(4, idle, held=[FULL])) == [], "all of it has begun"
    assert back(slowed(4, idle, held=[deck("one", "a"), deck("two", "b"), deck("three", "b")])) == [("one",)], "an adapter at a time"
    waits = slowed(4, idle)
    waits.groups.put("x", "t", 1, NOW + 60_000, NOW)
    assert back(waits) == [], "what waits is for who is idle"


# -- simulated ----------------------------------------------------------------------------------------------------------------------------


def mixed(seed: int) -> list[tuple[float, ...]]:
    """A heap of jobs that have an hour, and now and then one that has two seconds, all of other adapters."""
    rng = random.Random(seed)
    jobs: list[tuple[float, ...]] = [(rng.uniform(0, 500), rng.randrange(8), 30, rng.randint(1, 12), 0, 3_600_000.0) for _ in range(400)]
    at = 1_000.0
    while at < 16_000:
        at += rng.expovariate(1 / 700)
        jobs.append((at, 8 + rng.randrange(8), 30, 8, 1, 500.0))
    return jobs


def test_urgent_jobs_are_less_late_and_nothing_else_suffers() -> None:
    lateness: dict[bool, list[float]] = {False: [], True: []}
    ends: dict[bool, float] = {False: 0.0, True: 0.0}
    recalled = 0
    for seed in range(8):
        for on in (False, True):
            scheduler = Lorayard(recalls=on)
            outcome = simulate(mixed(seed), scheduler)
            times = zip(outcome.started, outcome.trace.arrivals, outcome.trace.targets, strict=True)
            lateness[on] += [max(0.0, begun - came - target) for begun, came, target in times if target == 500.0]
            ends[on] += max(outcome.ended)
            recalled += scheduler.recalled
            assert on or not scheduler.recalled
    assert recalled > 0
    assert sum(late > 0 for late in lateness[True]) < 0.75 * sum(late > 0 for late in lateness[False])
    assert sum(lateness[True]) < 0.75 * sum(lateness[False])
    assert ends[True] < 1.02 * ends[False]


class Throttled(Lorayard):
    """Its first worker takes so many times as long, and says so after 100 ms."""

    def __init__(self, times: float, *, recalls: bool) -> None:
        super().__init__(recalls=recalls)
        self.times = times

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        steps = {width: self.times * ms for width, ms in COSTS.step_ms.items()}
        self.costs = Costs(COSTS.width, COSTS.switch_ms, COSTS.prefill_tokens_per_s / self.times, steps, measured=True)
        machine = fleet.machines[0]
        machine.steps, machine.prefill = self.costs.steps, self.times * machine.prefill
        fleet.remind(100.0)

    def turn(self) -> None:
        if self.fleet.now >= 100 and self.views[0].costs is not self.costs:
            self.views[0].costs = self.costs
            self._see(self.fleet.machines[0])
        super().turn()


def test_jobs_of_a_worker_that_slows_down_end_where_there_is_nothing_to_do() -> None:
    jobs = [(0.0, adapter, 50, 20) for adapter in (0, 1) for _ in range(8)]
    ends = {}
    for times in (1.1, 20.0):
        for on in (False, True):
            scheduler = Throttled(times, recalls=on)
            ends[times, on] = max(simulate(jobs, scheduler, workers=2).ended)
            assert scheduler.recalled == (4 if on and times > 2 else 0), "half of it has begun, and nothing goes back and forth"
    assert ends[20.0, True] < 0.6 * ends[20.0, False]
    assert ends[1.1, True] == ends[1.1, False]


# -- for real -----------------------------------------------------------------------------------------------------------------------------


class Yard:
    """A real scheduler on a real ledger, and a worker whose part the test plays."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self.ledger = open_ledger(client, settings)
        self.registry = WorkerRegistry(client)
        report = {"switch_ms": {"loaded": 20, "disk": 50}, "prefill_tokens_per_s": 1000, "step_ms": {"1": 300, "4": 400}}
        self.info = WorkerInfo(name="w", pool="main", kind="llama", incarnation="i", host="h", pid=1, width=4, ready=True, costs=report)
        self.registry.beat(self.info)
        self.taken: list[Taken] = []

    def put(self, *ids: str, digest: str, wait_ms: int) -> None:
        self.registry.beat(self.info)
        self.ledger.enqueue([make_entry(i, digest=digest, wait_ms=wait_ms) for i in ids], max_queued=100)

    def take(self) -> Taken:
        """The next batch that comes."""

        def one() -> Taken | None:
            self.registry.beat(self.info)
            held = {taken.batch for taken in self.taken}
            names = [batch for batch in self.ledger.outstanding("w") if batch not in held]
            return self.ledger.take(names[0], "w", "i", 600_000) if names else None

        taken = until(one, 10)
        assert taken is not None
        self.taken.append(taken)
        return taken


@pytest.fixture
def yard(store: redis.Redis, redis_url: str, tmp_path: Path) -> Iterable[Yard]:
    settings = Settings(redis_url=redis_url, state_dir=tmp_path, batch_s=60.0)
    made = Yard(store, settings)
    with connect(redis_url) as client:
        dispatcher = Dispatcher(settings, open_ledger(client, settings), make_app(redis_url))
        thread = threading.Thread(target=dispatcher.run)
        thread.start()
        try:
            yield made
        finally:
            dispatcher.stop()
            thread.join()


def both_are_known(yard: Yard, other: WorkerInfo) -> bool:
    """Heartbeats of both workers; whether the scheduler plans with them."""
    yard.registry.beat(yard.info)
    yard.registry.beat(other)
    forecast, _ = Board(yard.ledger).read()
    return forecast is not None and forecast.workers == 2


def test_a_scheduler_sends_elsewhere_what_a_vanished_worker_has_not_taken(yard: Yard) -> None:
    """Long before its delivery lapses."""
    vanishes = msgspec.structs.replace(yard.info, name="v")
    assert until(lambda: both_are_known(yard, vanishes), 10)
    yard.put("job", digest="a", wait_ms=40_000)
    assert until(lambda: yard.ledger.outstanding("v"), 10), "it is the first of two that have nothing to do"
    assert [job.ref for job in yard.take().jobs] == ["acme/job"]
    counts = yard.ledger.counts()
    assert (counts["recalled"], counts.get("deliveries_lapsed", 0)) == (1, 0)
    assert yard.ledger.outstanding("v") == []


def test_a_scheduler_recalls_what_is_on_deck_and_sends_what_is_urgent(yard: Yard) -> None:
    yard.put(*(f"a{i}" for i in range(8)), digest="a", wait_ms=40_000)
    running = yard.take()
    assert yard.ledger.start(running.batch, running.fence, [job.ref for job in running.jobs]) == []
    yard.put(*(f"b{i}" for i in range(8)), digest="b", wait_ms=40_000)
    deck = yard.take()
    assert {job.ref for job in deck.jobs} == {f"acme/b{i}" for i in range(8)}
    yard.put("urgent", digest="c", wait_ms=20_000)
    urgent = yard.take()
    assert [job.ref for job in urgent.jobs] == ["acme/urgent"]
    document: Any = yard.ledger.show("acme", ["b0"])[0]
    assert (document["status"], document["attempts"]) == ("queued", 0)
    assert yard.ledger.start(deck.batch, deck.fence, ["acme/b0"]) == ["acme/b0"], "the worker is refused what was recalled"
    counts = yard.ledger.counts()
    assert (counts["recalled"], counts["queued"]) == (8, 8)
    assert audit(yard.ledger) == []


def test_a_scheduler_sends_elsewhere_what_a_worker_that_slows_down_has_not_begun(yard: Yard) -> None:
    yard.put(*(f"a{i}" for i in range(8)), digest="a", wait_ms=40_000)
    slows = yard.take()
    assert len(slows.jobs) == 8
    assert yard.ledger.start(slows.batch, slows.fence, [job.ref for job in slows.jobs[:4]]) == []
    other = msgspec.structs.replace(yard.info, name="v")
    assert until(lambda: both_are_known(yard, other), 10)
    assert yard.ledger.counts().get("recalled", 0) == 0, "both are as fast"
    yard.info.costs = yard.info.costs | {"prefill_tokens_per_s": 100, "step_ms": {"1": 3000, "4": 4000}}

    def given() -> list[str]:
        both_are_known(yard, other)
        return yard.ledger.outstanding("v")

    batches = until(given, 10)
    assert batches
    taken = yard.ledger.take(batches[0], "v", "i", 600_000)
    assert taken is not None
    assert {job.ref for job in taken.jobs} == {job.ref for job in slows.jobs[4:]}
    assert yard.ledger.counts()["recalled"] == 4
    assert audit(yard.ledger) == []
