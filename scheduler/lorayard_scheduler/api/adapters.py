"""Routes of adapters: add, list, show, remove."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from lorayard.adapters import PUBLIC, AdapterRegistry, BaseModel, Manifest
from lorayard.adapters.intake import add_adapter
from lorayard.adapters.store import ArtifactStore
from lorayard.errors import BadRequest, Forbidden, Unavailable
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import Caller, WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler.api.hosting import publish_again, publish_no_more
from lorayard_scheduler.api.http import Auth, Json, limited

FORM_BYTES = 16 * 1024 * 1024
"""What an upload may have beside the adapter's weights."""


def routes(settings: Settings, ledger: Ledger) -> APIRouter:
    """`/v1/adapters`."""
    router = APIRouter(prefix="/v1/adapters")
    registry = AdapterRegistry(ledger.client)
    workers = WorkerRegistry(ledger.client)

    @router.post("", status_code=201)
    async def add(request: Request, who: Auth) -> Json:
        """Add a PEFT adapter: a form of `name`, `file` (a zip) and `public` (true: for everyone); from now on jobs may name it.

        The same name again gives new jobs the new content.
        """
        # The form is read here and not by a parameter of the route, which would take in any amount from anyone before it asks for the key.
        most = settings.max_adapter_bytes + FORM_BYTES
        advice = "the operator may raise LORAYARD_MAX_ADAPTER_BYTES"
        async with limited(request, most, advice).form(max_files=1, max_fields=8) as form:
            name, file, public = form.get("name"), form.get("file"), str(form.get("public", "false")).lower()
            if not isinstance(name, str) or not isinstance(file, UploadFile) or public not in ("true", "false"):
                raise BadRequest("send a form with name=NAME, file=@ADAPTER.zip and, for everyone, public=true", param="file")
            owner = _owner(who, public == "true")
            return Json(_adapter(await run_in_threadpool(_add, owner, name, file)), status_code=201)

    def _add(tenant: str, name: str, file: UploadFile) -> Manifest:
        base = workers.base(settings.pool)
        if base is None:
            raise Unavailable("no worker has told yet which base model it serves: try again when one is ready", code="no_worker")
        content = file.file.read()
        store = ArtifactStore.open(settings)
        manifest = add_adapter(settings, registry, store, msgspec.convert(base, BaseModel), tenant, name, content)
        publish_again(settings, ledger, manifest)
        return manifest

    @router.get("")
    def adapters(who: Auth) -> Json:
        return Json({"object": "list", "data": [_adapter(m) for m in registry.list(who.tenant)]})

    @router.get("/{name}")
    def adapter(name: str, who: Auth) -> Json:
        return Json(_adapter(registry.get(who.tenant, name)))

    @router.delete("/{name}")
    def remove(name: str, who: Auth, public: bool = False) -> Json:
        """Take the name away, at the hosted service too; jobs that were enqueued with it for local workers keep their content.

        `public`: one that everyone has.
        """
        owner = _owner(who, public)
        publish_no_more(settings, ledger, owner, name)  # first: whoever is interrupted in between has lost nothing, and asks again
        return Json({"name": registry.remove(owner, name).name, "object": "adapter", "deleted": True})

    return router


def _owner(who: Caller, public: bool) -> str:
    if public and not who.operator:
        raise Forbidden("only the operator's key may give an adapter to everyone, or take it away", code="operator_only")
    return PUBLIC if public else who.tenant


def _adapter(manifest: Manifest) -> dict[str, Any]:
    return {"object": "adapter", **msgspec.to_builtins(manifest)}
