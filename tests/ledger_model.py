"""What the ledger promises, as plain Python: the model that `test_ledger_model.py` holds the real functions to.

Written from DESIGN.md and from the keys documented at the top of `functions.lua`. A job knows where it is; queues, groups, counts of what
is queued and all other indexes follow from that and are computed, never kept. `keys()` says what the server must hold, to the last key.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from ledger_support import START_MS, TTL_S, Dump, Value

from lorayard.jobs import Status, adapter_of
from lorayard.ledger.ledger import REAP_GAP_MS
from lorayard.ledger.records import End, Entry, Reaped, Submitted, Taken, TakenJob

CODES = {Status.CANCELLED: "cancelled", Status.EXPIRED: "expired", Status.FAILED: "worker_lost"}
"""The error's code in outcomes that the ledger itself writes."""


BEGUN = (Status.RUNNING, Status.SUBMITTED)


@dataclass
class Batch:
    name: str
    worker: str
    digest: str
    fence: int
    claimed: int
    size: int
    by: str
    why: str
    expiry: int
    taken: int = 0
    incarnation: str = ""
    submitted: int = 0
    note: str = ""
    keeper: str = ""


class Result(NamedTuple):
    """`line` says all of its end but why; `outcome` is None where the ledger itself says that."""

    line: str
    outcome: bytes | None


@dataclass
class Job:
    entry: Entry
    enqueued: int
    due: int
    expiry: int
    status: Status = Status.QUEUED
    attempts: int = 0
    batch: Batch | None = None
    laters: int = 0
    why: str = ""  # code and message of the last error it came back with
    wake: int = 0
    look: int = 0  # when its deadline is looked at next
    fence: int = 0  # that stored the result
    place: int = field(init=False)  # in its queue
    result: Result | None = None
    dead: bool = False
    leader: str = ""  # the id of the job of its tenant whose outcome it waits for

    def __post_init__(self) -> None:
        self.place = self.due

    @property
    def ref(self) -> str:
        return f"{self.entry.tenant}/{self.entry.id}"

    @property
    def group(self) -> tuple[str, str]:
        return self.entry.digest, self.entry.tenant

    @property
    def queued(self) -> bool:
        return self.status is Status.QUEUED and not self.leader

    @property
    def order(self) -> tuple[int, str]:
        return self.place, self.entry.id


@dataclass
class Model:
    now: int = START_MS
    jobs: dict[str, Job] = field(default_factory=dict)
    """By ref: live, or ended with its result still kept."""
    batches: dict[str, Batch] = field(default_factory=dict)
    stops: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By batch: what its worker must hear it is to stop."""
    idem: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    once: dict[tuple[str, str], str] = field(default_factory=dict)
    """By tenant and what is to be computed once: the id of the job that does, or did."""
    listed: defaultdict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    graves: defaultdict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    """By tenant: dead letters' ids, and when they were buried."""
    halted: set[str] = field(default_factory=set)
    served: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)
    leader: str = ""
    leads_until: int = 0
    epoch: int = 0
    fences: int = 0
    reaped: int = 0

    # -- what follows from where the jobs are ---------------------------------------------------------------------------------------------

    def live(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.result is None]

    def queue(self, group: tuple[str, str]) -> list[Job]:
        """Most due first."""
        return sorted((j for j in self.live() if j.queued and j.group == group), key=lambda j: j.order)

    def groups(self) -> dict[tuple[str, str], list[Job]]:
        names = {job.group for job in self.live() if job.queued}
        return {name: self.queue(name) for name in sorted(names)}

    def queued(self) -> int:
        return sum(map(len, self.groups().values()))

    def members(self, batch: str) -> dict[str, Job]:
        return {job.ref: job for job in self.live() if job.batch is not None and job.batch.name == batch}

    def outstanding(self, worker: str) -> set[str]:
        return {batch.name for batch in self.batches.values() if batch.worker == worker and not batch.submitted}

    def _close_empty(self) -> None:
        self.batches = {name: batch for name, batch in self.batches.items() if batch.submitted or self.members(name)}

    def _held(self, ref: str, batch: str, fence: int) -> Job | None:
        """The job, if it is under that very lease."""
        job = self.jobs.get(ref)
        current = self.batches.get(batch)
        return job if job and current and job.batch is current and current.fence == fence else None

    # -- producers ------------------------------------------------------------------------------------------------------------------------

    def enqueue(self, entries: Sequence[Entry], *, max_queued: int) -> list[tuple[str, str]]:
        room = max_queued - sum(job.status in (Status.QUEUED, Status.DELAYED) for job in self.live())
        answers = []
        for entry in entries:
            answer = self._enqueue(entry, room)
            room -= answer[1] in ("queued", "delayed")
            answers.append(answer)
        return answers

    def _enqueue(self, e: Entry, room: int) -> tuple[str, str]:
        known = self.idem.get((e.tenant, e.idem))
        if known:
            return (known[0], "exists") if known[1] == e.body_hash else (e.id, "conflict")
        if f"{e.tenant}/{e.id}" in self.jobs:  # without a key it can only be the same call again: such ids are never chosen
            return e.id, "conflict" if e.idem else "exists"
        if room <= 0:
            return e.id, "full"
        expiry = self.now + e.deadline_ms if e.deadline_ms else 0
        job = Job(e, self.now, expiry or self.now + e.not_before_ms + e.wait_ms, expiry, look=expiry)
        if e.not_before_ms:
            job.status, job.wake = Status.DELAYED, self.now + e.not_before_ms
        elif e.once:
            self._join(job)
        self.jobs[job.ref] = job
        self.listed[e.tenant][e.id] = self.now
        self.graves[e.tenant].pop(e.id, None)
        if e.idem:
            self.idem[e.tenant, e.idem] = (e.id, e.body_hash)
        self.totals["enqueued"] += 1
        return e.id, job.status.value

    def _join(self, job: Job) -> None:
        """Behind the job that computes the same, or to the end of the one that has; else it is that job."""
        e = job.entry
        first = self.jobs.get(f"{e.tenant}/{self.once.get((e.tenant, e.once), '')}")
        if first and first.status is Status.SUCCEEDED:
            self._store_copy(job, first)
        elif first and not first.result:
            job.leader = first.entry.id
            first.place = min(first.place, job.due) if first.queued else first.place
        else:
            self.once[e.tenant, e.once] = e.id

    def followers(self, job: Job) -> list[Job]:
        """The most due first."""
        mine = [j for j in self.live() if j.leader == job.entry.id and j.entry.tenant == job.entry.tenant]
        return sorted(mine, key=lambda j: (j.due, j.entry.id))

    def _store_copy(self, job: Job, of: Job) -> None:
        assert of.result is not None
        assert of.result.outcome is not None
        job.leader = ""
        outcome = msgspec.json.encode({"coalesced_with": of.entry.id} | msgspec.json.decode(of.result.outcome))
        self._store(job, Status.SUCCEEDED, 0, outcome, why=f"computed once, by {of.entry.id}")
        self.totals["coalesced"] += 1

    def _pass_on(self, job: Job) -> None:
        """It has ended, or is gone: who waits for it ends with it, or one of them takes its place."""
        key, waiting = (job.entry.tenant, job.entry.once), self.followers(job)
        if job.status is Status.SUCCEEDED:
            for follower in waiting:
                self._store_copy(follower, job)
            return
        for follower in waiting:
            follower.leader = waiting[0].entry.id
        if waiting:
            waiting[0].leader, waiting[0].place = "", waiting[0].due
        if self.once.get(key) == job.entry.id:
            del self.once[key]
            if waiting:
                self.once[key] = waiting[0].entry.id

    def cancel(self, tenant: str, ids: Iterable[str]) -> list[str]:
        answers = []
        for job_id in ids:
            job = self.jobs.get(f"{tenant}/{job_id}")
            if job is None or job.result:
                answers.append("ended" if job else "missing")
                continue
            self._end_from_outside(job, Status.CANCELLED)
            answers.append("cancelled")
        self._close_empty()
        return answers

    def delete(self, tenant: str, ids: Iterable[str]) -> list[str]:
        """Nothing is left of them but what counts, and the word to their worker."""
        answers = []
        for job_id in ids:
            job = self.jobs.pop(f"{tenant}/{job_id}", None)
            answers.append("deleted" if job else "missing")
            if job is None:
                continue
            self._stop(job)
            if job.result is None:
                self._pass_on(job)
            elif self.once.get((tenant, job.entry.once)) == job_id:
                del self.once[tenant, job.entry.once]
            self.totals["deleted_live"] += job.result is None
            self.totals["deleted"] += 1
            self.idem.pop((tenant, job.entry.idem), None)
            self.listed[tenant].pop(job_id)
            self.graves[tenant].pop(job_id, None)
        self._close_empty()
        return answers

    def revive(self, tenant: str, ids: Iterable[str]) -> list[str]:
        """Dead letters become as new: no attempts, enqueued now, as urgent as they were, without a deadline."""
        answers = []
        for job_id in ids:
            self.graves[tenant].pop(job_id, None)
            job = self.jobs.get(f"{tenant}/{job_id}")
            answers.append("queued" if job and job.dead else "missing")
            if not job or not job.dead:
                continue
            fresh = Job(job.entry, self.now, self.now + job.due - job.enqueued, 0)
            self.jobs[job.ref] = fresh
            self.listed[tenant][job_id] = self.now
            self.totals["revived"] += 1
        return answers

    # -- scheduler ------------------------------------------------------------------------------------------------------------------------

    def lead(self, me: str, ttl_ms: int) -> int:
        if self.leader not in ("", me) and self.leads_until > self.now:
            return 0
        self.epoch += self.leader != me
        self.leader, self.leads_until = me, self.now + ttl_ms
        return self.epoch

    def resign(self, me: str) -> None:
        if self.leader == me:
            self.leads_until = 0

    def pause(self, what: str) -> bool:
        before = len(self.halted)
        self.halted.add(what)
        return len(self.halted) > before

    def resume(self, what: str) -> bool:
        before = len(self.halted)
        self.halted.discard(what)
        return len(self.halted) < before

    def paused(self) -> list[str]:
        return sorted(self.halted)

    def is_halted(self, digest: str, tenant: str = "") -> bool:
        digest = adapter_of(digest)
        return bool(self.halted & {"pool", f"adapter:{digest}", f"tenant:{tenant}", f"group:{digest}:{tenant}"})

    def claim(
        self, *, epoch: int, worker: str, most: int, batch: str, digest: str, delivery_ms: int, why: str, takes: Sequence[tuple[str, int]]
    ) -> tuple[str, int]:
        if epoch != self.epoch:
            return "epoch", 0
        if batch in self.batches:
            return "ok", self.batches[batch].size
        if len(self.outstanding(worker)) >= most:
            return "busy", 0
        if self.is_halted(digest):
            return "paused", 0
        by = {tenant: self.queue((digest, tenant))[:n] for tenant, n in takes if not self.is_halted(digest, tenant)}
        jobs = [job for picked in by.values() for job in picked]
        if not jobs:
            return "empty", 0
        self.fences += 1
        shares = " ".join(f"{tenant} {len(picked)}" for tenant, picked in by.items() if picked)
        new = Batch(batch, worker, digest, self.fences, self.now, len(jobs), shares, why, self.now + delivery_ms)
        self.batches[batch] = new
        for job in jobs:
            job.status, job.batch, job.place = Status.CLAIMED, new, job.due
        return "ok", len(jobs)

    def recall(self, *, epoch: int, batch: str) -> int:
        """What has not begun is as if it had never been claimed, and its worker hears of it."""
        back = [job for job in self.members(batch).values() if job.status is Status.CLAIMED] if epoch == self.epoch else []
        for job in back:
            self.stops[batch].add(job.ref)
            self._let_go(job)
        self.totals["recalled"] += len(back)
        self._close_empty()
        return len(back)

    def reap(self, *, limit: int, grace_ms: int) -> Reaped:
        """With a grace, leases go on for as long where nobody has reaped, and so perhaps nobody could renew, for a while."""
        if grace_ms:
            if self.reaped and self.now - self.reaped > REAP_GAP_MS:
                for batch in self.batches.values():
                    if not batch.submitted:
                        batch.expiry = max(batch.expiry, self.now + grace_ms)
            self.reaped = self.now
        names = sorted((b.expiry, b.name) for b in self.batches.values() if not b.submitted and b.expiry <= self.now)[:limit]
        lapsed = [self.batches[name] for _, name in names]
        taken = sum(bool(batch.taken) for batch in lapsed)
        self.totals.update(leases_lapsed=taken, deliveries_lapsed=len(lapsed) - taken)
        for batch in lapsed:
            self._requeue(self.members(batch.name).values())
        woken = sorted((j.wake, j.ref) for j in self.live() if j.status is Status.DELAYED and j.wake <= self.now)[:limit]
        for _, ref in woken:
            self._let_go(self.jobs[ref])
        passed = sorted((j.look, j.ref) for j in self.live() if j.expiry and j.look <= self.now)[:limit]
        expired = 0
        for _, ref in passed:
            job = self.jobs[ref]
            job.look = self.now + 1000
            computes = self.jobs[f"{job.entry.tenant}/{job.leader}"] if job.leader else job
            if computes.status not in BEGUN:
                self._end_from_outside(job, Status.EXPIRED, self._waits_for(job))
                expired += 1
        self._close_empty()
        return Reaped(len(lapsed) - taken, taken, len(woken), expired)

    def lift(self, tenant: str, to: int, *, hosted: bool = False) -> None:
        name = tenant + "@hosted" * hosted
        self.served[name] = max(self.served[name], to)

    def forget(self, tenant: str, *, page: int) -> int:
        """Listings of jobs that are gone, of those enqueued longer ago than results are kept; however many are looked at at once."""
        assert page
        old = [job_id for job_id, at in self.listed[tenant].items() if at <= self.now - TTL_S * 1000]
        gone = [job_id for job_id in old if f"{tenant}/{job_id}" not in self.jobs]
        for job_id in gone:
            del self.listed[tenant][job_id]
            self.graves[tenant].pop(job_id, None)
        return len(gone)

    # -- workers --------------------------------------------------------------------------------------------------------------------------

    def take(self, batch: str, worker: str, incarnation: str, lease_ms: int) -> Taken | None:
        held = self.batches.get(batch)
        if held is None or held.worker != worker or held.taken:
            return None
        held.taken, held.incarnation, held.expiry = self.now, incarnation, self.now + lease_ms
        jobs = sorted(self.members(batch).values(), key=lambda j: (j.due, j.ref))
        rows = [
            TakenJob(j.ref, j.attempts, j.entry.max_attempts, j.laters, msgspec.json.decode(j.entry.meta), j.entry.request, j.due)
            for j in jobs
        ]
        return Taken(batch, held.fence, held.digest, held.claimed, held.taken, rows)

    def start(self, batch: str, fence: int, refs: Iterable[str]) -> list[str]:
        stop = []
        for ref in refs:
            job = self._held(ref, batch, fence)
            if job is None:
                stop.append(ref)
            elif job.status is Status.CLAIMED:
                job.status = Status.RUNNING
                job.attempts += 1
        return stop

    def renew(self, pairs: Iterable[tuple[str, int]], lease_ms: int) -> tuple[list[str], list[tuple[str, str]]]:
        lost, stop = [], []
        for name, fence in pairs:
            batch = self.batches.get(name)
            if batch and batch.fence == fence and not batch.submitted:
                batch.expiry = self.now + lease_ms
            else:
                lost.append(name)
            stop += [(name, ref) for ref in self.stops.pop(name, ())]
        return lost, stop

    def finish(self, batch: str, fence: int, ends: Iterable[End]) -> list[str]:
        answers = [self._finish(batch, fence, end) for end in ends]
        self._close_empty()
        return answers

    def _finish(self, batch: str, fence: int, end: End) -> str:
        job = self._held(end.ref, batch, fence)
        if job is None:
            stored = self.jobs.get(end.ref)
            if stored and stored.result and stored.fence == fence:
                return "already"
            self.totals["stale"] += 1
            return "stale"
        self.served[job.entry.tenant + "@hosted" * end.hosted] += end.tokens
        if end.status != "later" and job.status is Status.CLAIMED:
            job.attempts += 1  # an end says that there was a start
        if end.status == "later":
            job.attempts -= job.status in BEGUN
            job.laters += 1
        if end.status == "later" or (end.status == "retry" and job.attempts < job.entry.max_attempts):
            self._let_go(job)
            job.why = _why(end.outcome) or job.why
            if end.delay_ms:
                job.status, job.wake = Status.DELAYED, self.now + end.delay_ms
            self.totals["postponed" if end.status == "later" else "retried"] += 1
            return "retried"
        job.dead = end.status == "retry"
        self._store(job, Status.FAILED if job.dead else Status(end.status), fence, end.outcome)
        return "stored"

    def give_back(self, batch: str, fence: int, refs: Iterable[str]) -> int:
        held = {ref: job for ref in refs if (job := self._held(ref, batch, fence)) and job.status is Status.CLAIMED}
        self._requeue(held.values())
        self._close_empty()
        return len(held)

    def hello(self, worker: str, incarnation: str) -> int:
        """Only what an earlier process had taken: what is on its way will reach this one."""
        lost = [self.batches[name] for name in self.outstanding(worker)]
        lost = [b for b in lost if b.taken and b.incarnation != incarnation]
        for batch in lost:
            self._requeue(self.members(batch.name).values())
        self._close_empty()
        return len(lost)

    # -- a hosted batch service -----------------------------------------------------------------------------------------------------------

    def submit(self, batch: str, fence: int, note: bytes) -> bool:
        held = self.batches.get(batch)
        if held is None or held.fence != fence or not held.taken:
            return False
        if not held.submitted:
            held.submitted, held.note, held.expiry = self.now, note.decode(), self.now
            self.stops.pop(batch, None)
            for job in self.members(batch).values():
                job.attempts += job.status is Status.CLAIMED
                job.status = Status.SUBMITTED
        return True

    def tend(self, token: str, *, limit: int, hold_ms: int) -> list[Submitted]:
        due = sorted((b.expiry, b.name) for b in self.batches.values() if b.submitted and b.expiry <= self.now)[:limit]
        found = []
        for _, name in due:
            b = self.batches[name]
            b.keeper, b.expiry = token, self.now + hold_ms
            found.append(Submitted(name, b.fence, b.digest, b.submitted, b.note.encode(), sorted(self.members(name))))
        return found

    def _kept(self, batch: str, token: str) -> Batch | None:
        held = self.batches.get(batch)
        return held if held and held.submitted and held.keeper == token else None

    def note(self, batch: str, token: str, note: bytes, look_ms: int) -> bool:
        held = self._kept(batch, token)
        if held:
            held.note, held.expiry = note.decode(), self.now + look_ms
        return held is not None

    def contents(self, batch: str, token: str) -> list[str]:
        return sorted(self.members(batch)) if self._kept(batch, token) else []

    def settle(self, batch: str, token: str) -> bool:
        if batch not in self.batches:
            return True
        if not self._kept(batch, token) or self.members(batch):
            return False
        del self.batches[batch]
        return True

    # -- how jobs move --------------------------------------------------------------------------------------------------------------------

    def _let_go(self, job: Job, place: int | None = None) -> None:
        """To its queue, as urgent as the most urgent that waits for it."""
        job.status, job.batch = Status.QUEUED, None
        job.place = min([job.due if place is None else place, *(follower.due for follower in self.followers(job))])

    def _requeue(self, jobs: Iterable[Job]) -> None:
        """Their worker is lost, or gave them back: what had started has used its attempt, and at the cap is a dead letter."""
        for job in jobs:
            assert job.batch is not None
            if job.status is Status.RUNNING and job.attempts >= job.entry.max_attempts:
                job.dead = True
                self._store(job, Status.FAILED, job.batch.fence, None)
            else:
                self._let_go(job, min(job.due, job.batch.claimed))  # in front of what has not had its turn yet
                self.totals["requeued"] += 1
        self._close_empty()

    def _end_from_outside(self, job: Job, status: Status, why: str = "") -> None:
        self._stop(job)
        self._store(job, status, 0, None, why)

    def _waits_for(self, job: Job) -> str:
        e, digest = job.entry, job.entry.digest.partition("@")[0]
        if job.leader:
            return f"for the answer to {job.leader}, which asks for the very same"
        if not job.queued:
            return "until a later time"
        names = {"pool": "the pool", f"adapter:{digest}": "its adapter", f"tenant:{e.tenant}": "its tenant"}
        names[f"group:{digest}:{e.tenant}"] = "its adapter for its tenant"
        if paused := [words for name, words in names.items() if name in self.halted]:
            return f"for a pause of {paused[0]}"
        ahead = self.queue(job.group).index(job)
        return f"behind {ahead} job{'s' * (ahead != 1)} of its own adapter and tenant"

    def _stop(self, job: Job) -> None:
        job.leader = ""
        if job.batch and not job.batch.submitted:
            self.stops[job.batch.name].add(job.ref)

    def _store(self, job: Job, status: Status, fence: int, outcome: bytes | None, why: str = "") -> None:
        b, e = job.batch, job.entry
        ran = (b.claimed, b.taken, job.attempts, b.worker, b.name, b.size, b.why) if b else (0, 0, job.attempts, "", "", 0, why)
        parts = (status.value, fence, self.now, *ran, e.digest, e.idem)
        job.result = Result("\t".join(map(str, parts)), outcome and self._told(job, outcome))
        job.status, job.fence, job.batch = status, fence, None
        self.totals[status.value] += 1
        if job.dead:
            self.graves[e.tenant][e.id] = self.now
            self.totals["dead"] += 1
        if e.once:
            self._pass_on(job)

    @staticmethod
    def _told(job: Job, outcome: bytes) -> bytes:
        more = {"postponed_why": msgspec.Raw(job.why.encode())} if job.why else {}
        return msgspec.json.encode(more | ({"postponed": job.laters} if job.laters else {}) | msgspec.json.decode(outcome))

    def outlive(self) -> None:
        """Time goes by until all that has a time to live is gone."""
        self.now += TTL_S * 1000 + 1
        ended = {ref for ref, job in self.jobs.items() if job.result}
        self.idem = {key: value for key, value in self.idem.items() if f"{key[0]}/{value[0]}" not in ended}
        self.once = {key: job_id for key, job_id in self.once.items() if f"{key[0]}/{job_id}" not in ended}
        self.jobs = {ref: job for ref, job in self.jobs.items() if ref not in ended}
        for name in self.stops.keys() - self.batches.keys():
            del self.stops[name]

    # -- what the server must hold --------------------------------------------------------------------------------------------------------

    def keys(self) -> Dump:
        """By name without the prefix, as `ledger_support.dump` reads it."""
        values: dict[str, Value] = {
            "groups": {f"{digest}:{tenant}" for digest, tenant in self.groups()},
            "delayed": {j.ref: j.wake for j in self.live() if j.status is Status.DELAYED},
            "deadlines": {j.ref: j.look for j in self.live() if j.expiry},
            "leases": {b.name: b.expiry for b in self.batches.values() if not b.submitted},
            "submitted": {b.name: b.expiry for b in self.batches.values() if b.submitted},
            "paused": set(self.halted),
            "served": {tenant: str(tokens) for tenant, tokens in self.served.items() if tokens},
            "counts": {name: str(n) for name, n in (self.totals | Counter(queued=self.queued())).items() if n},
            "tries": {j.ref: self._tries(j) for j in self.live() if j.attempts - (j.status in BEGUN) or j.laters},
            "leader": {"id": self.leader, "epoch": str(self.epoch), "until": str(self.leads_until)},
        }
        values |= {name: str(number) for name, number in (("fence", self.fences), ("reaped", self.reaped)) if number}
        for (digest, tenant), jobs in self.groups().items():
            values[f"queue:{digest}:{tenant}"] = {j.entry.id: j.place for j in jobs}
        for (tenant, key), (job_id, body_hash) in self.idem.items():
            values[f"idem:{tenant}:{key}"] = f"{job_id}\t{body_hash}"
        values |= {f"once:{tenant}:{what}": job_id for (tenant, what), job_id in self.once.items()}
        values["follows"] = {j.ref: j.leader for j in self.live() if j.leader}
        values |= {f"behind:{j.ref}": {f.entry.id: f.due for f in self.followers(j)} for j in self.live()}
        values |= {f"by_tenant:{tenant}": dict(ids) for tenant, ids in self.listed.items()}
        values |= {f"dead:{tenant}": dict(ids) for tenant, ids in self.graves.items()}
        for batch in self.batches.values():
            values[f"batch:{batch.name}"] = self._batch_fields(batch)
            values[f"members:{batch.name}"] = set(self.members(batch.name))
            values[f"begun:{batch.name}"] = {ref for ref, job in self.members(batch.name).items() if job.status in BEGUN}
            values[f"outstanding:{batch.worker}"] = self.outstanding(batch.worker)
        for name, refs in self.stops.items():
            values[f"stop:{name}"] = set(refs)
        for job in self.jobs.values():
            values[f"job:{job.ref}"] = self._job_text(job)
        return {name: (value, self._mortal(name)) for name, value in values.items() if value}

    @staticmethod
    def _tries(job: Job) -> str:
        return "\t".join([str(job.attempts - (job.status in BEGUN)), str(job.laters), *([job.why] if job.why else [])])

    @staticmethod
    def _batch_fields(b: Batch) -> dict[str, str]:
        fields = {"w": b.worker, "d": b.digest, "f": str(b.fence), "c": str(b.claimed), "n": str(b.size), "by": b.by, "y": b.why}
        fields |= {"t": str(b.taken), "i": b.incarnation} if b.taken else {}
        return fields | ({"s": str(b.submitted), "o": b.note} if b.submitted else {})

    @staticmethod
    def _job_text(job: Job) -> str:
        e = job.entry
        flag = "x" if job.expiry or e.idem or e.once else "-"
        head = "\t".join(map(str, (flag, job.due, job.expiry, e.digest, e.tenant, e.max_attempts, e.idem)))
        birth, request = f"{job.enqueued}\t{e.via}\n{e.meta.decode()}", e.request.decode()
        if job.result is None:
            return f"{head}\n{birth}\n{request}"
        outcome = job.result.outcome.decode() if job.result.outcome is not None else f'"code":"{CODES[job.status]}"'
        text = f"{job.result.line}\n{birth}\n{outcome}"
        return f"{text}\n{head}\n{request}" if job.dead else text

    def _mortal(self, name: str) -> bool:
        """Whether it goes away by itself: what an ended job leaves, and word for a worker about a batch that is over."""
        kind, _, rest = name.partition(":")
        if kind == "idem":
            tenant, _, key = rest.partition(":")
            return self.jobs[f"{tenant}/{self.idem[tenant, key][0]}"].result is not None
        if kind == "once":
            tenant, _, what = rest.partition(":")
            return self.jobs[f"{tenant}/{self.once[tenant, what]}"].result is not None
        if kind == "stop":
            return rest not in self.batches
        return kind == "job" and self.jobs[rest].result is not None


def _why(outcome: bytes) -> str:
    """Of the error in an outcome, as the ledger keeps it: a message of 300 bytes at most, of whole characters."""
    error = msgspec.json.decode(outcome).get("error")
    if not error:
        return ""
    message = error["message"].encode()
    if len(message) > 300:
        message = message[:300].decode(errors="ignore").encode() + "…".encode()
    return msgspec.json.encode({"code": error["code"], "message": message.decode()}).decode()
