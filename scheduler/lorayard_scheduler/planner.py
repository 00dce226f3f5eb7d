"""Which jobs go to which worker next. Pure: no I/O, no clock of its own, the same answer for the same view.

The rule, in this order:

1. *Shares.* Only tenants within `slack_tokens` of the least served tenant that waits may be served (virtual token counter; work in flight
   counts).
2. *Stay while it pays.* A worker goes on with its adapter while an eligible tenant has jobs for it, but no longer than `quantum_ms` when
   another adapter waits: the switch alone costs little, narrow batches and prefixes computed again cost much.
3. *Due time.* Otherwise the group with the earliest effective due time: `min(max(head's due, last served), waiting since + patience)`.
   The lower bound makes flooded groups take turns, the cap lets no group wait longer for its turn than `patience_ms` and the turns of the
   groups that waited longer still: a rare adapter's job is served in bounded time however deep the others' backlog is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Policy:
    """Times in milliseconds of the ledger's clock."""

    quantum_ms: int = 6_000
    patience_ms: int = 20_000
    slack_tokens: int = 4_000
    rows_per_width: float = 2.0  # jobs in a batch, as a multiple of the worker's decode width
    outstanding: int = 2  # batches a worker may have: one running, one on deck


@dataclass(frozen=True)
class GroupView:
    """Queued jobs of one adapter and tenant. `due` is the head's; `since` is when it began to wait, or was last served."""

    digest: str
    tenant: str
    jobs: int
    due: int
    since: int
    served_before: bool = False


@dataclass(frozen=True)
class WorkerView:
    """A live worker. `digest` is the adapter of its newest batch (None: it has had none), `stay_since` when its stay on it began."""

    name: str
    width: int
    outstanding: int
    digest: str | None = None
    stay_since: int = 0
    warm: frozenset[str] = frozenset()  # adapters hot or loaded there


@dataclass(frozen=True)
class View:
    """`served` is tokens by tenant, work in flight included."""

    groups: tuple[GroupView, ...]
    workers: tuple[WorkerView, ...]
    served: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Dispatch:
    """Jobs of one adapter for one worker: how many of each tenant, the most due first. `why` is for people."""

    worker: str
    digest: str
    takes: tuple[tuple[str, int], ...]
    why: str


TOKENS_PER_JOB = 100.0
"""What a job is taken to cost until its tokens are counted."""


def plan(view: View, now: int, policy: Policy) -> list[Dispatch]:
    """Dispatches for all room there is: every worker's first batch before anybody's second."""
    state = _State(view, policy)
    dispatches = []
    for turn in range(policy.outstanding):
        for worker in sorted(view.workers, key=lambda w: (w.outstanding, w.name)):
            if worker.outstanding <= turn and (dispatch := state.choose(worker, now)) is not None:
                dispatches.append(dispatch)
    return dispatches


class _State:
    """What changes while one plan is made: queues shrink, tenants are charged, workers move on."""

    def __init__(self, view: View, policy: Policy) -> None:
        self.policy = policy
        self.workers = view.workers
        self.groups = {(g.digest, g.tenant): g for g in view.groups if g.jobs > 0}
        self.left = {key: g.jobs for key, g in self.groups.items()}
        self.served = defaultdict(float, view.served)
        self.stay = {w.name: (w.digest, w.stay_since) for w in view.workers}
        self.given = {w.name: w.outstanding for w in view.workers}

    def choose(self, worker: WorkerView, now: int) -> Dispatch | None:
        open_groups = [self.groups[key] for key, jobs in self.left.items() if jobs > 0]
        if not open_groups:
            return None
        floor = min(self.served[g.tenant] for g in open_groups)
        eligible = {g.tenant for g in open_groups if self.served[g.tenant] <= floor + self.policy.slack_tokens}
        served = [g for g in open_groups if g.tenant in eligible]
        current, since = self.stay[worker.name]
        others = [g for g in served if g.digest != current]
        may_stay = len(others) < len(served)
        if current is not None and may_stay and (not others or now - since < self.policy.quantum_ms):
            return self._dispatch(worker, current, eligible, "stays: more jobs for this adapter" if others else "no other adapter waits")
        if may_stay:
            why = "its turn: the most due of the other adapters"
        elif any(g.digest == current for g in open_groups):
            why = "another tenant's share"
        else:
            why = "most due"
        candidates = [g for g in others if not self._better_elsewhere(worker, g)]
        if not candidates and self.given[worker.name]:
            return None  # what is left has a worker that is on it; this one is busy too
        group = min(candidates or others, key=lambda g: (self._due(g), g.digest not in worker.warm, g.digest, g.tenant))
        self.stay[worker.name] = (group.digest, now)
        return self._dispatch(worker, group.digest, eligible, why)

    def _due(self, group: GroupView) -> int:
        due = max(group.due, group.since) if group.served_before else group.due
        return min(due, group.since + self.policy.patience_ms)

    def _better_elsewhere(self, worker: WorkerView, group: GroupView) -> bool:
        """Whether another worker is on this adapter already and finishes the group with its next batch."""
        left = self.left[group.digest, group.tenant]
        return any(
            w.name != worker.name and self.given[w.name] and self.stay[w.name][0] == group.digest and left <= self._rows(w)
            for w in self.workers
        )

    def _rows(self, worker: WorkerView) -> int:
        return max(1, math.ceil(worker.width * self.policy.rows_per_width))

    def _dispatch(self, worker: WorkerView, digest: str, eligible: Iterable[str], why: str) -> Dispatch:
        """Fill one batch: the eligible tenants with jobs in this group in turns by least served."""
        rows = self._rows(worker)
        takes: dict[str, int] = defaultdict(int)
        tenants = [t for t in sorted(eligible) if self.left.get((digest, t), 0) > 0]
        while rows > 0 and tenants:
            tenant = min(tenants, key=lambda t: (self.served[t], t))
            takes[tenant] += 1
            rows -= 1
            self.served[tenant] += TOKENS_PER_JOB
            self.left[digest, tenant] -= 1
            if self.left[digest, tenant] == 0:
                tenants.remove(tenant)
        self.given[worker.name] += 1
        return Dispatch(worker.name, digest, tuple(sorted(takes.items())), why)
