"""How others schedule, from their published descriptions, on the same simulated workers: to be compared with, never used.

llama.cpp decodes one adapter at a time, so that is assumed for all: where a system mixes adapters in a decode step, here its running
adapters step in turn, one a context. Where a description speaks of one server, replicas stand behind a balancer, which is tuned with the
rest (`GRID`). Sources: the systems' repositories and papers as named in each docstring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

from lorayard_scheduler.simulator import Batch, Fleet, Machine, Scheduler


class _Rival(ABC):
    """What all have in common."""

    def begin(self, fleet: Fleet) -> None:
        self.fleet, self.trace = fleet, fleet.trace

    def ended(self, job: int, machine: Machine, batch: Batch) -> None:  # noqa: B027 — for those that learn
        """Nothing to be learnt."""

    def back(self, machine: Machine) -> None:  # noqa: B027 — they see for themselves which machines are up
        """Nothing to be done."""

    @abstractmethod
    def turn(self) -> None:
        """Give machines what they should have by now."""


def _startable(machine: Machine, adapter: int) -> bool:
    """Whether a job of it could start now: a place is free, and a context bound to it or idle."""
    if machine.active >= machine.places or machine.queue or not machine.up:
        return False
    bound = machine.bound
    return adapter in bound or len(bound) < machine.spec.contexts or 0 in bound.values()


class FirstComeFirstServed(_Rival):
    """One queue for all; the job at its head goes to the worker with the fewest running that can start it, and nothing overtakes it."""

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.queue: deque[int] = deque()

    def arrived(self, job: int) -> None:
        self.queue.append(job)

    def lost(self, jobs: Iterable[int], machine: Machine) -> None:
        self.queue.extendleft(sorted(jobs, reverse=True))

    def turn(self) -> None:
        while self.queue:
            adapter = self.trace.adapters[self.queue[0]]
            able = [machine for machine in self.fleet.machines if _startable(machine, adapter)]
            if not able:
                return
            self.fleet.give(min(able, key=lambda m: m.active), adapter, [self.queue.popleft()])


class RoundRobin(_Rival):
    """Adapters in a ring; a worker with a free context takes up to `most` jobs of the next one: a batch gateway that knows adapters."""

    def __init__(self, most: int = 32) -> None:
        self.most = most

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.queues: dict[int, deque[int]] = {}
        self.ring: deque[int] = deque()

    def arrived(self, job: int) -> None:
        adapter = self.trace.adapters[job]
        queue = self.queues.get(adapter)
        if queue is None:
            queue = self.queues[adapter] = deque()
            self.ring.append(adapter)
        queue.append(job)

    def lost(self, jobs: Iterable[int], machine: Machine) -> None:
        for job in jobs:
            self.arrived(job)

    def turn(self) -> None:
        for machine in self.fleet.machines:
            while self.ring and _startable(machine, -1):
                adapter = self.ring.popleft()
                queue = self.queues[adapter]
                jobs = [queue.popleft() for _ in range(min(self.most, len(queue)))]
                if queue:
                    self.ring.append(adapter)
                else:
                    del self.queues[adapter]
                self.fleet.give(machine, adapter, jobs)


class Replica:
    """One server's own queue: jobs by adapter, oldest first."""

    def __init__(self, machine: Machine, arrivals: Sequence[float]) -> None:
        self.machine = machine
        self.arrivals = arrivals
        self.queues: dict[int, deque[int]] = {}
        self.waiting = 0
        self.note: dict[int, float] = {}  # what a policy remembers of adapters

    def push(self, adapter: int, job: int) -> None:
        self.queues.setdefault(adapter, deque()).append(job)
        self.waiting += 1

    def pop(self, adapter: int) -> int:
        queue = self.queues[adapter]
        job = queue.popleft()
        if not queue:
            del self.queues[adapter]
        self.waiting -= 1
        return job

    def oldest(self, adapters: Iterable[int]) -> int | None:
        """Of these adapters, the one whose head came first."""
        return min((a for a in adapters if a in self.queues), key=lambda a: self.queues[a][0], default=None)

    def running(self) -> dict[int, int]:
        """Sequences of each adapter that runs."""
        return {adapter: rows for adapter, rows in self.machine.bound.items() if rows}

    def load(self) -> int:
        return self.waiting + self.machine.active


Balance = Callable[["Replicas", int], int]


def least_loaded(rival: Replicas, adapter: int) -> int:
    return min((i for i, r in enumerate(rival.replicas) if r.machine.up), key=lambda i: rival.replicas[i].load())


def by_hash(rival: Replicas, adapter: int) -> int:
    """Every adapter has its replica."""
    n = len(rival.replicas)
    home = (adapter * 2654435761) % n
    return next(i % n for i in range(home, home + n) if rival.replicas[i % n].machine.up)


BALANCERS: Mapping[str, Balance] = {"least": least_loaded, "hash": by_hash}


class Replicas(_Rival):
    """Servers that schedule for themselves, behind a balancer that assigns each job as it comes."""

    def __init__(self, balance: str = "least") -> None:
        self.balance = BALANCERS[balance]

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.replicas = [Replica(machine, fleet.trace.arrivals) for machine in fleet.machines]
        self.touched: dict[int, None] = {}

    def arrived(self, job: int) -> None:
        adapter = self.trace.adapters[job]
        index = self.balance(self, adapter)
        self.replicas[index].push(adapter, job)
        self.touched[index] = None

    def ended(self, job: int, machine: Machine, batch: Batch) -> None:
        self.touched[machine.index] = None

    def lost(self, jobs: Iterable[int], machine: Machine) -> None:
        replica = self.replicas[machine.index]
        for job in [*jobs, *(job for queue in replica.queues.values() for job in queue)]:
            self.arrived(job)
        replica.queues.clear()
        replica.waiting = 0

    def turn(self) -> None:
        for index in self.touched:
            replica = self.replicas[index]
            while replica.waiting and replica.machine.active < replica.machine.places and not replica.machine.queue:
                adapter = self.pick(replica)
                if adapter is None or not _startable(replica.machine, adapter):
                    break
                self.fleet.give(replica.machine, adapter, [replica.pop(adapter)])
        self.touched.clear()

    @abstractmethod
    def pick(self, replica: Replica) -> int | None:
        """The adapter whose oldest job starts next; None while that must wait."""


class ShortestQueue(Replicas):
    """The replica with the fewest jobs, first come first served within; adapters count for nothing."""

    def pick(self, replica: Replica) -> int | None:
        return replica.oldest(replica.queues)


class Lorax(Replicas):
    """LoRAX (`router/src/queue.rs`): the oldest head among active adapters; an adapter that was active for `cycle_s` makes room for one
    that waits, once nothing of it is in flight."""

    def __init__(self, cycle_s: float = 2.0, balance: str = "least") -> None:
        super().__init__(balance)
        self.cycle_ms = 1000 * cycle_s

    def pick(self, replica: Replica) -> int | None:
        running, since, now = replica.running(), replica.note, self.fleet.now
        for adapter in [a for a in since if a not in running]:
            del since[adapter]
        others = [a for a in replica.queues if a not in running]
        fresh = [a for a in running if not others or now - since.setdefault(a, now) < self.cycle_ms]  # what was fetched begins unseen
        slots = replica.machine.spec.contexts - len(running)
        chosen = replica.oldest(fresh + others if slots else fresh)
        if chosen is not None:
            since.setdefault(chosen, now)
        return chosen


class SLora(Replicas):
    """S-LoRA's one-adapter mode: goes on with the adapter it is on, unless more than `ahead` other requests came before its next."""

    def __init__(self, ahead: int = 30, balance: str = "least") -> None:
        super().__init__(balance)
        self.ahead = ahead

    def pick(self, replica: Replica) -> int | None:
        current = list(replica.machine.bound)
        own, free = replica.oldest(current), len(replica.running()) < replica.machine.spec.contexts
        if own is None:
            return replica.oldest(replica.queues) if free else None
        head, ahead = replica.queues[own][0], 0
        for adapter, queue in replica.queues.items():
            if adapter not in current:
                ahead += sum(1 for _ in takewhile(lambda job: job < head, islice(queue, self.ahead + 1)))
        if ahead <= self.ahead:
            return own
        return replica.oldest(a for a in replica.queues if a not in current) if free else None


class SglangDrainer(Replicas):
    """SGLang's LoRA drainer: running adapters go on being served, others take free slots as they come; once one has waited for `starved_s`,
    the running adapter with the least left is drained for it."""

    def __init__(self, starved_s: float = 3.0, balance: str = "least") -> None:
        super().__init__(balance)
        self.starved_ms = 1000 * starved_s

    def pick(self, replica: Replica) -> int | None:
        running, now = replica.running(), self.fleet.now
        others = [a for a in replica.queues if a not in running]
        first = replica.oldest(others)
        if len(running) < replica.machine.spec.contexts:
            return replica.oldest(replica.queues)
        draining = None
        if first is not None and now - replica.arrivals[replica.queues[first][0]] > self.starved_ms:
            draining = next((a for a in replica.note if a in running), None)
            if draining is None:
                draining = min(running, key=lambda a: running[a])
                replica.note = {draining: now}
        return replica.oldest(a for a in running if a != draining)


class LlmdAffinity(Replicas):
    """llm-d's router: a replica scores 1 where the adapter is active, 0.8 where a slot is free, 0.6 where it waits already, 0 where all are
    taken, and by its queue; within, vLLM: first come first served, requests of adapters beyond the limit skipped."""

    def __init__(self, affinity: float = 1.0) -> None:
        super().__init__()
        self.affinity = affinity
        self.balance = self._score

    def _score(self, _: Replicas, adapter: int) -> int:
        up = [i for i, replica in enumerate(self.replicas) if replica.machine.up]
        loads = {i: self.replicas[i].load() for i in up}
        most = max(loads.values()) or 1

        def score(i: int) -> float:
            replica = self.replicas[i]
            running = replica.running()
            if adapter in running:
                active = 1.0
            elif len(running.keys() | replica.queues.keys()) < replica.machine.spec.contexts:
                active = 0.8
            else:
                active = 0.6 if adapter in replica.queues else 0.0
            return self.affinity * active + 1 - loads[i] / most

        return max(up, key=score)

    def pick(self, replica: Replica) -> int | None:
        running = replica.running()
        return replica.oldest(replica.queues if len(running) < replica.machine.spec.contexts else running)


class DloraCredits(Replicas):
    """dLoRA: the adapter with the most requests is served; the others earn a credit for each time they are displaced though their head came
    first, and the one with more than `credits` preempts at the next opportunity."""

    def __init__(self, credits: float = 100.0, balance: str = "least") -> None:  # noqa: A002 — its word for it
        super().__init__(balance)
        self.most = credits

    def pick(self, replica: Replica) -> int | None:
        running, credit = replica.running(), replica.note
        others = [a for a in replica.queues if a not in running]
        rich = max(others, key=lambda a: credit.get(a, 0.0), default=None)
        preempted = rich is not None and credit.get(rich, 0.0) > self.most
        if len(running) < replica.machine.spec.contexts:
            chosen = rich if preempted else max(replica.queues, key=lambda a: len(replica.queues[a]))
        else:
            chosen = None if preempted else replica.oldest(running)
        if chosen is not None:
            credit.pop(chosen, None)
            for adapter in others:
                if adapter != chosen and replica.queues[adapter][0] < replica.queues[chosen][0]:
                    credit[adapter] = credit.get(adapter, 0.0) + 1
        return chosen


GRID: Mapping[str, tuple[Callable[..., Scheduler], Sequence[Mapping[str, Any]]]] = {
    "first come first served": (FirstComeFirstServed, [{}]),
    "round robin": (RoundRobin, [{"most": n} for n in (16, 64, 256, 1024)]),
    "LoRAX": (Lorax, [{"cycle_s": s, "balance": b} for s in (0.5, 2.0, 8.0, 30.0) for b in BALANCERS]),
    "S-LoRA": (SLora, [{"ahead": n, "balance": b} for n in (10, 30, 100, 300) for b in BALANCERS]),
    "SGLang": (SglangDrainer, [{"starved_s": s, "balance": b} for s in (1.0, 3.0, 10.0, 30.0) for b in BALANCERS]),
    "llm-d": (LlmdAffinity, [{"affinity": x} for x in (0.5, 1.0, 2.0, 5.0)]),
    "dLoRA": (DloraCredits, [{"credits": n, "balance": b} for n in (10.0, 100.0, 1000.0) for b in BALANCERS]),
    "shortest queue": (ShortestQueue, [{}]),
}
"""Every rival with the settings among which its best is looked for, cell by cell."""
