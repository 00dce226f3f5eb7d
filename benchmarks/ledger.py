"""How fast are the ledger and what moves jobs through it, with a worker that computes nothing?

    python -m benchmarks.ledger [--quick] [--json PATH] [--only PART ...] [--fsync POLICY]

One server of our own, as shipped, once for each fsync policy; 100 adapters, 4 tenants, requests of 500 bytes; the real scheduler, worker
and API processes, with Flower listening. Other job queues do the same no-op on the same server (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, get_args

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import peers, report
from benchmarks.yard import PART, TENANTS, Fsync, Yard, job, until
from lorayard.ledger.records import Entry
from lorayard.ledger.registry import WorkerInfo
from lorayard_scheduler.backlog import Backlog
from lorayard_scheduler.planner import Policy, plan

out = Console(stderr=True)
Metrics = dict[str, Any]


class Sizes(NamedTuple):
    """How much of everything is done."""

    rounds: int
    enqueue: int
    http: int
    noop: int
    starts: int
    queued: int
    recovery: int
    peer_s: float


FULL = Sizes(rounds=5, enqueue=20_000, http=40_000, noop=100_000, starts=400, queued=1_000_000, recovery=30_000, peer_s=6.0)
QUICK = Sizes(rounds=2, enqueue=4_000, http=4_000, noop=10_000, starts=20, queued=20_000, recovery=6_000, peer_s=0.5)


# -- enqueue ------------------------------------------------------------------------------------------------------------------------------


def bulk(yard: Yard, sizes: Sizes) -> Metrics:
    """`Ledger.enqueue` and a bare pipeline in turns, one client each, 1,000 jobs a round trip; the queue grows from round to round."""
    ours, bare = [], []
    for _ in range(sizes.rounds):
        entries = yard.entries(sizes.enqueue)
        bare.append(len(entries) / _bare(yard, entries))
        ours.append(len(entries) / yard.enqueue(entries))
    for key in yard.store.scan_iter("bare:*", count=10_000):
        yard.store.delete(key)
    rate, bare_rate = statistics.median(ours), statistics.median(bare)
    return {"bulk_enqueue_per_s": rate, "bare_pipeline_per_s": bare_rate, "bulk_vs_bare_pipeline": rate / bare_rate}


def _bare(yard: Yard, entries: Sequence[Entry]) -> float:
    """The least that keeps a job: SET and RPUSH; the seconds it took."""
    begun = time.perf_counter()
    for start in range(0, len(entries), PART):
        pipe = yard.store.pipeline(transaction=False)
        for entry in entries[start : start + PART]:
            pipe.set(f"bare:{entry.id}", entry.request)
            pipe.rpush("bare:queue", entry.id)
        pipe.execute()
    return time.perf_counter() - begun


def http(yard: Yard, sizes: Sizes) -> Metrics:
    """JSON lines to the real API process: 1,000 jobs a request, two clients at a time."""
    process = yard.start("lorayard", "api")
    lines = b"\n".join(msgspec.json.encode(job(i)) for i in range(PART))
    with ThreadPoolExecutor(2) as threads, httpx.Client(base_url=yard.settings.client_url, timeout=60) as client:
        until(lambda: _answers(client), 60)

        def post(i: int) -> int:
            headers = {"Authorization": f"Bearer {yard.keys[TENANTS[i % len(TENANTS)]]}", "Content-Type": "application/jsonl"}
            answer = client.post("/v1/jobs", content=lines, headers=headers).raise_for_status()
            return sum(row.get("status") == "queued" for row in answer.json()["jobs"])

        list(threads.map(post, range(4)))
        begun = time.perf_counter()
        queued = sum(threads.map(post, range(sizes.http // PART)))
        taken = time.perf_counter() - begun
    yard.end(process)
    _check(queued == sizes.http, f"{queued} of {sizes.http} jobs were queued over HTTP")
    return {"http_enqueue_per_s": queued / taken}


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").is_success
    except httpx.TransportError:
        return False


# -- no-op jobs through everything --------------------------------------------------------------------------------------------------------


def noop(yard: Yard, sizes: Sizes) -> Metrics:
    """From the first enqueue to the last result, with one worker and with two; the better of them, the median of its rounds."""
    rates: dict[int, float] = {}
    for workers in (1, 2):
        with yard.fleet(*(f"noop-{i}" for i in range(workers))):
            _noop(yard, sizes.noop // 10)
            rates[workers] = statistics.median(sizes.noop / _noop(yard, sizes.noop) for _ in range(3 if sizes is FULL else 1))
    best = max(rates, key=lambda workers: rates[workers])
    return {"noop_jobs_per_s": rates[best], "noop_workers": best}


def _noop(yard: Yard, count: int) -> float:
    """Seconds for so many jobs; every one must have succeeded at its first attempt, none twice."""
    entries = yard.entries(count)
    before = yard.ledger.counts()
    begun = time.perf_counter()
    yard.enqueue(entries)
    until(lambda: yard.ledger.counts().get("succeeded", 0) - before.get("succeeded", 0) >= count, 600, every_s=0.01)
    taken = time.perf_counter() - begun
    after = yard.ledger.counts()
    told = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    _check(told == {"enqueued": count, "succeeded": count}, f"not every job ended once: {told}")
    for document in _documents(yard, entries):
        _check(document["status"] == "succeeded" and document["attempts"] == 1, f"not as it should be: {document}")
    yard.empty()
    return taken


def _documents(yard: Yard, entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    for tenant in TENANTS:
        ids = [entry.id for entry in entries if entry.tenant == tenant]
        for start in range(0, len(ids), PART):
            for document in yard.ledger.show(tenant, ids[start : start + PART]):
                _check(document is not None, "a job is gone")
                yield document or {}


def rivals(yard: Yard, sizes: Sizes) -> Metrics:
    """The peers, each in the best of its settings."""
    if gone := peers.missing():
        out.print(f"skipped, because {', '.join(gone)} are not installed: pip install -c constraints.txt -e '.[bench]'", style="yellow")
    found = []
    for peer in peers.PEERS:
        if peer.name not in gone:
            with out.status(f"{yard.settings.fsync}: {peer.name}"):
                found.append(peers.best(yard, peer, seconds=sizes.peer_s))
    return {"peers": {speed.name: speed._asdict() for speed in found}}


# -- one job ------------------------------------------------------------------------------------------------------------------------------


def starts(yard: Yard, sizes: Sizes) -> Metrics:
    """An idle fleet, one job: from before the call that enqueues it until the worker's runner begins, by this machine's clock."""
    seen: list[float] = []
    ledgers: list[float] = []
    rng = random.Random(5)
    with yard.fleet("noop-0"):
        _noop(yard, 1000)
        for entry in yard.entries(sizes.starts):
            time.sleep(rng.uniform(0.02, 0.12))  # not in step with anything that polls
            begun = time.time_ns()
            yard.enqueue([entry])
            document = until(partial(_ended, yard, entry), 30, every_s=0.002)
            seen.append((document["response"]["started_ns"] - begun) / 1e6)
            times = document["latencies_ms"]
            ledgers.append(times["queued"] + times["dispatched"])
        yard.empty()
    p50, p99 = statistics.median(seen), statistics.quantiles(seen, n=100)[98]
    return {"start_ms_p50": p50, "start_ms_p99": p99, "start_ms_p50_ledger": statistics.median(ledgers)}


def _ended(yard: Yard, entry: Entry) -> dict[str, Any] | None:
    (document,) = yard.ledger.show(entry.tenant, [entry.id])
    return document if document is not None and document["response"] else None


# -- a long queue -------------------------------------------------------------------------------------------------------------------------


def memory(yard: Yard, sizes: Sizes) -> Metrics:
    """What a queued job takes, and whether a long queue makes planning and claiming slower."""
    yard.empty()
    before = yard.store.info("memory")["used_memory"]
    yard.enqueue(yard.entries(PART))
    short = _plan_and_claim(yard, "short")
    for _ in range(sizes.queued // (10 * PART)):
        yard.enqueue(yard.entries(10 * PART))
    queued = yard.ledger.counts()["queued"]
    used = yard.store.info("memory")["used_memory"] - before
    long = _plan_and_claim(yard, "long")
    yard.empty()
    return {"bytes_per_job": used / queued, "queued_jobs": queued, "plan_claim_ms_1k": short, "plan_claim_ms_long": long}


def _plan_and_claim(yard: Yard, name: str) -> float:
    """Median ms of one turn of the scheduler, for a worker that takes 32 jobs: refresh, plan, claim."""
    backlog, epoch = Backlog(yard.ledger, Policy()), yard.ledger.lead("benchmark", 60_000)
    backlog.rebuild()
    times = []
    for i in range(20):
        worker = WorkerInfo(name=f"{name}-{i}", pool=yard.settings.pool, kind="noop", incarnation="1", host="", pid=0, width=16)
        begun = time.perf_counter()
        backlog.refresh()
        backlog.meet([worker])
        (dispatch, *_) = plan(backlog.view, backlog.now, Policy())
        answer, jobs = yard.ledger.claim(
            epoch=epoch,
            worker=dispatch.worker,
            most=2,
            batch=f"{name}-b{i}",
            digest=dispatch.digest,
            delivery_ms=600_000,
            why=dispatch.why,
            takes=dispatch.takes,
        )
        times.append((time.perf_counter() - begun) * 1000)
        _check(answer == "ok" and jobs > 0, f"not claimed: {answer}")
        backlog.dispatched(f"{name}-b{i}", dispatch.digest, dispatch.takes, dispatch.worker)
    yard.ledger.resign("benchmark")
    return statistics.median(times)


# -- a worker is killed -------------------------------------------------------------------------------------------------------------------


def recovery(yard: Yard, sizes: Sizes) -> Metrics:
    """Two workers under load, one is killed: until the first and the last of the jobs it ran have begun again at the other."""
    with yard.fleet("kept", "killed", arguments=("--hold", "0.2")) as (_, victim):
        entries = yard.entries(sizes.recovery)
        yard.enqueue(entries)
        running = until(lambda: _running(yard, entries, "killed"), 60)
        victim.kill()
        begun = time.monotonic()
        lost = {*running} & {*_running(yard, entries, "killed")}  # the rest had ended by then
        until(lambda: any(_begun_again(yard, lost)), 60)
        first = time.monotonic() - begun
        until(lambda: all(_begun_again(yard, lost)), 60)
        taken = time.monotonic() - begun
        until(lambda: yard.ledger.counts().get("succeeded", 0) >= len(entries), 300)
        twice = sum(document["attempts"] > 1 for document in _documents(yard, entries))
        yard.empty()
    return {
        "recovery_s": taken,
        "recovery_first_s": first,
        "recovery_jobs": len(lost),
        "recovery_second_attempts": twice,
        "lease_s": yard.settings.lease_ms / 1000,
    }


def _running(yard: Yard, entries: Sequence[Entry], worker: str) -> list[tuple[str, str]]:
    """(tenant, id) of what a worker has begun, among the jobs it was given."""
    digests = {flight.digest for flight in yard.ledger.snapshot().in_flight if flight.worker == worker and flight.taken}
    mine = [entry for entry in entries if entry.digest in digests]
    return [
        (entry.tenant, document["id"])
        for tenant in TENANTS
        for entry, document in _shown(yard, tenant, [entry for entry in mine if entry.tenant == tenant])
        if document["status"] == "running" and document["worker"] == worker
    ]


def _shown(yard: Yard, tenant: str, entries: Sequence[Entry]) -> Iterator[tuple[Entry, dict[str, Any]]]:
    for entry, document in zip(entries, yard.ledger.show(tenant, [entry.id for entry in entries]), strict=True):
        if document is not None:
            yield entry, document


def _begun_again(yard: Yard, refs: set[tuple[str, str]]) -> list[bool]:
    documents = [d for tenant in TENANTS for d in yard.ledger.show(tenant, [job_id for owner, job_id in refs if owner == tenant])]
    return [document is not None and document["attempts"] > 1 for document in documents]


# -- all of it ----------------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Yard, Sizes], Metrics]] = {
    "bulk": bulk,
    "http": http,
    "noop": noop,
    "rivals": rivals,
    "starts": starts,
    "recovery": recovery,
    "memory": memory,  # last: a server that has just lost a million keys is not itself
}


def measure(fsync: Fsync, sizes: Sizes, parts: Sequence[str]) -> Metrics:
    """All parts on one server."""
    metrics: Metrics = {"fsync": fsync}
    with Yard(fsync) as yard:
        for name in parts:
            out.print(f"{fsync}: {name}", style="dim")
            metrics |= PARTS[name](yard, sizes)
            yard.empty()
    if metrics.get("peers") and "noop_jobs_per_s" in metrics:
        first = max(metrics["peers"].values(), key=lambda speed: speed["per_s"])
        metrics |= {"noop_vs_best_peer": metrics["noop_jobs_per_s"] / first["per_s"], "best_peer": first["name"]}
    return metrics


def _check(right: bool, message: str) -> None:
    if not right:
        raise RuntimeError(message)


def table(columns: dict[Fsync, Metrics]) -> Table:
    """A row a figure, a column a policy."""
    rows = Table("", *(f"fsync {name}" for name in columns), title="Ledger")
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics if name not in ("fsync", "peers"))
    for name in names:
        rows.add_row(name, *(_shown_as(metrics.get(name)) for metrics in columns.values()))
    told = {name: speed for metrics in columns.values() for name, speed in metrics.get("peers", {}).items()}
    for name, speed in told.items():
        speeds = [metrics.get("peers", {}).get(name) for metrics in columns.values()]
        label = f"{name} {speed['version']}: {speed['stores']}"
        rows.add_row(label, *(f"{s['per_s']:,.0f}/s ({s['setting']})" if s else "" for s in speeds))
    return rows


def _shown_as(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--fsync", choices=get_args(Fsync), help="one policy instead of both")
    args = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("LORAYARD_")]:  # shipped defaults
        del os.environ[name]
    columns: dict[Fsync, Metrics] = {}
    for fsync in (args.fsync,) if args.fsync else get_args(Fsync):
        columns[fsync] = measure(fsync, QUICK if args.quick else FULL, args.only)
    Console().print(table(columns))
    first, *others = columns
    metrics = dict(columns[first])
    for name in others:
        metrics |= {f"{name}_{key}": value for key, value in columns[name].items() if key != "fsync"}
    report.write(args.json, "ledger", metrics)


if __name__ == "__main__":
    main()
