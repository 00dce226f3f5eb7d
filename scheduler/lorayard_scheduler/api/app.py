"""The HTTP API: jobs in, documents out, adapters; health and metrics. Each route's work is the ledger's or the registry's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from celery import Celery
from fastapi import FastAPI

from lorayard import __version__
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import KeyRing
from lorayard.settings import Settings
from lorayard_scheduler.admission import Admission
from lorayard_scheduler.api import adapters, health, hosting, jobs, pauses
from lorayard_scheduler.api.http import Json, handle_errors
from lorayard_scheduler.api.waiting import Waiting


def make_api(settings: Settings, ledger: Ledger, celery: Celery) -> FastAPI:
    """The application of one API process."""
    admission = Admission(settings, ledger)
    waiting = Waiting(ledger, admission.quoting.heard)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        waiting.start()
        yield
        waiting.stop()

    app = FastAPI(title="Lorayard", version=__version__, lifespan=lifespan, default_response_class=Json, redirect_slashes=False)
    app.state.keys = KeyRing(ledger.client)
    handle_errors(app)
    app.include_router(jobs.routes(settings, ledger, admission, waiting, celery))
    app.include_router(adapters.routes(settings, ledger))
    app.include_router(hosting.routes(settings, ledger))
    app.include_router(pauses.routes(settings, ledger))
    app.include_router(health.routes(settings, ledger))
    return app
