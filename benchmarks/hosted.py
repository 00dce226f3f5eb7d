"""How well does a hosted worker use what a service allows, and what does it cost beside the call itself?

    python -m benchmarks.hosted [--quick] [--json PATH] [--only limits|faults|overhead|rss ...]

The service is the stand-in of the tests, a process of its own, with 50 ms a call. Scheduler and workers are the real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import redis
from rich.console import Console
from rich.table import Table

from benchmarks import report
from lorayard import embedded
from lorayard.hosted import organisation
from lorayard.ledger.connection import connect
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.registry import open_ledger
from lorayard.settings import Settings
from lorayard_scheduler.admission import Accepted, Admission
from lorayard_workers.groq.runner import HostedRunner
from lorayard_workers.runner import Event, Outcome, Ready, Work, WorkItem

out = Console(stderr=True)
Metrics = dict[str, Any]
BASE, KEY = "llama-3.1-8b-instant", "gsk_test"
TESTS = Path(__file__).resolve().parents[1] / "tests"
SERVICE_S = 0.05
SETTLED_S = 5.0
"""Calls under way when a limit shows are refused too; refusals later than this are late."""


class Service:
    """The stand-in as a process."""

    def __init__(self, **options: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"
        chosen = json.dumps({"service_s": SERVICE_S} | options)
        self._process = subprocess.Popen([sys.executable, str(TESTS / "hosted_service.py"), str(port), chosen])
        give_up = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                self.state()
                return
            if time.monotonic() > give_up:
                raise RuntimeError("the stand-in did not start")
            time.sleep(0.05)

    def state(self) -> dict[str, Any]:
        document: dict[str, Any] = httpx.get(f"{self.root}/_state", timeout=30).json()
        return document

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Yard:
    """A store, one scheduler and so many hosted workers against a service; all are processes of their own but the store's client."""

    def __init__(self, folder: Path, service: Service, workers: int, **settings: Any) -> None:
        chosen: dict[str, Any] = {
            "state_dir": folder,
            "hosted_model": BASE,
            "hosted_url": f"{service.root}/openai/v1",
            "hosted_key": KEY,
        } | settings
        self.settings = Settings(**chosen)
        self.service = service
        self._environment = os.environ | {f"LORAYARD_{name.upper()}": str(value) for name, value in chosen.items()}
        self._stack = contextlib.ExitStack()
        self._names = [f"g{n}" for n in range(workers)]
        self.pids: list[int] = []

    def __enter__(self) -> Yard:
        url = self._stack.enter_context(embedded.running(self.settings))
        self._environment["LORAYARD_REDIS_URL"] = url
        self.store: redis.Redis = self._stack.enter_context(connect(url))
        self.ledger = open_ledger(self.store, self.settings)
        Policies(self.store).set("acme", Policy(hosted=True))
        self._start("scheduler")
        for name in self._names:
            self.pids.append(self._start("worker", "groq", name=name))
        until(lambda: len(self._alive()) == len(self._names), 60)
        return self

    def _alive(self) -> list[str]:
        from lorayard.ledger.registry import WorkerRegistry

        return [w.name for w in WorkerRegistry(self.store).workers(self.settings.pool) if w.ready]

    def _start(self, *role: str, name: str = "") -> int:
        log = self._stack.enter_context((self.settings.state_dir / f"{name or role[0]}.log").open("wb"))
        environment = self._environment | ({"LORAYARD_WORKER_NAME": name} if name else {})
        process = subprocess.Popen([sys.executable, "-m", "lorayard", *role], env=environment, stdout=log, stderr=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process.pid

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def submit(self, count: int, *, max_tokens: int = 16, words: int = 1) -> list[str]:
        """Jobs that each ask for their own number, by their ids."""
        admission = Admission(self.settings, self.ledger)
        jobs: list[Any] = [
            {
                "id": f"n{n}",
                "route": "groq",
                "request": {"messages": [{"role": "user", "content": f"n{n}" + " x" * (words - 1)}], "max_tokens": max_tokens},
            }
            for n in range(count)
        ]
        answers = admission.submit("acme", jobs)
        assert all(isinstance(answer, Accepted) for answer in answers), answers[:3]
        return [job["id"] for job in jobs]


@contextlib.contextmanager
def _yard(service: Service, workers: int = 1, **settings: Any) -> Iterator[Yard]:
    with tempfile.TemporaryDirectory(prefix="lorayard-bench-") as folder, Yard(Path(folder), service, workers, **settings) as yard:
        yield yard


def until(what: Callable[[], Any], timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > give_up:
            raise RuntimeError(f"waited {timeout_s:.0f} s in vain")
        time.sleep(0.1)


# -- limits --------------------------------------------------------------------------------------------------------------------------------


def limits(quick: bool) -> Metrics:
    """Two workers with more work than allowed, and nobody tells them the limits: one service limits requests, another tokens."""
    seconds = 70 if quick else 250
    found: Metrics = {}
    with ThreadedRuns() as runs:
        runs.start("request", lambda: _one_limit(seconds, {"rpm": 600}, max_tokens=16))
        runs.start("token", lambda: _one_limit(seconds, {"tpm": 60_000}, max_tokens=128))
        for name, run in runs.results().items():
            found |= {f"{name}_share_used" if key == "share" else f"{name}_{key}": value for key, value in run.items()}
    found["late_429s"] = found["request_late_429s"] + found["token_late_429s"]
    return found


class ThreadedRuns:
    """Runs beside each other: each waits for minutes to pass, and computes nothing."""

    def __enter__(self) -> ThreadedRuns:
        self._threads: list[threading.Thread] = []
        self._results: dict[str, Metrics] = {}
        self._errors: list[BaseException] = []
        return self

    def start(self, name: str, run: Callable[[], Metrics]) -> None:
        def keep() -> None:
            try:
                self._results[name] = run()
            except BaseException as error:  # told below, where somebody listens
                self._errors.append(error)

        self._threads.append(threading.Thread(target=keep))
        self._threads[-1].start()

    def results(self) -> dict[str, Metrics]:
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return self._results

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()


def _one_limit(seconds: float, limit: dict[str, int], max_tokens: int) -> Metrics:
    with _service(**limit) as service, _yard(service, workers=2) as yard:
        yard.submit(20_000, max_tokens=max_tokens)
        time.sleep(seconds)
        log = service.state()["log"]
    (allowed,) = limit.values()
    calls = [(at, tokens if "tpm" in limit else 1.0) for at, status, tokens in log if status == 200]
    refused = [at for at, status, _ in log if status == 429]
    first = min(at for at, *_ in log)
    learned = min(refused) + SETTLED_S if refused else first
    early = [at for at in refused if at <= learned]
    windows = [
        sum(n for at, n in calls if end - 60 < at <= end) / allowed
        for end in _steps(first + 60, first + seconds - 3)  # the mean over all minutes there are
    ]
    return {
        "share": statistics.fmean(windows),
        "most_in_a_minute": max(windows),
        "late_429s": len(refused) - len(early),
        "early_429_share": len(early) / max(1, sum(at <= learned for at, *_ in log)),
    }


def _steps(start: float, end: float) -> Iterator[float]:
    return itertools.takewhile(lambda at: at < end, itertools.count(start, 0.5))


@contextlib.contextmanager
def _service(**options: Any) -> Iterator[Service]:
    service = Service(**options)
    try:
        yield service
    finally:
        service.close()


# -- faults --------------------------------------------------------------------------------------------------------------------------------


def faults(quick: bool) -> Metrics:
    """Every kind of trouble at random, each with one call in twenty."""
    count = 200 if quick else 2_000
    kinds = dict.fromkeys(("429", "498", "503", "timeout", "reset", "truncated"), 0.05)
    with _service(faults=kinds, hang_s=5) as service, _yard(service, hosted_timeout_s=1.0, hosted_unlimited=True) as yard:
        begun = time.monotonic()
        ids = yard.submit(count)
        until(lambda: yard.ledger.counts().get("succeeded", 0) + yard.ledger.counts().get("failed", 0) >= count, 600)
        took = time.monotonic() - begun
        documents = yard.ledger.show("acme", ids)
        state = service.state()
    right = sum(_is_right(i, d) for i, d in zip(ids, documents, strict=True))
    return {
        "faulty_jobs_right": right / count,
        "faulty_jobs": count,
        "double_calls": sum(n > 1 for n in state["answered"].values()),
        "faulty_calls": {kind: state["calls"].get(kind, 0) for kind in kinds},
        "faulty_attempts_most": max(d["attempts"] for d in documents if d),
        "faulty_s": took,
    }


def _is_right(job_id: str, document: dict[str, Any] | None) -> bool:
    if document is None or document["status"] != "succeeded":
        return False
    return bool(document["response"]["choices"][0]["message"]["content"] == f"{BASE} says: {job_id}")


# -- what it costs -------------------------------------------------------------------------------------------------------------------------


IN_FLIGHT = {1: 40, 8: 240, 50: 800}
"""Calls at a time, and calls in a turn."""


def overhead(quick: bool) -> Metrics:
    """So many calls at a time through the runner (gate, limits in the ledger, answer read), in turns with a bare httpx client that holds as
    many and speaks the same HTTP version; the median of what a call takes here and there."""
    with _service() as service, tempfile.TemporaryDirectory(prefix="lorayard-bench-") as folder:
        settings = Settings(
            state_dir=Path(folder), hosted_model=BASE, hosted_url=f"{service.root}/openai/v1", hosted_key=KEY, hosted_rpm=1_000_000
        )
        with embedded.running(settings) as url, connect(url) as store:
            Policies(store).set("acme", Policy(hosted=True))
            ours = Ours(HostedRunner(settings, organisation(settings, store), Policies(store), lambda: ["base"], lambda _: None))
            found: Metrics = {}
            for n, calls in IN_FLIGHT.items():
                here, there = _in_turns(ours, settings, n, calls // 4 if quick else calls)
                found[f"overhead_ms_p50_at_{n}"] = statistics.median(here) - statistics.median(there)
                found |= {f"call_ms_p50_at_{n}": statistics.median(here), f"bare_ms_p50_at_{n}": statistics.median(there)}
            ours.runner.close()
    return found | {"overhead_ms_p50": found["overhead_ms_p50_at_8"]}


ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}


class Ours:
    """Calls through the runner: whenever one ends, the next is handed in."""

    def __init__(self, runner: HostedRunner) -> None:
        self.runner = runner
        self._raw = msgspec.Raw(msgspec.json.encode(ASKED))
        self._numbers = itertools.count()
        self._begun: dict[str, float] = {}
        self._took: list[float] = []
        self._left = 0
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        runner.start(self._hear)
        self._said.get(timeout=30)

    def take(self, n: int, calls: int) -> list[float]:
        """Milliseconds of each."""
        self._took, self._left = [], calls - n
        for _ in range(n):
            self._next()
        self._said.get(timeout=120)
        return self._took

    def _next(self) -> None:
        number = next(self._numbers)
        self._begun[f"acme/j{number}"] = time.perf_counter()
        self.runner.submit(Work(f"b{number}", None, [WorkItem(f"acme/j{number}", "/v1/chat/completions", self._raw)], "groq"))

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._said.put("ready")
        elif isinstance(event, Outcome):
            self._took.append((time.perf_counter() - self._begun.pop(event.ref)) * 1000)
            if self._left > 0:
                self._left -= 1
                self._next()
            elif not self._begun:
                self._said.put("over")


def _in_turns(ours: Ours, settings: Settings, n: int, calls: int) -> tuple[list[float], list[float]]:
    here: list[float] = []
    there: list[float] = []
    with asyncio.Runner() as loop:
        client = httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, http2=True, limits=httpx.Limits(max_connections=n))
        for turn in range(6):
            mine, bare = ours.take(n, calls), loop.run(_bare(client, settings, n, calls))
            if turn:  # the first opens connections, and finds out how many calls at once are well
                here += mine
                there += bare
        loop.run(client.aclose())
    return here, there


async def _bare(client: httpx.AsyncClient, settings: Settings, n: int, calls: int) -> list[float]:
    took: list[float] = []

    async def one_after_another() -> None:
        while len(took) + n <= calls:
            begun = time.perf_counter()
            reply = await client.post(f"{settings.hosted_url}/chat/completions", json=ASKED | {"model": BASE})
            reply.json()
            took.append((time.perf_counter() - begun) * 1000)

    await asyncio.gather(*(one_after_another() for _ in range(n)))
    return took


def rss(quick: bool) -> Metrics:
    """One worker with 500 calls under way, each of 8 s."""
    calls = 50 if quick else 500
    with _service(service_s=8.0) as service, _yard(service, hosted_unlimited=True, hosted_calls=calls) as yard:
        yard.submit(calls * 4, words=100)
        until(lambda: service.state()["under_way"] >= calls, 200)
        memory = _rss_mb(yard.pids[0])
    return {"rss_mb_at_500": memory, "rss_calls": calls}


def _rss_mb(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024


PARTS = {"limits": limits, "faults": faults, "overhead": overhead, "rss": rss}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process of ours is left
    metrics: Metrics = {}
    for name in options.only:
        out.print(f"{name} …")
        metrics |= PARTS[name](options.quick)
    table = Table("figure", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(Counter(value) if isinstance(value, dict) else value))
    Console().print(table)
    report.write(options.json, "hosted", metrics)


if __name__ == "__main__":
    main()
