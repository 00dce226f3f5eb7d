"""Work for the throughput benchmark: who asks what of which adapter. The same seed gives the same work.

A  192 jobs, 8 adapters by Zipf, a system prompt of 120 words an adapter, a 30-word question, 32 tokens out, random order
L  the same with system prompts of 600 words
B  real questions for the shipped adapters, with the prompts they were trained on
C  prompt and answer lengths of a production code assistant, scaled to 2,048 tokens; 16 adapters, nothing shared
M  4,000 short jobs for 1,000 adapters by Zipf
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lorayard.adapters import BaseModel
from lorayard.demo import EXAMPLES, job_for, shipped

LENGTHS = Path(__file__).parent / "data" / "azure_code_lengths.csv"
_TRACE_CONTEXT = 8192  # of the model that the trace is from
CONTEXT = 2048  # tokens that a job may take here: some of them fit the cells of a context together
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Job:
    """A request of one adapter, as the API takes it."""

    adapter: str
    request: dict[str, Any]
    endpoint: str = "/v1/chat/completions"

    @property
    def spec(self) -> dict[str, Any]:
        return {"adapter": self.adapter, "request": self.request, "endpoint": self.endpoint}

    @property
    def warm_up(self) -> Job:
        """One like it with the words of its question in reverse: who has computed it knows no more of this one than its system prompt."""
        if "prompt" in self.request:
            request = self.request | {"prompt": _reversed(self.request["prompt"])}
        else:
            *before, last = self.request["messages"]
            request = self.request | {"messages": [*before, last | {"content": _reversed(last["content"])}]}
        return replace(self, request=request)


def _reversed(text: str) -> str:
    return " ".join(reversed(text.split()))


@dataclass(frozen=True)
class Workload:
    """Jobs in random order, and their adapters as PEFT folders by name."""

    name: str
    jobs: list[Job]
    adapters: dict[str, Path] = field(repr=False)

    @property
    def groups(self) -> dict[str, list[Job]]:
        """Jobs by adapter, the largest group first."""
        found: dict[str, list[Job]] = defaultdict(list)
        for job in self.jobs:
            found[job.adapter].append(job)
        return dict(sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0])))


def _shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear modules."""
    n, ff = base.n_embd, base.n_ff
    head = n // base.n_head
    kv = head * base.n_head_kv
    return {
        "self_attn.q_proj": (n, n),
        "self_attn.k_proj": (kv, n),
        "self_attn.v_proj": (kv, n),
        "self_attn.o_proj": (n, n),
        "mlp.gate_proj": (ff, n),
        "mlp.up_proj": (ff, n),
        "mlp.down_proj": (n, ff),
    }


def write_adapter(folder: Path, base: BaseModel, seed: int, *, rank: int = 8, modules: tuple[str, ...] = _ALL) -> Path:
    """A PEFT adapter of random weights, small enough that the model still speaks."""
    if not folder.exists():
        folder.mkdir(parents=True)
        random_ = np.random.default_rng(seed)
        tensors = {}
        for layer, (name, (outputs, inputs)) in itertools.product(range(base.n_layer), _shapes(base).items()):
            if name.rpartition(".")[2] in modules:
                path = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{path}.lora_A.weight"] = random_.standard_normal((rank, inputs), np.float32) / 40
                tensors[f"{path}.lora_B.weight"] = random_.standard_normal((outputs, rank), np.float32) / 100
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.names[0],
            "r": rank,
            "lora_alpha": 2 * rank,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(modules), "bias": "none"}))
    return folder


def vocabulary() -> list[str]:
    words = {word.strip("?.,!'\"").lower() for example in shipped() for line in example.lines for word in line["text"].split()}
    return sorted(word for word in words if word.isalpha())


def _zipf(random_: random.Random, kinds: int, count: int) -> list[int]:
    """`count` draws of 0 … kinds-1 by Zipf's law with exponent 1; each kind at least once where there are enough draws."""
    weights = [1 / (rank + 1) for rank in range(kinds)]
    drawn = random_.choices(range(kinds), weights, k=max(count - kinds, 0))
    return [*range(min(kinds, count)), *drawn]


def _chat(system: str, question: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0}


class Maker:
    """Makes workloads; adapters are written into `folder` when first needed."""

    def __init__(self, folder: Path, base: BaseModel, *, quick: bool) -> None:
        self._folder, self._base, self._quick = folder, base, quick
        self._words = vocabulary()

    def make(self, name: str) -> Workload:
        makers: dict[str, Callable[[], Workload]] = {"a": lambda: self._prompted("a", 120), "l": lambda: self._prompted("l", 600)}
        return (makers | {"b": self._real, "c": self._trace, "m": self._many})[name]()

    def _text(self, random_: random.Random, words: int) -> str:
        return " ".join(random_.choices(self._words, k=words))

    def _workload(self, name: str, jobs: list[Job], random_: random.Random, modules: tuple[str, ...] = _ALL) -> Workload:
        random_.shuffle(jobs)
        kind = "all" if modules == _ALL else "qv"
        names = sorted({job.adapter for job in jobs})
        written = {n: write_adapter(self._folder / f"{kind}-{n}", self._base, int(n.split("-")[1]), modules=modules) for n in names}
        return Workload(name, jobs, written)

    def _prompted(self, name: str, words: int) -> Workload:
        random_ = random.Random(1)
        count = (48 if name == "a" else 24) if self._quick else 192
        systems = [self._text(random_, words) for _ in range(8)]
        draws = _zipf(random_, 8, count)
        jobs = [Job(f"adapter-{kind}", _chat(systems[kind], self._text(random_, 30), 32)) for kind in draws]
        return self._workload(name, jobs, random_)

    def _real(self) -> Workload:
        jobs = []
        for example in shipped():
            for line in example.lines[: 24 if self._quick else None]:
                jobs.append(Job(example.name, job_for(example, line, with_adapter=True)["request"]))
        random.Random(2).shuffle(jobs)
        return Workload("b", jobs, {example.name: EXAMPLES / "adapters" / example.name for example in shipped()})

    def _trace(self) -> Workload:
        random_ = random.Random(3)
        with LENGTHS.open() as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
        scale = CONTEXT / _TRACE_CONTEXT
        jobs = []
        for number, row in enumerate(rows[: 24 if self._quick else 128]):
            prompt = max(4, round(int(row["prompt_tokens"]) * scale * 0.7))  # 0.7 words a token
            tokens = min(int(row["generated_tokens"]), CONTEXT // 4)
            text = self._text(random_, min(prompt, CONTEXT // 2))
            jobs.append(Job(f"adapter-{number % 16}", {"prompt": text, "max_tokens": tokens, "temperature": 0}, "/v1/completions"))
        return self._workload("c", jobs, random_)

    def _many(self) -> Workload:
        random_ = random.Random(4)
        kinds, count = (60, 160) if self._quick else (1000, 4000)
        draws = _zipf(random_, kinds, count)
        jobs = [Job(f"adapter-{kind}", _chat("Answer briefly.", self._text(random_, 12), 8)) for kind in draws]
        return self._workload("m", jobs, random_, ("q_proj", "v_proj"))
