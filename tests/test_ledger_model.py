"""The real functions in a real server, held to a model of what they promise, through sequences of calls that Hypothesis thinks up.

After every step the server must hold exactly the keys that the model says, and must be sound by itself; at the end of every sequence all
that was accepted is worked off. `LORAYARD_MODEL_EXAMPLES` says how many sequences (`make faults` asks for many).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from ledger_model import CODES, Model
from ledger_support import CLOCKED, START_MS, Census, ClockedLedger, Server, dump, make_entry, outlive, serving

from lorayard.jobs import TERMINAL, Status
from lorayard.ledger.audit import audit
from lorayard.ledger.connection import connect
from lorayard.ledger.records import End, EndStatus, Entry, Taken

T = TypeVar("T")
EXAMPLES = int(os.environ.get("LORAYARD_MODEL_EXAMPLES", "400"))
STEPS = 50

TENANTS = ("acme", "zeta")
DIGESTS = ("base", "d1", "d1@groq")
WORKERS = ("w1", "w2", "w3")
SCHEDULERS = ("s1", "s2")
KEEPERS = ("k1", "k2")
DELIVERY, LEASE = 3000, 5000
TIMES = (1, 500, 1000, 2500, LEASE)
OUTCOMES = (
    b'{"response":{"n":1}}',
    b'{"response":{"n":2}}',
    b'{"error":{"message":"no","code":"bad"}}',
    msgspec.json.encode({"error": {"message": "ü" * 149 + "–x", "code": "worse", "type": "server_error"}}),
)

GOES_ON = ("reap", "tend")
"""Calls with a limit, which do more of the same when repeated."""


class Grant(NamedTuple):
    """What a worker was told when it took a batch; it may go on believing it for ever."""

    batch: str
    fence: int
    refs: tuple[str, ...]


def pick(what: Callable[[Any], Sequence[T]]) -> st.SearchStrategy[T]:
    """One of what the machine has by then."""
    return st.runner().flatmap(lambda machine: st.sampled_from(what(machine)))


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """What is special of a job. Half of them have no key; chosen ids and keys are few, so that they meet again."""
    chosen, key = draw(st.sampled_from([("", ""), ("", ""), ("", ""), ("", "k1"), ("x", "id x"), ("x", "k1"), ("x", "k2"), ("y", "id y")]))
    digest = draw(st.sampled_from(DIGESTS))
    return {
        "id": chosen,
        "idem": key,
        "body_hash": draw(st.sampled_from(["h1", "h1", "h2"])) if key else "",
        "tenant": draw(st.sampled_from(TENANTS)),
        "digest": digest,
        "wait_ms": draw(st.sampled_from([1000, 0, 60_000])),
        "deadline_ms": draw(st.sampled_from([0, 0, 0, 0, 1000, 7000])),
        "not_before_ms": draw(st.sampled_from([0, 0, 0, 0, 500, 3000])),
        "max_attempts": draw(st.sampled_from([2, 1, 3])),
        "once": draw(st.sampled_from(["", "", "", f"a{DIGESTS.index(digest)}"])),
    }


@st.composite
def some_of(draw: st.DrawFn, what: Callable[[LedgerMachine], list[str]]) -> tuple[str, list[str]]:
    """A tenant and ids: of the refs given, of others, of none."""
    machine: LedgerMachine = draw(st.runner())
    refs = what(machine) or [*machine.model.jobs] or ["acme/none"]
    tenant = draw(st.sampled_from(refs)).partition("/")[0]
    others = sorted(machine.model.jobs)[:2]
    return tenant, [ref.partition("/")[2] for ref in draw(st.lists(st.sampled_from([*refs, *others, "acme/none"]), min_size=1, max_size=2))]


def refs_of(machine: LedgerMachine, grant: Grant) -> st.SearchStrategy[list[str]]:
    """Mostly the grant's own jobs, some of them twice; now and then another's."""
    others = sorted(machine.model.jobs)[:1]
    return st.lists(st.sampled_from([*grant.refs, *grant.refs, *others]), min_size=1, max_size=4)


@st.composite
def granted(draw: st.DrawFn, only_current: bool) -> tuple[Grant, list[str]]:
    machine: LedgerMachine = draw(st.runner())
    grant = draw(st.sampled_from(machine.current() if only_current else machine.grants))
    return grant, draw(refs_of(machine, grant))


@st.composite
def ending(draw: st.DrawFn, only_current: bool) -> tuple[Grant, list[End]]:
    grant, refs = draw(granted(only_current))
    statuses: st.SearchStrategy[EndStatus] = st.sampled_from(["succeeded", "failed", "retry", "retry", "later"])
    delays, tokens, hosted = st.sampled_from([0, 0, 500, 3000]), st.sampled_from([0, 7]), st.booleans()
    return grant, [End(ref, draw(statuses), draw(st.sampled_from(OUTCOMES)), draw(tokens), draw(delays), draw(hosted)) for ref in refs]


class LedgerMachine(RuleBasedStateMachine):
    """Each rule makes the same call of the model and of the server, and compares the answers."""

    def __init__(self, server: Server, client: redis.Redis) -> None:
        super().__init__()
        self.server = server
        self.ledger = ClockedLedger(client)
        self.model = Model()
        self.made = self.batches = 0
        self.grants: list[Grant] = []
        self.epochs = dict.fromkeys(SCHEDULERS, 0)  # what each scheduler believes
        self.incarnations = dict.fromkeys(WORKERS, 1)
        self.stored: dict[str, str] = {}
        self.accepted: set[str] = set()
        self.reply_lost = False
        self.sound = True
        client.flushall()
        self.ledger.set_clock(START_MS)

    def both(self, call: str, *args: Any, **options: Any) -> Any:
        """The call, of the server and of the model; what both answer. If its reply gets lost, the second call changes nothing."""
        answer = _in_order(getattr(self.ledger, call)(*args, **options))
        assert answer == _in_order(getattr(self.model, call)(*args, **options))
        if self.reply_lost:
            self.reply_lost = False
            before = self._lasting()
            assert _in_order(getattr(self.ledger, call)(*args, **options)) == _in_order(getattr(self.model, call)(*args, **options))
            assert self._lasting() == before or call in GOES_ON
        return answer

    def _lasting(self) -> dict[str, Any]:
        """All but the count of what was refused."""
        held = {name: value for name, (value, _) in dump(self.ledger.client).items()}
        counts = held.get("counts")
        return held | {"counts": {name: n for name, n in counts.items() if name != "stale"} if isinstance(counts, dict) else {}}

    def current(self) -> list[Grant]:
        """Grants of which something may be left."""
        return [grant for grant in self.grants if grant.batch in self.model.batches]

    # -- producers ---------------------------------------------------------------------------------------------------------------------

    @initialize(changes=st.lists(entries(), min_size=2, max_size=6))
    def begin(self, changes: list[dict[str, Any]]) -> None:
        self.lead("s1", 10_000)
        self.enqueue(changes, 1000)

    @rule(changes=st.lists(entries(), min_size=1, max_size=6), max_queued=st.sampled_from([1000, 1000, 1000, 4]))
    def enqueue(self, changes: list[dict[str, Any]], max_queued: int) -> None:
        jobs = [self._entry(**change) for change in changes]
        answers = self.both("enqueue", jobs, max_queued=max_queued)
        for job, (_, status) in zip(jobs, answers, strict=True):
            if status in ("queued", "delayed", "succeeded"):
                self._accept(f"{job.tenant}/{job.id}")

    def _accept(self, ref: str) -> None:
        self.accepted.add(ref)
        self.stored.pop(ref, None)

    def _entry(self, **changes: Any) -> Entry:
        self.made += 1
        job_id = changes.pop("id") or f"j{self.made}"
        return make_entry(job_id, request=b'{"n":%d}' % self.made, **changes)

    @rule(of=some_of(lambda m: [*m.model.jobs]), how=st.sampled_from(["cancel", "cancel", "delete"]))
    def withdraw(self, of: tuple[str, list[str]], how: str) -> None:
        tenant, ids = of
        self.both(how, tenant, ids)
        if how == "delete":
            refs = {f"{tenant}/{job_id}" for job_id in ids}
            self.accepted -= refs
            assert [name for name in dump(self.ledger.client) if name.partition(":")[2] in refs] == []

    @precondition(lambda self: any(self.model.graves.values()))
    @rule(of=some_of(lambda m: [f"{tenant}/{i}" for tenant, ids in m.model.graves.items() for i in ids]))
    def revive(self, of: tuple[str, list[str]]) -> None:
        tenant, ids = of
        answers = self.both("revive", tenant, ids)
        for job_id, answer in zip(ids, answers, strict=True):
            if answer == "queued":
                self._accept(f"{tenant}/{job_id}")

    # -- schedulers --------------------------------------------------------------------------------------------------------------------

    @rule(scheduler=st.sampled_from(SCHEDULERS), ttl_ms=st.sampled_from([2000, 10_000, 0]))
    def lead(self, scheduler: str, ttl_ms: int) -> None:
        """Or, with no time to lead, resign."""
        if not ttl_ms:
            self.both("resign", scheduler)
            return
        epoch = self.both("lead", scheduler, ttl_ms)
        self.epochs[scheduler] = epoch or self.epochs[scheduler]
        assert self.ledger.has_leader(self.model.now) == (self.model.leads_until > self.model.now)

    @rule(
        scheduler=st.sampled_from([*SCHEDULERS, "s1"]),
        worker=st.sampled_from(WORKERS),
        most=st.sampled_from([2, 2, 1]),
        digest=st.sampled_from(DIGESTS),
        takes=st.dictionaries(st.sampled_from(TENANTS), st.sampled_from([1, 2, 10]), min_size=1),
    )
    def claim(self, scheduler: str, worker: str, most: int, digest: str, takes: dict[str, int]) -> None:
        """By what the scheduler believes, even if another leads by now."""
        self.batches += 1
        batch = f"b{self.batches}"
        who = {"epoch": self.epochs[scheduler], "worker": worker, "most": most}
        self.both("claim", **who, batch=batch, digest=digest, delivery_ms=DELIVERY, why="due", takes=list(takes.items()))

    @precondition(lambda self: self.model.batches)
    @rule(scheduler=st.sampled_from([*SCHEDULERS, "s1"]), batch=pick(lambda m: [f"b{n + 1}" for n in range(m.batches)][-4:]))
    def recall(self, scheduler: str, batch: str) -> None:
        """By what the scheduler believes; mostly of a batch that there is."""
        self.both("recall", epoch=self.epochs[scheduler], batch=batch)

    @rule(what=st.sampled_from(["pool", "adapter:d1", "tenant:acme", "group:base:zeta"]), end=st.booleans())
    def pause(self, what: str, end: bool) -> None:
        self.both("resume" if end else "pause", what)
        self.both("paused")

    @rule(ms=st.sampled_from(TIMES), limit=st.sampled_from([200, 200, 0, 1]), grace_ms=st.sampled_from([0, 0, 4000]))
    def wait(self, ms: int, limit: int, grace_ms: int = 0) -> None:
        """Time passes; mostly somebody looks at what is due by then."""
        self.model.now += ms
        self.ledger.set_clock(self.model.now)
        if limit:
            self.both("reap", limit=limit, grace_ms=grace_ms)

    @precondition(lambda self: self.model.batches)
    @rule(extra=st.sampled_from([0, -1, 1]))
    def lapse(self, extra: int) -> None:
        """A worker stands still for about as long as its lease."""
        self.wait(max(1, min(b.expiry for b in self.model.batches.values()) - self.model.now + extra), 200)

    @rule(tenant=st.sampled_from(TENANTS), page=st.sampled_from([1, 2, 1000]), served=st.sampled_from([0, 5, 50]), hosted=st.booleans())
    def tidy(self, tenant: str, page: int, served: int, hosted: bool) -> None:
        self.both("forget", tenant, page=page)
        self.both("lift", tenant, served, hosted=hosted)

    # -- workers -----------------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.batches)
    @rule(batch=pick(lambda m: list(m.model.batches)))
    def take(self, batch: str) -> None:
        """The batch's message reaches the worker it was sent to; maybe not for the first time."""
        worker = self.model.batches[batch].worker
        self._take(batch, worker, f"i{self.incarnations[worker]}")

    @precondition(lambda self: self.batches)
    @rule(batch=pick(lambda m: [f"b{n + 1}" for n in range(m.batches)]), worker=st.sampled_from(WORKERS), behind=st.sampled_from([0, 1]))
    def take_out_of_turn(self, batch: str, worker: str, behind: int) -> None:
        """Any message reaches any worker, or an earlier process of it."""
        self._take(batch, worker, f"i{self.incarnations[worker] - behind}")

    def _take(self, batch: str, worker: str, incarnation: str) -> None:
        taken: Taken | None = self.both("take", batch, worker, incarnation, LEASE)
        if taken is not None:
            self.grants.append(Grant(batch, taken.fence, tuple(job.ref for job in taken.jobs)))

    def _work(self, worker: str, n: int, begin: int) -> None:
        """What mostly goes well: claimed by whoever leads, taken at once, begun."""
        self.epochs["s1"] = self.model.epoch
        digest = next(iter(self.model.groups()))[0]
        self.claim("s1", worker, 2, digest, dict.fromkeys(TENANTS, n))
        if (batch := f"b{self.batches}") in self.model.batches:
            self.take(batch)
            self.both("start", batch, self.grants[-1].fence, list(self.grants[-1].refs[:begin]))

    @precondition(lambda self: self.model.queued())
    @rule(worker=st.sampled_from(WORKERS), n=st.sampled_from([10, 2, 1]), begin=st.sampled_from([10, 1, 0]))
    def work(self, worker: str, n: int, begin: int) -> None:
        self._work(worker, n, begin)

    @precondition(lambda self: self.model.queued())
    @rule(worker=st.sampled_from(WORKERS), n=st.sampled_from([2, 10]))
    def work_again(self, worker: str, n: int) -> None:
        """There is much work."""
        self._work(worker, n, n)

    @precondition(lambda self: self.current())
    @rule(of=granted(only_current=True))
    def start(self, of: tuple[Grant, list[str]]) -> None:
        grant, refs = of
        self.both("start", grant.batch, grant.fence, refs)

    @precondition(lambda self: self.current())
    @rule(of=ending(only_current=True))
    def finish(self, of: tuple[Grant, list[End]]) -> None:
        grant, ends = of
        self.both("finish", grant.batch, grant.fence, ends)

    @precondition(lambda self: self.current())
    @rule(of=ending(only_current=True))
    def finish_more(self, of: tuple[Grant, list[End]]) -> None:
        """Much work gets done."""
        self.finish(of)

    @precondition(lambda self: self.grants)
    @rule(of=ending(only_current=False))
    def finish_late(self, of: tuple[Grant, list[End]]) -> None:
        """Also what was lost, cancelled, deleted, stored before."""
        self.finish(of)

    @precondition(lambda self: self.grants)
    @rule(grants=st.lists(pick(lambda m: m.grants), min_size=1, max_size=3, unique=True))
    def renew(self, grants: list[Grant]) -> None:
        self.both("renew", [(grant.batch, grant.fence) for grant in grants], LEASE)

    @precondition(lambda self: self.grants)
    @rule(of=granted(only_current=False))
    def give_back(self, of: tuple[Grant, list[str]]) -> None:
        grant, refs = of
        self.both("give_back", grant.batch, grant.fence, refs)

    @precondition(lambda self: self.current())
    @rule(of=ending(only_current=True), off=st.sampled_from([-1, 1]))
    def forge(self, of: tuple[Grant, list[End]], off: int) -> None:
        """With another fence, nothing of a batch can be had."""
        (batch, fence, _), ends = of[0]._replace(fence=of[0].fence + off), of[1]
        refs = list(of[0].refs)
        assert self.both("give_back", batch, fence, refs) == 0
        assert self.both("start", batch, fence, refs) == refs
        assert self.both("renew", [(batch, fence)], LEASE)[0] == [batch]
        self.both("finish", batch, fence, ends)

    @rule(worker=st.sampled_from(WORKERS), new=st.booleans())
    def hello(self, worker: str, new: bool) -> None:
        self.incarnations[worker] += new
        self.both("hello", worker, f"i{self.incarnations[worker]}")

    # -- a hosted batch service --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.grants)
    @rule(grant=pick(lambda m: m.current() or m.grants), off=st.sampled_from([0, 0, 0, 1]))
    def submit(self, grant: Grant, off: int) -> None:
        self.both("submit", grant.batch, grant.fence + off, b"{}")

    @precondition(lambda self: any(batch.submitted for batch in self.model.batches.values()))
    @rule(keeper=st.sampled_from(KEEPERS), limit=st.sampled_from([9, 1]), hold_ms=st.sampled_from([1, 3000]))
    def tend(self, keeper: str, limit: int, hold_ms: int) -> None:
        for batch in self.both("tend", keeper, limit=limit, hold_ms=hold_ms):
            self.grants.append(Grant(batch.batch, batch.fence, tuple(batch.refs) or ("acme/none",)))

    @precondition(lambda self: self.batches)
    @rule(
        batch=pick(lambda m: [f"b{n + 1}" for n in range(m.batches)]), keeper=st.sampled_from(KEEPERS), note=st.sampled_from([b"1", b"2"])
    )
    def keep(self, batch: str, keeper: str, note: bytes) -> None:
        """As who looks after it, or after another, or did so once."""
        self.both("note", batch, keeper, note, 2000)
        found = [job.ref for job in self.ledger.contents(batch, keeper)]
        assert sorted(found) == self.model.contents(batch, keeper)
        self.both("settle", batch, keeper)

    # -- what happens to the server ------------------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["reply", "reply", "load", "flush", "kill"]))
    def disturb(self, how: str) -> None:
        """Nothing of this changes anything: a reply that gets lost, so that the call is made again; kills, of which a run has so many."""
        if how == "reply":
            self.reply_lost = True
        elif how == "load":
            self.ledger.client.function_load(CLOCKED, replace=True)
        elif how == "flush":
            self.ledger.client.script_flush()
            self.ledger.client.function_flush()
        elif how == "kill" and self.server.kills_left > 0:
            self.server.kills_left -= 1
            self.server.kill()
            self.server.start()
        self.ledger.client.connection_pool.disconnect()

    @precondition(lambda self: len(self.model.live()) < len(self.model.jobs))
    @rule()
    def outlive(self) -> None:
        """So much time passes that all that has a time to live is gone."""
        outlive(self.ledger.client)
        self.model.outlive()
        self.ledger.set_clock(self.model.now)
        self.accepted &= self.model.jobs.keys()

    # -- what must hold ----------------------------------------------------------------------------------------------------------------

    @invariant()
    def holds_what_it_must(self) -> None:
        self.sound = False
        held = dump(self.ledger.client)
        census = Census(held)
        assert census.faults() == []
        expected = self.model.keys()
        for name, (value, mortal) in held.items():
            ref = name.removeprefix("job:")
            if ref in census.ended:
                assert isinstance(value, str)
                assert self.stored.setdefault(ref, value) == value, f"the end of {ref} has changed"
                held[name] = (_short(value), mortal)
        different = [name for name in sorted(held.keys() | expected.keys()) if held.get(name) != expected.get(name)]
        assert {name: held.get(name) for name in different} == {name: expected.get(name) for name in different}
        for tenant in TENANTS:
            self._shows(tenant)
        assert audit(self.ledger) == []
        self.sound = True

    def _shows(self, tenant: str) -> None:
        mine = [job for job in self.model.jobs.values() if job.entry.tenant == tenant]
        documents = self.ledger.show(tenant, [job.entry.id for job in mine] + ["none"])
        assert documents.pop() is None
        for job, document in zip(mine, documents, strict=True):
            assert document is not None
            assert (document["status"], document["attempts"]) == (job.status, job.attempts)
            assert document.get("postponed", job.laters) == job.laters
            if "postponed_why" in document:
                assert document["postponed_why"] == (msgspec.json.decode(job.why) if job.why else None)
            if job.batch:
                assert (document["batch"], document["worker"]) == (job.batch.name, job.batch.worker)

    @rule()
    def look(self) -> None:
        """What the planner reads, and listings."""
        view = self.ledger.snapshot()
        groups = {(g.digest, g.tenant): (g.jobs, g.due) for g in view.groups}
        ready = {name: jobs for name, jobs in self.model.groups().items() if not self.model.is_halted(*name)}
        assert {name: shown for name, shown in groups.items() if shown[0]} == {name: (len(j), j[0].place) for name, j in ready.items()}
        flights = {
            f.batch: (f.worker, f.digest, " ".join(f"{t} {n}" for t, n in f.by.items()), f.claimed, f.taken, f.left, f.waiting)
            for f in view.in_flight
        }
        mine = [b for b in self.model.batches.values() if not b.submitted]
        left = {b.name: len(self.model.members(b.name)) for b in mine}
        waiting = {b.name: sum(job.status is Status.CLAIMED for job in self.model.members(b.name).values()) for b in mine}
        assert flights == {b.name: (b.worker, b.digest, b.by, b.claimed, b.taken, left[b.name], waiting[b.name]) for b in mine}
        assert view.served | {f"{tenant}@hosted": tokens for tenant, tokens in view.hosted.items()} == +self.model.served
        named = [(digest, tenant) for digest in DIGESTS for tenant in TENANTS]
        some = {(g.digest, g.tenant): g.jobs for g in self.ledger.read_groups(named).groups}
        assert some == {name: len(ready.get(name, ())) for name in named}
        for tenant in TENANTS:
            for dead, listed in ((False, self.model.listed[tenant]), (True, self.model.graves[tenant])):
                newest = [job_id for _, job_id in sorted(((at, i) for i, at in listed.items()), reverse=True)]
                assert self.ledger.list_ids(tenant, limit=3, dead=dead) == newest[:3]
                if newest:
                    assert self.ledger.list_ids(tenant, limit=1000, after=newest[0], dead=dead) == newest[1:]

    def teardown(self) -> None:
        """Dead letters are tried again; then all that was accepted comes to its end, though every batch so far is lost, or is deleted."""
        if not self.sound:
            return
        for what in self.model.paused():
            self.both("resume", what)
        for tenant in TENANTS:
            if ids := list(self.model.graves[tenant]):
                self.revive((tenant, ids))
        self.holds_what_it_must()
        if self.made % 3:
            self._work_off()
        else:
            for tenant in TENANTS:
                if ids := [job.entry.id for job in self.model.jobs.values() if job.entry.tenant == tenant]:
                    self.both("delete", tenant, ids)
            self.wait(10_000, 200)
            self._come_back()
        self.holds_what_it_must()
        assert self.model.live() == []
        left = {name.partition(":")[0] for name in dump(self.ledger.client)}
        lasting = {"by_tenant", "served", "counts", "leader", "fence", "reaped", "stop"}
        assert left <= (lasting | {"job", "dead", "idem", "once"} if self.made % 3 else lasting)

    def _come_back(self) -> None:
        """A service ran none of what was submitted."""
        for batch in self.both("tend", "k1", limit=100, hold_ms=1000):
            self.both("finish", batch.batch, batch.fence, [End(ref, "later") for ref in batch.refs])
            self.both("settle", batch.batch, "k1")

    def _work_off(self) -> None:
        for _ in range(40):
            if not self.model.live():
                break
            self.wait(10_000, 200)
            self._come_back()
            while self.model.queued():
                self._work(WORKERS[0], 1000, 1000)
                grant = self.grants[-1]
                self.finish((grant, [End(ref, "succeeded") for ref in grant.refs]))
        self.wait(10_000, 200)
        self._come_back()
        assert {ref: self.model.jobs[ref].status for ref in self.accepted if self.model.jobs[ref].status not in TERMINAL} == {}


def _in_order(answer: Any) -> Any:
    """Refs to stop come in any order."""
    return (answer[0], sorted(answer[1])) if isinstance(answer, tuple) and isinstance(answer[-1], list) and len(answer) == 2 else answer


def _short(ended: str) -> str:
    """Of outcomes that the ledger writes itself, the code."""
    lines = ended.split("\n")
    code = re.search(rf'"code":"({"|".join(CODES.values())})"', lines[3])
    return "\n".join([*lines[:3], code.group() if code else lines[3], *lines[4:]])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.mark.timeout(180 + EXAMPLES * 5)
def test_the_ledger_does_what_its_model_does(server: Server) -> None:
    options = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=False,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    server.kills_left = max(10, EXAMPLES // 10)
    with connect(server.url) as client:
        client.function_load(CLOCKED, replace=True)
        run_state_machine_as_test(lambda: LedgerMachine(server, client), settings=options)  # type: ignore[arg-type]
