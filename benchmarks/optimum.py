"""Small instances of scheduling with adapters, solved exactly: the yardstick of `benchmarks.planner`.

An instance is jobs with release times, due times, lengths and adapters on one or two workers that run one job at a time and take
`SWITCH_MS` whenever a job's adapter is another than the last one's, the first included; nobody prepares for a job that has not come yet.
The cost of a schedule is its total tardiness, all jobs having the same weight, plus its makespan, ms. The optimum knows all that will
come; the planner does not, and of what waits it knows what its index keeps: by adapter, how many and when the first is due.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

try:
    from ortools.sat.python import cp_model
except ImportError:
    raise SystemExit("the exact optimum needs ortools: .venv/bin/pip install -c constraints.txt -e '.[bench]'") from None

from lorayard_scheduler.costs import Costs
from lorayard_scheduler.planner import Policy
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Fleet, Trace, WorkerSpec

SWITCH_MS = 400
_SWITCH = dict.fromkeys(("loaded", "disk", "remote"), float(SWITCH_MS)) | {"hot": 0.0}
_WORKER = WorkerSpec(Costs(1, _SWITCH, 1000.0, {1: 10.0}, measured=True), contexts=1)
"""A millisecond for a prompt token, ten for one of the answer."""
POLICY = Policy(reserve_ms=1_650.0, patience_ms=150.0, stay_ms=3_300.0, lead_ms=0.0)
"""The defaults, shortened as the waits: these jobs are due 4.4 s after they came in the mean, not two minutes."""
_HORIZON_MS = 60_000


@dataclass(frozen=True)
class Job:
    """Times in milliseconds; the answer's length is in tokens."""

    release: int
    adapter: int
    prompt: int
    answer: int
    target: int

    @property
    def length(self) -> int:
        return self.prompt + 10 * (self.answer - 1)  # reading the prompt gives the first token

    @property
    def due(self) -> int:
        return self.release + self.target


@dataclass(frozen=True)
class Instance:
    jobs: tuple[Job, ...]
    workers: int

    @classmethod
    def draw(cls, rng: random.Random, *, released: bool) -> Instance:
        """5 to 7 jobs of 2 to 4 adapters; all there from the beginning, or coming within three seconds."""
        n, workers, adapters = rng.randint(5, 7), rng.randint(1, 2), rng.randint(2, 4)
        jobs = [
            Job(
                rng.randrange(3000) if released else 0,
                rng.randrange(adapters),
                rng.randrange(50, 300),
                rng.randrange(5, 50),
                rng.randrange(800, 8000),
            )
            for _ in range(n)
        ]
        return cls(tuple(sorted(jobs, key=lambda job: job.release)), workers)

    def planned(self) -> float:
        """What the planner's schedule costs."""
        jobs, names = self.jobs, [f"a{n}" for n in range(4)]
        trace = Trace(
            arrivals=array("d", [job.release for job in jobs]),
            adapters=array("l", [job.adapter for job in jobs]),
            tenants=array("l", [0 for _ in jobs]),
            prompts=array("l", [job.prompt for job in jobs]),
            outputs=array("l", [job.answer for job in jobs]),
            targets=array("d", [job.target for job in jobs]),
            adapter_names=names,
            tenant_names=["t"],
            shared=[0] * len(names),
        )
        ended = Fleet(trace, [_WORKER] * self.workers, Lorayard(POLICY)).run().ended
        return sum(max(0.0, end - job.due) for end, job in zip(ended, self.jobs, strict=True)) + max(ended)

    def optimum(self) -> float:
        """The least that any schedule costs: one circuit through all jobs, and through a depot for each worker, where its day begins."""
        model, n = cp_model.CpModel(), len(self.jobs)
        starts = [model.new_int_var(job.release, _HORIZON_MS, "") for job in self.jobs]
        late = [model.new_int_var(0, _HORIZON_MS, "") for _ in self.jobs]
        end = model.new_int_var(0, _HORIZON_MS, "")
        arcs = []
        for depot in range(n, n + self.workers):
            following = n + (depot - n + 1) % self.workers
            arcs.append((depot, following, model.new_bool_var("")))
            for i, job in enumerate(self.jobs):
                first = model.new_bool_var("")
                model.add(starts[i] >= job.release + SWITCH_MS).only_enforce_if(first)
                arcs += [(depot, i, first), (i, following, model.new_bool_var(""))]
        for i, job in enumerate(self.jobs):
            for k, after in enumerate(self.jobs):
                if i != k:
                    follows = model.new_bool_var("")
                    switch = 0 if job.adapter == after.adapter else SWITCH_MS
                    model.add(starts[k] >= starts[i] + job.length + switch).only_enforce_if(follows)
                    model.add(starts[k] >= after.release + switch).only_enforce_if(follows)
                    arcs.append((i, k, follows))
            model.add(late[i] >= starts[i] + job.length - job.due)
            model.add(end >= starts[i] + job.length)
        model.add_circuit(arcs)
        model.minimize(sum(late) + end)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        assert solver.solve(model) == cp_model.OPTIMAL
        return float(solver.objective_value)


def ratios(instances: int, seed: int = 1) -> list[float]:
    """The planner's cost over the optimum's, of so many random instances, every other one with release times."""
    rng = random.Random(seed)
    drawn = [Instance.draw(rng, released=number % 2 == 1) for number in range(instances)]
    found = [instance.planned() / instance.optimum() for instance in drawn]
    assert min(found) > 1 - 1e-9, "the simulated worker and the solver's model differ"
    return found
