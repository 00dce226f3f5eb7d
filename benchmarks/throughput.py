"""How close is the engine to the limit of the machine, and what do others reach on the same work?

    python -m benchmarks.throughput [--quick] [--only a,l,b,c,m] [--columns engine,fleet,server,naive,...] [--json PATH]

Workloads: `benchmarks/workloads.py`. The limit of each: `benchmarks/limit.py`, measured before and after the engine's run and averaged, on
the answers' real lengths. `engine`: `Engine` in this process, one work a group. `fleet`: from the first enqueue to the last stored result,
through API, ledger, scheduler and workers. `server`: llama.cpp's own (`LLAMA_SERVER` or `llama-server` on the path), same weights, same
adapter files, jobs in random order and, as `sorted`, by adapter. `naive`: a Celery task that holds a `Llama` and loads it again when the
adapter changes; timed on a part of the jobs. No peer shares the machine with another while it is timed. `switch`: what a change of adapter
takes, with M's adapters; `answers`: whether B's answers in company are those given alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import details, limit, report
from benchmarks.serving import Fleetwise, Naive, Server
from benchmarks.workloads import Job, Maker, Workload
from lorayard.adapters import BaseModel
from lorayard.adapters.conversion import write_gguf
from lorayard.adapters.peft import read_adapter
from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.child import SPINS
from lorayard_workers.llama.engine import Engine
from lorayard_workers.llama.process import resolve_model
from lorayard_workers.llama.requests import Request
from lorayard_workers.runner import AdapterFile, Event, Outcome, Work, WorkItem

COLUMNS = ("engine", "fleet", "server", "naive", "switch", "answers")
DETAILS = ("switch_hot_ms", "switch_loaded_ms", "load_disk_ms", "answers_equal", "answers_gap")
out = Console()


class Bench:
    """One model, its adapters' files, and what was measured so far."""

    def __init__(self, settings: Settings, folder: Path, *, quick: bool) -> None:
        self.settings = settings
        self.folder = folder
        self.path = resolve_model(settings)
        self.model = Model(self.path, settings)
        self.base: BaseModel = self.model.base([])
        self.maker = Maker(folder / "adapters", self.base, quick=quick)
        self.metrics: dict[str, Any] = {}

    def gguf(self, workload: Workload, name: str) -> Path:
        """The adapter as llama.cpp loads it, ours and the peers'."""
        path = self.folder / "gguf" / f"{workload.adapters[name].name}.gguf"
        if not path.exists():
            write_gguf(read_adapter(workload.adapters[name]), self.base, path)
        return path

    def run(self, workload: Workload, columns: list[str]) -> None:
        for name in workload.adapters:
            self.gguf(workload, name)
        if "engine" in columns:
            self._engine(workload)
        if "switch" in columns and workload.name == "m":
            self.metrics |= details.switching(self.model, self.settings, list(self._files(workload).values()))
        if "answers" in columns and workload.name == "b":
            self.metrics |= details.answers(self.model, self.settings, workload, self._files(workload))
        peers: dict[str, Any] = {"fleet": Fleetwise, "server": Server, "naive": Naive}
        for column in columns:
            if column in peers:
                for suffix, seconds, jobs in peers[column](self).run(workload):
                    self._note(workload, column + suffix, seconds, jobs)

    def _files(self, workload: Workload) -> dict[str, AdapterFile]:
        return {name: AdapterFile(name, str(self.gguf(workload, name))) for name in workload.adapters}

    def _note(self, workload: Workload, column: str, seconds: float, jobs: int) -> None:
        self.metrics[f"{workload.name}_{column}_jobs_per_s"] = jobs / seconds
        out.print(f"{workload.name} {column}: {jobs} jobs in {seconds:.1f} s, {jobs / seconds:.2f} jobs/s")

    def _engine(self, workload: Workload) -> None:
        run = EngineRun(self.model, self.settings, self._files(workload))
        try:
            groups = run.groups(workload)
            before = self._rates(workload, groups, run.engine)
            run.all(workload)
            after = self._rates(workload, groups, run.engine)
        finally:
            run.engine.close()
        limits = [limit.seconds(groups.values(), rates, run.engine.width) for rates in (before, after)]
        tokens = sum(sum(lengths) for _, lengths in groups.values())
        self._note(workload, "limit", sum(limits) / 2, len(workload.jobs))
        self._note(workload, "engine", run.seconds, len(workload.jobs))
        counters = run.engine.counters
        self.metrics |= {
            f"{workload.name}_engine_tokens_per_s": tokens / run.seconds,
            f"{workload.name}_engine_in_decode": counters.decode_ms / 1000 / run.seconds,
            f"{workload.name}_limit_spread": max(limits) / min(limits),
            f"{workload.name}_cached": counters.cached_tokens / max(counters.prompt_tokens, 1),
            f"{workload.name}_width": run.engine.width,
        }

    def _rates(self, workload: Workload, groups: dict[str, tuple[limit.Prompts, list[int]]], engine: Engine) -> limit.Rates:
        name, (prompts, lengths) = max(groups.items(), key=lambda pair: len(pair[1][0]))
        mean = round(sum(lengths) / len(lengths)) if lengths else 32
        return limit.measure(self.model, self.gguf(workload, name), prompts, mean, width=engine.width, n_ctx=self.settings.n_ctx)


class EngineRun:
    """The engine alone: a work a group, requests read on another thread, as in the child process."""

    def __init__(self, model: Model, settings: Settings, files: dict[str, AdapterFile]) -> None:
        self._events: list[Event] = []
        self.engine = Engine(model, settings, self._events.append)
        self._files = files
        self.seconds = 0.0
        self._groups: dict[str, tuple[limit.Prompts, list[int]]] = {}

    def groups(self, workload: Workload) -> dict[str, tuple[limit.Prompts, list[int]]]:
        """Prompts of each group in tokens, and places for the lengths of their answers."""
        for adapter, jobs in workload.groups.items():
            requests = [self.engine.reader.read(job.endpoint, msgspec.json.encode(job.request)) for job in jobs]
            self._groups[adapter] = ([request.prompt for request in requests if isinstance(request, Request)], [])
        return self._groups

    def all(self, workload: Workload) -> None:
        """Run every job; afterwards the groups' lengths are those of the answers."""
        works = [
            Work(adapter, self._files[adapter], [_item(f"bench/{adapter}/{number}", job) for number, job in enumerate(jobs)])
            for adapter, jobs in workload.groups.items()
        ]
        ended = 0

        def read() -> None:
            for work in works:
                self.engine.submit(work)

        reading = threading.Thread(target=read, daemon=True)
        started = time.perf_counter()
        reading.start()
        while ended < len(workload.jobs):
            self.engine.step(wait_s=None)
            ended += sum(isinstance(event, Outcome) for event in self._events)
            self._book()
        self.seconds = time.perf_counter() - started
        reading.join()

    def _book(self) -> None:
        for event in self._events:
            if isinstance(event, Outcome):
                if event.response is None:
                    raise SystemExit(f"{event.ref} failed: {event.error}")
                self._groups[event.batch][1].append(event.response["usage"]["completion_tokens"])
        self._events.clear()


def _item(ref: str, job: Job) -> WorkItem:
    return WorkItem(ref, job.endpoint, msgspec.Raw(msgspec.json.encode(job.request)))


def ratios(metrics: dict[str, Any]) -> dict[str, float]:
    """`X_fleet_vs_limit` and the like, from the jobs a second."""
    rates: dict[str, dict[str, float]] = defaultdict(dict)
    for key, value in metrics.items():
        workload, _, column = key.removesuffix("_jobs_per_s").partition("_")
        if key.endswith("_jobs_per_s"):
            rates[workload][column] = value
    found = {}
    for workload, by in rates.items():
        ours = by.get("fleet", by.get("engine"))
        for column in ("engine", "fleet"):
            if column in by and "limit" in by:
                found[f"{workload}_{column}_vs_limit"] = by[column] / by["limit"]
        for peer in ("server", "server_sorted", "naive"):
            if peer in by and ours:
                found[f"{workload}_vs_{peer}"] = ours / by[peer]
    return found


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--only", default="a,l,b,c,m", help="workloads (default: all)")
    parser.add_argument("--columns", default=",".join(COLUMNS), help="what to time beside the limit (default: all)")
    parser.add_argument("--keep", type=Path, help="make the adapters in this folder and leave them there")
    args = parser.parse_args()
    if "GOMP_SPINCOUNT" not in os.environ:  # is read when the library is loaded, and the engine's own process has it
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GOMP_SPINCOUNT": str(SPINS)})
    with tempfile.TemporaryDirectory(prefix="lorayard-") as made:
        folder = args.keep or Path(made)
        settings = Settings.load().model_copy(update={"state_dir": folder / "state"})
        bench = Bench(settings, folder, quick=args.quick)
        for name in args.only.split(","):
            bench.run(bench.maker.make(name), args.columns.split(","))
    found = ratios(bench.metrics) | {key: bench.metrics[key] for key in DETAILS if key in bench.metrics}
    table = Table("metric", "value")
    for key, value in found.items():
        table.add_row(key, f"{value:.2f}")
    out.print(table)
    report.write(args.json, "throughput", bench.metrics | found)


if __name__ == "__main__":
    main()
