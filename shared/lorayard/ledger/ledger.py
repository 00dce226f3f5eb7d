"""The record of every job: the only truth. Each method is one call into `functions.lua`, which alone writes it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import Any, Literal

import redis

from lorayard.errors import BadRequest, Unavailable
from lorayard.ledger import documents, keys
from lorayard.ledger.connection import unavailable
from lorayard.ledger.records import (
    HOSTED,
    End,
    Enqueued,
    Entry,
    Event,
    Reaped,
    Submitted,
    Taken,
    TakenJob,
    View,
    read_jobs,
    read_view,
)

LIBRARY = files("lorayard.ledger").joinpath("functions.lua").read_text()
Audited = Literal["jobs", "entries", "batches", "worker", "groups", "totals"]
PART_JOBS = 1_000
PART_BYTES = 4 << 20
"""Jobs are enqueued in calls of at most so many, and so much of them: the server does nothing else meanwhile."""
REAP_GAP_MS = 2_000
MAX_MEMORY = 0.85
"""The part of the server's maxmemory beyond which jobs are refused: results, and the broker's messages, need the rest."""


class Ledger:
    """One pool's ledger. Thread-safe. Raises `Unavailable` while the server cannot be reached or is out of memory, and `RuntimeError` for
    arguments that a function was not made for."""

    def __init__(self, client: redis.Redis, pool: str, *, result_ttl_s: int, library: str = LIBRARY) -> None:
        self.client = client
        self.pool = pool
        self._prefix = keys.prefix(pool)
        self._ttl = result_ttl_s
        self._library = library

    # -- the library ------------------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Load the function library unless the server has this very text."""
        try:
            if not self.installed():
                self.client.function_load(self._library, replace=True)
        except redis.RedisError as error:
            raise unavailable(error) from error

    def installed(self) -> bool:
        """Whether the server has this very text of the library."""
        found: Any = self.client.function_list("lorayard", withcode=True)
        return any(self._library.encode() in row for row in found)

    def _call(self, function: str, *args: Any) -> Any:
        try:
            try:
                return self.client.fcall(function, 1, self._prefix, *args)
            except redis.ResponseError as error:
                if "Function not found" not in str(error):
                    raise
                self.client.function_load(self._library, replace=True)
                return self.client.fcall(function, 1, self._prefix, *args)
        except redis.RedisError as error:
            if "user_function" in str(error):  # it is the function that failed, and would again
                raise RuntimeError(f"{function}: {error}") from error
            raise unavailable(error) from error

    # -- producers --------------------------------------------------------------------------------------------------------------------

    def enqueue(self, entries: Sequence[Entry], *, max_queued: int, max_memory: float = MAX_MEMORY) -> list[Enqueued]:
        """Write jobs; durable when it returns (with the server's fsync policy). One answer an entry, in order.

        In parts that keep the server from others for milliseconds only; when one cannot be written, those before it are.
        Refused are jobs beyond `max_queued` ("full"), and those for which more than the part `max_memory` of the server's maxmemory would
        be used ("memory"); without a maxmemory, none of these.
        """
        out: list[Enqueued] = []
        for part in _parts(entries):
            out += self._enqueue(part, max_queued, max_memory)
        return out

    def _enqueue(self, entries: Sequence[Entry], max_queued: int, max_memory: float) -> list[Enqueued]:
        args: list[Any] = [max_queued, max_memory]
        for e in entries:
            args += e.written()
        out = [Enqueued(entry.id, "queued") for entry in entries]
        answers = self._call("ly_enqueue", *args)
        for index, answer in zip(answers[::2], answers[1::2], strict=True):
            out[index] = entries[index].answered(answer)
        return out

    def show(self, tenant: str, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """The documents of a tenant's jobs; None for what it has no job of."""
        replies = self._call("ly_show", *(keys.ref(tenant, i) for i in ids)) if ids else []
        return [documents.document(job_id, self.pool, reply) for job_id, reply in zip(ids, replies, strict=True)]

    def cancel(self, tenant: str, ids: Sequence[str]) -> list[Literal["cancelled", "ended", "missing"]]:
        words: dict[bytes, Literal["cancelled", "ended", "missing"]] = {b"c": "cancelled", b"t": "ended", b"n": "missing"}
        return [words[code] for code in self._call("ly_cancel", tenant, self._ttl, *ids)]

    def delete(self, tenant: str, ids: Sequence[str]) -> list[Literal["deleted", "missing"]]:
        """Remove jobs at any state, with results, listing entries and idempotency keys; a worker that has one is told to stop."""
        return ["deleted" if code == b"d" else "missing" for code in self._call("ly_delete", tenant, *ids)]

    def revive(self, tenant: str, ids: Sequence[str]) -> list[Literal["queued", "missing"]]:
        """Queue dead letters again as if they were new, without the deadline they had; "missing" is whatever is no dead letter."""
        return ["queued" if code == b"q" else "missing" for code in self._call("ly_revive", tenant, *ids)]

    def list_ids(self, tenant: str, *, limit: int, after: str | None = None, dead: bool = False) -> list[str]:
        """The newest ids, newest first; or those older than the id `after`. `dead`: of dead letters. Raises `BadRequest` where `after` is
        not listed (any more): nobody knows then what comes behind."""
        name = f"{self._prefix}{'dead' if dead else 'by_tenant'}:{tenant}"
        try:
            # Ranks count from the oldest, so what is enqueued meanwhile moves nothing.
            end: Any = self.client.zcard(name) if after is None else self.client.zrank(name, after)
            if end is None:
                raise BadRequest(
                    f"after: the job {str(after)[:100]!r} is not listed here (any more), so what follows it cannot be told: go on after a"
                    " job before it that is, or begin again without 'after'",
                    code="cursor_gone",
                    param="after",
                )
            rows: Any = self.client.zrange(name, max(0, end - limit), end - 1) if end else []
        except redis.RedisError as error:
            raise unavailable(error) from error
        return [job_id.decode() for job_id in reversed(rows)]

    def counts(self) -> dict[str, int]:
        try:
            raw: Any = self.client.hgetall(self._prefix + "counts")
        except redis.RedisError as error:
            raise unavailable(error) from error
        return {name.decode(): int(value) for name, value in raw.items()}

    # -- scheduler --------------------------------------------------------------------------------------------------------------------

    def lead(self, me: str, ttl_ms: int) -> int:
        """Take or keep the lead for `ttl_ms`; the epoch to claim with, or 0 while another leads."""
        return int(self._call("ly_lead", me, ttl_ms))

    def has_leader(self, now_ms: int) -> bool:
        until: Any = self.client.hget(self._prefix + "leader", "until")
        return until is not None and int(until) > now_ms

    def resign(self, me: str) -> None:
        self._call("ly_resign", me)

    def snapshot(self) -> View:
        reply = self._call("ly_snapshot")
        return read_view(reply, reply[4].decode())

    def read_groups(self, names: Iterable[tuple[str, str]]) -> View:
        """As `snapshot`, of the named (digest, tenant) groups only; `jobs` is 0 for an empty one."""
        return read_view(self._call("ly_groups", *(f"{digest}:{tenant}" for digest, tenant in names)), "")

    def claim(
        self, *, epoch: int, worker: str, most: int, batch: str, digest: str, delivery_ms: int, why: str, takes: Iterable[tuple[str, int]]
    ) -> tuple[Literal["ok", "epoch", "busy", "paused", "empty"], int]:
        """Move the most due jobs of a digest, `n` of each named tenant, into a new batch. The number moved, or why none was."""
        pairs = [value for take in takes for value in take]
        reply = self._call("ly_claim", epoch, worker, most, batch, digest, delivery_ms, why, *pairs)
        return reply[0].decode(), int(reply[2]) if len(reply) > 1 else 0

    def recall(self, *, epoch: int, batch: str) -> int:
        """Queue the jobs of a batch that have not begun again, where they are due; how many. It costs no attempt, and whatever their worker
        does with them from then on is refused."""
        return int(self._call("ly_recall", epoch, batch))

    def awaits_taking(self, batch: str) -> bool:
        """Whether a claimed batch is still its worker's to take."""
        try:
            worker, taken = self.client.hmget(f"{self._prefix}batch:{batch}", "w", "t")
        except redis.RedisError as error:
            raise unavailable(error) from error
        return worker is not None and taken is None

    def reap(self, *, limit: int = 1000, grace_ms: int = 0) -> Reaped:
        """Queue again what was not taken in time or whose lease ran out, wake what was delayed, expire what is past its deadline.

        At most `limit` of each. With a grace, leases last at least so much longer where nobody has reaped for `REAP_GAP_MS`: the server was
        away, and so nobody could renew.
        """
        return Reaped(*map(int, self._call("ly_reap", limit, self._ttl, grace_ms, REAP_GAP_MS)))

    def pause(self, what: str) -> bool:
        """Plan no more of "pool", "adapter:DIGEST" or "tenant:TENANT"; what workers have already goes on. False if it was paused."""
        return bool(self._call("ly_pause", "SADD", what))

    def resume(self, what: str) -> bool:
        """The end of a pause of that name. False if there was none."""
        return bool(self._call("ly_pause", "SREM", what))

    def paused(self) -> list[str]:
        try:
            raw: Any = self.client.smembers(self._prefix + "paused")
        except redis.RedisError as error:
            raise unavailable(error) from error
        return sorted(what.decode() for what in raw)

    def lift(self, tenant: str, to: int, *, hosted: bool = False) -> None:
        """It counts as served so many tokens at least, by local or by hosted workers."""
        self._call("ly_lift", tenant + HOSTED * hosted, to)

    def forget(self, tenant: str, *, page: int = 1000) -> int:
        """Drop listing entries of jobs whose results have expired; how many."""
        now_s, now_us = self._time()
        before = now_s * 1000 + now_us // 1000 - self._ttl * 1000
        kept, dropped, looked = 0, 0, page
        while looked == page:
            looked, gone = map(int, self._call("ly_forget", tenant, before, kept, page))
            kept, dropped = kept + looked - gone, dropped + gone
        return dropped

    def audit(self, what: Audited, names: Sequence[str], *, repair: bool) -> list[tuple[str, str]]:
        """Check the named things, and put right what is wrong; (kind, name) of each finding. See `audit.py`, which knows what to name."""
        rows: list[tuple[str, str]] = []
        step = max(1, len(names)) if what == "totals" else 4000  # a multiple of the four words of an entry
        for start in range(0, max(1, len(names)), step):
            reply = self._call(f"ly_audit_{what}", int(repair), *names[start : start + step])
            rows += [(kind.decode(), name.decode()) for kind, name in reply]
        return rows

    def _time(self) -> tuple[int, int]:
        seconds, micros = self.client.time()
        return int(seconds), int(micros)

    # -- workers ----------------------------------------------------------------------------------------------------------------------

    def hello(self, worker: str, incarnation: str) -> int:
        """A worker process has started: batches that an earlier process of this name had taken are queued again at once."""
        return int(self._call("ly_hello", worker, incarnation, self._ttl))

    def take(self, batch: str, worker: str, incarnation: str, lease_ms: int) -> Taken | None:
        """Begin the lease. None when the batch is no longer current, or taken already: then there is nothing to do."""
        token = secrets.token_hex(8)  # the client repeats a call whose reply is lost; that is no second taking
        reply = self._call("ly_take", batch, worker, incarnation, lease_ms, token)
        if not reply:
            return None
        fence, digest, claimed, taken = reply[:4]
        return Taken(batch, int(fence), digest.decode(), int(claimed), int(taken), read_jobs(reply[4:]))

    def outstanding(self, worker: str) -> list[str]:
        """The batches a worker has been given, taken or not."""
        try:
            raw: Any = self.client.smembers(f"{self._prefix}outstanding:{worker}")
        except redis.RedisError as error:
            raise unavailable(error) from error
        return [batch.decode() for batch in raw]

    def start(self, batch: str, fence: int, refs: Sequence[str]) -> list[str]:
        """Count an attempt of each job, should its end not come; the refs that must not go on."""
        return [ref.decode() for ref in self._call("ly_start", batch, fence, *refs)]

    def renew(self, batches: Sequence[tuple[str, int]], lease_ms: int) -> tuple[list[str], list[tuple[str, str]]]:
        """Renew leases by (batch, fence); the batches that are lost, and the jobs, as (batch, ref), that were
        cancelled, deleted or recalled."""
        lost, stop = self._call("ly_renew", lease_ms, *(value for pair in batches for value in pair))
        return [b.decode() for b in lost], [(b.decode(), r.decode()) for b, r in zip(stop[::2], stop[1::2], strict=True)]

    def words(self, worker: str, until: threading.Event) -> Iterator[tuple[Literal["take", "stop"], str, list[str]]]:
        """What a worker is told, as it happens, until the event is set: ("take", batch, []) when a batch is its own, ("stop", batch, refs)
        when jobs that it has are cancelled, deleted or recalled. Words get lost: `outstanding` and `renew` tell all.
        """
        try:
            with self.client.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
                channel.subscribe(f"{self._prefix}to:{worker}")
                while not until.is_set():
                    if channel.health_check_response_counter > 1:  # redis-py asks, and never looks whether an answer came
                        raise Unavailable("the connection for words to this worker is dead; connecting again")
                    if message := channel.get_message(timeout=0.5):
                        word, batch, *refs = message["data"].decode().split(" ")
                        yield word, batch, refs
        except redis.RedisError as error:
            raise unavailable(error) from error

    def finish(self, batch: str, fence: int, ends: Sequence[End]) -> list[Literal["stored", "retried", "already", "stale"]]:
        """Commit ends of jobs, fenced; safe to repeat."""
        words: dict[bytes, Literal["stored", "retried", "already", "stale"]] = {
            b"s": "stored",
            b"r": "retried",
            b"a": "already",
            b"x": "stale",
        }
        args = [value for e in ends for value in (e.ref, f"{e.status}\t{e.delay_ms}\t{e.tokens}{HOSTED * e.hosted}", e.outcome)]
        return [words[code] for code in self._call("ly_finish", batch, fence, self._ttl, *args)]

    def give_back(self, batch: str, fence: int, refs: Sequence[str]) -> int:
        """Queue again jobs that were not started; costs no attempt."""
        return int(self._call("ly_give_back", batch, fence, self._ttl, *refs))

    # -- batches at a hosted batch service ----------------------------------------------------------------------------------------------

    def submit(self, batch: str, fence: int, note: bytes) -> bool:
        """From now on a taken batch is no worker's: its jobs are submitted, each attempt counts, and whoever tends looks after it.

        False where it is not current any more.
        """
        return bool(self._call("ly_submit", batch, fence, note))

    def tend(self, token: str, *, limit: int, hold_ms: int) -> list[Submitted]:
        """Submitted batches that it is time to look at. They are this token's for `hold_ms`; its jobs are ended with `finish`."""
        return [
            Submitted(batch.decode(), int(fence), digest.decode(), int(at), note, sorted(ref.decode() for ref in refs))
            for batch, fence, digest, at, note, refs in self._call("ly_tend", limit, hold_ms, token)
        ]

    def note(self, batch: str, token: str, note: bytes, look_ms: int) -> bool:
        """Write what is known of a submitted batch, and look at it next in `look_ms`; False where another looks after it by now."""
        return bool(self._call("ly_note", batch, token, note, look_ms))

    def contents(self, batch: str, token: str) -> list[TakenJob]:
        """The jobs of a submitted batch that have not ended, the most due first; none where another looks after it by now."""
        return read_jobs(self._call("ly_contents", batch, token))

    def settle(self, batch: str, token: str) -> bool:
        """Close a submitted batch of which nothing is left; False while jobs of it have not ended, or where another looks after it."""
        return bool(self._call("ly_settle", batch, token))

    # -- everyone who waits -----------------------------------------------------------------------------------------------------------

    def events(self, after: str, block_ms: int) -> tuple[str, list[Event]]:
        """What a scheduler should hear, after an event id, waiting up to `block_ms` (0: not at all); and the id to go on from."""
        return self._read("events", after, block_ms)

    def ends(self, after: str, block_ms: int) -> tuple[str, list[str]]:
        """The refs of jobs that ended (or were deleted) after an id of `last_end`, as `events`."""
        after, events = self._read("ends", after, block_ms)
        return after, [ref for event in events for ref in event.values]

    def _read(self, stream: str, after: str, block_ms: int) -> tuple[str, list[Event]]:
        try:
            reply: Any = self.client.xread({self._prefix + stream: after}, count=1000, block=block_ms or None)
        except redis.RedisError as error:
            raise unavailable(error) from error
        if not reply:
            return after, []
        rows = (reply[0] if isinstance(reply, list) else next(iter(reply.items())))[1]
        rows = rows[0] if rows and isinstance(rows[0], list) else rows
        return rows[-1][0].decode(), [Event(f[b"k"].decode(), f[b"v"].decode().split(" ")) for _, f in rows]

    def last_end(self) -> str:
        """The id to hear from on of what ends from now on."""
        rows: Any = self.client.xrevrange(self._prefix + "ends", count=1)
        return str(rows[0][0].decode()) if rows else "0-0"


def _parts(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """At most so many jobs and so many bytes of them together."""
    start = size = 0
    for i, entry in enumerate(entries):
        size += len(entry.request) + len(entry.meta)
        if i > start and (i - start == PART_JOBS or size > PART_BYTES):
            yield entries[start:i]
            start, size = i, len(entry.request) + len(entry.meta)
    if start < len(entries):
        yield entries[start:]
