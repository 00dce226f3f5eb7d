"""A worker's control process after its wake-ups, its store or its runner were away: the test plays runner and scheduler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fleet_support import until
from test_control_leases import READY, Bench, bench, one

from lorayard.errors import SetupError
from lorayard.ledger.audit import audit
from lorayard_workers.runner import Died

__all__ = ["bench", "one"]


def test_a_batch_whose_wake_up_never_comes_is_taken_by_the_second_heartbeat(one: Bench) -> None:
    (a,) = one.put("a")
    batch = one.claim()
    until(lambda: one.runner.works, 10, every_s=0.005)
    assert [work.batch for work in one.runner.works] == [batch]
    one.control.run_batch(batch)
    assert len(one.runner.works) == 1, "a wake-up that comes late does nothing"
    assert one.job(a)["status"] == "claimed"


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
