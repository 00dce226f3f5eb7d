"""The names of all Redis keys. What lies under a pool's prefix is written by `functions.lua` alone, and documented there."""

from __future__ import annotations

WORKERS = "ly:{workers}:"
"""Followed by a pool's name: HASH worker -> JSON of what it last told of itself; with `:base`, STRING JSON of the pool's base model;
with `:next`, STRING of the digests of the adapters that are planned next, with spaces between them, and `>WORKER` behind those that a
worker shall fetch ahead."""

KEYS = "ly:{tenants}:keys"
"""HASH SHA-256 of an API key -> JSON {tenant, created_ms, note}."""

REVOKED = "ly:{tenants}:revoked"
"""SET of SHA-256 of keys that were revoked, and are not to become valid again because a setting or file still has one."""

TENANTS = "ly:{tenants}:names"
"""SET of tenants."""


POLICIES = "ly:{tenants}:policies"
"""HASH of a tenant -> JSON of what its jobs may do at hosted services."""


def organisation(name: str) -> str:
    """What every key of an organisation at a hosted service begins with: those of `limits.lua`, and of `adapters/hosting.py`."""
    return f"ly:{{org:{name}}}:"


def prefix(pool: str) -> str:
    """What every key of a pool begins with; the braces keep them in one slot of a cluster."""
    return f"ly:{{{pool}}}:"


def ref(tenant: str, job_id: str) -> str:
    return f"{tenant}/{job_id}"


def split_ref(text: str) -> tuple[str, str]:
    tenant, _, job_id = text.partition("/")
    return tenant, job_id
