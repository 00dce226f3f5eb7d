"""The bound on waiting, as docs/scheduling.md argues it: what the planner promises of a load, and which loads it promises it of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.policy import Policy, rows


@dataclass(frozen=True)
class Load:
    """In any `x` ms, at most `burst + x * per_ms` jobs come, for at most `groups` pairs of adapter and tenant, none with more tokens than
    these."""

    groups: int
    burst: float
    per_ms: float
    prompt_most: int
    output_most: int
    shared_most: int = 0

    @classmethod
    def envelope(cls, arrivals: Sequence[float], per_ms: float, **most: int) -> Load:
        """Of arrivals that have happened (ms, in order), with the smallest burst that fits the rate."""
        burst, low = 0.0, math.inf
        for number, at in enumerate(arrivals):
            low = min(low, number - at * per_ms)
            burst = max(burst, number + 1 - at * per_ms - low)
        return cls(burst=burst, per_ms=per_ms, **most)


@dataclass(frozen=True)
class Bound:
    """`reserve_ms` is what the planner has to keep in hand for every due time to be met; a job never waits for longer than its wait target
    then. `batch_ms` is the longest batch, `shift_ms` the most by which cost puts a group off."""

    reserve_ms: float
    batch_ms: float
    shift_ms: float

    def longest_wait(self, target_ms: float, reserve_ms: float) -> float:
        """From enqueueing to starting, ms, of a job with this wait target. Infinite where the load is not feasible."""
        if self.reserve_ms > reserve_ms:
            return math.inf
        return max(0.0, target_ms - reserve_ms) + self.reserve_ms


def longest_batch_ms(costs: Costs, load: Load, rows: int, *, cold: bool) -> float:
    """Fetch, load, read and decode a batch of `rows` jobs of the longest kind, a second context stepping in between all the time."""
    reading = costs.prefill_ms(load.shared_most + rows * load.prompt_most)
    rounds = load.output_most * (rows / costs.width + 1)
    return costs.switch_ms["disk"] + (costs.switch_ms["remote"] if cold else 0.0) + reading + 2 * costs.steps[costs.width] * rounds


def bound(workers: Iterable[Costs], load: Load, policy: Policy, *, target_ms: float, shortest_target_ms: float | None = None) -> Bound:
    """Of a pool in which nobody floods; `target_ms` is the job's, `shortest_target_ms` that of the most urgent priority in use."""
    costs = list(workers)
    batch = max(longest_batch_ms(c, load, math.ceil(c.knee * policy.rows_per_width), cold=True) for c in costs)
    fewest = min(rows(c, work, policy, busy=False) for c in costs for work in _corners(load))
    dearest = max(_dearest(c, load) for c in costs)
    shift = policy.patience_ms * math.log(dearest) + target_ms - (target_ms if shortest_target_ms is None else shortest_target_ms)
    ahead = load.burst + load.per_ms * (target_ms + shift)
    dispatches = load.groups + 2 * ahead / fewest
    working = sum(not any(other.much_faster(c) for other in costs) for c in costs)  # all the time, while something is nearly due
    return Bound(shift + (4 + dispatches / working) * batch, batch, shift)


def shortest_target(workers: Sequence[Costs], arrivals: Sequence[float], policy: Policy, **most: int) -> float:
    """The shortest wait target, ms, for which these arrivals pass the admission test with all of it as reserve; `most` as in `Load`."""
    best = math.inf
    for per_ms in (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05):
        load, target = Load.envelope(arrivals, per_ms, **most), 0.0
        for _ in range(200):
            needed = bound(workers, load, policy, target_ms=target).reserve_ms
            if needed <= target + 1e-6:
                best = min(best, target)
                break
            target = needed
    return best


def _dearest(costs: Costs, load: Load) -> float:
    """The most that a job may cost alone and cold, as a multiple of what it costs at best."""
    return max(costs.batch_ms(1, work, "remote") / costs.job_ms(work) for work in _corners(load))


def _corners(load: Load) -> list[Work]:
    """The extremes of what a mean job may be: ratios of what is linear in its tokens have theirs there."""
    return [
        Work(prompt, min(shared, prompt - 1), output)
        for prompt in (1, load.prompt_most)
        for shared in (0, load.shared_most)
        for output in (1, load.output_most)
    ]
