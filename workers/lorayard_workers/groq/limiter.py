"""How many calls at once, and whether any: what one worker finds out by itself. What an organisation's workers share is the ledger's
(`lorayard.ledger.organisation`). Pure; times are monotonic seconds."""

from __future__ import annotations

from collections import deque

_DECREASE = 0.7
_DECREASE_EVERY_S = 1.0
_FIRST = 8.0
_UNKNOWN = 4
_UNKNOWN_PART = 0.005


class Concurrency:
    """Adaptive: doubled every round until the service first has too much to do, then one more a round; less by a part each time it has.

    While nobody knows how many requests a minute are allowed, all calls under way are refused when that shows: so they are few,
    `_UNKNOWN` or half a percent of what was answered so far.
    """

    def __init__(self, most: int) -> None:
        self._most = float(most)
        self._limit = min(_FIRST, self._most)
        self._growing = True
        self._lowered = 0.0
        self._answered = 0

    def limit(self, *, known: bool) -> int:
        return int(self._limit if known else min(self._limit, max(_UNKNOWN, self._answered * _UNKNOWN_PART)))

    def succeeded(self) -> None:
        self._answered += 1
        self._limit = min(self._most, self._limit + (1.0 if self._growing else 1.0 / self._limit))

    def overloaded(self, now: float) -> None:
        """Once for all calls of a moment: they all met the same trouble."""
        if now - self._lowered < _DECREASE_EVERY_S:
            return
        self._growing, self._lowered = False, now
        self._limit = max(1.0, self._limit * _DECREASE)


class Breaker:
    """Opens when most of the last calls failed for reasons that are the service's; then one call at a time is let through as a probe, after
    ever longer waits, until one succeeds."""

    WINDOW = 20
    PART = 0.6
    WAITS_S = (1.0, 2.0, 5.0, 10.0, 30.0)

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=self.WINDOW)
        self._opened = 0  # times in a row
        self._until = 0.0
        self._probing = False

    @property
    def closed(self) -> bool:
        return self._opened == 0

    def wait_s(self, now: float) -> float:
        """Until a call may be made: 0 for now; while a probe is under way, until more is known."""
        if self.closed:
            return 0.0
        return max(0.05, self._until - now) if self._probing or now < self._until else 0.0

    def calling(self) -> None:
        """A call is made; of an open breaker, the probe."""
        self._probing = not self.closed

    def succeeded(self) -> None:
        self._last.append(True)
        if not self.closed:
            self._last.clear()
            self._opened, self._probing = 0, False

    def failed(self, now: float) -> None:
        self._last.append(False)
        full = len(self._last) == self.WINDOW and self._last.count(False) >= self.PART * self.WINDOW
        if (self.closed and full) or (self._probing and now >= self._until):
            self._until = now + self.WAITS_S[min(self._opened, len(self.WAITS_S) - 1)]
            self._opened += 1
        self._probing = False

    def released(self) -> None:
        """The call told nothing about the service: it was cancelled."""
        self._probing = False


class Estimate:
    """Tokens of a prompt by its bytes: a guess at first, then what the service counted, rather more than less."""

    def __init__(self, first: float = 1 / 3.0) -> None:
        self.tokens_per_byte = first

    def learn(self, tokens: int, size: int) -> None:
        seen = tokens / max(1, size)
        rate = 0.2 if seen > self.tokens_per_byte else 0.02
        self.tokens_per_byte += rate * (min(1.0, seen) - self.tokens_per_byte)
