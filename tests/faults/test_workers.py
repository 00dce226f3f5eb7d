"""Workers and their models that are killed, stopped, slow or out of memory."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from fleet_support import until

from faults.report import Row
from faults.scale import fault
from faults.witness import Witness
from faults.yard import QUICK, Yard
from lorayard.celery_app import worker_queue

Fleet = Callable[..., tuple[Yard, Witness]]
SLACK_S = 5.0  # what the table gives beside the lease


@fault(quick=True)
def test_brpop_hole(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """The BRPOP hole: an idle worker is stopped, gets a message, is killed; it comes back, or never does; then so does the last one"""
    yard, witness = fleet()
    with row.judging(yard, witness):
        for again in (False,) if quick else (True, False):
            yard.send("worker-2", signal.SIGSTOP)
            witness.submit(witness.jobs(150, ms=(5, 15)))
            until(lambda: yard.outstanding("worker-2"), 10)
            time.sleep(0.3)  # for the message to get where it gets lost
            given, kept = len(yard.outstanding("worker-2")), sum(_broker_lengths(yard, "worker-2"))
            row.notes.append(f"{given} batches were given to the stopped worker, and {kept} messages were in its queue or unacknowledged")
            killed = yard.kill("worker-2", again=again)
            row.injected["SIGSTOP, dispatch, SIGKILL"] += 1
            row.recovered(witness.wait() - killed, yard.settings.delivery_ms / 1000 + SLACK_S)
        assert yard.counts()["recalled"] >= 1, "the other worker need not wait for the delivery to lapse"
        lapsed = yard.counts().get("deliveries_lapsed", 0)
        yard.send("worker-1", signal.SIGSTOP)
        witness.submit(witness.jobs(20, ms=(5, 15)))
        until(lambda: yard.counts().get("deliveries_lapsed", 0) > lapsed, 20)
        killed = yard.kill("worker-1", again=True)
        row.injected["SIGSTOP of the last worker, dispatch, SIGKILL"] += 1
        row.recovered(witness.wait() - killed, SLACK_S)


def _broker_lengths(yard: Yard, worker: str) -> tuple[int, int]:
    with redis.Redis.from_url(yard.broker_url) as broker:
        return int(broker.llen(worker_queue(worker))), int(broker.hlen("lorayard.unacked"))


STEPS = [
    ("scheduler-1", "claim", "before"),
    ("scheduler-1", "claim", "after"),
    ("scheduler-1", "reap", "after"),
    ("worker-1", "ack", "before"),
    ("worker-1", "ack", "after"),
    ("worker-1", "take", "before"),
    ("worker-1", "take", "after"),
    ("worker-1", "load", "before"),
    ("worker-1", "load", "after"),
    ("worker-1", "start", "before"),
    ("worker-1", "start", "after"),
    ("worker-1", "renew", "before"),
    ("worker-1", "renew", "after"),
    ("worker-1", "finish", "before"),
    ("worker-1", "finish", "after"),
    ("api", "enqueue", "before"),
    ("api", "enqueue", "after"),
]
QUICK_STEPS = [
    ("scheduler-1", "claim", "after"),
    ("worker-1", "take", "after"),
    ("worker-1", "start", "after"),
    ("worker-1", "finish", "before"),
    ("worker-1", "finish", "after"),
    ("api", "enqueue", "after"),
]


@fault(quick=True)
def test_killed_at_each_step(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """SIGKILL at each step: claim, ack, take, load, generate, store, renew, reap, enqueue, before and after each call"""
    yard, witness = fleet()
    with row.judging(yard, witness):
        for member, point, when in QUICK_STEPS if quick else STEPS:
            # Half of them come back only after the lease, so that it is the lease that brings their jobs back.
            yard.members[member].again_s = 0.1 if member == "api" else rng.choice((0.1, 4.0))
            since = time.monotonic()
            order = yard.order(member, point, when, signal.SIGKILL)
            if point == "reap":
                witness.submit([witness.job(fields={"not_before_s": 0.5})])
            witness.submit(witness.jobs(60 if quick else 120, ms=(300, 500) if point == "renew" else (20, 60)))
            died = yard.died(member, since)
            assert not order.exists()
            row.injected[f"{member.partition('-')[0]} {when} {point}"] += 1
            more = 3 if member != "worker-1" else 2 if point == "renew" else 0  # a lead to lapse; jobs that themselves take so long
            row.recovered(witness.wait() - died, yard.settings.lease_ms / 1000 + SLACK_S + more)
            yard.members[member].again_s = 0.1
            yard.ready({"worker-1", "worker-2"})


@fault(quick=True, timeout_s=900)
def test_random_kills(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Random kills: workers, their children and schedulers, one every 1 to 5 s"""
    count = 1_000 if quick else 12_000
    yard, witness = fleet(workers=3, schedulers=2)
    done = threading.Event()

    def strike() -> None:
        dice = random.Random(row.seed)
        names = [f"worker-{n}" for n in (1, 2, 3)] + [f"scheduler-{n}" for n in (1, 2)]
        while not done.wait(dice.uniform(0.8, 1.5) if quick else dice.uniform(1, 5)):
            name = dice.choice(names)
            if name.startswith("worker") and dice.random() < 0.25:
                os.kill(yard.child(name), signal.SIGKILL)
                row.injected["child"] += 1
            else:
                yard.kill(name)
                row.injected[name.partition("-")[0]] += 1

    striker = threading.Thread(target=strike, daemon=True)
    with row.judging(yard, witness, timeout_s=240):
        striker.start()
        for _ in range(count // 200):
            witness.submit(witness.jobs(200, ms=(20, 200), mixed=True))
            time.sleep(1.2 if quick else 0.9)
        done.set()
        striker.join()
    assert max(row.attempts) <= yard.settings.max_attempts
    assert row.injected.total() >= 3


@fault(quick=True)
def test_zombie(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Zombie: a worker stands still past its lease just before it stores, starts or takes, and goes on when its jobs have ended"""
    yard, witness = fleet()
    with row.judging(yard, witness):
        for point, stay_s in [("finish", 0)] if quick else [("finish", 0), ("start", 0), ("take", 0), ("renew", 0), ("finish", 15)]:
            stale = yard.counts().get("stale", 0)
            order = yard.order("worker-1", point, "before", signal.SIGSTOP)
            witness.submit(witness.jobs(100, ms=(300, 500) if point == "renew" else (30, 80)))
            until(lambda order=order: not order.exists(), 20)  # type: ignore[misc]
            stopped = time.monotonic()
            row.injected[f"SIGSTOP before {point}"] += 1
            row.recovered(witness.wait() - stopped, yard.settings.lease_ms / 1000 + SLACK_S + 2)
            witness.read(list(witness.acknowledged))
            time.sleep(stay_s)  # until it is struck off
            yard.send("worker-1", signal.SIGCONT)
            if point == "finish":
                until(lambda stale=stale: yard.counts().get("stale", 0) > stale, 20)  # type: ignore[misc]
            yard.ready({"worker-1", "worker-2"})


@fault(quick=True)
def test_slow_batch(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Slow batch: longer than three leases and than the visibility timeout (60 s)"""
    yard, witness = fleet(lease_ms=5000, haste=quick)  # which outlasts a busy machine's stalls
    ms, places = 16_000 if quick else 75_000, 2 * 16
    with row.judging(yard, witness, timeout_s=200):
        witness.submit([witness.job(ms=ms) for _ in range(places)])
        until(lambda: _begun(yard) == places, 20)
        witness.submit([witness.job(ms=100) for _ in range(8)])  # wait on deck as long
        row.injected[f"{ms / 1000:g} s a job"] += places
    starts = Counter(line.split(" ")[1] for line in yard.runs.read_text().splitlines() if line.startswith("start"))
    assert set(starts.values()) == {1}, "each is run once"
    assert (row.attempts, yard.counts().get("leases_lapsed", 0)) == ({1: 40}, 0)


def _begun(yard: Yard) -> int:
    """How many runs of jobs the models have begun."""
    return sum(line.startswith("start") for line in yard.runs.read_text().splitlines())


@fault(quick=True)
def test_model_dies(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Model child dies: SIGKILL; the kernel's out-of-memory kill in a control group; an allocation that fails"""
    yard, witness = fleet(lease_ms=20_000)  # none lapses, however busy the machine
    with row.judging(yard, witness):
        for _ in range(1 if quick else 6):
            witness.submit(witness.jobs(100, ms=(20, 60)))
            for worker in ("worker-1", "worker-2"):
                until(lambda worker=worker: yard.outstanding(worker), 10)  # type: ignore[misc]
                os.kill(yard.child(worker), signal.SIGKILL)
                row.injected["SIGKILL"] += 1
            killed = time.monotonic()
            row.recovered(witness.wait() - killed, QUICK["lease_ms"] / 1000 + SLACK_S)
        for limit in ("allocation",) if quick else ("allocation", "control group"):
            # What it needs once it does not need again; whoever ran beside it is run again.
            hungry = witness.submit([*witness.jobs(40, ms=(20, 60)), *(witness.job(eat=1, ms=500) for _ in range(2))])
            row.injected[f"memory: {limit}"] += 2
            if limit == "control group":
                with _little_memory(row, [yard.child(w) for w in ("worker-1", "worker-2")]):
                    witness.wait(hungry)
            witness.wait(hungry)
    assert row.ends == {"succeeded": row.jobs}, "retried, and the others unharmed"
    assert yard.counts().get("leases_lapsed", 0) == 0, "the workers kept their leases"


@contextmanager
def _little_memory(row: Row, pids: list[int]) -> Iterator[None]:
    """The kernel kills these processes when they take 64 MB more (a memory control group, version 1 or 2, as root)."""
    root = Path("/sys/fs/cgroup/memory")
    limit = "memory.limit_in_bytes"
    if not root.is_dir():
        root, limit = Path("/sys/fs/cgroup"), "memory.max"
    group = root / f"lorayard-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(64 << 20))
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        row.notes.append(f"no memory control group here ({error}); the limit was the process's own instead")
        yield
        return
    try:
        yield
    finally:
        until(lambda: _removed(group), 30)


def _removed(group: Path) -> bool:
    for pid in (group / "cgroup.procs").read_text().split():
        (group.parent / "cgroup.procs").write_text(pid)
    try:
        group.rmdir()
    except OSError:
        return False
    return True


@fault(quick=True)
def test_poison(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Poison jobs: each kills the child whenever it is run"""
    yard, witness = fleet(lease_ms=3000)
    with row.judging(yard, witness, timeout_s=200):
        mates = witness.jobs(120 if quick else 400, ms=(10, 30))
        poison = [witness.job(die=99) for _ in range(1 if quick else 4)]
        for job in poison:
            mates.insert(rng.randrange(len(mates)), job)
        witness.submit(mates, tenant="acme")
        row.injected["poison jobs"] += len(poison)
    dead = {f"acme/{job['id']}" for job in poison}
    for ref, document in witness.documents.items():
        if ref in dead:
            assert (document["status"], document["attempts"]) == ("failed", yard.settings.max_attempts)
            assert document["error"]["code"] == "worker_died"
        else:
            assert document["status"] == "succeeded", document
    assert set(yard.ledger().list_ids("acme", limit=99, dead=True)) == {job["id"] for job in poison}


@fault(quick=False)
def test_worker_gone_for_good(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """A worker that never comes back: its private queue is drained, at the product's own pace"""
    yard, witness = fleet(haste=False)
    with row.judging(yard, witness):
        yard.send("worker-2", signal.SIGSTOP)
        for _ in range(3):
            witness.submit(witness.jobs(100, ms=(5, 15)))
            time.sleep(0.5)
        killed = yard.kill("worker-2", again=False)
        row.injected["SIGSTOP, dispatch, SIGKILL"] += 1
        row.recovered(witness.wait() - killed, yard.settings.delivery_ms / 1000 + SLACK_S)
        row.notes.append(f"{_broker_lengths(yard, 'worker-2')[0]} messages were left in its queue")
