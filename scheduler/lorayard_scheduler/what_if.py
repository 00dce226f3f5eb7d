"""A recording run through the simulator, once for each way in which things might have been."""

from __future__ import annotations

import difflib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorayard.errors import BadRequest
from lorayard_scheduler.planner import Policy
from lorayard_scheduler.recording import Recording
from lorayard_scheduler.rivals import GRID
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Fleet, Scheduler, Trace, WorkerSpec

OURS = "lorayard"
RIVALS = {{"first come first served": "fcfs"}.get(name, name.lower().replace(" ", "-")): name for name in GRID}
"""By the name on the command line; each is tuned by its grid in every scenario."""
_POINTS = 300


@dataclass(frozen=True)
class Scenario:
    """Who plans for how many workers, each with so many adapters in memory and contexts; jobs come `speed` times as fast as they did."""

    policy: str
    workers: int
    adapters_cached: int
    contexts: int
    speed: float


@dataclass(frozen=True)
class Result:
    """Seconds, sorted where there are many. `waits` until a job's prompt was begun, `totals` until its end; `in_time` is the part of jobs
    begun within their wait targets; `busy` the part of the workers' time; `waiting` is (when, how many jobs waited then).

    `switches`, `loads` and `busy` are None where they were not measured; `settings` are those that a rival did best with.
    """

    name: str
    waits: Sequence[float]
    totals: Sequence[float]
    in_time: float
    jobs_per_s: float
    waiting: Sequence[tuple[float, int]]
    switches: int | None = None
    loads: int | None = None
    busy: float | None = None
    scenario: Scenario | None = None
    settings: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """For JSON: percentiles instead of every job."""
        waits, totals = ({f"p{p}": round(quantile(times, p / 100), 3) for p in (50, 95, 99)} for times in (self.waits, self.totals))
        return {
            "name": self.name,
            "scenario": self.scenario,
            "settings": self.settings,
            "jobs": len(self.waits),
            "wait_s": waits,
            "total_s": totals,
            "in_time": round(self.in_time, 4),
            "jobs_per_s": round(self.jobs_per_s, 3),
            "switches": self.switches,
            "loads": self.loads,
            "busy": None if self.busy is None else round(self.busy, 3),
        }


def quantile(times: Sequence[float], part: float) -> float:
    return times[min(len(times) - 1, int(part * len(times)))]


def policies(names: Iterable[str]) -> list[str]:
    """Checked; `all` stands for every one. Raises `BadRequest`."""
    found: list[str] = []
    for name in names:
        if name != "all" and name not in (OURS, *RIVALS):
            near = difflib.get_close_matches(name, [OURS, *RIVALS], 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise BadRequest(f"no policy named {name!r}{hint} There are {', '.join([OURS, *RIVALS])}, and all", param="--policy")
        found += [OURS, *RIVALS] if name == "all" else [name]
    return list(dict.fromkeys(found))


def scenarios(as_it_is: Scenario, **changes: Sequence[Any]) -> list[Scenario]:
    """How things are, first, and every combination of the changes, by the names of `Scenario`'s fields."""
    axes = [[(field, value) for value in values or [getattr(as_it_is, field)]] for field, values in changes.items()]
    return list(dict.fromkeys([as_it_is, *(replace(as_it_is, **dict(chosen)) for chosen in itertools.product(*axes))]))


def as_it_ran(recording: Recording) -> Result | None:
    """What was measured, of the jobs that have ended."""
    jobs = [job for job in recording.arrivals if job.waited is not None and job.total is not None]
    if not jobs:
        return None
    begin = jobs[0].at
    arrivals = [job.at - begin for job in jobs]
    started = [job.at - begin + (job.waited or 0.0) for job in jobs]
    ended = [job.at - begin + (job.total or 0.0) for job in jobs]
    return _measure("as it ran", arrivals, started, ended, [job.target for job in jobs])


class Replay:
    """Simulations of one recording on workers as these."""

    def __init__(self, recording: Recording, specs: Sequence[WorkerSpec], policy: Policy) -> None:
        self._recording = recording
        self._specs = specs
        self._policy = policy
        self._traces: dict[float, Trace] = {}

    def run(self, scenario: Scenario) -> Result:
        """Of a rival, that with the settings with which most jobs were in time, and then the 99th percentile of waits is least."""
        return min((self._run(scenario, make, given) for make, given in self._field(scenario.policy)), key=_order)

    def _field(self, policy: str) -> list[tuple[Callable[..., Scheduler], Mapping[str, Any]]]:
        if policy == OURS:
            return [(lambda: Lorayard(self._policy), {})]
        make, grid = GRID[RIVALS[policy]]
        return [(make, settings) for settings in grid]

    def _run(self, scenario: Scenario, make: Callable[..., Scheduler], settings: Mapping[str, Any]) -> Result:
        trace = self._traces.setdefault(scenario.speed, self._recording.trace(scenario.speed))
        cached, contexts = scenario.adapters_cached, scenario.contexts
        specs = [replace(spec, adapters_loaded=cached, contexts=contexts) for spec in self._specs]
        outcome = Fleet(trace, [specs[i % len(specs)] for i in range(scenario.workers)], make(**settings)).run()
        found = _measure(scenario.policy, trace.arrivals, outcome.started, outcome.ended, trace.targets)
        return replace(
            found,
            switches=outcome.switches,
            loads=outcome.loads,
            busy=outcome.worked_ms / (scenario.workers * max(1.0, max(outcome.ended))),
            scenario=scenario,
            settings=settings,
        )


def _order(result: Result) -> tuple[float, float]:
    return -min(0.99, result.in_time), quantile(result.waits, 0.99)


def _measure(name: str, arrivals: Sequence[float], started: Sequence[float], ended: Sequence[float], targets: Sequence[float]) -> Result:
    waits = [(s - a) / 1000 for a, s in zip(arrivals, started, strict=True)]
    in_time = sum(1000 * wait <= target for wait, target in zip(waits, targets, strict=True)) / len(waits)
    span = max(1.0, max(ended))
    begun, came = sorted(started), sorted(arrivals)
    moments = [span * i / _POINTS for i in range(_POINTS + 1)]
    return Result(
        name,
        sorted(waits),
        sorted((e - a) / 1000 for a, e in zip(arrivals, ended, strict=True)),
        in_time,
        1000 * len(waits) / span,
        [(at / 1000, bisect_right(came, at) - bisect_right(begun, at)) for at in moments],
    )
