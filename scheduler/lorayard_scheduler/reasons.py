"""What a job that waits is waiting for, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from lorayard.adapters.hosting import Publications
from lorayard.hosted import organisation
from lorayard.jobs import BASE_DIGEST, adapter_of, lane_of, laned
from lorayard.ledger.policies import Policies
from lorayard.ledger.registry import WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler.quotes import Forecast, Situation


def held_up(place: Situation, forecast: Forecast) -> str:
    """As part of a sentence, beginning after "waits" or "waited"; nothing where nothing holds the job up.

    What begins so is known to `lorayard.ledger.explained`.
    """
    ahead = f"{place.before * forecast.each_ms / 1000:.1f} s of work"
    if place.kind == "flood":
        return f"for its tenant's share, for the tenant has {ahead} queued, and whoever floods comes after all others"
    if place.kind in ("late", "behind"):
        return f"behind {ahead} that is due sooner"
    if place.kind == "own":
        return (
            f"behind {place.before:.0f} jobs of its own adapter and tenant" if place.before else "for room beside what runs of its adapter"
        )
    if place.kind == "turn":
        due = f", behind {ahead} that is due sooner," if place.before >= 1 else ""
        return f"for a switch{due} until a worker has a hand free for another adapter"
    return ""


class HostedLimits:
    """What keeps hosted workers from taking more."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._base = settings.hosted_model or ""
        self._gather_s = settings.hosted_batch_gather_s
        self._organisation = organisation(settings, client) if self._base else None
        self._publications = Publications(client, settings.hosted_org, self._base)
        self._policies = Policies(client)
        self._registry = WorkerRegistry(client)
        self._pool = settings.pool

    def reason(self, digest: str, tenant: str, now: float) -> str:
        """As `held_up`, of a job that is for hosted workers."""
        if self._organisation is None or not any(w.hosted for w in self._registry.alive(self._pool, round(now))):
            return "for a hosted worker: none is up and ready"
        found = self._publications.all().get(adapter_of(digest))
        if found is not None and found.state == "wanted":
            return "for its adapter, which is on its way to the hosted service"
        if spent := self._organisation.over(self._base, tenant, self._policies.get(tenant).caps):
            return f"for money: this {spent}'s for hosted calls is spent"
        state = self._organisation.state(self._base)
        if state.blocked_ms > 0:
            return f"for the hosted service, which is asked for nothing for {state.blocked_ms / 1000:.1f} s ({state.why})"
        for used, limit, words in (("used_requests", "rpm", "requests"), ("used_tokens", "tpm", "tokens")):
            if 0 < state.numbers.get(limit, 0) <= 1.05 * state.numbers.get(used, 0):
                return f"for the hosted service's limit of {state.numbers[limit]} {words} a minute"
        if lane_of(digest) == "batch":
            return f"for others to go in the same batch of the hosted service, {self._gather_s:.0f} s at most"
        return "for a hosted worker to have room"


def waits_for(document: dict[str, Any], tenant: str, forecast: Forecast | None, now: float, limits: HostedLimits) -> str:
    """The sentence of a job that is queued or delayed. Raises what Redis raises."""
    if document["status"] == "delayed":
        return _delayed(document, now)
    if leader := document.get("coalesced_with"):
        return f"Waits for the answer to {leader}, which asks for the very same and is computed for both."
    digest = laned(document["adapter_digest"] or BASE_DIGEST, document["lane"])
    if forecast is None:
        return "Waits for a scheduler: none has told anything for some seconds; 'lorayard doctor' says what is wrong."
    if paused := is_paused(forecast.paused, digest, tenant):
        return f"Waits for the end of a pause of {paused}."
    if lane_of(digest) not in ("", "auto"):
        return f"Waits {limits.reason(digest, tenant, now)}."
    if not forecast.workers:
        return f"Waits for a worker: none of pool {document['pool']!r}, which has its base model, is up and ready."
    place = forecast.place(digest, tenant, document["due_ms"] - now, now=now, before=document["position"])
    reason = held_up(place, forecast)
    return f"Waits {reason}." if reason else "Waits for nothing: it goes to a worker next."


def _delayed(document: dict[str, Any], now: float) -> str:
    left = f"{max(0.0, document['not_before_ms'] - now) / 1000:.1f} s from now"
    if document["attempts"]:
        return f"Waits for its retry time, {left}, after attempt {document['attempts']} failed."
    if document["postponed"]:
        times = document["postponed"]
        return f"Waits to be tried again {left}: what it needs could not be had (put off {times} times, at no cost of an attempt)."
    return f"Waits for its not_before, {left}."


def is_paused(paused: Sequence[str], digest: str, tenant: str) -> str:
    """What of such a job is held back, in words; nothing if it is not."""
    if not paused:
        return ""
    digest = adapter_of(digest)
    names = {"pool": "the pool", f"adapter:{digest}": "its adapter", f"tenant:{tenant}": "its tenant"}
    names[f"group:{digest}:{tenant}"] = "its adapter for its tenant"
    return next((f"{words} ('lorayard resume {name}')" for name, words in names.items() if name in paused), "")
