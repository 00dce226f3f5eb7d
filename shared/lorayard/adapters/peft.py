"""PEFT adapters: read, checked, and brought to what they compute: for each changed module its rank, scale, A and B.

Whatever PEFT would compute from a file and we would not is refused by name, never dropped: an adapter that runs silently wrong is worse
than none.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from lorayard.adapters.config import Config, parse_config, parse_object, resolver
from lorayard.adapters.files import CARD, CONFIG, WEIGHTS, Source, read_files
from lorayard.adapters.manifest import BaseModel
from lorayard.adapters.tensors import Tensor, parse, serialize
from lorayard.errors import AdapterRejected

KINDS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""The linear modules of a layer that an adapter may change, and the block each lies in."""

MAX_BYTES = 1 << 30

_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,3})\.(self_attn|mlp)\.([a-z]+_proj)\.lora_([AB])\.weight", re.ASCII
)


class Module(msgspec.Struct, frozen=True):
    """One changed module: it computes W·x + scale·B·(A·x), with A of shape (rank, inputs) and B of shape (outputs, rank)."""

    layer: int
    kind: str
    scale: float
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class PeftAdapter(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A checked adapter in memory. `modules` are in order of layer and kind; `card` is card.json, where there was one."""

    config: Config
    modules: tuple[Module, ...]
    card: dict[str, Any] | None = None

    @cached_property
    def digest(self) -> str:
        """32 hex digits over what it computes and on which base: the same for a folder and a zip, however its config is worded."""
        sha = hashlib.sha256(b"lorayard adapter 1\0" + self.config.base_model_name_or_path.encode() + b"\0")
        for module in self.modules:
            sha.update(f"{module.layer} {module.kind} ".encode() + struct.pack("<d", module.scale))
            for tensor in (module.a, module.b):
                sha.update(f"{tensor.dtype} {tensor.shape} ".encode())
                sha.update(tensor.data)
        return sha.hexdigest()[:32]

    @property
    def n_bytes(self) -> int:
        return sum(len(module.a.data) + len(module.b.data) for module in self.modules)

    @property
    def targets(self) -> list[str]:
        present = {module.kind for module in self.modules}
        return [kind for kind in KINDS if kind in present]

    def config_file(self) -> bytes:
        """An `adapter_config.json` that means the same, for PEFT and others: only the options that have a say."""
        known = msgspec.to_builtins(self.config)
        plain = {key: value for key, value in known.items() if value not in (None, {})}
        rest = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "bias": "none",
            "target_modules": self._target_modules(),
            "inference_mode": True,
        }
        return msgspec.json.format(msgspec.json.encode(plain | rest), indent=2)

    def weights_file(self) -> bytes:
        """An `adapter_model.safetensors` of the same tensors in their own precision: the same bytes for equal adapters."""
        return serialize(self._named_tensors())

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for module in self.modules:
            path = f"base_model.model.{_path(module.layer, module.kind)}"
            yield f"{path}.lora_A.weight", module.a
            yield f"{path}.lora_B.weight", module.b

    def _target_modules(self) -> list[str]:
        """Short names where every layer up to the last has all of them, else full paths, so that PEFT adds nothing of its own."""
        n_layers = self.modules[-1].layer + 1
        if len(self.modules) == n_layers * len(self.targets):
            return self.targets
        return [_path(module.layer, module.kind) for module in self.modules]


def _path(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.{KINDS[kind]}.{kind}"


def read_adapter(source: Source, *, max_bytes: int = MAX_BYTES) -> PeftAdapter:
    """Read an adapter from a folder, a zip's path or a zip's bytes; the weights may have `max_bytes`.

    Raises `AdapterRejected`, and nothing else, for anything that is broken, hostile, or cannot be computed exactly.
    """
    return build_adapter(read_files(source, max_bytes))


def build_adapter(files: dict[str, bytes]) -> PeftAdapter:
    """As `read_adapter`, from the files' contents by name."""
    config = parse_config(files[CONFIG])
    pairs = _pairs(parse(files[WEIGHTS]))
    rank_of, alpha_of = resolver(config.rank_pattern, config.r), resolver(config.alpha_pattern, config.lora_alpha)
    order = list(KINDS)
    modules = tuple(
        _module(config, layer, kind, pairs[layer, kind], rank_of, alpha_of)
        for layer, kind in sorted(pairs, key=lambda key: (key[0], order.index(key[1])))
    )
    card = parse_object(CARD, files[CARD]) if CARD in files else None
    return PeftAdapter(config=config, modules=modules, card=card)


def _rejected(what: str) -> AdapterRejected:
    return AdapterRejected(f"adapter_model.safetensors: {what}", code="adapter_tensors")


def _pairs(found: dict[str, Tensor]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """A and B by (layer, kind)."""
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in found.items():
        match = _TENSOR.fullmatch(name)
        if match is None or KINDS.get(match[3]) != match[2]:
            raise _rejected(_why_unknown(name))
        pairs.setdefault((int(match[1]), match[3]), {})[match[4]] = tensor
    if not pairs:
        raise _rejected("holds no LoRA tensors")
    for (layer, kind), pair in pairs.items():
        if len(pair) != 2:
            (only,) = pair
            raise _rejected(f"{_path(layer, kind)} has lora_{only} but no lora_{'B' if only == 'A' else 'A'}; save the adapter again")
    return pairs


def _why_unknown(name: str) -> str:
    shown = repr(name[:120])
    reasons = {
        "lora_magnitude_vector": "DoRA rescales the base weights; train with use_dora=False",
        ".lora_B.bias": "a bias on B; train with lora_bias=False",
        "lora_embedding_": "embeddings cannot be served; train the linear modules only",
        "embed_tokens": "embeddings cannot be served; train the linear modules only",
        "lm_head": "the output head cannot be served; train the linear modules only",
        "modules_to_save": "whole modules were trained; train without modules_to_save",
        ".experts.": "adapters on experts cannot be served; train the attention modules only",
    }
    why = next((why for mark, why in reasons.items() if mark in name), f"only {', '.join(KINDS)} of model.layers can be served")
    return f"the tensor {shown} cannot be served exactly: {why}"


def _module(
    config: Config, layer: int, kind: str, pair: dict[str, Tensor], rank_of: Callable[[str], int], alpha_of: Callable[[str], float]
) -> Module:
    path = _path(layer, kind)
    a, b = pair["A"], pair["B"]
    rank = rank_of(path)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise _rejected(f"{path} has A of rank {a.shape[0]} and B of rank {b.shape[1]}, but adapter_config.json says {rank}")
    for tensor in (a, b):
        if not np.isfinite(tensor.float32()).all():
            raise _rejected(f"{path} has numbers that are not finite; the training diverged")
    # PEFT's rule for each module by its own alpha and rank.
    scale = alpha_of(path) / (math.sqrt(rank) if config.use_rslora else rank)
    return Module(layer, kind, scale, a, b)


def check_fit(adapter: PeftAdapter, base: BaseModel) -> None:
    """Raise `AdapterRejected` where the adapter was made for another base than this one, by its name or by any tensor's shape."""
    name = adapter.config.base_model_name_or_path
    if not _same_name(name, base.names):
        known = ", ".join(base.names) or "none"
        raise AdapterRejected(
            f"the adapter was trained on {name[:200]!r}, but this pool serves {base.name!r} (known as: {known}); if it really is the same"
            f" base, set LORAYARD_MODEL_NAMES to include {name[:200]!r}",
            code="adapter_base_mismatch",
        )
    for module in adapter.modules:
        path = _path(module.layer, module.kind)
        if module.layer >= base.n_layer:
            raise AdapterRejected(f"the adapter changes {path}, but {base.name!r} has {base.n_layer} layers", code="adapter_base_mismatch")
        outputs, inputs = shape(base, module.kind)
        have = (module.b.shape[0], module.a.shape[1])
        if have != (outputs, inputs):
            raise AdapterRejected(
                f"the adapter's {path} goes from {have[1]} to {have[0]} numbers, but that of {base.name!r} from {inputs} to {outputs}:"
                " it was trained on another model",
                code="adapter_base_mismatch",
            )


def _same_name(name: str, known: list[str]) -> bool:
    return name in known or _last(name) in {_last(other) for other in known}


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].casefold()


def shape(base: BaseModel, kind: str) -> tuple[int, int]:
    """(outputs, inputs) of a linear module of the base."""
    heads, kv = base.n_head * base.head_dim, base.n_head_kv * base.head_dim
    return {
        "q_proj": (heads, base.n_embd),
        "k_proj": (kv, base.n_embd),
        "v_proj": (kv, base.n_embd),
        "o_proj": (base.n_embd, heads),
        "gate_proj": (base.n_ff, base.n_embd),
        "up_proj": (base.n_ff, base.n_embd),
        "down_proj": (base.n_embd, base.n_ff),
    }[kind]
