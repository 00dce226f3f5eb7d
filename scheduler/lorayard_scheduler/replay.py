"""`lorayard replay`: what if another policy, more workers, a bigger cache of adapters or more jobs had been there? Told as a table.

Jobs are those of the ledger, which keeps what it knows of each for as long as its result, or of a CSV; what computing costs is what the
fleet's workers have measured of themselves, or what `lorayard bench costs` wrote. The first lines are how it really ran, and how the
simulator thinks that it should have: how far these two agree says what the others are worth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lorayard import embedded
from lorayard.errors import NotFound, SetupError
from lorayard.ledger.connection import connect
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import KeyRing, WorkerRegistry
from lorayard.settings import Settings
from lorayard.terminal import print_json
from lorayard_scheduler import charts, recording
from lorayard_scheduler.costs import Costs
from lorayard_scheduler.planner import Policy
from lorayard_scheduler.recording import Recording
from lorayard_scheduler.simulator import WorkerSpec
from lorayard_scheduler.traces import Mix
from lorayard_scheduler.what_if import OURS, RIVALS, Replay, Result, Scenario, as_it_ran, policies, quantile, scenarios


class Question(NamedTuple):
    """The command's options. Of those that are lists, every combination is tried; an empty one is as it is now."""

    policy: list[str]
    workers: list[int]
    adapters_cached: list[int]
    contexts: list[int]
    speed: list[float]
    hours: float
    most: int
    trace: Path | None
    adapters: int
    tenants: int
    costs: Path | None
    cold: bool
    record: Path | None
    chart: Path | None
    as_json: bool


def command(settings: Settings, **options: Any) -> None:
    """Answer the question of the command line. Raises `LorayardError`."""
    question = Question(**options)
    chosen = policies(question.policy)
    if question.chart:
        charts.check(question.chart)
    found = _recording(settings, question)
    if question.record:
        recording.write(found, question.record)
    specs = _specs(settings, question)
    first = Scenario(OURS, len(specs), settings.adapters_loaded, settings.contexts, 1.0)
    field = scenarios(
        first,
        workers=question.workers,
        adapters_cached=question.adapters_cached,
        contexts=question.contexts,
        speed=question.speed,
        policy=chosen,
    )
    policy = Policy(reserve_ms=1000 * settings.reserve_s, batch_ms=1000 * settings.batch_s, rows_per_width=settings.batch_rows_per_width)
    replay = Replay(found, specs, policy)
    results = [result] if (result := as_it_ran(found)) else []
    with _progress() as bar:
        for scenario in bar.track(field, description="simulating"):
            results.append(replay.run(scenario))
    _tell(found, results, first, question)


def _recording(settings: Settings, question: Question) -> Recording:
    if question.trace:
        targets = ((1.0, float(settings.wait_target_ms("normal"))),)
        found = recording.read(question.trace, Mix(adapters=question.adapters, tenants=question.tenants, targets_ms=targets))
        return found._replace(arrivals=found.arrivals[-question.most :])
    with connect(embedded.redis_url(settings)) as client:
        ledger = Ledger(client, settings.pool, result_ttl_s=settings.result_ttl_s)
        return recording.of_fleet(ledger, KeyRing(client).tenants(), settings, hours=question.hours, most=question.most)


def _specs(settings: Settings, question: Question) -> list[WorkerSpec]:
    """The workers there are. Raises `NotFound` or `SetupError` where nothing says what computing costs."""
    told = _read_costs(question.costs) if question.costs else _measured(settings)
    costs = [Costs.of(worker["width"], worker["costs"]) for _, worker in sorted(told.items())]
    return [WorkerSpec(cost, settings.contexts, settings.adapters_loaded, question.cold) for cost in costs]


def _measured(settings: Settings) -> dict[str, Any]:
    with connect(embedded.redis_url(settings)) as client:
        workers = [w for w in WorkerRegistry(client).workers(settings.pool) if not w.hosted]
    told = {w.name: {"width": w.width, "costs": w.costs} for w in workers if Costs.of(max(1, w.width), w.costs).measured}
    if not told:
        raise NotFound(
            f"no worker of pool {settings.pool!r} has told what its computing costs: start one, "
            "or give --costs FILE, as 'lorayard bench costs' writes it"
        )
    return told


def _read_costs(path: Path) -> dict[str, Any]:
    try:
        told = msgspec.json.decode(path.read_bytes())
        if not told or not all(
            worker["width"] >= 1 and Costs.of(int(worker["width"]), worker["costs"]).measured for worker in told.values()
        ):
            raise ValueError("no worker's costs")
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError):
        raise SetupError(f"{path}: not what 'lorayard bench costs' prints: write it again with 'lorayard bench costs > {path}'") from None
    return dict(told)


# -- telling ------------------------------------------------------------------------------------------------------------------------------


def _tell(found: Recording, results: list[Result], first: Scenario, question: Question) -> None:
    names = [_name(result, first) for result in results]
    out = Console()
    if question.as_json:
        rows = [result.document() | {"name": name} for name, result in zip(names, results, strict=True)]
        print_json({"results": rows, "notes": found.notes})
    else:
        jobs, lasted = len(found.arrivals), _lasted(found.arrivals[-1].at - found.arrivals[0].at)
        adapters, tenants = ({getattr(job, what) for job in found.arrivals} for what in ("adapter", "tenant"))
        kinds = f"{_number(len(adapters), 'adapter')}, {_number(len(tenants), 'tenant')}"
        out.print(f"{_number(jobs, 'job')} in {lasted}: {kinds}; {_number(first.workers, 'worker')}", highlight=False)
        for note in found.notes:
            out.print(f"  {note}", highlight=False)
        out.print(_table(names, results))
    if question.chart:
        charts.draw(dict(zip(names, results, strict=True)), question.chart)
        if not question.as_json:
            out.print(f"chart: {question.chart}", highlight=False)


def _lasted(ms: float) -> str:
    return f"{ms / 1000:.1f} seconds" if ms < 120_000 else f"{ms / 60_000:.1f} minutes"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _name(result: Result, first: Scenario) -> str:
    """Its policy, and what else differs from how things are."""
    now = result.scenario
    if now is None:
        return result.name
    if now == first:
        return "simulated"
    words = [RIVALS.get(now.policy, now.policy)] if now.policy != first.policy else []
    if now.workers != first.workers:
        words.append(_number(now.workers, "worker"))
    if now.adapters_cached != first.adapters_cached:
        words.append(f"{now.adapters_cached} cached")
    if now.contexts != first.contexts:
        words.append(_number(now.contexts, "context"))
    if now.speed != first.speed:
        words.append(f"{now.speed:g}x the jobs")
    return ", ".join(words)


def _table(names: list[str], results: list[Result]) -> Table:
    table = Table("", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("in\ntime", "wait s\np50", "\np95", "\np99", "end s\np95", "jobs\n/s", "\nbusy", "swit-\nches", "adapter\nloads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in zip(names, results, strict=True):
        waits = [f"{quantile(result.waits, part):.1f}" for part in (0.5, 0.95, 0.99)]
        counted = ["" if number is None else str(number) for number in (result.switches, result.loads)]
        busy = "" if result.busy is None else f"{result.busy:.0%}"
        end = f"{quantile(result.totals, 0.95):.1f}"
        table.add_row(name, f"{result.in_time:.1%}", *waits, end, f"{result.jobs_per_s:.2f}", busy, *counted)
    return table


def _progress() -> Progress:
    err = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=err, disable=not err.is_terminal, transient=True)
