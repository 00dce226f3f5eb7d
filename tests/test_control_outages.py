"""A worker's control process after its wake-ups, its store or its runner were away: the test plays runner and scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fleet_support import until
from ledger_support import PREFIX
from test_control_leases import READY, Bench, bench, one

from lorayard.errors import SetupError
from lorayard.ledger.audit import audit
from lorayard_workers.runner import Died, Started

__all__ = ["bench", "one"]


def _hear_nothing(worker: str, until: threading.Event) -> Iterator[Any]:
    until.wait()
    yield from ()


@pytest.mark.parametrize("heartbeat_ms", [50, 60_000], ids=["the second heartbeat", "the ledger's word"])
def test_a_batch_whose_wake_up_never_comes_is_taken_by(bench: Callable[..., Bench], heartbeat_ms: int) -> None:
    one = bench(heartbeat_ms=heartbeat_ms, lease_ms=4 * heartbeat_ms)
    if heartbeat_ms == 50:
        one.ledger.words = _hear_nothing  # type: ignore[method-assign]
    one.start()
    (a,) = one.put("a")
    until(lambda: heartbeat_ms == 50 or one.ledger.client.pubsub_numsub(f"{PREFIX}to:w")[0][1], 10, every_s=0.005)
    batch = one.claim()
    until(lambda: one.runner.works, 10, every_s=0.005)
    assert [work.batch for work in one.runner.works] == [batch]
    one.control.run_batch(batch)
    assert len(one.runner.works) == 1, "a wake-up that comes late does nothing"
    assert one.job(a)["status"] == "claimed"


def test_a_job_that_begins_while_its_worker_leaves_is_put_off_at_no_cost(one: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger has its start, and the reply is on its way, when the worker gives back all that has not begun."""
    (a,) = one.put("a", max_attempts=1)
    batch, gone, start = one.dispatch(), threading.Event(), one.ledger.start

    def slow(*args: Any) -> list[str]:
        stop = start(*args)
        gone.wait(10)
        return stop

    monkeypatch.setattr(one.ledger, "start", slow)
    one.runner.emit(Started(batch, [a]))
    one.until(a, "running", attempts=1)
    leaving = threading.Thread(target=one.control.close)
    leaving.start()
    document = one.until(a, "queued", attempts=0)
    gone.set()
    leaving.join(10)
    assert document["postponed"] == 1


def test_a_job_that_begins_just_before_it_is_given_back_is_put_off_at_no_cost(one: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (a,) = one.put("a", max_attempts=1)
    batch, give_back = one.dispatch(), one.ledger.give_back

    def late(*args: Any) -> int:
        one.begin(batch, a)
        return give_back(*args)

    monkeypatch.setattr(one.ledger, "give_back", late)
    one.control.close()
    assert one.until(a, "queued", attempts=0)["postponed"] == 1


def test_a_job_that_kills_the_process_while_it_is_read_is_alone_to_blame(one: Bench) -> None:
    read, beside, waits = one.put("read", "beside", "waits")
    batch = one.dispatch()
    one.begin(batch, beside)
    one.runner.emit(Died("SIGSEGV", [beside], [read, waits], read))
    one.until(read, "delayed", 1)
    one.until(beside, "queued", 0)
    one.until(waits, "queued", 0)
    one.runner.emit(READY)
    assert audit(one.ledger) == []


def test_a_second_worker_of_the_same_name_is_refused_and_one_after_it_is_not(one: Bench, bench: Callable[..., Bench]) -> None:
    twin = bench()
    with pytest.raises(SetupError, match="LORAYARD_WORKER_NAME"):
        twin.control.start()
    one.control.close()
    twin.control.start()


def test_leases_outlast_an_outage_in_which_nobody_could_renew(one: Bench) -> None:
    (a,) = one.put("a")
    batch = one.dispatch()
    one.begin(batch, a)
    assert not any(one.ledger.reap(grace_ms=5000))
    one.ledger.set_clock(one.now + 60_000)  # the store was away for a minute, and so was whoever reaps
    one.now += 60_000
    assert not any(one.ledger.reap(grace_ms=5000))
    until(lambda: one.expiry(batch) >= one.now + 5000, 10, every_s=0.005)
    one.control._closing.set()  # from here on nobody renews
    one.advance(1000)
    assert not any(one.ledger.reap(grace_ms=5000))
    assert one.job(a)["attempts"] == 1
    for _ in range(12):
        one.advance(1000)
        lapsed = one.ledger.reap(grace_ms=5000).lapsed
        if lapsed:
            break
    assert lapsed == 1, "a worker that is gone loses its lease all the same"
