"""Other job queues doing the same no-op on the same server: bulk enqueue where there is one, the best of a few worker settings."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import redis

from benchmarks.yard import Yard, until

WARM_UP = 300
DB, RESULTS_DB = 14, 15


@dataclass(frozen=True)
class Setting:
    """One way to run a peer's workers."""

    label: str
    command: tuple[str, ...]
    concurrency: int = 100


@dataclass(frozen=True)
class Peer:
    """`ended(store, results, count)`: whether `count` jobs are done and nothing waits. `stores`: what is kept of a job's end."""

    name: str
    stores: str
    settings: tuple[Setting, ...]
    ended: Callable[[redis.Redis, redis.Redis, int], Any]


class Speed(NamedTuple):
    """The best of a peer's settings: jobs a second from the first enqueue to the last end."""

    name: str
    version: str
    setting: str
    stores: str
    jobs: int
    per_s: float


_MODULE = "benchmarks.peer_tasks"
_CELERY = ("celery", "-A", f"{_MODULE}:celery_app", "worker", "-l", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat")


def _dramatiq(processes: int, threads: int) -> Setting:
    command = ("dramatiq", f"{_MODULE}:dramatiq_broker", "-p", str(processes), "-t", str(threads))
    return Setting(f"{processes} processes x {threads} threads", command)


def _taskiq(processes: int, tasks: int) -> Setting:
    how = {"-w": processes, "--max-async-tasks": tasks, "--max-prefetch": tasks, "--log-level": "ERROR"}
    options = [str(word) for pair in how.items() for word in pair]
    return Setting(f"{processes} processes x {tasks} tasks, uvloop", ("taskiq", "worker", f"{_MODULE}:taskiq_broker", *options))


def _saq(processes: int, tasks: int) -> Setting:
    return Setting(f"{processes} processes x {tasks} tasks", ("saq", f"{_MODULE}.saq_settings", "--workers", str(processes), "-q"), tasks)


def _arq(tasks: int) -> Setting:
    return Setting(f"1 process x {tasks} tasks", ("arq", f"{_MODULE}.ArqSettings", "--custom-log-dict", f"{_MODULE}.QUIET"), tasks)


def _rq(processes: int) -> Setting:
    command = ("rq.cli", "worker-pool", "-n", str(processes), "-w", "rq.SimpleWorker", "-q", "-u", "PEER_URL")
    return Setting(f"{processes} SimpleWorkers", command)


def _celery(pool: str, concurrency: int) -> Setting:
    return Setting(f"{pool} x {concurrency}", (*_CELERY, "-P", pool, "-c", str(concurrency)), 64)


PEERS = (
    Peer(
        "dramatiq",
        "nothing; ended when acknowledged",
        (_dramatiq(2, 8), _dramatiq(2, 32), _dramatiq(1, 32)),
        lambda store, _, __: not store.hlen("dramatiq:default.msgs"),
    ),
    Peer(
        "taskiq",
        "a result a job",
        (_taskiq(1, 100), _taskiq(2, 100), _taskiq(2, 500)),
        lambda _, results, count: results.dbsize() >= count,
    ),
    Peer(
        "saq",
        "the job with its result",
        (_saq(1, 50), _saq(2, 20), _saq(2, 100)),
        lambda store, _, __: not store.zcard("saq:default:incomplete"),
    ),
    Peer("arq", "a result a job", (_arq(20), _arq(90)), lambda store, _, __: not store.zcard("arq:queue")),
    Peer("rq", "the job with its result", (_rq(1), _rq(2)), lambda store, _, count: store.zcard("rq:finished:default") >= count),
    Peer(
        "celery",
        "a result a job",
        (_celery("threads", 16), _celery("prefork", 2), _celery("solo", 1)),
        lambda _, results, count: results.dbsize() >= count,
    ),
)


def missing() -> list[str]:
    """The peers that are not installed."""
    return [peer.name for peer in PEERS if _version(peer.name) is None]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def best(yard: Yard, peer: Peer, *, seconds: float, settings: Sequence[str] = ()) -> Speed:
    """Each setting (or only those of these labels) does about so many seconds of no-ops, at least; the fastest."""
    found = []
    for setting in peer.settings:
        if not settings or setting.label in settings:
            jobs, per_s = _speed(yard, peer, setting, seconds)
            found.append(Speed(peer.name, _version(peer.name) or "", setting.label, peer.stores, jobs, per_s))
    return max(found, key=lambda speed: speed.per_s)


def _speed(yard: Yard, peer: Peer, setting: Setting, seconds: float) -> tuple[int, float]:
    base = yard.url.rpartition("/")[0]
    url, results_url = f"{base}/{DB}", f"{base}/{RESULTS_DB}"
    variables = {"PEER_URL": url, "PEER_RESULTS_URL": results_url, "PEER_CONCURRENCY": str(setting.concurrency)}
    command = [url if word == "PEER_URL" else word for word in setting.command]
    with redis.Redis.from_url(url) as store, redis.Redis.from_url(results_url) as results:
        store.flushdb()
        results.flushdb()
        process = yard.start(*command, **variables)
        try:
            _run(yard, peer, variables, store, results, WARM_UP)
            jobs = WARM_UP
            while True:
                taken = _run(yard, peer, variables, store, results, jobs)
                if taken > seconds / 2:
                    return jobs, jobs / taken
                jobs = min(jobs * 10, round(jobs * seconds / taken * 0.9))
        finally:
            yard.end(process)
            store.flushdb()
            results.flushdb()


def _run(yard: Yard, peer: Peer, variables: dict[str, str], store: redis.Redis, results: redis.Redis, jobs: int) -> float:
    """Seconds from the first enqueue to the last end."""
    until(lambda: peer.ended(store, results, 0), 60)
    results.flushdb()
    store.delete("rq:finished:default")
    with yard.log.open("ab") as log:
        # Not with -m: the tasks would be __main__'s then, and unknown to the workers.
        command = [sys.executable, "-c", f"from {_MODULE} import main; main()", peer.name, str(jobs)]
        producer = subprocess.Popen(command, env=yard.variables(**variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    assert producer.stdin is not None
    assert producer.stdout is not None
    with producer:
        producer.stdout.readline()
        begun = time.perf_counter()
        producer.stdin.write(b"\n")
        producer.stdin.flush()
        until(lambda: producer.poll() is not None, 600, every_s=0.005)
        if producer.returncode:
            raise RuntimeError(f"{peer.name}: its producer failed")
        until(lambda: peer.ended(store, results, jobs), 600, every_s=0.01)
        return time.perf_counter() - begun
