"""What the tests of the llama.cpp backend share: random adapters as GGUF files, and works of small chat requests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np

from lorayard_workers.llama.engine import Engine
from lorayard_workers.runner import AdapterFile, Event, Outcome, Work, WorkItem

CHAT = "/v1/chat/completions"
SIZES = {"attn_q": (576, 576), "attn_v": (576, 192)}  # (inputs, outputs) of SmolLM2-135M


def write_adapter(
    path: Path, seed: int, *, scale: float = 0.3, alpha: Any = 8.0, n_in: int = 576, rank: int = 4, layers: Iterable[int] = range(0, 30, 3)
) -> AdapterFile:
    """A random adapter on q and v, strong enough to change what the model says."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    add = writer.add_string if isinstance(alpha, str) else writer.add_float32
    add("adapter.lora.alpha", alpha)
    for layer in layers:
        for module, (_, outputs) in SIZES.items():
            writer.add_tensor(f"blk.{layer}.{module}.weight.lora_a", (scale * random.standard_normal((rank, n_in)) / 8).astype(np.float32))
            writer.add_tensor(f"blk.{layer}.{module}.weight.lora_b", (scale * random.standard_normal((outputs, rank))).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AdapterFile(f"digest-{path.stem}", str(path))


def item(ref: str, question: str, *, company: int = 0, endpoint: str = CHAT, **options: Any) -> WorkItem:
    """A greedy chat request of at most 8 tokens, unless told otherwise."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0} | options
    return WorkItem(ref, endpoint, msgspec.Raw(json.dumps(body).encode()), company)


def work(batch: str, adapter: AdapterFile | None, *items: WorkItem) -> Work:
    return Work(batch, adapter, list(items))


def finish(engine: Engine) -> None:
    while engine.step():
        engine.cache.check_integrity()


def outcomes(events: Iterable[Event]) -> dict[str, Outcome]:
    """The ends of jobs by ref; each must have one."""
    found: dict[str, Outcome] = {}
    for event in events:
        if isinstance(event, Outcome):
            assert event.ref not in found, f"{event.ref} ended twice"
            found[event.ref] = event
    return found


def text(outcome: Outcome) -> str:
    assert outcome.response is not None, outcome.error
    choice = outcome.response["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def alike(left: Outcome, right: Outcome) -> bool:
    """Whether two answers with the log-probabilities of two tokens agree up to where, if anywhere, two tokens were about as likely."""
    assert left.response is not None
    assert right.response is not None
    contents = (response["choices"][0]["logprobs"]["content"] for response in (left.response, right.response))
    ours, theirs = contents
    for one, other in zip(ours, theirs, strict=False):
        if one["token"] != other["token"]:
            first, second = (entry["logprob"] for entry in one["top_logprobs"])
            return bool(first - second < 0.03)
        if abs(one["logprob"] - other["logprob"]) > 0.03:
            return False
    return len(ours) == len(theirs)
