"""How good plans are and what they cost: against an exact optimum on small instances; time and memory at the size of a large fleet.

    python -m benchmarks.planner [--quick] [--json PATH]

300 random instances of 5 to 7 jobs, half of them with release times, are solved exactly (`benchmarks.optimum`: total tardiness, every job
weighing the same, plus makespan) and by the planner: `optimum_ratio_*` are its costs over the least there are.

A million jobs wait in 10,000 groups of 8 tenants for 100 workers; one decision after another: a worker finishes a batch or a group gets
jobs, and a plan is made of it, carried out, and the indexes are changed accordingly.
"""

from __future__ import annotations

import random
import statistics
import time
import tracemalloc

from benchmarks.optimum import ratios
from benchmarks.report import arguments, write
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.groups import Groups, Scale
from lorayard_scheduler.planner import Policy, View, plan
from lorayard_scheduler.roster import Held, Roster, WorkerView

NOW = 1_700_000_000_000.0
COSTS = Costs(64, {"hot": 0, "loaded": 15, "disk": 120, "remote": 1500}, 9000, {1: 11, 8: 11.6, 32: 14, 64: 18}, measured=True)
POLICY = Policy(flood_ms=1e12)


def fill(groups: Groups, number: int, jobs: int, rng: random.Random) -> None:
    for i in range(number):
        due = NOW + rng.uniform(-60_000, 120_000)
        groups.put(f"{i:032x}", f"tenant{i % 8}", max(1, round(jobs / number)), round(due), NOW)


def memory(number: int) -> float:
    """Bytes of the mirror for each group, its name included."""
    rng = random.Random(1)
    tracemalloc.start()
    groups = Groups(Scale(costs=COSTS, work=Work(), workers=100))
    before = tracemalloc.get_traced_memory()[0]
    fill(groups, number, 100 * number, rng)
    return (tracemalloc.get_traced_memory()[0] - before) / number


def decisions(number: int, workers: int, jobs: int, turns: int) -> dict[str, float]:
    rng = random.Random(2)
    groups = Groups(Scale(costs=COSTS, work=Work(), workers=workers))
    fill(groups, number, jobs, rng)
    digests = [group.digest for group in groups]
    views = [WorkerView(f"w{i:03}", COSTS, loaded=frozenset(rng.sample(digests, 16))) for i in range(workers)]
    view = View(groups, Roster(views))
    times, dispatched, now = [], 0, NOW
    for turn in range(turns):
        now += 5
        if turn % 2 and turn > 1:
            worker = view.roster.workers[f"w{rng.randrange(workers):03}"]
            worker.held = worker.held[1:]
            begun = time.perf_counter()
            view.roster.put(worker)
        else:
            index = rng.randrange(number)
            digest, tenant = f"{index:032x}", f"tenant{index % 8}"
            group = groups.get(digest, tenant)
            begun = time.perf_counter()
            groups.put(digest, tenant, (group.jobs if group else 0) + 10, round(group.due if group else now + 120_000), now)
        dispatches = plan(view, now, POLICY)
        view.planned()
        for d in dispatches:
            worker = view.roster.workers[d.worker]
            worker.held = (*worker.held, Held(f"b{turn}", d.digest, d.jobs))
            view.roster.put(worker)
            for tenant, taken in d.takes:
                groups.take(d.digest, tenant, taken, now)
        if turn:  # the first plan fills the whole fleet
            times.append(1000 * (time.perf_counter() - begun))
            dispatched += len(dispatches)
    times.sort()
    return {
        "decision_ms_p50": statistics.median(times),
        "decision_ms_p99": times[int(0.99 * len(times))],
        "dispatch_us": 1000 * sum(times) / max(1, dispatched),
        "dispatches": dispatched,
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    number, turns = (1_000, 2_000) if options.quick else (10_000, 20_000)
    found = ratios(40 if options.quick else 300)
    metrics = {"optimum_instances": len(found), "optimum_ratio_mean": statistics.mean(found), "optimum_ratio_max": max(found)}
    metrics |= decisions(number, 100, 100 * number, turns)
    metrics["bytes_per_group"] = memory(number)
    for name, value in metrics.items():
        print(f"{name:>18}  {value:,.3f}")
    write(options.json, "planner", metrics)


if __name__ == "__main__":
    main()
