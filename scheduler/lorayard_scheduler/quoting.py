"""Quotes where jobs are submitted and polled: forecasts read from Redis, and quoted jobs looked at again when they have ended.

The scheduler leaves its forecast under a key of its own, and reads from a list what became of quoted jobs. Both may be lost at any time:
then there are no quotes for a while, or less exact ones.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from lorayard.errors import LorayardError
from lorayard.jobs import BASE_DIGEST, TERMINAL, lane_of, laned
from lorayard.ledger import keys
from lorayard.ledger.explained import waited
from lorayard.ledger.ledger import Ledger
from lorayard_scheduler.forecasts import Seen
from lorayard_scheduler.quotes import Forecast, Quote, Since, Situation
from lorayard_scheduler.reasons import HostedLimits, is_paused, waits_for

READ_EVERY_S = 0.5
STALE_MS = 10_000.0
"""A forecast older than that says nothing: nobody leads, or the server takes no writes."""
SAMPLES = 10
"""Jobs of a forecast's time at most that are looked at again."""
_SAMPLES_MOST = _SEEN_MOST = 2_000
_EXPIRED = 1.5  # what a job that expired is taken to have needed, as a multiple of the time until then


class Board:
    """Where forecasts and what became of quoted jobs are handed over; of one pool."""

    def __init__(self, ledger: Ledger) -> None:
        self._client = ledger.client
        self._forecast, self._seen = (f"{keys.WORKERS}{ledger.pool}:{name}" for name in ("forecast", "seen"))

    def now(self) -> float:
        """By the ledger's clock, ms."""
        seconds, micros = self._client.time()
        return 1000.0 * int(seconds) + int(micros) / 1000

    def publish(self, forecast: Forecast) -> None:
        """Not while memory is short: quotes end then."""
        with contextlib.suppress(redis.RedisError):
            self._client.set(self._forecast, msgspec.json.encode(forecast))

    def read(self) -> tuple[Forecast | None, float]:
        """The last forecast, whoever made it and however old, and the ledger's time."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.get(self._forecast)
            pipe.time()
            raw, (seconds, micros) = pipe.execute()
        now = 1000.0 * int(seconds) + int(micros) / 1000
        try:
            return (msgspec.json.decode(raw, type=Forecast) if raw else None), now
        except msgspec.DecodeError:  # of another release
            return None, now

    def report(self, seen: Sequence[Seen]) -> None:
        with contextlib.suppress(redis.RedisError):
            self._client.rpush(self._seen, *(msgspec.json.encode(one) for one in seen))
            self._client.ltrim(self._seen, -_SEEN_MOST, -1)

    def collect(self) -> list[Seen]:
        """What was reported since the last call; one scheduler's to learn from."""
        try:
            raw: Any = self._client.lpop(self._seen, 500)
            return [msgspec.json.decode(one, type=Seen) for one in raw or ()]
        except (redis.RedisError, msgspec.DecodeError):
            return []


class Look(NamedTuple):
    """A quote that was given, of which it shall be known what became; `waited` so long after the job had come, which asked for `most`
    tokens."""

    digest: str
    place: Situation
    quote: Quote
    most: int
    waited: float = 0.0


class Eta(NamedTuple):
    """A quote of jobs that are alike, as `place` says: when it was made, and as a document has it."""

    place: Situation
    quote: Quote
    document: dict[str, Any]
    most: int


def _document(quote: Quote, at: float) -> dict[str, Any]:
    risk = None if quote.risk is None else round(quote.risk, 3)
    return {"median_ms": round(at + quote.median), "p80_ms": round(at + quote.p80), "risk": risk}


class Quoting:
    """Of one process. Thread-safe. Nothing here raises for a server that is away: there are no quotes then."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._board = Board(ledger)
        self._lock = threading.Lock()
        self._known: Forecast | None = None
        self._read = -READ_EVERY_S
        self._ahead_ms = 0.0  # of the ledger's clock before this process's
        self._groups, self._tenants = Counter[tuple[str, str]](), Counter[str]()  # jobs that came after the forecast
        self._samples: dict[str, list[Look]] = {}
        self._left = self._left_again = 0

    def now(self) -> float:
        """By the ledger's clock, ms."""
        return 1000 * time.monotonic() + self._ahead_ms

    def forecast(self) -> Forecast | None:
        """The pool's, if it is fresh."""
        with self._lock:
            if time.monotonic() - self._read >= READ_EVERY_S:
                self._refresh()
            return self._known

    def _refresh(self) -> None:
        self._read = time.monotonic()
        try:
            found, now = self._board.read()
        except redis.RedisError:
            self._known = None
            return
        self._ahead_ms = now - 1000 * time.monotonic()
        if found is None or now - found.at > STALE_MS:
            self._known = None
        elif self._known is None or found.at != self._known.at:
            self._known, self._left, self._left_again = found, SAMPLES, SAMPLES
            self._groups.clear()
            self._tenants.clear()

    # -- at submit ------------------------------------------------------------------------------------------------------------------------

    def round(self, tenant: str, adapters: Counter[str | None]) -> Round:
        """For the jobs of one call, so many by the adapter that they name."""
        forecast = self.forecast()
        with self._lock:
            groups = {digest: n for (digest, whose), n in self._groups.items() if whose == tenant}
            return Round(forecast, self.now(), tenant, adapters, groups, self._tenants[tenant], self._tenants.total())

    def came(self, tenant: str, digests: Counter[str], sample: Sequence[tuple[str, str, Eta]]) -> None:
        """So many jobs were queued, by digest. Of a few (id, digest, quote) it shall be known what becomes."""
        with self._lock:
            for digest, jobs in digests.items():
                self._groups[digest, tenant] += jobs
            self._tenants[tenant] += digests.total()
            for job_id, digest, eta in sample[: self._left]:
                self._left -= 1
                self._watch(keys.ref(tenant, job_id), Look(digest, eta.place, eta.quote, eta.most))

    def _watch(self, ref: str, look: Look) -> None:
        self._samples.setdefault(ref, []).append(look)
        while len(self._samples) > _SAMPLES_MOST:
            del self._samples[next(iter(self._samples))]

    def heard(self, refs: Sequence[str]) -> None:
        """These jobs have ended."""
        if not self._samples:
            return
        with self._lock:
            samples = {ref: self._samples.pop(ref) for ref in refs if ref in self._samples}
        seen = [one for ref, looks in samples.items() for one in self._came_of(ref, looks)]
        if seen:
            self._board.report(seen)

    def _came_of(self, ref: str, looks: list[Look]) -> list[Seen]:
        """Cancelled and failed jobs tell nothing of how long jobs take."""
        try:
            (document,) = self._ledger.show(*_split(ref))
        except LorayardError:
            return []
        if document is None or document["status"] not in ("succeeded", "expired"):
            return []
        times = document["latencies_ms"]
        took = times["total"] * (_EXPIRED if document["status"] == "expired" else 1)
        at_worker = took - times.get("queued", took)
        usage = (document["response"] or {}).get("usage") or {}
        seen = Seen(
            looks[0].place,
            looks[0].digest,
            took,
            at_worker,
            (0.0, 0.0),
            hosted="hosted_model" in document,
            most=looks[0].most,
            tokens=int(usage.get("completion_tokens") or 0),
            decode=times.get("decode", 0.0),
        )
        return [
            msgspec.structs.replace(seen, situation=look.place, took=max(1.0, took - look.waited), quoted=look.quote[:2]) for look in looks
        ]

    # -- at polls -------------------------------------------------------------------------------------------------------------------------

    def tell(self, document: dict[str, Any], tenant: str, limits: HostedLimits) -> dict[str, Any]:
        """A job's document with `eta` and, where it waits, its `explanation`."""
        if document["status"] in TERMINAL:
            return document
        forecast, now = self.forecast(), self.now()
        digest = laned(document["adapter_digest"] or BASE_DIGEST, document["lane"])
        trouble = limits.trouble(digest, tenant, now) if _goes_there(document, forecast) else None
        if document["status"] in ("queued", "delayed"):
            document["explanation"] = waits_for(document, tenant, forecast, now, limits, trouble)
        elif document["status"] == "claimed" and trouble is not None:
            document["explanation"] = waited(document, trouble.words)
        endless = trouble is not None and trouble.endless
        document["eta"] = None if forecast is None or endless else self._eta(document, digest, tenant, forecast, now)
        return document

    def _eta(self, document: dict[str, Any], digest: str, tenant: str, forecast: Forecast, now: float) -> dict[str, Any] | None:
        deadline = max(1.0, document["deadline_ms"] - now) if document["deadline_ms"] else 0.0
        status, there, most = document["status"], forecast.there, document["max_tokens"] or 0
        if status in ("claimed", "running"):
            place = forecast.working(digest, document["worker"], most)
            if status == "claimed" and place.kind == "called" and there.blocked_until > now:
                return _quoted(forecast, place, deadline, there.blocked_until, now)
            return _document(forecast.quote(place, deadline, now - document["claimed_ms"]), now)
        if status == "submitted" or not _can_run(forecast, digest, tenant):
            return None
        begins = max(now, document.get("not_before_ms", 0))
        target, before = max(1.0, document["due_ms"] - begins), document.get("position", 0)
        place = forecast.place(digest, tenant, target, now=begins, before=before, most=most)
        if begins == now:
            passed = _waits(document, digest, tenant, forecast, now)
            place = place.after(passed)
            if place.again:
                self._sample(keys.ref(tenant, document["id"]), Look(digest, place, forecast.quote(place), most, passed))
        return _quoted(forecast, place, deadline, begins, now)

    def _sample(self, ref: str, look: Look) -> None:
        """A few a forecast, and of a job none that is like the one before."""
        with self._lock:
            known = self._samples.get(ref)
            if self._left_again > 0 and (not known or known[-1].place.names != look.place.names):
                self._left_again -= 1
                self._watch(ref, look)


class Round:
    """Quotes for one call. Jobs of a call are due at the same time and so are served in no particular order: what is alike is quoted alike,
    as the one in the middle."""

    def __init__(
        self,
        forecast: Forecast | None,
        now: float,
        tenant: str,
        adapters: Counter[str | None],
        groups: dict[str, int],
        queued: int,
        pool: int,
    ) -> None:
        self._forecast, self._now, self._tenant, self._adapters = forecast, now, tenant, adapters
        self._groups, self._queued, self._pool = groups, queued, pool
        self._etas: dict[tuple[str, int, int, int, int], Eta] = {}
        self.came = Counter[str]()

    def eta(self, adapter: str | None, digest: str, wait_ms: int, deadline_ms: int, delay_ms: int, most: int = 0) -> Eta | None:
        """Of jobs that name that adapter, to be queued by that digest, due in `wait_ms` or by their deadline, after a delay, that ask for
        so many tokens (0: they do not say). None where nobody can tell."""
        if self._forecast is None or not _can_run(self._forecast, digest, self._tenant):
            return None
        most = _rounded(most)
        key = (digest, wait_ms, deadline_ms, delay_ms, most)
        eta = self._etas.get(key)
        if eta is None:
            alike, together = self._adapters[adapter], self._adapters.total()
            since = Since(self._groups.get(digest, 0) + alike // 2, self._queued + together // 2, self._pool + together // 2)
            target = float(deadline_ms or wait_ms)
            place = self._forecast.place(digest, self._tenant, target, now=self._now, since=since, most=most)
            place = place.among(together, self._forecast.each_ms)
            quote = self._forecast.quote(place, float(deadline_ms - delay_ms) if deadline_ms else 0.0)
            eta = self._etas[key] = Eta(place, quote, _document(quote, self._now + delay_ms), most)
        return eta

    def queued(self, digest: str) -> None:
        """One more."""
        self.came[digest] += 1


def _rounded(most: int) -> int:
    """To within a tenth, so that the jobs of a call that ask for about as much are quoted alike."""
    return round(1.1 ** round(math.log(most, 1.1))) if most > 0 else 0


def _goes_there(document: dict[str, Any], forecast: Forecast | None) -> bool:
    """Whether hosted workers alone are what its end depends on."""
    lane = document["lane"]
    if lane != "auto" or forecast is None:
        return lane in ("groq", "batch")
    return document["worker"] in forecast.there.workers or (bool(forecast.there.workers) and not forecast.workers)


def _waits(document: dict[str, Any], digest: str, tenant: str, forecast: Forecast, now: float) -> float:
    """For how long it could have been run by now: not while it was to begin later, or was held back. Of one that came back from a worker
    only its group tells."""
    began = document["enqueued_ms"] + 1000 * (document["not_before_s"] or 0.0)
    group = forecast.groups.get(f"{digest}:{tenant}")
    if group is not None:
        began = max(began, group.since)
    elif document["attempts"] or document["postponed"]:
        began = now
    if lane_of(digest):
        began = max(began, forecast.there.blocked_until)
    return float(max(0.0, now - began))


def _quoted(forecast: Forecast, place: Situation, deadline: float, begins: float, now: float) -> dict[str, Any]:
    """Of what begins then."""
    return _document(forecast.quote(place, max(1.0, deadline - (begins - now)) if deadline else 0.0), begins)


def _can_run(forecast: Forecast, digest: str, tenant: str) -> bool:
    """Whether there is a time at all: not of what is paused or has no worker, nor of a service's batches, which take what they take."""
    lane = lane_of(digest)
    some = lane == "groq" or forecast.workers > 0 or (lane == "auto" and bool(forecast.there.workers))
    return some and lane != "batch" and not is_paused(forecast.paused, digest, tenant)


def _split(ref: str) -> tuple[str, list[str]]:
    tenant, job_id = keys.split_ref(ref)
    return tenant, [job_id]
