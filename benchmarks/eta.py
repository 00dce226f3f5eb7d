"""Quotes against what became of them, in simulation: the code that quotes, at the head of a simulated fleet.

Coverage is the share of jobs that ended by the 80th percentile they were quoted when they came; sharpness is the mean quote over the mean
of the true 80th percentiles of like jobs: of the same wait target and about as popular an adapter (its rank, in powers of two), in the same
minute; cells of fewer than 20 such jobs are left out.

Some jobs are polled as well, once a second while they wait. Coverage of polls is the share of these quotes that came true, and a *promise*
is a quote that somebody who polls goes by until it has passed: how many of them a job breaks.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from lorayard_scheduler.forecasts import Forecaster, Seen
from lorayard_scheduler.planner import Dispatch
from lorayard_scheduler.policy import Policy
from lorayard_scheduler.quotes import Forecast, Quote, Since, Situation
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import Batch, Fleet, Machine, Outcome

EVERY_MS = 1_000.0
SAMPLES = 10
POLLED = 20
"""Jobs that are polled at a time."""
LEAST = 20


class Poll(NamedTuple):
    """A quote of a job that had waited so long; ms."""

    job: int
    at: float
    waited: float
    p80: float


class Quoted(Lorayard):
    """Quotes every job as it comes, from forecasts a second apart that went through JSON, and learns of as many as an API process does.
    `told`: jobs ask for as many tokens as they get; else they say nothing."""

    def __init__(self, policy: Policy | None = None, *, told: bool = False) -> None:
        super().__init__(policy)
        self._told = told

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.forecaster = Forecaster()
        self.forecast = Forecast(0.0)
        self.quotes: dict[int, Quote] = {}
        self.polls: list[Poll] = []
        self._places: dict[int, Situation] = {}
        self._polled: dict[int, list[tuple[float, Situation, Quote]]] = {}
        self._claimed: dict[int, float] = {}
        self._next = 0.0

    def arrived(self, job: int) -> None:
        if job not in self.quotes:  # else it comes back from a lost worker
            self._quote(job)
        super().arrived(job)

    def _most(self, job: int) -> int:
        return self.fleet.trace.outputs[job] if self._told else 0

    def _quote(self, job: int) -> None:
        self._tell()
        trace = self.fleet.trace
        digest, tenant = trace.adapter_names[trace.adapters[job]], trace.tenant_names[trace.tenants[job]]
        since = Since(self._groups[digest, tenant], self._by_tenant[tenant], self._by_tenant.total())
        place = self.forecast.place(digest, tenant, trace.targets[job], now=self.fleet.now, since=since, most=self._most(job))
        self.quotes[job] = self.forecast.quote(place)
        self._groups[digest, tenant] += 1
        self._by_tenant[tenant] += 1
        if self._left:
            self._left -= 1
            self._places[job] = place
        if len(self._polled) < POLLED:
            self._polled[job] = []

    def _poll(self, job: int) -> None:
        trace, now = self.fleet.trace, self.fleet.now
        digest, tenant = trace.adapter_names[trace.adapters[job]], trace.tenant_names[trace.tenants[job]]
        due, waited = trace.arrivals[job] + trace.targets[job], now - trace.arrivals[job]
        before = sum(row < (due, job) for row in self.queues[trace.adapters[job], trace.tenants[job]])
        place = self.forecast.place(digest, tenant, max(1.0, due - now), now=now, before=before, most=self._most(job)).after(waited)
        quote = self.forecast.quote(place)
        self.polls.append(Poll(job, now, waited, quote.p80))
        seen = self._polled[job]
        if place.again and self._left_again and (not seen or place.names != seen[-1][1].names):
            self._left_again -= 1
            seen.append((now, place, quote))

    def _tell(self) -> None:
        if self.fleet.now >= self._next:
            made = self.forecaster.make(self.view, self.fleet.now, self.policy, ended=self.done)
            self.forecast = msgspec.json.decode(msgspec.json.encode(made), type=Forecast)
            self._next, self._left, self._left_again = self.fleet.now + EVERY_MS, SAMPLES, SAMPLES
            self._groups, self._by_tenant = Counter[tuple[str, str]](), Counter[str]()
            for job in self._polled:
                if job not in self._claimed and self.fleet.trace.arrivals[job] < self.fleet.now:
                    self._poll(job)

    def turn(self) -> None:
        self._tell()
        super().turn()

    def _carry_out(self, dispatch: Dispatch) -> None:
        self.forecaster.dispatched(self.groups, dispatch, self.fleet.now, in_hand=dispatch.digest in self.roster.on)
        super()._carry_out(dispatch)
        for job in self.machines[dispatch.worker].batches[-1].jobs:
            if job in self._places or job in self._polled:
                self._claimed[job] = self.fleet.now

    def ended(self, job: int, machine: Machine, batch: Batch) -> None:
        trace, now, claimed = self.fleet.trace, self.fleet.now, self._claimed.pop(job, 0.0)
        quotes = self._polled.pop(job, [])
        if job in self._places:
            quotes.append((trace.arrivals[job], self._places.pop(job), self.quotes[job]))
        for at, place, quote in quotes:
            digest = trace.adapter_names[trace.adapters[job]]
            asked, tokens = self._most(job), trace.outputs[job]
            self.forecaster.saw(Seen(place, digest, now - at, now - claimed, quote[:2], most=asked, tokens=tokens))
        super().ended(job, machine, batch)


class Row(NamedTuple):
    """A job: what it was quoted and what it took, ms; `like` names the cell of its like."""

    median: float
    p80: float
    took: float
    like: tuple[int, ...]


def rows(quoted: Quoted, outcome: Outcome, after: float) -> list[Row]:
    """Of the jobs that came then or later."""
    trace = outcome.trace
    return [
        Row(quote.median, quote.p80, outcome.ended[job] - trace.arrivals[job], like(trace.adapters[job], trace.targets[job], at))
        for job, quote in quoted.quotes.items()
        if (at := trace.arrivals[job]) >= after
    ]


def like(adapter: int, target: float, arrived_ms: float) -> tuple[int, ...]:
    """`adapter` is its rank by popularity, from 0."""
    return int(math.log2(1 + adapter)), round(target), int(arrived_ms / 60_000)


def judge(found: Iterable[Row]) -> dict[str, float]:
    """`eta_coverage`, `eta_sharpness`, and `eta_median_coverage`."""
    every = list(found)
    cells: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in every:
        cells[row.like].append(row)
    large = [cell for cell in cells.values() if len(cell) >= LEAST]
    true = sum(len(cell) * _p80([row.took for row in cell]) for cell in large)
    return {
        "eta_coverage": sum(row.took <= row.p80 for row in every) / len(every),
        "eta_median_coverage": sum(row.took <= row.median for row in every) / len(every),
        "eta_sharpness": sum(row.p80 for cell in large for row in cell) / true if large else math.nan,
    }


def judge_polls(quoted: Quoted, outcome: Outcome, after: float) -> dict[str, float]:
    """`eta_poll_coverage`: of the quotes at polls from then on; `eta_late_poll_coverage`: of those made after what the job was quoted first
    had passed; `eta_promises_broken`: of a job that broke its first one, in the mean."""
    polls = [poll for poll in quoted.polls if poll.at >= after]
    kept = [outcome.ended[poll.job] <= poll.at + poll.p80 for poll in polls]
    late = [ok for poll, ok in zip(polls, kept, strict=True) if poll.waited > quoted.quotes[poll.job].p80]
    arrivals = outcome.trace.arrivals
    broken = Counter[int]()
    promised = {job: arrivals[job] + quoted.quotes[job].p80 for job in {poll.job for poll in polls}}
    for poll in polls:
        if poll.at > promised[poll.job]:
            broken[poll.job] += 1
            promised[poll.job] = poll.at + poll.p80
    return {
        "eta_poll_coverage": statistics.fmean(kept) if kept else math.nan,
        "eta_late_poll_coverage": statistics.fmean(late) if late else math.nan,
        "eta_promises_broken": statistics.fmean(broken.values()) if broken else 0.0,
    }


def _p80(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.8 * len(values)))]
