"""When a job will have ended: quoted as it is submitted and whenever it is polled, without anything kept for each job.

The scheduler publishes a `Forecast` about once a second (`forecasts.py`): what is in hand, what waits, how long groups lately waited for
their turn, what jobs of an adapter take. From it and a job's place in its queue `Forecast.place` predicts a time, by *situations*:

    joins         a worker has its adapter in hand, and room: it goes there at once
    own           its adapter is in hand, and jobs of its own group are before it
    free          its adapter is in no hand, and a worker has a hand free
    turn          no worker has: it waits as long as groups of its urgency lately did, less what its group has waited already
    late, behind  something that waits is near its due time, so that nothing goes before what is due sooner; behind: its adapter is in hand
    flood         its tenant floods: its tenant's jobs are before it, and other floods' as far as they share evenly
    share         its tenant has had, or with what is before it will have had, so much more than whoever floods that these come first
    worker        a worker has it
    hosted, called                it is for hosted workers, or one of them has it
    limited, doubted, blocked     such, and others wait there already; calls fail; none is made before a known moment

No such prediction is exact. So what is quoted is a quantile of what became of predictions like it: for each situation, histograms of the
factor by which jobs took longer than predicted are kept, which forget slowly; narrow ones (by size and urgency) lean on wider ones until
they have seen enough. A job that is quoted again while it waits has waited in vain so far, the more so the longer that is beside what is
predicted now; so such quotes have histograms of their own, by that (`Situation.after`), and come true as often as the first ones do.
Times are milliseconds.
"""

from __future__ import annotations

import math
from bisect import bisect
from typing import NamedTuple

import msgspec

from lorayard.jobs import adapter_of, lane_of
from lorayard_scheduler.histograms import below, mixed, quantile
from lorayard_scheduler.lengths import Lengths

EDGES_MS: tuple[float, ...] = tuple(
    1000.0 * s for s in (*(-(2.0**k) for k in range(14, -1, -1)), 0.0, *(2.0 ** (k / 2) for k in range(35)))
)
"""From now, the due times up to which waiting jobs are counted."""

_AGAIN, _AGES = " again", 14
_THERE = "@there"
_HOSTED = ("hosted", "limited", "doubted", "blocked")

QUOTED = (0.5, 0.8)
_LEAST_MS = 1.0
_FARTHEST = 20.0  # times what was predicted, well within the histograms


class Quote(NamedTuple):
    """From now: half of the jobs like this one have ended by `median`, four of five by `p80`. `risk` is the probability that it has not
    ended by its deadline; None without one."""

    median: float
    p80: float
    risk: float | None = None


class Situation(NamedTuple):
    """What a job's time is predicted from. `size` and `urgency` tell apart predictions that go wrong differently; `before` is the jobs
    that are served first."""

    kind: str
    predicted: float
    size: int | str = 0
    urgency: int = 0
    before: float = 0.0

    def after(self, waited: float) -> Situation:
        """The same of a job that has waited so long already. What has taken long beside all that is predicted will take longer."""
        predicted = max(1.0, self.predicted)
        age = min(_AGES, int(2 * math.log2(1 + waited / predicted)))
        if age == 0:
            return self
        return Situation(self.kind + _AGAIN, math.hypot(predicted, waited / 2), age, 0, self.before)

    @property
    def again(self) -> bool:
        """Not the first quote of its job."""
        return self.kind.endswith(_AGAIN)

    @property
    def hosted(self) -> bool:
        """It is hosted workers that it waits for."""
        return self.kind.removesuffix(_AGAIN) in _HOSTED

    def among(self, together: int, each_ms: float) -> Situation:
        """The same of a job in the middle of so many that come together, where that makes a difference."""
        return self._replace(kind=f"{self.kind} together") if together * each_ms > 0.5 * self.predicted else self

    @property
    def names(self) -> tuple[str, ...]:
        """Of its histograms, the widest first."""
        if self.again:
            return _AGAIN, self.kind, f"{self.kind}/{self.size}"
        return "", self.kind, f"{self.kind}/{self.size}", f"{self.kind}/{self.size}/{self.urgency}"


class Waits(msgspec.Struct, array_like=True):
    """A group: how many jobs wait, when the first is due, and since about when."""

    jobs: int
    due: float
    since: float


class Hand(msgspec.Struct, array_like=True):
    """An adapter that workers have in hand: how many do, how many more jobs they would take, and how many they have, of any adapter."""

    workers: int
    room: int
    flying: int = 0


class Hosted(msgspec.Struct):
    """Hosted workers and their service. Queues are named as groups are."""

    workers: list[str] = []  # alive and ready
    room: int = 0  # more jobs that they would take
    ended: int = 0  # jobs, ever
    queues: dict[str, int] = {}  # jobs that wait for them and nobody else
    each_ms: float = 0.0  # between two ends, while some wait
    rpm: int = 0  # calls a minute that the service allows; 0: unknown
    blocked_until: float = 0.0  # no call is made before that; or was
    failing: bool = False  # most calls fail
    doubted: list[str] = []  # adapters whose calls fail
    closed: list[str] = []  # tenants whose jobs with route auto may not leave


class Since(NamedTuple):
    """Jobs that came after the forecast: of the group, of the tenant, of all."""

    group: int = 0
    tenant: int = 0
    pool: int = 0


NOTHING = Since()


class Forecast(msgspec.Struct):
    """Of one pool at a moment (`at`, by the ledger's clock). Groups are named DIGEST:TENANT, lanes as in the ledger; hands by adapter."""

    at: float
    workers: int = 0  # local ones
    places: int = 0  # sequences that they decode at once
    flying: int = 0  # jobs that they have
    room: int = 0  # jobs that workers with a free hand would take; 0: no hand is free
    calm: bool = True  # nothing that waits, is of no flood and not held back by its tenant's share, is near its due time
    each_ms: float = 0.0  # between two ends, while there is enough to do
    flood_jobs: float = 1e12  # a tenant with more of them floods
    floods: dict[str, float] = {}  # tenants that do: how many mean jobs each was served more than the least served of them
    served: dict[str, float] = {}  # the same of others, while somebody floods: of those that were served more than that one
    slack_jobs: float = 1e12  # by how many jobs more one may have been served and still be
    ahead: list[int] = []  # jobs due by `at` + each of EDGES_MS, of tenants that do not flood
    groups: dict[str, Waits] = {}
    tenants: dict[str, int] = {}  # jobs that wait
    hands: dict[str, Hand] = {}
    turns: dict[int, float] = {}  # by urgency: how long groups waited for a hand
    at_worker: float = 0.0  # from claim to end, of a mean job, beside the tokens of its answer
    services: dict[str, float] = {}  # the same, by adapter (`served`); of hosted ones all of it
    token_ms: float = 0.0  # of decoding a job
    lengths: Lengths = msgspec.field(default_factory=Lengths)  # by `served`
    tempers: dict[str, float] = {}  # by queue's name: logarithm of how much longer its jobs take than is usual where they are
    there: Hosted = msgspec.field(default_factory=Hosted)
    called: float = 0.0  # from claim to end, of a mean job at hosted workers
    counts: dict[str, list[float]] = {}
    levels: dict[str, tuple[float, float]] = {}  # by kind: the quantiles of its histograms that lately were the median and the 80th
    paused: list[str] = []  # as in the ledger

    def place(
        self,
        digest: str,
        tenant: str,
        target: float,
        *,
        now: float,
        before: int | None = None,
        since: Since = NOTHING,
        most: int = 0,
    ) -> Situation:
        """Of a job that waits, or would wait, in that queue, to be due in `target`. `before`: the jobs of its group ahead of it, where
        that is known; `most`: how many tokens it asks for, 0 where it does not say."""
        lane, temper = lane_of(digest), math.exp(self.tempers.get(digest, 0.0))
        there, here = (temper * self.service(served(digest, hosted=hosted), most) for hosted in (True, False))
        elsewhere = self._hosted(digest, tenant, now, before, since, there)
        if lane not in ("", "auto") or (lane and not self.workers):
            return elsewhere
        place = self._local(digest, tenant, target, now, before, since, here)
        may_leave = lane and self.there.workers and tenant not in self.there.closed
        return elsewhere if may_leave and place.predicted > max(target, elsewhere.predicted) else place

    def working(self, digest: str, worker: str, most: int = 0) -> Situation:
        """Of a job that this worker has: from its claim."""
        hosted = worker in self.there.workers or lane_of(digest) not in ("", "auto")
        return Situation("called" if hosted else "worker", self.service(served(digest, hosted=hosted), most))

    def service(self, name: str, most: int = 0) -> float:
        """From claim to end, of a job of that name (`served`) that asks for so many tokens. Hosted ones are not told apart by that."""
        if name.endswith(_THERE):
            return self.services.get(name, self.called)
        beside = self.services.get(name, self.at_worker)
        return max(_LEAST_MS, beside + self.token_ms * self.lengths.expected(name, most))

    def _hosted(self, digest: str, tenant: str, now: float, before: int | None, since: Since, service: float) -> Situation:
        there, adapter = self.there, adapter_of(digest)
        own, others = there.queues.get(f"{digest}:{tenant}", 0), sum(there.queues.values())
        ahead = others + since.group if before is None else others - own + before
        wait = max(0, ahead - there.room) * there.each_ms
        if there.blocked_until > now:
            return Situation("blocked", there.blocked_until - now + wait + service)
        if there.failing or adapter in there.doubted:
            return Situation("doubted", wait + service, adapter[:12])
        if wait > 0:
            return Situation("limited", wait + service, _size(service, wait), 0, ahead)
        return Situation("hosted", service, adapter[:12])

    def _local(self, digest: str, tenant: str, target: float, now: float, before: int | None, since: Since, service: float) -> Situation:
        queued = self.tenants.get(tenant, 0) + since.tenant
        if queued > self.flood_jobs:
            return self._of_floods(tenant, service, queued)
        place = self._place(digest, tenant, target, now, before, since, service)
        mine = self._before_it(digest, tenant, queued, before)
        others = self._before_share(tenant, mine)
        share = self._after("share", service, mine + others, int(3 * others / (mine + others))) if others else place
        return share if share.predicted > place.predicted else place

    def _before_it(self, digest: str, tenant: str, queued: int, before: int | None) -> float:
        """Of so many jobs of its tenant, those that are served before it: the same part as of its group's, and all before one that is
        only coming."""
        group = self.groups.get(f"{digest}:{tenant}")
        if before is None or group is None:
            return queued if before is None else before
        return queued * min(1.0, before / max(1, group.jobs))

    def _of_floods(self, tenant: str, service: float, queued: int) -> Situation:
        """Of a job of a flood of so many jobs: which of them are first is not known. Others that flood are served until they have had as
        much."""
        had = self.floods.get(tenant, self.served.get(tenant, 0.0))
        others = {name: had + queued - theirs for name, theirs in self.floods.items() if name != tenant}
        rivals = [min(self.tenants.get(name, 0), max(0.0, jobs)) for name, jobs in others.items()]
        return self._after("share" if had > self.slack_jobs else "flood", service, queued + sum(rivals), len(rivals))

    def _before_share(self, tenant: str, mine: float) -> float:
        """Of one that does not flood: how many jobs of floods come first, until none of them was served too much less."""
        level = self.served.get(tenant, 0.0) + mine - self.slack_jobs
        rows = ((self.tenants.get(name, 0) - self.flood_jobs, level - theirs) for name, theirs in self.floods.items())
        return sum(max(0.0, min(row)) for row in rows)

    def _place(self, digest: str, tenant: str, target: float, now: float, before: int | None, since: Since, service: float) -> Situation:
        group, hand = self.groups.get(f"{digest}:{tenant}"), self.hands.get(adapter_of(digest))
        ahead = (group.jobs if group else 0) + since.group if before is None else before
        came = max(since.pool, ahead)  # what its group has before it may have come since the forecast
        sooner = self.due_before(now + target, None if before is None else group) + (before or 0)
        if not self.calm:
            before_it = sooner + since.pool
            return self._after(
                "late" if hand is None else "behind", service, before_it, int(3 * ahead / max(1.0, before_it)), urgency(target)
            )
        if hand is not None:
            if ahead < hand.room and group is None:
                return Situation("joins", service, self._crowd(came))
            each = self.each_ms * self.workers / hand.workers
            behind = max(0.0, hand.flying * each - self.service(adapter_of(digest)))  # a job is there as long as those take before it
            wait = behind + ahead * each
            return Situation("own", service + wait, _size(service, wait), 0, ahead)
        if group is None and came < self.room:
            return Situation("free", service, self._crowd(came))
        level = urgency(min(target, group.due - group.since) if group else target)
        turn, waited = self.turns.get(level, 0.0), now - group.since if group else 0.0
        part = min(4, int(4 * waited / turn)) if group and turn else -1
        wait = max(turn - waited, 0.1 * turn, since.pool * self.each_ms) + ahead * self.each_ms
        return Situation("turn", service + wait, part, level, sooner)

    def _after(self, kind: str, service: float, jobs: float, size: int, urgency: int = 0) -> Situation:
        return Situation(kind, service + jobs * self.each_ms, size, urgency, jobs)

    def _crowd(self, more: int) -> int:
        """How many jobs there are for each place, in steps that double every second time."""
        return min(12, int(2 * math.log2(1 + 4 * (self.flying + sum(self.tenants.values()) + more) / max(1, self.places))))

    def due_before(self, due: float, beside: Waits | None = None) -> float:
        """About how many jobs that wait are, of tenants that do not flood; `beside` those of this group."""
        at = due - self.at
        after = bisect(EDGES_MS, at)
        if not self.ahead:
            return 0
        if after in (0, len(EDGES_MS)):
            return self._due_by(min(after, len(EDGES_MS) - 1), beside)
        low, high = EDGES_MS[after - 1], EDGES_MS[after]
        few, many = self._due_by(after - 1, beside), self._due_by(after, beside)
        return few + (many - few) * (at - low) / (high - low)

    def _due_by(self, edge: int, beside: Waits | None) -> int:
        jobs = beside.jobs if beside and beside.due - self.at <= EDGES_MS[edge] else 0
        return max(0, self.ahead[edge] - jobs)

    def quote(self, situation: Situation, deadline: float = 0.0, elapsed: float = 0.0) -> Quote:
        """From now on; `deadline` counts from now too (0: none). What is predicted began `elapsed` ago, and has not ended yet."""
        shape = mixed(*(tuple(self.counts.get(name, ())) for name in situation.names))
        predicted = max(situation.predicted, elapsed / _FARTHEST, 1.0)
        gone = below(shape, math.log(elapsed / predicted)) if elapsed > 0 else 0.0
        levels = self.levels.get(situation.kind, QUOTED)
        median, p80 = (predicted * math.exp(quantile(shape, gone + q * (1 - gone))) - elapsed for q in levels)
        risk = None
        if deadline > 0:
            risk = (1 - below(shape, math.log((elapsed + deadline) / predicted))) / max(1 - gone, 1e-9)
        return Quote(max(median, 0.0), max(p80, 0.0), None if risk is None else min(1.0, risk))


def served(digest: str, *, hosted: bool) -> str:
    """What the time is known by that jobs in a queue of that name take where they run."""
    return adapter_of(digest) + (_THERE if hosted else "")


def _size(service: float, wait: float) -> int:
    """How large a wait is beside what follows it, in steps that double every second time."""
    return min(20, int(2 * math.log2(1 + wait / max(1.0, service))))


def urgency(target: float) -> int:
    """By how long a job can wait, in powers of two of a millisecond."""
    return round(math.log2(max(1.0, target)))
