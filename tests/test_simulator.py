"""The simulated worker against arithmetic, and the real planner in a simulated fleet."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from simulation_support import COSTS, simulate, trace

from lorayard.errors import BadRequest
from lorayard_scheduler import traces
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.planner import Policy
from lorayard_scheduler.rivals import FirstComeFirstServed
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Failure, Fleet, WorkerSpec


def test_a_job_alone_takes_loading_prompt_and_steps() -> None:
    outcome = simulate([(5, 0, 30, 7)], Lorayard())
    assert outcome.started[0] == 5 + 50
    assert outcome.ended[0] == pytest.approx(5 + 50 + 30 + 6 * 10), "the first of the seven tokens comes with the prompt"
    assert (outcome.switches, outcome.loads) == (1, 1)
    assert outcome.worked_ms == pytest.approx(140)


def test_a_batch_decodes_together_and_its_width_falls_at_the_end() -> None:
    outcome = simulate([(0, 0, 10, 2), (0, 0, 10, 5), (0, 0, 10, 9)], FirstComeFirstServed())
    prompts = 50 + 10 + (10 + 1) + (10 + 2)  # what is decoded beside a prompt costs as much as that
    assert list(outcome.started) == [50, 60, 71]
    assert list(outcome.ended) == pytest.approx([prompts, prompts + 3 * 12, prompts + 3 * 12 + 5 * 10])


def test_two_adapters_step_in_turn_and_the_second_is_read_from_the_disk_beside_the_first() -> None:
    outcome = simulate([(0, 0, 10, 10), (0, 1, 10, 10)], FirstComeFirstServed())
    assert list(outcome.started) == [50, 60 + 20]
    read = 60 + 20 + 10 + 10  # while the second prompt is read, the first adapter takes a step
    assert list(outcome.ended) == pytest.approx([read + 8 * (10 + 10), read + 8 * (10 + 10) + 10])
    outcome = simulate([(0, 0, 10, 10), (55, 1, 10, 10)], FirstComeFirstServed())
    assert outcome.started[1] == 60 + 25 + 20, "it is known to be wanted from then on"


def test_what_prompts_share_is_read_once_while_the_adapter_stays() -> None:
    plain, shared = (simulate([(0, 0, 110, 1), (0, 0, 110, 1)], FirstComeFirstServed(), shared=n) for n in (0, 100))
    assert plain.ended[1] - shared.ended[1] == pytest.approx(100)


def test_no_more_adapters_stay_loaded_than_there_is_room_for() -> None:
    jobs = [(1000.0 * i, i % 3, 10, 1) for i in range(9)]
    few, many = (simulate(jobs, FirstComeFirstServed(), spec=WorkerSpec(COSTS, adapters_loaded=n)) for n in (2, 3))
    assert (few.loads, few.switches) == (9, 9)
    assert (many.loads, many.switches) == (3, 9)


def test_cold_caches_are_filled_beside_what_runs() -> None:
    outcome = simulate([(0, 0, 10, 1), (0, 0, 10, 1), (3000, 1, 10, 200), (3100, 0, 10, 1)], Lorayard(), spec=WorkerSpec(COSTS, cold=True))
    assert outcome.started[0] == 1000 + 50
    assert outcome.started[3] == 3100, "it does not wait for the other adapter, which is on its way"


def test_what_a_lost_worker_had_runs_elsewhere_and_ends_once() -> None:
    rng = random.Random(3)
    jobs = [(rng.uniform(0, 5_000), rng.randrange(6), 20, rng.randrange(1, 40), rng.randrange(2)) for _ in range(300)]
    failures = [Failure(0, 1_000, 2_000), Failure(1, 2_500, 10_000)]
    for scheduler in (Lorayard(), FirstComeFirstServed()):
        outcome = simulate(jobs, scheduler, workers=3, failures=failures)
        assert all(math.isfinite(end) for end in outcome.ended)
        assert all(a <= s <= e for a, s, e in zip(outcome.trace.arrivals, outcome.started, outcome.ended, strict=True))
    assert simulate(jobs, Lorayard(), workers=3, failures=failures).ended == simulate(jobs, Lorayard(), workers=3, failures=failures).ended


def test_what_contexts_are_bound_to_stays_loaded_however_small_the_cache() -> None:
    outcome = simulate([(0, i % 6, 20, 50) for i in range(60)], Lorayard(), spec=WorkerSpec(COSTS, contexts=4, adapters_loaded=2))
    assert all(math.isfinite(end) for end in outcome.ended)
    assert outcome.loads >= 6


def test_a_worker_that_comes_back_works_again() -> None:
    jobs = [(10_000.0 * i, 0, 20, 10) for i in range(6)]
    for scheduler in (Lorayard(), FirstComeFirstServed()):
        outcome = simulate(jobs, scheduler, failures=[Failure(0, 15_000, 20_000)])
        waits = [s - a for a, s in zip(outcome.trace.arrivals, outcome.started, strict=True)]
        assert max(waits[0], waits[1], *waits[4:]) < 500
        assert 15_000 <= waits[2] < 15_500, "nobody else is there"
        assert 5_000 <= waits[3] < 5_500


def test_every_job_of_any_load_ends_and_the_same_load_ends_the_same_way() -> None:
    mix = traces.Mix(adapters=30, tenants=3, zipf=1.0, shared=10, targets_ms=((0.2, 10_000.0), (0.8, 120_000.0)))
    sizes = [(50, 5), (200, 20), (20, 90)]
    for gaps in (traces.poisson(1500, 20), traces.bursty(1500, 20), traces.diurnal(1500, 20, day_s=60)):
        load = traces.build(gaps, sizes, mix)
        first, again = simulate(load, Lorayard(), workers=3), simulate(load, Lorayard(), workers=3)
        assert first.ended == again.ended
        assert all(math.isfinite(end) for end in first.ended)
        assert first.switches < simulate(load, FirstComeFirstServed(), workers=3).switches


def test_another_tenants_flood_is_hardly_felt() -> None:
    rng = random.Random(1)
    own = [(rng.uniform(10_000, 60_000), rng.randrange(4), 50, 20, 0) for _ in range(200)]
    flood = [(5_000.0, 4 + i % 4, 50, 20, 1) for i in range(30_000)]
    alone = simulate(own, Lorayard(), workers=2)
    beside = simulate(own + flood, Lorayard(Policy(flood_ms=20_000)), workers=2)
    waits = sorted(s - a for s, a, t in zip(beside.started, beside.trace.arrivals, beside.trace.tenants, strict=True) if t == 0)
    assert waits[190] < 3_000
    assert alone.waits()[190] < waits[190], "it is felt"


def test_a_trickle_beside_a_flood_begins_soon_and_hardly_slows_it() -> None:
    """Without a trickle the flood has both hands of every worker."""
    places = WorkerSpec(Costs(16, COSTS.switch_ms, 2000.0, {1: 10.0, 16: 20.0}, measured=True))
    for workers in (1, 2, 8):
        flood = [(0.0, i % 4, 50, 20, 1, 3.6e6) for i in range(1_000 * workers)]
        trickle = [(2_500.0 * (k + 1), 5, 50, 20, 0) for k in range(24)]
        ended, waits = [], []
        for jobs in (flood, flood + trickle):
            outcome = simulate(jobs, Lorayard(Policy(flood_ms=5_000)), workers=workers, spec=places)
            rows = list(zip(outcome.trace.tenants, outcome.trace.arrivals, outcome.started, outcome.ended, strict=True))
            ended.append(max(end for tenant, _, _, end in rows if tenant == 1))
            waits += [begun - came for tenant, came, begun, _ in rows if tenant == 0 and came < ended[0] - 10_000]
        assert len(waits) > 10
        assert max(waits) < 500, "four prompts, each read in 25 ms, may be before it"
        assert ended[1] < 1.25 * ended[0], workers


def test_who_comes_when_nobody_is_there_counts_from_what_it_was_served() -> None:
    """As in the mirror, which looks at who is there also when nothing waits."""
    ours = Lorayard()
    simulate([(0, 0, 50, 20, 0), (0, 0, 50, 20, 0), (10_000, 0, 50, 20, 1)], ours)
    assert [ours.groups.served(tenant) for tenant in ("t0", "t1")] == [140, 70]


def test_costs_are_interpolated_and_nonsense_is_not_believed() -> None:
    assert COSTS.steps == [0, 10, 12, 14, 16]
    assert Costs(8, step_ms={2: 10.0, 4: 14.0}).steps[1:] == [10, 10, 12, 14, 16, 18, 20, 22]
    assert Costs(4, step_ms={2: 10.0}).steps[1:] == [10, 10, 15, 20]
    assert Costs(64, step_ms={1: 11.0, 16: 12.0, 64: 48.0}, measured=True).knee == 16
    assert Costs(64, step_ms={1: 10.0, 8: 20.0, 64: 160.0}, measured=True).knee == 8
    assert Costs(64).knee == 64
    report = {"switch_ms": {"hot": 0, "loaded": 1, "disk": 2, "remote": 3}, "prefill_tokens_per_s": 500, "step_ms": {"1": 10, "8": 20}}
    good = Costs.of(8, report)
    assert good.measured
    assert Costs.of(8, report | {"switch_ms": {"disk": 99}}).switch_ms == {"hot": 0.0, "loaded": 25.0, "disk": 99.0, "remote": 500.0}
    assert good.prefill_ms(100) == 200
    for bad in (
        {},
        report | {"prefill_tokens_per_s": 0},
        report | {"step_ms": {"x": 1}},
        report | {"switch_ms": {"loaded": "?"}},
        report | {"step_ms": {}},
    ):
        assert not Costs.of(8, bad).measured
    assert good.resembles(Costs.of(8, report | {"prefill_tokens_per_s": 510}))
    assert not good.resembles(Costs.of(8, report | {"prefill_tokens_per_s": 700}))


def test_a_batch_is_expected_to_take_what_it_takes() -> None:
    rng = random.Random(2)
    work = Work(50, 20, 30)
    for jobs in (1, 4, 16):
        took = []
        for _ in range(200):
            batch = [(0, 0, 50, max(1, round(rng.expovariate(1 / 30)))) for _ in range(jobs)]
            took.append(simulate(trace(batch, shared=20), FirstComeFirstServed()).worked_ms)
        assert sum(took) / len(took) == pytest.approx(COSTS.batch_ms(jobs, work, "disk"), rel=0.1)


def test_arrivals_are_read_and_what_is_wrong_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "code.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n")
    assert traces.read_sizes(path) == ([0.0, pytest.approx(0.052)], [(4808, 10), (3180, 8)])
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,x,10\n")
    with pytest.raises(BadRequest, match=r"code\.csv:2"):
        traces.read_sizes(path)
    with pytest.raises(BadRequest, match="cannot read"):
        traces.read_sizes(tmp_path / "none.csv")
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(BadRequest, match="no arrivals"):
        traces.read_sizes(path)


def test_a_slow_worker_in_the_pool_makes_nothing_end_later() -> None:
    """It helps where there is enough to do, and leaves alone what the others end sooner."""
    slow = Costs(4, COSTS.switch_ms, 100.0, {1: 100.0, 4: 160.0}, measured=True)
    rng = random.Random(4)
    few, many = (
        trace([(rng.uniform(0, 20_000), rng.randrange(12), 30, rng.randint(2, 20), 0, 5_000) for _ in range(n)]) for n in (60, 900)
    )
    for jobs, gain in ((few, 1.0), (many, 0.95)):
        ends = []
        for specs in ([WorkerSpec(COSTS)] * 2, [WorkerSpec(slow), WorkerSpec(COSTS), WorkerSpec(COSTS)]):
            outcome = Fleet(jobs, specs, Lorayard()).run()
            ends.append(sum(outcome.ended) - sum(jobs.arrivals))
        assert ends[1] <= 1.02 * gain * ends[0]
