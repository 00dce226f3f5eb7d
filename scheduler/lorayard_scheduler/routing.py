"""Where a job may run, decided when it is accepted: its lane. What cannot go where it is told to is refused with the reason."""

from __future__ import annotations

from typing import Any

import redis

from lorayard.adapters import Manifest
from lorayard.adapters.hosting import Publication, Publications
from lorayard.bodies import read_body
from lorayard.errors import BadRequest, Forbidden, LorayardError
from lorayard.hosted import hosted_body, no_money, organisation
from lorayard.jobs import JobSpec, Lane
from lorayard.ledger.organisation import Spent
from lorayard.ledger.policies import NOTHING_LEAVES, Policies, Policy
from lorayard.settings import Settings

BATCH_SLACK_S = 3600


class Routing:
    """Of one process. What it knows of tenants and adapters is read again for each request: `look`. Raises `SetupError`."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self._settings = settings
        self._client = client
        self._policies = Policies(client)
        self._org = organisation(settings, client) if settings.hosted_model else None

    def look(self, tenant: str) -> Routes:
        """The routes open to a tenant now."""
        settings = self._settings
        policy = self._policies.get(tenant) if settings.hosted_model else NOTHING_LEAVES
        if not settings.hosted_model or self._org is None or not policy.hosted:
            return Routes(settings, tenant, policy, {}, None)
        spent = self._org.short(settings.hosted_model, tenant, policy.caps)
        return Routes(settings, tenant, policy, Publications(self._client, settings.hosted_org, settings.hosted_model).all(), spent)


class Routes:
    """`spent`: of which money nothing is left to the tenant."""

    def __init__(self, settings: Settings, tenant: str, policy: Policy, there: dict[str, Publication], spent: Spent | None) -> None:
        self._settings = settings
        self._tenant = tenant
        self._policy = policy
        self._there = there
        self._spent = spent

    def lane(self, spec: JobSpec, manifest: Manifest | None) -> Lane:
        """Raises `LorayardError` where the job's route leads nowhere. An `auto` job that cannot leave stays."""
        if spec.route == "local":
            read_body(spec.endpoint, spec.request)
            return ""
        if not self._settings.hosted_model:
            raise BadRequest(
                f"route {spec.route!r}: this fleet has no hosted worker, for LORAYARD_HOSTED_MODEL does not say which hosted model this"
                " pool's base is; leave route out or say 'local'",
                code="route_unavailable",
                param="route",
            )
        try:
            self._may_leave()
            self._is_there(manifest, spec.route)
            hosted_body(spec.request, self._settings, endpoint=spec.endpoint)
        except LorayardError:
            if spec.route == "groq":
                raise
            read_body(spec.endpoint, spec.request)
            return ""
        if spec.route == "groq":
            return "batch" if self._has_time(spec.deadline_s) else "groq"
        return "auto" if _runs_at_home(spec.endpoint, spec.request) else "groq"

    def _may_leave(self) -> None:
        if not self._policy.hosted:
            raise Forbidden(
                f"route 'groq': tenant {self._tenant} has not allowed its data to leave; the operator can: 'lorayard tenants set"
                f" {self._tenant} --hosted'",
                code="hosted_not_allowed",
                param="route",
            )
        if self._spent:
            at_home = "; left out, the job runs on local workers" if self._settings.local_worker else ""
            raise Forbidden(f"route 'groq': {no_money(self._spent)}{at_home}", code="budget_exhausted", param="route")

    def _is_there(self, manifest: Manifest | None, route: str) -> None:
        if manifest is None:
            return
        found = self._there.get(manifest.digest)
        if found is None or found.state == "unwanted":
            raise BadRequest(
                f"route 'groq': the adapter {manifest.name!r} is not at the hosted service: 'lorayard adapters publish {manifest.name} --to"
                " groq' brings it there",
                code="adapter_not_hosted",
                param="adapter",
            )
        if found.state == "refused":
            raise BadRequest(
                f"route 'groq': the adapter {manifest.name!r} cannot go there: {found.error}", code=found.code, param="adapter"
            )
        if found.state == "wanted" and route == "auto":
            raise BadRequest("not there yet")  # stays at home

    def _has_time(self, deadline_s: float | None) -> bool:
        settings = self._settings
        if not settings.hosted_batches or settings.hosted_api != "groq" or deadline_s is None:
            return False
        return deadline_s >= settings.hosted_batch_window_s + BATCH_SLACK_S


def _runs_at_home(endpoint: str, request: dict[str, Any]) -> bool:
    """Whether local workers understand the request: some fields only the hosted service does."""
    try:
        read_body(endpoint, request)
    except LorayardError:
        return False
    return True
