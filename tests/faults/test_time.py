"""Two schedulers, wrong clocks, and jobs that are cancelled whatever they are doing."""

from __future__ import annotations

import importlib.util
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet_support import until

from faults.report import Row
from faults.scale import fault
from faults.witness import Witness
from faults.yard import Yard, repeating
from lorayard.ledger.keys import split_ref

Fleet = Callable[..., tuple[Yard, Witness]]


def _leader(yard: Yard) -> tuple[str, int] | None:
    """Which scheduler leads, by its pid in the name it leads under, and the epoch; None while it is one that has ended."""
    found: Any = yard.store.hmget(f"ly:{{{yard.settings.pool}}}:leader", "id", "epoch")
    me, epoch = found
    pid = int(me.decode().split(":")[1])
    name = next((name for name, member in yard.members.items() if member.process and member.pid == pid), "")
    return (name, int(epoch)) if name else None


def _epoch(yard: Yard) -> int:
    found: Any = yard.store.hget(f"ly:{{{yard.settings.pool}}}:leader", "epoch")
    return int(found)


@fault(quick=True)
def test_two_schedulers(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Scheduler killed, two schedulers: the other takes over; one that stood still just before it claims, claims nothing any more"""
    yard, witness = fleet(schedulers=2, lease_ms=20_000)  # none lapses, however busy the machine
    ttl_s = yard.settings.leader_ttl_ms / 1000
    with row.judging(yard, witness):
        for _ in range(1 if quick else 6):
            witness.submit(witness.jobs(200, ms=(10, 40)))
            leader, epoch = until(lambda: _leader(yard), 10) or ("", 0)
            yard.members[leader].again_s = 5.0
            killed = yard.kill(leader)
            row.injected["leader killed"] += 1
            until(lambda epoch=epoch: _epoch(yard) > epoch, 30)  # type: ignore[misc]
            row.recovered(time.monotonic() - killed, ttl_s + 1)
            witness.wait()
            yard.members[leader].again_s = 0.1
        for _ in range(1 if quick else 6):
            leader, epoch = until(lambda: _leader(yard), 10) or ("", 0)
            order = yard.order(leader, "claim", "before", signal.SIGSTOP)
            witness.submit(witness.jobs(200, ms=(10, 40)))
            until(lambda order=order: not order.exists(), 20)  # type: ignore[misc]
            row.injected["leader stopped before its claim"] += 1
            stopped = time.monotonic()
            until(lambda epoch=epoch: _epoch(yard) > epoch, 30)  # type: ignore[misc]
            row.recovered(time.monotonic() - stopped, ttl_s + 1)
            yard.send(leader, signal.SIGCONT)
            witness.wait()
    assert set(row.attempts) == {1}, "no job was dispatched twice"


@fault(quick=True)
def test_clock_skew(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Clock skew: one worker two hours ahead, one two hours behind (libfaketime)"""
    library = _libfaketime()
    if library is None:
        pytest.skip("libfaketime is not installed")
    yard, witness = fleet(workers=0, adapters=False, lease_ms=5000)  # which outlasts a busy machine's stalls
    for name, offset in (("worker-1", "+2h"), ("worker-2", "-2h")):
        yard.worker(name, LD_PRELOAD=str(library), FAKETIME=offset, FAKETIME_DONT_FAKE_MONOTONIC="1", DONT_FAKE_MONOTONIC="1")
        row.injected[f"{offset} on {name}"] += 1
    yard.ready({"worker-1", "worker-2"})
    yard.add_adapters()
    with row.judging(yard, witness):
        witness.submit([witness.job(ms=11_000) for _ in range(32)])  # longer than two leases
        witness.submit(witness.jobs(100 if quick else 600))
        witness.wait()
        counts = yard.counts()
        assert (counts.get("leases_lapsed", 0), counts.get("deliveries_lapsed", 0)) == (0, 0), "no lease ended early"
        for name in ("worker-1",) if quick else ("worker-1", "worker-2"):
            yard.members[name].again_s = 30.0
            witness.submit(witness.jobs(200, ms=(50, 100)))
            until(lambda name=name: yard.outstanding(name), 10)  # type: ignore[misc]
            killed = yard.kill(name)
            row.injected["SIGKILL"] += 1
            row.recovered(witness.wait() - killed, yard.settings.lease_ms / 1000 + 5 + 3)  # nor late
            yard.members[name].again_s = 0.0
            yard.ready({"worker-1", "worker-2"})


def _libfaketime() -> Path | None:
    """The package's library, or the system's."""
    spec = importlib.util.find_spec("libfaketime")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    found = [path for root in roots for path in root.rglob("libfaketime.so.1")]
    found += list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return next(iter(found), None)


@fault(quick=True)
def test_cancel_at_every_state(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Cancel at every state: delayed, queued, claimed, on deck, running, about to be stored, being retried, ended"""
    yard, witness = fleet(workers=1, width=4)

    def cancel(state: str, refs: list[str]) -> None:
        with yard.client() as client:
            for ref in refs:
                client.cancel(split_ref(ref)[1])
        row.injected[state] += len(refs)

    def submit(count: int, **script: Any) -> list[str]:
        return witness.submit([witness.job(**script) for _ in range(count)], tenant="default")

    def status(ref: str) -> str:
        document = yard.ledger().show("default", [split_ref(ref)[1]])[0]
        return document["status"] if document else ""

    def sorted_out(refs: list[str]) -> dict[str, list[str]]:
        by: dict[str, list[str]] = {}
        for ref in refs:
            by.setdefault(status(ref), []).append(ref)
        return by

    with row.judging(yard, witness):
        for _ in range(1 if quick else 5):
            late = witness.submit([witness.job(fields={"not_before_s": 600.0}) for _ in range(3)], tenant="default")
            cancel("delayed", late)
            held = submit(30, ms=8_000)
            until(lambda held=held: len(sorted_out(held).get("running", [])) == 4, 20)  # type: ignore[misc]
            states = sorted_out(held)
            cancel("running", states["running"][:2])
            cancel("on deck", states["claimed"][:3])
            cancel("queued", states["queued"][:3])
            time.sleep(0.5)
            cancel("the rest", sorted(set(held) - set(states["running"][:2])))
            again = submit(1, retry=1, ms=5)
            until(lambda again=again: status(again[0]) == "delayed", 20)  # type: ignore[misc]
            cancel("being retried", again)
            order = yard.order("worker-1", "finish", "before", signal.SIGSTOP)
            storing = submit(4, ms=20)
            until(lambda order=order: not order.exists(), 20)  # type: ignore[misc]
            stale = yard.counts().get("stale", 0)
            waiting = submit(2, ms=20)  # claimed for the worker that stands still, or queued
            cancel("about to be stored", storing)
            cancel("claimed", waiting)
            yard.send("worker-1", signal.SIGCONT)
            until(lambda stale=stale: yard.counts().get("stale", 0) > stale, 20)  # type: ignore[misc]
            ended = submit(5, ms=5)
            witness.wait(ended)
            witness.read(ended)
            cancel("ended", ended)
            witness.read(ended)
        witness.read(list(witness.acknowledged))
        assert {witness.documents[ref]["status"] for ref in (*late, *held, *again, *storing, *waiting)} == {"cancelled"}
        assert {witness.documents[ref]["status"] for ref in ended} == {"succeeded"}


@fault(quick=True)
def test_recalls(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Whatever has not begun is recalled from its worker, at random, before and after it is taken, and while it begins"""
    yard, witness = fleet(workers=2, width=4, lease_ms=20_000, delivery_ms=20_000)  # none lapses, however busy the machine

    def recall() -> None:
        batches = [batch.decode() for name in ("worker-1", "worker-2") for batch in yard.outstanding(name)]
        if batches:
            row.injected["jobs recalled"] += yard.ledger().recall(epoch=_epoch(yard), batch=rng.choice(batches))

    with row.judging(yard, witness):
        with repeating(0.03, recall):
            for _ in range(1 if quick else 8):
                witness.submit(witness.jobs(150, ms=(5, 60)))
                until(lambda: yard.counts().get("queued", 0) < 50, 60)
            until(lambda: not any(yard.outstanding(name) for name in ("worker-1", "worker-2")), 60)
        witness.wait()
        assert row.injected["jobs recalled"] == yard.counts().get("recalled", 0) > 0
    assert set(row.attempts) == {1}, "it costs no attempt"
