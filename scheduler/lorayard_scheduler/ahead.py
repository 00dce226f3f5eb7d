"""What workers will be asked for next: the adapters that wait, in the order in which they are planned to be served, and who fetches what of
it that no worker has yet.

Hints and no more: workers keep in memory what comes soon rather than what was used last, and fetch before they are asked.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Collection, Iterable, Mapping

from lorayard.jobs import adapter_of
from lorayard_scheduler.groups import Groups

MOST = 200
"""Adapters that are told of: several times what a worker keeps in memory."""


def planned(groups: Groups, most: int = MOST) -> list[str]:
    """Digests (also the base's) by the rank of their first group, those that are wanted by tenants who flood after all others."""
    found: dict[str, None] = {}
    for group in itertools.chain(groups.by_rank(False, math.inf), groups.by_rank(True, math.inf)):
        found[adapter_of(group.digest)] = None
        if len(found) == most:
            break
    return list(found)


def fetchers(digests: Iterable[str], absent: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Who shall fetch which of these adapters ahead. `absent`: by worker, those that are not on its disk.

    What some worker has goes there; what nobody has is fetched by one, always the same while the same workers are there.
    """
    nowhere = set.intersection(*map(set, absent.values())) if absent else set()
    return {digest: max(absent, key=lambda name: zlib.crc32(f"{name} {digest}".encode())) for digest in digests if digest in nowhere}
