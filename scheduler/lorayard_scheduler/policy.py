"""What the planner is asked to keep to, and what batches cost on workers of one kind, as far as that decides how many jobs go where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from lorayard_scheduler.costs import TEMPERATURES, Costs, Temperature, Work
from lorayard_scheduler.groups import TICKS

_FEW = 4
"""Jobs together cost much less than each alone, and every batch has its price."""


@dataclass(frozen=True)
class Policy:
    """Times in milliseconds of the ledger's clock."""

    reserve_ms: float = 45_000.0
    batch_ms: float = 30_000.0
    patience_ms: float = 4_000.0
    stay_ms: float = 90_000.0
    lead_ms: float = 500.0
    flood_ms: float = 120_000.0
    flood_reading_ms: float = 150.0  # of prompts of a flood that are before whoever comes
    flood_width: float = 0.75  # of the width, the rest being for whoever comes
    slack_tokens: float = 20_000.0
    rows_per_width: float = 2.0  # jobs in a batch at most, as a multiple of the width beyond which the worker gains little
    batches: int = 16  # that a worker may have at once
    groups_most: int = 64  # groups looked at for one batch
    workers_most: int = 8  # workers with a free hand looked at for the first of them


class Prices:
    """What batches cost on workers of one kind. `dearer`: by temperature and number of jobs, how much later a group ranks because of what
    comes before its jobs. `rows`: the most jobs of a batch (`rows` below). Of a flood beside which
    others have come: `few` where there are jobs of theirs, `wide` elsewhere, and never more than `few` whose prompts are not read yet.
    `lead`: with how many jobs it needs no other yet. `ms`: of a batch, by temperature and number of jobs; `job_ms`: of each beyond these;
    `own_ms`: of reading its prompt."""

    __slots__ = ("dearer", "few", "job_ms", "lead", "most", "ms", "own_ms", "rows", "wide")

    def __init__(self, costs: Costs, work: Work, policy: Policy, busy: bool) -> None:
        self.most, self.job_ms = 2 * costs.width, costs.job_ms(work)
        self.ms: dict[Temperature, list[float]] = {}
        self.dearer: dict[Temperature, list[int]] = {}
        for temperature in TEMPERATURES:
            here = self.ms[temperature] = [0.0] + [costs.batch_ms(n, work, temperature) for n in range(1, self.most + 1)]
            factors = (ms / hot for ms, hot in zip(here[1:], self.ms["hot"][1:], strict=True))
            self.dearer[temperature] = [0] + [round(TICKS * policy.patience_ms * math.log(factor)) for factor in factors]
        self.rows = rows(costs, work, policy, busy=busy)
        self.lead = policy.lead_ms / self.job_ms if costs.measured else math.inf
        self.own_ms = costs.prefill_ms(work.own)
        self.few = min(max(_FEW, int(policy.flood_reading_ms / self.own_ms)), self.rows)
        self.wide = max(self.few, min(self.rows, round(policy.flood_width * costs.knee)))

    def batch_ms(self, jobs: int, temperature: Temperature = "hot") -> float:
        more = max(0, jobs - self.most)
        return self.ms[temperature][jobs - more] + more * self.job_ms


def rows(costs: Costs, work: Work, policy: Policy, *, busy: bool) -> int:
    """The most jobs of a batch: what the width has use for and, where that is measured, there is time for. Unless all are `busy`, no
    more than pay, and one, where company saves little: others, that may be free sooner, can have the next."""
    most = math.ceil(costs.knee * policy.rows_per_width)
    if costs.measured:
        if not busy:
            most = 1 if costs.lone(work) else costs.paying(work, most)
        most = min(most, int(policy.batch_ms / costs.job_ms(work)))
    return max(1, most)


prices_of = lru_cache(maxsize=4096)(Prices)
