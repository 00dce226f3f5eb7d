"""How a job looks to whoever polls it: the one document that HTTP, the CLI and Celery's result backend give."""

from __future__ import annotations

from typing import Any

import msgspec

from lorayard.bodies import asked_tokens
from lorayard.jobs import BASE_DIGEST, ENDPOINT, PRIORITY, ROUTE, Status, adapter_of, lane_of
from lorayard.ledger.explained import never_ran, waited

_MORE = ("hosted_model", "cost_usd", "notes", "failed_generation", "coalesced_with")
"""Of a job that was run elsewhere: by which model, for how much money, what was changed in its request. Which job it was computed with."""

_STORY = ("postponed", "postponed_why")
"""Of a job that came back from a worker: how often at no cost of an attempt; code and message of the last error it came back with."""

_REMOTE = ("remote_queue", "remote_batch", "network")
"""Stages that only those have: in the service's own queue; at its batch API, until it was read back; and all else between sending a request
and its answer."""


def document(job_id: str, pool: str, reply: list[Any]) -> dict[str, Any] | None:
    """The document from a reply of `ly_show`; None where there is no such job.

    `latencies_ms` of an ended job that ran: queued, dispatched, on_deck, adapter_load, adapter_switch, prefill, decode, stored, total; they
    add up: `stored` is what remains of `total` (enqueued to committed, by the ledger's clock) after the stages before it.

    `explanation` is a sentence: what the job waited for. Of one that waits still it is None here, for the ledger does not know;
    `position` is how many jobs of its queue are before it. `postponed_why` is `{"code", "message"}` of the error that a job which is to run
    again last came back with, at an attempt or (`postponed` times) at none; it stays when the job ends.
    """
    if not reply:
        return None
    return _ended(job_id, pool, reply[0]) if len(reply) == 1 else _living(job_id, pool, reply)


def meta_line(
    adapter: str | None,
    endpoint: str,
    priority: str,
    metadata: dict[str, Any] | None,
    route: str = ROUTE,
    deadline_s: float | None = None,
    not_before_s: float | None = None,
    once: str = "",
) -> bytes:
    """What stays public of a job, one line of JSON; what is usual is left out, for there may be millions. What it shares with jobs that are
    to be computed once with it comes first: the ledger's functions look for it there."""
    meta: dict[str, Any] = {"coalesce": once} if once else {}
    if adapter is not None:
        meta["adapter"] = adapter
    if endpoint != ENDPOINT:
        meta["endpoint"] = endpoint
    if priority != PRIORITY:
        meta["priority"] = priority
    if route != ROUTE:
        meta["route"] = route
    for name, seconds in (("deadline_s", deadline_s), ("not_before_s", not_before_s)):
        if seconds is not None:
            meta[name] = seconds
    if metadata is not None:
        meta["metadata"] = metadata
    return msgspec.json.encode(meta)


def _base(job_id: str, pool: str, status: Status, meta: dict[str, Any], digest: str, via: str) -> dict[str, Any]:
    return {
        "id": job_id,
        "object": "job",
        "status": status.value,
        "pool": pool,
        "adapter": meta.get("adapter"),
        "adapter_digest": None if adapter_of(digest) == BASE_DIGEST else adapter_of(digest),
        "route": meta.get("route", ROUTE),
        "endpoint": meta.get("endpoint", ENDPOINT),
        "priority": meta.get("priority", PRIORITY),
        "deadline_s": meta.get("deadline_s"),
        "not_before_s": meta.get("not_before_s"),
        "metadata": meta.get("metadata"),
        "coalesce": "coalesce" in meta,
        "via": via,
        "response": None,
        "error": None,
        "latencies_ms": {},
        "attempts": 0,
        "worker": None,
        "batch": None,
        "batch_size": None,
        "why": None,
        "explanation": None,
    }


def _living(job_id: str, pool: str, reply: list[Any]) -> dict[str, Any]:
    value, batch, attempts, started, delayed, worker, size, why, laters, claimed, rank, leader, last = reply
    head, birth, meta, request = value.split(b"\n", 3)
    _, due, deadline, digest, _, _, _ = head.decode().split("\t")
    enqueued, via = birth.decode().split("\t")
    status = Status.QUEUED
    if batch:
        status = (Status.CLAIMED, Status.RUNNING, Status.SUBMITTED)[started]
    elif delayed:
        status = Status.DELAYED
    doc = _base(job_id, pool, status, msgspec.json.decode(meta), digest, via)
    doc |= {"attempts": attempts, "postponed": laters, "enqueued_ms": int(enqueued), "due_ms": int(due), "lane": lane_of(digest)}
    doc |= {"postponed_why": msgspec.json.decode(last) if last else None, "deadline_ms": int(deadline) or None}
    doc["max_tokens"] = asked_tokens(request)
    if batch:
        doc |= {"batch": batch.decode(), "worker": worker.decode() or None, "batch_size": size or None, "why": why.decode() or None}
        doc |= {"claimed_ms": claimed, "latencies_ms": {"queued": float(claimed - int(enqueued))}}
        doc["explanation"] = waited(doc)
    elif leader:
        doc |= {"coalesced_with": leader.decode(), "position": 0}
    elif not delayed:
        doc["position"] = rank
    else:
        doc["not_before_ms"] = int(float(delayed))
    return doc


def _ended(job_id: str, pool: str, value: bytes) -> dict[str, Any]:
    end, birth, meta, outcome_line, *_ = value.split(b"\n", 4)
    status, _, ended, claimed, taken, attempts, worker, batch, size, why, digest, _ = end.decode().split("\t")
    enqueued, via = birth.decode().split("\t")
    outcome = msgspec.json.decode(outcome_line)
    doc = _base(job_id, pool, Status(status), msgspec.json.decode(meta), digest, via)
    times = {name: int(v) for name, v in (("enqueued_ms", enqueued), ("claimed_ms", claimed), ("taken_ms", taken), ("ended_ms", ended))}
    doc |= {
        "attempts": int(attempts),
        "enqueued_ms": times["enqueued_ms"],
        "ended_ms": times["ended_ms"],
        "worker": worker or None,
        "batch": batch or None,
        "batch_size": int(size) or None,
        "why": why or None,
        "error": outcome.get("error"),
        "latencies_ms": _latencies(times, outcome.get("timings_ms")),
        "adapter_temperature": outcome.get("temperature") or None,
        "width": outcome.get("width"),
        **{name: outcome[name] for name in _MORE if name in outcome},
    }
    if "coalesced_with" not in outcome:  # else it is the other's story
        doc |= {name: outcome[name] for name in _STORY if name in outcome}
    doc["explanation"] = waited(doc) if times["claimed_ms"] else never_ran(doc)
    response = outcome.get("response")
    if response is not None:
        doc["response"] = {"id": job_id, **response, "created": times["ended_ms"] // 1000, "model": doc["adapter"] or pool}
    return doc


def _latencies(times: dict[str, int], timings: dict[str, float] | None) -> dict[str, float]:
    total = float(times["ended_ms"] - times["enqueued_ms"])
    if not times["taken_ms"]:
        return {"total": total}
    stages = {
        "queued": float(times["claimed_ms"] - times["enqueued_ms"]),
        "dispatched": float(times["taken_ms"] - times["claimed_ms"]),
        "on_deck": 0.0,
        "adapter_load": 0.0,
        "adapter_switch": 0.0,
        "prefill": 0.0,
        "decode": 0.0,
    }
    stages |= {name: value for name, value in (timings or {}).items() if name in stages or name in _REMOTE}
    stored = max(0.0, total - sum(stages.values()))
    return {name: round(value, 3) for name, value in stages.items()} | {"stored": round(stored, 3), "total": total}
