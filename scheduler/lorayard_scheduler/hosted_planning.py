"""What `hosted_planner` needs to know, gathered: hosted workers and what they hold, how fast local ones are, who may not leave."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable

from lorayard.adapters.hosting import Publications
from lorayard.errors import LorayardError
from lorayard.hosted import organisation
from lorayard.jobs import adapter_of, lane_of
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.policies import NOTHING_LEAVES, Policies
from lorayard.ledger.registry import WorkerInfo
from lorayard.settings import Settings
from lorayard_scheduler.backlog import Backlog
from lorayard_scheduler.hosted_planner import AtHome, HostedPolicy, HostedWorker, Newcomers, plan_hosted, wanting
from lorayard_scheduler.planner import Dispatch
from lorayard_scheduler.quotes import Hosted

LOOK_EVERY_S = 2.0
RATE_OVER_S = 5.0
GAP_S = 1.0
"""Idle for no longer than that, workers are between two batches."""
HANDOVER_S = 900
QUEUES_MOST = 500
"""Named in a forecast."""


class LocalRate:
    """Jobs a second that local workers finish, seen while they have work; older times count less."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._since = 0.0
        self._finished = 0.0
        self._busy = 0.0

    def see(self, now_s: float, finished: float, busy: bool) -> None:
        """`finished` by all of them ever, as they tell it."""
        if busy:
            self._busy = now_s
        if now_s - self._busy > GAP_S or finished < self._finished or not self._since:
            self._since, self._finished = now_s, finished
            return
        passed = now_s - self._since
        if passed >= RATE_OVER_S:
            seen = (finished - self._finished) / passed
            self.rate = seen if self.rate is None else 0.5 * self.rate + 0.5 * seen
            self._since, self._finished = now_s, finished


class HostedPlanning:
    """One scheduler's. Without hosted workers it costs nothing."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._policies = Policies(ledger.client)
        self._publications = Publications(ledger.client, settings.hosted_org, settings.hosted_model or "")
        self._org = organisation(settings, ledger.client) if settings.hosted_model else None
        self._policy = HostedPolicy(
            batch_jobs=settings.hosted_batch_jobs,
            gather_ms=round(settings.hosted_batch_gather_s * 1000),
            urgent_ms=(settings.hosted_batch_window_s + HANDOVER_S) * 1000,
        )
        self._rate = LocalRate()
        self._newcomers = Newcomers()
        self._closed: frozenset[str] = frozenset()
        self._pending: frozenset[str] = frozenset()
        self._names: set[str] = set()
        self._looked = 0.0
        self._blocked_until = 0.0

    def wants(self, backlog: Backlog, workers: Iterable[WorkerInfo]) -> bool:
        """Whether to plan though nothing was heard: room at hosted workers comes with every job that ends."""
        return any(worker.hosted for worker in workers) and backlog.has_lanes

    def is_hosted(self, worker: str) -> bool:
        return worker in self._names

    def plan(self, backlog: Backlog, workers: Iterable[WorkerInfo]) -> list[Dispatch]:
        """Dispatches to the hosted ones of these workers."""
        workers = list(workers)
        hosted = [worker for worker in workers if worker.hosted]
        self._names = {worker.name for worker in hosted}
        if not hosted:
            return []
        at_home = [worker for worker in workers if not worker.hosted]
        held, batches = Counter[str](), Counter[str]()
        for flight in backlog.in_flight:
            held[flight.worker] += flight.left
            batches[flight.worker] += 1
        in_flight = sum(held[worker.name] for worker in at_home)
        self._rate.see(time.monotonic(), sum(worker.ended for worker in at_home), in_flight > 0)
        if not backlog.has_lanes:
            self._newcomers.settle((), backlog.served_there)
            return []
        groups = backlog.waiting()
        self._look({g.tenant for g in groups if lane_of(g.digest) == "auto"})
        home = AtHome(len(at_home), self._rate.rate, in_flight)
        wanted = wanting(groups, home, backlog.now, closed=self._closed)
        waiting = {tenant for (digest, tenant), jobs in wanted.items() if jobs and adapter_of(digest) not in self._pending}
        backlog.lift_there(self._newcomers.settle(waiting, backlog.served_there))
        return plan_hosted(
            groups,
            [HostedWorker(w.name, w.room, held[w.name], batches[w.name], frozenset(w.loaded), frozenset(w.doubted)) for w in hosted],
            backlog.served_there,
            home,
            backlog.now,
            self._policy,
            closed=self._closed,
            pending=self._pending,
        )

    def told(self, backlog: Backlog, now: float, workers: Iterable[WorkerInfo]) -> Hosted:
        """What quotes are made from; `now` by the ledger's clock."""
        hosted = [worker for worker in workers if worker.hosted]
        if not hosted:
            return Hosted()
        held = Counter[str]()
        for flight in backlog.in_flight:
            held[flight.worker] += flight.left
        queues = {f"{g.digest}:{g.tenant}": g.jobs for g in backlog.waiting() if lane_of(g.digest) == "groq"} if backlog.has_lanes else {}
        found = Hosted(
            workers=[worker.name for worker in hosted],
            room=sum(max(0, worker.room - held[worker.name]) for worker in hosted),
            ended=sum(worker.ended for worker in hosted),
            queues=dict(sorted(queues.items(), key=lambda row: -row[1])[:QUEUES_MOST]),
            failing=all(worker.counters.get("breaker_open") or worker.counters.get("limits_unanswered") for worker in hosted),
            doubted=sorted(set.intersection(*(set(worker.doubted) for worker in hosted))),
            closed=sorted(self._closed),
        )
        if self._org is not None:
            with contextlib.suppress(LorayardError):  # out of reach, as the forecast will be
                state = self._org.state(self._settings.hosted_model or "")
                found.rpm = state.numbers.get("rpm", 0)
                if state.blocked_ms > 0:
                    self._blocked_until = now + state.blocked_ms
                found.blocked_until = min(self._blocked_until, now + state.blocked_ms)  # a block may be lifted
        return found

    def _look(self, tenants: set[str]) -> None:
        """Which of these may not leave, or have no money left; and which adapters are on their way."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        self._pending = frozenset(digest for digest, one in self._publications.all().items() if one.state == "wanted")
        policies = self._policies.all() if tenants else {}
        base = self._settings.hosted_model or ""
        self._closed = frozenset(
            tenant
            for tenant in tenants
            if self._org is None or not policies.get(tenant, NOTHING_LEAVES).hosted or self._org.over(base, tenant, policies[tenant].caps)
        )
