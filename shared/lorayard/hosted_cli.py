"""Commands about hosted services: which adapters are there, whose data may leave and for how much, what it has cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import redis
import typer
from rich.table import Table

from lorayard import embedded
from lorayard.adapters.hosting import Publications
from lorayard.client import Client
from lorayard.errors import LorayardError, NotFound, SetupError, Unavailable
from lorayard.hosted import dollars, organisation
from lorayard.ledger.connection import connect
from lorayard.ledger.organisation import NANO
from lorayard.ledger.policies import Policies
from lorayard.ledger.registry import KeyRing
from lorayard.settings import Settings
from lorayard.terminal import AsJson, out, print_json

tenants_app = typer.Typer(
    no_args_is_help=True,
    help="Whose data may leave for hosted services, for how much money (talks to Redis, so only where the fleet runs).",
)
OfTenant = Annotated[str | None, typer.Option("--tenant", help="Whose adapter it is, if not yours (the operator's key only).")]
_WAIT_S = 900.0


def add_to(app: typer.Typer, adapters: typer.Typer) -> None:
    """Put these commands where they belong."""
    app.add_typer(tenants_app, name="tenants")
    adapters.command("publish")(publish)
    adapters.command("verify")(verify)
    adapters.command("unpublish")(unpublish)
    adapters.command("hosted")(hosted)


# -- adapters ----------------------------------------------------------------------------------------------------------------------------


def publish(
    name: str,
    to: Annotated[str, typer.Option("--to", help="The hosted service: groq (or what LORAYARD_HOSTED_URL says).")],
    model: Annotated[str | None, typer.Option("--model", help="It is there already, under this id (the operator's key only).")] = None,
    tenant: OfTenant = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is there, or cannot be.")] = True,
) -> None:
    """Bring an adapter to the hosted service; later contents of its name follow by themselves."""
    with Client() as client:
        document = client.publish_adapter(name, to=to, model=model, tenant=tenant)
        _tell(_settled(client, name, tenant, document["asked_ms"]) if wait else document)


def verify(name: str, tenant: OfTenant = None) -> None:
    """Have a published adapter looked at again; what is no longer there is brought there again."""
    with Client() as client:
        client.publication(name, tenant=tenant)
        document = client.publish_adapter(name, tenant=tenant)
        _tell(_settled(client, name, tenant, document["asked_ms"]))


def unpublish(name: str, tenant: OfTenant = None) -> None:
    """Take an adapter away from the hosted service. Its hosted jobs that still wait will fail; `auto` ones stay at home."""
    with Client() as client:
        deleted = client.unpublish_adapter(name, tenant=tenant)
    print(f"{name} is to be removed from the hosted service" if deleted else f"{name} was not published")


def hosted(as_json: AsJson = False) -> None:
    """What you have at the hosted service, and what it has cost."""
    with Client() as client:
        document = client.hosted()
    if as_json:
        print_json(document)
        return
    costs = document["month_usd_by_adapter"]
    table = Table("adapter", "state", "model", "this month $", "reason")
    for row in document["data"]:
        cost = dollars(costs.get(row["digest"], 0))
        table.add_row(row["name"], row["state"], row.get("model", ""), cost, row.get("error", ""))
    out.print(table)
    allowed = "may leave" if document["policy"]["hosted"] else "may not leave: the operator can allow it with 'lorayard tenants set'"
    spent = document["spent_usd"]
    out.print(f"Data {allowed}. Spent: ${dollars(spent['day'])} today, ${dollars(spent['month'])} this month (UTC).", highlight=False)


def _settled(client: Client, name: str, tenant: str | None, asked_ms: int) -> dict[str, Any]:
    """Its publication once a hosted worker has seen to it."""
    give_up = time.monotonic() + _WAIT_S
    with out.status(f"{name} is on its way …") as status:
        while True:
            document = client.publication(name, tenant=tenant)
            if document["asked_ms"] >= asked_ms and document["state"] != "wanted":  # others may have asked since
                return document
            status.update(f"{name} is on its way … {document.get('error', '')}")
            if time.monotonic() > give_up:
                why = document.get("error") or "is a hosted worker running? 'lorayard worker groq' starts one"
                raise Unavailable(f"{name} is not there after {_WAIT_S:.0f} s: {why}")
            time.sleep(0.3)


def _tell(document: dict[str, Any]) -> None:
    if document["state"] == "refused":
        raise LorayardError(f"{document['name']} cannot be served there: {document['error']}; its jobs keep to local workers")
    print(f"{document['name']}: {document['state']}" + (f" as {document['model']}" if document.get("model") else ""))


# -- tenants -----------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _store() -> Iterator[tuple[Settings, redis.Redis]]:
    settings = Settings.load()
    with connect(embedded.redis_url(settings)) as client:
        yield settings, client


@tenants_app.command("set")
def tenants_set(
    tenant: str,
    may_leave: Annotated[
        bool | None, typer.Option("--hosted/--local", help="Whether its prompts and adapters may leave; --local takes these away.")
    ] = None,
    daily_usd: Annotated[float | None, typer.Option(help="Dollars a day (UTC); below 0: any.")] = None,
    monthly_usd: Annotated[float | None, typer.Option(help="Dollars a month (UTC); below 0: any.")] = None,
) -> None:
    """Say what a tenant's jobs may do at hosted services. What is not named stays as it is; at first nothing may leave."""
    with _store() as (settings, client):
        if tenant not in KeyRing(client).tenants():
            raise NotFound(f"no tenant {tenant!r}: 'lorayard keys create --tenant {tenant}' makes it")
        policy = Policies(client).get(tenant)
        changes: dict[str, Any] = {} if may_leave is None else {"hosted": may_leave}
        for name, usd in (("daily_usd", daily_usd), ("monthly_usd", monthly_usd)):
            changes |= {} if usd is None else {name: None if usd < 0 else usd}
        if not changes:
            raise SetupError("nothing to set: give --hosted or --local, --daily-usd, --monthly-usd")
        if (daily_usd or 0) > 0 or (monthly_usd or 0) > 0:
            _check_prices(settings)
        Policies(client).set(tenant, msgspec.structs.replace(policy, **changes))
        if may_leave is False and settings.hosted_model:
            Publications(client, settings.hosted_org, settings.hosted_model).withdraw(tenant)
    print(f"{tenant}: set")


def _check_prices(settings: Settings) -> None:
    if settings.hosted_model not in settings.hosted_prices:
        raise SetupError(
            "a budget needs prices: set LORAYARD_HOSTED_PRICES to dollars for a million tokens in and out of each hosted model, in all of"
            ' the fleet\'s processes, as {"llama-3.1-8b-instant": [0.05, 0.08]}'
        )


@tenants_app.command("list")
def tenants_list(as_json: AsJson = False) -> None:
    """Each tenant's leave, budgets, and money spent at hosted services this day and month."""
    with _store() as (settings, client):
        policies = Policies(client)
        org = organisation(settings, client)
        state = org.state(settings.hosted_model or "")
        today, month = org.spent(state.day), org.spent(state.month)
        rows: list[dict[str, Any]] = [
            {
                "tenant": tenant,
                "hosted": policies.get(tenant).hosted,
                "daily_usd": policies.get(tenant).daily_usd,
                "monthly_usd": policies.get(tenant).monthly_usd,
                "spent_day_usd": today.get(tenant, 0) / NANO,
                "spent_month_usd": month.get(tenant, 0) / NANO,
                "month_usd_by_adapter": {a: nano / NANO for (who, a), nano in org.costs(state.month).items() if who == tenant},
            }
            for tenant in KeyRing(client).tenants()
        ]
    if as_json:
        print_json(rows)
        return
    table = Table("tenant", "may leave", "$ a day", "spent today", "$ a month", "spent this month")
    for r in rows:
        caps = ["any" if r[name] is None else dollars(r[name]) for name in ("daily_usd", "monthly_usd")]
        spent = [dollars(r[name]) for name in ("spent_day_usd", "spent_month_usd")]
        table.add_row(r["tenant"], "yes" if r["hosted"] else "no", caps[0], spent[0], caps[1], spent[1])
    out.print(table)
