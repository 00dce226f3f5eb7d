"""What a bare loop needs for a workload: nothing but `llama_decode`, with the adapter on and all batches known beforehand.

Per group of jobs of one adapter: the tokens of its prompts that are not shared, in batches as full as the group can fill, and the decode
steps of the best schedule (longest first, places filled at once), each at the rate of its size. The rates are measured here, in the same
process, with this workload's own prompts: no queue, no sampling, no adapter is loaded or switched, nothing is answered.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorayard_workers.llama.bindings import LoraAdapter, Model
from lorayard_workers.llama.decoding import Batch, Context

Prompts = list[list[int]]
CHUNK = 512
_REPEATS = 5
_SIZES = (16, 32, 64, 128, 256, CHUNK)
_WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


@dataclass
class Rates:
    """Bare rates with the adapter on: milliseconds of a batch of prompts by its tokens, and of a decode step by its width."""

    prompt_ms: dict[int, float]
    step_ms: dict[int, float]

    def prompts(self, tokens: int) -> float:
        """Milliseconds of so many tokens of prompts."""
        known = sorted(self.prompt_ms)
        full, rest = divmod(tokens, CHUNK)
        last = float(np.interp(rest, [0, *known], [0.0, *(self.prompt_ms[size] for size in known)])) if rest else 0.0
        return full * self.prompt_ms[CHUNK] + last

    def step(self, width: int) -> float:
        """Milliseconds of a step of this width, between those measured."""
        known = sorted(self.step_ms)
        return float(np.interp(width, known, [self.step_ms[w] for w in known]))


def unique_tokens(prompts: Prompts) -> int:
    """Tokens to compute when whatever two prompts begin with alike is computed once, and the last token of each for itself."""
    total, before = 0, list[int]()
    for prompt in sorted(prompts):
        shared = next((i for i, pair in enumerate(zip(before, prompt[:-1], strict=False)) if pair[0] != pair[1]), None)
        total += len(prompt) - (min(len(before), len(prompt) - 1) if shared is None else shared)
        before = prompt
    return total


def schedule(lengths: Iterable[int], width: int) -> list[int]:
    """Widths of all decode steps when the longest begin first and a free place is filled at once. The first token comes of the prompt."""
    left = sorted((length - 1 for length in lengths if length > 1), reverse=True)
    ends: list[int] = []
    starts: list[tuple[int, int]] = []
    for length in left:
        begin = heapq.heappop(ends) if len(ends) >= width else 0
        heapq.heappush(ends, begin + length)
        starts.append((begin, length))
    steps = np.zeros(max((begin + length for begin, length in starts), default=0), int)
    for begin, length in starts:
        steps[begin : begin + length] += 1
    return [int(count) for count in steps if count]


def seconds(groups: Iterable[tuple[Prompts, list[int]]], rates: Rates, width: int) -> float:
    """The limit of a workload in seconds: prompts and numbers of generated tokens of each group, steps of the best width up to `width`."""
    total, widths = 0.0, [known for known in rates.step_ms if known <= width] or [1]
    for prompts, lengths in groups:
        steps = min(sum(map(rates.step, schedule(lengths, one))) for one in widths)
        total += rates.prompts(unique_tokens(prompts)) + steps
    return total / 1000


def measure(model: Model, adapter: Path, prompts: Prompts, tokens_out: int, *, width: int, n_ctx: int) -> Rates:
    """Rates with this adapter: prompts of one group computed in full batches, then steps at the depth of half an answer.

    As many sequences as `width` says, as there are prompts and as `n_ctx` cells hold; the widest of `step_ms` is that number.
    """
    shared = _common(prompts) if len(prompts) > 1 else 0
    depths = [len(prompt) + tokens_out // 2 for prompt in prompts[:width]]
    fit = [count for count in range(1, len(depths) + 1) if shared + sum(depths[:count]) - count * shared + _REPEATS * count <= n_ctx]
    depths = depths[: max(fit, default=1)]
    context = Context(model, n_ctx=n_ctx, n_seq_max=len(depths), n_batch=CHUNK)
    batch, lora = Batch(CHUNK), LoraAdapter(model, adapter)
    try:
        context.bind(lora)
        _compute(context, batch, [(0, 0, prompts[0][:CHUNK])])  # reserves the graph
        context.clear()
        prompt_ms = {size: 1000 * _prompt_s(context, batch, prompts, shared, size) for size in _SIZES}
        step_ms: dict[int, float] = {}
        for before, count in itertools.pairwise([0, *(w for w in _WIDTHS if w < len(depths)), len(depths)]):
            _fill(context, batch, prompts, range(before, count), shared)
            _compute(context, batch, [(q, len(prompts[q]), [0] * (depths[q] - len(prompts[q]))) for q in range(before, count)])
            step_ms[count] = 1000 * _step_s(context, batch, depths[:count])
        return Rates(prompt_ms, step_ms)
    finally:
        batch.free()
        context.close()
        lora.free()


def _common(prompts: Prompts) -> int:
    first, last = min(prompts), max(prompts)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)) - 1)


def _prompt_s(context: Context, batch: Batch, prompts: Prompts, shared: int, size: int) -> float:
    """Median seconds of a batch of so many tokens of prompts, each after what all share; of one that is longer, its middle."""
    taken = []
    for _ in range(3):
        context.clear()
        pieces, left = list[tuple[int, int, list[int]]](), size
        for seq, prompt in enumerate(itertools.islice(itertools.cycle(prompts), context.n_seq_max)):
            start = max(shared, (shared + len(prompt) - left) // 2)
            pieces.append((seq, start, prompt[start : start + left]))
            left -= len(pieces[-1][2])
            if not left:
                break
        _compute(context, batch, [(0, 0, prompts[0][:shared])] if shared else [])
        for seq, start, _piece in pieces:
            if seq and shared:
                context.copy(0, seq, shared)
            if start > shared:
                _compute(context, batch, [(seq, shared, prompts[seq % len(prompts)][shared:start])])
        taken.append(_compute(context, batch, pieces) * size / (size - left))
    context.clear()
    return statistics.median(taken)


def _fill(context: Context, batch: Batch, prompts: Prompts, sequences: range, shared: int) -> None:
    """Compute the prompts of these sequences; what all share is computed with the first."""
    if shared and sequences.start == 0:
        _compute(context, batch, [(0, 0, prompts[0][:shared])])
    for seq in sequences if shared else ():
        if seq:
            context.copy(0, seq, shared)
    _compute(context, batch, [(seq, shared, prompts[seq][shared:]) for seq in sequences])


def _compute(context: Context, batch: Batch, pieces: list[tuple[int, int, list[int]]]) -> float:
    """Tokens of sequences from positions on, in batches as full as can be; returns the seconds of the decode calls."""
    took = 0.0
    batch.clear()
    for seq, start, piece in pieces:
        position, tokens = start, piece
        while tokens:
            part = tokens[: CHUNK - batch.size]
            batch.add(seq, position, part, want_logits=len(part) == len(tokens))
            position, tokens = position + len(part), tokens[len(part) :]
            if batch.size == CHUNK:
                took += _decode_s(context, batch)
                batch.clear()
    return took + (_decode_s(context, batch) if batch.size else 0.0)


def _decode_s(context: Context, batch: Batch) -> float:
    started = time.perf_counter()
    context.decode(batch)
    return time.perf_counter() - started


def _step_s(context: Context, batch: Batch, depths: list[int]) -> float:
    """Median seconds of a step of these sequences; leaves them as they were."""
    taken = []
    for turn in range(_REPEATS):
        batch.clear()
        batch.add_steps(list(range(len(depths))), [depth + turn for depth in depths], [0] * len(depths))
        taken.append(_decode_s(context, batch))
    for seq, depth in enumerate(depths):
        context.cut(seq, depth)
    return statistics.median(taken)
