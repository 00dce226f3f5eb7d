"""The scheduler's mirror of the ledger: indexes per group and batch, nothing per job; and the view the planner reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorayard.jobs import lane_of, laned
from lorayard.ledger.ledger import Event, InFlight, Ledger
from lorayard.ledger.registry import WorkerInfo
from lorayard_scheduler.planner import TOKENS_PER_JOB, GroupView, View, WorkerView


@dataclass
class _Group:
    jobs: int
    due: int
    since: int
    served_before: bool = False


class Backlog:
    """Rebuilt from the ledger at start and after any gap; in between, events name the groups to read again.

    What it knows beyond the ledger is only how long groups wait and workers stay; losing that with the process changes the order of service
    for one quantum, nothing else.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._groups: dict[tuple[str, str], _Group] = {}
        self._dirty: set[tuple[str, str]] = set()
        self._stays: dict[str, tuple[str, int]] = {}
        self.in_flight: list[InFlight] = []
        self.served: dict[str, int] = {}
        self.now = 0
        self.stale = True

    def rebuild(self) -> str:
        """Read everything anew; the event id to go on from."""
        view = self._ledger.snapshot()
        known = self._groups
        self._groups = {}
        self.now, self.in_flight, self.served = view.now, view.in_flight, view.served
        for g in view.groups:
            if g.jobs == 0:  # paused
                continue
            old = known.get((g.digest, g.tenant))
            self._groups[g.digest, g.tenant] = _Group(g.jobs, g.due, old.since if old else view.now, old.served_before if old else False)
        if known:  # else nothing is known of who was away
            active = {tenant for _, tenant in known} | {t for f in view.in_flight for t in f.by}
            for tenant in sorted({tenant for _, tenant in self._groups} - active):
                self._lift_newcomer(tenant, active)
        for flight in view.in_flight:
            self._stays.setdefault(flight.worker, (flight.digest, flight.claimed))
        self._dirty.clear()
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
        self.now, self.in_flight, self.served = view.now, view.in_flight, view.served
        active = {tenant for _, tenant in self._groups} | {t for f in self.in_flight for t in f.by}
        for g in view.groups:
            key = (g.digest, g.tenant)
            if g.jobs == 0:
                self._groups.pop(key, None)
            elif key in self._groups:
                self._groups[key].jobs, self._groups[key].due = g.jobs, g.due
            else:
                self._groups[key] = _Group(g.jobs, g.due, view.now)
                self._lift_newcomer(g.tenant, active)
        self.stale = False

    def _lift_newcomer(self, tenant: str, active: set[str]) -> None:
        """A tenant that was away has no claim on the past: it begins level with the least served of those that are active."""
        if tenant in active or not active:
            return
        level = min(self.served.get(t, 0) for t in active)
        if self.served.get(tenant, 0) < level:
            self._ledger.lift(tenant, level)
            self.served[tenant] = level
        active.add(tenant)

    @property
    def has_lanes(self) -> bool:
        """Whether anything waits that a hosted worker might take."""
        return any(lane_of(digest) for digest, _ in self._groups)

    def missed(self, digest: str, takes: Iterable[tuple[str, int]]) -> None:
        """A batch could not be claimed: its groups are not what they seemed."""
        self._dirty |= {(digest, tenant) for tenant, _ in takes}
        self.stale = True

    def dispatched(self, worker: str, digest: str, takes: Iterable[tuple[str, int]]) -> None:
        """A batch was claimed: the groups it came from are read again, and the worker's stay goes on or begins."""
        for tenant, _ in takes:
            self._dirty.add((digest, tenant))
            group = self._groups.get((digest, tenant))
            if group is not None:
                group.since, group.served_before = self.now, True
        if self._stays.get(worker, ("", 0))[0] != digest:
            self._stays[worker] = (digest, self.now)
        self.stale = True

    def view(self, workers: Iterable[WorkerInfo]) -> View:
        """What the planner sees of the pool now."""
        outstanding: dict[str, int] = {}
        served = {tenant: float(tokens) for tenant, tokens in self.served.items()}
        for flight in self.in_flight:
            outstanding[flight.worker] = outstanding.get(flight.worker, 0) + 1
            for tenant, jobs in flight.by.items():
                served[tenant] = served.get(tenant, 0.0) + jobs * TOKENS_PER_JOB
        views = []
        for worker in workers:
            digest, since = self._stays.get(worker.name, (None, 0))
            warm = frozenset(worker.hot) | frozenset(worker.loaded)
            warm |= {laned(digest, "auto") for digest in warm}
            views.append(WorkerView(worker.name, max(1, worker.width), outstanding.get(worker.name, 0), digest, since, warm))
        groups = tuple(GroupView(d, t, g.jobs, g.due, g.since, g.served_before) for (d, t), g in sorted(self._groups.items()))
        return View(groups, tuple(views), served)
