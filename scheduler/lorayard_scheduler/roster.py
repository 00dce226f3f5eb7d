"""The workers of a pool as the planner sees them, indexed by what they can take and which adapters they have."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from sortedcontainers import SortedList

from lorayard.jobs import adapter_of
from lorayard_scheduler.costs import MUCH, Costs, Temperature, Work


@dataclass(frozen=True, slots=True)
class Held:
    """A batch that a worker has been given, with so many jobs of an adapter that have not ended. `waiting` of them have
    not begun and could be recalled; the most due was due at `due`, ms. `tenants`, whose they are, is empty where that is not known."""

    batch: str
    digest: str  # the adapter's, without a lane: to a worker, all lanes are alike
    jobs: int
    waiting: int = 0
    due: float = 0.0
    tenants: tuple[str, ...] = ()


@dataclass(slots=True)
class WorkerView:
    """A live worker: what it was given, oldest first; which adapters contexts are bound to, which are loaded, and which it would have to
    fetch, as far as that is known."""

    name: str
    costs: Costs
    held: tuple[Held, ...] = ()
    hot: Collection[str] = ()
    loaded: Collection[str] = ()
    absent: Collection[str] = ()

    def temperature(self, digest: str) -> Temperature:
        """Of an adapter, or of the one that jobs are queued for by this digest."""
        digest = adapter_of(digest)
        if digest in self.hot:
            return "hot"
        if digest in self.loaded:
            return "loaded"
        return "remote" if digest in self.absent else "disk"


_COLD: tuple[Collection[str], Collection[str]] = ((), ())


class Roster:
    """All workers. Put one again when anything of it has changed."""

    def __init__(self, workers: Iterable[WorkerView] = (), *, adapters_at_once: int = 2) -> None:
        self.adapters_at_once = adapters_at_once
        self.workers: dict[str, WorkerView] = {}
        self.loads: dict[str, int] = {}  # jobs that have not ended
        self.hands: dict[str, frozenset[str]] = {}  # the adapters that a worker has jobs of
        self.free: SortedList = SortedList()  # (ms until one job more would have ended there, name) of those that can take another adapter
        self.on: dict[str, dict[str, None]] = {}  # digest -> workers that have jobs of it
        self.warm: dict[str, dict[str, None]] = {}  # digest -> workers where it is hot or loaded
        self.decks: dict[str, float] = {}  # workers with jobs that could be recalled: the latest due time of their batches
        self.kinds: Counter[Costs] = Counter()  # how many workers have these costs
        self.paces: SortedList = SortedList()  # (ms of a usual job, name), of those that have measured it
        self.idle = 0
        self.reads: dict[str, float] = {}  # until when a worker reads the prompts it was given, ms, as far as that was told
        self.news: set[str] = set()  # workers put, or gone, since the last plan
        self._costs: dict[str, Costs] = {}
        self._warm: dict[str, tuple[Collection[str], Collection[str]]] = {}
        self._reading: list[tuple[float, str]] = []  # the same, a heap
        for worker in workers:
            self.put(worker)

    def put(self, worker: WorkerView) -> None:
        name = worker.name
        if name in self.workers:
            self._leave(name)
        self.news.add(name)
        self.workers[name] = worker
        if self._costs.get(name) is not worker.costs:
            self._cost(name, worker.costs)
        load, hand = sum([held.jobs for held in worker.held]), frozenset([held.digest for held in worker.held])
        self.loads[name], self.hands[name] = load, hand
        if len(hand) < self.adapters_at_once:
            self.free.add(((load + 1) * worker.costs.pace, name))
        self.idle += not load
        dues = [held.due for held in worker.held if held.waiting]
        if dues:
            self.decks[name] = max(dues)
        for digest in hand:
            self.on.setdefault(digest, {})[name] = None
        self._warm_up(name, (worker.hot, worker.loaded))

    def drop(self, name: str) -> None:
        """It is gone."""
        if name in self.workers:
            self._leave(name)
            self._cost(name, None)
            self._warm_up(name, _COLD)
            self._warm.pop(name, None)
            self.reads.pop(name, None)
            self.news.add(name)
            del self.workers[name], self.loads[name], self.hands[name]

    def gave(self, name: str, jobs: int, work: Work, now: float) -> None:
        """It got so many jobs now, whose prompts it reads after what it reads already. Once it has, that is news."""
        costs = self._costs[name]
        self.reads[name] = max(now, self.reads.get(name, 0.0)) + jobs * costs.prefill_ms(work.own)
        heapq.heappush(self._reading, (self.reads[name], name))

    def wake(self, now: float) -> None:
        """Whoever has read all it was given by now has room again."""
        while self._reading and self._reading[0][0] <= now:
            until, name = heapq.heappop(self._reading)
            if self.reads.get(name) == until:
                del self.reads[name]
                self.news.add(name)

    def _leave(self, name: str) -> None:
        """The indexes by load and by what it has in hand."""
        load, hand = self.loads[name], self.hands[name]
        if len(hand) < self.adapters_at_once:
            self.free.remove(((load + 1) * self._costs[name].pace, name))
        self.idle -= not load
        self.decks.pop(name, None)
        _remove(self.on, hand, name)

    @property
    def uneven(self) -> bool:
        """Whether some workers are much faster than others."""
        return bool(self.paces) and self.paces[0][0] * MUCH < self.paces[-1][0]

    def faster(self, costs: Costs) -> Iterator[str]:
        """Workers that are much faster than one with these costs, the fastest first."""
        for _, name in self.paces:
            if not self._costs[name].much_faster(costs):
                return
            yield name

    def _cost(self, name: str, costs: Costs | None) -> None:
        """Its costs from now on; none: it is gone."""
        before = self._costs.pop(name, None)
        if before is not None:
            self.kinds[before] -= 1
            if not self.kinds[before]:
                del self.kinds[before]
            if before.measured:
                self.paces.remove((before.pace, name))
        if costs is not None:
            self._costs[name] = costs
            self.kinds[costs] += 1
            if costs.measured:
                self.paces.add((costs.pace, name))

    def _warm_up(self, name: str, warm: tuple[Collection[str], Collection[str]]) -> None:
        """Its adapters in memory, hot and loaded, which change less often than its batches."""
        before = self._warm.get(name, _COLD)
        if warm != before:
            _remove(self.warm, {*before[0], *before[1]}, name)
            for digest in dict.fromkeys([*warm[0], *warm[1]]):
                self.warm.setdefault(digest, {})[name] = None
            self._warm[name] = warm


def _remove(index: dict[str, dict[str, None]], digests: Iterable[str], name: str) -> None:
    for digest in digests:
        names = index[digest]
        del names[name]
        if not names:
            del index[digest]
