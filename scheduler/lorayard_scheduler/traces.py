"""Arrivals to simulate: read from a CSV as `azure_llm_2023/code.csv` is, or generated; adapters and tenants drawn after Zipf's law."""

from __future__ import annotations

import csv
import math
import random
from array import array
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from lorayard.errors import BadRequest
from lorayard_scheduler.simulator import Trace


@dataclass(frozen=True)
class Mix:
    """Who asks for what. `zipf` is the exponent of the adapters' popularity, `shared` the tokens every adapter's prompts begin with.

    `own`: every adapter belongs to one tenant; otherwise every tenant asks for every adapter. `tenants_zipf`: how unequal tenants are.
    """

    adapters: int = 64
    tenants: int = 4
    zipf: float = 1.0
    tenants_zipf: float = 0.0
    own: bool = True
    shared: int = 0
    targets_ms: Sequence[tuple[float, float]] = ((1.0, 120_000.0),)
    """(probability, wait target) of each priority."""


COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TOKENS_MOST = 10_000_000
"""In one prompt, or answer."""


def tokens(text: str) -> int:
    """A length as a CSV has it, at least 1. Raises `ValueError`."""
    if not 0 <= (length := int(text)) <= TOKENS_MOST:
        raise ValueError(f"{text[:20]} is no number of tokens: from 0 to {TOKENS_MOST} are")
    return max(1, length)


def rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV by their numbers, a mark at its beginning or not. Raises `BadRequest` where it cannot be read or lacks a column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            found = csv.DictReader(file)
            if lacking := [name for name in needed if name not in (found.fieldnames or ())]:
                raise BadRequest(f"{path}: no column {' or '.join(lacking)} in its first line; {','.join(needed)} are wanted")
            yield from enumerate(found, 2)
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRequest(f"{path}: not a CSV file ({error})") from None


def read_sizes(path: Path) -> tuple[list[float], list[tuple[int, int]]]:
    """Seconds between arrivals, and (prompt, answer) tokens of each, from a CSV with TIMESTAMP, ContextTokens and GeneratedTokens."""
    gaps, sizes, before = [], [], None
    for number, row in rows(path, COLUMNS):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            sizes.append((tokens(row["ContextTokens"]), tokens(row["GeneratedTokens"])))
        except (ValueError, TypeError) as error:
            raise BadRequest(f"{path}:{number}: not an arrival ({error}); columns {','.join(COLUMNS)} are wanted") from None
        gaps.append(max(0.0, (at - before).total_seconds()) if before else 0.0)
        before = at
    if not sizes:
        raise BadRequest(f"{path}: no arrivals in it")
    return gaps, sizes


def _rng(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 — to be repeated, not to be secret


def poisson(jobs: int, per_s: float, seed: int = 1) -> list[float]:
    """Seconds between arrivals."""
    rng = _rng(seed)
    return [rng.expovariate(per_s) for _ in range(jobs)]


def bursty(jobs: int, per_s: float, *, burst: float = 20.0, seed: int = 1) -> list[float]:
    """As Poisson in the mean, in bursts of so many at once (geometric)."""
    rng = _rng(seed)
    return [rng.expovariate(per_s / burst) if rng.random() < 1 / burst else 0.0 for _ in range(jobs)]


def diurnal(jobs: int, per_s: float, *, day_s: float = 86_400.0, swing: float = 0.8, seed: int = 1) -> list[float]:
    """Poisson with a rate that goes up and down by the part `swing` once a day."""
    rng, at, gaps = _rng(seed), 0.0, []
    for _ in range(jobs):
        gap = rng.expovariate(per_s * (1 + swing * math.sin(2 * math.pi * at / day_s)))
        gaps.append(gap)
        at += gap
    return gaps


def build(gaps: Sequence[float], sizes: Sequence[tuple[int, int]], mix: Mix, *, stretch: float = 1.0, seed: int = 1) -> Trace:
    """A trace: gaps (s, times `stretch`) and sizes are gone through together, sizes again from the beginning where they are fewer."""
    rng = _rng(seed)
    draw = _zipf(mix.adapters, mix.zipf)
    draw_tenant = _zipf(mix.tenants, mix.tenants_zipf)
    levels = list(accumulate(p for p, _ in mix.targets_ms))
    arrivals, targets = array("d"), array("d")
    adapters, tenants, prompts, outputs = array("l"), array("l"), array("l"), array("l")
    at = 0.0
    for i, gap in enumerate(gaps):
        at += 1000 * gap * stretch
        prompt, output = sizes[i % len(sizes)]
        adapter = draw(rng)
        arrivals.append(at)
        adapters.append(adapter)
        tenants.append(adapter % mix.tenants if mix.own else draw_tenant(rng))
        prompts.append(prompt + mix.shared)
        outputs.append(output)
        targets.append(
            mix.targets_ms[min(bisect(levels, rng.random() * levels[-1]), len(levels) - 1)][1] if len(levels) > 1 else mix.targets_ms[0][1]
        )
    names = [f"adapter{i:06d}" for i in range(mix.adapters)]
    return Trace(
        arrivals,
        adapters,
        tenants,
        prompts,
        outputs,
        targets,
        names,
        [f"tenant{i}" for i in range(mix.tenants)],
        [mix.shared] * mix.adapters,
    )


def merged(first: Trace, second: Trace) -> Trace:
    """Both at once, of the same adapters; tenants of the same name are the same."""
    names = list(dict.fromkeys([*first.tenant_names, *second.tenant_names]))
    jobs = sorted(
        (trace.arrivals[i], trace.adapters[i], names.index(trace.tenant_names[trace.tenants[i]]), *sizes)
        for trace in (first, second)
        for i, sizes in enumerate(zip(trace.prompts, trace.outputs, trace.targets, strict=True))
    )
    arrivals, adapters, tenants, prompts, outputs, targets = zip(*jobs, strict=True)
    return Trace(
        array("d", arrivals), array("l", adapters), array("l", tenants), array("l", prompts), array("l", outputs), array("d", targets),
        first.adapter_names, names, first.shared,
    )  # fmt: skip


def _zipf(n: int, exponent: float):  # type: ignore[no-untyped-def]
    weights = list(accumulate(1 / (i + 1) ** exponent for i in range(n)))
    return lambda rng: min(bisect(weights, rng.random() * weights[-1]), n - 1)
