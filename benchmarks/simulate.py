"""The planner against how others schedule, on simulated workers: load served, waits and switches, at loads as shares of capacity.

    python -m benchmarks.simulate [--quick] [--json PATH] [--trace CSV] [--only cells|flood|speed|eta|real ...]

Arrivals are Poisson, sizes those of the trace (examples/data/azure_llm_2023, or LORAYARD_DATA), adapters Zipf(1.0), four tenants with as
many adapters each. Capacity is what a policy serves that empties one adapter's queue before the next, from an endless backlog: full width,
no switch, no ragged end. Every rival's settings are tuned by a grid in each cell. Two cost models: `cpu`, the reference machine with the
demo model; `gpu`, an 8B model, from published figures of one accelerator: 9,000 prompt tokens a second, 11 ms a step, 18 at width 64.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import eta
from benchmarks.report import arguments, write
from lorayard_scheduler import traces
from lorayard_scheduler.costs import Costs, Work
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
LOADS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
OURS = "lorayard"
PARTS = ("cells", "flood", "speed", "eta", "real")
TRACE = Path(__file__).parent.parent / "examples" / "data" / "azure_llm_2023" / "code.csv"


@dataclass(frozen=True)
class Cell:
    model: str
    adapters: int
    workers: int

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


def contestants(names: Iterable[str]) -> dict[str, list[tuple[Callable[..., Scheduler], Mapping[str, Any]]]]:
    found: dict[str, list[tuple[Callable[..., Scheduler], Mapping[str, Any]]]] = {OURS: [(Lorayard, {})]}
    for name in names:
        rival, grid = GRID[name]
        found[name] = [(rival, settings) for settings in grid]
    return found


def best(
    cell: Cell, load: float, trace: Trace, policy: str, settings: Iterable[tuple[Callable[..., Scheduler], Mapping[str, Any]]]
) -> dict[str, Any]:
    """The row of the setting with the least p99."""
    rows = [row(cell, load, policy, chosen, cell.run(trace, make(**chosen))) for make, chosen in settings]
    return min(rows, key=lambda r: (-r["in_time"] if r["in_time"] < 0.99 else -1, r["p99_s"]))


def run(cells: Sequence[Cell], sizes: Sequence[tuple[int, int]], loads: Sequence[float], minutes: float, out: Console) -> dict[str, Any]:
    rows, p99, switches, highest = [], {}, {}, {}
    for cell in cells:
        name = f"{cell.model} {cell.adapters}x{cell.workers}"
        table = Table("load", "policy", "settings", "in time", "p50 s", "p99 s", "switches", title=name)
        reached: dict[str, float] = {}
        out_of = dict.fromkeys(GRID, 0)
        for load in loads:
            trace = cell.trace(sizes, load, minutes)
            field = contestants(rival for rival in GRID if out_of[rival] < 2 or load in (0.7, 0.9))
            found = {policy: best(cell, load, trace, policy, settings) for policy, settings in field.items()}
            for policy, line in found.items():
                rows.append(line)
                if line["in_time"] >= 0.99:
                    reached[policy] = load
                elif policy != OURS:
                    out_of[policy] += 1
                times = f"{line['in_time']:.1%}", f"{line['p50_s']:.1f}", f"{line['p99_s']:.1f}"
                table.add_row(f"{load:.2f}", policy, str(line["settings"] or ""), *times, str(line["switches"]))
            if load in (0.7, 0.9):
                rival = min(line["p99_s"] for policy, line in found.items() if policy != OURS)
                p99[f"{name} at {load}"] = found[OURS]["p99_s"] / rival
            if load == 0.9:
                switches[name] = found[OURS]["switches"] / found["first come first served"]["switches"]
        rival_most = max((load for policy, load in reached.items() if policy != OURS), default=loads[0])
        highest[name] = {"ours": reached.get(OURS, 0.0), "best_rival": rival_most, "ratio": reached.get(OURS, 0.0) / rival_most}
        out.print(table)
    return {"cells": rows, "max_load_vs_best_rival": highest, "p99_vs_best_rival": p99, "switches_vs_fcfs": switches}


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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:-1], help="default: all but real, which takes the machine")
    parser.add_argument("--trace", type=Path, help="a CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--costs", type=Path, help="what `lorayard bench costs` printed; its first worker is the model `own`")
    options = parser.parse_args()
    if options.costs:
        told = next(iter(json.loads(options.costs.read_text()).values()))
        MODELS["own"] = WorkerSpec(Costs.of(told["width"], told["costs"]))
    path = options.trace or (
        Path(os.environ["LORAYARD_DATA"]) / "azure_llm_2023" / "code.csv" if os.environ.get("LORAYARD_DATA") else TRACE
    )
    _, sizes = traces.read_sizes(path)
    out, quick, metrics = Console(width=150), options.quick, dict[str, Any]()
    if "cells" in options.only and quick:
        metrics |= run([Cell("gpu", 64, 8)], sizes, (0.5, 0.7, 0.9), 5.0, out)
    elif "cells" in options.only:
        cells = [Cell(model, adapters, workers) for model in MODELS for adapters in (64, 1000) for workers in (8, 64)]
        metrics |= run(cells, sizes, LOADS, 30.0, out)
    if "flood" in options.only:
        metrics |= flood(out, 5.0 if quick else 30.0)
    if "speed" in options.only:
        metrics |= speed(out, 50_000 if quick else 1_000_000)
    if "eta" in options.only:
        metrics |= quoted(sizes, 6.0 if quick else 30.0, out)
    if "real" in options.only:
        from benchmarks.reality import compare

        metrics |= compare(out, quick=quick)
    write(options.json, "simulate", metrics)


if __name__ == "__main__":
    main()
