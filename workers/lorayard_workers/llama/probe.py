"""The first decode: a few tokens of nothing, with the bare base and with an adapter. A wrong build or driver crashes of it, or computes
what is no number, and that shall be before any job is here."""

from __future__ import annotations

import numpy as np

from lorayard.adapters import BaseModel
from lorayard.adapters.conversion import changeable
from lorayard.errors import LorayardError
from lorayard_workers.llama.berths import Berth
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Batch, Context
from lorayard_workers.llama.weights import RANKS, Pair, Weights

_PROMPT = 32


def probe(model: Model, context: Context, batch: Batch, base: BaseModel) -> None:
    """Raises `LorayardError` where the results are no numbers. The context is left empty and bound to the bare base."""
    _decode(context, batch)
    weights = trial(base)
    if weights is None:
        return
    try:
        berth = Berth(model, weights)
    except LorayardError:  # experts instead of one feed-forward network, say: the job whose adapter cannot be loaded is told why
        return
    try:
        context.bind(berth.adapter)
        _decode(context, batch)
    finally:
        context.bind(None)
        berth.free()


def trial(base: BaseModel) -> Weights | None:
    """An adapter on every kind of weight of the first and the last layer, which may lie on different devices; None where none is served."""
    layers = sorted({0, base.n_layer - 1})
    sizes = {f"blk.{layer}.{name}.weight": size for layer in layers for name, size in changeable(base).items()}
    pairs = [Pair(name, RANKS, inputs, outputs) for name, (outputs, inputs) in sizes.items()]
    matrices = [tuple(np.full(shape, 1 / max(shape), np.float32) for shape in pair.shapes) for pair in pairs]
    return Weights(base.architecture, tuple(pairs), [(a, b) for a, b in matrices]) if pairs else None


def _decode(context: Context, batch: Batch) -> None:
    """A prompt, and one step after it."""
    context.clear()
    for start, tokens in ((0, [0] * _PROMPT), (_PROMPT, [0])):
        batch.clear()
        batch.add(0, start, tokens, want_logits=True)
        if not np.isfinite(context.decode(batch)).all():
            raise LorayardError("llama.cpp computes what is not a number", code="not_a_number")
    context.clear()
    batch.clear()
