"""What computing costs on this machine: measured once before the first job, then learnt from every step, and told to the scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Batch, Context

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_PROMPT = 128  # tokens of the prompt that is timed
_DEPTH = 64  # tokens before the steps that are timed, in each sequence: what sequences have of their own, as far as is known before any
_WEIGHT = 0.02  # of the newest observation in what has been learnt: other processes make one step in five half as long again
_SETTLED = 512  # tokens of prompts that count as much as one such observation
_STALLED = 4.0  # times what is known: the machine stood still for a moment, and by how much longer that was says nothing
_SWITCH = 0.1  # the same of switches
_LEAST_PROMPT = 64  # tokens: fewer say nothing of how fast prompts are read
_KNEE = 0.99  # of the best rate that the narrowest width must reach
_PATIENCE = 2  # widths without a new best rate after which no wider one is tried
_MOST_S, _LEAST_WIDE = 1.5, 8  # where steps are slow, no more than this is tried for longer than that


@dataclass
class Costs:
    """`prefill_tokens_per_s`, of calls with prompts, where tokens that are decoded count too; `step_ms`: milliseconds of a decode step by
    its width, at the depth that sequences have and with the adapters that they use; `switch_ms` by an adapter's temperature: until it can
    compute.

    What was measured before the first job, of the bare model, gives way to what is seen. A step tells of other widths too, the more the
    nearer they are: an adapter, the length of sequences and other work on the machine make all of them longer.
    """

    prefill_tokens_per_s: float = 0.0
    step_ms: dict[int, float] = field(default_factory=dict)
    switch_ms: dict[str, float] = field(default_factory=lambda: {"hot": 0.0})
    _seen: dict[int, float] = field(default_factory=dict, init=False)  # by width: how many steps there were, as far as they count still
    _read: float = field(default=1.0, init=False)  # the same of prompts
    _first: tuple[int, float] = field(default=(0, 0.0), init=False)  # tokens of prompts, and what they took, while they are too few

    def saw_step(self, rows: int, prefill: int, ms: float) -> None:
        """A decode call of `rows` decoding sequences and `prefill` tokens of prompts took so long."""
        if not prefill:
            self._saw_width(rows, ms)
        elif self.prefill_tokens_per_s:
            self._saw_prompt(prefill + rows, ms)
        else:
            self._first = (self._first[0] + prefill + rows, self._first[1] + ms)
            if self._first[0] >= _LEAST_PROMPT:
                self._saw_prompt(*self._first)

    def _saw_width(self, rows: int, ms: float) -> None:
        nearest = min(WIDTHS, key=lambda width: abs(width - rows))
        if not self.step_ms:
            self.step_ms[nearest] = ms * nearest / max(rows, 1)
        elif nearest not in self.step_ms:  # what it takes is known from its neighbours, about
            self.step_ms[nearest] = self._step(nearest)
        known = self._step(rows)
        if ms * _STALLED < known:  # no step is shorter than it is: what was known was the machine standing still, or is of other widths
            self.step_ms[nearest], self._seen[nearest] = ms * nearest / max(rows, 1), 1.0
            return
        longer = min(ms / known, _STALLED) - 1
        for width in self.step_ms:
            like = min(width, rows) / max(width, rows)
            seen = self._seen[width] = like + (1 - _WEIGHT * like) * self._seen.get(width, 1.0)
            self.step_ms[width] *= 1 + longer * like / seen

    def _saw_prompt(self, tokens: int, ms: float) -> None:
        weight, each = min(tokens / _SETTLED, 1 / _WEIGHT), ms / tokens
        self._read = weight + (1 - _WEIGHT * weight) * self._read
        known = 1000 / self.prefill_tokens_per_s if self.prefill_tokens_per_s else each
        self.prefill_tokens_per_s = 1000 / (known + (min(each, _STALLED * known) - known) * weight / self._read)

    def _step(self, rows: int) -> float:
        """Milliseconds of a step of any width, as far as that is known."""
        widths = sorted(self.step_ms)
        return float(np.interp(rows, widths, [self.step_ms[width] for width in widths])) * max(1.0, rows / widths[-1])

    def saw_switch(self, temperature: str, ms: float) -> None:
        known = self.switch_ms.get(temperature, ms)
        self.switch_ms[temperature] = known + _SWITCH * (min(ms, _STALLED * known) - known)

    def document(self) -> dict[str, Any]:
        """As the scheduler reads it."""
        return {
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 1),
            "step_ms": {str(width): round(ms, 2) for width, ms in sorted(self.step_ms.items())},
            "switch_ms": {name: round(ms, 2) for name, ms in self.switch_ms.items()},
        }


def measure(model: Model, settings: Settings, *, widest: int, alive: Callable[[], None] = lambda: None) -> tuple[Costs, int]:
    """Time a prompt, and steps of growing width over sequences as long as they usually are, until wider is no faster: costs, and the width.

    Steps twice, and the less of the two counts, because other processes start with this one: what they take of the cores for a moment
    must not decide about the width. Takes two seconds or so; `alive` is called between any two widths.
    """
    n_ctx = settings.n_ctx
    widths = [width for width in WIDTHS if width <= widest and width * (_DEPTH + 8) <= n_ctx] or [1]
    context = Context(
        model,
        n_ctx=n_ctx,
        n_seq_max=widths[-1],
        n_batch=max(_PROMPT, widths[-1]),
        kv_type=settings.kv_type,
        flash_attn=settings.flash_attn,
    )
    batch = Batch(context.n_batch)
    try:
        rate = _PROMPT / _prompt_s(context, batch, alive)
        context.cut(0, _DEPTH)
        usual = context.save(0)
        step_ms: dict[int, float] = {}
        for _ in range(2):
            context.clear()
            context.restore(0, usual)
            for width, ms in _pass(context, batch, widths, alive).items():
                step_ms[width] = min(ms, step_ms.get(width, ms))
    finally:
        batch.free()
        context.close()
    return Costs(rate, step_ms), knee(step_ms)


def _pass(context: Context, batch: Batch, widths: list[int], alive: Callable[[], None]) -> dict[int, float]:
    """Milliseconds of a step by width, from the one sequence that the context holds copied into as many as it takes."""
    step_ms: dict[int, float] = {}
    cells, filled = context.save(0), 1
    started, best, worse = time.perf_counter(), 0.0, 0
    for width in widths:
        alive()
        for seq in range(filled, width):
            context.restore(seq, cells)
        filled = width
        step_ms[width] = 1000 * min(_step_s(context, batch, width) for _ in range(2))
        rate = width / step_ms[width]
        worse = 0 if rate > best * 1.02 else worse + 1
        best = max(best, rate)
        if width >= _LEAST_WIDE and (worse >= _PATIENCE or time.perf_counter() - started > _MOST_S):
            break
    return step_ms


def knee(step_ms: dict[int, float]) -> int:
    """The narrowest width that is nearly as fast as any: wider ones only make every job wait longer."""
    rates = {width: width / ms for width, ms in step_ms.items()}
    return min(width for width, rate in rates.items() if rate >= _KNEE * max(rates.values()))


def _prompt_s(context: Context, batch: Batch, alive: Callable[[], None]) -> float:
    """Seconds of a prompt; the first one, which also warms caches and reserves the graph, is not counted."""
    for _ in range(2):
        alive()
        context.clear()
        batch.clear()
        batch.add(0, 0, [0] * _PROMPT, want_logits=True)
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
