"""Do the shipped adapters answer through the fleet as they do alone?

    python -m benchmarks.accuracy [--quick] [--compare N] [--json PATH] [--write-cards]

Held-out questions of all adapters go through a whole fleet at once, in random order, with and without the adapter. The same questions, with
the adapter, are then asked of llama-cpp-python's own `Llama`, one at a time: other code for template, sampling and stopping, the same
weights and the same GGUF of the adapter. Data: `dev.jsonl` of LORAYARD_DATA, else of examples/data.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from llama_cpp import Llama
from rich.console import Console
from rich.table import Table

from benchmarks import report
from lorayard.adapters import BaseModel
from lorayard.adapters.conversion import write_gguf
from lorayard.adapters.peft import read_adapter
from lorayard.client import Client
from lorayard.demo import EXAMPLES, Example, is_right, job_for, shipped
from lorayard.embedded import redis_url
from lorayard.fleet import Fleet
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import WorkerRegistry
from lorayard.settings import Settings
from lorayard_workers.llama.process import resolve_model

QUICK_LINES = 40
out = Console()


def held_out(example: Example, quick: bool) -> list[dict[str, Any]]:
    lines = example.lines
    if "LORAYARD_DATA" in os.environ:
        path = Path(os.environ["LORAYARD_DATA"]) / example.name / "dev.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[:QUICK_LINES] if quick else lines


def ask(example: Example, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A job a line, numbered: texts repeat."""
    jobs = [job_for(example, line, with_adapter=True) for line in lines]
    return [job | {"metadata": job["metadata"] | {"line": i}} for i, job in enumerate(jobs)]


def through_the_fleet(
    settings: Settings, questions: dict[str, list[dict[str, Any]]], compare: int | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The documents of all jobs, and the base model as the worker told it."""
    jobs = [job for rows in questions.values() for job in rows]
    jobs += [job | {"adapter": None} for rows in questions.values() for job in rows[:compare]]
    random.Random(3).shuffle(jobs)
    with Fleet(settings) as fleet:
        for _ in fleet.wait_ready():
            pass
        with Client(settings=settings) as client:
            for name in questions:
                client.add_adapter(name, EXAMPLES / "adapters" / name, public=True)
            documents = list(client.results([row["id"] for row in client.submit(jobs)]))
        with connect(redis_url(settings)) as redis:
            base = WorkerRegistry(redis).base(settings.pool)
    assert base is not None
    return documents, base


def directly(model: Path, gguf: Path, jobs: list[dict[str, Any]]) -> list[str]:
    """The same requests of llama-cpp-python, one after another."""
    llama = Llama(str(model), lora_path=str(gguf), n_ctx=2048, verbose=False)
    return [str(llama.create_chat_completion(**job["request"])["choices"][0]["message"]["content"]) for job in jobs]


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument(
        "--compare", type=int, metavar="N", help="ask the base model, and llama-cpp-python, only N questions of each adapter"
    )
    parser.add_argument("--write-cards", action="store_true", help="write score and base_score into the adapters' cards")
    args = parser.parse_args()
    examples = {example.name: example for example in shipped()}
    questions = {name: ask(example, held_out(example, args.quick)) for name, example in examples.items()}
    with tempfile.TemporaryDirectory(prefix="lorayard-") as folder:
        settings = Settings.load().model_copy(update={"state_dir": Path(folder)})
        documents, base = through_the_fleet(settings, questions, args.compare)
        table = Table("adapter", "questions", "fleet", "base model", "alone", "fleet on those", "same text", "another's labels")
        metrics: dict[str, Any] = {}
        for name, example in examples.items():
            gguf = Path(folder) / f"{name}.gguf"
            write_gguf(read_adapter(EXAMPLES / "adapters" / name), msgspec.convert(base, BaseModel), gguf)
            alone = directly(resolve_model(settings), gguf, questions[name][: args.compare])
            row = compare(name, questions, documents, alone)
            metrics |= {f"{name}_{key}": value for key, value in row.items()}
            shares = (f"{row[key]:.1%}" for key in ("fleet", "base", "alone", "fleet_on_those", "same_text"))
            table.add_row(name, str(len(questions[name])), *shares, str(row["foreign"]))
            if args.write_cards and not args.quick:
                card = EXAMPLES / "adapters" / name / "card.json"
                scores = {"score": round(row["fleet"], 4), "base_score": round(row["base"], 4)}
                card.write_text(json.dumps(example.card | scores, indent=2) + "\n")
    out.print(table)
    report.write(args.json, "accuracy", metrics)


def compare(name: str, questions: dict[str, list[dict[str, Any]]], documents: list[dict[str, Any]], alone: list[str]) -> dict[str, Any]:
    """Accuracy of one adapter through the fleet, alone, and of the base; how often the texts are the same; labels that are not its own."""
    ours = {d["metadata"]["line"]: d for d in documents if d["adapter"] == name}
    base = [d for d in documents if d["adapter"] is None and d["metadata"]["task"] == name]
    expected = {task: [row["metadata"]["expected"] for row in rows] for task, rows in questions.items()}
    labels = {task: {e for e in found if isinstance(e, str)} for task, found in expected.items()}
    foreign = set[str]().union(*(found for task, found in labels.items() if task != name)) - labels[name]
    right = same = ours_right = 0
    for job, text in zip(questions[name], alone, strict=False):  # where fewer were asked alone, of those
        document = ours[job["metadata"]["line"]]
        ours_right += is_right(document)
        answer = document["response"]["choices"][0]["message"]["content"] if document["response"] else None
        same += answer == text
        right += is_right({"status": "succeeded", "metadata": job["metadata"], "response": {"choices": [{"message": {"content": text}}]}})
    answers = [d["response"]["choices"][0]["message"]["content"].strip() for d in ours.values() if d["response"]]
    return {
        "fleet": sum(map(is_right, ours.values())) / len(ours),
        "alone": right / len(alone),
        "fleet_on_those": ours_right / len(alone),
        "same_text": same / len(alone),
        "base": sum(map(is_right, base)) / len(base),
        "foreign": sum(answer in foreign for answer in answers),
    }


if __name__ == "__main__":
    main()
