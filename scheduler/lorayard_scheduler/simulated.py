"""The real planner at the head of a simulated fleet, with the ledger's order: the most due job of a group first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from lorayard_scheduler.ahead import fetchers, planned
from lorayard_scheduler.costs import Work
from lorayard_scheduler.groups import Groups, Scale
from lorayard_scheduler.planner import Dispatch, Policy, View, plan
from lorayard_scheduler.recall import recalls
from lorayard_scheduler.roster import Held, Roster, WorkerView
from lorayard_scheduler.simulator import Batch, Fleet, Machine

TELL_EVERY_MS = 1_000.0


class Lorayard:
    """`plan` on a mirror that is always up to date. `recalls`: batches that have not begun come back for what is urgent. `tells`: workers
    hear once a second what is planned next."""

    def __init__(self, policy: Policy | None = None, *, recalls: bool = True, tells: bool = True) -> None:
        self.policy = policy or Policy()
        self.may_recall, self.tells = recalls, tells
        self.plans = self.recalled = 0

    def begin(self, fleet: Fleet) -> None:
        self.fleet, trace = fleet, fleet.trace
        self.queues: dict[tuple[int, int], list[tuple[float, int]]] = {}
        self.in_flight = [0] * len(trace.tenant_names)
        self.charged: dict[int, float] = {}
        self.numbers = {name: i for i, name in enumerate(trace.adapter_names)}
        self.tenants = {name: i for i, name in enumerate(trace.tenant_names)}
        self.work = Work()
        self.groups = Groups(self._scale())
        self.bound = [-1] * len(fleet.machines)  # switches of each, when it was last looked at what it has in memory
        self.views = [WorkerView(f"w{machine.index:04d}", machine.costs) for machine in fleet.machines]
        self.machines = {view.name: machine for view, machine in zip(self.views, fleet.machines, strict=True)}
        self.roster = Roster(adapters_at_once=min(2, *(machine.spec.contexts for machine in fleet.machines)))
        for machine in fleet.machines:
            self._see(machine)
        self.view = View(self.groups, self.roster)
        self.told = 0.0
        self.done = 0
        self.news = False
        self.touched: dict[int, Machine] = {}
        self.sums = [0.0, 0.0, 0.0]

    def _scale(self) -> Scale:
        return Scale.of(self.policy.patience_ms, self.policy.flood_ms, [machine.costs for machine in self.fleet.machines], self.work)

    def _see(self, machine: Machine) -> None:
        names, view = self.fleet.trace.adapter_names, self.views[machine.index]
        if not machine.up:
            self.roster.drop(view.name)
            self.bound[machine.index] = -1
            return
        view.held = tuple(
            [Held(str(b.number), names[b.adapter], b.left, len(b.jobs) - b.started, b.due, b.tenants) for b in machine.batches]
        )
        if self.bound[machine.index] != machine.switches:  # what is in memory changes with a switch only
            self.bound[machine.index] = machine.switches
            view.hot = tuple([names[a] for a in machine.bound])
            view.loaded = tuple([names[a] for a in machine.loaded])
        self.roster.put(view)

    def arrived(self, job: int) -> None:
        trace = self.fleet.trace
        adapter, tenant = trace.adapters[job], trace.tenants[job]
        queue = self.queues.get((adapter, tenant))
        if queue is None:
            queue = self.queues[adapter, tenant] = []
        heapq.heappush(queue, (trace.arrivals[job] + trace.targets[job], job))
        self.groups.put(trace.adapter_names[adapter], trace.tenant_names[tenant], len(queue), queue[0][0], self.fleet.now)
        self.news = True

    def ended(self, job: int, machine: Machine, batch: Batch) -> None:
        trace = self.fleet.trace
        tenant, tokens = trace.tenants[job], trace.prompts[job] + trace.outputs[job]
        self.groups.charge(trace.tenant_names[tenant], tokens - self.charged.pop(job))
        self.in_flight[tenant] -= 1
        self.done += 1
        self.sums[0] += trace.prompts[job]
        self.sums[1] += min(trace.shared[trace.adapters[job]], trace.prompts[job] - 1)
        self.sums[2] += trace.outputs[job]
        self.touched[machine.index] = machine
        if not batch.left or self.queues.get((batch.adapter, tenant)):
            self.news = True
        if self.done in (100, 1_000) or self.done % 10_000 == 0:
            prompt, shared, output = (value / self.done for value in self.sums)
            self.work = Work(prompt, shared, output)
            self.groups.rescale(self._scale())

    def turn(self) -> None:
        self._settle()
        if self.groups.floods:
            self.roster.wake(self.fleet.now)
        if not (self.news or self.roster.news) or not (self.groups.jobs or (self.roster.uneven and self.roster.decks)):
            return
        self.news = False
        for machine in self.touched.values():
            self._see(machine)
        self.touched.clear()
        self.plans += 1
        if self.may_recall:
            self._recall()
        more = True
        while more:
            dispatches = plan(self.view, self.fleet.now, self.policy)
            more = bool(dispatches) and dispatches[-1].more
            for dispatch in dispatches:
                self._carry_out(dispatch)
        self.view.planned()
        if self.tells and self.fleet.now >= self.told:
            self._tell()

    def _settle(self) -> None:
        """At every turn, as the mirror does at every look at the ledger: whoever has nothing left is away then."""
        self.groups.settle([name for name, jobs in zip(self.fleet.trace.tenant_names, self.in_flight, strict=True) if jobs])

    def _tell(self) -> None:
        self.told = self.fleet.now + TELL_EVERY_MS
        digests = planned(self.groups)
        order = {self.numbers[digest]: place for place, digest in enumerate(digests)}
        for machine in self.fleet.machines:
            machine.planned = order
            if machine.fetched is not None:
                self.views[machine.index].absent = {digest for digest in digests if self.numbers[digest] not in machine.fetched}
        absent = {view.name: view.absent for view in self.views if self.machines[view.name].up}
        for digest, name in fetchers(digests, absent).items():
            self.machines[name].fetch_ahead(self.numbers[digest], self.fleet.now)

    def _carry_out(self, dispatch: Dispatch) -> None:
        adapter, machine = self.numbers[dispatch.digest], self.machines[dispatch.worker]
        jobs = []
        for name, count in dispatch.takes:
            tenant = self.tenants[name]
            queue = self.queues[adapter, tenant]
            taken = [heapq.heappop(queue) for _ in range(count)]
            jobs += taken
            self.in_flight[tenant] += count
            self.groups.take(dispatch.digest, name, count, self.fleet.now)
            self.groups.charge(name, count * self.work.tokens)
            if queue:
                self.groups.put(dispatch.digest, name, len(queue), queue[0][0], self.fleet.now)
        jobs.sort()
        for _, job in jobs:
            self.charged[job] = self.work.tokens
        batch = self.fleet.give(machine, adapter, [job for _, job in jobs])
        batch.due = jobs[0][0]
        batch.tenants = tuple([name for name, _ in dispatch.takes])
        if self.groups.floods:
            self.roster.gave(dispatch.worker, len(jobs), self.work, self.fleet.now)
            self.fleet.remind(self.roster.reads[dispatch.worker])
        self._see(machine)

    def _recall(self) -> None:
        """What has begun since its worker was looked at stays, as it does in the ledger."""
        for recall in recalls(self.view, self.fleet.now, self.policy):
            machine = self.machines[recall.worker]
            for batch in [batch for batch in machine.batches if str(batch.number) in recall.batches]:
                jobs = machine.recall(batch)
                self.recalled += len(jobs)
                self._again(jobs)
            self._see(machine)

    def lost(self, jobs: Iterable[int], machine: Machine) -> None:
        self._again(jobs)
        self._see(machine)

    def back(self, machine: Machine) -> None:
        self._see(machine)
        self.news = True

    def _again(self, jobs: Iterable[int]) -> None:
        trace = self.fleet.trace
        for job in jobs:
            tenant = trace.tenants[job]
            self.in_flight[tenant] -= 1
            self.groups.charge(trace.tenant_names[tenant], -self.charged.pop(job))
            self.arrived(job)
