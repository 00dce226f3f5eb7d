"""The planner against how others schedule, on simulated workers: load served, waits and switches, at loads as shares of capacity.

    python -m benchmarks.simulate [--quick] [--json PATH] [--trace CSV] [--costs JSON] [--only PART... [--loads LOAD...]]

With `--only`, what `--json`'s file has of other parts and loads is kept, so that the whole can be run piece by piece.

Arrivals are Poisson, sizes those of the trace (examples/data/azure_llm_2023, or LORAYARD_DATA), adapters Zipf(1.0), four tenants with as
many adapters each. Capacity is what a policy serves that empties one adapter's queue before the next, from an endless backlog: full width,
no switch, no ragged end. In each cell every rival's settings are tuned by a grid, at 0.7 and at 0.9 of capacity. Two cost models: `cpu`,
the reference machine with the demo model; `gpu`, an 8B model, from published figures of one accelerator: 9,000 prompt tokens a second,
11 ms a step, 18 at width 64.
"""

from __future__ import annotations

import json
import math
import os
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import eta, reality
from benchmarks.report import arguments, write
from lorayard_scheduler import traces
from lorayard_scheduler.bound import shortest_target
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.planner import Policy
from lorayard_scheduler.rivals import GRID
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Fleet, Outcome, Scheduler, Trace, WorkerSpec

MODELS = {
    "cpu": WorkerSpec(Costs(16, {"hot": 0, "loaded": 25, "disk": 33, "remote": 500}, 340, {1: 18.5, 8: 50, 32: 173}, measured=True)),
    "gpu": WorkerSpec(
        Costs(64, {"hot": 0, "loaded": 15, "disk": 120, "remote": 1500}, 9000, {1: 11, 8: 11.6, 32: 14, 64: 18}, measured=True)
    ),
}
TARGETS_MS = {"cpu": 600_000.0, "gpu": 120_000.0}
"""Wait targets; a prompt of the trace takes the CPU model seconds to read."""
LOADS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
COMPARED = (0.7, 0.9)
"""Loads at which settings are tuned, and waits and switches compared."""
MINUTES = {("cpu", 8): 480.0, ("cpu", 64): 120.0, ("gpu", 8): 30.0, ("gpu", 64): 3.0}
"""By model and workers: of arrivals, long enough for queues to settle where they do; settings are tuned on half of it."""
OURS = "lorayard"
TRACE = Path(__file__).parent.parent / "examples" / "data" / "azure_llm_2023" / "code.csv"


@dataclass(frozen=True)
class Cell:
    model: str
    adapters: int
    workers: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.adapters}x{self.workers}"

    def capacity(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Jobs a second."""
        prompt, output = (sum(size[i] for size in sizes) / len(sizes) for i in (0, 1))
        return 1000 * self.workers / MODELS[self.model].costs.job_ms(Work(prompt, 0, output))

    def trace(self, sizes: Sequence[tuple[int, int]], load: float, minutes: float, seed: int = 1) -> Trace:
        rate = load * self.capacity(sizes)
        mix = traces.Mix(adapters=self.adapters, tenants=4, targets_ms=((1.0, TARGETS_MS.get(self.model, 600_000.0)),))
        return traces.build(traces.poisson(round(rate * minutes * 60), rate, seed), sizes, mix, seed=seed)

    def run(self, trace: Trace, scheduler: Scheduler) -> Outcome:
        return Fleet(trace, [MODELS[self.model]] * self.workers, scheduler).run()


def row(cell: Cell, load: float, policy: str, settings: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """One line of the result; waits in seconds, of jobs that came after the first quarter of the time."""
    arrivals = outcome.trace.arrivals
    warm = arrivals[-1] / 4
    waits = sorted((s - a) / 1000 for s, a in zip(outcome.started, arrivals, strict=True) if a >= warm)
    target = TARGETS_MS.get(cell.model, 600_000.0) / 1000
    return {
        "model": cell.model,
        "adapters": cell.adapters,
        "workers": cell.workers,
        "load": load,
        "policy": policy,
        "settings": dict(settings),
        "in_time": sum(wait <= target for wait in waits) / len(waits),
        "p50_s": waits[len(waits) // 2],
        "p99_s": waits[int(0.99 * len(waits))],
        "switches": outcome.switches,
    }


Maker = tuple[Callable[..., Scheduler], Mapping[str, Any]]


def better(line: Mapping[str, Any]) -> tuple[float, float]:
    """The least is best: 99 % in time or as many as can be, then the shortest p99."""
    return -min(line["in_time"], 0.99), line["p99_s"]


def tuned(cell: Cell, sizes: Sequence[tuple[int, int]], load: float, minutes: float) -> dict[str, Maker]:
    """Every rival with the best settings of its grid, on a trace of its own."""
    trace, found = cell.trace(sizes, load, minutes, seed=2), {}
    for name, (rival, grid) in GRID.items():
        lines = [row(cell, load, name, settings, cell.run(trace, rival(**settings))) for settings in grid if len(grid) > 1]
        found[name] = (rival, min(lines, key=better)["settings"] if lines else grid[0])
    return found


def run(cell: Cell, sizes: Sequence[tuple[int, int]], loads: Sequence[float], minutes: float, out: Console) -> dict[str, Any]:
    """One cell: a line for each load and policy. A rival that was late at two loads is left out of those not compared."""
    nearest = {load: min(COMPARED, key=lambda compared: abs(compared - load)) for load in loads}
    rivals = {load: tuned(cell, sizes, load, minutes / 2) for load in sorted(set(nearest.values()))}
    rows, late = [], dict.fromkeys(GRID, 0)
    table = Table("load", "policy", "settings", "in time", "p50 s", "p99 s", "switches", title=cell.name)
    for load in loads:
        trace = cell.trace(sizes, load, minutes)
        field: dict[str, Maker] = {OURS: (Lorayard, {})}
        field |= {name: maker for name, maker in rivals[nearest[load]].items() if late[name] < 2 or load in COMPARED}
        for policy, (make, settings) in field.items():
            line = row(cell, load, policy, settings, cell.run(trace, make(**settings)))
            rows.append(line)
            if policy != OURS and line["in_time"] < 0.99:
                late[policy] += 1
            times = f"{line['in_time']:.1%}", f"{line['p50_s']:.1f}", f"{line['p99_s']:.1f}"
            table.add_row(f"{load:.2f}", policy, str(settings or ""), *times, str(line["switches"]))
    out.print(table)
    return {"cells": rows}


def compared(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ours against the best rival, by cell: the highest load served in time, p99 of waits, switches."""
    result: dict[str, dict[str, Any]] = {"max_load_vs_best_rival": {}, "p99_vs_best_rival": {}, "switches_vs_fcfs": {}}
    for name in dict.fromkeys(cell_of(line) for line in lines):
        _compare(name, [line for line in lines if cell_of(line) == name], result)
    return result


def cell_of(line: Mapping[str, Any]) -> str:
    return Cell(line["model"], line["adapters"], line["workers"]).name


def _compare(name: str, rows: Sequence[Mapping[str, Any]], result: dict[str, dict[str, Any]]) -> None:
    in_time = [(r["policy"] == OURS, r["load"]) for r in rows if r["in_time"] >= 0.99]
    served = {ours: max((load for mine, load in in_time if mine == ours), default=0.0) for ours in (True, False)}
    if served[False]:
        ratio = served[True] / served[False]
        result["max_load_vs_best_rival"][name] = {"ours": served[True], "best_rival": served[False], "ratio": ratio}
    for load in COMPARED:
        found = {r["policy"]: r for r in rows if r["load"] == load}
        if not found:
            continue
        best = min((r for r in found.values() if r["policy"] != OURS), key=lambda r: r["p99_s"])
        ratio = found[OURS]["p99_s"] / best["p99_s"]
        result["p99_vs_best_rival"][f"{name} at {load}"] = {"rival": best["policy"], "ratio": ratio}
        if load == 0.9:
            result["switches_vs_fcfs"][name] = found[OURS]["switches"] / found["first come first served"]["switches"]


def bounds(out: Console, runs: int) -> dict[str, Any]:
    """Loads that pass the admission test: how many jobs waited for longer than the bound says."""
    arrive: list[Callable[..., list[float]]] = [traces.poisson, traces.bursty, partial(traces.diurnal, day_s=600.0)]
    worst, broken, jobs = 0.0, 0, 0
    for seed in range(runs):
        adapters, workers = (8, 40)[seed % 2], (2, 16)[seed // 2 % 2]
        gaps = arrive[seed % 3](4000, 2.0 * workers, seed=seed)
        trace = traces.build(gaps, [(200, 20), (40, 60), (400, 5)], traces.Mix(adapters=adapters, tenants=3, own=False), seed=seed)
        costs, policy = [MODELS["gpu"].costs] * workers, Policy(flood_ms=math.inf)
        target = shortest_target(costs, trace.arrivals, policy, groups=3 * adapters, prompt_most=400, output_most=60)
        trace.targets = array("d", [target]) * len(trace)
        spec = replace(MODELS["gpu"], cold=bool(seed % 2))
        waits = Fleet(trace, [spec] * workers, Lorayard(replace(policy, reserve_ms=target))).run().waits()
        broken += sum(wait > target for wait in waits)
        worst, jobs = max(worst, waits[-1] / target), jobs + len(waits)
    out.print(f"{runs} feasible runs, {jobs} jobs: {broken} waited for longer than the bound; the longest wait was {worst:.1%} of it")
    return {"bound_runs": runs, "bound_violations": broken, "longest_wait_of_bound": worst}


def flood(out: Console, minutes: float) -> dict[str, float]:
    """Another tenant's 95th percentile while one floods with 100,000 jobs, against its wait alone."""
    cell, sizes, many = Cell("gpu", 64, 8), [(500, 30)], 100_000
    own = cell.trace(sizes, 0.2, minutes)
    at = own.arrivals[len(own) // 4]
    gaps = [at / 1000] + [0.0] * (many - 1)
    burst = traces.build(gaps, sizes, traces.Mix(adapters=64, tenants=1))
    burst.tenant_names = ["flood"]
    both = cell.run(traces.merged(own, burst), Lorayard())
    p95 = [_p95(outcome, at) for outcome in (cell.run(own, Lorayard()), both)]
    out.print(f"p95 of the others' waits: {p95[0]:.2f} s alone, {p95[1]:.2f} s beside a flood of {many} jobs")
    return {"flood_p95_ratio": p95[1] / p95[0]}


def _p95(outcome: Outcome, after: float) -> float:
    """Seconds, of the jobs of the first four tenants that came then or later."""
    trace = outcome.trace
    rows = zip(outcome.started, trace.arrivals, trace.tenants, strict=True)
    waits = sorted((s - a) / 1000 for s, a, tenant in rows if tenant < 4 and a > after)
    return waits[int(0.95 * len(waits))]


def speed(out: Console, jobs: int) -> dict[str, float]:
    """A million jobs over 1,000 adapters and 64 workers."""
    cell = Cell("gpu", 1000, 64)
    sizes = [(200, 20), (600, 40), (100, 10)]
    rate = 0.9 * cell.capacity(sizes)
    trace = cell.trace(sizes, 0.9, jobs / rate / 60)
    begun = time.perf_counter()
    outcome = cell.run(trace, Lorayard())
    took = time.perf_counter() - begun
    out.print(f"{len(trace)} jobs simulated in {took:.1f} s, {outcome.dispatches} batches")
    return {"simulated_jobs": len(trace), "simulation_s": took}


def quoted(sizes: Sequence[tuple[int, int]], minutes: float, out: Console) -> dict[str, Any]:
    """Quotes at loads from half to overload, and with three priorities; the first quarter of the time is for learning."""
    gpu, cpu = Cell("gpu", 64, 8), Cell("cpu", 64, 8)
    traces_ = {f"{cell.model} {load}": (cell, cell.trace(sizes, load, minutes * pace)) for cell, load, pace in (
        (gpu, 0.5, 1), (gpu, 0.7, 1), (gpu, 0.9, 1), (cpu, 0.7, 5))}  # fmt: skip
    rate = 0.6 * gpu.capacity(sizes)
    mix = traces.Mix(adapters=64, tenants=4, targets_ms=((0.1, 10_000.0), (0.7, 120_000.0), (0.2, 3_600_000.0)))
    jobs = round(rate * minutes * 60)
    traces_["gpu 0.6, three priorities"] = gpu, traces.build(traces.poisson(jobs, rate), sizes, mix)
    traces_["gpu 0.6, bursts of 60"] = gpu, traces.build(traces.bursty(jobs, rate, burst=60), sizes, traces.Mix(adapters=64, tenants=4))
    table = Table("quotes", "jobs", "coverage of the 80th", "of the median", "sharpness")
    every: list[eta.Row] = []
    cells = {}
    for name, (cell, trace) in traces_.items():
        ours = eta.Quoted()
        found = eta.rows(ours, cell.run(trace, ours), trace.arrivals[-1] / 4)
        cells[name] = eta.judge(found)
        every += [row._replace(like=(len(cells), *row.like)) for row in found]
        table.add_row(name, str(len(found)), *(f"{value:.3f}" for value in cells[name].values()))
    judged = eta.judge(every)
    table.add_row("all", str(len(every)), *(f"{value:.3f}" for value in judged.values()))
    out.print(table)
    return judged | {"eta_cells": cells}


def real(out: Console, quick: bool, kind: str, seed: int) -> dict[str, Any]:
    """The same workload simulated and run here; takes the whole machine, so only where it is asked for."""
    return reality.compare(out, quick=quick, name=kind, seed=seed)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path, help="a CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--costs", type=Path, help="what `lorayard bench costs` printed; its first worker is the model `own`")
    parser.add_argument("--only", nargs="+", metavar="PART", help="gpu-64x8 and other cells, bound, flood, speed, eta, real")
    parser.add_argument("--loads", nargs="+", type=float, default=LOADS, help="of cells; default: %(default)s")
    parser.add_argument("--real", choices=list(reality.KINDS), default="words", help="the workload of the part real")
    parser.add_argument("--seed", type=int, default=reality.SEED, help="of that workload")
    options = parser.parse_args()
    models = ["cpu", "gpu"]
    if options.costs:
        told = next(iter(json.loads(options.costs.read_text()).values()))
        MODELS["own"] = WorkerSpec(Costs.of(told["width"], told["costs"]))
        models = ["own"]
    path = options.trace or (
        Path(os.environ["LORAYARD_DATA"]) / "azure_llm_2023" / "code.csv" if os.environ.get("LORAYARD_DATA") else TRACE
    )
    _, sizes = traces.read_sizes(path)
    out = Console(width=150)
    cells = {cell.name: cell for cell in (Cell(m, adapters, workers) for m in models for adapters in (64, 1000) for workers in (8, 64))}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "bound": lambda: bounds(out, 4 if options.quick else 24),
        "flood": lambda: flood(out, 5.0 if options.quick else 30.0),
        "speed": lambda: speed(out, 50_000 if options.quick else 1_000_000),
        "eta": lambda: quoted(sizes, 6.0 if options.quick else 30.0, out),
        "real": lambda: real(out, options.quick, options.real, options.seed),
    }
    for name, cell in cells.items():
        minutes = 5.0 if options.quick else MINUTES.get((cell.model, cell.workers), 60.0)
        parts[name] = partial(run, cell, sizes, COMPARED if options.quick else options.loads, minutes, out)
    usual = [name for name in parts if name != "real" and not (options.quick and name in cells and name != "gpu-64x8")]
    wanted = options.only or usual
    if unknown := [name for name in wanted if name not in parts]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(parts)}")
    metrics: dict[str, Any] = {}
    if options.only and options.json and options.json.exists():
        metrics = json.loads(options.json.read_text())["metrics"]
        kept = metrics.get("cells", [])
        metrics["cells"] = [line for line in kept if cell_of(line) not in wanted or line["load"] not in options.loads]
    for name in wanted:
        for key, value in parts[name]().items():
            before = metrics.get(key)
            metrics[key] = before + value if isinstance(before, list) else before | value if isinstance(before, dict) else value
        metrics |= compared(metrics.get("cells", []))
    write(options.json, "simulate", metrics)


if __name__ == "__main__":
    main()
