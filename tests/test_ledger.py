"""Every transition of the ledger, on a real server."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
import redis
from ledger_support import START_MS, ClockedLedger, make_entry, outlive

from lorayard.ledger.audit import audit
from lorayard.ledger.ledger import PART_BYTES, Ledger
from lorayard.ledger.records import End, EndStatus


class Yard:
    """A ledger under a clock of the test's own, with shorthands."""

    def __init__(self, client: redis.Redis) -> None:
        self.ledger = ClockedLedger(client)
        self.client = client
        self.now = START_MS
        self.advance(0)
        self.ledger.install()
        self.epoch = self.ledger.lead("s1", 10_000)
        self.batches = 0

    def advance(self, ms: int) -> None:
        self.now += ms
        self.ledger.set_clock(self.now)

    def put(self, *job_ids: str, **changes: Any) -> list[str]:
        answers = self.ledger.enqueue([make_entry(i, **changes) for i in job_ids], max_queued=1000)
        return [a.status for a in answers]

    def claim(self, n: int = 10, *, worker: str = "w1", digest: str = "base", tenant: str = "acme", most: int = 2) -> str:
        self.batches += 1
        batch = f"b{self.batches}"
        answer = self.ledger.claim(
            epoch=self.epoch, worker=worker, most=most, batch=batch, digest=digest, delivery_ms=5000, why="due", takes=[(tenant, n)]
        )
        return batch if answer[0] == "ok" else answer[0]

    def status(self, job_id: str) -> str | None:
        doc = self.ledger.show("acme", [job_id])[0]
        return None if doc is None else doc["status"]

    def counts_are_exact(self) -> bool:
        queued = sum(g.jobs for g in self.ledger.snapshot().groups)
        return queued == self.ledger.counts().get("queued", 0)


@pytest.fixture
def yard(store: redis.Redis) -> Yard:
    return Yard(store)


OUTCOME = msgspec.json.encode({"response": {"object": "chat.completion", "choices": []}, "timings_ms": {"prefill": 10, "decode": 20}})


def test_a_job_from_enqueue_to_its_document(yard: Yard) -> None:
    assert yard.put("a") == ["queued"]
    assert yard.status("a") == "queued"
    yard.advance(100)
    batch = yard.claim()
    assert yard.status("a") == "claimed"
    yard.advance(7)
    taken = yard.ledger.take(batch, "w1", "i1", 5000)
    assert taken is not None
    assert [j.ref for j in taken.jobs] == ["acme/a"]
    assert taken.jobs[0].request == b'{"messages":[]}'
    assert yard.ledger.start(batch, taken.fence, ["acme/a"]) == []
    assert yard.status("a") == "running"
    yard.advance(50)
    assert yard.ledger.finish(batch, taken.fence, [End("acme/a", "succeeded", OUTCOME, tokens=12)]) == ["stored"]
    doc = yard.ledger.show("acme", ["a"])[0]
    assert doc is not None
    assert (doc["status"], doc["attempts"], doc["worker"], doc["batch"], doc["batch_size"], doc["why"]) == (
        *("succeeded", 1, "w1", batch, 1),
        "due",
    )
    latencies = doc["latencies_ms"]
    assert latencies["queued"] == 100
    assert latencies["dispatched"] == 7
    assert latencies["stored"] == 20
    assert latencies["total"] == 157 == sum(v for k, v in latencies.items() if k != "total")
    assert doc["response"]["id"] == "a"
    view = yard.ledger.snapshot()
    assert view.served == {"acme": 12}
    assert view.in_flight == []
    for part in ("tries", "begun:", "batch:", "members:", "queue:", "leases"):
        assert not yard.client.keys(f"ly:{{t}}:{part}*")


def test_an_idempotency_key_gives_the_same_id_and_refuses_another_body(yard: Yard) -> None:
    first, again, other = (
        yard.ledger.enqueue([make_entry(i, idem="k", body_hash=h)], max_queued=9)[0] for i, h in (("a", "h1"), ("b", "h1"), ("c", "h2"))
    )
    assert (first.id, first.status) == ("a", "queued")
    assert (again.id, again.status) == ("a", "exists")
    assert other.status == "conflict"
    assert yard.ledger.counts()["enqueued"] == 1
    same_call = yard.ledger.enqueue([make_entry(i, idem="z", body_hash="h") for i in "xy"], max_queued=9)
    assert [(e.id, e.status) for e in same_call] == [("x", "queued"), ("x", "exists")]


def test_a_full_backlog_refuses_and_stores_nothing(yard: Yard) -> None:
    answers = yard.ledger.enqueue([make_entry(str(i)) for i in range(5)], max_queued=3)
    assert [a.status for a in answers] == ["queued"] * 3 + ["full"] * 2
    assert yard.status("4") is None
    assert yard.counts_are_exact()


def test_the_most_due_job_goes_first(yard: Yard) -> None:
    yard.put("late", wait_ms=9000)
    yard.put("soon", wait_ms=10)
    yard.put("sooner", wait_ms=5)
    taken = yard.ledger.take(yard.claim(2), "w1", "i", 5000)
    assert taken is not None
    assert [job.ref for job in taken.jobs] == ["acme/sooner", "acme/soon"]


def test_a_lost_wake_up_costs_no_attempt(yard: Yard) -> None:
    yard.put("a")
    batch = yard.claim()
    yard.advance(5001)
    assert yard.ledger.reap().undelivered == 1
    assert yard.status("a") == "queued"
    assert yard.ledger.take(batch, "w1", "i", 5000) is None
    taken = yard.ledger.take(yard.claim(), "w1", "i", 5000)
    assert taken is not None
    assert taken.jobs[0].attempts == 0


def test_taking_begins_a_lease_of_its_own(yard: Yard) -> None:
    yard.put("a")
    batch = yard.claim()
    yard.advance(4000)
    assert yard.ledger.take(batch, "w1", "i", 5000) is not None
    yard.advance(4999)
    assert not any(yard.ledger.reap())
    yard.advance(1)
    assert yard.ledger.reap().lapsed == 1


def test_taking_twice_is_harmless(yard: Yard) -> None:
    yard.put("a")
    batch = yard.claim()
    assert yard.ledger.take(batch, "w1", "i", 5000) is not None
    assert yard.ledger.take(batch, "w1", "i", 5000) is None
    assert yard.ledger.take(batch, "w2", "i", 5000) is None


def test_a_zombie_is_fenced_off(yard: Yard) -> None:
    yard.put("a")
    old = yard.claim()
    taken = yard.ledger.take(old, "w1", "i", 5000)
    assert taken is not None
    yard.ledger.start(old, taken.fence, ["acme/a"])
    yard.advance(5001)
    yard.ledger.reap()
    new = yard.claim(worker="w2")
    second = yard.ledger.take(new, "w2", "i", 5000)
    assert second is not None
    assert second.jobs[0].attempts == 1
    assert yard.ledger.finish(old, taken.fence, [End("acme/a", "succeeded", OUTCOME)]) == ["stale"]
    assert yard.status("a") == "claimed"
    assert yard.ledger.finish(new, second.fence, [End("acme/a", "succeeded", OUTCOME)]) == ["stored"]
    assert yard.ledger.finish(new, second.fence, [End("acme/a", "succeeded", OUTCOME)]) == ["already"]
    assert yard.ledger.finish(old, taken.fence, [End("acme/a", "failed", OUTCOME)]) == ["stale"]
    assert yard.ledger.counts()["stale"] == 2
    assert yard.status("a") == "succeeded"


def test_with_another_fence_nothing_of_a_batch_can_be_had(yard: Yard) -> None:
    yard.put("begun", "waits")
    batch = yard.claim()
    taken = yard.ledger.take(batch, "w1", "i", 5000)
    assert taken is not None
    yard.ledger.start(batch, taken.fence, ["acme/begun"])
    for fence in (taken.fence - 1, taken.fence + 1):
        assert yard.ledger.start(batch, fence, ["acme/waits"]) == ["acme/waits"]
        assert yard.ledger.give_back(batch, fence, ["acme/waits"]) == 0
        assert yard.ledger.renew([(batch, fence)], 5000) == ([batch], [])
        assert yard.ledger.finish(batch, fence, [End("acme/begun", "succeeded", OUTCOME)]) == ["stale"]
    assert [yard.status(i) for i in ("begun", "waits")] == ["running", "claimed"]


ENDS: tuple[EndStatus, ...] = ("succeeded", "failed")


def test_a_batch_ends_only_its_own_jobs_and_each_once(yard: Yard) -> None:
    yard.put("mine", "others")
    mine, others = yard.claim(1), yard.claim(1)
    taken = yard.ledger.take(mine, "w1", "i", 5000)
    assert taken is not None
    ends = [End(ref, status, OUTCOME) for ref in ("acme/mine", "acme/others") for status in ENDS]
    assert yard.ledger.finish(mine, taken.fence, ends) == ["stored", "already", "stale", "stale"]
    assert [yard.status(i) for i in ("mine", "others")] == ["succeeded", "claimed"]
    assert yard.ledger.counts()["succeeded"] == 1
    assert yard.ledger.take(others, "w1", "i", 5000) is not None


def test_renewing_keeps_a_lease_and_tells_what_is_lost(yard: Yard) -> None:
    yard.put("a")
    batch = yard.claim()
    taken = yard.ledger.take(batch, "w1", "i", 5000)
    assert taken is not None
    for _ in range(4):
        yard.advance(4000)
        assert yard.ledger.renew([(batch, taken.fence)], 5000) == ([], [])
        assert not any(yard.ledger.reap())
    yard.advance(5001)
    yard.ledger.reap()
    assert yard.ledger.renew([(batch, taken.fence)], 5000) == ([batch], [])
    assert yard.ledger.start(batch, taken.fence, ["acme/a"]) == ["acme/a"]


def test_a_job_that_brings_its_worker_down_at_the_cap_is_buried_and_its_mates_are_not(yard: Yard) -> None:
    yard.put("poison", "mate")
    for attempt in range(3):
        batch = yard.claim(worker=f"w{attempt}")
        taken = yard.ledger.take(batch, f"w{attempt}", "i", 5000)
        assert taken is not None
        yard.ledger.start(batch, taken.fence, ["acme/poison"])
        yard.advance(5001)
        yard.ledger.reap()
    doc = yard.ledger.show("acme", ["poison"])[0]
    assert doc is not None
    assert (doc["status"], doc["error"]["code"], doc["attempts"]) == ("failed", "worker_lost", 3)
    assert yard.status("mate") == "queued"
    assert yard.ledger.list_ids("acme", limit=9, dead=True) == ["poison"]
    assert yard.counts_are_exact()


def test_an_id_that_is_used_again_is_no_dead_letter_any_more(yard: Yard) -> None:
    """Its result has expired: a job of that id is another one, which must not be queued twice."""
    chosen = {"idem": "id x", "body_hash": "h", "max_attempts": 1}
    yard.put("x", **chosen)
    batch = yard.claim()
    taken = yard.ledger.take(batch, "w1", "i", 5000)
    assert taken is not None
    assert yard.ledger.finish(batch, taken.fence, [End("acme/x", "retry", OUTCOME)]) == ["stored"]
    assert yard.ledger.list_ids("acme", limit=9, dead=True) == ["x"]
    outlive(yard.client)
    assert yard.put("x", **chosen) == ["queued"]
    yard.claim()
    assert yard.ledger.list_ids("acme", limit=9, dead=True) == []
    assert yard.ledger.revive("acme", ["x"]) == ["missing"]
    assert audit(yard.ledger) == []


def test_a_dead_letter_that_is_tried_again_has_no_deadline(yard: Yard) -> None:
    yard.put("x", deadline_ms=9000, max_attempts=1)
    batch = yard.claim()
    taken = yard.ledger.take(batch, "w1", "i", 5000)
    assert taken is not None
    yard.ledger.finish(batch, taken.fence, [End("acme/x", "retry", OUTCOME)])
    assert yard.ledger.revive("acme", ["x"]) == ["queued"]
    assert audit(yard.ledger) == []
    yard.advance(9001)
    assert yard.ledger.reap().expired == 0


def test_retry_waits_and_counts_and_later_counts_nothing(yard: Yard) -> None:
    yard.put("a", "b", max_attempts=2)
    for attempt in range(2):
        batch = yard.claim()
        taken = yard.ledger.take(batch, "w1", "i", 5000)
        assert taken is not None
        yard.ledger.start(batch, taken.fence, ["acme/a", "acme/b"])
        ends = [End("acme/a", "retry", OUTCOME, delay_ms=500), End("acme/b", "later", delay_ms=500)]
        assert yard.ledger.finish(batch, taken.fence, ends) == ["retried" if attempt == 0 else "stored", "retried"]
        assert yard.status("b") == "delayed"
        yard.advance(501)
        assert yard.ledger.reap().woken == (2 if attempt == 0 else 1)
    assert yard.status("a") == "failed"
    (b,) = yard.ledger.show("acme", ["b"])
    assert b is not None
    assert (b["status"], b["attempts"]) == ("queued", 0)


def test_why_a_job_came_back_is_told_while_it_waits_and_after_its_end(yard: Yard) -> None:
    def why(code: str, message: str) -> bytes:
        return msgspec.json.encode({"error": {"message": message, "type": "server_error", "code": code, "param": None}})

    def finish(job_id: str, status: EndStatus, outcome: bytes) -> dict[str, Any]:
        batch = yard.claim()
        taken = yard.ledger.take(batch, "w1", "i", 5000)
        assert taken is not None
        yard.ledger.finish(batch, taken.fence, [End(f"acme/{job_id}", status, outcome, delay_ms=0)])
        (document,) = yard.ledger.show("acme", [job_id])
        assert document is not None
        return document

    yard.put("a")
    assert finish("a", "later", why("over_capacity", 'fault "498" at a/b\n'))["postponed_why"] == {
        "code": "over_capacity",
        "message": 'fault "498" at a/b\n',
    }
    document = finish("a", "later", why("rate_limited", "ü" * 500))
    assert document["postponed_why"] == {"code": "rate_limited", "message": "ü" * 150 + "…"}
    document = finish("a", "later", b"{}")
    assert (document["postponed"], document["postponed_why"]["code"]) == (3, "rate_limited"), "nothing else was told since"
    document = finish("a", "succeeded", OUTCOME)
    assert (document["postponed"], document["postponed_why"]["code"], document["error"]) == (3, "rate_limited", None)
    yard.put("b", deadline_ms=5000)
    assert finish("b", "retry", why("bad", "no"))["postponed_why"] == {"code": "bad", "message": "no"}
    yard.advance(5001)
    assert yard.ledger.reap().expired == 1
    (ended,) = yard.ledger.show("acme", ["b"])
    assert ended is not None
    assert (ended["status"], ended["error"]["code"], ended["postponed_why"]["code"]) == ("expired", "expired", "bad")
    yard.put("c")
    assert "postponed_why" not in finish("c", "succeeded", OUTCOME)
    assert audit(yard.ledger) == []


def test_what_fails_before_it_starts_is_not_tried_for_ever(yard: Yard) -> None:
    yard.put("a", max_attempts=2)
    for expected in ("retried", "stored"):
        batch = yard.claim()
        taken = yard.ledger.take(batch, "w1", "i", 5000)
        assert taken is not None
        assert yard.ledger.finish(batch, taken.fence, [End("acme/a", "retry", OUTCOME)]) == [expected]
    assert yard.status("a") == "failed"


def test_cancel_at_every_state(yard: Yard) -> None:
    yard.put("queued", "running")
    yard.put("delayed", not_before_ms=1000)
    yard.ledger.cancel("acme", ["queued"])
    batch = yard.claim()
    taken = yard.ledger.take(batch, "w1", "i", 5000)
    assert taken is not None
    yard.ledger.start(batch, taken.fence, ["acme/running"])
    assert yard.ledger.cancel("acme", ["running", "delayed", "queued", "none"]) == ["cancelled", "cancelled", "ended", "missing"]
    assert yard.ledger.renew([(batch, taken.fence)], 5000) == ([batch], [(batch, "acme/running")])
    assert yard.ledger.finish(batch, taken.fence, [End("acme/running", "succeeded", OUTCOME)]) == ["stale"]
    assert [yard.status(i) for i in ("queued", "running", "delayed")] == ["cancelled"] * 3
    yard.advance(2000)
    assert yard.ledger.reap().woken == 0
    assert yard.counts_are_exact()


def test_another_tenant_sees_and_cancels_nothing(yard: Yard) -> None:
    yard.put("a")
    assert yard.ledger.show("other", ["a"]) == [None]
    assert yard.ledger.cancel("other", ["a"]) == ["missing"]
    assert yard.status("a") == "queued"


def test_a_deadline_expires_what_was_not_started(yard: Yard) -> None:
    yard.put("queued", deadline_ms=1000)
    yard.put("waits", "runs", deadline_ms=1000, digest="d1")
    batch = yard.claim(digest="d1")
    taken = yard.ledger.take(batch, "w1", "i", 60_000)
    assert taken is not None
    yard.ledger.start(batch, taken.fence, ["acme/runs"])
    yard.advance(1001)
    assert yard.ledger.reap().expired == 2
    assert [yard.status(i) for i in ("queued", "waits", "runs")] == ["expired", "expired", "running"]
    assert yard.ledger.start(batch, taken.fence, ["acme/waits"]) == ["acme/waits"]
    assert yard.ledger.renew([(batch, taken.fence)], 5000) == ([], [(batch, "acme/waits")])
    assert yard.ledger.finish(batch, taken.fence, [End("acme/runs", "succeeded", OUTCOME)]) == ["stored"]
    assert yard.ledger.snapshot().in_flight == []
    assert yard.counts_are_exact()


def test_give_back_and_a_new_process_of_the_same_name_cost_no_attempt(yard: Yard) -> None:
    yard.put("a", "b")
    batch = yard.claim()
    taken = yard.ledger.take(batch, "w1", "i1", 5000)
    assert taken is not None
    yard.ledger.start(batch, taken.fence, ["acme/a"])
    assert yard.ledger.give_back(batch, taken.fence, ["acme/a", "acme/b"]) == 1
    assert yard.status("b") == "queued"
    waiting = yard.claim()
    assert yard.ledger.hello("w1", "i2") == 1  # the batch that i1 had taken; the one on its way will reach i2
    assert yard.status("a") == "queued"
    assert yard.ledger.take(waiting, "w1", "i2", 5000) is not None
    assert yard.counts_are_exact()


def test_what_has_not_begun_is_recalled_and_waits_as_if_it_had_never_been_claimed(yard: Yard) -> None:
    for job_id, changes in (("third", {"wait_ms": 9000}), ("second", {"wait_ms": 3000}), ("first", {"deadline_ms": 2000})):
        yard.put(job_id, **changes)
    yard.advance(100)
    on_its_way, at_worker = yard.claim(1), yard.claim(2, most=9)
    grant = yard.ledger.take(at_worker, "w1", "i", 5000)
    assert grant is not None
    assert yard.ledger.start(at_worker, grant.fence, ["acme/third"]) == []
    assert {f.batch: (f.left, f.waiting) for f in yard.ledger.snapshot().in_flight} == {on_its_way: (1, 1), at_worker: (2, 1)}
    yard.put("urgent", wait_ms=10)
    assert yard.ledger.recall(epoch=yard.epoch - 1, batch=at_worker) == 0, "another leads"
    assert [yard.ledger.recall(epoch=yard.epoch, batch=b) for b in (on_its_way, at_worker, at_worker, on_its_way, "b9")] == [1, 1, 0, 0, 0]
    assert {f.batch: (f.left, f.waiting) for f in yard.ledger.snapshot().in_flight} == {at_worker: (1, 0)}, "what is left of it runs"
    # Whoever had it is refused, and none of it is lost, or has used an attempt.
    assert yard.ledger.take(on_its_way, "w1", "i", 5000) is None
    assert yard.ledger.start(at_worker, grant.fence, ["acme/second"]) == ["acme/second"]
    assert yard.ledger.finish(at_worker, grant.fence, [End("acme/second", "succeeded", OUTCOME)]) == ["stale"]
    assert yard.ledger.renew([(at_worker, grant.fence)], 5000) == ([], [(at_worker, "acme/second")])
    again = yard.ledger.take(yard.claim(most=9), "w1", "i", 5000)
    assert again is not None
    order = [("acme/urgent", 0, 0), ("acme/first", 0, 0), ("acme/second", 0, 0)]
    assert [(job.ref, job.attempts, job.laters) for job in again.jobs] == order
    assert yard.ledger.finish(at_worker, grant.fence, [End("acme/third", "succeeded", OUTCOME)]) == ["stored"]
    assert yard.ledger.counts()["recalled"] == 2
    assert yard.counts_are_exact()
    assert audit(yard.ledger) == []


def test_two_schedulers_one_leads_and_a_stale_epoch_claims_nothing(yard: Yard) -> None:
    assert yard.ledger.lead("s2", 10_000) == 0
    yard.advance(10_001)
    new = yard.ledger.lead("s2", 10_000)
    assert new == yard.epoch + 1
    yard.put("a")
    assert yard.claim() == "epoch"
    yard.ledger.resign("s2")
    assert yard.ledger.lead("s1", 10_000) == new + 1


def test_a_worker_has_at_most_two_batches_outstanding(yard: Yard) -> None:
    yard.put("a", "b", "c")
    assert [yard.claim(1) for _ in range(3)] == ["b1", "b2", "busy"]
    assert len(yard.ledger.snapshot().in_flight) == 2


def test_events_tell_of_groups_ends_and_batches(yard: Yard) -> None:
    after, before = yard.ledger.snapshot().last_event, yard.ledger.last_end()
    yard.put("a")
    batch = yard.claim()
    taken = yard.ledger.take(batch, "w1", "i", 5000)
    assert taken is not None
    yard.ledger.finish(batch, taken.fence, [End("acme/a", "succeeded", OUTCOME)])
    last, events = yard.ledger.events(after, 0)
    assert [(e.kind, e.values) for e in events] == [("queued", ["base:acme"]), ("batch", [batch])]
    assert last == yard.ledger.snapshot().last_event
    assert yard.ledger.ends(before, 0) == (yard.ledger.last_end(), ["acme/a"])


def test_the_library_survives_a_flush_of_scripts_and_functions(store: redis.Redis) -> None:
    ledger = Ledger(store, "u", result_ttl_s=60)
    ledger.install()
    store.script_flush()
    store.function_flush()
    assert ledger.snapshot().groups == []


def test_bulk_enqueue_of_many_groups(yard: Yard) -> None:
    entries = [make_entry(f"j{i}", digest=f"d{i % 50}", tenant=f"t{i % 4}") for i in range(5000)]
    started = time.monotonic()
    assert {a.status for a in yard.ledger.enqueue(entries, max_queued=10_000)} == {"queued"}
    assert time.monotonic() - started < 30
    assert sum(g.jobs for g in yard.ledger.snapshot().groups) == 5000
    assert yard.counts_are_exact()


def test_an_end_that_is_none_changes_nothing(yard: Yard) -> None:
    yard.put("a", "b")
    taken = yard.ledger.take(yard.claim(), "w1", "i", 5000)
    assert taken is not None
    ends = [End("acme/a", "succeeded", OUTCOME), End("acme/b", "succeeded", OUTCOME, tokens=-5)]
    with pytest.raises(RuntimeError, match="not an end"):
        yard.ledger.finish(taken.batch, taken.fence, ends)
    assert [yard.status("a"), yard.status("b")] == ["claimed", "claimed"]
    assert yard.ledger.finish(taken.batch, taken.fence, [end._replace(tokens=5) for end in ends]) == ["stored", "stored"]


def test_large_jobs_are_enqueued_in_parts(yard: Yard) -> None:
    def calls() -> int:
        return int(yard.client.info("commandstats")["cmdstat_fcall"]["calls"])

    large = make_entry("", request=b'"' + b"x" * (PART_BYTES // 2) + b'"')
    before = calls()
    answers = yard.ledger.enqueue([large._replace(id=i) for i in "abaa"], max_queued=2)
    assert calls() - before == 4
    assert [(a.id, a.status) for a in answers] == [("a", "queued"), ("b", "queued"), ("a", "exists"), ("a", "exists")]
    assert yard.ledger.enqueue([], max_queued=1) == []
    assert calls() - before == 4


def test_any_number_of_jobs_in_one_call(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lua hands a command, or a function, no more than some thousand arguments at once."""
    monkeypatch.setattr("lorayard.ledger.ledger.PART_JOBS", 10**6)
    ids = [f"j{i}" for i in range(9_000)]
    refs = [f"acme/{i}" for i in ids]
    yard.ledger.enqueue([make_entry(i) for i in ids], max_queued=10**6)
    taken = yard.ledger.take(yard.claim(10**6), "w1", "i", 5000)
    assert taken is not None
    assert len(taken.jobs) == len(ids)
    assert yard.ledger.start(taken.batch, taken.fence, refs) == []
    assert set(yard.ledger.finish(taken.batch, taken.fence, [End(ref, "later") for ref in refs])) == {"retried"}
    taken = yard.ledger.take(yard.claim(10**6), "w1", "i", 5000)
    assert taken is not None
    assert yard.ledger.give_back(taken.batch, taken.fence, refs) == len(refs)
    assert {d["postponed"] for d in yard.ledger.show("acme", ids) if d} == {1}
    assert set(yard.ledger.cancel("acme", ids)) == {"cancelled"}
    assert set(yard.ledger.delete("acme", ids)) == {"deleted"}
    assert yard.counts_are_exact()
