"""What is known of a base model (`BaseModel`, told by its workers) and of an adapter (`Manifest`, kept by the registry)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from lorayard.errors import SetupError

PUBLIC = "*"
"""The tenant of adapters that the operator gives to everyone."""


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a base model. `names` are the names that an adapter's `base_model_name_or_path` may carry."""

    architecture: str  # llama.cpp's word: llama, qwen2, ...
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    name: str
    names: list[str]
    digest: str
    n_embd_head: int = 0  # 0: n_embd / n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd_head or self.n_embd // self.n_head

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, n_vocab: int, names: list[str], digest: str) -> BaseModel:
        """From a GGUF's metadata as llama.cpp prints it (every value a string).

        Raises `SetupError` where a size is missing or differs from layer to layer.
        """
        arch = metadata.get("general.architecture", "")

        def size(key: str, default: int | None = None) -> int:
            text = metadata.get(f"{arch}.{key}")
            if text is None and default is not None:
                return default
            try:
                return int(text or "")
            except ValueError:
                raise SetupError(f"the model's metadata says {arch}.{key} = {text!r}, where one whole number was expected") from None

        n_head = size("attention.head_count")
        return cls(
            architecture=arch,
            n_layer=size("block_count"),
            n_embd=size("embedding_length"),
            n_head=n_head,
            n_head_kv=size("attention.head_count_kv", n_head),
            n_ff=size("feed_forward_length"),
            n_vocab=n_vocab,
            n_ctx_train=size("context_length"),
            name=metadata.get("general.name") or arch,
            names=names,
            digest=digest,
            n_embd_head=size("attention.key_length", 0),
        )


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One registered adapter: a tenant's name for a content digest, with what a person or a planner wants to know of it."""

    name: str
    tenant: str  # "*": public, given by the operator
    digest: str  # 32 hex digits over what the adapter computes; equal for a folder and a zip of the same adapter
    base_name: str
    rank: int  # the largest of its modules
    alpha: float
    rslora: bool
    scale_min: float  # factors of B·A over its modules, as PEFT applies them
    scale_max: float
    targets: list[str]  # q_proj, ..., down_proj
    n_layers: int  # layers it changes
    n_bytes: int  # of its tensors
    created_ms: int  # since 1970
    card: dict[str, Any] | None = None
    replaces: str = ""  # digest that this name had until now; jobs enqueued before keep it
