"""Each rival does what its authors, or those who met it in production, say it does."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from simulation_support import COSTS, simulate

from lorayard_scheduler.rivals import (
    GRID,
    DloraCredits,
    FirstComeFirstServed,
    LlmdAffinity,
    Lorax,
    RoundRobin,
    SglangDrainer,
    ShortestQueue,
    SLora,
)
from lorayard_scheduler.simulator import Outcome, WorkerSpec

ONE = WorkerSpec(COSTS, contexts=1)
"""One adapter at a time, so that who goes first is seen."""

Jobs = Sequence[tuple[float, int, int, int]]


def order(outcome: Outcome) -> list[int]:
    """Adapters in the order in which their jobs started."""
    return [adapter for _, adapter in sorted(zip(outcome.started, outcome.trace.adapters, strict=True))]


def stream(adapter: int, every_ms: float, until_ms: float) -> Jobs:
    return [(i * every_ms, adapter, 10, 20) for i in range(int(until_ms / every_ms))]


def wait_of(outcome: Outcome, adapter: int) -> float:
    """The longest of its jobs."""
    rows = zip(outcome.started, outcome.trace.arrivals, outcome.trace.adapters, strict=True)
    return max(s - a for s, a, which in rows if which == adapter)


def test_first_come_first_served_keeps_the_order_of_arrival_and_switches_for_it() -> None:
    outcome = simulate([(i, i % 2, 10, 5) for i in range(40)], FirstComeFirstServed(), spec=ONE)
    assert all(a <= b for a, b in pairwise(outcome.started))
    assert outcome.switches == 40


def test_round_robin_gives_every_adapter_a_turn_however_deep_anothers_queue() -> None:
    jobs: Jobs = [(0.0, 0, 10, 5)] * 100 + [(1.0, 1, 10, 5), (1.0, 2, 10, 5)]
    outcome = simulate(jobs, RoundRobin(most=8), spec=ONE)
    assert order(outcome)[:19] == [0] * 16 + [1, 2, 0]


@pytest.mark.parametrize("name", GRID)
def test_every_rival_can_begin_with_nothing_fetched(name: str) -> None:
    make, grid = GRID[name]
    rng = random.Random(1)
    jobs = [(rng.uniform(0, 20_000), rng.randrange(6), 20, rng.randint(1, 60)) for _ in range(200)]
    outcome = simulate(jobs, make(**grid[0]), workers=2, spec=WorkerSpec(COSTS, cold=True))
    assert all(math.isfinite(end) for end in outcome.ended)


def test_lorax_leaves_an_adapter_after_its_cycle_and_not_before() -> None:
    """router/src/queue.rs: an adapter active for longer than the cycle is not drawn from while others wait."""
    jobs = [*stream(0, 40, 20_000), (100, 1, 10, 5)]
    waits = {cycle: wait_of(simulate(jobs, Lorax(cycle_s=cycle), spec=ONE), 1) for cycle in (1.0, 4.0)}
    assert 900 <= waits[1.0] <= 1_500
    assert 3_900 <= waits[4.0] <= 4_500


def test_slora_in_one_adapter_mode_stays_until_more_than_so_many_wait_ahead() -> None:
    jobs: Jobs = [(0.0, 0, 10, 10)] + [(1 + i * 0.01, 1 + i % 2, 10, 10) for i in range(40)] + [(2.0, 0, 10, 10)] * 20
    stays, leaves = (order(simulate(jobs, SLora(ahead=n), spec=ONE)) for n in (60, 30))
    assert stays[:21] == [0] * 21
    assert leaves[:21] != [0] * 21


def test_sglang_starves_a_waiting_adapter_without_the_drainer_and_not_with_it() -> None:
    """sgl-project/sglang #15129: a busy adapter's requests keep the slots; with the drainer one is freed after the threshold."""
    jobs = [*stream(0, 40, 20_000), (100, 1, 10, 5)]
    assert wait_of(simulate(jobs, SglangDrainer(starved_s=1e9), spec=ONE), 1) > 15_000
    assert 2_900 <= wait_of(simulate(jobs, SglangDrainer(starved_s=3.0), spec=ONE), 1) <= 3_600


def test_llmd_keeps_an_adapter_where_it_is_active() -> None:
    jobs: Jobs = [(i * 30.0, (i * 7 + i // 3) % 8, 10, 30) for i in range(400)]
    assert simulate(jobs, LlmdAffinity(affinity=2.0), workers=4).switches < simulate(jobs, ShortestQueue(), workers=4).switches / 2


def test_dlora_serves_the_most_popular_until_the_displaced_have_credits() -> None:
    jobs = [(0.0, 1, 10, 5), *stream(0, 40, 20_000)]
    few, many = (
        wait_of(simulate([(0.0, 0, 10, 20), (0.0, 0, 10, 20), *jobs], DloraCredits(credits=n), spec=ONE), 1) for n in (10.0, 100.0)
    )
    assert few < many / 4


def test_the_shortest_queue_spreads_every_adapter_over_all_replicas() -> None:
    outcome = simulate([(i * 5.0, 0, 10, 30) for i in range(400)], ShortestQueue(), workers=4)
    assert outcome.loads == 4


def test_all_of_the_grid_serve_everything() -> None:
    jobs: Jobs = [(i * 30.0, (i * i) % 7, 30, 1 + i % 40) for i in range(300)]
    for name, (rival, settings) in GRID.items():
        for chosen in settings:
            ended = simulate(jobs, rival(**chosen), workers=3).ended
            assert max(ended) < 1e6, (name, chosen)
