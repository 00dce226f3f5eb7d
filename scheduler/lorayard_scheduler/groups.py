"""The groups that wait, in the order in which they are to be served: the planner's index.

Every group has one *rank*, in milliseconds of the ledger's clock, the least first:

    rank = max(due, last turn + flood) + patience * ln(what a job costs in the batch it would give / what a job costs at best)

- `due` is its most due job's. Urgency grows with time, yet the order of due times does not change with it: so an index needs no clock.
- A batch of few jobs runs narrow, and each of its jobs costs more; it is put off by `patience` for every factor e of that, to grow or to be
  overtaken by what pays better. The logarithm turns "gain over cost times an urgency that doubles every so often" into a sum, whose order
  again does not change with time.
- `flood`: by how much the group's jobs alone would occupy all workers for longer than `flood_ms`, and at most that much again: a turn of
  theirs is followed by everyone else's who waited already. Zero otherwise.

A rank changes only with its group; one change costs the logarithm of the number of groups.

*Lanes.* Jobs are queued by digest and lane (`lorayard.jobs.Lane`), and a batch is of one lane. An adapter's groups in all lanes of local
workers are found by its digest alone: to a worker that has it in hand they are all of the same adapter.

*Tenants.* One whose jobs would occupy all workers for longer than `flood_ms` floods. While somebody floods, tenants are counted against
each other by served tokens (virtual token counter), and all others come before those who flood.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from operator import attrgetter

import msgspec
from sortedcontainers import SortedKeyList, SortedList

from lorayard.jobs import adapter_of
from lorayard_scheduler.costs import Costs, Work

TICKS = 1 << 18
"""A millisecond in ranks. What is less breaks ties."""


@dataclass(slots=True, eq=False)
class Tenant:
    """One with jobs waiting. `served` is what counts against the others, work in flight included."""

    name: str
    served: float = 0.0
    jobs: int = 0
    floods: bool = False
    order: SortedKeyList = field(default_factory=lambda: SortedKeyList(key=attrgetter("rank")))
    head: int | None = None  # the rank of its first group, under which the tenant is filed


class Group(msgspec.Struct, gc=False, eq=False):
    """Queued jobs of one adapter, lane (both in `digest`) and tenant. Times in milliseconds; `turn` is when some of its jobs last went to a
    worker, 0 if none did since it began to wait; `rank` is what the module says, in ticks."""

    digest: str
    tenant: Tenant
    jobs: int
    due: float
    turn: float
    rank: int


@dataclass(frozen=True)
class Scale:
    """What ranks are measured with. It changes seldom, and then all groups are ranked anew."""

    patience_ms: float = 4_000.0
    flood_ms: float = 120_000.0
    costs: Costs = field(default_factory=lambda: Costs(16))
    work: Work = field(default_factory=Work)
    workers: float = 1
    """How many with these costs the pool is worth."""

    @classmethod
    def of(cls, patience_ms: float, flood_ms: float, pool: Sequence[Costs], work: Work) -> Scale:
        """Of workers with these costs, the first standing for all of them."""
        return cls(patience_ms, flood_ms, pool[0], work, sum([pool[0].job_ms(work) / costs.job_ms(work) for costs in pool]))

    def narrow(self) -> list[float]:
        """By the number of jobs: how much later a group ranks because its batch would run narrow."""
        best, most = self.costs.job_ms(self.work), 4 * self.costs.width
        dearer = [max(1.0, self.costs.batch_ms(n, self.work, "hot") / (n * best)) for n in range(1, most + 1)]
        return [0.0] + [self.patience_ms * math.log(factor) for factor in dearer]


class Groups:
    """All groups of a pool that have jobs."""

    def __init__(self, scale: Scale | None = None) -> None:
        self.tenants: dict[str, Tenant] = {}
        self.floods: dict[str, Tenant] = {}  # those of them that flood
        self.jobs = 0
        self.job_ms = 0.0  # what one takes all workers, at best
        self.news: set[str] = set()  # adapters for which there were new jobs since the last plan
        self._by_adapter: dict[str, Group | dict[tuple[str, str], Group]] = {}  # mostly one tenant asks for it, in one lane
        self._number = 0
        self._heads: tuple[SortedList, SortedList] = (SortedList(), SortedList())  # (head, tenant's name); of those that flood
        self._served: dict[str, float] = {}  # of tenants that do not wait as well
        self._active: set[str] = set()
        self._contended = False
        self._steady: OrderedDict[str, float] = OrderedDict()  # tenants, by when they were last told to have jobs and not flood; of late
        self._measure(scale or Scale())

    def __len__(self) -> int:
        return self._number

    # -- what is known --------------------------------------------------------------------------------------------------------------------

    def has(self, adapter: str) -> bool:
        """Whether any jobs wait for this adapter."""
        return adapter in self._by_adapter

    def of(self, adapter: str) -> list[Group]:
        """Of every tenant that has jobs waiting for this adapter, in whatever lane."""
        found = self._by_adapter.get(adapter)
        return [] if found is None else [found] if isinstance(found, Group) else list(found.values())

    def get(self, digest: str, tenant: str) -> Group | None:
        found = self._by_adapter.get(adapter_of(digest))
        if isinstance(found, Group):
            return found if found.tenant.name == tenant and found.digest == digest else None
        return None if found is None else found.get((digest, tenant))

    def __iter__(self) -> Iterator[Group]:
        for found in self._by_adapter.values():
            if isinstance(found, Group):
                yield found
            else:
                yield from found.values()

    @property
    def waits_ms(self) -> float:
        """How long all that waits would take all workers, at best."""
        return self.jobs * self.job_ms

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def beyond(self, level: float) -> dict[str, float]:
        """Tenants, also those that do not wait, that were served more than that: how much more, in tokens."""
        return {name: served - level for name, served in self._served.items() if served > level}

    def limit(self, slack: float) -> float:
        """How much a tenant may have been served and still be: `slack` more than the least served that floods; anything, if nobody does."""
        return min(tenant.served for tenant in self.floods.values()) + slack if self.floods else float("inf")

    def first(self, limit: float, *, floods: bool) -> Group | None:
        """The group of least rank of tenants that do not flood and were served no more than the limit; if there is none, of those that do,
        if they are asked for."""
        for heads in self._heads[: 1 + floods]:
            for _, name in heads:
                if (tenant := self.tenants[name]).served <= limit:
                    return tenant.order[0]  # type: ignore[no-any-return]
        return None

    def alone(self, since: float) -> bool:
        """Whether those who flood now are the only ones who have had jobs since then, no more than `flood_ms` ago: on its way to a flood a
        tenant does not flood yet."""
        if len(self.floods) < len(self.tenants):
            return False
        for name, at in reversed(self._steady.items()):
            if at < since or name not in self.floods:
                return at < since
        return True

    def by_rank(self, floods: bool, limit: float) -> Iterator[Group]:
        """The groups of tenants that do, or do not, flood, and were served no more than the limit, least rank first.

        Tenants are looked at in the order of their heads, so what is not reached costs nothing.
        """
        heads = [(head, name) for head, name in self._heads[floods] if self.tenants[name].served <= limit]
        if len(heads) == 1:
            yield from self.tenants[heads[0][1]].order
            return
        opened: list[tuple[int, str, Group, Iterator[Group]]] = []
        for head, name in heads:
            while opened and opened[0][0] < head:
                yield self._next(opened)
            groups = iter(self.tenants[name].order)
            heappush(opened, (head, name, next(groups), groups))
        while opened:
            yield self._next(opened)

    @staticmethod
    def _next(opened: list[tuple[int, str, Group, Iterator[Group]]]) -> Group:
        _, name, group, groups = opened[0]
        after = next(groups, None)
        if after is None:
            heappop(opened)
        else:
            heapreplace(opened, (after.rank, name, after, groups))
        return group

    def narrow(self, jobs: int) -> int:
        """What of a rank is due to the width of the batch that so many jobs would give; nothing is, where they join one that runs."""
        return self._narrow[min(jobs, self._most)]

    # -- what happens ---------------------------------------------------------------------------------------------------------------------

    def put(self, digest: str, tenant: str, jobs: int, due: float, now: float) -> None:
        """The group now has so many jobs, the most due of them due then; none: it waits no longer."""
        group = self.get(digest, tenant)
        if jobs <= 0:
            if group is not None:
                self._remove(group)
        elif group is None:
            self.news.add(adapter_of(digest))
            self._add(digest, tenant, jobs, float(due), 0.0)
        elif group.jobs != jobs or group.due != due:
            self.news.add(adapter_of(digest))
            self._change(group, jobs, float(due), group.turn)
        if jobs > 0 and not self.tenants[tenant].floods:
            self._steady[tenant] = now
            self._steady.move_to_end(tenant)
            while next(iter(self._steady.values())) < now - self.scale.flood_ms:
                self._steady.popitem(last=False)

    def take(self, digest: str, tenant: str, jobs: int, now: float) -> None:
        """So many of its jobs go to a worker."""
        group = self.get(digest, tenant)
        if group is None:
            return
        if jobs >= group.jobs:
            self._remove(group)
        else:
            self._change(group, group.jobs - jobs, group.due, now)

    def charge(self, tenant: str, tokens: float) -> None:
        self.level(tenant, self.served(tenant) + tokens)

    def level(self, tenant: str, served: float) -> None:
        """So much was this tenant served."""
        if served == self._served.get(tenant):
            return
        self._served[tenant] = served
        if tenant in self.tenants:
            self.tenants[tenant].served = served

    def settle(self, flying: Iterable[str]) -> dict[str, float]:
        """Whoever was away, or had no need of its share until now, has no claim on the past: raises what these count as served.

        `flying` are the tenants with jobs at workers. Returns who was raised, and to what.
        """
        raised: dict[str, float] = {}
        active, contended = {*self.tenants, *flying}, bool(self.floods)
        if active <= self._active and contended == self._contended:
            self._active = active
            return raised
        if self._active:
            least = min(self.served(name) for name in self._active)
            raised = {name: least for name in self.tenants.keys() - self._active if self.served(name) < least}
        if contended and not self._contended:  # level for all, also those who are away: they come back beside this flood
            most = max(map(self.served, {*self._served, *active}))
            raised |= {name: most for name in active if self.served(name) < most}
        self._active, self._contended = active, contended
        for name, level in raised.items():
            self.level(name, level)
        return raised

    def rescale(self, scale: Scale) -> None:
        """Measure anew, where that makes a difference."""
        if scale == self.scale:
            return
        groups = [(g.digest, g.tenant.name, g.jobs, g.due, g.turn) for g in self]
        self.tenants, self.floods, self._heads, self._by_adapter = {}, {}, (SortedList(), SortedList()), {}
        self.jobs = self._number = 0
        self._measure(scale)
        for group in groups:
            self._add(*group)

    # -- the index ------------------------------------------------------------------------------------------------------------------------

    def _measure(self, scale: Scale) -> None:
        self.scale = scale
        self._narrow = [round(TICKS * ms) for ms in scale.narrow()]
        self._most = len(self._narrow) - 1
        self.job_ms = scale.costs.job_ms(scale.work) / max(1, scale.workers)

    def _rank(self, jobs: int, due: float, turn: float) -> int:
        """All of it but what breaks ties."""
        if turn > 0:
            flood = jobs * self.job_ms - self.scale.flood_ms
            if flood > 0:
                due = max(due, turn + min(flood, self.scale.flood_ms))
        return (round(due) * TICKS) + self._narrow[min(jobs, self._most)] & -TICKS

    def _add(self, digest: str, name: str, jobs: int, due: float, turn: float) -> None:
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = Tenant(name, self.served(name))
        tie = zlib.crc32(digest.encode(), zlib.crc32(name.encode())) % TICKS
        group = Group(digest, tenant, jobs, due, turn, self._rank(jobs, due, turn) + tie)
        adapter = adapter_of(digest)
        known = self._by_adapter.get(adapter)
        if known is None:
            self._by_adapter[adapter] = group
        elif isinstance(known, Group):
            self._by_adapter[adapter] = {(known.digest, known.tenant.name): known, (digest, name): group}
        else:
            known[digest, name] = group
        self._number += 1
        self._count(tenant, jobs)
        tenant.order.add(group)
        self._file(tenant)

    def _remove(self, group: Group) -> None:
        tenant, adapter = group.tenant, adapter_of(group.digest)
        known = self._by_adapter[adapter]
        if isinstance(known, Group):
            del self._by_adapter[adapter]
        else:
            del known[group.digest, tenant.name]
            if len(known) == 1:
                self._by_adapter[adapter] = next(iter(known.values()))
        self._number -= 1
        tenant.order.remove(group)
        self._count(tenant, -group.jobs)
        self._file(tenant)

    def _change(self, group: Group, jobs: int, due: float, turn: float) -> None:
        self._count(group.tenant, jobs - group.jobs)
        group.jobs, group.due, group.turn = jobs, due, turn
        rank = self._rank(jobs, due, turn) + group.rank % TICKS
        if rank != group.rank:
            order = group.tenant.order
            order.remove(group)  # by the rank it still has
            group.rank = rank
            order.add(group)
        self._file(group.tenant)

    def _count(self, tenant: Tenant, jobs: int) -> None:
        self.jobs += jobs
        tenant.jobs += jobs

    def _file(self, tenant: Tenant) -> None:
        """Under the rank its first group has now, and among those who flood or the others."""
        floods = tenant.jobs * self.job_ms > self.scale.flood_ms
        head = tenant.order[0].rank if tenant.order else None
        if (head, floods) == (tenant.head, tenant.floods):
            return
        if tenant.head is not None:
            self._heads[tenant.floods].remove((tenant.head, tenant.name))
        tenant.head, tenant.floods = head, floods
        if floods:
            self.floods[tenant.name] = tenant
        else:
            self.floods.pop(tenant.name, None)
        if head is not None:
            self._heads[floods].add((head, tenant.name))
        else:
            del self.tenants[tenant.name]
