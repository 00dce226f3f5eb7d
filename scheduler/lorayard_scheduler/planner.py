"""Which jobs go to which worker next. Pure: no I/O, no clock of its own, the same answer for the same view, which is left as it was.

The rule (docs/scheduling.md has the reasons, and the bound on waiting that follows):

1. *Shares.* While a tenant floods, those who do not come first, and nobody may be served who is more than `slack_tokens` ahead of the
   least served of those who flood (virtual token counter; work in flight counts). Floods leave a hand free on every worker, some of its
   width, and never more prompts unread than are read in a moment; where somebody else has jobs, only a few workers go on with them.
2. *Due times, tempered by cost.* Every group has a rank (`groups.py`): its due time, later the narrower its batch would run. On a worker
   that first has to bind, load or fetch the adapter and to compute its prefix, it is later by the same measure: `patience_ms` for every
   factor e of what a job costs.
3. *Joining.* Jobs of an adapter that a worker has in hand cost least there: they fill what its width has free and what others leave. They
   join before anything else, half a batch at least, or all there are, or those of a group that is nearly due, or the last batch as soon as
   the worker needs more, until something that waits comes within `reserve_ms` of its due time: from then on only what ranks before it does,
   so that adapters in hand end and make room. Once something is overdue, which no planner can help, switches are what makes all wait
   longer: then jobs join that are due up to `stay_ms` later than what waits.
4. The worker and the group that make the least rank come first; workers with nothing to do before any others, and of these the fastest.
   What a worker that is faster by a quarter would end in half the time, after what it has, is left to it.

A batch is as large as pays on the worker, or twice its width while all are busy, and is meant to take no longer than `batch_ms`. A worker
has jobs of at most two adapters at once: so it never idles, and the second is fetched and loaded while the first still runs. While nothing
is nearly due it gets the second no sooner than `lead_ms` before it would run dry: what is not given away yet can go to whoever is free
first.

A plan ends where it would go on by a due time that is not known: that of what is left of a group, where others wait too. Who carries the
plan out reads these groups again and asks for the next.

Wherever this says adapter, it means all lanes in which jobs may be queued for it (`lorayard.jobs.Lane`); a batch is of one lane.

One batch costs a look at the worker's own adapters and at the first few groups by rank: the logarithm of the number of groups, whatever the
number of jobs.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import attrgetter
from typing import NamedTuple

from lorayard.jobs import adapter_of
from lorayard_scheduler.costs import Costs, Temperature
from lorayard_scheduler.floods import Floods, Seat
from lorayard_scheduler.groups import TICKS, Group, Groups
from lorayard_scheduler.policy import Policy as Policy
from lorayard_scheduler.policy import Prices, prices_of
from lorayard_scheduler.roster import Roster


@dataclass(frozen=True)
class View:
    groups: Groups
    roster: Roster

    def busy(self, policy: Policy) -> bool:
        """Whether nobody could begin a job sooner than who has its adapter in hand: much waits, or there is one worker."""
        return len(self.roster.workers) == 1 or self.groups.waits_ms >= policy.batch_ms

    def left_ms(self, now: float, policy: Policy, *, floods: bool = True) -> float:
        """How long until what is served next is due, by its rank: more than `reserve_ms`, and all is calm. Infinite where nothing waits.
        That is a flood's where nobody else has jobs; without `floods`, nothing then: to whoever does not flood, they are not before it."""
        first = self.groups.first(self.groups.limit(policy.slack_tokens), floods=floods)
        return math.inf if first is None else first.rank / TICKS - now

    def planned(self) -> None:
        """The plan was carried out and there is no more of it: only what changes from now on is news."""
        self.groups.news.clear()
        self.roster.news.clear()


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Jobs of one adapter and lane (both in `digest`) for one worker: how many of each tenant, the most due first. `why` is for people."""

    worker: str
    digest: str
    takes: tuple[tuple[str, int], ...]
    why: str
    more: bool = False
    """Of the last: with these carried out and their groups read again, there is more to plan, also where nothing else changes."""

    @property
    def jobs(self) -> int:
        return sum(jobs for _, jobs in self.takes)


class _Choice(NamedTuple):
    """The least comes first."""

    after: int  # 0: the worker has nothing to do, 1: it has, 2: another would rather have it
    rank: int
    ends: float  # ms until one usual job more would have ended there
    worker: str
    digest: str
    reason: str
    floods: bool


class _Queue:
    """The groups of tenants that do, or do not, flood, by rank, as far as this plan has looked at them."""

    def __init__(self, more: Iterator[Group]) -> None:
        self.first: list[Group] = []
        self._more = more

    def reach(self) -> bool:
        """Have one group more in `first`, if there is one."""
        group = next(self._more, None)
        if group is None:
            return False
        self.first.append(group)
        return True


def plan(view: View, now: float, policy: Policy) -> list[Dispatch]:
    """Dispatches for the room that came with what changed since the view was last `planned`."""
    if not view.groups.jobs or not (view.groups.news or view.roster.news):
        return []
    return _Plan(view, now, policy).make()


class _Plan:
    """One plan in the making: workers fill up, tenants are charged, and what is `left` of groups goes down."""

    def __init__(self, view: View, now: float, policy: Policy) -> None:
        self.view, self.groups, self.roster, self.now, self.policy = view, view.groups, view.roster, now, policy
        self.waiting = len(self.groups)
        self.left: dict[Group, int] = {}  # of groups of which something is dispatched
        self.seats: dict[str, Seat] = {}
        self.known: dict[Costs, Prices] = {}
        self.swift: dict[Costs, Sequence[str]] = {}
        self.idle = view.roster.idle
        self.busy = view.busy(policy)
        self.floods = Floods(view.groups, view.roster, now, policy)
        self.queues = (_Queue(self.groups.by_rank(False, self.floods.limit)), _Queue(self.groups.by_rank(True, self.floods.limit)))

    def make(self) -> list[Dispatch]:
        left_ms = self.view.left_ms(self.now, self.policy)
        self.calm = left_ms > self.policy.reserve_ms  # nothing is nearly due
        self.soon = TICKS * (self.now + self.policy.reserve_ms)  # what ranks before this is
        if not (names := self._candidates()):
            return []
        self.late = left_ms < 0
        self.ahead = _FIRST if self.calm else round(TICKS * self.policy.stay_ms) if self.late else 0  # of what joins
        dispatches: list[Dispatch] = []
        others: Iterator[str] | None = None
        choices: list[tuple[_Choice, int]] = []
        for name in names:
            self._consider(self._seat(name), choices, 0)
        while self.waiting:
            if choices:
                choice, made = heapq.heappop(choices)
                seat = self.seats[choice.worker]
                if made < len(dispatches):  # what it chose may be gone by now
                    again = self._choose(seat)
                    if again != choice:
                        if again is not None:
                            heapq.heappush(choices, (again, len(dispatches)))
                        continue
                dispatch = self._dispatch(seat, choice)
                if dispatch is None:
                    dispatches[-1] = replace(dispatches[-1], more=True)
                    break
                dispatches.append(dispatch)
                self._consider(seat, choices, len(dispatches))
            if others is None:
                others = self._others()
            if (name := next(others, "")) != "":
                self._consider(self._seat(name), choices, len(dispatches))
            elif not choices:
                break
        return dispatches

    # -- which worker ---------------------------------------------------------------------------------------------------------------------

    def _seat(self, name: str) -> Seat:
        seat = self.seats.get(name)
        if seat is None:
            worker = self.roster.workers[name]
            faster = self._faster(worker.costs) if self.roster.uneven else ()
            load, prices, steady = self.roster.loads[name], self._prices(worker.costs), self.floods.steady(name)
            unread = max(0.0, self.roster.reads.get(name, 0.0) - self.now) if load else 0.0
            seat = Seat(worker, load, self.roster.hands[name], prices, faster, unread, steady)
            self.seats[name] = seat
        return seat

    def _prices(self, costs: Costs) -> Prices:
        prices = self.known.get(costs)
        if prices is None:
            prices = self.known[costs] = prices_of(costs, self.groups.scale.work, self.policy, self.busy)
        return prices

    def _room(self, name: str) -> int:
        """How many more jobs the worker has use for."""
        return self._prices(self.roster.workers[name].costs).rows - self._load(name)

    def _load(self, name: str) -> int:
        seat = self.seats.get(name)
        return self.roster.loads[name] if seat is None else seat.load

    def _hand(self, name: str) -> frozenset[str]:
        seat = self.seats.get(name)
        return self.roster.hands[name] if seat is None else seat.hand

    def _faster(self, costs: Costs) -> Sequence[str]:
        """Of the workers that are much faster than such a one, a few that have least to do."""
        names = self.swift.get(costs)
        if names is None:
            loads, workers = self.roster.loads, self.roster.workers
            soon = heapq.nsmallest(
                self.policy.workers_most, [(loads[name] * workers[name].costs.pace, name) for name in self.roster.faster(costs)]
            )
            names = self.swift[costs] = tuple([name for _, name in soon])
        return names

    def _consider(self, seat: Seat, choices: list[tuple[_Choice, int]], made: int) -> None:
        if seat.given < self.policy.batches and (choice := self._choose(seat)) is not None:
            heapq.heappush(choices, (choice, made))

    def _candidates(self) -> list[str]:
        """Of what changed: workers, and those that have the adapter of a changed group in hand, the least loaded first. With a hand free:
        those where one of the first groups is warm, and a few more; the others come in turn, as these fill up."""
        roster, most = self.roster, self.policy.workers_most
        names = dict.fromkeys([name for name in roster.news if name in roster.workers])
        loads, workers = roster.loads, roster.workers
        for adapter in roster.on.keys() & self.groups.news:
            if self.groups.has(adapter):
                able = [(loads[name], name) for name in roster.on[adapter] if loads[name] < self._prices(workers[name].costs).rows]
                names.update((name, None) for _, name in (heapq.nsmallest(most, able) if len(able) > most else able))
        free = list(islice(self._free(), most))
        if free:
            for queue in self.queues:
                while len(queue.first) < most and queue.reach():
                    pass
                for group in queue.first[:most]:
                    for name in islice(roster.warm.get(adapter_of(group.digest), ()), most):
                        if self._wants(name):
                            names[name] = None
            names.update(dict.fromkeys(free))
        self.candidates = names
        return sorted(names)

    def _wants(self, name: str) -> bool:
        """Whether the worker, if it has a hand free, needs another adapter yet."""
        return not self.calm or self.floods.steady(name) <= self._prices(self.roster.workers[name].costs).lead

    def _free(self) -> Iterator[str]:
        """Workers that may begin another adapter, those that would end it first first."""
        most = math.inf
        if self.calm and not self.floods.beside:
            most = max(((self._prices(c).lead + 1) * c.pace for c in self.roster.kinds), default=0.0)
        for ends, name in self.roster.free:
            if ends > most:
                return
            if self._wants(name):
                yield name

    def _others(self) -> Iterator[str]:
        return (name for name in self._free() if name not in self.candidates)

    # -- which group ----------------------------------------------------------------------------------------------------------------------

    def _choose(self, seat: Seat) -> _Choice | None:
        """The group of least rank on this worker, of tenants that do not flood if any of them waits."""
        if len(seat.hand) >= self.roster.adapters_at_once and not any(map(self.groups.has, seat.hand)):
            return None
        choice, blocked = self._among(seat, floods=False)
        if choice is None and not blocked and self.groups.floods:
            choice, _ = self._among(seat, floods=True)
        return choice

    def _among(self, seat: Seat, *, floods: bool) -> tuple[_Choice | None, bool]:
        """What it has in hand is looked at first; the others in the order of their ranks, which on a worker are never less: so the first
        that could not win ends it. True: one of them should come next, and an adapter in hand must make room for it."""
        worker, hand, dearer, widest, queue = seat.worker, seat.hand, seat.prices.dearer, seat.prices.most, self.queues[floods]
        best, chosen, reason = self._joining(seat, floods)
        left, left_best = None, math.inf
        hands = self.roster.adapters_at_once
        full = self.calm and (seat.load if floods else seat.steady) > seat.prices.lead
        if self.floods.hold_back(seat, floods):
            hands = max(1, hands - 1)  # the other is for who does not flood
            full = full or min(self.floods.rows(seat, floods), self.floods.to_read(seat)) <= 0
        full = full or len(hand) >= hands
        contended, changed = bool(self.groups.floods), self.left
        first, number, before = queue.first, 0, 0
        while number < self.policy.groups_most and (number < len(first) or queue.reach()):
            group = first[number]
            number += 1
            if group.rank >= best:
                break
            adapter = adapter_of(group.digest)
            jobs = changed.get(group, group.jobs)
            if not jobs or adapter in hand or (contended and self.floods.over(group)):
                continue
            temperature = worker.temperature(adapter)
            rank = group.rank + dearer[temperature][jobs if jobs < widest else widest]
            if rank >= best:
                continue
            if seat.faster and self._is_better_off(group, adapter, seat, temperature, before):
                before += jobs
                continue
            if self.calm and adapter in self.roster.on and self._in_good_hands(seat, group, adapter):
                if rank < left_best:
                    left, left_best = group, rank
            elif full:
                return None, True
            else:
                best, chosen, reason = rank, group, _WARMTH[temperature]
        if chosen is not None:
            return _Choice(int(seat.load > 0), int(best), seat.ends, seat.name, chosen.digest, reason, floods), False
        if left is not None and not seat.load:
            return _Choice(2, int(left_best), seat.ends, seat.name, left.digest, "spread to an idle worker", floods), False
        return None, False

    def _joining(self, seat: Seat, floods: bool) -> tuple[float, Group | None, str]:
        """The best of the groups whose adapter the worker has in hand, and the rank it has there."""
        best, chosen, reason = math.inf, None, ""
        rows = seat.prices.rows
        room = rows - seat.load
        if self.floods.hold_back(seat, floods):
            rows = seat.prices.few
            room = min(self.floods.rows(seat, floods) - seat.load, self.floods.to_read(seat))
        if room <= 0:
            return best, chosen, reason
        needed = self.calm and seat.load <= seat.prices.lead
        for adapter in seat.hand or (seat.worker.hot if self.late else ()):
            groups = self.groups.of(adapter)
            waiting = sum([self._jobs(group) for group in groups]) if 2 * room < rows else 0
            drabs = waiting > room and not (needed and waiting <= room + rows)  # the last of them come before another adapter
            for group in groups:
                jobs = self._jobs(group)
                if drabs and (self.late or group.rank > self.soon or jobs > room):
                    continue  # every batch has its price
                rank = group.rank - self.groups.narrow(jobs) - self.ahead
                if not jobs or rank >= best or group.tenant.floods != floods or self.floods.over(group):
                    continue
                if not seat.faster or not self._is_better_off(group, adapter, seat):
                    best, chosen, reason = rank, group, _JOINED[not self.ahead]
        return best, chosen, reason

    def _jobs(self, group: Group) -> int:
        """What is left of it."""
        return self.left.get(group, group.jobs)

    def _in_good_hands(self, seat: Seat, group: Group, adapter: str) -> bool:
        """Whether another worker, not much slower, has had its adapter in hand before, has room to finish the group, and will."""
        jobs, costs = self._jobs(group), seat.worker.costs
        able = [name for name in self.roster.on[adapter] if name != seat.name and jobs <= self._room(name)]
        return any(not self.roster.uneven or not costs.much_faster(self.roster.workers[name].costs) for name in able)

    def _is_better_off(self, group: Group, adapter: str, seat: Seat, temperature: Temperature | None = None, before: int = 0) -> bool:
        """Whether much faster workers would end all of it, after what they have and their part of so many other jobs, in half the time in
        which this one would end a batch of it: what they have may take longer than it seems. None: it would join here. One that has no hand
        for it counts only where hands end. While something is overdue, nobody waits for anybody."""
        if self.late:
            return False
        jobs, own = self._jobs(group), seat.prices
        batch = min(jobs, own.rows)
        here = own.batch_ms(seat.load + batch) if temperature is None else own.batch_ms(seat.load) + own.batch_ms(batch, temperature)
        for name in seat.faster:
            worker, load, hand = self.roster.workers[name], self._load(name), self._hand(name)
            theirs = self._prices(worker.costs)
            batch = min(jobs, theirs.rows)
            if adapter in hand:
                there = theirs.batch_ms(load + batch)
            elif self.calm and len(hand) >= self.roster.adapters_at_once:
                continue
            else:
                there = theirs.batch_ms(load) + theirs.batch_ms(batch, worker.temperature(adapter))
            if there + (before + jobs - batch) * theirs.job_ms / len(seat.faster) < here / 2:
                return True
        return False

    # -- how many -------------------------------------------------------------------------------------------------------------------------

    def _share(self, seat: Seat, digest: str, jobs: int) -> int:
        """Of so many jobs, what this worker should take when others have nothing else to do: an even part, where that ends sooner."""
        spare = self.idle - self.waiting + 1
        if seat.load or spare < 2 or jobs < 2:
            return jobs
        costs, work, cold = seat.worker.costs, self.groups.scale.work, seat.worker.temperature(digest)
        workers = 1
        while workers < min(spare, jobs):
            fewer = costs.batch_ms(math.ceil(jobs / workers), work, cold)
            if costs.batch_ms(math.ceil(jobs / (workers + 1)), work, cold) > 0.9 * fewer:
                break
            workers += 1
        return math.ceil(jobs / workers)

    def _dispatch(self, seat: Seat, choice: _Choice) -> Dispatch | None:
        """Fill one batch with jobs for this adapter of the eligible tenants: by due times, or by turns of those who flood. None: a part of
        them went already, and when the rest is due is not known, nor whether something else is due sooner."""
        digest, tokens = choice.digest, self.groups.scale.work.tokens
        adapter = adapter_of(digest)
        able = [
            g for g in self.groups.of(adapter)
            if g.digest == digest and g.tenant.floods == choice.floods and self._jobs(g) and not self.floods.over(g)
        ]  # fmt: skip
        if self.left and self.waiting > 1 and any(group in self.left for group in able):
            return None
        rows = self.floods.rows(seat, choice.floods)
        if adapter in seat.hand:
            rows -= seat.load
        if self.floods.hold_back(seat, choice.floods):
            rows = min(rows, self.floods.to_read(seat))
        rows = min(rows, self._share(seat, digest, sum([self._jobs(group) for group in able])))
        takes = self._in_turns(able, rows) if choice.floods else self._by_due(able, rows)
        for group in able:
            if jobs := takes.get(group.tenant.name, 0):
                self._take(group, jobs)
        self.floods.charge({name: jobs * tokens for name, jobs in takes.items()})
        self.idle -= not seat.load
        seat.load += (jobs := sum(takes.values()))
        seat.unread += jobs * seat.prices.own_ms
        seat.steady += jobs * (not choice.floods)
        seat.given += 1
        seat.hand |= {adapter}
        return Dispatch(seat.name, digest, tuple(sorted(takes.items())), self._why(choice, min([g.due for g in able])))

    def _by_due(self, groups: Sequence[Group], rows: int) -> dict[str, int]:
        """How many jobs of each of these tenants so many rows take: whose are due first; in turns, of those due at the same moment."""
        if len(groups) == 1:
            return {groups[0].tenant.name: min(rows, self._jobs(groups[0]))}
        takes: dict[str, int] = {}
        for _, alike in groupby(sorted(groups, key=_due), _due):
            if not rows:
                break
            takes |= (some := self._in_turns(list(alike), rows))
            rows -= sum(some.values())
        return takes

    def _in_turns(self, groups: Sequence[Group], rows: int) -> dict[str, int]:
        """The same by turns: one row at a time, to whoever was served least by then."""
        takes: dict[str, int] = defaultdict(int)
        waiting = {group.tenant.name: self._jobs(group) for group in groups}
        heap = [(self.floods.had(group.tenant), group.tenant.name) for group in groups]
        heapq.heapify(heap)
        for _ in range(min(rows, sum(waiting.values()))):
            level, tenant = heap[0]
            takes[tenant] += 1
            if takes[tenant] == waiting[tenant]:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (level + self.groups.scale.work.tokens, tenant))
        return takes

    def _take(self, group: Group, jobs: int) -> None:
        left = self.left[group] = self._jobs(group) - jobs
        if not left:
            self.waiting -= 1
            first = self.queues[group.tenant.floods].first
            if group in first:
                first.remove(group)

    def _why(self, choice: _Choice, due: float) -> str:
        """One sentence."""
        left = (due - self.now) / 1000
        when = f"due in {left:.1f} s" if left >= 0 else f"due {-left:.1f} s ago"
        beside = f"{self.waiting} more group{'s' * (self.waiting > 1)} waited" if self.waiting else "nothing else waited"
        return f"{choice.reason}; {when}; {beside}"


_WARMTH: Mapping[Temperature, str] = {
    "hot": "its turn, its adapter bound here",
    "loaded": "its turn, its adapter loaded here",
    "disk": "its turn, its adapter to be loaded",
    "remote": "its turn, its adapter to be fetched",
}
_JOINED = ("joined what ran of its adapter", "joined its adapter, nothing else being due sooner")
_FIRST = TICKS << 45
"""More than any rank."""
_due = attrgetter("due")
