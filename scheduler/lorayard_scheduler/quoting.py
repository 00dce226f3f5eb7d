"""Quotes where jobs are submitted and polled: forecasts read from Redis, and quoted jobs looked at again when they have ended.

The scheduler leaves its forecast under a key of its own, and reads from a list what became of quoted jobs. Both may be lost at any time:
then there are no quotes for a while, or less exact ones.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from lorayard.errors import LorayardError
from lorayard.jobs import BASE_DIGEST, TERMINAL, laned
from lorayard.ledger import keys
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


class Eta(NamedTuple):
    """A quote of jobs that are alike, as `place` says: when it was made, and as a document has it."""

    place: Situation
    quote: Quote
    document: dict[str, Any]


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
        self._samples: dict[str, tuple[Situation, str, Quote]] = {}
        self._left = 0

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
            self._known, self._left = found, SAMPLES
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
                self._samples[keys.ref(tenant, job_id)] = eta.place, digest, eta.quote
            while len(self._samples) > _SAMPLES_MOST:
                del self._samples[next(iter(self._samples))]

    def heard(self, refs: Sequence[str]) -> None:
        """These jobs have ended."""
        if not self._samples:
            return
        with self._lock:
            samples = {ref: self._samples.pop(ref) for ref in refs if ref in self._samples}
        seen = [one for ref, sample in samples.items() if (one := self._look(ref, *sample))]
        if seen:
            self._board.report(seen)

    def _look(self, ref: str, place: Situation, digest: str, quote: Quote) -> Seen | None:
        """Cancelled and failed jobs tell nothing of how long jobs take."""
        try:
            (document,) = self._ledger.show(*_split(ref))
        except LorayardError:
            return None
        if document is None or document["status"] not in ("succeeded", "expired"):
            return None
        times = document["latencies_ms"]
        took = times["total"] * (_EXPIRED if document["status"] == "expired" else 1)
        return Seen(place, digest, took, took - times.get("queued", took), (quote.median, quote.p80))

    # -- at polls -------------------------------------------------------------------------------------------------------------------------

    def tell(self, document: dict[str, Any], tenant: str, limits: HostedLimits) -> dict[str, Any]:
        """A job's document with `eta` and, where it waits, its `explanation`."""
        if document["status"] in TERMINAL:
            return document
        forecast, now = self.forecast(), self.now()
        if document["status"] in ("queued", "delayed"):
            document["explanation"] = waits_for(document, tenant, forecast, now, limits)
        document["eta"] = forecast and self._eta(document, tenant, forecast, now)
        return document

    @staticmethod
    def _eta(document: dict[str, Any], tenant: str, forecast: Forecast, now: float) -> dict[str, Any] | None:
        status, digest = document["status"], laned(document["adapter_digest"] or BASE_DIGEST, document["lane"])
        deadline = max(1.0, document["deadline_ms"] - now) if document["deadline_ms"] else 0.0
        if status in ("claimed", "running"):
            place = Situation("worker", forecast.services.get(digest, forecast.at_worker))
            return _document(forecast.quote(place, deadline, now - document["claimed_ms"]), now)
        if status == "submitted" or not _can_run(forecast, digest, tenant):
            return None
        begins = max(now, document.get("not_before_ms", 0))
        place = forecast.place(digest, tenant, max(1.0, document["due_ms"] - begins), now=now, before=document.get("position", 0))
        elapsed = now - document["enqueued_ms"] if place.kind == "hosted" and begins == now else 0.0
        return _document(forecast.quote(place, deadline - (begins - now) if deadline else 0.0, elapsed), begins)


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
        self._etas: dict[tuple[str, int, int, int], Eta] = {}
        self.came = Counter[str]()

    def eta(self, adapter: str | None, digest: str, wait_ms: int, deadline_ms: int, delay_ms: int) -> Eta | None:
        """Of jobs that name that adapter, to be queued by that digest, due in `wait_ms` or by their deadline, after a delay. None where
        nobody can tell."""
        if self._forecast is None or not _can_run(self._forecast, digest, self._tenant):
            return None
        key = (digest, wait_ms, deadline_ms, delay_ms)
        eta = self._etas.get(key)
        if eta is None:
            alike, together = self._adapters[adapter], self._adapters.total()
            since = Since(self._groups.get(digest, 0) + alike // 2, self._queued + together // 2, self._pool + together // 2)
            target = float(deadline_ms or wait_ms)
            place = self._forecast.place(digest, self._tenant, target, now=self._now, since=since).among(together, self._forecast.each_ms)
            quote = self._forecast.quote(place, float(deadline_ms - delay_ms) if deadline_ms else 0.0)
            eta = self._etas[key] = Eta(place, quote, _document(quote, self._now + delay_ms))
        return eta

    def queued(self, digest: str) -> None:
        """One more."""
        self.came[digest] += 1


def _can_run(forecast: Forecast, digest: str, tenant: str) -> bool:
    """Whether there is a time at all: not of what is paused or has no worker, nor of a service's batches, which take what they take."""
    lane = digest.partition("@")[2]
    return not is_paused(forecast.paused, digest, tenant) and lane != "batch" and (forecast.workers > 0 or lane == "groq")


def _split(ref: str) -> tuple[str, list[str]]:
    tenant, job_id = keys.split_ref(ref)
    return tenant, [job_id]
