"""A real fleet on this machine against the simulator, and quotes against what became of them there.

Jobs arrive at a share of what the worker's own measurements say it can do, once it has run some like them; one of five is urgent.
Afterwards the same arrivals, with the tokens that were counted, are simulated with the mean of the costs that the worker told of itself
meanwhile (`lorayard bench costs`), some times, with arrivals that are milliseconds apart from these: where all is busy that alone can make
a job wait for seconds, so the median counts. Two kinds:

words  completions of random words for 12 adapters (Zipf), a Poisson process with one burst: what the simulator was once fitted on
chats  questions behind a system prompt of each of 6 adapters, in bursts of 6, less of them: what it was never fitted on
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import eta
from benchmarks.ports import free_port
from benchmarks.workloads import vocabulary, write_adapter
from benchmarks.yard import until
from lorayard import embedded
from lorayard.adapters import BaseModel
from lorayard.client import Client
from lorayard.fleet import Fleet
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler import traces
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Fleet as SimulatedFleet
from lorayard_scheduler.simulator import Trace, WorkerSpec

SECONDS, QUICK_SECONDS = 170.0, 25.0
WARM_UP = 48  # jobs of the same kind, from which the worker learns what such jobs cost it
LISTEN_S = 5.0
RUNS = 15
_APART_MS = 50.0
URGENT = 0.2
SEED = 7


class Kind(NamedTuple):
    """A kind of workload. `burst`: the part of the jobs that comes at once, when two thirds of the time are over; `together`: so many
    come together all the time; `system`: words of an adapter's own system prompt, 0 for completions."""

    adapters: int
    load: float
    burst: float = 0.0
    together: float = 1.0
    system: int = 0


KINDS = {"words": Kind(12, 0.7, burst=0.1), "chats": Kind(6, 0.6, together=6.0, system=60)}


class Job(NamedTuple):
    """When it is to be submitted (s), and what."""

    at: float
    spec: dict[str, Any]


class Done(NamedTuple):
    """A job as the ledger has it in the end, its adapter by rank, and what it was quoted at first."""

    adapter: int
    document: dict[str, Any]
    quote: dict[str, Any] | None

    @property
    def wait(self) -> float:
        """From enqueueing to its start, ms."""
        times = self.document["latencies_ms"]
        return float(times["total"] - times["prefill"] - times["decode"] - times["stored"])


def compare(out: Console, *, quick: bool, name: str = "words", seed: int = SEED) -> dict[str, Any]:
    """Run it, simulate it, judge the quotes. The figures of `words` and the usual seed are the benchmark's; `real_runs` has all."""
    kind = KINDS[name]
    with tempfile.TemporaryDirectory(prefix="lorayard-") as folder, _fleet(Path(folder), kind.adapters) as (settings, client, worker):
        first = workload(kind, Costs.of(worker.width, worker.costs), SECONDS, seed + 1)[:WARM_UP]
        list(client.results([row["id"] for row in client.submit([job.spec for job in first])]))
        worker = until(lambda: _worker(settings), 30)
        costs = Costs.of(worker.width, worker.costs)
        jobs = workload(kind, costs, QUICK_SECONDS if quick else SECONDS, seed)
        out.print(f"{name}, seed {seed}: {len(jobs)} jobs in {jobs[-1].at:.0f} s, width {worker.width}")
        with _listening(settings) as told:
            done = list(_submit(client, jobs))
    trace, meant = recorded(done, kind.adapters), mean_costs(told)
    spec = WorkerSpec(Costs.of(worker.width, meant), settings.contexts, settings.adapters_loaded)
    real = _figures([d.wait for d in done], max(d.document["ended_ms"] for d in done) - done[0].document["enqueued_ms"])
    simulated = simulate(trace, spec)
    table = Table("real against simulated", *real)
    for which, figures in (("real", real), ("simulated", simulated)):
        table.add_row(which, *(f"{value:.2f}" for value in figures.values()))
    out.print(table)
    judged = {f"real_{figure}": value for figure, value in eta.judge(_quoted(done)).items()}
    out.print(judged)
    metrics: dict[str, Any] = {f"sim_vs_real_{figure}": simulated[figure] / real[figure] for figure in real} | judged
    metrics |= {"real": real, "simulated": simulated, "costs": meant}
    return (metrics if (name, seed) == ("words", SEED) else {}) | {"real_runs": {f"{name}-{seed}": metrics}}


@contextmanager
def _listening(settings: Settings) -> Iterator[list[Mapping[str, Any]]]:
    """The costs that the worker tells of itself, now and then and at the end."""
    told: list[Mapping[str, Any]] = []
    over = threading.Event()

    def listen() -> None:
        while not over.wait(LISTEN_S):
            if (worker := _worker(settings)) is not None:
                told.append(worker.costs)

    thread = threading.Thread(target=listen, name="costs")
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join()
    told.append(until(lambda: _worker(settings), 30).costs)


def mean_costs(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of some reports: the mean times, a prompt's token among them; of switches what was said last."""
    steps = {rows: statistics.fmean(one["step_ms"][rows] for one in told if rows in one["step_ms"]) for rows in told[-1]["step_ms"]}
    prefill = statistics.harmonic_mean([one["prefill_tokens_per_s"] for one in told])
    return {"prefill_tokens_per_s": prefill, "step_ms": steps, "switch_ms": told[-1]["switch_ms"]}


def simulate(trace: Trace, spec: WorkerSpec) -> dict[str, float]:
    """The medians of `RUNS` runs, of which all but the first have arrivals later by up to `_APART_MS`."""
    runs = []
    for seed in range(RUNS):
        late, run = random.Random(seed), copy(trace)
        run.arrivals = array("d", sorted(at + (late.uniform(0, _APART_MS) if seed else 0.0) for at in trace.arrivals))
        outcome = SimulatedFleet(run, [spec], Lorayard()).run()
        runs.append(_figures(outcome.waits(), max(outcome.ended) - run.arrivals[0]))
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


def _figures(waits: Sequence[float], took_ms: float) -> dict[str, float]:
    """Jobs a second, and waits in seconds."""
    cuts = statistics.quantiles(waits, n=20)
    return {"throughput": 1000 * len(waits) / took_ms, "p50_wait": cuts[9] / 1000, "p95_wait": cuts[18] / 1000}


def workload(kind: Kind, costs: Costs, seconds: float, seed: int) -> list[Job]:
    """By the rate that the load is of the worker's capacity."""
    rng = random.Random(seed)
    words = vocabulary()
    weights = [1 / (rank + 1) for rank in range(kind.adapters)]
    sizes = [(rng.randrange(10, 100), min(64, 4 + int(rng.expovariate(1 / 16)))) for _ in range(200)]
    mean = Work(1.4 * statistics.fmean(size[0] for size in sizes), 0, statistics.fmean(size[1] for size in sizes))
    rate = kind.load * 1000 / costs.job_ms(mean)
    count = round(rate * seconds)
    at, jobs, burst = 0.0, [], round(kind.burst * count)
    gaps = traces.bursty if kind.together > 1 else traces.poisson
    more: dict[str, Any] = {"burst": kind.together} if kind.together > 1 else {}
    times = []
    for gap in gaps(count - burst, rate * (1 - kind.burst), seed=seed, **more):
        at += gap
        times.append(at)
    times = sorted([*times, *([times[2 * len(times) // 3]] * burst)])
    systems = [" ".join(rng.choices(words, k=kind.system)) for _ in weights]
    for when in times:
        (rank,), (length, tokens) = rng.choices(range(kind.adapters), weights), rng.choice(sizes)
        request, endpoint = _request(systems[rank], " ".join(rng.choices(words, k=length)), tokens)
        priority = "high" if rng.random() < URGENT else "normal"
        jobs.append(Job(when, {"adapter": f"adapter-{rank}", "request": request, "endpoint": endpoint, "priority": priority}))
    return jobs


def _request(system: str, text: str, tokens: int) -> tuple[dict[str, Any], str]:
    more = {"max_tokens": tokens, "temperature": 0}
    if not system:
        return {"prompt": text} | more, "/v1/completions"
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]} | more, "/v1/chat/completions"


@contextmanager
def _fleet(folder: Path, adapters: int) -> Iterator[tuple[Settings, Client, WorkerInfo]]:
    """`lorayard up` with one worker, but for that as it ships, and the adapters."""
    own = {"state_dir": folder / "state", "api_port": free_port(), "flower_port": free_port(), "llama_workers": 1}
    settings = Settings.load().model_copy(update=own)
    os.environ |= {f"LORAYARD_{name.upper()}": str(getattr(settings, name)) for name in ("state_dir", "api_port", "flower_port")}
    with Fleet(settings) as fleet:
        for _ in fleet.wait_ready():
            pass
        with Client(settings=settings) as client:
            with connect(embedded.redis_url(settings)) as store:
                base = BaseModel(**(WorkerRegistry(store).base(settings.pool) or {}))
            for rank in range(adapters):
                client.add_adapter(f"adapter-{rank}", write_adapter(folder / f"adapter-{rank}", base, rank), public=True)
            warm = [
                {"adapter": f"adapter-{rank}", "request": {"prompt": "Hello", "max_tokens": 2}, "endpoint": "/v1/completions"}
                for rank in range(adapters)
            ]
            list(client.results([row["id"] for row in client.submit(warm)]))
            yield settings, client, until(lambda: _worker(settings), 30)


def _worker(settings: Settings) -> WorkerInfo | None:
    with connect(embedded.redis_url(settings)) as store:
        return next((w for w in WorkerRegistry(store).workers(settings.pool) if w.costs.get("step_ms")), None)


def _submit(client: Client, jobs: Sequence[Job]) -> Iterator[Done]:
    """Each at its time; what is late goes together."""
    begun, rows, place = time.monotonic(), [], 0
    while place < len(jobs):
        time.sleep(max(0.0, begun + jobs[place].at - time.monotonic()))
        due = [job.spec for job in jobs[place:] if job.at <= time.monotonic() - begun]
        rows += client.submit(due)
        place += len(due)
    specs = {row["id"]: (job.spec, row.get("eta")) for job, row in zip(jobs, rows, strict=True)}
    found = []
    for document in client.results(list(specs)):
        if document["status"] != "succeeded":
            raise SystemExit(f"a job ended as {document['status']}: {document['error']}")
        spec, quote = specs[document["id"]]
        found.append(Done(int(spec["adapter"].partition("-")[2]), document, quote))
    yield from sorted(found, key=lambda d: d.document["enqueued_ms"])


def recorded(done: Sequence[Done], adapters: int) -> Trace:
    """What came, as it came, with the tokens that were counted."""
    settings = Settings.load()
    usage = [d.document["response"]["usage"] for d in done]
    first = done[0].document["enqueued_ms"]
    return Trace(
        array("d", [float(d.document["enqueued_ms"] - first) for d in done]),
        array("l", [d.adapter for d in done]),
        array("l", [0] * len(done)),
        array("l", [u["prompt_tokens"] for u in usage]),
        array("l", [max(1, u["completion_tokens"]) for u in usage]),
        array("d", [float(settings.wait_target_ms(d.document["priority"])) for d in done]),
        [f"adapter-{rank}" for rank in range(adapters)],
        ["default"],
        [_shared([u for d, u in zip(done, usage, strict=True) if d.adapter == rank]) for rank in range(adapters)],
    )


def _shared(usage: Sequence[dict[str, Any]]) -> int:
    """Of an adapter's prompts: the median of the tokens that were found computed."""
    return int(statistics.median([(u.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for u in usage] or [0]))


def _quoted(done: Sequence[Done]) -> Iterator[eta.Row]:
    """After a quarter of the time, in which they are learnt."""
    first, last = done[0].document["enqueued_ms"], done[-1].document["enqueued_ms"]
    ranks = {rank: place for place, (rank, _) in enumerate(Counter(d.adapter for d in done).most_common())}
    for d in done:
        at = d.document["enqueued_ms"]
        if d.quote is not None and at >= first + (last - first) / 4:
            like = eta.like(ranks[d.adapter], 0.0 if d.document["priority"] == "high" else 1.0, at - first)
            yield eta.Row(d.quote["median_ms"] - at, d.quote["p80_ms"] - at, d.document["latencies_ms"]["total"], like)
