"""Which jobs go to which worker next. Pure: no I/O, no clock of its own, the same answer for the same view, which is left as it was.

The rule (docs/scheduling.md has the reasons, and the bound on waiting that follows):

1. *Shares.* While a tenant floods, those who do not come first, and nobody may be served who is more than `slack_tokens` ahead of the
   least served of those who flood (virtual token counter; work in flight counts).
2. *Due times, tempered by cost.* Every group has a rank (`groups.py`): its due time, later the narrower its batch would run. On a worker
   that first has to bind, load or fetch the adapter and to compute its prefix, it is later by the same measure: `patience_ms` for every
   factor e of what a job costs.
3. *Joining.* Jobs of an adapter that a worker has in hand cost least there: they fill what its width has free and what others leave. They
   join, half a batch at least or all there are, before anything else, until something that waits comes within `reserve_ms` of its due
   time: from then on only what ranks before it does, so that adapters in hand end and make room.
4. The worker and the group that make the least rank come first; workers with nothing to do before any others.

A batch is as large as the worker's width has use for and is meant to take no longer than `batch_ms`. A worker has jobs of at most two
adapters at once: so it never idles, and the second is fetched and loaded while the first still runs.

One batch costs a look at the worker's own adapters and at the first few groups by rank: the logarithm of the number of groups, whatever the
number of jobs.
"""

from __future__ import annotations

import heapq
import math
from collections import ChainMap, Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from lorayard_scheduler.costs import Costs, Temperature, Work
from lorayard_scheduler.groups import TICKS, Group, Groups
from lorayard_scheduler.roster import Roster, WorkerView


@dataclass(frozen=True)
class Policy:
    """Times in milliseconds of the ledger's clock."""

    reserve_ms: float = 45_000.0
    batch_ms: float = 6_000.0
    patience_ms: float = 4_000.0
    flood_ms: float = 120_000.0
    slack_tokens: float = 20_000.0
    rows_per_width: float = 2.0  # jobs in a batch at most, as a multiple of the width beyond which the worker gains little
    batches: int = 16  # that a worker may have at once
    groups_most: int = 64  # groups looked at for one batch
    workers_most: int = 8  # workers with a free hand looked at for the first of them


@dataclass(frozen=True)
class View:
    groups: Groups
    roster: Roster
    work: Mapping[str, Work] = field(default_factory=dict)
    """The mean job of an adapter, where it is not the pool's (`groups.scale.work`)."""

    def planned(self) -> None:
        """The plan was carried out: only what changes from now on is news."""
        self.groups.news.clear()
        self.roster.news.clear()


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Jobs of one adapter for one worker: how many of each tenant, the most due first. `why` is for people."""

    worker: str
    digest: str
    takes: tuple[tuple[str, int], ...]
    why: str
    rank: int = 0

    @property
    def jobs(self) -> int:
        return sum(jobs for _, jobs in self.takes)


class _Choice(NamedTuple):
    """The least comes first."""

    after: int  # 0: the worker has nothing to do, 1: it has, 2: another would rather have it
    rank: int
    load: int
    worker: str
    digest: str
    reason: str
    floods: bool


def plan(view: View, now: float, policy: Policy) -> list[Dispatch]:
    """Dispatches for all the room that came with what changed since the view was last `planned`."""
    if not view.groups.jobs or not (view.groups.news or view.roster.news):
        return []
    with view.groups.draft():
        return _Plan(view, now, policy).make()


class _Plan:
    """One plan in the making: queues shrink, tenants are charged, workers fill up."""

    def __init__(self, view: View, now: float, policy: Policy) -> None:
        self.groups, self.roster, self.now, self.policy, self.view = view.groups, view.roster, now, policy, view
        self.limit = self.groups.limit(policy.slack_tokens)
        self.loads = ChainMap({}, view.roster.loads)  # as they are with what is dispatched here, as are the others
        self.hands = ChainMap({}, view.roster.hands)
        self.given: Counter[str] = Counter()
        self.rows: dict[Costs, int] = {}
        self.idle = view.roster.idle
        first = next(self.groups.by_rank(False, self.limit), None)
        self.calm = first is None or first.rank > TICKS * (now + policy.reserve_ms)  # nothing that waits is near its due time

    def make(self) -> list[Dispatch]:
        dispatches: list[Dispatch] = []
        others = self._others()
        choices: list[tuple[_Choice, int]] = []
        for worker in self._candidates():
            self._consider(worker, choices, 0)
        while self.groups.jobs:
            if not choices:
                if (other := next(others, None)) is None:
                    break
                self._consider(other, choices, len(dispatches))
                continue
            choice, made = heapq.heappop(choices)
            worker = self.roster.workers[choice.worker]
            if made < len(dispatches):  # what it chose may be gone by now
                again = self._choose(worker)
                if again != choice:
                    if again is not None:
                        heapq.heappush(choices, (again, len(dispatches)))
                    continue
            dispatches.append(self._dispatch(worker, choice))
            self._consider(worker, choices, len(dispatches))
            if (other := next(others, None)) is not None:
                self._consider(other, choices, len(dispatches))
        return dispatches

    # -- which worker ---------------------------------------------------------------------------------------------------------------------

    def _consider(self, worker: WorkerView, choices: list[tuple[_Choice, int]], made: int) -> None:
        if self.given[worker.name] + len(worker.held) < self.policy.batches and (choice := self._choose(worker)) is not None:
            heapq.heappush(choices, (choice, made))

    def _candidates(self) -> list[WorkerView]:
        """Of what changed: workers, and those that have the adapter of a changed group in hand, the least loaded first. With a hand free:
        those where one of the first groups is warm, and a few more; the others come in turn, as these fill up."""
        roster, most = self.roster, self.policy.workers_most
        names = dict.fromkeys(name for name in roster.news if name in roster.workers)
        for digest in self.groups.news:
            if digest in roster.on and self.groups.of(digest):
                able = [(load, name) for name in roster.on[digest] if (load := self.loads[name]) < self._rows(roster.workers[name], digest)]
                names.update((name, None) for _, name in heapq.nsmallest(most, able))
        if roster.free:
            for floods in (False, True):
                for group in islice(self.groups.by_rank(floods, self.limit), most):
                    names.update(islice(roster.warm.get(group.digest, {}).items(), most))
            names.update((name, None) for _, name in islice(roster.free, most))
        self.first = names
        return [roster.workers[name] for name in sorted(names)]

    def _others(self) -> Iterator[WorkerView]:
        for _, name in list(self.roster.free)[self.policy.workers_most :]:
            if name not in self.first:
                yield self.roster.workers[name]

    # -- which group ----------------------------------------------------------------------------------------------------------------------

    def _choose(self, worker: WorkerView) -> _Choice | None:
        """The group of least rank on this worker, of tenants that do not flood if any of them waits."""
        hand = self.hands[worker.name]
        if len(hand) >= self.roster.adapters_at_once and not any(self.groups.of(digest) for digest in hand):
            return None
        choice, blocked = self._among(worker, floods=False)
        if choice is None and not blocked and self.groups.floods:
            choice, _ = self._among(worker, floods=True)
        return choice

    def _among(self, worker: WorkerView, *, floods: bool) -> tuple[_Choice | None, bool]:
        """What it has in hand is looked at first; the others in the order of their ranks, which on a worker are never less: so the first
        that could not win ends it. True: one of them should come next, and an adapter in hand must make room for it."""
        hand, load = self.hands[worker.name], self.loads[worker.name]
        best, chosen, reason = self._joining(worker, floods)
        left, left_best = None, math.inf
        for group in islice(self.groups.by_rank(floods, self.limit), self.policy.groups_most):
            if group.rank >= best:
                break
            temperature = worker.temperature(group.digest)
            rank = group.rank + self._dearer(worker, group, temperature)
            if group.digest in hand or rank >= best:
                continue
            if self._in_good_hands(worker, group):
                if rank < left_best:
                    left, left_best = group, rank
            elif len(hand) >= self.roster.adapters_at_once:
                return None, True
            else:
                best, chosen, reason = rank, group, _WARMTH[temperature]
        if chosen is not None:
            return _Choice(int(load > 0), int(best), load, worker.name, chosen.digest, reason, floods), False
        if left is not None and not load:
            return _Choice(2, int(left_best), load, worker.name, left.digest, "spread to an idle worker", floods), False
        return None, False

    def _joining(self, worker: WorkerView, floods: bool) -> tuple[float, Group | None, str]:
        """The best of the groups whose adapter the worker has in hand, and the rank it has there."""
        best, chosen, reason = math.inf, None, ""
        first = _FIRST if self.calm else 0
        for digest in self.hands[worker.name]:
            groups, rows = self.groups.of(digest), self._rows(worker, digest, floods=floods)
            room = rows - self.loads[worker.name]
            if room <= 0 or (2 * room < rows and sum([group.jobs for group in groups]) > room):
                continue  # not by dribs and drabs: every batch has its price
            for group in groups:
                rank = group.rank - self.groups.narrow(group.jobs) - first
                if rank < best and group.tenant.floods == floods and group.tenant.served <= self.limit:
                    best, chosen, reason = (
                        rank,
                        group,
                        "joined what ran of its adapter" if first else "joined its adapter, nothing else being due sooner",
                    )
        return best, chosen, reason

    def _dearer(self, worker: WorkerView, group: Group, temperature: Temperature) -> int:
        """How much later a group ranks on this worker because of what comes before its jobs there."""
        if temperature == "hot":
            return 0
        jobs, work = min(group.jobs, 2 * worker.costs.width), self.view.work.get(group.digest, self.groups.scale.work)
        return _dearer(worker.costs, work, jobs, temperature, self.policy.patience_ms)

    def _in_good_hands(self, worker: WorkerView, group: Group) -> bool:
        """Whether another worker has had this adapter in hand before, has room to finish the group, and will."""
        for name in self.roster.on.get(group.digest, ()) if self.calm else ():
            room = self._rows(self.roster.workers[name], group.digest) - self.loads[name]
            if name != worker.name and group.jobs <= room:
                return True
        return False

    # -- how many -------------------------------------------------------------------------------------------------------------------------

    def _rows(self, worker: WorkerView, digest: str, *, floods: bool = False) -> int:
        """The most jobs of a batch: what the width has use for, and no more than there is time for. A quarter of that of a flood, so that
        whoever does not flood finds room, and has not far to go."""
        work = self.view.work.get(digest)
        rows = self.rows.get(worker.costs) if work is None else None
        if rows is None:
            rows = math.ceil(worker.costs.knee * self.policy.rows_per_width)
            if worker.costs.measured:
                rows = min(rows, int(self.policy.batch_ms / worker.costs.job_ms(work or self.groups.scale.work)))
            rows = max(1, rows)
            if work is None:
                self.rows[worker.costs] = rows
        return max(1, rows // 4) if floods and worker.costs.measured else rows

    def _share(self, worker: WorkerView, digest: str, jobs: int) -> int:
        """Of so many jobs, what this worker should take when others have nothing else to do: an even part, where that ends sooner."""
        spare = self.idle - len(self.groups) + 1
        if self.loads[worker.name] or spare < 2 or jobs < 2:
            return jobs
        work = self.view.work.get(digest, self.groups.scale.work)
        cold = worker.temperature(digest)
        workers = 1
        while workers < min(spare, jobs):
            fewer = worker.costs.batch_ms(math.ceil(jobs / workers), work, cold)
            if worker.costs.batch_ms(math.ceil(jobs / (workers + 1)), work, cold) > 0.9 * fewer:
                break
            workers += 1
        return math.ceil(jobs / workers)

    def _dispatch(self, worker: WorkerView, choice: _Choice) -> Dispatch:
        """Fill one batch: the eligible tenants with jobs for this adapter in turns, the least served first."""
        digest, tokens = choice.digest, self.view.work.get(choice.digest, self.groups.scale.work).tokens
        hand, load = self.hands[worker.name], self.loads[worker.name]
        able = [g for g in self.groups.of(digest) if g.tenant.served <= self.limit and g.tenant.floods == choice.floods]
        waiting = {g.tenant.name: g.jobs for g in able}
        rows = self._rows(worker, digest, floods=choice.floods) - (load if digest in hand else 0)
        rows = min(rows, self._share(worker, digest, sum(waiting.values())))
        if len(waiting) == 1:
            takes = {t: min(rows, n) for t, n in waiting.items()}
        else:
            takes = _in_turns(waiting, {t: self.groups.served(t) for t in waiting}, rows, tokens)
        due = min(group.due for group in able)
        for tenant, jobs in takes.items():
            self.groups.take(digest, tenant, jobs, self.now)
            self.groups.charge(tenant, jobs * tokens)
        self.limit = self.groups.limit(self.policy.slack_tokens)
        self.idle -= not load
        self.loads[worker.name] = load + sum(takes.values())
        self.given[worker.name] += 1
        if digest not in hand:
            self.hands[worker.name] = hand | {digest}
        return Dispatch(worker.name, digest, tuple(sorted(takes.items())), self._why(choice, due), choice.rank)

    def _why(self, choice: _Choice, due: float) -> str:
        """One sentence."""
        left = (due - self.now) / 1000
        when = f"due in {left:.1f} s" if left >= 0 else f"due {-left:.1f} s ago"
        others = len(self.groups)
        beside = f"{others} more groups waited" if others else "nothing else waited"
        return f"{choice.reason}; {when}; {beside}"


_WARMTH: Mapping[Temperature, str] = {
    "hot": "its turn, its adapter bound here",
    "loaded": "its turn, its adapter loaded here",
    "disk": "its turn, its adapter to be loaded",
    "remote": "its turn, its adapter to be fetched",
}
_FIRST = TICKS << 45
"""More than any rank."""


def _in_turns(waiting: dict[str, int], served: dict[str, float], rows: int, tokens: float) -> dict[str, int]:
    """Whose jobs a batch of so many rows takes: a row at a time, to whoever was served least by then."""
    takes: dict[str, int] = defaultdict(int)
    heap = [(served[tenant], tenant) for tenant in waiting]
    heapq.heapify(heap)
    for _ in range(rows):
        if not heap:
            break
        level, tenant = heap[0]
        takes[tenant] += 1
        if takes[tenant] == waiting[tenant]:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (level + tokens, tenant))
    return takes


@lru_cache(maxsize=65_536)
def _dearer(costs: Costs, work: Work, jobs: int, temperature: Temperature, patience_ms: float) -> int:
    hot, here = costs.batch_ms(jobs, work, "hot"), costs.batch_ms(jobs, work, temperature)
    return round(TICKS * patience_ms * math.log(here / hot))
