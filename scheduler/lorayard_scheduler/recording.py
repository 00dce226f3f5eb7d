"""The arrivals of a real fleet, to be replayed: read from what the ledger keeps of its jobs anyway, or from a CSV, and written as one.

A row is one job that was, or will be, computed here: when it came, how long it is, whose adapter it asks for, how long it could wait, and,
where it has ended, how long it did. There is nothing of prompts and answers in it but their lengths.
"""

from __future__ import annotations

import csv
import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from lorayard.errors import BadRequest, NotFound, SetupError
from lorayard.jobs import BASE_DIGEST, TERMINAL, Status
from lorayard.ledger.ledger import Ledger
from lorayard.settings import Settings
from lorayard_scheduler import traces
from lorayard_scheduler.simulator import Trace

_PAGE = 500
_MOST = 1e12  # ms: some 30 years
_MORE = ("Adapter", "Tenant", "WaitTargetMs", "CachedTokens", "WaitedMs", "TotalMs")


class Arrival(NamedTuple):
    """One job. Times in ms: `at` since 1970, `target` the wait it could bear; `waited` (until its prompt was begun) and `total` are None
    where it has not ended. Lengths in tokens; `cached` of the prompt were there already."""

    at: float
    prompt: int
    output: int
    adapter: str
    tenant: str
    target: float
    cached: int = 0
    waited: float | None = None
    total: float | None = None


class Recording(NamedTuple):
    """Jobs in the order in which they came, and what a reader of figures about them should know, one sentence each."""

    arrivals: list[Arrival]
    notes: list[str]

    def trace(self, speed: float = 1.0) -> Trace:
        """For the simulator, which begins at 0; with a speed, all come that many times as fast."""
        adapters, tenants = ({name: i for i, name in enumerate(sorted(set(names)))} for names in self._names())
        cached = defaultdict(list)
        for job in self.arrivals:
            cached[job.adapter].append(job.cached)
        begin = self.arrivals[0].at
        return Trace(
            arrivals=array("d", [(job.at - begin) / speed for job in self.arrivals]),
            adapters=array("l", [adapters[job.adapter] for job in self.arrivals]),
            tenants=array("l", [tenants[job.tenant] for job in self.arrivals]),
            prompts=array("l", [job.prompt for job in self.arrivals]),
            outputs=array("l", [job.output for job in self.arrivals]),
            targets=array("d", [job.target for job in self.arrivals]),
            adapter_names=list(adapters),
            tenant_names=list(tenants),
            shared=[round(median(cached[name])) for name in adapters],
        )

    def _names(self) -> tuple[list[str], list[str]]:
        return [job.adapter for job in self.arrivals], [job.tenant for job in self.arrivals]


# -- from the ledger ----------------------------------------------------------------------------------------------------------------------


def of_fleet(ledger: Ledger, tenants: Iterable[str], settings: Settings, *, hours: float, most: int) -> Recording:
    """The newest jobs of these tenants, of the last `hours`. Raises `NotFound` where none of them has ended.

    What has not ended is taken to be as long as its tenant's others of its adapter, or as all of that. Left out is what may not begin
    yet, and what did not compute here: jobs that were cancelled, expired or failed, those of hosted services, and those that were
    computed once with others.
    """
    seconds, micros = ledger.client.time()
    now = 1000 * int(seconds) + int(micros) // 1000
    since = now - hours * 3_600_000
    ended: list[Arrival] = []
    waiting: list[Arrival] = []
    left_out: Counter[str] = Counter()
    for tenant in tenants:
        for document in _newest(ledger, tenant, since, most):
            if (reason := _left_out(document, now)) is not None:
                left_out[reason] += 1
            elif document["status"] in TERMINAL:
                ended.append(_ended(document, tenant, settings))
            else:
                waiting.append(_arrival(document, tenant, settings))
    if not ended:
        raise NotFound(f"no job of the last {hours:g} h has ended here: submit some, ask for more with --hours, or give --trace FILE")
    arrivals = sorted([*ended, *_as_the_others(waiting, ended)])[-most:]
    notes = [
        f"left out: {number} {reason if number > 1 else reason.replace('jobs', 'job', 1)}" for reason, number in sorted(left_out.items())
    ]
    if not_ended := sum(job.total is None for job in arrivals):
        notes.append(f"not ended yet, and taken to be as long as others of their adapter: {not_ended}")
    return Recording(arrivals, notes)


def _newest(ledger: Ledger, tenant: str, since: float, most: int) -> Iterator[dict[str, Any]]:
    """Documents, newest first."""
    after, number = None, 0
    while number < most and (ids := ledger.list_ids(tenant, limit=_PAGE, after=after)):
        after, number = ids[-1], number + len(ids)
        for document in ledger.show(tenant, ids):
            if document is not None and document["enqueued_ms"] < since:
                return
            if document is not None:
                yield document


def _left_out(document: dict[str, Any], now: float) -> str | None:
    """Why it did not, or will not, compute on a local worker, or not yet."""
    if document["route"] == "groq" or "hosted_model" in document:
        return "hosted jobs"
    if "coalesced_with" in document:
        return "jobs computed once with others"
    if document["status"] in (Status.CANCELLED, Status.EXPIRED, Status.FAILED):
        return "jobs without an answer"
    if document["enqueued_ms"] + 1000 * (document["not_before_s"] or 0) > now:
        return "jobs that may not begin yet"
    return None


def _arrival(document: dict[str, Any], tenant: str, settings: Settings) -> Arrival:
    delay_ms = 1000 * (document["not_before_s"] or 0)
    due_ms = 1000 * document["deadline_s"] - delay_ms if document["deadline_s"] else settings.wait_target_ms(document["priority"])
    return Arrival(document["enqueued_ms"] + delay_ms, 1, 1, document["adapter_digest"] or BASE_DIGEST, tenant, due_ms)


def _ended(document: dict[str, Any], tenant: str, settings: Settings) -> Arrival:
    usage, stages = document["response"].get("usage") or {}, document["latencies_ms"]
    arrival = _arrival(document, tenant, settings)
    total = stages["total"] - stages.get("stored", 0.0) - (arrival.at - document["enqueued_ms"])
    prompt = max(1, usage.get("prompt_tokens", 1))
    return arrival._replace(
        prompt=prompt,
        output=max(1, usage.get("completion_tokens", 1)),
        cached=min(prompt - 1, (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)),
        waited=max(0.0, total - stages.get("prefill", 0.0) - stages.get("decode", 0.0)),
        total=max(0.0, total),
    )


def _as_the_others(waiting: Sequence[Arrival], ended: Sequence[Arrival]) -> list[Arrival]:
    """As long as its tenant's jobs of its adapter are, or, if none has ended, as all of its adapter, or as all."""
    like = defaultdict(list)
    for job in ended:
        for kind in _kinds(job):
            like[kind].append(job)
    usual = {kind: _usual(jobs) for kind, jobs in like.items()}
    return [usual[next(kind for kind in _kinds(job) if kind in usual)](job) for job in waiting]


def _kinds(job: Arrival) -> tuple[tuple[str, ...], ...]:
    """The narrowest first."""
    return (job.adapter, job.tenant), (job.adapter,), ()


def _usual(jobs: Sequence[Arrival]) -> Callable[[Arrival], Arrival]:
    prompt, output = round(mean(job.prompt for job in jobs)), round(mean(job.output for job in jobs))
    cached = min(prompt - 1, round(median(job.cached for job in jobs)))
    return lambda job: job._replace(prompt=prompt, output=output, cached=cached)


# -- as a file ----------------------------------------------------------------------------------------------------------------------------


def write(recording: Recording, path: Path) -> None:
    """As a CSV that `read` reads, and `benchmarks.simulate --trace` too. Raises `SetupError`."""
    try:
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([*traces.COLUMNS, *_MORE])
            for job in recording.arrivals:
                at = datetime.fromtimestamp(job.at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
                measured = ["" if ms is None else f"{ms:.1f}" for ms in (job.waited, job.total)]
                rows.writerow([at, job.prompt, job.output, job.adapter, job.tenant, f"{job.target:g}", job.cached, *measured])
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from None


def read(path: Path, mix: traces.Mix) -> Recording:
    """From a CSV with TIMESTAMP, ContextTokens and GeneratedTokens. Where it has no column Adapter, adapters, tenants and wait targets are
    drawn as `mix` says. Raises `BadRequest` that names the line at fault."""
    lines = traces.rows(path, traces.COLUMNS)
    first = next(lines, None)
    if first is None:
        raise BadRequest(f"{path}: no arrivals in it")
    if "Adapter" in first[1]:
        return Recording(sorted(_row(path, number, row, mix) for number, row in itertools.chain([first], lines)), [])
    drawn = traces.build(*traces.read_sizes(path), mix)
    columns = (drawn.arrivals, drawn.prompts, drawn.outputs, drawn.adapters, drawn.tenants, drawn.targets)
    arrivals = [
        Arrival(at, prompt, output, drawn.adapter_names[adapter], drawn.tenant_names[tenant], target)
        for at, prompt, output, adapter, tenant, target in zip(*columns, strict=True)
    ]
    return Recording(
        arrivals, [f"{path.name} has no column Adapter: {mix.adapters} adapters of {mix.tenants} tenants are drawn after Zipf's law"]
    )


def _row(path: Path, number: int, row: dict[str, str], mix: traces.Mix) -> Arrival:
    try:
        prompt, target = traces.tokens(row["ContextTokens"]), _optional(row.get("WaitTargetMs"))
        return Arrival(
            at=1000 * datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC).timestamp(),
            prompt=prompt,
            output=traces.tokens(row["GeneratedTokens"]),
            adapter=row["Adapter"] or BASE_DIGEST,
            tenant=row.get("Tenant") or "default",
            target=mix.targets_ms[0][1] if target is None else target,
            cached=min(prompt - 1, round(_optional(row.get("CachedTokens")) or 0)),
            waited=_optional(row.get("WaitedMs")),
            total=_optional(row.get("TotalMs")),
        )
    except (ValueError, TypeError) as error:
        wanted = f"columns {','.join(traces.COLUMNS)} are wanted, and {','.join(_MORE)} may be there"
        raise BadRequest(f"{path}:{number}: not an arrival ({error}); {wanted}") from None


def _optional(text: str | None) -> float | None:
    """Milliseconds, or tokens. Raises `ValueError`."""
    if not text:
        return None
    if not 0 <= (number := float(text)) < _MOST:
        raise ValueError(f"{text[:20]} is too little, too much or no number")
    return number
