"""What recalling buys: urgent jobs beside a heap of jobs that have an hour, on simulated workers, with and without.

    python -m benchmarks.recall [--quick] [--json PATH]

Lateness is how long after its due time a job's prompt was begun. The heap comes within a second, over 12 adapters; the urgent jobs come one
by one, for 12 others, while the heap is worked off.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.report import arguments, write
from benchmarks.simulate import MODELS
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Fleet, Trace

ADAPTERS = 12


class Case(NamedTuple):
    """`prompt` and `output` are mean tokens; urgent jobs are due `due_s` after they come, one every `every_s` in the mean."""

    model: str
    workers: int
    heap: int
    prompt: int
    output: int
    due_s: float
    every_s: float


CASES = (
    Case("cpu", 1, 500, 40, 6, 2.0, 1.2),
    Case("cpu", 1, 500, 40, 6, 4.0, 1.2),
    Case("cpu", 2, 800, 40, 6, 2.0, 1.2),
    Case("gpu", 1, 8000, 60, 8, 1.0, 1.2),
    Case("gpu", 2, 8000, 60, 8, 1.0, 1.2),
)


def trace(case: Case, seed: int) -> Trace:
    """Urgent jobs come for as long as the heap's prompts alone take to read."""
    rng = random.Random(seed)

    def size(mean: int) -> int:
        return max(1, round(rng.expovariate(1 / mean)))

    rows = [(rng.uniform(0, 1000), rng.randrange(ADAPTERS), size(case.prompt), size(case.output), 0, 3_600_000.0) for _ in range(case.heap)]
    work = sum(prompt / MODELS[case.model].costs.prefill_tokens_per_s for _, _, prompt, *_ in rows) * 1000 / case.workers
    at = 2000.0
    while at < work:
        at += rng.expovariate(1 / (1000 * case.every_s))
        rows.append((at, ADAPTERS + rng.randrange(ADAPTERS), case.prompt, case.output, 1, 1000 * case.due_s))
    rows.sort()
    arrivals, adapters, prompts, outputs, tenants, targets = zip(*rows, strict=True)
    columns = array("d", arrivals), array("l", adapters), array("l", tenants), array("l", prompts), array("l", outputs), array("d", targets)
    return Trace(*columns, [f"a{i}" for i in range(2 * ADAPTERS)], ["heap", "urgent"], [0] * (2 * ADAPTERS))


def run(case: Case, seeds: int, recalls: bool) -> dict[str, Any]:
    """Over all seeds, in seconds."""
    late: list[float] = []
    ends, recalled, switches = 0.0, 0, 0
    for seed in range(seeds):
        jobs = trace(case, seed)
        scheduler = Lorayard(recalls=recalls)
        outcome = Fleet(jobs, [MODELS[case.model]] * case.workers, scheduler).run()
        times = zip(outcome.started, jobs.arrivals, jobs.targets, jobs.tenants, strict=True)
        late += [max(0.0, begun - came - target) / 1000 for begun, came, target, tenant in times if tenant]
        ends, recalled, switches = ends + max(outcome.ended) / 1000, recalled + scheduler.recalled, switches + outcome.switches
    late.sort()
    return {
        "urgent_jobs": len(late),
        "late": sum(seconds > 0 for seconds in late) / len(late),
        "late_p99_s": late[int(0.99 * len(late))],
        "late_mean_s": sum(late) / len(late),
        "all_done_s": ends / seeds,
        "switches": switches / seeds,
        "jobs_recalled": recalled / seeds,
    }


def compare(cases: Sequence[Case], seeds: int, out: Console) -> list[dict[str, Any]]:
    table = Table("workers", "heap", "due in s", "recalls", "late", "p99 late s", "all done s", "switches", "recalled")
    rows = []
    for case in cases:
        for recalls in (False, True):
            found = run(case, seeds, recalls)
            rows.append(case._asdict() | {"recalls": recalls} | found)
            cells = [f"{found['late']:.1%}", f"{found['late_p99_s']:.2f}", f"{found['all_done_s']:.1f}"]
            counts = [f"{found['switches']:.0f}", f"{found['jobs_recalled']:.0f}"]
            table.add_row(f"{case.workers} {case.model}", str(case.heap), f"{case.due_s:g}", "yes" if recalls else "no", *cells, *counts)
    out.print(table)
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = compare(CASES[:1] if options.quick else CASES, 4 if options.quick else 40, Console(width=120))
    write(options.json, "recall", {"cells": rows})


if __name__ == "__main__":
    main()
