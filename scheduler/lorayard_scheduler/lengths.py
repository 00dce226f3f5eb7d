"""How long answers get, by adapter and by how many tokens at most were asked for: learnt from jobs that ended."""

from __future__ import annotations

import math

import msgspec

NAMES_MOST = 1_024
_WEIGHT = 0.05  # of the newest answer
_SLOW = 0.02  # of the newest in what a token takes, which goes up and down with what else there is to do
_MOSTLY = 0.8  # an adapter with more answers than this that ran to what was asked for is taken to do so always
_RAN_ON = 0.9  # of what was asked for, of which callers may know only about how much it was
ALL = ""
"""The name of all adapters together."""


class Lengths(msgspec.Struct):
    """Means, of tokens; adapters by any name."""

    usual: dict[str, float] = {}  # by adapter
    full: dict[str, float] = {}  # what part of an adapter's answers ran to the number asked for
    asked: dict[str, float] = {}  # by adapter and about what was asked for
    token_ms: float = 0.0  # what a token of an answer takes a job, among others; 0: not known yet

    def learn(self, name: str, most: int, tokens: int, decode_ms: float) -> None:
        """An answer of so many tokens, where `most` were asked for (0: nothing was said)."""
        if tokens <= 0:
            return
        if decode_ms > 0:
            self.token_ms += (_SLOW if self.token_ms else 1.0) * (decode_ms / tokens - self.token_ms)
        for one in (ALL, name):
            _follow(self.usual, one, tokens)
        if most > 0:
            _follow(self.full, name, float(tokens >= _RAN_ON * most))
        _follow(self.asked, _asked(name, most), tokens)

    def expected(self, name: str, most: int) -> float:
        """Tokens of an answer of such a job; 0 where nobody knows."""
        usual = self.usual.get(name) or self.usual.get(ALL, 0.0)
        known = self.asked.get(_asked(name, most))
        if known is not None or not usual or most <= 0:
            return min(known or usual, most or math.inf)
        return float(most) if self.full.get(name, 0.0) > _MOSTLY else min(usual, most)


def _asked(name: str, most: int) -> str:
    """In steps that double every second time."""
    return f"{name}/{round(2 * math.log2(most)) if most > 0 else ''}"


def _follow(means: dict[str, float], name: str, seen: float) -> None:
    known = means.pop(name, None)
    means[name] = seen if known is None else known + _WEIGHT * (seen - known)
    while len(means) > NAMES_MOST:
        del means[next(iter(means))]
