"""How many calls at once, and whether any: what one worker finds out by itself. What an organisation's workers share is the ledger's
(`lorayard.ledger.organisation`). Pure; times are monotonic seconds."""

from __future__ import annotations

from collections import Counter

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
    """Opens when most of the last calls failed for the service's reasons; then one call at a time is let through as a probe, after ever
    longer waits, until one succeeds.

    What one job or one adapter brings about by itself keeps nobody else waiting. A job counts once, by its last call, and an adapter as
    much as any other. The next probe is what has failed least (`suspicion`). When one succeeds, the other adapters that had failed are
    doubted for a while: their failures do not count.
    """

    WINDOW = 20
    PART = 0.6
    WAITS_S = (1.0, 2.0, 5.0, 10.0, 30.0)
    DOUBT_S = 30.0

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, bool]] = {}  # job -> adapter, whether it succeeded; the newest last
        self._opened = 0  # times in a row
        self._until = 0.0
        self._probe = ""  # the job that is probed with
        self._bad_jobs: Counter[str] = Counter()  # and so often, since it opened
        self._bad_adapters: Counter[str] = Counter()
        self._doubts: dict[str, float] = {}  # adapters, and until when

    @property
    def closed(self) -> bool:
        return self._opened == 0

    def wait_s(self, now: float) -> float:
        """Until a call may be made: 0 for now; while a probe is under way, until more is known."""
        if self.closed:
            return 0.0
        return max(0.05, self._until - now) if self._probe or now < self._until else 0.0

    def suspicion(self, job: str, adapter: str) -> tuple[int, int]:
        """How often calls of the adapter, and of the job, have failed since it opened: the least is the next probe."""
        return self._bad_adapters[adapter], self._bad_jobs[job]

    def doubted(self, now: float) -> set[str]:
        """Adapters that may be to blame themselves: others are to be tried before them."""
        return {*self._bad_adapters, *(adapter for adapter, until in self._doubts.items() if until > now)}

    def calling(self, job: str) -> None:
        """A call is made; of an open breaker, the probe."""
        self._probe = "" if self.closed else job

    def succeeded(self, job: str, adapter: str, now: float) -> None:
        """The service did what was asked, or had a reason of the job's own not to."""
        self._doubts.pop(adapter, None)
        if self.closed:
            self._note(job, adapter, True)
            return
        self._doubts |= {other: now + self.DOUBT_S for other in self._bad_adapters if other != adapter}
        self._last.clear()
        self._bad_jobs.clear()
        self._bad_adapters.clear()
        self._opened, self._probe = 0, ""

    def failed(self, job: str, adapter: str, now: float) -> None:
        if not self.closed:
            self._bad_jobs[job] += 1
            self._bad_adapters[adapter] += 1
            if job == self._probe:
                self._open(now)
        elif self._doubts.get(adapter, 0.0) <= now:
            self._note(job, adapter, False)
            shares = self._shares()
            overall = sum(not went_well for _, went_well in self._last.values()) / self.WINDOW
            if len(self._last) == self.WINDOW and min(overall, sum(shares.values()) / len(shares)) >= self.PART:
                self._bad_adapters.update(one for one, share in shares.items() if share >= self.PART)
                self._open(now)

    def released(self, job: str) -> None:
        """The call told nothing about the service: it was cancelled."""
        if job == self._probe:
            self._probe = ""

    def _note(self, job: str, adapter: str, went_well: bool) -> None:
        self._last.pop(job, None)
        self._last[job] = adapter, went_well
        if len(self._last) > self.WINDOW:
            del self._last[next(iter(self._last))]

    def _shares(self) -> dict[str, float]:
        """The failing part of each adapter's calls."""
        calls = Counter(adapter for adapter, _ in self._last.values())
        bad = Counter(adapter for adapter, went_well in self._last.values() if not went_well)
        return {adapter: bad[adapter] / n for adapter, n in calls.items()}

    def _open(self, now: float) -> None:
        self._until = now + self.WAITS_S[min(self._opened, len(self.WAITS_S) - 1)]
        self._opened += 1
        self._probe = ""


class Estimate:
    """Tokens of a prompt by its bytes: a guess at first, then what the service counted, rather more than less."""

    def __init__(self, first: float = 1 / 3.0) -> None:
        self.tokens_per_byte = first

    def learn(self, tokens: int, size: int) -> None:
        seen = tokens / max(1, size)
        rate = 0.2 if seen > self.tokens_per_byte else 0.02
        self.tokens_per_byte += rate * (min(1.0, seen) - self.tokens_per_byte)
