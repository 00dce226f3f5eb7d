"""Who is there: workers with what they last told of themselves, the pools' base models, tenants and their API keys."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import redis

from lorayard.errors import BadRequest, SetupError, Unauthorized
from lorayard.ledger import keys
from lorayard.ledger.ledger import Ledger
from lorayard.settings import NAME_PATTERN, Settings

ALIVE_MS = 3_000
"""A worker that has told nothing for so long, three heartbeats, gets no new work; its leases decide over what it holds. They last longer:
what is queued again when one runs out must not go to the very worker that lost it, which has nothing else to do."""

NEXT_MS = 5_000
"""What was planned so long ago says nothing of what comes next."""

KEY_PREFIX = "ly-"
HOSTED = "hosted"
"""The kind of a worker whose jobs leave this fleet."""


class Caller(NamedTuple):
    """Whom an API key stands for. The operator may also give adapters to everyone."""

    tenant: str
    operator: bool


class Planned(NamedTuple):
    """Adapters that wait in a pool, the next first; `mine`: those that the worker who asks shall fetch ahead."""

    digests: list[str]
    mine: list[str]


class WorkerInfo(msgspec.Struct, kw_only=True):
    """What a worker tells every heartbeat. `seen_ms` is the ledger's clock; `hot` and `loaded` are adapter digests, most recent first; of a
    hosted worker `loaded` is all it can serve.

    `costs` is what it has measured of itself: `{"switch_ms": {"hot", "loaded", "disk", "remote"}, "prefill_tokens_per_s",
    "step_ms": {WIDTH: ms}}`.
    """

    name: str
    pool: str
    kind: str
    incarnation: str
    host: str
    pid: int
    width: int = 0
    max_prompt_tokens: int = 0
    max_token_bytes: int = 0
    ready: bool = False
    hot: list[str] = []
    loaded: list[str] = []
    absent: list[str] = []  # of the adapters that were planned at its last heartbeat, those that it would have to fetch
    counters: dict[str, float] = {}
    ended: int = 0  # jobs whose ends it has stored since it was started
    room: int = 0  # of a hosted worker: how many jobs of any adapters it would like to have, in all
    fallback: str = ""  # what it does without, and why: with the settings as they are, it would not have started
    doubted: list[str] = []  # of a hosted worker: adapters whose calls fail, so that it would rather have others
    costs: dict[str, Any] = {}
    seen_ms: int = 0

    @property
    def hosted(self) -> bool:
        return self.kind == HOSTED


class WorkerRegistry:
    """The `{workers}` keys. Lossy by design: losing them costs a heartbeat, no job."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def beat(self, info: WorkerInfo) -> Planned:
        """Tell; answers with what is planned next, as far as the scheduler said lately."""
        seconds, micros = self._client.time()
        info.seen_ms = int(seconds) * 1000 + int(micros) // 1000
        line = msgspec.json.encode(info)
        told: Any = self._client.fcall("ly_tell", 1, keys.WORKERS + info.pool, info.name, line)  # also when memory is short
        pairs = [word.partition(">") for word in told.decode().split()] if told else []
        return Planned([digest for digest, _, _ in pairs], [digest for digest, _, worker in pairs if worker == info.name])

    def announce_next(self, pool: str, digests: Sequence[str], fetchers: Mapping[str, str]) -> None:
        """For workers to hear with their next heartbeat, forgotten after `NEXT_MS`. `fetchers`: of some digests, who shall fetch them."""
        words = [f"{digest}>{fetchers[digest]}" if digest in fetchers else digest for digest in digests]
        self._client.set(f"{keys.WORKERS}{pool}:next", " ".join(words), px=NEXT_MS)

    def leave(self, info: WorkerInfo) -> None:
        self._client.hdel(keys.WORKERS + info.pool, info.name)

    def workers(self, pool: str) -> list[WorkerInfo]:
        """All that ever told and did not leave, by name; see `alive`."""
        raw: Any = self._client.hvals(keys.WORKERS + pool)
        return sorted((msgspec.json.decode(v, type=WorkerInfo) for v in raw), key=lambda w: w.name)

    def find(self, pool: str, name: str) -> WorkerInfo | None:
        """What the worker of that name last told."""
        raw: Any = self._client.hget(keys.WORKERS + pool, name)
        return msgspec.json.decode(raw, type=WorkerInfo) if raw else None

    def alive(self, pool: str, now_ms: int) -> list[WorkerInfo]:
        return [w for w in self.workers(pool) if w.ready and now_ms - w.seen_ms < ALIVE_MS]

    def silent(self, pool: str, silent_ms: int) -> list[WorkerInfo]:
        """The workers that have told nothing for so long."""
        seconds, micros = self._client.time()
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        return [worker for worker in self.workers(pool) if now_ms - worker.seen_ms > silent_ms]

    def strike_off(self, worker: WorkerInfo) -> None:
        """Forget a worker, unless it has told something since this was."""
        if self.is_silent(worker):
            self._client.hdel(keys.WORKERS + worker.pool, worker.name)

    def is_silent(self, worker: WorkerInfo) -> bool:
        """Whether it is known and has told nothing since this."""
        last = self.find(worker.pool, worker.name)
        return last is not None and last.seen_ms == worker.seen_ms

    def announce_base(self, pool: str, base: dict[str, Any]) -> None:
        """Write what the pool's base model is, so that adapters can be checked against it where the model is not at hand."""
        self._client.set(f"{keys.WORKERS}{pool}:base", msgspec.json.encode(base))

    def base(self, pool: str) -> dict[str, Any] | None:
        raw: Any = self._client.get(f"{keys.WORKERS}{pool}:base")
        return msgspec.json.decode(raw) if raw else None


class KeyRing:
    """API keys: kept as SHA-256 only, valid until revoked; each belongs to one tenant."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def create(self, tenant: str, *, operator: bool = False) -> str:
        """A new key of a tenant; this is the only moment it can be read."""
        if not re.fullmatch(NAME_PATTERN, tenant):
            raise BadRequest(f"tenant: {tenant[:80]!r} is not a name; use 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit")
        key = KEY_PREFIX + secrets.token_urlsafe(24)
        self._admit(key, tenant, operator)
        return key

    def _admit(self, key: str, tenant: str, operator: bool) -> None:
        seconds, _ = self._client.time()
        entry = msgspec.json.encode({"tenant": tenant, "operator": operator, "created_s": int(seconds), "tail": key[-4:]})
        self._client.hset(keys.KEYS, _digest(key), entry)
        self._client.sadd(keys.TENANTS, tenant)

    def caller(self, key: str) -> Caller:
        """Raises `Unauthorized` for a key that is not, or no longer, valid. Only the digest is looked up: nothing is compared in Python."""
        raw: Any = self._client.hget(keys.KEYS, _digest(key)) if key else None
        if raw is None:
            raise Unauthorized("no valid API key: send 'Authorization: Bearer KEY'; 'lorayard keys create --tenant T' makes one")
        entry = msgspec.json.decode(raw)
        return Caller(entry["tenant"], entry["operator"])

    def entries(self) -> list[dict[str, Any]]:
        """What is known of each key: its name for `revoke`, tenant, last characters, when it was made."""
        raw: Any = self._client.hgetall(keys.KEYS)
        return [{"key": digest.decode()[:12], **msgspec.json.decode(value)} for digest, value in sorted(raw.items())]

    def revoke(self, name: str) -> bool:
        """The key of that name (as `entries` shows it) is valid no more, at once and for good."""
        raw: Any = self._client.hkeys(keys.KEYS)
        found = [digest for digest in raw if digest.decode().startswith(name)] if len(name) >= 8 else []
        if len(found) != 1:
            return False
        pipe = self._client.pipeline(transaction=True)
        pipe.sadd(keys.REVOKED, found[0])
        pipe.hdel(keys.KEYS, found[0])
        return bool(pipe.execute()[1])

    def _revoked(self, key: str) -> bool:
        return bool(self._client.sismember(keys.REVOKED, _digest(key)))

    def tenants(self) -> list[str]:
        raw: Any = self._client.smembers(keys.TENANTS)
        return sorted(name.decode() for name in raw)

    def ensure_first(self, settings: Settings) -> str:
        """The operator's key: the setting, else the file `api_key` of the state folder, made at the first start, anew where that one was
        revoked. Raises `SetupError` where the setting's was."""
        path = settings.state_dir / "api_key"
        with self._client.lock(keys.KEYS + ":first", timeout=10):  # of several processes that start, one makes it
            key = settings.api_key or (path.read_text().strip() if path.exists() else "")
            if settings.api_key and self._revoked(key):
                raise SetupError(
                    f"LORAYARD_API_KEY is a key that was revoked: set another, or unset it to have one made and written to {path}"
                )
            if not key or self._revoked(key):
                key = KEY_PREFIX + secrets.token_urlsafe(24)
                _write_key(path, key)
            self._admit(key, settings.celery_tenant, operator=True)
        return key


def _write_key(path: Path, key: str) -> None:
    """Whole or not at all: others may be reading it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(key + "\n")
        part.replace(path)
    except OSError as error:
        raise SetupError(f"cannot write {path} ({error.strerror}): set LORAYARD_STATE_DIR to a folder you may write") from None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def open_ledger(client: redis.Redis, settings: Settings) -> Ledger:
    """The ledger of the settings' pool, its function library in place."""
    ledger = Ledger(client, settings.pool, result_ttl_s=settings.result_ttl_s)
    ledger.install()
    return ledger
