"""A fleet without a fleet: discrete events, the real planner, workers as their own measurements describe them.

A worker's engine is modelled as `lorayard_workers.llama` works: batches are started in the order they came, as long as fewer than `width`
sequences run in the context of their adapter, or at all where it has none; contexts step in turn, so that a round of them is one token of
every sequence; binding holds everything up; prompts are read by `prefill_tokens` a round, beside which the context's other sequences get
their token at the price of a prompt's, and give the first token of the answer; an adapter that is known to be wanted is read from the disk
beside that, one at a time; a prompt's shared part is read once for as long as its adapter stays bound. Whoever schedules, these are the
rules. Times are milliseconds.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorayard_scheduler.costs import Costs, Temperature

INFINITY = float("inf")


@dataclass
class Trace:
    """Jobs in the order of their arrival; columns, because there may be millions. `tenants` and `adapters` index the names."""

    arrivals: array[float]
    adapters: array[int]
    tenants: array[int]
    prompts: array[int]
    outputs: array[int]
    targets: array[float]
    """How long each may wait: its due time is its arrival plus this."""
    adapter_names: Sequence[str]
    tenant_names: Sequence[str]
    shared: Sequence[int]
    """By adapter: tokens at the beginning of its prompts that are always the same."""

    def __len__(self) -> int:
        return len(self.arrivals)


@dataclass(frozen=True)
class WorkerSpec:
    """A worker to simulate. What is not loaded lies on its disk, or, where caches begin cold, must be fetched once."""

    costs: Costs
    contexts: int = 2
    adapters_loaded: int = 16
    cold: bool = False
    prefill_tokens: int = 512  # of prompts in one decode call


class Batch:
    """Jobs of one adapter on their way through a worker."""

    __slots__ = ("adapter", "due", "jobs", "left", "number", "started", "tenants")

    def __init__(self, number: int, adapter: int, jobs: list[int]) -> None:
        self.number, self.adapter, self.jobs = number, adapter, jobs
        self.left = len(jobs)
        self.started = 0
        self.due = 0.0  # of its most due job, where the scheduler wants to remember it
        self.tenants: tuple[str, ...] = ()  # the same


class Machine:
    """One worker: `give` it batches, and it tells when it next has something to say (`wakes`) and which jobs ended (`advance`)."""

    __slots__ = (
        "active",
        "arrives",
        "at",
        "batches",
        "bound",
        "busy_until",
        "costs",
        "ends",
        "fetched",
        "fetching",
        "index",
        "loaded",
        "loads",
        "places",
        "planned",
        "prefill",
        "queue",
        "reading",
        "reads_until",
        "round_ms",
        "rounds",
        "running",
        "spec",
        "started",
        "steps",
        "switches",
        "trace",
        "up",
        "wakes",
        "worked_ms",
    )  # fmt: skip

    def __init__(self, index: int, spec: WorkerSpec, trace: Trace, started: array[float]) -> None:
        self.index, self.spec, self.costs, self.trace, self.started = index, spec, spec.costs, trace, started
        self.steps, self.prefill, self.places = spec.costs.steps, 1000.0 / spec.costs.prefill_tokens_per_s, spec.costs.width
        self.loads = self.switches = 0
        self.worked_ms = 0.0
        self.up = True
        self.planned: Mapping[int, int] = {}  # adapter -> its place among those that wait, as the scheduler last told
        self.loaded: OrderedDict[int, None] = OrderedDict()
        self.fetched: set[int] | None = set() if spec.cold else None
        self.clear()

    def clear(self) -> list[int]:
        """Lose everything in memory; the jobs that were here."""
        lost = [job for batch in getattr(self, "batches", ()) for job in batch.jobs if job >= 0]
        self.batches: list[Batch] = []  # not ended, oldest first
        self.queue: deque[Batch] = deque()  # not wholly started
        self.fetching: list[tuple[float, int, Batch]] = []  # (when its adapter is here, batch's number, batch)
        self.bound: OrderedDict[int, int] = OrderedDict()  # adapter of a context -> sequences in it; the last one bound is last
        self.ends: list[tuple[float, int, int, Batch]] = []  # (round in which it ends, batch's number, place in it, batch)
        self.arrives: dict[int, float] = {}  # adapter that is fetched ahead -> when it is here
        self.reading: dict[int, float] = {}  # adapter -> when it will have been read
        self.active = 0
        self.reads_until = 0.0
        self.rounds = self.round_ms = self.at = self.busy_until = 0.0
        self.running = False
        self.wakes = INFINITY
        self.loaded.clear()
        return lost

    def temperature(self, adapter: int) -> Temperature:
        if adapter in self.bound:
            return "hot"
        if adapter in self.loaded:
            return "loaded"
        return "disk" if self.fetched is None or adapter in self.fetched else "remote"

    def give(self, batch: Batch, now: float) -> None:
        self.batches.append(batch)
        here = self.arrives.get(batch.adapter, now)
        if self.fetched is not None and batch.adapter not in self.fetched:  # fetched beside whatever runs
            self.fetched.add(batch.adapter)
            here = now + self.costs.switch_ms["remote"]
        if here > now:
            heapq.heappush(self.fetching, (here, batch.number, batch))
            self.wakes = min(self.wakes, self.fetching[0][0])
            return
        self.queue.append(batch)
        self.read_ahead(batch.adapter, now)
        if batch is self.queue[0]:
            self._move(now)
            self._admit(now)

    def fetch_ahead(self, adapter: int, now: float) -> None:
        """It is planned, and nobody has it: have it fetched, if nothing else is being fetched ahead."""
        if self.fetched is not None and adapter not in self.fetched and max(self.arrives.values(), default=now) <= now:
            self.fetched.add(adapter)
            self.arrives = {adapter: now + self.costs.switch_ms["remote"]}

    def read_ahead(self, adapter: int, now: float) -> None:
        """It will be wanted: have it read into memory, after what is being read already."""
        if adapter not in self.bound and adapter not in self.loaded and adapter not in self.reading:
            self.reads_until = max(now, self.reads_until) + self.costs.switch_ms["disk"] - self.costs.switch_ms["loaded"]
            self.reading[adapter] = self.reads_until

    def recall(self, batch: Batch) -> list[int]:
        """The jobs of a batch that have not begun: it no longer has them."""
        back = batch.jobs[batch.started :]
        del batch.jobs[batch.started :]
        batch.left -= len(back)
        if batch in self.queue:
            self.queue.remove(batch)
        self.fetching = [fetch for fetch in self.fetching if fetch[2] is not batch]
        heapq.heapify(self.fetching)
        if not batch.left:
            self.batches.remove(batch)
        return back

    def advance(self, now: float) -> list[tuple[int, Batch]]:
        """Jobs that ended by now, with their batches."""
        self._move(now)
        ended = []
        ends, bound = self.ends, self.bound
        limit = self.rounds + 1e-6
        while ends and ends[0][0] <= limit and now >= self.busy_until:
            _, _, place, batch = heapq.heappop(ends)
            ended.append((batch.jobs[place], batch))
            batch.jobs[place] = ~batch.jobs[place]
            batch.left -= 1
            if not batch.left:
                self.batches.remove(batch)
            bound[batch.adapter] -= 1
            self.active -= 1
        self._admit(now)
        return ended

    def _move(self, now: float) -> None:
        since = max(self.at, self.busy_until)
        if self.active:
            self.worked_ms += now - self.at
            if now > since:
                self.rounds += (now - since) / self.round_ms
        self.at = now

    def _admit(self, now: float) -> None:
        queue, trace, bound, steps = self.queue, self.trace, self.bound, self.steps
        while self.fetching and self.fetching[0][0] <= now:
            queue.append(heapq.heappop(self.fetching)[2])
            self.read_ahead(queue[-1].adapter, now)
        busy = max(self.busy_until, now)
        while queue:
            batch = queue[0]
            adapter = batch.adapter
            shared = trace.shared[adapter]
            beside = bound.get(adapter, 0)
            take = min(self.places - (beside or self.active), len(batch.jobs) - batch.started)
            if take <= 0:
                break
            if adapter not in bound:
                if not self._free_a_context():
                    break
                busy += self._bind(adapter, busy)
                busy += shared * self.prefill
            bound.move_to_end(adapter)
            jobs = batch.jobs[batch.started : batch.started + take]
            tokens = sum([max(trace.prompts[job] - shared, 1) for job in jobs])
            turns = math.ceil(tokens / self.spec.prefill_tokens)
            begun = busy  # jobs that are let in together start together, and then their prompts are read
            busy += (tokens + turns * beside) * self.prefill + turns * sum([steps[n] for a, n in bound.items() if n and a != adapter])
            self.rounds += turns
            for place, job in enumerate(jobs, batch.started):
                self.started[job] = begun
                heapq.heappush(self.ends, (self.rounds + trace.outputs[job] - 1, batch.number, place, batch))
            batch.started += take
            bound[adapter] += take
            self.active += take
            if batch.started == len(batch.jobs):
                queue.popleft()
        self.busy_until = busy
        self.round_ms = sum([steps[rows] for rows in bound.values() if rows])
        if self.ends:
            self.wakes = busy + max(0.0, self.ends[0][0] - self.rounds) * self.round_ms
        else:
            self.wakes = INFINITY
        if self.fetching:
            self.wakes = min(self.wakes, self.fetching[0][0])

    def _free_a_context(self) -> bool:
        if len(self.bound) < self.spec.contexts:
            return True
        idle = [adapter for adapter, rows in self.bound.items() if not rows]
        if idle:
            del self.bound[self._last_wanted(idle)]
        return bool(idle)

    def _last_wanted(self, adapters: Iterable[int]) -> int:
        """Of these, least recently used first: the one that is planned latest or, better, not at all."""
        return max(adapters, key=lambda adapter: self.planned.get(adapter, INFINITY))

    def _bind(self, adapter: int, now: float) -> float:
        """Milliseconds until a context is bound to it."""
        loaded, binding = self.loaded, self.costs.switch_ms["loaded"]
        self.read_ahead(adapter, now)
        self.switches += 1
        self.bound[adapter] = 0
        if adapter in loaded:
            loaded.move_to_end(adapter)
            return binding
        self.loads += 1
        loaded[adapter] = None
        if len(loaded) > self.spec.adapters_loaded and (free := [other for other in loaded if other not in self.bound]):  # the others stay
            queued = {batch.adapter for batch in self.queue}
            del loaded[self._last_wanted([other for other in free if other not in queued] or free)]
        return binding + max(0.0, self.reading.pop(adapter) - now)


class Scheduler(Protocol):
    """Who decides. The fleet is told of arrivals and of what ended, then asked for a turn; it may give batches to any machine then."""

    def begin(self, fleet: Fleet) -> None: ...

    def arrived(self, job: int) -> None: ...

    def ended(self, job: int, machine: Machine, batch: Batch) -> None: ...

    def turn(self) -> None: ...

    def lost(self, jobs: Iterable[int], machine: Machine) -> None:
        """A worker is gone; these jobs wait again."""

    def back(self, machine: Machine) -> None:
        """It is there again, with nothing in memory."""


@dataclass
class Outcome:
    """When each job started and ended, by the trace's order, in ms; and what it took."""

    trace: Trace
    started: array[float]
    ended: array[float]
    switches: int = 0
    loads: int = 0
    dispatches: int = 0
    worked_ms: float = 0.0

    def waits(self) -> list[float]:
        """From arrival to start, ms, sorted."""
        return sorted(s - a for s, a in zip(self.started, self.trace.arrivals, strict=True))


@dataclass
class Failure:
    """A worker that is away from `at` for `for_ms`, with everything it had."""

    worker: int
    at: float
    for_ms: float


@dataclass
class Fleet:
    """One run: `Fleet(trace, specs, scheduler).run()`."""

    trace: Trace
    specs: Sequence[WorkerSpec]
    scheduler: Scheduler
    failures: Sequence[Failure] = ()
    now: float = 0.0
    machines: list[Machine] = field(default_factory=list)
    _numbers: int = 0

    def run(self, until: float = INFINITY) -> Outcome:
        n = len(self.trace)
        started, ended = array("d", [INFINITY]) * n, array("d", [INFINITY]) * n
        self.machines = [Machine(i, spec, self.trace, started) for i, spec in enumerate(self.specs)]
        self._events: list[tuple[float, int]] = []  # (when a machine has something to say, its index)
        self._reminders: list[float] = []
        scheduler, machines, events, arrivals = self.scheduler, self.machines, self._events, self.trace.arrivals
        scheduler.begin(self)
        troubles = sorted([(f.at, f.worker, False) for f in self.failures] + [(f.at + f.for_ms, f.worker, True) for f in self.failures])
        troubles.reverse()
        job = 0
        next_arrival = arrivals[0] if n else INFINITY
        while True:
            speaks = events[0][0] if events else INFINITY
            at = min(speaks, self._reminders[0]) if self._reminders else speaks
            if troubles and troubles[-1][0] <= min(at, next_arrival):
                self.now, worker, back = troubles.pop()
                self._trouble(machines[worker], back)
                scheduler.turn()
                continue
            if next_arrival <= at:
                if next_arrival == INFINITY or next_arrival > until:
                    break
                self.now = next_arrival
                while next_arrival == self.now:
                    scheduler.arrived(job)
                    job += 1
                    next_arrival = arrivals[job] if job < n else INFINITY
            else:
                if at > until:
                    break
                if speaks > at:
                    self.now = heapq.heappop(self._reminders)
                else:
                    machine = machines[heapq.heappop(events)[1]]
                    if machine.wakes != at:
                        continue
                    self.now = at
                    for done, batch in machine.advance(at):
                        ended[done] = at
                        scheduler.ended(done, machine, batch)
                    if machine.wakes < INFINITY:
                        heapq.heappush(events, (machine.wakes, machine.index))
            scheduler.turn()
        return Outcome(
            self.trace, started, ended, sum(m.switches for m in machines), sum(m.loads for m in machines), self._numbers,
            sum(m.worked_ms for m in machines),
        )  # fmt: skip

    def give(self, machine: Machine, adapter: int, jobs: list[int]) -> Batch:
        """Send a batch to a machine."""
        self._numbers += 1
        batch = Batch(self._numbers, adapter, jobs)
        before = machine.wakes
        machine.give(batch, self.now)
        if machine.wakes != before:
            heapq.heappush(self._events, (machine.wakes, machine.index))
        return batch

    def remind(self, at: float) -> None:
        """Give the scheduler a turn then."""
        heapq.heappush(self._reminders, at)

    def _trouble(self, machine: Machine, back: bool) -> None:
        machine.up = back
        if back:
            self.scheduler.back(machine)
        else:
            self.scheduler.lost(machine.clear(), machine)
