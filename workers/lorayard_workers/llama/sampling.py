"""Choosing the next tokens of a whole batch, in numpy: all greedy rows at once, the others one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorayard.errors import LorayardError

Row = NDArray[np.float32]
_NUCLEUS = 1024  # candidates looked at before the whole vocabulary is sorted for top_p
COLDEST = 1e-4  # a temperature below is as good as 0, and in float32 soon is 0, which nothing can be divided by
STUCK = -1
"""In place of a token: no token fits what the answer must fit."""


@dataclass(frozen=True)
class SamplingParams:
    """As in OpenAI's API, and `top_k` (0: all) and `min_p` as in other servers. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None  # None: no log-probabilities; 0: only the chosen token's
    grammar: str | None = None  # that the answer must fit

    @property
    def plain(self) -> bool:
        """The answer is the highest logit, with nothing added to any."""
        return self.temperature == 0 and not self.adjusts and self.grammar is None

    @property
    def whole(self) -> bool:
        """Drawn from all tokens in the proportions the model gives, at some temperature."""
        return self.temperature > 0 and self.top_p == 1 and not (self.top_k or self.min_p or self.adjusts or self.grammar)

    @property
    def adjusts(self) -> bool:
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class Logprob:
    """A chosen token and, most likely first, the alternatives asked for: (token, log-probability) before any adjustment."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Constraint(Protocol):
    """What an answer must fit (`grammar.Grammar`)."""

    def allows(self, token: int) -> bool: ...

    def masked(self, row: Row) -> Row: ...  # minus infinity for what it does not allow

    def accept(self, token: int) -> None: ...


class Sampler:
    """One answer's sampling: its parameters, its own random numbers, what it has generated and what it must fit."""

    def __init__(self, params: SamplingParams, seed: int | None = None, constraint: Constraint | None = None) -> None:
        self._constraint = constraint
        self.params = params
        self.plain, self.whole = params.plain, params.whole
        self.random = np.random.default_rng(params.seed if seed is None else seed)
        self.seen: Counter[int] = Counter()
        self.logprobs: list[Logprob] = []

    def _adjusted(self, row: Row) -> Row:
        p = self.params
        row = row.copy()
        for token, bias in p.logit_bias.items():
            row[token] += bias
        for token, count in self.seen.items():
            row[token] -= p.presence_penalty + count * p.frequency_penalty
        return row

    def choose(self, row: Row) -> int:
        """The next token from its logits (n_vocab,), or `STUCK`.

        One that the constraint does not allow is drawn again among those that it does: the result is distributed as if only those had
        been there, and looking at all of them is seldom needed.
        """
        row = self._adjusted(row) if self.params.adjusts else row
        token = self._draw(row)
        if self._constraint is not None:
            if not self._constraint.allows(token):
                row = self._constraint.masked(row)
                token = self._draw(row) if np.isfinite(row.max()) else STUCK
                if token == STUCK or not np.isfinite(row[token]):
                    return STUCK
            self._constraint.accept(token)
        return token

    def _draw(self, row: Row) -> int:
        if self.params.temperature == 0:
            return int(row.argmax())
        tokens, weights = _candidates(row, self.params)
        return int(tokens[_drawn(weights, self.random.random())])

    def record(self, token: int, row: Row) -> None:
        """Note that `token` was taken from these logits."""
        if self.params.adjusts:
            self.seen[token] += 1
        wanted = self.params.top_logprobs
        if wanted is not None:
            values = row.astype(np.float64)
            values -= values.max()
            values -= np.log(np.exp(values).sum())
            best = _largest(values, wanted) if wanted else np.empty(0, np.intp)
            self.logprobs.append(Logprob(token, float(values[token]), [(int(i), float(values[i])) for i in best]))


def sample(logits: NDArray[np.float32], samplers: list[Sampler]) -> list[int]:
    """One token a row of `logits` (rows, n_vocab), or `STUCK` where none fits: the other rows are chosen none the less.

    Raises `LorayardError` (`not_a_number`) before anything is chosen.
    """
    best = logits.argmax(axis=1)  # a row with a NaN answers where it is
    peaks = logits[np.arange(len(best)), best]
    if not np.isfinite(peaks).all():
        raise LorayardError("the model computed what is not a number, perhaps because of the adapter's weights", code="not_a_number")
    tokens: list[int] = best.tolist()
    whole = [i for i, sampler in enumerate(samplers) if sampler.whole]
    if whole:
        heat = np.array([samplers[i].params.temperature for i in whole], np.float32)
        weights = logits[whole] - peaks[whole, None]
        weights /= heat[:, None]
        np.exp(weights, out=weights)
        for i, row in zip(whole, weights, strict=True):
            tokens[i] = _drawn(row, samplers[i].random.random())
    for i, sampler in enumerate(samplers):
        if not sampler.plain:
            if not sampler.whole:
                tokens[i] = sampler.choose(logits[i])
            if tokens[i] != STUCK:
                sampler.record(tokens[i], logits[i])
        elif sampler.params.top_logprobs is not None:
            sampler.record(tokens[i], logits[i])
    return tokens


def _drawn(weights: NDArray[Any], share: float) -> int:
    """The index at which the sum of the weights passes this share of it; never one of no weight."""
    cumulated = np.cumsum(weights, dtype=np.float64)
    last = np.searchsorted(cumulated, cumulated[-1])  # what follows adds nothing, and rounding may make the share all of it
    return int(min(np.searchsorted(cumulated, share * cumulated[-1], side="right"), last))


def _largest(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Indexes of the `count` largest values, largest first; equal ones by index."""
    count = min(count, len(values))
    found = np.argpartition(values, len(values) - count)[len(values) - count :] if count < len(values) else np.arange(len(values))
    return found[np.lexsort((found, -values[found]))]


def _candidates(row: Row, p: SamplingParams) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Tokens that may be taken and their weights: temperature, then top_k, top_p and min_p, in that order."""
    weights = (row - row.max()) / np.float32(p.temperature)
    np.exp(weights, out=weights)
    tokens = np.arange(len(row))
    if p.top_k and p.top_k < len(row):
        tokens = _largest(weights, p.top_k)
        weights = weights[tokens]
    if p.top_p < 1:
        kept = _nucleus(weights, p.top_p)
        tokens, weights = tokens[kept], weights[kept]
    if p.min_p:
        likely = weights >= p.min_p * weights.max()
        tokens, weights = tokens[likely], weights[likely]
    return tokens, weights


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.intp]:
    """Indexes of the fewest weights, largest first, whose share of the sum reaches `top_p`."""
    total = weights.sum(dtype=np.float64)
    order = _largest(weights, _NUCLEUS)
    if weights[order].sum(dtype=np.float64) < top_p * total:
        order = _largest(weights, len(weights))
    reached = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), top_p * total))
    return order[: reached + 1]
