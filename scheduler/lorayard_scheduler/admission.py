"""From what a producer sends to what the ledger keeps: every check that can be made before a job is accepted. HTTP and Celery share it."""

from __future__ import annotations

import difflib
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from lorayard.adapters import AdapterRegistry, Manifest
from lorayard.bodies import asked_tokens, read_body
from lorayard.errors import BadRequest, Conflict, DeadlineUnmet, LorayardError, NotFound, PromptTooLong, TooLarge, Unavailable
from lorayard.jobs import BASE_DIGEST, JobSpec, Lane, convert_spec, laned, new_id, parse_spec
from lorayard.ledger.connection import unavailable
from lorayard.ledger.documents import meta_line
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import Entry
from lorayard.ledger.registry import WorkerRegistry
from lorayard.settings import NAME_PATTERN, Settings
from lorayard_scheduler.quoting import SAMPLES, Eta, Quoting, Round
from lorayard_scheduler.routing import Routes, Routing

_BY_ID = "id\x1f"
"""Begins the idempotency key of a job whose producer chose the id alone; no producer's key can hold such a character."""


class Accepted(NamedTuple):
    """`status` is queued or delayed, or succeeded: the same was computed before, and need be only once. Of a job that the same key and body
    had made before, what it is now. `eta` is a quote as the API gives it; None where nobody can tell."""

    id: str
    status: str
    eta: dict[str, Any] | None = None


Answer = Accepted | LorayardError
Item = bytes | dict[str, Any] | LorayardError
"""A job as JSON, as a decoded object, or an error that was found while it was read."""


class Admission:
    """Accepts jobs for one process. Thread-safe: it keeps nothing but connections, and what it quotes from."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self.quoting = Quoting(ledger)
        self._adapters = AdapterRegistry(ledger.client)
        self._workers = WorkerRegistry(ledger.client)
        self._routing = Routing(settings, ledger.client)

    def submit(self, tenant: str, items: Sequence[Item], *, via: str = "http") -> list[Answer]:
        """Enqueue what is in order; one answer an item, in order. An item that is refused harms no other.

        With the answers, the accepted jobs are durable. Raises `Unavailable` when the ledger cannot be reached: nothing was accepted then
        that an idempotency key would not find again.
        """
        specs = [self._read(item) for item in items]
        names = {spec.adapter for spec in specs if isinstance(spec, JobSpec) and spec.adapter}
        try:
            adapters = self._known(tenant, names)
            routes = self._routing.look(tenant) if any(isinstance(s, JobSpec) and s.route != "local" for s in specs) else None
            limit = self._prompt_limit()
        except redis.RedisError as error:
            raise unavailable(error) from error
        quotes = self.quoting.round(tenant, Counter(spec.adapter for spec in specs if isinstance(spec, JobSpec)))
        answers: list[Answer | None] = [None] * len(specs)
        entries: list[Entry] = []
        etas: list[Eta | None] = []
        places: list[int] = []
        for i, spec in enumerate(specs):
            if isinstance(spec, LorayardError):
                answers[i] = spec
                continue
            try:
                entry, eta = self._entry(tenant, spec, adapters, limit, routes, via, quotes)
                entries.append(entry)
                etas.append(eta)
                places.append(i)
            except LorayardError as error:
                answers[i] = error
            except (RecursionError, TypeError, ValueError) as error:  # JSON has no words for it: a lone surrogate, too deep a nesting
                answers[i] = BadRequest(f"not a job: cannot be written as JSON ({error})")
        enqueued = self._ledger.enqueue(entries, max_queued=self._settings.max_queued, max_memory=self._settings.max_memory)
        for i, entry, eta, (job_id, status) in zip(places, entries, etas, enqueued, strict=True):
            answers[i] = self._answer(entry, job_id, status, eta)
        some = random.sample(range(len(entries)), min(SAMPLES, len(entries)))
        sample = [
            (entries[i].id, entries[i].digest, eta)
            for i in some
            if (eta := etas[i]) and enqueued[i].status == "queued" and not entries[i].once
        ]
        self.quoting.came(tenant, quotes.came, sample)
        return self._as_they_are(tenant, [answer for answer in answers if answer is not None])

    def _as_they_are(self, tenant: str, answers: list[Answer]) -> list[Answer]:
        """Jobs that existed before, with their status now."""
        known = [a.id for a in answers if isinstance(a, Accepted) and a.status == "exists"]
        found = dict(zip(known, self._ledger.show(tenant, known), strict=True))
        now = {job_id: document["status"] if document else "expired" for job_id, document in found.items()}
        return [Accepted(a.id, now[a.id]) if isinstance(a, Accepted) and a.id in now else a for a in answers]

    def _answer(self, entry: Entry, job_id: str, status: str, eta: Eta | None) -> Answer:
        if status == "conflict":
            param, used = ("id", entry.id) if entry.idem.startswith(_BY_ID) else ("idempotency_key", entry.idem)
            return Conflict(
                f"{param} {used!r} was used before, with another body or id: send the same again, or a new {param}",
                code="idempotency_conflict",
                param=param,
            )
        if status == "full":
            most = self._settings.max_queued
            return Unavailable(f"the backlog is full ({most} jobs): try again later", code="backlog_full", retry_after=10)
        if status == "memory":
            message = "the ledger's Redis is nearly full: try again when jobs have ended, or give it more with maxmemory"
            return Unavailable(message, code="ledger_full", retry_after=10)
        return Accepted(job_id, status, eta.document if eta and status not in ("exists", "succeeded") else None)

    @staticmethod
    def _read(item: Item) -> JobSpec | LorayardError:
        try:
            if isinstance(item, LorayardError):
                return item
            return parse_spec(item) if isinstance(item, bytes) else convert_spec(item)
        except LorayardError as error:
            return error

    def _known(self, tenant: str, names: set[str]) -> dict[str, Manifest]:
        found = self._adapters.get_many(tenant, [name for name in names if re.fullmatch(NAME_PATTERN, name)])
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def _prompt_limit(self) -> int:
        """Bytes of text that no tokenization of the pool's model could fit into its context; 0 while no worker has told."""
        workers = [w for w in self._workers.workers(self._settings.pool) if w.max_prompt_tokens]
        return max((w.max_prompt_tokens * w.max_token_bytes for w in workers), default=0)

    def _entry(
        self,
        tenant: str,
        spec: JobSpec,
        adapters: dict[str, Manifest],
        limit: int,
        routes: Routes | None,
        via: str,
        quotes: Round,
    ) -> tuple[Entry, Eta | None]:
        settings = self._settings
        pool = spec.pool or settings.pool
        if pool != settings.pool:
            raise NotFound(f"no pool named {pool!r} here; there is {settings.pool!r}", code="pool_not_found", param="pool")
        manifest = adapters.get(spec.adapter) if spec.adapter else None
        if spec.adapter and manifest is None:
            raise NotFound(self._unknown(tenant, spec.adapter), code="adapter_not_found", param="adapter")
        lane: Lane = ""
        if routes is None:
            read_body(spec.endpoint, spec.request)
        else:
            lane = routes.lane(spec, manifest)
        request = msgspec.json.encode(spec.request)
        if lane in ("", "auto") and limit and len(request) > limit and (size := _text_bytes(spec.request)) > limit:
            raise PromptTooLong(
                f"the prompt cannot fit the model's context ({size} bytes of text): shorten it, or serve it with a larger LORAYARD_N_CTX",
                param="messages" if "messages" in spec.request else "prompt",
            )
        digest = manifest.digest if manifest else BASE_DIGEST
        queued, eta = self._place(spec, digest, lane, quotes)
        once = spec.once(queued)
        meta = meta_line(spec.adapter, spec.endpoint, spec.priority, spec.metadata, spec.route, spec.deadline_s, spec.not_before_s, once)
        if (size := len(request) + len(meta)) > settings.max_job_bytes:
            raise TooLarge(
                f"the job has {size} bytes, more than the {settings.max_job_bytes} of LORAYARD_MAX_JOB_BYTES: shorten request or metadata",
                param="request" if len(request) > len(meta) else "metadata",
            )
        idem = spec.idempotency_key or (_BY_ID + spec.id if spec.id else "")
        entry = Entry(
            id=spec.id or new_id(pool),
            tenant=tenant,
            digest=queued,
            wait_ms=settings.wait_target_ms(spec.priority),
            deadline_ms=_ms(spec.deadline_s),
            not_before_ms=_ms(spec.not_before_s),
            max_attempts=settings.max_attempts,
            via=via,
            idem=idem,
            body_hash=spec.body_hash() if idem else "",
            meta=meta,
            request=request,
            once=once,
        )
        quotes.queued(queued)
        return entry, eta

    def _place(self, spec: JobSpec, digest: str, lane: Lane, quotes: Round) -> tuple[str, Eta | None]:
        """The queue it goes to, and when it will have ended. A job that minds is refused, or leaves home at once, when that is too late."""
        queue, target = laned(digest, lane), self._settings.wait_target_ms(spec.priority)
        when = target, _ms(spec.deadline_s), _ms(spec.not_before_s), asked_tokens(spec.request) or 0
        eta = quotes.eta(spec.adapter, queue, *when)
        if spec.max_risk is None or eta is None or round(eta.quote.risk or 0.0, 3) <= spec.max_risk:
            return queue, eta
        if lane == "auto":
            queue = laned(digest, "groq")
            return queue, quotes.eta(spec.adapter, queue, *when)
        half, most = (spec.not_before_s or 0.0) + eta.quote.median / 1000, (spec.not_before_s or 0.0) + eta.quote.p80 / 1000
        raise DeadlineUnmet(
            f"deadline_s is {spec.deadline_s:g}, but half of such jobs would end within {half:.1f} s, 80 % within {most:.1f} s; the"
            f" risk of missing it is {eta.quote.risk:.2f}, more than max_risk {spec.max_risk:g}; send it later, or allow more",
            param="deadline_s",
            eta=eta.document,
        )

    def _unknown(self, tenant: str, name: str) -> str:
        have = [m.name for m in self._adapters.list(tenant)]
        near = difflib.get_close_matches(name, have, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(have[:10])}." if have else "."
        return f"no adapter named {name[:80]!r}{hint} 'lorayard adapters add NAME PATH' adds one."


def _ms(seconds: float | None) -> int:
    """Never rounded to 0, which means none."""
    return math.ceil((seconds or 0) * 1000)


def _text_bytes(request: dict[str, Any]) -> int:
    """UTF-8 bytes of the text that a prompt will hold in any case."""
    messages = request.get("messages")
    parts = [request.get("prompt")]
    parts += [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    return sum(len(part.encode()) for part in parts if isinstance(part, str))
