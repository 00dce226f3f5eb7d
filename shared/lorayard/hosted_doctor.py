"""What `lorayard doctor` says of hosted services: who works, what holds calls back, whose money is spent, what waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import redis

from lorayard.adapters.hosting import Publications
from lorayard.hosted import no_money, organisation
from lorayard.jobs import lane_of
from lorayard.ledger import keys
from lorayard.ledger.organisation import ANY, Organisation
from lorayard.ledger.policies import Policies
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry
from lorayard.settings import Settings

Level = Literal["ok", "warning", "wrong"]
Finding = tuple[str, Level, str]
"""Name, level, and what was seen with what to do."""

_UNTENDED_MS = 300_000


def hosted_findings(settings: Settings, client: redis.Redis) -> Iterator[Finding]:
    """None where no job has to do with a hosted service. Raises `LorayardError` and redis' errors for what cannot be looked at."""
    prefix, model = keys.prefix(settings.pool), settings.hosted_model
    groups: Any = client.smembers(prefix + "groups")
    waits = any(lane_of(group.decode().partition(":")[0]) in ("groq", "batch") for group in groups)
    if not model:
        if waits:
            yield "hosted", "wrong", "jobs wait for a hosted worker, and LORAYARD_HOSTED_MODEL is not set here: set it for all processes"
        return
    seconds, micros = client.time()
    now = int(seconds) * 1000 + int(micros) // 1000
    workers = [w for w in WorkerRegistry(client).alive(settings.pool, now) if w.hosted]
    text = f"{len(workers)} hosted workers ready for {model}" if workers else "none is ready: start one with 'lorayard worker groq'"
    yield "hosted", "ok" if workers else "wrong" if waits else "warning", text
    yield from _held_back(workers)
    org = organisation(settings, client)
    state = org.state(model)
    if state.blocked_ms:
        yield "hosted limits", "warning", f"the service refuses calls for another {state.blocked_ms / 1000:.0f} s ({state.why})"
    yield from _money(org, model, Policies(client))
    for one in Publications(client, settings.hosted_org, model).all().values():
        if one.error:
            yield "hosted adapter", "warning", f"{', '.join(one.titles) or one.digest[:12]} is {one.state}: {one.error}"
    yield from _batches(client, prefix, now)


def _held_back(workers: list[WorkerInfo]) -> Iterator[Finding]:
    for worker in workers:
        if worker.counters.get("limits_unanswered"):
            text = f"{worker.name} gets no answer when it asks for limits and money, and makes no call: see its log"
            yield "hosted limits", "wrong", text
        if worker.counters.get("breaker_open"):
            text = f"most of the last calls of {worker.name} failed at the service, and it makes one at a time to see: see its log"
            yield "hosted calls", "warning", text
        elif worker.doubted:
            names = ", ".join(digest[:12] for digest in worker.doubted)
            yield "hosted calls", "warning", f"calls of {names} fail at the service, others do not: 'lorayard adapters verify' looks at one"


def _money(org: Organisation, model: str, policies: Policies) -> Iterator[Finding]:
    """The organisation's first: nobody has any then."""
    if spent := org.short(model, "*", ANY):
        yield "hosted money", "warning", no_money(spent)
        return
    for tenant, policy in sorted(policies.all().items()):
        if policy.hosted and (spent := org.short(model, tenant, policy.caps)):
            yield "hosted money", "warning", no_money(spent)


def _batches(client: redis.Redis, prefix: str, now: int) -> Iterator[Finding]:
    """Those that lie at the service, and why some get no further."""
    rows: Any = client.zrange(prefix + "submitted", 0, -1, withscores=True)
    jobs, oldest, reasons = 0, now, Counter[str]()
    for name, _ in rows:
        since, note = client.hmget(f"{prefix}batch:{name.decode()}", "s", "o")
        members: Any = client.scard(f"{prefix}members:{name.decode()}")
        jobs, oldest = jobs + members, min(oldest, int(since or now))
        reasons[str(msgspec.json.decode(note).get("why", "")) if note else ""] += 1
    if untended := sum(next_ms < now - _UNTENDED_MS for _, next_ms in rows):
        yield "hosted batches", "warning", f"nobody has looked after {untended} for five minutes: is a hosted worker running?"
    for why, n in sorted(reasons.items()):
        if why:
            yield "hosted batches", "warning", f"{n} get no further: {why}"
    if rows:
        yield "hosted batches", "ok", f"{jobs} jobs in {len(rows)} batches, the oldest handed over {(now - oldest) / 3_600_000:.1f} h ago"
