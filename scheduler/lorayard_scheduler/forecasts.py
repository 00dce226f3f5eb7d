"""The scheduler's part of quotes: what it publishes about once a second, and what it learns from what became of quoted jobs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from heapq import nlargest
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple, TypeVar

import msgspec

from lorayard_scheduler.groups import Groups
from lorayard_scheduler.histograms import NOTHING, counted
from lorayard_scheduler.lengths import Lengths
from lorayard_scheduler.planner import Dispatch, Policy, View
from lorayard_scheduler.policy import rows
from lorayard_scheduler.quotes import EDGES_MS, QUOTED, Forecast, Hand, Hosted, Situation, Waits, served, urgency
from lorayard_scheduler.reasons import Pauses, held_up
from lorayard_scheduler.roster import Roster

ADAPTERS_MOST, GROUPS_MOST, KINDS_MOST = 512, 2_000, 200
"""What a forecast names one by one; anything beyond these is quoted as the usual is."""
_WEIGHT, _SLOW = 0.1, 0.01  # of the newest observation in what follows the time; in what only tells adapters apart
_LEARN = 0.01  # by how much a job that ended by its quoted percentile, or did not, moves the quantile that is quoted as such
_TEMPER = 0.02  # of what a job took longer than the usual one, in what its adapter's next ones are predicted to take
_PACE_MS = 20_000.0  # over which the pool's speed is measured
_PACE = 1.3  # what jobs take in a full pool, as a multiple of what they take at best, until that is measured
_AT_ONCE = 8  # calls of a hosted worker, until its pace is measured
_WAITED_MS = 500.0  # a group that waited for less was not held up by anything

K = TypeVar("K")
V = TypeVar("V")


class Seen(msgspec.Struct, array_like=True):
    """What became of a quoted job: it `took` so long from its quote to its end, `at_worker` of that after it was claimed (0: it never was).
    In ms."""

    situation: Situation
    digest: str
    took: float
    at_worker: float
    quoted: tuple[float, float]
    """Median and 80th percentile."""
    hosted: bool = False
    """A hosted worker ran it."""
    most: int = 0
    """Tokens that it asked for; 0: it did not say."""
    tokens: int = 0
    """Of its answer."""
    decode: float = 0.0


class _Wait(NamedTuple):
    """Of a group: since when it waits, for what at first, in words, and whether that, or what came after it, is its tenant's share."""

    since: float
    held: str = ""
    share: bool = False


class Forecaster:
    """Keeps means and histograms, a fixed number of them; and of each group that waits, since when and, at first, for what."""

    def __init__(self) -> None:
        self._turns: dict[int, float] = {}
        self._services: dict[str, float] = {}
        self._counts: dict[str, list[float]] = {}
        self._levels: dict[str, tuple[float, float]] = {}
        self._tempers: dict[str, float] = {}
        self._usual = 0.0  # logarithm of actual by predicted, of all
        self._at_worker = self._called = 0.0
        self._pace = _PACE
        self._ended: tuple[float, int] | None = None  # while there is enough to do: when, and how many jobs had ended
        self._each_there = 0.0
        self._ended_there: tuple[float, int] | None = None
        self._waiting: dict[str, _Wait] = {}
        self._pauses = Pauses()
        self._lengths = Lengths()
        self._last = Forecast(0.0, services=self._services, lengths=self._lengths)

    @classmethod
    def going_on(cls, known: Forecast | None) -> Forecaster:
        """With what the scheduler before this one had learnt."""
        found = cls()
        if known is not None:
            found._last = known
            found._turns, found._services, found._counts = known.turns, known.services, known.counts
            found._levels, found._tempers = known.levels, known.tempers
            found._lengths = known.lengths
            found._at_worker, found._called, found._each_there = known.at_worker, known.called, known.there.each_ms
        return found

    # -- what happens ---------------------------------------------------------------------------------------------------------------------

    def dispatched(self, groups: Groups, dispatch: Dispatch, now: float, *, in_hand: bool) -> str:
        """Told before a batch is carried out, with whether some worker had its adapter in hand; what its jobs waited for, in words."""
        reason, longest, paused = "", _WAITED_MS, ""
        for tenant, _ in dispatch.takes:
            group = groups.get(dispatch.digest, tenant)
            if group is None:
                continue
            wait = self._waiting.get(f"{dispatch.digest}:{tenant}", _Wait(now))
            paused = paused or self._pauses.held_up(dispatch.digest, tenant, now)
            if now - wait.since > longest:
                reason, longest = wait.held, now - wait.since
            if not in_hand and not group.tenant.floods and not wait.share:
                _follow(self._turns, urgency(group.due - wait.since), now - wait.since, _WEIGHT)
        return ", ".join(words for words in (paused, reason) if words)

    def paused(self, dispatch: Dispatch, now: float) -> str:
        """The same of hosted jobs: only a pause, for their own reason says all else."""
        held = (self._pauses.held_up(dispatch.digest, tenant, now) for tenant, _ in dispatch.takes)
        return next((words for words in held if words), "")

    def saw(self, seen: Seen) -> None:
        situation = seen.situation
        if seen.at_worker > 0 and not situation.again:  # of the others of a job's quotes, its first has told
            self._served(seen)
        levels = zip(self._levels.pop(situation.kind, QUOTED), QUOTED, seen.quoted, strict=True)
        median, p80 = (level + _LEARN * (aim - (seen.took <= by)) for level, aim, by in levels)
        self._levels[situation.kind] = min(0.65, max(0.35, median)), min(0.86, max(0.65, p80))
        if not situation.again:
            self._temper(seen.digest, math.log(max(1.0, seen.took) / max(1.0, situation.predicted)))
        self._count(situation.names, seen.took / max(1.0, situation.predicted))
        _keep(self._counts, KINDS_MOST)

    def _served(self, seen: Seen) -> None:
        """What it took where it ran."""
        name, took = served(seen.digest, hosted=seen.hosted), seen.at_worker
        if name in self._services:
            self._count(("called" if seen.hosted else "worker",), took / max(1.0, self._last.service(name, seen.most)))
        if seen.hosted:
            self._called = usual = _nearer(self._called, took, _WEIGHT)
        else:
            self._lengths.learn(name, seen.most, seen.tokens, seen.decode)
            took -= self._last.token_ms * seen.tokens
            self._at_worker = usual = _nearer(self._at_worker, took, _SLOW)
        _follow(self._services, name, took, _WEIGHT if seen.hosted else _SLOW, first=usual)
        _keep(self._services, ADAPTERS_MOST)

    def _temper(self, digest: str, log: float) -> None:
        """What all take longer is for the histograms to tell."""
        temper = self._tempers.pop(digest, 0.0) + _TEMPER * (log - self._usual)
        self._tempers[digest] = min(1.5, max(-1.5, temper))
        self._usual += _SLOW * (log - self._usual)
        _keep(self._tempers, ADAPTERS_MOST)

    def _count(self, names: Iterable[str], factor: float) -> None:
        for name in names:
            self._counts[name] = counted(self._counts.pop(name, NOTHING), factor)  # the last seen is last

    # -- what is told ---------------------------------------------------------------------------------------------------------------------

    def make(
        self, view: View, now: float, policy: Policy, *, ended: int, paused: Sequence[str] = (), there: Hosted | None = None
    ) -> Forecast:
        """`ended`: how many jobs local workers have ended, ever. Work grows with the number of groups that wait."""
        groups, roster, scale = view.groups, view.roster, view.groups.scale
        self._pauses.see(paused, now)
        job_ms = groups.job_ms
        most = rows(scale.costs, scale.work, policy, busy=view.busy(policy))
        self._measure(now, ended, job_ms, busy=bool(groups.jobs) and not roster.idle)
        limit = groups.limit(policy.slack_tokens)
        floods, served_more = _levels(groups)
        self._last = Forecast(
            at=now,
            workers=len(roster.workers),
            places=sum(worker.costs.width for worker in roster.workers.values()),
            flying=sum(roster.loads.values()),
            room=sum(max(0, most - roster.loads[name]) for _, name in roster.free),
            calm=view.left_ms(now, policy, floods=False) > policy.reserve_ms,
            each_ms=job_ms * self._pace,
            flood_jobs=policy.flood_ms / job_ms,
            floods=floods,
            served=served_more,
            slack_jobs=policy.slack_tokens / scale.work.tokens,
            ahead=_by_due(groups, now, limit),
            groups=self._waits(groups, now),
            tenants={name: tenant.jobs for name, tenant in groups.tenants.items()},
            hands={adapter: _hand(roster, names, most) for adapter, names in roster.on.items()},
            turns=self._turns,
            at_worker=self._at_worker or scale.costs.batch_ms(max(1, scale.costs.width // 2), scale.work, "loaded"),
            services=self._services,
            called=self._called or 1_000.0,
            there=self._measured(there or Hosted(), now),
            counts=self._counts,
            levels=self._levels,
            tempers=self._tempers,
            lengths=self._lengths,
            token_ms=self._lengths.token_ms or scale.costs.steps[scale.costs.width],
            paused=list(paused),
        )
        self._note_why(groups, now, limit)
        return self._last

    def _measured(self, there: Hosted, now: float) -> Hosted:
        """With the pace at which hosted jobs end while some wait; before that was seen, as the service allows, or a few at once."""
        waits = any(there.queues.values())
        if waits and self._ended_there is not None and now > self._ended_there[0] and there.ended > self._ended_there[1]:
            passed = now - self._ended_there[0]
            self._each_there = _nearer(self._each_there, passed / (there.ended - self._ended_there[1]), min(0.5, passed / _PACE_MS))
        self._ended_there = (now, there.ended) if waits else None
        there.each_ms = self._each_there or (60_000 / there.rpm if there.rpm else (self._called or 1_000.0) / _AT_ONCE)
        return there

    def _waits(self, groups: Groups, now: float) -> dict[str, Waits]:
        """The groups with the most jobs, where there are too many to name."""
        named = {f"{g.digest}:{g.tenant.name}": g for g in groups}
        self._waiting = {name: self._waiting.get(name) or _Wait(now) for name in named}
        if len(named) > GROUPS_MOST:
            named = dict(sorted(named.items(), key=lambda item: -item[1].jobs)[:GROUPS_MOST])
        return {name: Waits(g.jobs, g.due, self._waiting[name].since) for name, g in named.items()}

    def _note_why(self, groups: Groups, now: float, limit: float) -> None:
        """Of groups that have just begun to wait, or whose tenant has just had more than its share: what their first job does."""
        for group in groups:
            name = f"{group.digest}:{group.tenant.name}"
            wait = self._waiting[name]
            if not wait.held or (group.tenant.served > limit and not wait.share):
                place = self._last.place(group.digest, group.tenant.name, group.due - now, now=now, before=0)
                self._waiting[name] = _Wait(wait.since, held_up(place, self._last), place.kind == "share")

    def _measure(self, now: float, ended: int, job_ms: float, *, busy: bool) -> None:
        """The pool's pace, in means of speeds; only while every worker has something to do."""
        if not busy:
            self._ended = None
            return
        if self._ended is not None and now > self._ended[0]:
            passed = now - self._ended[0]
            speed = (ended - self._ended[1]) * job_ms / passed
            if speed > 0:
                self._pace = 1 / _nearer(1 / self._pace, speed, min(0.5, passed / _PACE_MS))
        self._ended = now, ended


def _hand(roster: Roster, workers: Iterable[str], most: int) -> Hand:
    loads = [roster.loads[name] for name in workers]
    return Hand(len(loads), sum(max(0, most - load) for load in loads), sum(loads))


def _levels(groups: Groups) -> tuple[dict[str, float], dict[str, float]]:
    """What tenants were served more than the least served of those who flood, in mean jobs: of these, and of the others that have most."""
    if not groups.floods:
        return {}, {}
    least, tokens = groups.limit(0.0), groups.scale.work.tokens
    floods = {name: (tenant.served - least) / tokens for name, tenant in groups.floods.items()}
    others = [(name, more / tokens) for name, more in groups.beyond(least).items() if name not in floods]
    return floods, dict(nlargest(GROUPS_MOST, others, key=itemgetter(1)))


def _by_due(groups: Groups, now: float, limit: float) -> list[int]:
    """Jobs due by `now` and each of `EDGES_MS`, of tenants that neither flood nor are held back by their share (`limit`, of served
    tokens); a group's are taken to be due with its first."""
    ahead = [0] * (len(EDGES_MS) + 1)
    for group in groups:
        if not group.tenant.floods and group.tenant.served <= limit:
            ahead[bisect_left(EDGES_MS, group.due - now)] += group.jobs
    return list(accumulate(ahead[:-1]))


def _nearer(known: float, seen: float, weight: float) -> float:
    return known + weight * (seen - known) if known else seen


def _follow(means: dict[K, float], name: K, seen: float, weight: float, *, first: float | None = None) -> None:
    known = means.pop(name, first)
    means[name] = seen if known is None else known + weight * (seen - known)


def _keep(known: dict[K, V], most: int) -> None:
    """Those that came last."""
    while len(known) > most:
        del known[next(iter(known))]
