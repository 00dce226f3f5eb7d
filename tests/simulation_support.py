"""Small traces for tests of the simulator."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from lorayard_scheduler.costs import Costs
from lorayard_scheduler.simulator import Failure, Fleet, Outcome, Scheduler, Trace, WorkerSpec

COSTS = Costs(4, {"hot": 0.0, "loaded": 20.0, "disk": 50.0, "remote": 1000.0}, 1000.0, {1: 10.0, 4: 16.0}, measured=True)
"""A millisecond a prompt token; a step of 10 ms for one, 2 ms more for each other; 4 places."""


def trace(jobs: Iterable[Sequence[float]], *, shared: int = 0, target: float = 60_000.0) -> Trace:
    """Jobs are (arrival ms, adapter, prompt tokens, answer tokens[, tenant[, wait target ms]])."""
    found = Trace(array("d"), array("l"), array("l"), array("l"), array("l"), array("d"), [], [], [])
    for job in sorted(jobs, key=lambda j: j[0]):
        found.arrivals.append(job[0])
        found.adapters.append(int(job[1]))
        found.prompts.append(int(job[2]))
        found.outputs.append(int(job[3]))
        found.tenants.append(int(job[4]) if len(job) > 4 else 0)
        found.targets.append(job[5] if len(job) > 5 else target)
    found.adapter_names = [f"a{i}" for i in range(max(found.adapters, default=0) + 1)]
    found.tenant_names = [f"t{i}" for i in range(max(found.tenants, default=0) + 1)]
    found.shared = [shared] * len(found.adapter_names)
    return found


def simulate(
    jobs: Iterable[Sequence[float]] | Trace,
    scheduler: Scheduler,
    *,
    workers: int = 1,
    shared: int = 0,
    failures: Sequence[Failure] = (),
    spec: WorkerSpec = WorkerSpec(COSTS),  # noqa: B008 — frozen
) -> Outcome:
    found = jobs if isinstance(jobs, Trace) else trace(jobs, shared=shared)
    return Fleet(found, [spec] * workers, scheduler, failures).run()
