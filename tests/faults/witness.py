"""A producer that remembers every answer it was given, and reads results again and again to see whether they change."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import redis

from faults.child import Script
from faults.yard import ADAPTERS, Yard
from lorayard.client import Client
from lorayard.errors import LorayardError, Unavailable
from lorayard.jobs import TERMINAL
from lorayard.ledger.keys import ref as ref_of
from lorayard.ledger.keys import split_ref

TENANTS = ("default", "acme")

_TWICE = """
local p, seen, twice = KEYS[1], {}, {}
for _, bid in ipairs(redis.call('ZRANGE', p .. 'leases', 0, -1)) do
  for _, ref in ipairs(redis.call('SMEMBERS', p .. 'members:' .. bid)) do
    if seen[ref] then twice[#twice + 1] = ref .. ' in ' .. seen[ref] .. ' and ' .. bid end
    seen[ref] = bid
  end
end
return twice
"""


class Witness:
    """`acknowledged` are the refs that a submit was answered for, `unknown` those sent without an answer and not sent again."""

    def __init__(self, yard: Yard, rng: random.Random) -> None:
        self.yard = yard
        self.rng = rng
        self.acknowledged: dict[str, float] = {}
        self.unknown: set[str] = set()
        self.refused: Counter[str] = Counter()  # by code
        self.longest_s = 0.0  # of the calls that submit
        self.documents: dict[str, dict[str, Any]] = {}  # as first read after its end
        self.changed: list[str] = []
        self.doubled: list[str] = []  # jobs seen under two leases at once
        self.looks = 0
        self.told: Counter[str] = Counter()  # ends in the stream of ends
        self._clients = {tenant: yard.client(None if tenant == "default" else tenant) for tenant in TENANTS}
        self._readers = {tenant: yard.client(None if tenant == "default" else tenant) for tenant in TENANTS}
        self._made = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        for client in (*self._clients.values(), *self._readers.values()):
            client.close()

    # -- jobs ---------------------------------------------------------------------------------------------------------------------------

    def job(self, *, adapter: str | None = None, fields: dict[str, Any] | None = None, **script: Any) -> dict[str, Any]:
        """A job whose model does what `script` (`faults.child.Script`) says."""
        with self._lock:
            self._made += 1
            number = self._made
        text = msgspec.json.encode(Script(**script)).decode()
        request = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        return {"id": f"j{number}", "request": request} | ({"adapter": adapter} if adapter else {}) | (fields or {})

    def jobs(self, count: int, *, ms: tuple[int, int] = (5, 40), mixed: bool = False, **script: Any) -> list[dict[str, Any]]:
        """Jobs of all adapters and the base. `mixed`: some fail, fail once, begin later, have a deadline or another priority, or are all
        the same and to be computed once."""
        made = []
        for _ in range(count):
            own: dict[str, Any] = dict(script)
            fields: dict[str, Any] = {}
            if mixed:
                dice = self.rng.random()
                own |= {"retry": 1} if dice < 0.02 else {"fail": True} if dice < 0.05 else {}
                fields |= {"not_before_s": round(self.rng.uniform(0.1, 3), 3)} if 0.05 < dice < 0.10 else {}
                fields |= {"deadline_s": round(self.rng.uniform(0.5, 60), 3)} if 0.10 < dice < 0.15 else {}
                fields |= {"priority": self.rng.choice(("high", "low"))} if 0.15 < dice < 0.30 else {}
                fields |= {"coalesce": True} if 0.30 < dice < 0.40 else {}
            adapter = self.rng.choice((None, *ADAPTERS))
            own["ms"] = ms[1] + self.rng.randint(1, 3) if "coalesce" in fields else self.rng.randint(*ms)
            made.append(self.job(adapter=adapter, fields=fields, **own))
        return made

    # -- submits ------------------------------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[dict[str, Any]], *, tenant: str | None = None, patience_s: float = 120.0) -> list[str]:
        """Submit until all are acknowledged; with `patience_s` 0 once only. The refs that were acknowledged."""
        tenant = tenant or self.rng.choice(TENANTS)
        give_up = time.monotonic() + patience_s
        left = {ref_of(tenant, job["id"]): job for job in jobs}
        taken: list[str] = []
        while left:
            answers = self._once(self._clients[tenant], list(left.values()))
            for ref, answer in zip(list(left), answers, strict=True):
                if answer is True:
                    self.acknowledged[ref] = time.monotonic()
                    self.unknown.discard(ref)
                    taken.append(ref)
                    del left[ref]
                elif answer is None:
                    self.unknown.add(ref)
            if time.monotonic() > give_up:
                assert not (left and patience_s), f"{len(left)} jobs were not accepted within {patience_s:.0f} s: {self.refused}"
                break
            if left:
                time.sleep(0.2)
        return taken

    def _once(self, client: Client, jobs: list[dict[str, Any]]) -> list[bool | None]:
        """Per job: accepted, refused, or (None) nobody knows."""
        began = time.monotonic()
        try:
            rows = client.submit(jobs)
        except Unavailable as error:
            self.refused[error.code or "unavailable"] += len(jobs)
            # An answer that says 503 is a refusal of what was not in an earlier part; without an answer, anything may have happened.
            return [None] * len(jobs)
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - began)
        for row in rows:
            if "error" in row:
                self.refused[str(row["error"].get("code"))] += 1
        return ["error" not in row for row in rows]

    # -- reads --------------------------------------------------------------------------------------------------------------------------

    def read(self, refs: Sequence[str]) -> None:
        """Read documents through the API; what has ended must be what was read before."""
        by_tenant: dict[str, list[str]] = {}
        for ref in refs:
            tenant, job_id = split_ref(ref)
            by_tenant.setdefault(tenant, []).append(job_id)
        for tenant, ids in by_tenant.items():
            for start in range(0, len(ids), 100):
                part = ids[start : start + 100]
                found = self._readers[tenant]._http_call("GET", "/v1/jobs", params={"ids": ",".join(part)})["data"]
                for document in found:
                    self.saw(ref_of(tenant, document["id"]), document)

    def saw(self, ref: str, document: dict[str, Any]) -> None:
        if document["status"] in TERMINAL:
            first = self.documents.setdefault(ref, document)
            if first != document:
                self.changed.append(f"{ref}: {first} became {document}")
        elif ref in self.documents:
            self.changed.append(f"{ref}: ended as {self.documents[ref]['status']}, then {document['status']}")

    @contextmanager
    def watching(self, every_s: float = 0.05) -> Iterator[None]:
        """Meanwhile, read random results and look for jobs under two leases."""
        done = threading.Event()
        threads = [threading.Thread(target=run, args=(done, every_s), daemon=True) for run in (self._watch_leases, self._watch_results)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def _watch_leases(self, done: threading.Event, every_s: float) -> None:
        prefix, after = f"ly:{{{self.yard.settings.pool}}}:", "0-0"
        ledger = self.yard.ledger()
        while not done.wait(every_s):
            with contextlib.suppress(redis.RedisError, LorayardError):
                twice: Any = self.yard.store.eval(_TWICE, 1, prefix)
                self.doubled += [line.decode() for line in twice]
                self.looks += 1
                after = self._hear(ledger, after)
        for _ in range(1000):  # what was said until now
            with contextlib.suppress(redis.RedisError, LorayardError):
                if (last := self._hear(ledger, after)) == after:
                    return
                after = last

    def _hear(self, ledger: Any, after: str) -> str:
        after, refs = ledger.ends(after, 0)
        self.told.update(refs)
        return str(after)

    def _watch_results(self, done: threading.Event, every_s: float) -> None:
        rng = random.Random(self.rng.random())
        while not done.wait(4 * every_s):
            refs = list(self.acknowledged)
            with contextlib.suppress(LorayardError):
                self.read(rng.sample(refs, min(len(refs), 60)))

    # -- ends ---------------------------------------------------------------------------------------------------------------------------

    def pending(self, refs: Sequence[str] | None = None) -> list[str]:
        """Those of the refs (default: all acknowledged) that have not ended, by the ledger itself."""
        left = []
        wanted = list(self.acknowledged if refs is None else refs)
        for tenant in TENANTS:
            mine = [ref for ref in wanted if split_ref(ref)[0] == tenant]
            for start in range(0, len(mine), 500):
                part = mine[start : start + 500]
                documents = self.yard.ledger().show(tenant, [split_ref(ref)[1] for ref in part])
                left += [ref for ref, document in zip(part, documents, strict=True) if not document or document["status"] not in TERMINAL]
        return left

    def wait(self, refs: Sequence[str] | None = None, timeout_s: float = 120.0) -> float:
        """Until these jobs have ended; when that was, in monotonic seconds."""
        give_up = time.monotonic() + timeout_s
        left = list(refs) if refs is not None else list(self.acknowledged)
        while True:
            with contextlib.suppress(LorayardError):  # the store is away
                left = self.pending(left)
                if not left:
                    return time.monotonic()
            assert time.monotonic() < give_up, f"{len(left)} jobs have not ended within {timeout_s:.0f} s, {left[:5]} among them"
            time.sleep(0.05)
