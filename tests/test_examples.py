"""What ships in examples/: adapters, cards, samples, the training script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lorayard.demo import EXAMPLES, is_right, make_jobs, shipped, switches, switches_made
from lorayard_workers.llama.process import DEMO_NAME

ADAPTERS = sorted(path for path in (EXAMPLES / "adapters").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
def test_a_shipped_adapter_is_small_float16_and_names_its_public_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == DEMO_NAME
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size <= 2_000_000
    with safe_open(weights, framework="numpy") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118 — not a mapping


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
def test_a_card_says_how_to_use_the_adapter_and_how_good_it_is(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    assert set(card) >= {"system_prompt", "data", "licence", "steps", "score", "base_score", "max_tokens"}
    assert 0.5 < card["score"] <= 1
    assert card["base_score"] < card["score"]
    assert card["steps"] > 0


def test_the_demo_asks_at_least_300_questions_of_every_adapter_and_the_base() -> None:
    import random

    jobs = make_jobs(shipped(), 340, random.Random(1))
    assert len(jobs) >= 300
    by_adapter = {name: sum(job["adapter"] == name for job in jobs) for name in {job["adapter"] for job in jobs}}
    assert len(by_adapter) >= 3
    assert min(by_adapter.values()) >= 30
    assert {name for job in jobs for name in job["request"]} == {"messages", "temperature", "max_tokens"}  # no answer rides along


def _document(expected: Any, text: str, status: str = "succeeded") -> dict[str, Any]:
    return {"status": status, "metadata": {"expected": expected}, "response": {"choices": [{"message": {"content": text}}]}}


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("card_arrival", "card_arrival", True),
        ("card_arrival", " card_arrival\n", True),
        ("card_arrival", "card arrival", False),
        ({"city": "Rome"}, '{"city": "Rome"}', True),
        ({"city": "Rome", "state": "NY"}, '{"state": "NY", "city": "Rome"}', True),
        ({"city": "Rome"}, '{"city": "Rome", "state": "NY"}', False),
        ({"city": "Rome"}, "Rome", False),
    ],
)
def test_an_answer_is_right_letter_by_letter_or_slot_by_slot(expected: Any, text: str, right: bool) -> None:
    assert is_right(_document(expected, text)) is right
    assert not is_right(_document(expected, text, "failed"))


def test_switches_are_counted_between_neighbours_and_between_batches_of_a_worker() -> None:
    assert switches(["a", "a", None, "a", "b"]) == 3

    def job(worker: str, batch: str, digest: str, at: int) -> dict[str, Any]:
        return {
            "worker": worker,
            "batch": batch,
            "adapter_digest": digest,
            "enqueued_ms": at,
            "latencies_ms": {"queued": 0, "dispatched": 0},
        }

    documents = [
        job("w1", "b3", "a", 30),
        job("w1", "b1", "a", 10),
        job("w1", "b2", "b", 20),
        job("w2", "b4", "b", 15),
        job("w1", "b1", "a", 10),
    ]
    assert switches_made(documents) == 2


@pytest.mark.train
@pytest.mark.timeout(900)
def test_the_training_script_makes_an_adapter_from_the_samples(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the train extra: make setup-train")
    script = EXAMPLES / "train_adapter.py"
    command = [sys.executable, str(script), "banking77", "--out", str(tmp_path / "new"), "--steps", "2"]
    subprocess.run(command, check=True, timeout=900)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "card.json"}
