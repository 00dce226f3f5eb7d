"""The seven things that are true after every fault, by a full scan of the store that trusts no counter and no index."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import redis
from fleet_support import LEFTOVERS

from faults.witness import Witness
from faults.yard import Yard
from lorayard.jobs import TERMINAL
from lorayard.ledger.audit import audit
from lorayard.ledger.keys import ref as ref_of
from lorayard.ledger.keys import split_ref

SEVEN = (
    "one terminal state",
    "one stable result",
    "no stale result",
    "no two leases",
    "counters equal a scan",
    "nothing stranded",
    "no message or key left",
)
_STAY = {"job", "dead", "idem", "by_tenant", "served", "counts", "leader", "fence", "reaped", "events", "ends", "paused", "once"}
"""Kinds of keys that may be there when all jobs have ended."""

_QUEUES_S = 30.0, 150.0  # in which the reconciler finds the queue of a worker that is gone: in haste, and at its usual pace
_UNACKED_S = 60.0  # kombu gives back, after its visibility timeout, what a killed consumer had not acknowledged


class Scan:
    """All keys of a pool, read one by one; `ends` are the ended jobs' statuses by ref, `live` the refs of the others."""

    def __init__(self, yard: Yard) -> None:
        prefix = f"ly:{{{yard.settings.pool}}}:"
        self.keys: dict[str, set[str]] = defaultdict(set)
        for key in yard.store.scan_iter(prefix + "*", count=2000):
            kind, _, rest = key.decode().removeprefix(prefix).partition(":")
            self.keys[kind].add(rest)
        self.ends: dict[str, str] = {}
        self.live: set[str] = set()
        refs = sorted(self.keys["job"])
        for start in range(0, len(refs), 1000):
            part = refs[start : start + 1000]
            values: Any = yard.store.mget([f"{prefix}job:{ref}" for ref in part])
            for ref, value in zip(part, values, strict=True):
                word = value.split(b"\t", 1)[0].decode()
                if word in TERMINAL:
                    self.ends[ref] = word
                else:
                    self.live.add(ref)
        self.counts = Counter(yard.counts())
        self.audit = [finding.text for finding in audit(yard.ledger(), repair=False)]
        self.expiring = {kind for kind, names in self.keys.items() if all(_expires(yard.store, prefix, kind, name) for name in names)}


def _expires(store: redis.Redis, prefix: str, kind: str, name: str) -> bool:
    left: Any = store.ttl(f"{prefix}{kind}:{name}".removesuffix(":"))
    return bool(left > 0)


def check(yard: Yard, witness: Witness) -> dict[str, str]:
    """What is wrong with each of the seven, in words; empty where nothing is. All jobs must have ended."""
    left = _wait(lambda: _stranded(yard), 15)
    witness.read(list(witness.acknowledged))
    scan = Scan(yard)
    found = (
        _one_end(scan, witness),
        _stable(scan, witness),
        _current(yard, witness),
        f"{len(witness.doubled)} times, first {witness.doubled[0]}" if witness.doubled else "",
        _counted(scan),
        left,
        _wait(lambda: _queued(yard), _QUEUES_S[not yard.haste]) or _wait(lambda: _unacknowledged(yard), _UNACKED_S) or _orphans(scan),
    )
    return dict(zip(SEVEN, found, strict=True))


def _wait(look: Callable[[], str], timeout_s: float) -> str:
    """What is still wrong when the time is over."""
    give_up = time.monotonic() + timeout_s
    while (wrong := look()) and time.monotonic() < give_up:
        time.sleep(0.1)
    return wrong


def _one_end(scan: Scan, witness: Witness) -> str:
    lost = witness.acknowledged.keys() - scan.ends.keys() - scan.live
    made_up = scan.ends.keys() - witness.acknowledged.keys() - witness.unknown
    sets = {"lost": lost, "never submitted": made_up, "not ended": scan.live}
    return ", ".join(f"{words} {sorted(found)[:5]} of {len(found)}" for words, found in sets.items() if found)


def _stable(scan: Scan, witness: Witness) -> str:
    twice = [ref for ref, times in witness.told.items() if times > 1]
    unread = witness.acknowledged.keys() - witness.documents.keys()
    moved = [ref for ref, document in witness.documents.items() if scan.ends.get(ref) != document["status"]]
    if witness.changed or twice or unread or moved:
        return f"changed {witness.changed[:2]}, told twice {twice[:5]}, not readable {sorted(unread)[:5]}, other than read {moved[:5]}"
    return ""


def _current(yard: Yard, witness: Witness) -> str:
    """Each answer says for which batch it was computed: that batch is the one the ledger stored it under, and ran it to its end. One that
    was computed once for several is that of the job it names."""
    finished = set()
    for line in yard.runs.read_text().splitlines():
        what, ref, batch, *_ = line.split(" ")
        if what == "end":
            finished.add((ref, batch))
    wrong = []
    for ref, document in witness.documents.items():
        if document["status"] != "succeeded":
            continue
        said = json.loads(document["response"]["choices"][0]["message"]["content"])
        computed, batch = ref, document["batch"]
        if leader := document.get("coalesced_with"):
            computed, batch = ref_of(split_ref(ref)[0], leader), said["batch"]
        if (said["ref"], said["batch"]) != (computed, batch) or (computed, batch) not in finished:
            wrong.append(f"{ref}: stored under {document['batch']}, computed as {said}")
    return "; ".join(wrong[:3])


def _counted(scan: Scan) -> str:
    ends = Counter(scan.ends.values())
    counts = scan.counts
    told = {status: counts[status] for status in TERMINAL if counts[status]}
    balance = counts["enqueued"] + counts["revived"] - sum(told.values()) - counts["deleted_live"] - len(scan.live)
    if told != dict(ends) or counts["queued"] or balance:
        return f"counted {dict(counts)}, found {dict(ends)} and {len(scan.live)} live jobs"
    return "; ".join(scan.audit[:5])


def _stranded(yard: Yard) -> str:
    prefix = f"ly:{{{yard.settings.pool}}}:"
    try:
        names = [key.decode().removeprefix(prefix) for key in yard.store.scan_iter(prefix + "*", count=2000)]
    except redis.RedisError as error:
        return str(error)
    return ", ".join([name for name in names if name.startswith(LEFTOVERS)][:8])


def _queued(yard: Yard) -> str:
    """What lies in the queues of Celery's broker."""
    with redis.Redis.from_url(yard.broker_url) as broker:
        lengths: dict[str, Any] = {key.decode(): broker.llen(key) for key in broker.scan_iter("lorayard.*", count=1000, _type="list")}
    return ", ".join(f"{length} in {name}" for name, length in lengths.items() if length)


def _unacknowledged(yard: Yard) -> str:
    """What a consumer has been given and has not acknowledged."""
    with redis.Redis.from_url(yard.broker_url) as broker:
        left: Any = broker.hlen("lorayard.unacked")
    return f"{left} not acknowledged; {_queued(yard)}" if left else ""


def _orphans(scan: Scan) -> str:
    strange = {kind: sorted(rest)[:3] for kind, rest in scan.keys.items() if kind not in _STAY | scan.expiring and rest}
    return str(strange) if strange else ""
