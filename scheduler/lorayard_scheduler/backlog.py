"""The scheduler's mirror of the ledger: the planner's indexes, kept up to date by groups and batches, nothing per job."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorayard.jobs import Lane, adapter_of, lane_of
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import Event, Group, InFlight
from lorayard.ledger.records import View as LedgerView
from lorayard.ledger.registry import WorkerInfo
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.groups import Groups, Scale
from lorayard_scheduler.hosted_planner import GroupView
from lorayard_scheduler.planner import Policy, View
from lorayard_scheduler.roster import Held, Roster, WorkerView

_LOCAL: tuple[Lane, ...] = ("", "auto")
"""The lanes that local workers may claim."""
_TOKENS = ("prompt_tokens", "cached_tokens", "generated_tokens")
"""Of a worker's counters, in the order of `Work`."""
UNTAKEN_MS = 800
"""Batches are taken within milliseconds. A worker that has left one lying for so long, and told nothing since, gets nothing new until it is
heard of again, and what it has not begun is for others."""
BEATS = 2
"""A worker that gets no wake-ups asks for its batches at every second heartbeat: so many it has, once it was heard of again, before
anything left lying speaks against it anew. Else it would never come to take one."""


class Backlog:
    """Rebuilt from the ledger at start and after any gap; in between, events name the groups to read again.

    What it knows beyond the ledger is only which groups had a turn already, and when the batches it dispatched are due: losing that with
    the process changes the order of service once, and these batches are not recalled; nothing else.
    """

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        self._ledger = ledger
        self._policy = policy
        self._dirty: set[tuple[str, str]] = set()
        self._costs: dict[str, Costs] = {}
        self._infos: dict[str, WorkerInfo] = {}
        self._held: dict[str, tuple[Held, ...]] = {}
        self._dues: dict[str, float] = {}  # of batches that were dispatched from here
        self._lanes: dict[tuple[str, str], GroupView] = {}  # what hosted workers may claim
        self._doubted: dict[str, int] = {}  # workers that left a batch lying, and when that was noticed
        self._heard: dict[str, tuple[int, int]] = {}  # workers heard of again: when last, and after how many heartbeats
        self._gone: set[str] = set()  # workers that were there, and have or may have jobs
        self._hosted: set[str] = set()  # hosted workers
        self._flying: dict[str, float] = {}  # jobs at local workers, by tenant
        self._flying_there: dict[str, float] = {}  # at hosted ones
        self.served_there: dict[str, float] = {}  # by hosted workers, tokens by tenant, work in flight included
        self.groups = Groups(Scale(policy.patience_ms, policy.flood_ms))
        self.roster = Roster()
        self.view = View(self.groups, self.roster)
        self.in_flight: list[InFlight] = []
        self.now = 0
        self.stale = True

    # -- the ledger -----------------------------------------------------------------------------------------------------------------------

    def rebuild(self) -> str:
        """Read everything anew; the event id to go on from."""
        view = self._ledger.snapshot()
        there = {(g.digest, g.tenant) for g in view.groups if g.jobs}
        known = {(g.digest, g.tenant.name) for g in self.groups} | self._lanes.keys()
        for digest, tenant in known - there:
            self._put(Group(digest, tenant, 0, 0))
        self._dirty.clear()
        self._read(view)
        self.roster.news.update(self.roster.workers)
        self.stale = True  # nothing of it is planned yet
        return view.last_event

    def hear(self, events: Iterable[Event]) -> None:
        """Mark what the events say has changed."""
        for event in events:
            self.stale = True
            if event.kind == "queued":
                self._dirty |= {(d, t) for d, _, t in (value.partition(":") for value in event.values)}

    def refresh(self) -> None:
        """Read the marked groups and the batches in flight."""
        view = self._ledger.read_groups(self._dirty)
        self._dirty.clear()
        self._read(view)
        self.stale = False

    def _read(self, view: LedgerView) -> None:
        self.now, self.in_flight = view.now, view.in_flight
        self._fly(view.in_flight)
        flying, there = self._tokens(self._flying), self._tokens(self._flying_there)
        for tenant in {*view.served, *flying}:
            self.groups.level(tenant, float(view.served.get(tenant, 0) + flying.get(tenant, 0)))
        self.served_there = {tenant: float(view.hosted.get(tenant, 0) + there.get(tenant, 0)) for tenant in {*view.hosted, *there}}
        for g in view.groups:
            self._put(g)
        for tenant, level in sorted(self.groups.settle(self._flying).items()):
            self._ledger.lift(tenant, round(level) - flying.get(tenant, 0))
        self.roster.wake(self.now)

    def _tokens(self, flying: Mapping[str, float]) -> dict[str, int]:
        """Of so many jobs, about."""
        tokens = self.groups.scale.work.tokens
        return {tenant: round(jobs * tokens) for tenant, jobs in flying.items()}

    def _put(self, g: Group) -> None:
        lane = lane_of(g.digest)
        if lane in _LOCAL:
            self.groups.put(g.digest, g.tenant, g.jobs, g.due, self.now)
        if lane:
            key = (g.digest, g.tenant)
            before = self._lanes.pop(key, None)
            if g.jobs:
                self._lanes[key] = GroupView(g.digest, g.tenant, g.jobs, g.due, before.since if before else self.now)

    def _fly(self, flights: Sequence[InFlight]) -> None:
        held: dict[str, list[Held]] = defaultdict(list)
        flying: dict[str, float] = defaultdict(float)
        flying_there: dict[str, float] = defaultdict(float)
        for flight in sorted(flights, key=lambda f: (f.claimed, f.batch)):
            due = self._dues.get(flight.batch, 0.0)
            waiting = flight.waiting if due else 0
            whose = tuple(sorted(flight.by))
            held[flight.worker].append(Held(flight.batch, adapter_of(flight.digest), flight.left, waiting, due, whose))
            left = flight.left / max(1, sum(flight.by.values()))  # what has ended counts as served already
            there = lane_of(flight.digest) not in _LOCAL or flight.worker in self._hosted
            for tenant, jobs in flight.by.items():
                (flying_there if there else flying)[tenant] += left * jobs
            if not flight.taken and self.now - flight.claimed > UNTAKEN_MS:
                self._doubt(flight)
        self._flying, self._flying_there = flying, flying_there
        if len(self._dues) > 2 * len(flights) + 100:
            current = {flight.batch for flight in flights}
            self._dues = {batch: due for batch, due in self._dues.items() if batch in current}
        self._gone &= held.keys()  # nothing was claimed for them since they were found to be gone
        for name in {*held, *self._held}:
            now = tuple(held.get(name, ()))
            if now != self._held.get(name, ()):
                self._held[name] = now
                self._see(name)

    # -- workers --------------------------------------------------------------------------------------------------------------------------

    def meet(self, infos: Iterable[WorkerInfo]) -> None:
        """These workers are alive and ready, and there are no others. The planner's are the local ones."""
        every = list(infos)
        self._hosted = {info.name for info in every if info.hosted}
        alive = {info.name: info for info in every if not info.hosted}
        for name in self.roster.workers.keys() - alive:
            self.roster.drop(name)
        self._gone = (self._gone | self._infos.keys()) - alive.keys()  # also with a batch that was claimed a moment ago and not read yet
        changed = [name for name, info in alive.items() if name not in self.roster.workers or _differs(info, self._infos[name])]
        self._infos = alive
        well = [name for name, since in self._doubted.items() if name not in alive or alive[name].seen_ms > since]
        self._count_beats(alive)
        for name in well:
            del self._doubted[name]
            if name in alive:
                self._heard[name] = alive[name].seen_ms, 0
        for name in {*changed, *well} & alive.keys():
            self._see(name)
        self.stale = self.stale or bool(self.roster.news)
        if alive:
            self._measure()

    @property
    def forsaken(self) -> list[str]:
        """Batches with jobs that have not begun, of local workers that nobody hears of; where others are there that could have them."""
        silent = self._doubted.keys() | self._gone
        if not silent or not self.roster.workers:
            return []
        return [f.batch for f in self.in_flight if f.worker in silent and f.waiting]

    def _count_beats(self, alive: dict[str, WorkerInfo]) -> None:
        for name, (last, beats) in list(self._heard.items()):
            seen = alive[name].seen_ms if name in alive else last
            if name not in alive or beats + (seen > last) == BEATS:
                del self._heard[name]
            else:
                self._heard[name] = seen, beats + (seen > last)

    def _doubt(self, flight: InFlight) -> None:
        """Of a worker that was heard of since then, only the word was lost."""
        info = self._infos.get(flight.worker)
        if info is not None and info.seen_ms < flight.claimed and flight.worker not in self._heard:
            self._doubted.setdefault(flight.worker, self.now)
            self.roster.drop(flight.worker)

    def _see(self, name: str) -> None:
        info = self._infos.get(name)
        if info is not None and name not in self._doubted:
            warm, absent = (tuple(info.hot), tuple(info.loaded)), frozenset(info.absent)
            self.roster.put(WorkerView(name, self._costs_of(info), self._held.get(name, ()), *warm, absent))

    def _costs_of(self, info: WorkerInfo) -> Costs:
        """What is measured again and again is taken over when it has changed enough to matter."""
        costs = Costs.of(max(1, info.width), info.costs)
        known = self._costs.get(info.name)
        if known is None or not known.resembles(costs):
            known = self._costs[info.name] = costs
        return known

    def _measure(self) -> None:
        """Ranks follow what workers measure: those of the first by name stand for the pool, in which the others count by their speed."""
        infos = [self._infos[name] for name in sorted(self._infos)]
        work = _mean_work(info.counters for info in infos)
        scale = Scale.of(self._policy.patience_ms, self._policy.flood_ms, [self._costs_of(info) for info in infos], work)
        before = self.groups.scale
        if (scale.costs, scale.workers) != (before.costs, before.workers) or not work.resembles(before.work):
            self.groups.rescale(scale)

    # -- what was done --------------------------------------------------------------------------------------------------------------------

    def missed(self, digest: str, takes: Iterable[tuple[str, int]]) -> None:
        """A batch could not be claimed: its groups are not what they seemed."""
        self._dirty |= {(digest, tenant) for tenant, _ in takes}
        self.groups.news.add(adapter_of(digest))
        self.stale = True

    def dispatched(self, batch: str, digest: str, takes: Sequence[tuple[str, int]], worker: str) -> None:
        """A batch was claimed: the groups it came from, which have had a turn, are read again."""
        if self.groups.floods and worker in self.roster.workers:
            self.roster.gave(worker, sum(jobs for _, jobs in takes), self.groups.scale.work, self.now)
        groups = [group for tenant, _ in takes if (group := self.groups.get(digest, tenant))]
        if groups:
            self._dues[batch] = min(group.due for group in groups)
        for tenant, jobs in takes:
            self._dirty.add((digest, tenant))
            self.groups.take(digest, tenant, jobs, self.now)
        self.stale = True

    # -- hosted workers -------------------------------------------------------------------------------------------------------------------

    @property
    def has_lanes(self) -> bool:
        """Whether anything waits that a hosted worker might take."""
        return bool(self._lanes)

    def waiting(self) -> tuple[GroupView, ...]:
        """All groups, by name."""
        local = [GroupView(g.digest, g.tenant.name, g.jobs, round(g.due), self.now) for g in self.groups if not lane_of(g.digest)]
        return tuple(sorted([*local, *self._lanes.values()], key=lambda g: (g.digest, g.tenant)))

    def lift_there(self, levels: Mapping[str, float]) -> None:
        """These tenants count as served so many tokens by hosted workers."""
        flying = self._tokens(self._flying_there)
        for tenant, level in sorted(levels.items()):
            self._ledger.lift(tenant, round(level) - flying.get(tenant, 0), hosted=True)
            self.served_there[tenant] = level

    @property
    def waits(self) -> bool:
        """Whether there are jobs that some worker could take as soon as one of its own ends, or that one may never take."""
        return bool(self.groups.jobs and self.in_flight) or any(not flight.taken for flight in self.in_flight)


def _differs(now: WorkerInfo, before: WorkerInfo) -> bool:
    one, other = ((i.incarnation, i.width, i.hot, i.loaded, i.absent, i.costs) for i in (now, before))
    return one != other


def _mean_work(counters: Iterable[dict[str, Any]]) -> Work:
    """The mean job of those that the workers have finished. What they found computed already is what jobs of an adapter share: a little
    less than that, for somebody was the first."""
    total: Counter[str] = Counter()
    for counter in counters:
        total.update({name: counter.get(name, 0) for name in ("finished", *_TOKENS)})
    if total["finished"] < 10:
        return Work()
    return Work(*(total[name] / total["finished"] for name in _TOKENS))
