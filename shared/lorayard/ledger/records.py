"""What calls of the ledger take and give, and how `functions.lua` writes it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

EndStatus = Literal["succeeded", "failed", "retry", "later"]
EnqueueStatus = Literal["queued", "delayed", "exists", "conflict", "full", "memory", "succeeded"]
_ENQUEUE: dict[str, EnqueueStatus] = {
    "d": "delayed",
    "e": "exists",
    "c": "conflict",
    "f": "full",
    "m": "memory",
    "s": "succeeded",
}
HOSTED = "@hosted"
"""Behind a tenant's name: what hosted workers computed for it is counted apart from what local ones did."""


class Entry(NamedTuple):
    """A job about to be enqueued, all checks done. Times are milliseconds from now; 0 means none.

    `meta` and `request` are one line of JSON each: what stays public of a job, and the OpenAI body. With an idempotency key, `body_hash`
    is what the key must come with again. `once`: hex digits; jobs of a tenant with the same are computed once, and it stands in `meta` too.
    """

    id: str
    tenant: str
    digest: str
    wait_ms: int
    deadline_ms: int
    not_before_ms: int
    max_attempts: int
    via: str
    idem: str
    body_hash: str
    meta: bytes
    request: bytes
    once: str = ""

    def written(self) -> tuple[str, str, bytes]:
        """As `ly_enqueue` takes it."""
        sort = (
            self.tenant,
            self.digest,
            str(self.wait_ms),
            str(self.deadline_ms),
            str(self.not_before_ms),
            str(self.max_attempts),
            self.via,
            self.idem,
            self.body_hash,
            self.once,
        )
        return self.id, "\t".join(sort), b"%b\n%b" % (self.meta, self.request)

    def answered(self, answer: bytes) -> Enqueued:
        """What `ly_enqueue` says of it where it is not just queued: a letter, and the id of the job that was there before."""
        code = answer.decode()
        return Enqueued(code[1:] or self.id, _ENQUEUE[code[0]])


class Enqueued(NamedTuple):
    id: str
    status: EnqueueStatus


class TakenJob(NamedTuple):
    """`attempts` counts those before this one, of at most `most`; `laters` how often it was put off at no cost. `due` is in ms."""

    ref: str
    attempts: int
    most: int
    laters: int
    meta: dict[str, Any]
    request: bytes
    due: int = 0


class Taken(NamedTuple):
    """A batch under a lease, the most due job first. Times are the ledger's, in milliseconds."""

    batch: str
    fence: int
    digest: str
    claimed: int
    taken: int
    jobs: list[TakenJob]


class End(NamedTuple):
    """What became of one job. `outcome` is JSON; `tokens` are charged to the tenant, apart if a `hosted` worker computed them; `delay_ms`
    goes with retry and later."""

    ref: str
    status: EndStatus
    outcome: bytes = b"{}"
    tokens: int = 0
    delay_ms: int = 0
    hosted: bool = False


class Submitted(NamedTuple):
    """A batch at a hosted batch service, to be looked after now. `note` is what its last keeper wrote; `submitted` is in ms."""

    batch: str
    fence: int
    digest: str
    submitted: int
    note: bytes
    refs: list[str]


class Group(NamedTuple):
    """The queued jobs of one adapter digest and tenant."""

    digest: str
    tenant: str
    jobs: int
    due: int


class InFlight(NamedTuple):
    """A batch that a worker was given. `by` is jobs by tenant; `taken` is 0 until the worker has it; `left` is jobs that have not ended,
    of which `waiting` have not begun."""

    batch: str
    worker: str
    digest: str
    by: dict[str, int]
    claimed: int
    taken: int
    left: int
    waiting: int = 0


class View(NamedTuple):
    """What the planner needs of the ledger, read at one moment (`now`, ms). `served`: by tenant, the tokens that local workers computed for
    it, and `hosted` those of hosted ones."""

    now: int
    groups: list[Group]
    in_flight: list[InFlight]
    served: dict[str, int]
    hosted: dict[str, int]
    last_event: str


class Event(NamedTuple):
    """A hint that something changed: queued (groups), ended (refs), batch (id of one that is over), worker (name)."""

    kind: str
    values: list[str]


class Reaped(NamedTuple):
    """What was put right: batches never taken, batches whose lease ran out, delayed jobs now queued, jobs expired."""

    undelivered: int
    lapsed: int
    woken: int
    expired: int


def read_jobs(reply: list[Any]) -> list[TakenJob]:
    """The most due first, of what `contents` in functions.lua says."""
    if not reply:
        return []
    jobs, again = [], reply[0]
    tries = {ref: (int(attempts), int(laters)) for ref, attempts, laters in zip(again[::3], again[1::3], again[2::3], strict=True)}
    metas: dict[bytes, dict[str, Any]] = {}  # mostly the same of a whole batch
    for ref, value in zip(reply[1::2], reply[2::2], strict=True):
        head, _, meta, request = value.split(b"\n", 3)
        _, due, _, _, _, most, _ = head.split(b"\t", 6)
        if meta not in metas:
            metas[meta] = msgspec.json.decode(meta)
        attempts, laters = tries.get(ref, (0, 0))
        jobs.append(TakenJob(ref.decode(), attempts, int(most), laters, metas[meta], request, int(due)))
    jobs.sort(key=lambda job: (job.due, job.ref))
    return jobs


def read_view(reply: list[Any], last_event: str) -> View:
    """Of what `ly_snapshot` and `ly_groups` say."""
    groups = []
    for name, jobs, due in reply[1]:
        digest, _, tenant = name.decode().partition(":")
        groups.append(Group(digest, tenant, int(jobs), int(float(due))))
    flights = []
    for batch, worker, digest, by, claimed, taken, left, waiting in reply[2]:
        words = by.decode().split()
        shares = {t: int(n) for t, n in zip(words[::2], words[1::2], strict=True)}
        when = int(claimed), int(taken)
        flights.append(InFlight(batch.decode(), worker.decode(), digest.decode(), shares, *when, int(left), int(waiting)))
    served: dict[str, int] = {}
    hosted: dict[str, int] = {}
    for name, tokens in zip(reply[3][::2], reply[3][1::2], strict=True):
        tenant, there, _ = name.decode().partition(HOSTED)
        (hosted if there else served)[tenant] = int(tokens)
    return View(int(reply[0]), groups, flights, served, hosted, last_event)
