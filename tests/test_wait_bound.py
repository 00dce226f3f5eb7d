"""The published bound on waiting: whatever arrives, on whatever workers, no job of a feasible load starts later than it says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from simulation_support import COSTS, trace

from lorayard_scheduler.bound import Load, bound, shortest_target
from lorayard_scheduler.costs import Costs
from lorayard_scheduler.planner import Dispatch, Policy
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Fleet, WorkerSpec

SLOW = Costs(4, {"hot": 0.0, "loaded": 40.0, "disk": 90.0, "remote": 1500.0}, 400.0, {1: 25.0, 4: 60.0}, measured=True)
PROMPT, OUTPUT, SHARED = 60, 40, 20

burst = st.tuples(
    st.integers(0, 30_000),  # when
    st.integers(0, 11),  # adapter
    st.integers(1, 12),  # jobs
    st.integers(SHARED + 1, PROMPT),
    st.integers(1, OUTPUT),
    st.integers(0, 2),  # tenant
)
bursts = st.lists(burst, min_size=1, max_size=40)


def promised(arrivals: list[float], groups: int, workers: list[Costs], policy: Policy) -> float:
    return shortest_target(workers, arrivals, policy, groups=groups, prompt_most=PROMPT, output_most=OUTPUT, shared_most=SHARED)


@settings(max_examples=150, deadline=None)
@given(bursts, st.lists(st.sampled_from([COSTS, SLOW]), min_size=1, max_size=3), st.booleans())
def test_nothing_starts_later_than_the_bound_says(
    coming: list[tuple[int, int, int, int, int, int]], workers: list[Costs], cold: bool
) -> None:
    jobs = [(float(at), adapter, prompt, output, tenant) for at, adapter, n, prompt, output, tenant in coming for _ in range(n)]
    policy = Policy(patience_ms=500)
    target = promised(sorted(at for at, *_ in jobs), len({(j[1], j[4]) for j in jobs}), workers, policy)
    assert math.isfinite(target)
    load = trace(jobs, shared=SHARED, target=target)
    specs = [WorkerSpec(costs, adapters_loaded=3, cold=cold) for costs in workers]
    outcome = Fleet(load, specs, Lorayard(replace(policy, reserve_ms=target))).run()
    assert outcome.waits()[-1] <= target


class Watched(Lorayard):
    """Every dispatch is judged as it is carried out: the bound alone would be kept by a planner that lets whoever is due first wait for all
    others, as long as all of it fits."""

    def __init__(self, policy: Policy, served: Iterable[float]) -> None:
        super().__init__(policy)
        self.had = served
        self.late = -1.0  # when something was overdue: then switches count for more than order
        self.judged = 0

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        for name, tokens in zip(fleet.trace.tenant_names, self.had, strict=False):
            self.groups.level(name, tokens)

    def _carry_out(self, dispatch: Dispatch) -> None:
        now, hand = self.fleet.now, self.roster.hands[dispatch.worker]
        if any(group.due < now for group in self.groups):
            self.late = now
        heads = {tenant: group.due for tenant, _ in dispatch.takes if (group := self.groups.get(dispatch.digest, tenant))}
        before = {(group.digest, group.tenant.name): group.due for group in self.groups}
        super()._carry_out(dispatch)
        left = {(group.digest, group.tenant.name) for group in self.groups}
        for (digest, tenant), due in before.items():
            if (digest, tenant) not in left:
                continue
            if digest == dispatch.digest:
                assert due >= max(heads.values()), f"{tenant} is due before some of {heads}, and waits"
            elif self.late < now and digest not in hand and due + self._shift() <= now + self.policy.reserve_ms:
                self.judged += 1
                assert min(heads.values()) <= due + self._shift(), f"{digest} of {tenant} could have been taken, and waits"

    def _shift(self) -> float:
        """The most by which cost puts a group off."""
        costs, work = self.groups.scale.costs, self.groups.scale.work
        return 1 + self.policy.patience_ms * math.log(costs.batch_ms(1, work, "disk") / costs.job_ms(work))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(burst, min_size=15, max_size=40),
    st.lists(st.sampled_from([5_000.0, 15_000.0, 120_000.0]), min_size=40, max_size=40),
    st.tuples(*[st.floats(0, 1e6)] * 3),
)
def test_nothing_is_taken_past_what_is_due_sooner_and_could_have_been(
    coming: list[tuple[int, int, int, int, int, int]], targets: list[float], served: tuple[float, ...]
) -> None:
    """Whatever the targets, and whatever anybody was served."""
    jobs = [
        (float(at // 8), adapter, prompt, output, tenant, target)
        for (at, adapter, n, prompt, output, tenant), target in zip(coming, targets, strict=False)
        for _ in range(n)
    ]
    watched = Watched(Policy(patience_ms=200, reserve_ms=12_000, flood_ms=1e9), served)
    outcome = Fleet(trace(jobs, shared=SHARED), [WorkerSpec(COSTS, adapters_loaded=3)], watched).run()
    assert all(math.isfinite(end) for end in outcome.ended)
    event(f"something nearly due waited: {watched.judged > 0}")


def test_the_bound_is_not_far_from_what_can_happen() -> None:
    """One worker, everything at once, each adapter in turn: a bound of more than some ten times that would promise nothing."""
    jobs = [(0.0, adapter, PROMPT, OUTPUT, 0) for adapter in range(12) for _ in range(8)]
    policy = Policy(patience_ms=500)
    target = promised([0.0] * len(jobs), 12, [COSTS], policy)
    outcome = Fleet(trace(jobs, shared=SHARED, target=target), [WorkerSpec(COSTS)], Lorayard(replace(policy, reserve_ms=target))).run()
    assert target / 12 < outcome.waits()[-1] <= target


def test_more_load_needs_more_reserve_and_what_cannot_be_met_is_not_promised() -> None:
    load = Load(groups=10, burst=20, per_ms=0.001, prompt_most=PROMPT, output_most=OUTPUT)
    found = bound([COSTS] * 4, load, Policy(), target_ms=120_000)
    assert bound([COSTS] * 2, load, Policy(), target_ms=120_000).reserve_ms > found.reserve_ms
    assert bound([COSTS] * 4, replace(load, groups=20), Policy(), target_ms=120_000).reserve_ms > found.reserve_ms
    assert bound([COSTS] * 4, load, Policy(), target_ms=120_000, shortest_target_ms=10_000).reserve_ms > found.reserve_ms
    assert found.longest_wait(120_000, found.reserve_ms) == pytest.approx(120_000)
    assert found.longest_wait(120_000, 2 * found.reserve_ms) == pytest.approx(max(0, 120_000 - 2 * found.reserve_ms) + found.reserve_ms)
    assert found.longest_wait(120_000, found.reserve_ms / 2) == math.inf


def test_the_envelope_holds_every_window() -> None:
    arrivals = [0.0, 0.0, 5.0, 100.0, 101.0, 102.0, 400.0]
    load = Load.envelope(arrivals, 0.01, groups=1, prompt_most=1, output_most=1)
    for i, start in enumerate(arrivals):
        for j in range(i, len(arrivals)):
            assert j - i + 1 <= load.burst + 0.01 * (arrivals[j] - start) + 1e-9
    assert load.burst < len(arrivals)
