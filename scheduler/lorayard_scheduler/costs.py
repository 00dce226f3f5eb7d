"""What batches take on a worker: the one cost model that planner, simulator and estimates of ends share.

A worker reports `{"switch_ms": {"hot", "loaded", "disk", "remote"}, "prefill_tokens_per_s", "step_ms": {WIDTH: ms}}`, all measured there.
One decode step serves one adapter, so what a batch takes adds up: binding its adapter, reading prompts, and steps, each as long as the
number of sequences in it asks for. The width falls at a batch's ragged end, when nothing is left to start; outputs are taken to be
exponentially long there, as they nearly are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Temperature = Literal["hot", "loaded", "disk", "remote"]
SWITCH_MS = {"hot": 0.0, "loaded": 25.0, "disk": 33.0, "remote": 500.0}
"""The reference machine's."""
MUCH = 1.25
"""Workers whose speeds differ by less are taken to be alike."""
TEMPERATURES: tuple[Temperature, ...] = ("hot", "loaded", "disk", "remote")


@dataclass(frozen=True)
class Work:
    """The mean job: tokens of its prompt, how many of these it shares with the others of its adapter, and tokens of its answer. Until
    something is known of it: instructions that all have, and a question. To take the company to be worth less than it is costs more than
    the other way round."""

    prompt: float = 200.0
    shared: float = 150.0
    output: float = 30.0

    @property
    def tokens(self) -> float:
        """What a tenant is charged."""
        return self.prompt + self.output

    @property
    def own(self) -> float:
        """What is computed of a prompt in company."""
        return max(1.0, self.prompt - self.shared)

    def resembles(self, other: Work) -> bool:
        """Whether no plan would be much different with the other: what is computed for a job, and what it is charged, within a quarter."""
        mine, theirs = ((work.tokens, work.tokens - work.shared) for work in (self, other))
        return all(abs(a - b) <= 0.25 * b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True, eq=False)
class Costs:
    """One worker's, compared by identity. Of decode steps, a few widths are known;
    what lies between is interpolated, what lies beyond grows on."""

    width: int
    switch_ms: Mapping[str, float] = field(default_factory=lambda: SWITCH_MS)
    prefill_tokens_per_s: float = 340.0
    step_ms: Mapping[int, float] = field(default_factory=lambda: {1: 18.5, 8: 50.0, 32: 173.0})
    measured: bool = False
    """False: the reference machine's, good enough to tell what is dearer but not to say how long anything takes."""

    @classmethod
    def of(cls, width: int, report: Mapping[str, Any]) -> Costs:
        """From what a worker reports; switches it has not seen yet are taken to be usual. A report that makes no sense is as none."""
        try:
            switch = SWITCH_MS | {name: float(ms) for name, ms in report.get("switch_ms", {}).items()}
            steps = {int(rows): float(ms) for rows, ms in report["step_ms"].items()}
            prefill = float(report["prefill_tokens_per_s"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls(width)
        sane = steps and prefill > 0 and all(rows > 0 and ms > 0 for rows, ms in steps.items()) and all(ms >= 0 for ms in switch.values())
        return cls(width, switch, prefill, steps, measured=True) if sane and math.isfinite(prefill + sum(steps.values())) else cls(width)

    def resembles(self, other: Costs) -> bool:
        """Whether no plan would be much different with the other: all times within a tenth."""
        mine, theirs = ([*c.steps[1:], *(1.0 + c.switch_ms[t] for t in TEMPERATURES), c.prefill_ms(1.0)] for c in (self, other))
        same = (self.width, self.measured) == (other.width, other.measured)
        return same and all(abs(a - b) <= 0.1 * max(a, b) for a, b in zip(mine, theirs, strict=True))

    @cached_property
    def pace(self) -> float:
        """Milliseconds of a usual job at best: what workers of unlike speed are compared by, whatever their jobs are."""
        return self.job_ms(Work())

    def much_faster(self, than: Costs) -> bool:
        """By a quarter, as far as both are measured."""
        return self.measured and than.measured and MUCH * self.pace < than.pace

    @cached_property
    def steps(self) -> list[float]:
        """Milliseconds of a decode step by the number of sequences in it, from 0 to `width`."""
        known = sorted(self.step_ms.items())
        table = [0.0]
        for rows in range(1, self.width + 1):
            after = next((i for i, (w, _) in enumerate(known) if w >= rows), len(known))
            if after == 0 or len(known) == 1:  # narrower than anything measured: no step is shorter than that
                table.append(known[0][1] if after == 0 else known[0][1] * rows / known[0][0])
                continue
            (w0, ms0), (w1, ms1) = known[after - 1 : after + 1] if after < len(known) else known[-2:]
            table.append(max(ms0 + (ms1 - ms0) * (rows - w0) / (w1 - w0), table[-1]))
        return table

    @cached_property
    def knee(self) -> int:
        """The narrowest width with 95 % of the most tokens a second; the whole width where that is not known."""
        if not self.measured:
            return self.width
        rates = [rows / ms for rows, ms in enumerate(self.steps) if rows]
        return 1 + next(i for i, rate in enumerate(rates) if rate >= 0.95 * max(rates))

    @cached_property
    def _tails(self) -> list[float]:
        """Milliseconds a token of mean output that `k` sequences take from all to none running."""
        tails = [0.0]
        for rows in range(1, self.width + 1):
            tails.append(tails[-1] + self.steps[rows] / rows)
        return tails

    def prefill_ms(self, tokens: float) -> float:
        return tokens * 1000.0 / self.prefill_tokens_per_s

    def job_ms(self, work: Work) -> float:
        """What a job takes at best: its prefix is there, and the width is full all the time."""
        return self.prefill_ms(work.prompt - work.shared) + work.output * self.steps[self.width] / self.width

    def paying(self, work: Work, most: int) -> int:
        """How many jobs a batch should have, up to `most`: few enough that more would save each less than 4 %."""
        best = self.job_ms(work)
        return next((n for n in range(2, most) if self.batch_ms(n, work, "loaded") <= 1.04 * n * best), most)

    def lone(self, work: Work) -> bool:
        """Whether a job alone costs hardly more than in the best company: 10 %."""
        return self.batch_ms(1, work, "loaded") <= 1.1 * self.job_ms(work)

    def batch_ms(self, jobs: int, work: Work, temperature: Temperature) -> float:
        """What a batch takes by itself. Hot: its adapter is bound and the shared prefix computed; otherwise both come first."""
        rows = min(jobs, self.width)
        decode = work.output * (self._tails[rows] + (jobs - rows) * self.steps[rows] / rows)
        own = jobs * self.prefill_ms(work.prompt - work.shared) + decode
        return own if temperature == "hot" else own + self.switch_ms[temperature] + self.prefill_ms(work.shared)
