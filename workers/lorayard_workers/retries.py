"""When a job that did not succeed runs again, and beside how many others. Pure; its attempts are the ledger's to count."""

from __future__ import annotations

import math
import random

_BACKOFF_MS = {
    "worker_died": (100, 5_000),  # nothing outside has to recover first
    "later": (1_000, 60_000),
}
_ANY_MS = (500, 30_000)


def backoff_ms(kind: str, before: int) -> int:
    """Milliseconds until a job is queued again after an error of this code: doubled with each time `before`, capped, ±50 % at random.

    `kind` "later" is for what used no attempt: a store or a service that is away.
    """
    low, high = _BACKOFF_MS.get(kind, _ANY_MS)
    return round(min(high, low << min(before, 20)) * random.uniform(0.5, 1.5))  # noqa: S311 — jitter


def company(attempts: int, most: int, width: int) -> int:
    """How many jobs may run together with one that has used `attempts` of `most`, itself included; 0 for any number.

    Whatever ran when a process died is suspect. Suspects run among themselves only, in ever smaller companies: `width` to the power of the
    share of attempts that is left, and alone at the last. So a job that kills its process each time reaches the cap, its batch-mates are
    innocent before they reach theirs, and 16 suspects of 3 attempts cost 4 + 4 turns, not 16.
    """
    if attempts == 0:
        return 0
    left = max(0, most - 1 - attempts)
    share = left / max(1, most - 1)
    together: float = width**share
    return max(1, math.ceil(round(together, 6)))
