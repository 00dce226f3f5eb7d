"""Routes that hold work back: pause and resume the pool, an adapter, a tenant. Jobs are accepted meanwhile, and what runs goes on."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from lorayard.adapters import PUBLIC, AdapterRegistry
from lorayard.errors import BadRequest, Forbidden, NotFound
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import Caller, KeyRing
from lorayard.settings import Settings
from lorayard_scheduler.api.http import SHORT, Auth, Json, limited


class _What(msgspec.Struct, forbid_unknown_fields=True):
    """Of the pool, a tenant, an adapter (by name; of one tenant or, a public one, of all); or `what`, as `/v1/paused` lists it."""

    pool: bool = False
    tenant: str | None = None
    adapter: str | None = None
    what: str | None = None


def routes(settings: Settings, ledger: Ledger) -> APIRouter:
    """`/v1/pause`, `/v1/resume`, `/v1/paused`."""
    router = APIRouter(prefix="/v1")
    registry, keys = AdapterRegistry(ledger.client), KeyRing(ledger.client)

    @router.post("/pause")
    async def pause(request: Request, who: Auth) -> Json:
        """Plan none of its jobs until `resume`. A new version of an adapter is another adapter."""
        return await run_in_threadpool(_pause, await _body(request), who)

    def _pause(body: bytes, who: Caller) -> Json:
        asked = _read(body)
        what = _name(ledger, registry, asked, who)
        if asked.tenant is not None and asked.tenant not in keys.tenants():  # a pause by mistake must not look like one
            raise NotFound(
                f"no tenant named {asked.tenant[:100]!r}: 'lorayard tenants list' shows those there are",
                code="tenant_not_found",
                param="tenant",
            )
        return Json({"paused": what, "changed": ledger.pause(what)})

    @router.post("/resume")
    async def resume(request: Request, who: Auth) -> Json:
        """By what it was paused by, or, where an adapter of that name is another one now, by what `/v1/paused` lists."""
        return await run_in_threadpool(_resume, await _body(request), who)

    def _resume(body: bytes, who: Caller) -> Json:
        what = _name(ledger, registry, _read(body), who)
        return Json({"resumed": what, "changed": ledger.resume(what)})

    @router.get("/paused")
    def paused(who: Auth) -> Json:
        """What is paused; of a tenant, what touches its own jobs."""
        return Json({"object": "list", "data": [what for what in ledger.paused() if who.operator or _concerns(what, who.tenant)]})

    return router


async def _body(request: Request) -> bytes:
    return await limited(request, SHORT, "it has a few short fields").body()


def _read(body: bytes) -> _What:
    try:
        return msgspec.json.decode(body or b"{}", type=_What)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f'say what: {{"pool": true}}, {{"tenant": NAME}} or {{"adapter": NAME}} ({error})') from None


def _name(ledger: Ledger, registry: AdapterRegistry, what: _What, who: Caller) -> str:
    """Of what the ledger shall pause. A tenant may hold back its own jobs only."""
    if what.what is not None and not (what.pool or what.tenant or what.adapter):
        if what.what in ledger.paused() and (who.operator or _owns(what.what, who.tenant)):
            return what.what
        raise NotFound(f"nothing is paused by the name {what.what[:200]!r}: GET /v1/paused lists what is", code="not_paused", param="what")
    if what.what is not None or what.pool == bool(what.tenant or what.adapter):
        raise BadRequest('say what: {"pool": true}, or {"tenant": NAME} or {"adapter": NAME} or both')
    if not who.operator and (what.pool or what.tenant not in (None, who.tenant)):
        raise Forbidden("only the operator's key may pause the pool or another tenant", code="operator_only")
    if what.pool:
        return "pool"
    if what.adapter is None:
        return f"tenant:{what.tenant}"
    tenant = what.tenant or who.tenant
    manifest = registry.get(tenant, what.adapter)
    for_all = who.operator and what.tenant is None and manifest.tenant == PUBLIC
    return f"adapter:{manifest.digest}" if for_all else f"group:{manifest.digest}:{tenant}"


def _concerns(what: str, tenant: str) -> bool:
    return what.partition(":")[0] in ("pool", "adapter") or _owns(what, tenant)


def _owns(what: str, tenant: str) -> bool:
    kind, _, rest = what.partition(":")
    return kind in ("tenant", "group") and rest.rpartition(":")[2] == tenant
