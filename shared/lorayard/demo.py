"""`lorayard demo`: real questions for the shipped adapters and the base model, from two producers at once, through the whole fleet."""

from __future__ import annotations

import json
import random
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lorayard import embedded
from lorayard.client import Client
from lorayard.errors import LorayardError, SetupError
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import KeyRing
from lorayard.settings import Settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRODUCERS = ("acme", "globex")
BASE_SHARE = 3  # one question in so many also goes to the base model, for comparison
CHUNK = 8
STAGES = ("queued", "dispatched", "on_deck", "adapter_load", "adapter_switch", "prefill", "decode", "stored", "total")


class Example(NamedTuple):
    """An adapter that ships: its name, card and held-out lines."""

    name: str
    card: dict[str, Any]
    lines: list[dict[str, Any]]


def shipped() -> list[Example]:
    """The adapters in `examples/adapters/` with their data. Raises `SetupError` outside a checkout."""
    found = []
    for card in sorted((EXAMPLES / "adapters").glob("*/card.json")):
        data = EXAMPLES / "data" / card.parent.name / "dev.jsonl"
        found.append(Example(card.parent.name, json.loads(card.read_text()), [json.loads(line) for line in data.read_text().splitlines()]))
    if len(found) < 2:
        raise SetupError(f"no adapters in {EXAMPLES / 'adapters'}: the demo runs from a checkout of the project")
    return found


def job_for(example: Example, line: dict[str, Any], *, with_adapter: bool) -> dict[str, Any]:
    """One question as a job. The expected answer rides along in `metadata`, which no model sees."""
    messages = [{"role": "system", "content": example.card["system_prompt"]}, {"role": "user", "content": line["text"]}]
    return {
        "adapter": example.name if with_adapter else None,
        "request": {"messages": messages, "temperature": 0, "max_tokens": example.card["max_tokens"]},
        "metadata": {"task": example.name, "expected": line["label"] if "label" in line else line["slots"]},
    }


def is_right(document: dict[str, Any]) -> bool:
    """Whether the answer is the label letter by letter, or JSON with exactly the expected slots."""
    if document["status"] != "succeeded":
        return False
    expected = document["metadata"]["expected"]
    text = document["response"]["choices"][0]["message"]["content"].strip()
    if isinstance(expected, str):
        return bool(text == expected)
    try:
        return bool(json.loads(text) == expected)
    except ValueError:
        return False


def make_jobs(examples: Sequence[Example], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """About `count` jobs in random order: as many of each adapter, and every third question also for the base model."""
    each = max(1, round(count / len(examples) / (1 + 1 / BASE_SHARE)))
    jobs = []
    for example in examples:
        lines = rng.sample(example.lines, min(each, len(example.lines)))
        jobs += [job_for(example, line, with_adapter=True) for line in lines]
        jobs += [job_for(example, line, with_adapter=False) for line in lines[::BASE_SHARE]]
    rng.shuffle(jobs)
    return jobs


def run_demo(settings: Settings, out: Console, *, jobs: int, seed: int = 7) -> list[dict[str, Any]]:
    """Register the adapters, submit, wait with a progress bar, print the tables. Returns the documents in order of submission."""
    examples = shipped()
    with Client(settings=settings) as operator:
        for example in examples:
            operator.add_adapter(example.name, EXAMPLES / "adapters" / example.name, public=True)
    with connect(embedded.redis_url(settings)) as client:
        keys = [KeyRing(client).create(tenant) for tenant in PRODUCERS]
    rng = random.Random(seed)  # noqa: S311 — an order, not a secret
    todo = make_jobs(examples, jobs, rng)
    out.print(f"{len(todo)} real questions for {', '.join(e.name for e in examples)} and the base model, from {len(PRODUCERS)} producers.")
    documents = _produce(settings, keys, todo, out)
    _report(out, examples, documents)
    return documents


def _produce(settings: Settings, keys: list[str], todo: list[dict[str, Any]], out: Console) -> list[dict[str, Any]]:
    """Each producer submits its half in small requests and waits for its answers; documents in the order in which they were enqueued."""
    documents: list[dict[str, Any]] = []
    failures: list[LorayardError] = []
    lock = threading.Lock()
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as bar:
        task = bar.add_task("answers", total=len(todo))

        def produce(key: str, mine: list[dict[str, Any]]) -> None:
            try:
                with Client(key=key, settings=settings) as client:
                    rows = [row for start in range(0, len(mine), CHUNK) for row in client.submit(mine[start : start + CHUNK])]
                    place = {row["id"]: i for i, row in enumerate(rows)}
                    for document in client.results(list(place)):
                        with lock:
                            documents.append(document | {"_place": place[document["id"]]})
                        bar.advance(task)
            except LorayardError as error:
                failures.append(error)

        threads = [threading.Thread(target=produce, args=(key, todo[i :: len(keys)]), daemon=True) for i, key in enumerate(keys)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return sorted(documents, key=lambda d: (d["enqueued_ms"], d["_place"]))


def switches(digests: Iterable[str | None]) -> int:
    """How often neighbours differ."""
    return sum(a != b for a, b in pairwise(digests))


def switches_made(documents: Sequence[dict[str, Any]]) -> int:
    """Between batches, in the order in which each worker began them."""
    began: dict[str, dict[str, tuple[float, str | None]]] = defaultdict(dict)
    for d in documents:
        if d["batch"]:
            lat = d["latencies_ms"]
            at = d["enqueued_ms"] + lat.get("queued", 0) + lat.get("dispatched", 0)
            began[d["worker"]][d["batch"]] = (at, d["adapter_digest"])
    return sum(switches(digest for _, digest in sorted(batches.values(), key=lambda b: b[0])) for batches in began.values())


def _report(out: Console, examples: Sequence[Example], documents: list[dict[str, Any]]) -> None:
    seconds = (max(d["ended_ms"] for d in documents) - min(d["enqueued_ms"] for d in documents)) / 1000
    ended = sum(d["status"] == "succeeded" for d in documents)
    made, fcfs = switches_made(documents), switches(d["adapter_digest"] for d in documents)
    out.print(f"\n{ended} of {len(documents)} jobs succeeded in {seconds:.1f} s: {len(documents) / seconds:.1f} jobs/s.")
    out.print(f"Adapter switches: {made}; first come, first served would have made {fcfs}.\n")
    accuracy = Table("adapter", "jobs", "right", "base model", "held-out score in its card", title="Accuracy")
    for example in examples:
        own = [d for d in documents if d["adapter"] == example.name]
        base = [d for d in documents if d["adapter"] is None and d["metadata"]["task"] == example.name]
        accuracy.add_row(example.name, str(len(own)), _share(own), _share(base), f"{example.card['score']:.1%}")
    out.print(accuracy)
    stages = Table("stage", "p50 ms", "p95 ms", title="Latencies")
    for stage in STAGES:
        values = sorted(d["latencies_ms"][stage] for d in documents if stage in d["latencies_ms"])
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=20, method="inclusive")
            stages.add_row(stage, f"{cuts[9]:.1f}", f"{cuts[18]:.1f}")
    out.print(stages)


def _share(documents: Sequence[dict[str, Any]]) -> str:
    return f"{sum(map(is_right, documents)) / len(documents):.1%}" if documents else "–"
