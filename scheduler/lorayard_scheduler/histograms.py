"""Histograms of the factor by which things took longer than predicted: over its logarithm, in bins that are finer near 1. They forget."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

BINS = 56
_LOWEST, _STEP, _FINE = -2.5, 0.1, 0.5
"""Bins are of one size in the inverse hyperbolic sine of the logarithm by `_FINE`: 5 % of the factor near 1, a half at its ends."""
EDGES: tuple[float, ...] = tuple(_FINE * math.sinh(_LOWEST + i * _STEP) for i in range(BINS + 1))
"""Logarithms of the factor: from 1 in 20 to 250."""
NOTHING: tuple[float, ...] = (0.0,) * BINS
_MEMORY = 400.0  # observations after which an old one counts half of a new one
_PRIOR = 4.0  # observations that a wider kind counts for in a narrower one

Shape = tuple[float, ...]
"""Cumulated: the part below the upper edge of each bin."""


def counted(counts: Sequence[float], factor: float) -> list[float]:
    """With one more observation."""
    fade = 0.5 ** (1 / _MEMORY)
    found = [round(fade * count, 3) for count in _ours(counts)]
    found[min(BINS - 1, max(0, bisect(EDGES, math.log(max(factor, 1e-9))) - 1))] += 1.0
    return found


@lru_cache(maxsize=512)
def mixed(*kinds: Shape) -> Shape:
    """Of histograms from the widest to the narrowest; below all lies a guess: as predicted, half or twice that, now and then anything."""
    shape = _GUESS
    for counts in map(_ours, kinds):
        total = sum(counts) + _PRIOR
        shape = [(n + _PRIOR * p) / total for n, p in zip(counts, shape, strict=True)]
    return tuple(accumulate(shape))


def _ours(counts: Sequence[float]) -> Sequence[float]:
    """Nothing, where another release had other bins."""
    return counts if len(counts) == BINS else NOTHING


def _weights(of: Sequence[float]) -> list[float]:
    return [part / sum(of) for part in of]


_BELL = _weights([math.exp(-0.5 * ((low + high) / 2 / 0.5) ** 2) * (high - low) for low, high in pairwise(EDGES)])
_TAIL = _weights([math.exp(-2 * max(0.0, low)) - math.exp(-2 * max(0.0, high)) for low, high in pairwise(EDGES)])
"""What has taken so long takes half as much again, in the median."""
_GUESS = [0.95 * bell + 0.05 * tail for bell, tail in zip(_BELL, _TAIL, strict=True)]


def quantile(shape: Shape, q: float) -> float:
    """The logarithm of the factor that the part `q` lies below."""
    i = min(bisect(shape, q), BINS - 1)
    before = shape[i - 1] if i else 0.0
    return EDGES[i] + (EDGES[i + 1] - EDGES[i]) * min(1.0, (q - before) / max(shape[i] - before, 1e-12))


def below(shape: Shape, x: float) -> float:
    """What part lies below that logarithm."""
    i = bisect(EDGES, x) - 1
    if i < 0:
        return 0.0
    if i >= BINS:
        return 1.0
    before = shape[i - 1] if i else 0.0
    return before + (shape[i] - before) * (x - EDGES[i]) / (EDGES[i + 1] - EDGES[i])
