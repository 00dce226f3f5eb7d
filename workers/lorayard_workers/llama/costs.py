"""What computing costs on this machine: measured once before the first job, then learnt from every step, and told to the scheduler."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Batch, Context

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_DEPTH = 128  # tokens before the ones that are timed, in each sequence
_WEIGHT = 0.1  # of the newest observation in what has been learnt
_KNEE = 0.93  # of the best rate that the narrowest width must reach
_PATIENCE = 2  # widths without a new best rate after which no wider one is tried
_MOST_S, _LEAST_WIDE = 3.0, 8  # where steps are slow, no more than this is tried for longer than that


@dataclass
class Costs:
    """`prefill_tokens_per_s`, and milliseconds of a decode step by width. `switch_ms` by an adapter's temperature: until it can compute."""

    prefill_tokens_per_s: float = 0.0
    step_ms: dict[int, float] = field(default_factory=dict)
    switch_ms: dict[str, float] = field(default_factory=lambda: {"hot": 0.0})

    def saw_step(self, rows: int, prefill: int, ms: float) -> None:
        """A decode call of `rows` decoding sequences and `prefill` tokens of prompts took so long."""
        if not prefill:
            nearest = min(WIDTHS, key=lambda width: abs(width - rows))
            self.step_ms[nearest] = _learnt(self.step_ms.get(nearest), ms * nearest / rows if rows > 1 else ms)
        elif prefill >= 64:
            rate = 1000 * (prefill + rows) / ms
            self.prefill_tokens_per_s = _learnt(self.prefill_tokens_per_s or None, rate)

    def saw_switch(self, temperature: str, ms: float) -> None:
        self.switch_ms[temperature] = _learnt(self.switch_ms.get(temperature), ms)

    def document(self) -> dict[str, Any]:
        """As the scheduler reads it."""
        return {
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 1),
            "step_ms": {str(width): round(ms, 2) for width, ms in sorted(self.step_ms.items())},
            "switch_ms": {name: round(ms, 2) for name, ms in self.switch_ms.items()},
        }


def _learnt(known: float | None, seen: float) -> float:
    return seen if known is None else known + _WEIGHT * (seen - known)


def measure(model: Model, settings: Settings, *, widest: int) -> Costs:
    """Time one prompt, and steps of growing width over sequences of equal depth, until wider is no faster. Takes a second or two."""
    costs, n_ctx = Costs(), settings.n_ctx
    widths = [width for width in WIDTHS if width <= widest and width * (_DEPTH + 8) <= n_ctx] or [1]
    context = Context(
        model,
        n_ctx=n_ctx,
        n_seq_max=widths[-1],
        n_batch=max(_DEPTH, widths[-1]),
        kv_type=settings.kv_type,
        flash_attn=settings.flash_attn,
    )
    batch = Batch(context.n_batch)
    try:
        costs.prefill_tokens_per_s = _DEPTH / _prompt_s(context, batch)
        started = time.perf_counter()
        cells = context.save(0)
        best, worse = 0.0, 0
        for narrower, width in zip([1, *widths], widths, strict=False):
            for seq in range(narrower, width):
                context.restore(seq, cells)
            costs.step_ms[width] = 1000 * min(_step_s(context, batch, width) for _ in range(2))
            rate = width / costs.step_ms[width]
            worse = 0 if rate > best * 1.02 else worse + 1
            best = max(best, rate)
            if worse == _PATIENCE or (width >= _LEAST_WIDE and time.perf_counter() - started > _MOST_S):
                break
    finally:
        batch.free()
        context.close()
    return costs


def knee(costs: Costs) -> int:
    """The narrowest width that is nearly as fast as any: wider ones only make every job wait longer."""
    rates = {width: width / ms for width, ms in costs.step_ms.items()}
    return min(width for width, rate in rates.items() if rate >= _KNEE * max(rates.values()))


def _prompt_s(context: Context, batch: Batch) -> float:
    """Seconds of a prompt; the first one, which also warms caches and reserves the graph, is not counted."""
    for _ in range(2):
        context.clear()
        batch.clear()
        batch.add(0, 0, [0] * _DEPTH, want_logits=True)
        started = time.perf_counter()
        context.decode(batch)
    return time.perf_counter() - started


def _step_s(context: Context, batch: Batch, width: int) -> float:
    """Seconds of one more token in each sequence, which then lets go of it again."""
    batch.clear()
    batch.add_steps(list(range(width)), [_DEPTH] * width, [0] * width)
    started = time.perf_counter()
    context.decode(batch)
    took = time.perf_counter() - started
    for seq in range(width):
        context.cut(seq, _DEPTH)
    return took
