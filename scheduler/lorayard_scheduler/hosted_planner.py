"""Which jobs go to hosted workers next. Pure, as `planner.py`, and simpler: no adapter need be switched there, so what counts is shares,
due time, and how many jobs a worker has room for.

What may go where, by lane (`lorayard.jobs.Lane`):
- local workers claim jobs without a lane, and `auto`;
- hosted workers claim `groq`, `batch` (many at once, for the service's batch API), and of `auto` what local work queued ahead would make
  miss its due time (`overdue_at_home`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lorayard.jobs import adapter_of, lane_of
from lorayard_scheduler.planner import Dispatch

OUTSTANDING = 64
"""Batches a hosted worker may have."""

TAKE = 32
"""Jobs in a batch of them: few, so that tenants take turns."""


TOKENS_PER_JOB = 100.0
"""What a job is taken to cost until its tokens are counted."""


@dataclass(frozen=True)
class GroupView:
    """Queued jobs of one adapter, lane and tenant. `due` is the head's; `since` is when it began to wait."""

    digest: str
    tenant: str
    jobs: int
    due: int
    since: int


@dataclass(frozen=True)
class HostedWorker:
    """`room`: jobs it would like to have; `held`: jobs it has; `serves`: digests the service has; `doubted`: those whose calls fail."""

    name: str
    room: int
    held: int
    outstanding: int
    serves: frozenset[str]
    doubted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class HostedPolicy:
    """`batch_jobs` go to the batch API together, or fewer when the first has waited `gather_ms`; what has no more than `urgent_ms` left
    is called at once."""

    slack_tokens: int = 4_000
    batch_jobs: int = 1_000
    gather_ms: int = 60_000
    urgent_ms: int = 25 * 3_600_000


@dataclass(frozen=True)
class AtHome:
    """What local workers do: jobs a second, None where nobody has seen it yet; `workers` that live; jobs `in_flight`."""

    workers: int = 0
    rate: float | None = None
    in_flight: int = 0


def local_groups(groups: Iterable[GroupView]) -> tuple[GroupView, ...]:
    """What local workers may claim."""
    return tuple(g for g in groups if lane_of(g.digest) in ("", "auto"))


def overdue_at_home(groups: Iterable[GroupView], home: AtHome, now: int) -> dict[tuple[str, str], int]:
    """Of each `auto` group, by digest and tenant, how many of its jobs would miss its due time at home: those that the jobs queued ahead
    leave no time for. Of groups that are due at the same moment, as those of one call are, one is ahead of the other and not both."""
    found, ahead = {}, home.in_flight
    for group in sorted(local_groups(groups), key=lambda g: (g.due, g.digest, g.tenant)):
        if lane_of(group.digest) == "auto":
            found[group.digest, group.tenant] = group.jobs - min(group.jobs, _in_time(group, ahead, home, now))
        ahead += group.jobs
    return found


def _in_time(group: GroupView, ahead: int, home: AtHome, now: int) -> int:
    """How many jobs home has time for by the group's due time, when it has done so many others."""
    if not home.workers:
        return 0
    if home.rate is None:
        return 0 if group.due <= now else group.jobs
    return max(0, int(home.rate * max(0, group.due - now) / 1000 - ahead))


def wanting(groups: Collection[GroupView], home: AtHome, now: int, *, closed: Collection[str] = ()) -> dict[tuple[str, str], int]:
    """How many jobs of each group, by digest and tenant, shall go to hosted workers."""
    found = {(g.digest, g.tenant): g.jobs for g in groups if lane_of(g.digest) in ("groq", "batch")}
    return found | {key: jobs for key, jobs in overdue_at_home(groups, home, now).items() if key[1] not in closed}


class Newcomers:
    """Who waits for hosted workers. Whoever did not until now has no claim on the past."""

    def __init__(self) -> None:
        self._waiting: frozenset[str] = frozenset()
        self._level = 0.0

    def settle(self, waiting: Collection[str], served: Mapping[str, float]) -> dict[str, float]:
        """These tenants wait now, and all were served so many tokens. Who was not among them before counts as served as much as the least
        served of those who were, or who were the last: whom that raises, and to what."""
        if self._waiting:
            self._level = min(served.get(tenant, 0.0) for tenant in self._waiting)
        new = frozenset(waiting) - self._waiting
        self._waiting = frozenset(waiting)
        return {tenant: self._level for tenant in new if served.get(tenant, 0.0) < self._level}


def plan_hosted(
    groups: Collection[GroupView],
    workers: Iterable[HostedWorker],
    served: Mapping[str, float],
    home: AtHome,
    now: int,
    policy: HostedPolicy,
    *,
    closed: Collection[str] = (),
    pending: Collection[str] = (),
) -> list[Dispatch]:
    """Dispatches for all the room there is. `served`: tokens, by tenant, by hosted workers.

    `closed`: tenants whose `auto` jobs stay at home, for they may not leave or have no money. `pending`: adapters on their way there, whose
    jobs wait. Jobs that can only go there and whose adapter never will are dispatched too: the worker tells them so.
    """
    state = _State(groups, served, home, now, policy, closed, pending)
    dispatches: list[Dispatch] = []
    for worker in sorted(workers, key=lambda w: (w.held, w.name)):
        dispatches += state.fill(worker)
    return dispatches


class _State:
    """What changes while one plan is made."""

    def __init__(
        self,
        groups: Collection[GroupView],
        served: Mapping[str, float],
        home: AtHome,
        now: int,
        policy: HostedPolicy,
        closed: Collection[str],
        pending: Collection[str],
    ) -> None:
        self.now, self.policy, self.pending = now, policy, pending
        self.served = defaultdict(float, served)
        self.groups = {(g.digest, g.tenant): g for g in groups}
        self.left = wanting(groups, home, now, closed=closed)

    def fill(self, worker: HostedWorker) -> Iterable[Dispatch]:
        room, outstanding = worker.room - worker.held, worker.outstanding
        if worker.room <= 0:
            return
        while outstanding < OUTSTANDING and (group := self._next(worker, room)) is not None:
            many = self._gathered(group)
            take = min(self.left[group.digest, group.tenant], self.policy.batch_jobs if many else min(TAKE, room))
            self.left[group.digest, group.tenant] -= take
            self.served[group.tenant] += take * TOKENS_PER_JOB
            room -= 0 if many else take
            outstanding += 1
            yield Dispatch(worker.name, group.digest, ((group.tenant, take),), self._why(group, many))

    def _next(self, worker: HostedWorker, room: int) -> GroupView | None:
        """The most due of the least served tenants' groups, those it doubts last."""
        open_groups = [
            g
            for key, g in self.groups.items()
            if self.left.get(key, 0) > 0 and self._is_known(g, worker) and (self._gathered(g) or (room > 0 and not self._gathering(g)))
        ]
        if not open_groups:
            return None
        open_groups = [g for g in open_groups if adapter_of(g.digest) not in worker.doubted] or open_groups
        floor = min(self.served[g.tenant] for g in open_groups)
        eligible = [g for g in open_groups if self.served[g.tenant] <= floor + self.policy.slack_tokens]
        return min(eligible, key=lambda g: (g.due, self.served[g.tenant], g.digest, g.tenant))

    def _is_known(self, group: GroupView, worker: HostedWorker) -> bool:
        digest = adapter_of(group.digest)
        return digest in worker.serves or (lane_of(group.digest) != "auto" and digest not in self.pending)

    def _has_time(self, group: GroupView) -> bool:
        return lane_of(group.digest) == "batch" and group.due - self.now > self.policy.urgent_ms

    def _gathered(self, group: GroupView) -> bool:
        """Enough of them, or waited for long enough, for a batch."""
        enough = self.left[group.digest, group.tenant] >= self.policy.batch_jobs
        return self._has_time(group) and (enough or self.now - group.since >= self.policy.gather_ms)

    def _gathering(self, group: GroupView) -> bool:
        return self._has_time(group) and not self._gathered(group)

    @staticmethod
    def _why(group: GroupView, many: bool) -> str:
        if many:
            return "hosted: there is time for the batch service"
        if lane_of(group.digest) == "auto":
            return "hosted: local work queued ahead would make it miss its due time"
        return "hosted: its route"
