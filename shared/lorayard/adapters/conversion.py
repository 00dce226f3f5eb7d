"""PEFT → llama.cpp's LoRA GGUF, with the scale and the order of rows that make llama.cpp compute exactly what PEFT does.

llama.cpp's own converter ignores rank-stabilized scaling and alpha patterns, and needs torch; this one needs neither.
"""

from __future__ import annotations

import math
import os
import secrets
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from lorayard.adapters.manifest import BaseModel
from lorayard.adapters.peft import Module, PeftAdapter, shape
from lorayard.errors import AdapterRejected

Precision = Literal["f32", "f16"]

_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
# Architectures whose GGUF holds the linear modules in Hugging Face's row order, and those with q and k in interleaved-rope order.
# Each was compared with PEFT, logit by logit, on a small random model; any other is refused, because a wrong order of rows runs
# without an error and answers nonsense.
_AS_THEY_ARE = frozenset({"qwen2", "qwen3", "gemma2", "gemma3"})
_INTERLEAVED = frozenset({"llama"})  # Llama, Mistral and SmolLM2 among them


def changeable(base: BaseModel) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each weight of a layer that an adapter may change, by llama.cpp's name; none where none can be converted."""
    if base.architecture not in _AS_THEY_ARE | _INTERLEAVED:
        return {}
    return {name: shape(base, kind) for kind, name in _NAMES.items()}


def write_gguf(adapter: PeftAdapter, base: BaseModel, path: Path, precision: Precision = "f32") -> None:
    """Write the adapter to `path` for that base, whole or not at all. The fit was checked before (`check_fit`).

    float32 runs faster on CPUs, float16 takes half the memory. Raises `AdapterRejected` for an architecture that cannot be converted
    rightly, and for numbers beyond the precision.
    """
    if base.architecture not in _AS_THEY_ARE | _INTERLEAVED:
        known = ", ".join(sorted(_AS_THEY_ARE | _INTERLEAVED))
        raise AdapterRejected(
            f"adapters for the architecture {base.architecture!r} cannot be converted; it can be done for {known}",
            code="adapter_architecture",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write(adapter, base, temporary, precision)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(adapter: PeftAdapter, base: BaseModel, path: Path, precision: Precision) -> None:
    writer = gguf.GGUFWriter(path, base.architecture)
    alpha = _written_alpha(adapter.modules)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_string("lorayard.digest", adapter.digest)
    for module in adapter.modules:
        name = f"blk.{module.layer}.{_NAMES[module.kind]}.weight"
        writer.add_tensor(f"{name}.lora_a", _cast(module.a.float32(), precision, name))
        writer.add_tensor(f"{name}.lora_b", _cast(_b(module, alpha, base), precision, name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _written_alpha(modules: tuple[Module, ...]) -> float:
    """The one alpha of the file. llama.cpp multiplies by alpha/rank, and takes an alpha of 0 for a factor of 1.

    Where one alpha is right for all modules it is written and B stays as it is; else B takes the difference.
    """
    return next((module.scale * module.rank for module in modules if module.scale), 1.0)


def _b(module: Module, alpha: float, base: BaseModel) -> NDArray[np.float32]:
    b = module.b.float32()
    factor = module.scale * module.rank / alpha
    if not math.isclose(factor, 1.0, rel_tol=1e-9):
        with np.errstate(over="ignore"):  # _cast looks for it
            b = b * np.float32(factor)
    if base.architecture in _INTERLEAVED and module.kind in ("q_proj", "k_proj"):
        # Hugging Face keeps the two halves of a head's rotary pairs apart, llama.cpp's "llama" interleaves them.
        heads = base.n_head if module.kind == "q_proj" else base.n_head_kv
        outputs, rank = b.shape
        b = b.reshape(heads, 2, outputs // heads // 2, rank).swapaxes(1, 2).reshape(outputs, rank)
    return b


def _cast(matrix: NDArray[np.float32], precision: Precision, name: str) -> NDArray[np.float32] | NDArray[np.float16]:
    target = np.float32 if precision == "f32" else np.float16
    peak, limits = np.abs(matrix).max(), np.finfo(target)
    if peak and not limits.tiny <= peak <= limits.max:
        raise AdapterRejected(f"{name} times its scale has numbers too large or too small for {target.__name__}", code="adapter_tensors")
    return np.ascontiguousarray(matrix.astype(target))
