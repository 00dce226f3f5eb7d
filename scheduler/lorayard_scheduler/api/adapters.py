"""Routes of adapters: add, list, show, remove."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Form, UploadFile

from lorayard.adapters import PUBLIC, AdapterRegistry, BaseModel, Manifest
from lorayard.adapters.intake import add_adapter
from lorayard.adapters.store import ArtifactStore
from lorayard.errors import Unauthorized, Unavailable
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler.api.http import Auth, Json


def routes(settings: Settings, ledger: Ledger) -> APIRouter:
    """`/v1/adapters`."""
    router = APIRouter(prefix="/v1/adapters")
    registry = AdapterRegistry(ledger.client)
    workers = WorkerRegistry(ledger.client)

    @router.post("", status_code=201)
    def add(who: Auth, name: Annotated[str, Form()], file: UploadFile, public: Annotated[bool, Form()] = False) -> Json:
        """Add a PEFT adapter as a zip; from now on jobs may name it. The same name again gives new jobs the new content."""
        if public and not who.operator:
            raise Unauthorized("only the operator's key may give an adapter to everyone", code="operator_only")
        base = workers.base(settings.pool)
        if base is None:
            raise Unavailable("no worker has told yet which base model it serves: try again when one is ready", code="no_worker")
        content = file.file.read(settings.max_adapter_bytes + 1)
        store = ArtifactStore.open(settings)
        manifest = add_adapter(settings, registry, store, msgspec.convert(base, BaseModel), PUBLIC if public else who.tenant, name, content)
        return Json(_adapter(manifest))

    @router.get("")
    def adapters(who: Auth) -> Json:
        return Json({"object": "list", "data": [_adapter(m) for m in registry.list(who.tenant)]})

    @router.get("/{name}")
    def adapter(name: str, who: Auth) -> Json:
        return Json(_adapter(registry.get(who.tenant, name)))

    @router.delete("/{name}")
    def remove(name: str, who: Auth) -> Json:
        """Take the name away; jobs that were enqueued with it keep their content."""
        return Json({"name": registry.remove(who.tenant, name).name, "object": "adapter", "deleted": True})

    return router


def _adapter(manifest: Manifest) -> dict[str, Any]:
    return {"object": "adapter", **msgspec.to_builtins(manifest)}
