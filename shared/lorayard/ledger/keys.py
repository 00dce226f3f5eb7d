"""The names of all Redis keys. What lies under a pool's prefix is written by `functions.lua` alone, and documented there."""

from __future__ import annotations

WORKERS = "ly:{workers}:"
"""Followed by a pool's name: HASH worker -> JSON of what it last told of itself; with `:base`, STRING JSON of the pool's base model."""

KEYS = "ly:{tenants}:keys"
"""HASH SHA-256 of an API key -> JSON {tenant, created_ms, note}."""

TENANTS = "ly:{tenants}:names"
"""SET of tenants."""


def prefix(pool: str) -> str:
    """What every key of a pool begins with; the braces keep them in one slot of a cluster."""
    return f"ly:{{{pool}}}:"


def ref(tenant: str, job_id: str) -> str:
    return f"{tenant}/{job_id}"


def split_ref(text: str) -> tuple[str, str]:
    tenant, _, job_id = text.partition("/")
    return tenant, job_id
