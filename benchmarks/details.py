"""Two things beside speed: what a change of adapter takes, and whether answers in company are those given alone."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.workloads import Job, Workload
from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.engine import Engine
from lorayard_workers.runner import AdapterFile, Event, Outcome, Work, WorkItem

_TURNS = 60
_LOGPROBS = {"logprobs": True, "top_logprobs": 2}


def switching(model: Model, settings: Settings, files: list[AdapterFile]) -> dict[str, float]:
    """Milliseconds until a context can compute with an adapter: hot (bound already), in memory, on disk (page cache); MB of one."""
    engine = Engine(model, settings.model_copy(update={"width": 4, "contexts": 2, "adapters_loaded": 4}), lambda _event: None)
    taken: dict[str, list[float]] = {"hot": [], "loaded": [], "disk": []}
    try:
        for turn in range(_TURNS):
            # two in turn are hot; a third that comes often is in memory; the others have been freed when their turn comes again
            number = turn % 2 if turn % 6 < 4 else (2 if turn % 6 == 4 else 3 + (turn // 6) % (len(files) - 3))
            started = time.perf_counter()
            acquired = engine.pool.acquire(files[number])
            ms = 1000 * (time.perf_counter() - started)
            assert acquired is not None
            taken[acquired[1].temperature].append(ms)
    finally:
        engine.close()
    found = {f"switch_{name}_ms": statistics.median(ms) for name, ms in taken.items() if ms}
    found["load_disk_ms"] = found.pop("switch_disk_ms", float("nan"))
    return found | {"adapter_mb": Path(files[0].path).stat().st_size / 1e6}


def answers(model: Model, settings: Settings, workload: Workload, files: dict[str, AdapterFile]) -> dict[str, float]:
    """`answers_equal`: the share of jobs with the same text in company and alone; `answers_gap`: of the others, the largest difference of
    the log-probabilities of the two likeliest tokens where the texts part."""
    together = _run(model, settings, workload.jobs, files, at_once=True)
    alone_settings = settings.model_copy(update={"width": 1, "share_prefixes": False, "contexts": 1})
    alone = _run(model, alone_settings, workload.jobs, files, at_once=False)
    gaps = [gap for ours, theirs in zip(together, alone, strict=True) if (gap := _gap(ours, theirs)) is not None]
    return {"answers_equal": 1 - len(gaps) / len(alone), "answers_gap": max(gaps, default=0.0)}


def _run(model: Model, settings: Settings, jobs: list[Job], files: dict[str, AdapterFile], *, at_once: bool) -> list[list[dict[str, Any]]]:
    """The tokens of each answer with their log-probabilities."""
    events: list[Event] = []
    engine = Engine(model, settings, events.append)
    try:
        for number, job in enumerate(jobs):
            request = msgspec.Raw(msgspec.json.encode(job.request | _LOGPROBS))
            engine.submit(Work(str(number), files[job.adapter], [WorkItem(f"bench/{number}", job.endpoint, request)]))
            while not at_once and engine.step():
                pass
        while engine.step():
            pass
    finally:
        engine.close()
    found = {event.ref: event.response for event in events if isinstance(event, Outcome)}
    return [(found[f"bench/{number}"] or {})["choices"][0]["logprobs"]["content"] for number in range(len(jobs))]


def _gap(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float | None:
    """None for equal answers; else how much likelier the one token was than the other, alone."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine["token"] != other["token"]:
            first, second = (entry["logprob"] for entry in other["top_logprobs"])
            return float(first - second)
    return None if len(ours) == len(theirs) else float("inf")
