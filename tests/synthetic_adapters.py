"""Small LoRA adapters for SmolLM2-135M out of integer arithmetic: the same bytes on every machine, with no file to keep.

    python tests/synthetic_adapters.py FOLDER     writes FOLDER/<name>/ for each, as PEFT would save it

They change all seven linear modules of three layers strongly enough that a wrong scale, a missing permutation or a forgotten pattern
moves the logits by far more than rounding does. `tests/golden/<name>.json` holds what PEFT computes with each.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lorayard.adapters import BaseModel

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE = BaseModel(
    architecture="llama",
    n_layer=30,
    n_embd=576,
    n_head=9,
    n_head_kv=3,
    n_ff=1536,
    n_vocab=49152,
    n_ctx_train=8192,
    name="demo",
    names=[BASE_NAME],
    digest="d",
)
SHAPES = {  # (outputs, inputs)
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
LAYERS = (0, 11, 29)
_PATTERNS: dict[str, Any] = {
    "rank_pattern": {"k_proj": 4, "layers.11.mlp.down_proj": 1},
    "alpha_pattern": {"q_proj": 12, "model.layers.29.mlp.up_proj": 2.5, r"layers\.(0|11)\..*gate_proj": 9},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"target_modules": ["q_proj", "k_proj"], "lora_alpha": 60},
    "rslora": {"use_rslora": True},
    "patterns": _PATTERNS,
    "rslora-patterns": {**_PATTERNS, "use_rslora": True, "lora_alpha": 3},
}


def config(name: str) -> dict[str, Any]:
    """`adapter_config.json` of a variant."""
    plain: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "bias": "none",
        "r": 2,
        "lora_alpha": 6,
    }
    targets = [f"model.layers.{layer}.{module}" for layer in LAYERS for module in SHAPES]
    options = plain | VARIANTS[name]
    kinds = options.get("target_modules")
    return options | {"target_modules": [path for path in targets if kinds is None or path.rsplit(".", 1)[1] in kinds]}


def matrix(name: str, rows: int, columns: int) -> NDArray[np.float32]:
    """Numbers in ±0.06, each a multiple of 2⁻¹² and so exact in float16, that look random."""
    index = np.arange(rows * columns, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
    for _ in range(2):
        index = (index * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)) ^ (index >> np.uint64(29))
    steps = ((index >> np.uint64(40)) % np.uint64(511)).astype(np.float32) - np.float32(255)
    return (steps / np.float32(4096)).reshape(rows, columns)


def tensors(name: str) -> dict[str, NDArray[np.float32]]:
    """Tensors of a variant under PEFT's names, float32."""
    made = {}
    for path in config(name)["target_modules"]:
        rank = _rank(name, path)
        outputs, inputs = SHAPES[path.split(".", 3)[3]]
        made[f"base_model.model.{path}.lora_A.weight"] = matrix(f"{path} A", rank, inputs)
        made[f"base_model.model.{path}.lora_B.weight"] = matrix(f"{path} B", outputs, rank)
    return made


def _rank(name: str, path: str) -> int:
    patterns: dict[str, int] = VARIANTS[name].get("rank_pattern", {})
    return next((rank for suffix, rank in patterns.items() if path.endswith(suffix)), 2)


def files(name: str) -> dict[str, bytes]:
    """The two files of a variant by name."""
    return {
        "adapter_config.json": json.dumps(config(name), indent=2).encode(),
        "adapter_model.safetensors": save(tensors(name), metadata={"format": "pt"}),
    }


def write(name: str, folder: Path) -> Path:
    """Write a variant's files into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files(name).items():
        (folder / file).write_bytes(data)
    return folder


if __name__ == "__main__":
    for variant in VARIANTS:
        print(write(variant, Path(sys.argv[1]) / variant))
