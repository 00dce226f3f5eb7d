"""Who has which adapter under which name: one Redis hash a tenant, `ly:{adapters}:<tenant>` of name → manifest (JSON)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import msgspec
from redis import Redis
from redis.client import Pipeline

from lorayard.adapters.manifest import PUBLIC, Manifest
from lorayard.errors import BadRequest, NotFound
from lorayard.settings import NAME_PATTERN

_NAME = re.compile(NAME_PATTERN)
_decode = msgspec.json.Decoder(Manifest).decode


def check_name(name: str, what: str = "adapter") -> str:
    """The name itself, or `BadRequest`: names become parts of keys, files and addresses."""
    # fullmatch, because `$` would let a trailing newline through.
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{what}: {name[:80]!r} is not a name; use 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit", param=what
        )
    return name


class AdapterRegistry:
    """Names of adapters, by tenant. A tenant sees its own and the public ones; its own hide public ones of the same name."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @staticmethod
    def _key(tenant: str) -> str:
        return f"ly:{{adapters}}:{PUBLIC if tenant == PUBLIC else check_name(tenant, 'tenant')}"

    def add(self, tenant: str, name: str, manifest: Manifest) -> Manifest:
        """Give `name` to this content; returns what is stored.

        Where the name had other content, `replaces` is that content's digest: jobs enqueued from now on get the new one,
        while queued jobs keep the digest they were enqueued with.
        """
        key, field = self._key(tenant), check_name(name)

        def write(pipe: Pipeline) -> Manifest:
            old = self._manifest(cast("bytes | None", pipe.hget(key, field)))
            replaces = old.digest if old is not None and old.digest != manifest.digest else ""
            new = msgspec.structs.replace(manifest, tenant=tenant, name=name, replaces=replaces)
            pipe.multi()
            pipe.hset(key, field, msgspec.json.encode(new))
            return new

        # The stubs of `transaction` know nothing of value_from_callable.
        return cast("Manifest", self._redis.transaction(cast("Any", write), key, value_from_callable=True))

    def get(self, tenant: str, name: str) -> Manifest:
        """The tenant's own adapter of that name, else the public one. Raises `NotFound`, alike for another tenant's."""
        found = self.get_many(tenant, [name])[name]
        if found is None:
            raise self.unknown(name)
        return found

    @staticmethod
    def unknown(name: str) -> NotFound:
        return NotFound(
            f"no adapter named {name!r}; `lorayard adapters list` shows those there are", code="adapter_not_found", param="adapter"
        )

    def get_many(self, tenant: str, names: Iterable[str]) -> dict[str, Manifest | None]:
        """As `get`, for many names in one round trip; None where there is none."""
        wanted = [check_name(name) for name in dict.fromkeys(names)]
        if not wanted:
            return {}
        pipe = self._redis.pipeline(transaction=False)
        pipe.hmget(self._key(tenant), wanted)
        pipe.hmget(self._key(PUBLIC), wanted)
        own, public = cast("list[list[bytes | None]]", pipe.execute())
        return {name: self._manifest(mine or shared) for name, mine, shared in zip(wanted, own, public, strict=True)}

    def list(self, tenant: str) -> list[Manifest]:
        """All that the tenant may use, by name."""
        found: dict[str, Manifest] = {}
        for owner in dict.fromkeys((PUBLIC, tenant)):
            values: Any = self._redis.hvals(self._key(owner))
            found |= {manifest.name: manifest for manifest in map(_decode, values)}
        return [found[name] for name in sorted(found)]

    def remove(self, tenant: str, name: str) -> Manifest:
        """Take the name away from the tenant's own (or, for `*`, the public) adapters; the content stays for jobs that are queued.

        Raises `NotFound`.
        """
        key, field = self._key(tenant), check_name(name)
        pipe = self._redis.pipeline(transaction=True)
        pipe.hget(key, field)
        pipe.hdel(key, field)
        removed = self._manifest(cast("bytes | None", pipe.execute()[0]))
        if removed is None:
            raise NotFound(f"no adapter named {name!r}", code="adapter_not_found", param="adapter")
        return removed

    @staticmethod
    def _manifest(value: bytes | None) -> Manifest | None:
        return None if value is None else _decode(value)
