"""What a tenant's jobs may do at hosted services: whether its data may leave at all, and for how much money."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import redis

from lorayard.errors import BadRequest
from lorayard.ledger import keys
from lorayard.ledger.organisation import Caps
from lorayard.settings import NAME_PATTERN


class Policy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """By default nothing leaves. Money in dollars; None: as much as the organisation has."""

    hosted: bool = False
    daily_usd: float | None = None
    monthly_usd: float | None = None

    @property
    def caps(self) -> Caps:
        return Caps.of(self.daily_usd, self.monthly_usd)


NOTHING_LEAVES = Policy()


class Policies:
    """The policies of all tenants."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def all(self) -> dict[str, Policy]:
        """Of those tenants that have one."""
        raw: Any = self._client.hgetall(keys.POLICIES)
        return {tenant.decode(): msgspec.json.decode(value, type=Policy) for tenant, value in raw.items()}

    def get(self, tenant: str) -> Policy:
        raw: Any = self._client.hget(keys.POLICIES, tenant)
        return _policy(raw)

    @staticmethod
    def question(tenants: Sequence[str]) -> list[str]:
        """The command that asks for these tenants' policies, and `answer` what its reply says."""
        return ["HMGET", keys.POLICIES, *tenants]

    @staticmethod
    def answer(tenants: Sequence[str], reply: Sequence[bytes | None]) -> dict[str, Policy]:
        return {tenant: _policy(raw) for tenant, raw in zip(tenants, reply, strict=True)}

    def set(self, tenant: str, policy: Policy) -> None:
        if not re.fullmatch(NAME_PATTERN, tenant):
            raise BadRequest(f"tenant: {tenant[:80]!r} is not a name", param="tenant")
        for name in ("daily_usd", "monthly_usd"):
            usd = getattr(policy, name)
            if usd is not None and not 0 <= usd < 1e9:
                raise BadRequest(f"{name}: must be dollars, from 0 on", param=name)
        self._client.hset(keys.POLICIES, tenant, msgspec.json.encode(policy))


def _policy(raw: bytes | None) -> Policy:
    return msgspec.json.decode(raw, type=Policy) if raw else NOTHING_LEAVES
