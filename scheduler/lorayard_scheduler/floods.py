"""What tenants that flood leave to the others, in one plan (docs/scheduling.md, Tenants): nobody is served who has had much more than they,
and where others have jobs, they leave these room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lorayard_scheduler.groups import Group, Groups, Tenant
from lorayard_scheduler.policy import Policy, Prices
from lorayard_scheduler.roster import Roster, WorkerView

_ENOUGH = 4
"""So many workers can spare one."""


class Seat:
    """A worker as a plan fills it."""

    __slots__ = ("faster", "given", "hand", "load", "name", "prices", "steady", "unread", "worker")

    def __init__(
        self, worker: WorkerView, load: int, hand: frozenset[str], prices: Prices, faster: Sequence[str], unread: float, steady: int
    ) -> None:
        self.worker, self.name, self.load, self.hand, self.prices = worker, worker.name, load, hand, prices
        self.given = len(worker.held)
        self.faster = faster  # workers that are much faster, those that have least to do
        self.unread = unread  # ms of reading prompts that are before what it is given
        self.steady = steady  # of its load, jobs of tenants that do not flood

    @property
    def ends(self) -> float:
        """Milliseconds until one usual job more would have ended here."""
        return (self.load + 1) * self.worker.costs.pace


class Floods:
    """Who floods, for as long as a plan is made; it is told what the plan gives to whom."""

    def __init__(self, groups: Groups, roster: Roster, now: float, policy: Policy) -> None:
        self._groups, self._roster, self._slack = groups, roster, policy.slack_tokens
        self._charged: dict[str, float] = {}  # tokens dispatched, by tenant
        self.limit = groups.limit(policy.slack_tokens)
        self.beside = bool(groups.floods) and not groups.alone(now - policy.flood_ms)  # others have come beside a flood
        self._resorts = self._slowest() if self.beside else frozenset()

    def _slowest(self) -> frozenset[str]:
        """Where a flood goes on whoever comes: an eighth of the workers. The others are enough for jobs of others then."""
        paces = self._roster.paces
        return frozenset([name for _, name in paces[-max(1, len(paces) // 8) :]]) if len(paces) >= _ENOUGH else frozenset()

    # -- shares ---------------------------------------------------------------------------------------------------------------------------

    def had(self, tenant: Tenant) -> float:
        """Tokens that it was served, with what this plan gives it."""
        return tenant.served + self._charged.get(tenant.name, 0.0)

    def over(self, group: Group) -> bool:
        """Whether its tenant has had so much that others come first."""
        return self.had(group.tenant) > self.limit

    def charge(self, tokens: Mapping[str, float]) -> None:
        """So much of a batch is for these tenants."""
        for name, more in tokens.items():
            self._charged[name] = self._charged.get(name, 0.0) + more
        if self._groups.floods:
            self.limit = min(map(self.had, self._groups.floods.values())) + self._slack

    # -- room -----------------------------------------------------------------------------------------------------------------------------

    def steady(self, name: str) -> int:
        """How many jobs the worker was given; beside a flood, of tenants that do not flood: the others leave room for these."""
        if not self.beside:
            return self._roster.loads[name]
        floods = self._groups.floods
        held = self._roster.workers[name].held
        return sum([h.jobs for h in held if not h.tenants or any(tenant not in floods for tenant in h.tenants)])

    def hold_back(self, seat: Seat, floods: bool) -> bool:
        """Whether jobs of a flood leave room there for whoever comes."""
        return floods and self.beside and seat.worker.costs.measured

    def rows(self, seat: Seat, floods: bool) -> int:
        """How many jobs it may have at once. Of a flood beside others' jobs few, or, where the flood has workers of its own, none."""
        if not self.hold_back(seat, floods):
            return seat.prices.rows
        if not seat.steady or seat.name in self._resorts:
            return seat.prices.wide
        return 0 if self._resorts else seat.prices.few

    def to_read(self, seat: Seat) -> int:
        """How many jobs of a flood may be before whoever comes, beside what it reads already."""
        return max(0, seat.prices.few - math.ceil(seat.unread / seat.prices.own_ms - 1e-6))
