"""What workers will be asked for next: the adapters that wait, in the order in which they are planned to be served.

A hint and no more: workers keep in memory what comes soon rather than what was used last. Nobody knows which worker will be given what.
"""

from __future__ import annotations

import itertools
import math

from lorayard.jobs import BASE_DIGEST, adapter_of
from lorayard_scheduler.groups import Groups

MOST = 200
"""Adapters that are told of: several times what a worker keeps in memory."""


def planned(groups: Groups, most: int = MOST) -> list[str]:
    """Digests of adapters by the rank of their first group, those that are wanted by tenants who flood after all others."""
    waiting = itertools.chain(groups.by_rank(False, math.inf), groups.by_rank(True, math.inf))
    digests = (digest for group in waiting if (digest := adapter_of(group.digest)) != BASE_DIGEST)
    found: dict[str, None] = {}
    for digest in digests:
        found[digest] = None
        if len(found) == most:
            break
    return list(found)
