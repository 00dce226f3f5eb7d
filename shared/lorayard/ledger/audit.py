"""A full scan of a pool for what must never be there: jobs in no place or in two, entries without a job, counts that are wrong.

The transitions keep these invariants; what breaks them is a restored backup, a server that lost writes, or a hand in the data. Each thing
is checked, and put right, in one call of the function library: what is found is true at that moment, however busy the pool is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import redis

from lorayard.ledger import keys
from lorayard.ledger.connection import unavailable
from lorayard.ledger.ledger import Audited, Ledger

PAGE = 500
_WORDS = {
    "job_in_no_place": "{} is in no queue, batch or waiting list, and would never be run",
    "job_in_two_places": "{} is in two places, and could be run twice",
    "job_not_listed": "{} is missing from its tenant's listing",
    "deadline_not_watched": "{} has a deadline that nobody watches",
    "entry_without_job": "{} stands for a job that is not there",
    "lease_without_batch": "a lease on the batch {}, which is not there, or has none",
    "members_without_batch": "jobs belong to the batch {}, which is not there",
    "batch_without_lease": "the batch {} has no lease, and would never come back from a lost worker",
    "batch_not_outstanding": "the batch {} is not counted against its worker",
    "batch_without_jobs": "the batch {} has no jobs left and is still open",
    "outstanding_without_batch": "{}: a batch counts against a worker and is not there",
    "group_without_jobs": "the group {} is listed and has no jobs",
    "group_not_indexed": "the group {} has jobs and is not listed, so they would not be planned",
    "count_of_queued": "the count of queued jobs is {}",
    "totals": "the totals do not add up: {}",
}


class Finding(NamedTuple):
    """`kind` for programs, `name` of what it was found at, `text` for people. `repaired`: it has been put right."""

    kind: str
    name: str
    text: str
    repaired: bool


def audit(ledger: Ledger, *, repair: bool = False) -> list[Finding]:
    """Check everything, and put right what can be. Some 10 µs a job. Raises `Unavailable`."""
    return [finding for page in pages(ledger, repair=repair) for finding in page]


def pages(ledger: Ledger, *, repair: bool) -> Iterator[list[Finding]]:
    """The same in steps of about `PAGE` keys each, so that it can run beside other work; totals come last."""
    prefix = keys.prefix(ledger.pool)
    cursor, unindexed = None, set[str]()
    while cursor != 0:
        try:
            reply: Any = ledger.client.scan(cursor or 0, match=_escaped(prefix) + "*", count=PAGE)
        except redis.RedisError as error:
            raise unavailable(error) from error
        cursor, page = reply
        names = [name.decode().removeprefix(prefix) for name in page]
        for found in _of_keys(ledger, names, repair):
            unindexed |= {finding.name for finding in found if finding.kind == "group_not_indexed"}
            yield found
    yield _call(ledger, "totals", repair, unindexed)


def _of_keys(ledger: Ledger, names: Sequence[str], repair: bool) -> Iterator[list[Finding]]:
    by_kind: dict[str, list[str]] = {}
    for name in names:
        kind, _, rest = name.partition(":")
        by_kind.setdefault(kind, []).append(rest)
    yield _call(ledger, "jobs", repair, by_kind.get("job", []))
    batches = set(by_kind.get("batch", []) + by_kind.get("members", []) + by_kind.get("begun", []))
    for name in names:
        if name in ("delayed", "deadlines", "tries", "follows") or name.startswith(("queue:", "members:", "behind:")):
            yield from _of_index(ledger, name, repair)
        elif name == "groups":
            for page in _members(ledger, name):
                yield _call(ledger, "groups", repair, page)
        elif name in ("leases", "submitted"):
            batches |= {member for page in _members(ledger, name) for member in page}
    yield _call(ledger, "batches", repair, batches)
    yield _call(ledger, "groups", repair, by_kind.get("queue", []))
    yield _call(ledger, "worker", repair, by_kind.get("outstanding", []))


def _of_index(ledger: Ledger, index: str, repair: bool) -> Iterator[list[Finding]]:
    """Of the members of a queue or of those behind a job (ids), or of another index (refs)."""
    kind, _, rest = index.partition(":")
    tenant = rest.rpartition(":")[2] if kind == "queue" else rest.partition("/")[0] if kind == "behind" else ""
    for page in _members(ledger, index):
        entries = [(index, _type(index), member, keys.ref(tenant, member) if tenant else member) for member in page]
        yield _call(ledger, "entries", repair, [part for entry in entries for part in entry])


def _type(index: str) -> str:
    return "set" if index.startswith("members:") or index == "groups" else "hash" if index in ("tries", "follows") else "zset"


def _members(ledger: Ledger, index: str) -> Iterator[list[str]]:
    name = keys.prefix(ledger.pool) + index
    client = ledger.client
    scan: Any = {"set": client.sscan, "hash": client.hscan, "zset": client.zscan}[_type(index)]
    cursor = None
    while cursor != 0:
        try:
            cursor, rows = scan(name, cursor or 0, count=PAGE)
        except redis.RedisError as error:
            raise unavailable(error) from error
        yield [(row[0] if isinstance(row, tuple | list) else row).decode() for row in rows]


def _call(ledger: Ledger, what: Audited, repair: bool, names: Iterable[str]) -> list[Finding]:
    names = list(names)
    if not names and what != "totals":
        return []
    rows = ledger.audit(what, names, repair=repair)
    return [Finding(kind, name, _WORDS[kind].format(name), repair and kind != "totals") for kind, name in rows]


def _escaped(prefix: str) -> str:
    """For a glob pattern; pool names have nothing else that a pattern would read."""
    return prefix.replace("[", "\\[")
