"""What a job that waits is waiting for, in one sentence."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import redis

from lorayard.adapters.hosting import Publications
from lorayard.hosted import organisation
from lorayard.jobs import BASE_DIGEST, adapter_of, lane_of, laned
from lorayard.ledger.explained import cause, pause
from lorayard.ledger.organisation import Organisation
from lorayard.ledger.policies import Policies
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler.quotes import Forecast, Situation

LOOK_EVERY_S = 0.5
_KNOWN_MOST = 1_000
_LATELY_MS = 3_600_000.0  # a pause that was over longer ago is not mentioned


def held_up(place: Situation, forecast: Forecast) -> str:
    """As part of a sentence, beginning after "waits" or "waited"; nothing where nothing holds the job up.

    What begins so is known to `lorayard.ledger.explained`.
    """
    ahead = f"{place.before * forecast.each_ms / 1000:.1f} s of work"
    sooner = f"behind {ahead} that is due sooner" if place.before >= 1 else ""
    if place.kind == "flood":
        return f"for its tenant's share, for the tenant has {ahead} queued, and whoever floods comes after all others"
    if place.kind == "share":
        return f"for its tenant's share, for beside those who flood nobody is served much more than they, and {ahead} comes before it"
    if place.kind in ("late", "behind") and sooner:
        return sooner
    if place.kind == "own" and place.before:
        return f"behind {place.before:.0f} job{'s' * (place.before != 1)} of its own adapter and tenant"
    if place.kind in ("own", "behind"):
        return "for room beside what runs of its adapter"
    if place.kind in ("turn", "late"):
        return f"for a switch{f', {sooner},' if sooner else ''} until a worker has a hand free for another adapter"
    return ""


class Trouble(NamedTuple):
    """`words` as of `held_up`. Endless: nobody can tell for how long."""

    words: str
    endless: bool = False


class HostedLimits:
    """What keeps hosted workers from taking more. Thread-safe."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._base = settings.hosted_model or ""
        self._gather_s = settings.hosted_batch_gather_s
        self._organisation = organisation(settings, client) if self._base else None
        self._publications = Publications(client, settings.hosted_org, self._base)
        self._policies = Policies(client)
        self._registry = WorkerRegistry(client)
        self._pool = settings.pool
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], tuple[Trouble | None, float]] = {}  # and until when it is

    def trouble(self, digest: str, tenant: str, now: float) -> Trouble | None:
        """What keeps hosted workers from such a job now. Raises what Redis raises, and `LorayardError`."""
        at = time.monotonic()
        with self._lock:
            found, until = self._known.get((digest, tenant), (None, 0.0))
        if until < at:
            found = self._look(digest, tenant, now)
            with self._lock:
                self._known[digest, tenant] = found, at + LOOK_EVERY_S
                while len(self._known) > _KNOWN_MOST:
                    del self._known[next(iter(self._known))]
        return found

    def _look(self, digest: str, tenant: str, now: float) -> Trouble | None:
        workers = [worker for worker in self._registry.alive(self._pool, round(now)) if worker.hosted]
        if self._organisation is None or not workers:
            return Trouble("for a hosted worker: none is up and ready", endless=True)
        adapter = adapter_of(digest)
        found = self._publications.all().get(adapter)
        if found is not None and found.state == "wanted":
            return Trouble("for its adapter, which is on its way to the hosted service", endless=True)
        if spent := self._organisation.over(self._base, tenant, self._policies.get(tenant).caps):
            return Trouble(f"for money: this {spent}'s for hosted calls is spent", endless=True)
        return self._limits() or _of_calls(workers, adapter)

    def _limits(self) -> Trouble | None:
        state = cast(Organisation, self._organisation).state(self._base)
        if state.blocked_ms > 0:
            return Trouble(f"for the hosted service, which is asked for nothing for {state.blocked_ms / 1000:.1f} s ({state.why})")
        for used, limit, words in (("used_requests", "rpm", "requests"), ("used_tokens", "tpm", "tokens")):
            if 0 < state.numbers.get(limit, 0) <= 1.05 * state.numbers.get(used, 0):
                return Trouble(f"for the hosted service's limit of {state.numbers[limit]} {words} a minute")
        return None

    def usual(self, digest: str) -> str:
        """What it waits for while nothing is in the way."""
        if lane_of(digest) == "batch":
            return f"for others to go in the same batch of the hosted service, {self._gather_s:.0f} s at most"
        return "for a hosted worker to have room"


def _of_calls(workers: Sequence[WorkerInfo], adapter: str) -> Trouble | None:
    if all(worker.counters.get("limits_unanswered") for worker in workers):
        return Trouble("for an answer about limits and money, which its hosted worker does not get: see that worker's log")
    if all(worker.counters.get("breaker_open") for worker in workers):
        return Trouble("for the hosted service: most of the last calls failed, and one at a time is made to see")
    if all(adapter in worker.doubted for worker in workers):
        return Trouble("for the hosted service, where calls of its adapter fail: others go first")
    return None


def waits_for(
    document: dict[str, Any], tenant: str, forecast: Forecast | None, now: float, limits: HostedLimits, trouble: Trouble | None
) -> str:
    """The sentence of a job that is queued or delayed. `trouble`: what hosted workers are in, where they are its only ones."""
    if document["status"] == "delayed":
        return _delayed(document, now, trouble)
    if leader := document.get("coalesced_with"):
        return f"Waits for the answer to {leader}, which asks for the very same and is computed for both."
    digest = laned(document["adapter_digest"] or BASE_DIGEST, document["lane"])
    if forecast is None:
        return "Waits for a scheduler: none has told anything for some seconds; 'lorayard doctor' says what is wrong."
    if paused := is_paused(forecast.paused, digest, tenant):
        return f"Waits for the end of a pause of {paused}."
    if lane_of(digest) not in ("", "auto") or (not forecast.workers and lane_of(digest) == "auto" and forecast.there.workers):
        return f"Waits {trouble.words if trouble else limits.usual(digest)}."
    if not forecast.workers:
        return f"Waits for a worker: none of pool {document['pool']!r}, which has its base model, is up and ready."
    place = forecast.place(digest, tenant, document["due_ms"] - now, now=now, before=document["position"])
    if place.hosted:
        return "Waits for a hosted worker: local work queued ahead would make it miss its due time."
    reason = held_up(place, forecast)
    return f"Waits {reason}." if reason else "Waits for nothing: it goes to a worker next."


def _delayed(document: dict[str, Any], now: float, trouble: Trouble | None) -> str:
    left = f"{max(0.0, document['not_before_ms'] - now) / 1000:.1f} s from now"
    because = cause(document)
    if document["attempts"]:
        return f"Waits for its retry time, {left}, after attempt {document['attempts']} failed{': ' + because if because else ''}."
    if times := document["postponed"]:
        put_off = f"put off {times} times, at no cost of an attempt"
        also = f"; it also waits {trouble.words}" if trouble else ""
        return f"Waits to be tried again {left}: {because or 'what it needs could not be had'} ({put_off}){also}."
    return f"Waits for its not_before, {left}."


def is_paused(paused: Sequence[str], digest: str, tenant: str) -> str:
    """What of such a job is held back, in words; nothing if it is not."""
    if not paused:
        return ""
    return next((f"{words} ('lorayard resume {name}')" for name, words in _held_by(digest, tenant) if name in paused), "")


def _held_by(digest: str, tenant: str) -> list[tuple[str, str]]:
    """The pauses that would hold back such a job: as in the ledger, and in words."""
    digest = adapter_of(digest)
    group = (f"group:{digest}:{tenant}", "its adapter for its tenant")
    return [("pool", "the pool"), (f"adapter:{digest}", "its adapter"), (f"tenant:{tenant}", "its tenant"), group]


class Pauses:
    """Which there are, and of each that is over the last, as far as anybody looked: what is shorter than between two looks was none."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._over: dict[str, tuple[float, float]] = {}

    def see(self, paused: Sequence[str], now: float) -> None:
        for name in self._since.keys() - set(paused):
            self._over.pop(name, None)
            self._over[name] = self._since.pop(name), now
        for name in paused:
            self._since.setdefault(name, now)
        while len(self._over) > _KNOWN_MOST:
            del self._over[next(iter(self._over))]

    def held_up(self, digest: str, tenant: str, now: float) -> str:
        """As `held_up`, of such jobs, which can go to a worker now: the longest pause. Each job knows its own part of it."""
        found = []
        for name, words in _held_by(digest, tenant):
            began, ended = (self._since[name], now) if name in self._since else self._over.get(name, (0.0, 0.0))
            if ended > max(began, now - _LATELY_MS):
                found.append((ended - began, pause(words, began, ended)))
        return max(found)[1] if found else ""
