"""What a job that a worker has, or that has ended, waited for: one sentence, from what the ledger kept of it."""

from __future__ import annotations

import re
from typing import Any

_SHORT_MS = 50.0
"""What is shorter is no wait."""
_STAGES = {
    "on_deck": "on deck behind what its worker ran",
    "adapter_load": "for its adapter to be loaded",
    "adapter_switch": "for a context to be bound to its adapter",
    "remote_queue": "in the hosted service's queue",
    "remote_batch": "at the hosted service's batch API",
}
_HELD = ("behind ", "for ")
"""How what the scheduler says of a wait begins; behind it, after a colon, why the batch was chosen."""
_PAUSE = re.compile(r"for a pause of ([^(]+) \((\d+)-(\d+)\)")


def pause(words: str, began: float, ended: float) -> str:
    """Of a wait: a pause of that, from when to when (ms), of which each job of a batch has had its own part."""
    return f"for a pause of {words} ({began:.0f}-{ended:.0f})"


def waited(document: dict[str, Any], there: str = "") -> str:
    """Of a job's document, once it is or was in a batch; `why` in it is what the scheduler wrote when it claimed the batch. `there`: for
    what it waits at its worker, where that is known."""
    times, why = document["latencies_ms"], document["why"] or ""
    held, _, chosen = why.partition(": ") if why.startswith(_HELD) else ("", "", why)
    parts = []
    if (queued := times.get("queued", 0.0)) >= _SHORT_MS:
        held = _own_part(held, document["enqueued_ms"], queued)
        parts.append(f"{_seconds(queued)} in its queue{', ' + held if held else ''}")
    parts += [f"{_seconds(ms)} {words}" for stage, words in _STAGES.items() if (ms := times.get(stage, 0.0)) >= _SHORT_MS]
    chosen = f" (chosen: {chosen})" if chosen else ""
    again = f", at attempt {document['attempts']}" if document["attempts"] > 1 else ""
    sentence = f"Waited {_listed(parts)}{chosen}{again}" if parts else f"Did not wait{chosen}{again}"
    return f"{sentence}{_since(document, there)}.{_before(document)}"


def cause(document: dict[str, Any]) -> str:
    """Of a job that came back from a worker: the last time because of what, where that is known."""
    return ((document.get("postponed_why") or {}).get("message") or "").rstrip(".")


def _before(document: dict[str, Any]) -> str:
    """It was put off, and not for its own sake."""
    times = document.get("postponed") or 0
    if not times:
        return ""
    because = f", the last time because: {cause(document)}" if cause(document) else ""
    return f" Before that it had been put off {times} time{'s' * (times > 1)}{because}."


def _own_part(held: str, enqueued: float, queued: float) -> str:
    """What one job of the batch waited for: of a pause, what it has seen of it."""
    found = _PAUSE.match(held)
    if not found:
        return held
    paused = min(float(found[3]), enqueued + queued) - max(float(found[2]), enqueued)
    parts = [f"{_seconds(paused)} of it for a pause of {found[1]}"] if paused >= _SHORT_MS else []
    return ", ".join(parts + [rest for rest in [held[found.end() + 2 :]] if rest])


def _since(document: dict[str, Any], there: str) -> str:
    """What became of it."""
    status, times, worker = document["status"], document["latencies_ms"], document["worker"]
    if status == "claimed":
        return f"; since then it waits at {worker} {there or 'until what runs there makes room and its adapter is ready'}"
    if status == "running":
        return f"; it runs on {worker}"
    if status == "submitted":
        return "; it lies at the hosted service's batch API"
    error = document["error"] or {}
    if status == "failed" and error.get("message"):
        code = f" ({error['code']})" if error.get("code") else ""
        return f"; failed{code}: {error['message'].rstrip('.')}"
    took = times.get("prefill", 0.0) + times.get("decode", 0.0) + times.get("network", 0.0)
    return f"; computing took {_seconds(took)}" if took else f"; {status}"


def never_ran(document: dict[str, Any]) -> str:
    """Of a job that ended without a worker."""
    after = f"{_seconds(document['latencies_ms']['total'])} after it came"
    if leader := document.get("coalesced_with"):
        return f"Computed once, by {leader}, which asked for the very same; it had that answer {after}."
    if document["status"] == "expired":
        held = document["why"] or "before any worker had room for it"  # of an older release's job
        if held.startswith("behind 0 "):
            return (
                f"Its deadline passed while it waited, {after}; it was the first of its adapter and tenant, and no worker took it before."
            )
        return f"Its deadline passed while it waited, {after}, {held}."
    return f"It was {document['status']} while it waited, {after}."


def _seconds(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms < 10_000 else f"{ms / 1000:.0f} s"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{'; '.join(parts[:-1])}; and {parts[-1]}"
