"""Routes of what is at a hosted service: bring an adapter there, look at it, take it away; what it has cost."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from lorayard.adapters import PUBLIC, AdapterRegistry, Manifest
from lorayard.adapters.hosting import Publication, Publications
from lorayard.errors import BadRequest, Forbidden, NotFound
from lorayard.hosted import organisation
from lorayard.hosted_codes import CODES
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.organisation import NANO
from lorayard.ledger.policies import Policies
from lorayard.ledger.registry import Caller
from lorayard.settings import Settings
from lorayard_scheduler.api.http import SHORT, Auth, Json, limited

HOSTS = ("groq",)


def routes(settings: Settings, ledger: Ledger) -> APIRouter:
    """`/v1/adapters/NAME/publication` (`tenant`: whose adapter it is, where the operator sees to another's) and `/v1/hosted`."""
    router = APIRouter(prefix="/v1")
    registry = AdapterRegistry(ledger.client)
    policies = Policies(ledger.client)
    org = organisation(settings, ledger.client) if settings.hosted_model else None

    def publications() -> Publications:
        if not settings.hosted_model:
            raise BadRequest("this pool's base model is at no hosted service: set LORAYARD_HOSTED_MODEL", code="route_unavailable")
        return Publications(ledger.client, settings.hosted_org, settings.hosted_model)

    @router.put("/adapters/{name}/publication", status_code=202)
    async def publish(name: str, request: Request, who: Auth, tenant: str | None = None) -> Json:
        """Want the adapter, and whatever content its name gets later, at the hosted service. Again: have it looked at anew.

        `{"to": "groq"}`; with `"model": ID` (the operator's key only), it is there under that id already, and nothing is brought there.
        """
        raw = await limited(request, SHORT, "it has two short fields").body()
        return await run_in_threadpool(_publish, name, _body(raw), who, tenant)

    def _publish(name: str, body: dict[str, str], who: Caller, tenant: str | None) -> Json:
        manifest, there = registry.get(_tenant(who, tenant), name), publications()
        _may(who, manifest.tenant)
        model = body.get("model", "")
        if model and not who.operator:
            raise Forbidden(
                "only the operator's key may say under which model id an adapter is there: that model answers everyone who has this"
                " content, at the hosted base's price",
                code="operator_only",
                param="model",
            )
        if not policies.get(manifest.tenant).hosted and manifest.tenant != PUBLIC:
            raise Forbidden(
                f"tenant {manifest.tenant} has not allowed its data to leave, and an adapter is data; the operator can: 'lorayard tenants"
                f" set {manifest.tenant} --hosted'",
                code="hosted_not_allowed",
            )
        wanted = there.ask(manifest.digest, _title(manifest), model=model)
        there.mark(manifest.tenant, manifest.name)
        return Json(_document(manifest.name, wanted, who), status_code=202)

    @router.get("/adapters/{name}/publication")
    def show(name: str, who: Auth, tenant: str | None = None) -> Json:
        manifest = registry.get(_tenant(who, tenant), name)
        found = publications().get(manifest.digest)
        if found is None:
            raise NotFound(f"the adapter {name!r} is not at the hosted service", code="not_published")
        return Json(_document(name, found, who))

    @router.delete("/adapters/{name}/publication")
    def unpublish(name: str, who: Auth, tenant: str | None = None) -> Json:
        """Take every content of this name away from the service, also where no adapter has the name any more."""
        there = publications()
        owner = _owner(registry, there, _tenant(who, tenant), name)
        _may(who, owner)
        return Json({"name": name, "object": "publication", "deleted": there.drop(owner, name)})

    @router.get("/hosted")
    def hosted(who: Auth) -> Json:
        """What the tenant has at the hosted service, may do there and has spent: in dollars, of this day and month (UTC)."""
        there = publications().all()
        assert org is not None
        mine = [_document(m.name, there[m.digest], who) for m in registry.list(who.tenant) if m.digest in there]
        state = org.state(str(settings.hosted_model))
        spent = {which: org.spent(date).get(who.tenant, 0) / NANO for which, date in (("day", state.day), ("month", state.month))}
        costs = {adapter: nano / NANO for (tenant, adapter), nano in org.costs(state.month).items() if tenant == who.tenant}
        policy = msgspec.to_builtins(policies.get(who.tenant)) | {"hosted": policies.get(who.tenant).hosted}
        return Json({"object": "hosted", "policy": policy, "spent_usd": spent, "month_usd_by_adapter": costs, "data": mine})

    @router.get("/hosted/errors")
    def errors(_: Auth) -> Json:
        """Every error code that has to do with hosted services, with what becomes of the job."""
        rows = [{"code": code, "where": one.where, "means": one.means, "then": one.then} for code, one in CODES.items()]
        return Json({"object": "list", "data": rows})

    return router


def _owner(registry: AdapterRegistry, there: Publications, tenant: str, name: str) -> str:
    """Whose it is what a tenant calls so, at the service or here: the tenant's own hides what is everyone's. Raises `NotFound`."""
    if there.holds(tenant, name):
        return tenant
    manifest = registry.get_many(tenant, [name])[name]
    if manifest is not None:
        return manifest.tenant
    if there.holds(PUBLIC, name):
        return PUBLIC
    raise registry.unknown(name)


def publish_again(settings: Settings, ledger: Ledger, manifest: Manifest) -> None:
    """A name that is published has new content: that goes there too."""
    if settings.hosted_model:
        there = Publications(ledger.client, settings.hosted_org, settings.hosted_model)
        may = manifest.tenant == PUBLIC or Policies(ledger.client).get(manifest.tenant).hosted
        if may and there.marked(manifest.tenant, manifest.name):
            there.ask(manifest.digest, _title(manifest))


def publish_no_more(settings: Settings, ledger: Ledger, owner: str, name: str) -> None:
    """A name is taken away: so is what it has at the hosted service, and what gets the name later does not go there unasked."""
    if settings.hosted_model:
        Publications(ledger.client, settings.hosted_org, settings.hosted_model).drop(owner, name)


def _may(who: Caller, owner: str) -> None:
    if owner == PUBLIC and not who.operator:
        raise Forbidden("only the operator's key may publish or unpublish everyone's adapter", code="operator_only")


def _tenant(who: Caller, tenant: str | None) -> str:
    """Whose adapters a name is looked for among."""
    if tenant not in (None, who.tenant) and not who.operator:
        raise Forbidden("only the operator's key may see to another tenant's adapters", code="operator_only", param="tenant")
    return tenant or who.tenant


def _title(manifest: Manifest) -> str:
    return f"{manifest.tenant}/{manifest.name}"


def _body(raw: bytes) -> dict[str, str]:
    try:
        body = msgspec.json.decode(raw or b"{}", type=dict[str, str | None])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise BadRequest('send {"to": "groq"}, with "model": ID where it is there already') from None
    if unknown := set(body) - {"to", "model"}:
        raise BadRequest(f"unknown field {min(unknown)!r} beside 'to' and 'model'", param=min(unknown))
    if body.get("to") not in HOSTS:
        raise BadRequest(f"to: use {' or '.join(HOSTS)}", param="to")
    return {key: value for key, value in body.items() if value}


def _document(name: str, one: Publication, who: Caller) -> dict[str, Any]:
    """Without the names that others have given to the same content; the operator sees them all."""
    seen = one.titles if who.operator else [title for title in one.titles if title.split("/")[0] in (who.tenant, PUBLIC)]
    return {"object": "publication", "name": name, **msgspec.to_builtins(one), "titles": seen}
