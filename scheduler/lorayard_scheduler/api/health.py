"""Routes for those who run the fleet: liveness, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler.api.http import Json
from lorayard_scheduler.api.metrics import LedgerCollector


def routes(settings: Settings, ledger: Ledger) -> APIRouter:
    """`/healthz`, `/readyz`, `/metrics`: open, and without anything of a tenant's."""
    router = APIRouter()
    workers = WorkerRegistry(ledger.client)
    metrics = CollectorRegistry()
    metrics.register(LedgerCollector(settings.pool, ledger, workers))

    @router.get("/healthz")
    def healthz() -> Json:
        return Json({"status": "ok"})

    @router.get("/readyz")
    def readyz() -> Json:
        """Ready when jobs can be accepted; `workers` and `scheduler` tell whether they would also be run."""
        now = ledger.snapshot().now
        alive = workers.alive(settings.pool, now)
        document = {"status": "ready", "pool": settings.pool, "workers": [w.name for w in alive], "scheduler": ledger.has_leader(now)}
        return Json(document | {"paused": "pool" in ledger.paused()})

    @router.get("/metrics")
    def prometheus() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    return router
