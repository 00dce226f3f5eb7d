"""How much load could be served in time at all, in a cell of `benchmarks.simulate`, if nothing came at a bad moment?

    python -m benchmarks.ceiling [--cell gpu-64x8] [--json PATH]

A fluid estimate by the simulator's rules. Jobs come evenly; the work is shared out without a gap; every adapter that does not keep a
worker busy alone is visited as seldom as its jobs' wait target allows: what comes right after a visit is the first of the next. In a visit
all that waits is read, one prompt after the other, and an answer's token costs no more than a prompt's, which is the least there is. What a
visit costs besides is binding the adapter, from memory, and its ragged end: when the last prompt has been read, the longest answer's rest
is steps of one sequence. Two figures: `known`, where whoever decides knows how long every answer will get and begins with the longest, so
that little is left then, and `unknown`, where the order has nothing to do with it, as for all policies that are compared here.
"""

from __future__ import annotations

import random
import statistics
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache, partial

from benchmarks.report import arguments, write
from benchmarks.simulate import MODELS, TARGETS_MS, TRACE, Cell
from lorayard_scheduler import traces

Sizes = tuple[tuple[int, int], ...]
DRAWS = 400
"""Visits that a mean ragged end is taken from."""
GRID = sorted({round(1.15**step) for step in range(60)})
"""Numbers of jobs for which it is; others count as the next lower one's."""


def rest(jobs: Sequence[tuple[int, int]], prefill_tokens: int) -> float:
    """Rounds that the longest answer still needs when the last of these prompts has been read, in this order."""
    after, longest = 0, 0.0
    for prompt, output in reversed(jobs):
        longest = max(longest, output - 1 - after / prefill_tokens)
        after += prompt
    return longest


@lru_cache
def ragged(sizes: Sizes, jobs: int, prefill_tokens: int, *, known: bool) -> float:
    """The same for a visit of so many random jobs, in the mean."""
    rng, total = random.Random(jobs), 0.0
    for _ in range(DRAWS):
        drawn = rng.choices(sizes, k=jobs)
        total += rest(sorted(drawn, key=lambda size: -size[1]) if known else drawn, prefill_tokens)
    return total / DRAWS


def use(cell: Cell, sizes: Sizes, load: float, *, known: bool) -> float:
    """The part of the workers' time that this load takes."""
    spec = MODELS[cell.model]
    costs = spec.costs
    prompt, output = (statistics.fmean(size[i] for size in sizes) for i in (0, 1))
    job_ms = costs.prefill_ms(prompt + output - 1)
    weights = [1 / (rank + 1) for rank in range(cell.adapters)]
    per_ms = load * cell.capacity(sizes) / 1000 / sum(weights)
    visits: dict[int, float] = {}  # a millisecond, by the number of jobs
    for weight in weights:
        busy = weight * per_ms * job_ms
        if busy < 1:
            every = TARGETS_MS[cell.model] / (1 - busy)
            jobs = GRID[bisect(GRID, max(1.0, weight * per_ms * every)) - 1]
            visits[jobs] = visits.get(jobs, 0.0) + 1 / every
    ends = 0.0
    for jobs, rate in visits.items():
        ends += rate * (costs.switch_ms["loaded"] + costs.steps[1] * ragged(sizes, jobs, spec.prefill_tokens, known=known))
    return (sum(weights) * per_ms * job_ms + ends) / cell.workers


def ceiling(cell: Cell, sizes: Sizes, *, known: bool) -> float:
    """The load that takes all of the workers' time."""
    low, high = 0.0, 2.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if use(cell, sizes, middle, known=known) < 1 else (low, middle)
    return low


def main() -> None:
    parser = arguments(__doc__)
    cells = {cell.name: cell for cell in (Cell(m, adapters, workers) for m in MODELS for adapters in (64, 1000) for workers in (8, 64))}
    parser.add_argument("--cell", choices=list(cells), default="gpu-64x8")
    options = parser.parse_args()
    _, sizes = traces.read_sizes(TRACE)
    found = partial(ceiling, cells[options.cell], tuple(sizes))
    metrics = {"ceiling_known": found(known=True), "ceiling_unknown": found(known=False)}
    for name, value in metrics.items():
        print(f"{name:>16}  {value:.3f}")
    write(options.json, "ceiling", metrics | {"cell": options.cell})


if __name__ == "__main__":
    main()
