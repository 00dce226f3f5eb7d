"""What is done to a ledger from outside the path of a job: hold back, delete, retry dead letters, refuse for want of memory, audit."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
import redis
from ledger_support import PREFIX, START_MS, ClockedLedger, make_entry

from lorayard.errors import Unavailable
from lorayard.ledger.audit import audit
from lorayard.ledger.records import End, Taken

OUTCOME = b'{"response":{"choices":[]}}'


class Yard:
    """A ledger with one leader, whose clock the test moves."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.ledger = ClockedLedger(client)
        self.now = START_MS
        self.advance(0)
        self.ledger.install()
        self.epoch = self.ledger.lead("s", 10**9)
        self._batches = 0

    def advance(self, ms: int) -> None:
        self.now += ms
        self.ledger.set_clock(self.now)

    def put(self, *job_ids: str, **changes: object) -> list[str]:
        return [a.status for a in self.ledger.enqueue([make_entry(i, **changes) for i in job_ids], max_queued=1000)]

    def claim(self, *, digest: str = "base", takes: list[tuple[str, int]] | None = None, worker: str = "w") -> tuple[str, str]:
        self._batches += 1
        batch = f"b{self._batches}"
        answer, _ = self.ledger.claim(
            epoch=self.epoch, worker=worker, most=9, batch=batch, digest=digest, delivery_ms=5000, why="due", takes=takes or [("acme", 99)]
        )
        return answer, batch

    def run(self, *, worker: str = "w", start: bool = True) -> Taken:
        """The queued jobs of acme at a worker, running."""
        answer, batch = self.claim(worker=worker)
        assert answer == "ok"
        taken = self.ledger.take(batch, worker, "i", 5000)
        assert taken is not None
        if start:
            assert self.ledger.start(batch, taken.fence, [job.ref for job in taken.jobs]) == []
        return taken

    def status(self, job_id: str) -> str | None:
        document = self.ledger.show("acme", [job_id])[0]
        return document["status"] if document else None

    def bury(self, job_id: str, **changes: object) -> None:
        """Make a dead letter of a job of one attempt."""
        self.put(job_id, max_attempts=1, **changes)
        taken = self.run()
        assert self.ledger.finish(taken.batch, taken.fence, [End(f"acme/{job_id}", "retry", b'{"error":{"code":"worker_died"}}')]) == [
            "stored"
        ]

    def keys_with(self, word: str) -> list[str]:
        """Keys that name it, or hold it in a value, the streams of hints apart."""
        found = []
        for key in self.client.scan_iter(count=1000):
            if key.endswith((b":events", b":ends")):
                continue
            kind = str(self.client.type(key), "ascii")  # type: ignore[arg-type]
            readers = {"string": "GET {}", "hash": "HGETALL {}", "set": "SMEMBERS {}", "zset": "ZRANGE {} 0 -1"}
            value: object = self.client.execute_command(*readers[kind].format(key.decode()).split(" "))  # type: ignore[no-untyped-call]
            if word in key.decode() or word in str(value):
                found.append(key.decode())
        return found


@pytest.fixture
def yard(store: redis.Redis) -> Yard:
    return Yard(store)


# -- holding back ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["pool", "adapter:d1", "tenant:acme", "group:d1:acme"])
def test_what_is_paused_is_not_claimed_until_it_is_resumed(yard: Yard, what: str) -> None:
    yard.put("mine", digest="d1")
    yard.put("other-adapter", digest="d2")
    yard.put("other-tenant", digest="d1", tenant="globex")
    assert yard.ledger.pause(what)
    assert not yard.ledger.pause(what)
    assert yard.ledger.paused() == [what]
    held = {
        "pool": {("d1", "acme"), ("d2", "acme"), ("d1", "globex")},
        "adapter:d1": {("d1", "acme"), ("d1", "globex")},
        "tenant:acme": {("d1", "acme"), ("d2", "acme")},
        "group:d1:acme": {("d1", "acme")},
    }[what]
    shown = {(g.digest, g.tenant) for g in yard.ledger.snapshot().groups if g.jobs}
    assert shown == {("d1", "acme"), ("d2", "acme"), ("d1", "globex")} - held
    for digest, tenant in held:
        assert yard.claim(digest=digest, takes=[(tenant, 9)])[0] in ("paused", "empty")
    for digest, tenant in shown:
        assert yard.claim(digest=digest, takes=[(tenant, 9)])[0] == "ok"
    assert yard.put("late", digest="d1") == ["queued"], "jobs are accepted all the same"
    after = yard.ledger.snapshot().last_event
    assert yard.ledger.resume(what)
    assert not yard.ledger.resume(what)
    told = {value for event in yard.ledger.events(after, 0)[1] if event.kind == "queued" for value in event.values}
    assert told >= {f"{digest}:{tenant}" for digest, tenant in held}, "the scheduler hears of what may be planned again"
    assert yard.claim(digest="d1")[0] == "ok"
    assert audit(yard.ledger) == []


def test_a_paused_job_expires_and_can_be_cancelled(yard: Yard) -> None:
    yard.put("due", deadline_ms=100)
    yard.put("unwanted")
    yard.ledger.pause("pool")
    yard.advance(101)
    assert yard.ledger.reap().expired == 1
    assert yard.ledger.cancel("acme", ["unwanted"]) == ["cancelled"]
    assert yard.status("due") == "expired"


def test_what_a_worker_has_goes_on_through_a_pause(yard: Yard) -> None:
    yard.put("a")
    taken = yard.run()
    yard.ledger.pause("pool")
    assert yard.ledger.renew([(taken.batch, taken.fence)], 5000) == ([], [])
    assert yard.ledger.finish(taken.batch, taken.fence, [End("acme/a", "succeeded", OUTCOME)]) == ["stored"]


# -- deleting ----------------------------------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[Yard], object]] = {
    "queued": lambda yard: yard.put("unique", idem="key-of-unique", body_hash="h", deadline_ms=9000),
    "delayed": lambda yard: yard.put("unique", idem="key-of-unique", body_hash="h", not_before_ms=500),
    "claimed": lambda yard: (yard.put("unique", "mate", idem=""), yard.claim()),
    "running": lambda yard: (yard.put("unique", "mate", deadline_ms=9000), yard.run()),
    "failed": lambda yard: yard.bury("unique", idem="key-of-unique", body_hash="h"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_deleted_job_leaves_no_key_behind(yard: Yard, place: str) -> None:
    PLACES[place](yard)
    assert yard.status("unique") == place
    assert yard.ledger.delete("globex", ["unique"]) == ["missing"], "another tenant's"
    assert yard.ledger.delete("acme", ["unique", "nothing"]) == ["deleted", "missing"]
    assert yard.status("unique") is None
    if place in ("claimed", "running"):
        (told,) = yard.keys_with("unique")
        assert told == f"{PREFIX}stop:b1", "what tells the worker to stop"
        assert yard.ledger.renew([("b1", 1)], 5000)[1] == [("b1", "acme/unique")]
    assert yard.keys_with("unique") == []
    assert yard.put("unique") == ["queued"], "as if it had never been"
    assert audit(yard.ledger) == []


def test_many_jobs_at_many_workers_are_found_with_one_look_at_each_batch(yard: Yard) -> None:
    ids = [f"j{n}" for n in range(60)]
    yard.put(*ids)
    for n in range(20):
        answer, batch = yard.claim(worker=f"w{n}", takes=[("acme", 3)])
        assert answer == "ok"
        taken = yard.ledger.take(batch, f"w{n}", "i", 5000)
        assert taken is not None
        yard.ledger.start(batch, taken.fence, [job.ref for job in taken.jobs[:2]])
    yard.put("waits")
    yard.client.config_resetstat()
    shown = yard.ledger.show("acme", [*ids, "nobody", "waits", ids[0]])
    stats = yard.client.info("commandstats")
    assert stats["cmdstat_smismember"]["calls"] <= 20
    assert stats["cmdstat_sismember"]["calls"] <= 61
    documents = [document for document in shown if document is not None]
    assert [(d["id"], d["status"], d["worker"]) for d in documents[-2:]] == [("waits", "queued", None), ("j0", "running", "w0")]
    assert Counter((d["status"], d["attempts"]) for d in documents[:60]) == {("running", 1): 40, ("claimed", 0): 20}
    assert Counter(d["worker"] for d in documents[:60]) == {f"w{n}": 3 for n in range(20)}


def test_more_jobs_than_a_command_of_a_function_may_have_arguments_are_shown(yard: Yard) -> None:
    ids = [f"j{n}" for n in range(9000)]
    for start in range(0, 9000, 1000):
        yard.ledger.enqueue([make_entry(job_id) for job_id in ids[start : start + 1000]], max_queued=10_000)
    for n in range(3):
        assert yard.claim(worker=f"w{n}", takes=[("acme", 3000)])[0] == "ok"
    assert Counter(d and d["worker"] for d in yard.ledger.show("acme", ids)) == {f"w{n}": 3000 for n in range(3)}


def test_a_late_result_of_a_deleted_job_is_refused(yard: Yard) -> None:
    yard.put("a", "b")
    taken = yard.run()
    yard.ledger.delete("acme", ["a"])
    assert yard.ledger.finish(taken.batch, taken.fence, [End(f"acme/{i}", "succeeded", OUTCOME) for i in "ab"]) == ["stale", "stored"]
    assert yard.keys_with("acme/a") in ([], [f"{PREFIX}stop:{taken.batch}"])
    assert yard.ledger.counts()["stale"] == 1
    assert audit(yard.ledger) == []


# -- dead letters ------------------------------------------------------------------------------------------------------------------------


def test_a_dead_letter_is_kept_with_its_request_and_can_be_tried_again(yard: Yard) -> None:
    yard.bury("a", idem="k", body_hash="h")
    yard.advance(10)
    yard.bury("b")
    assert yard.ledger.list_ids("acme", limit=9, dead=True) == ["b", "a"]
    assert yard.ledger.list_ids("acme", limit=9, after="b", dead=True) == ["a"]
    assert yard.ledger.list_ids("globex", limit=9, dead=True) == []
    assert yard.ledger.revive("globex", ["a"]) == ["missing"]
    assert yard.ledger.revive("acme", ["a", "none"]) == ["queued", "missing"]
    assert yard.ledger.revive("acme", ["a"]) == ["missing"], "it is no dead letter any more"
    assert yard.ledger.list_ids("acme", limit=9, dead=True) == ["b"]
    document = yard.ledger.show("acme", ["a"])[0]
    assert document is not None
    assert (document["status"], document["attempts"], document["error"]) == ("queued", 0, None)
    assert document["due_ms"] == yard.now + 1000, "as long a wait as it had asked for"
    assert yard.put("c", idem="k", body_hash="h") == ["exists"]
    assert yard.client.ttl(f"{PREFIX}job:acme/a") == -1
    assert yard.client.ttl(f"{PREFIX}idem:acme:k") == -1
    assert audit(yard.ledger) == []
    taken = yard.run()
    assert [(job.ref, job.attempts, job.request) for job in taken.jobs] == [("acme/a", 0, b'{"messages":[]}')]
    assert yard.ledger.finish(taken.batch, taken.fence, [End("acme/a", "succeeded", OUTCOME)]) == ["stored"]
    assert yard.status("a") == "succeeded"
    assert audit(yard.ledger) == []


def test_a_dead_letter_whose_deadline_has_passed_is_tried_all_the_same(yard: Yard) -> None:
    yard.bury("a", deadline_ms=3000)
    yard.advance(60_000)
    assert yard.ledger.revive("acme", ["a"]) == ["queued"]
    assert yard.ledger.reap().expired == 0
    assert yard.status("a") == "queued"


def test_what_was_put_off_costs_no_attempt_and_is_counted(yard: Yard) -> None:
    yard.put("a")
    for n in range(5):
        taken = yard.run(start=n % 2 == 0)
        assert (taken.jobs[0].attempts, taken.jobs[0].laters, taken.jobs[0].most) == (0, n, 3)
        assert yard.ledger.finish(taken.batch, taken.fence, [End("acme/a", "later", delay_ms=50)]) == ["retried"]
        assert yard.status("a") == "delayed"
        yard.advance(50)
        yard.ledger.reap()
    document = yard.ledger.show("acme", ["a"])[0]
    assert document is not None
    assert (document["attempts"], document["postponed"]) == (0, 5)


# -- calls that are made twice because the reply was lost ---------------------------------------------------------------------------------


def test_a_call_repeated_because_its_reply_was_lost_changes_nothing(yard: Yard) -> None:
    """redis-py sends a command again after a connection that broke; the server may have done it the first time."""
    fcall = yard.client.fcall
    last: list[object] = []

    def twice(*args: object) -> object:
        fcall(*args)  # type: ignore[arg-type]
        last[:] = [fcall(*args)]  # type: ignore[arg-type]
        return last[0]

    yard.client.fcall = twice  # type: ignore[assignment, method-assign]
    assert yard.put("a", "b", "c") == ["exists", "exists", "exists"]
    assert yard.put("k", idem="key", body_hash="h") == ["exists"]
    answer, batch = yard.claim(takes=[("acme", 2)])
    assert answer == "ok"
    assert [f.by for f in yard.ledger.snapshot().in_flight] == [{"acme": 2}]
    taken = yard.ledger.take(batch, "w", "i", 5000)
    assert taken is not None
    assert len(taken.jobs) == 2
    refs = [job.ref for job in taken.jobs]
    assert yard.ledger.start(batch, taken.fence, refs) == []
    assert yard.ledger.take(batch, "w", "i", 5000) is None, "another taking is none"
    ends = [End(refs[0], "succeeded", OUTCOME), End(refs[1], "retry", b"{}", delay_ms=10)]
    yard.ledger.finish(batch, taken.fence, ends)
    yard.client.fcall = fcall  # type: ignore[method-assign]
    documents = yard.ledger.show("acme", [ref.partition("/")[2] for ref in refs])
    assert [(d["status"], d["attempts"]) for d in documents if d] == [("succeeded", 1), ("delayed", 1)]
    counts = yard.ledger.counts()
    assert (counts["enqueued"], counts["queued"], counts["succeeded"], counts["retried"]) == (4, 2, 1, 1)
    assert audit(yard.ledger) == []


# -- coming back ---------------------------------------------------------------------------------------------------------------------------


def test_jobs_of_a_lost_worker_go_before_what_has_not_had_its_turn(yard: Yard) -> None:
    yard.put("lost")
    yard.run()
    yard.advance(1)
    yard.put("urgent", wait_ms=0)
    yard.advance(5001)
    assert yard.ledger.reap().lapsed == 1
    (group,) = yard.ledger.snapshot().groups
    assert group.due == START_MS, "when it was claimed"
    _, batch = yard.claim(takes=[("acme", 1)])
    taken = yard.ledger.take(batch, "w", "i", 5000)
    assert taken is not None
    assert [job.ref for job in taken.jobs] == ["acme/lost"]


# -- memory ------------------------------------------------------------------------------------------------------------------------------


def test_jobs_are_refused_before_memory_runs_out_and_ends_are_stored_even_then(yard: Yard) -> None:
    used = int(yard.client.info("memory")["used_memory"])
    before = str(yard.client.config_get("maxmemory")["maxmemory"])
    yard.client.config_set("maxmemory", used * 2)
    try:
        big, answers = b"x" * 20_000, list[str]()
        while "memory" not in answers:
            assert len(answers) < 5000
            first = len(answers)
            entries = [make_entry(f"j{n}", request=big, idem="first" if n == 0 else "") for n in range(first, first + 10)]
            answers += [a.status for a in yard.ledger.enqueue(entries, max_queued=10**6)]
        accepted = answers.index("memory")
        assert set(answers[accepted:]) == {"memory"}
        assert int(yard.client.info("memory")["used_memory"]) < used * 2 * 0.95
        again = yard.ledger.enqueue([make_entry("j0", request=big, idem="first")], max_queued=10**6)
        assert again[0].status == "exists", "what was accepted is known even now"
        yard.client.config_set("maxmemory", max(1, int(yard.client.info("memory")["used_memory"]) - 1))
        with pytest.raises(Unavailable, match="memory") as caught:
            yard.put("one-more")
        assert caught.value.code == "ledger_full"
        done = 0
        while done < accepted:
            taken = yard.run()
            ends = [End(job.ref, "succeeded", OUTCOME) for job in taken.jobs]
            assert set(yard.ledger.finish(taken.batch, taken.fence, ends)) == {"stored"}
            done += len(ends)
        yard.client.config_set("maxmemory", used * 2)
        assert yard.put("one-more") == ["queued"]
    finally:
        yard.client.config_set("maxmemory", before)


# -- word to workers ----------------------------------------------------------------------------------------------------------------------


def test_a_worker_hears_at_once_of_its_batch_and_of_cancelled_jobs(yard: Yard) -> None:
    heard: list[tuple[str, str, list[str]]] = []
    until = threading.Event()

    def listen() -> None:
        heard.extend(yard.ledger.words("w7", until))

    listening = threading.Thread(target=listen)
    listening.start()
    try:
        give_up = time.monotonic() + 5
        while not yard.client.pubsub_numsub(f"{PREFIX}to:w7")[0][1]:
            assert time.monotonic() < give_up
        yard.put("a", "b")
        batch = yard.run(worker="w7").batch
        yard.ledger.cancel("acme", ["a"])
        yard.ledger.delete("acme", ["b"])
        yard.put("c", "d")
        recalled = yard.run(worker="w7", start=False).batch
        assert yard.ledger.recall(epoch=yard.epoch, batch=recalled) == 2
        while len(heard) < 5:
            assert time.monotonic() < give_up
            time.sleep(0.001)
    finally:
        until.set()
        listening.join()
    heard[-1][2].sort()
    assert heard == [
        ("take", batch, []),
        ("stop", batch, ["acme/a"]),
        ("stop", batch, ["acme/b"]),
        ("take", recalled, []),
        ("stop", recalled, ["acme/c", "acme/d"]),
    ]


# -- audit -------------------------------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[str, ...]] = {
    # what is done to the data -> what is found
    "ZREM queue:base:acme queued": ("job_in_no_place", "count_of_queued", "group_without_jobs", "totals"),
    "DEL groups": ("group_not_indexed",),
    "SADD groups d9:acme": ("group_without_jobs",),
    "ZADD queue:base:acme 1 running": ("job_in_two_places", "count_of_queued", "totals"),
    "ZADD delayed 1 acme/queued": ("job_in_two_places", "totals"),
    "ZADD delayed 1 acme/none": ("entry_without_job", "totals"),
    "ZADD deadlines 1 acme/none": ("entry_without_job",),
    "ZADD queue:base:acme 1 none": ("entry_without_job", "count_of_queued", "totals"),
    "ZREM by_tenant:acme queued": ("job_not_listed",),
    "DEL deadlines": ("deadline_not_watched",),
    "DEL job:acme/queued": ("entry_without_job",),
    "DEL job:acme/running": ("entry_without_job",),
    "HSET tries acme/none 1\t0": ("entry_without_job",),
    "SADD begun:b9 acme/running": ("members_without_batch",),
    "ZADD leases 1 b9": ("lease_without_batch",),
    "SADD members:b9 acme/running": ("members_without_batch",),
    "DEL leases": ("batch_without_lease", "job_in_no_place", "totals"),
    "DEL outstanding:w": ("batch_not_outstanding",),
    "SADD outstanding:w b9": ("outstanding_without_batch",),
    "DEL batch:b2": ("job_in_no_place", "members_without_batch", "lease_without_batch", "outstanding_without_batch"),
    "SADD members:b2 acme/queued": ("job_in_two_places", "totals"),
    "DEL members:b2": ("job_in_no_place", "batch_without_jobs", "totals"),
    "HINCRBY counts queued 5": ("count_of_queued",),
    "HINCRBY counts succeeded 1": ("totals",),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_audit_finds_what_is_wrong_and_puts_it_right(yard: Yard, damage: str) -> None:
    yard.put("done")
    taken = yard.run()
    yard.ledger.finish(taken.batch, taken.fence, [End("acme/done", "succeeded", OUTCOME)])
    yard.put("running")
    yard.run()
    yard.put("queued", deadline_ms=60_000)
    yard.put("delayed", not_before_ms=60_000)
    assert audit(yard.ledger) == []
    command, name, *rest = damage.split(" ")
    yard.client.execute_command(command, PREFIX + name, *rest)  # type: ignore[no-untyped-call]
    found = audit(yard.ledger)
    assert {f.kind for f in found} == set(DAMAGE[damage])
    assert not any(f.repaired for f in found)
    assert all(f.name in f.text and "{" not in f.text for f in found)
    assert {f.kind for f in audit(yard.ledger)} == set(DAMAGE[damage]), "looking changes nothing"

    for _ in range(3):  # one repair may uncover another
        audit(yard.ledger, repair=True)
    left = {f.kind for f in audit(yard.ledger)}
    assert left <= {"totals"}, "a total that is wrong stays wrong; a job that is lost is lost"
    yard.advance(61_000)
    for _ in range(3):
        yard.ledger.reap()
        answer, batch = yard.claim()
        if answer == "ok":
            again = yard.ledger.take(batch, "w", "i", 5000)
            assert again is not None
            yard.ledger.finish(batch, again.fence, [End(job.ref, "succeeded", OUTCOME) for job in again.jobs])
    living = [i for i in ("running", "delayed") if yard.status(i) not in ("succeeded", None)]
    assert living == [], "every job that is there can still be run"
