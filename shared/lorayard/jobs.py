"""What a job is as a producer writes it (`JobSpec`), and what its life can be (`Status`). How it is kept: `ledger/functions.lua`."""

from __future__ import annotations

import base64
import difflib
import hashlib
import re
import secrets
from enum import StrEnum
from typing import Any, Literal, get_args

import msgspec

from lorayard.errors import BadRequest
from lorayard.settings import NAME_PATTERN

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
Priority = Literal["high", "normal", "low"]
Route = Literal["local", "groq", "auto"]

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")  # to be matched in full: `$` would let a trailing newline through
_NAME = re.compile(NAME_PATTERN)
_KEY_MAX = 256
ENDPOINT: Endpoint = "/v1/chat/completions"
PRIORITY: Priority = "normal"
ROUTE: Route = "local"
_CHOICES = {"endpoint": Endpoint, "priority": Priority, "route": Route}
_NEEDED = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}


class Status(StrEnum):
    """`queued → claimed → running → terminal`; `delayed` waits for a time, `submitted` lies at a hosted batch service."""

    QUEUED = "queued"
    DELAYED = "delayed"
    CLAIMED = "claimed"
    RUNNING = "running"
    SUBMITTED = "submitted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED})


class JobSpec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One job object of `POST /v1/jobs`, a line of a JSONL file, or the kwargs of the Celery task `lorayard.infer`."""

    request: dict[str, Any]
    adapter: str | None = None
    endpoint: Endpoint = ENDPOINT
    id: str | None = None
    idempotency_key: str | None = None
    priority: Priority = PRIORITY
    deadline_s: float | None = None
    not_before_s: float | None = None
    route: Route = ROUTE
    pool: str | None = None
    metadata: dict[str, Any] | None = None
    max_risk: float | None = None
    """Refuse the job, or with route auto have it computed elsewhere, when it would miss its deadline with a greater probability."""
    coalesce: bool = False
    """Where other jobs of the tenant ask for the very same, it is computed once for all of them."""

    def check(self) -> None:
        """Raise `BadRequest`, naming the field, where a value of the right type is still not acceptable."""
        if self.id is not None and not ID_PATTERN.fullmatch(self.id):
            raise BadRequest("id: use 1 to 100 of A-Z a-z 0-9 . _ : -, beginning with a letter or digit", param="id")
        if self.pool is not None and not _NAME.fullmatch(self.pool):
            raise BadRequest(f"pool: {self.pool[:80]!r} is not a pool's name", param="pool")
        key = self.idempotency_key
        if key is not None and not (0 < len(key) <= _KEY_MAX and key.isprintable()):
            raise BadRequest(f"idempotency_key: use 1 to {_KEY_MAX} printable characters", param="idempotency_key")
        for name in ("deadline_s", "not_before_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 366 * 24 * 3600:
                raise BadRequest(f"{name}: must be more than 0 and less than a year, in seconds from now", param=name)
        if self.deadline_s is not None and self.not_before_s is not None and self.not_before_s >= self.deadline_s:
            raise BadRequest("not_before_s: the deadline would have passed by then; both count from now", param="not_before_s")
        if self.max_risk is not None and not 0 <= self.max_risk < 1:
            raise BadRequest("max_risk: a probability, from 0 to less than 1, of missing the deadline", param="max_risk")
        if self.max_risk is not None and self.deadline_s is None:
            raise BadRequest("max_risk: needs deadline_s, which it is the risk of missing", param="max_risk")
        self._check_request()

    def _check_request(self) -> None:
        """What of the body is the job's business; its other fields are the routes'."""
        if "model" in self.request:
            raise BadRequest("request.model: leave it out; the job's adapter and pool say what answers", param="request.model")
        if self.request.get("stream"):
            raise BadRequest("request.stream: a queued job has no stream; poll its result or wait for it", param="request.stream")
        if self.coalesce and not self._is_deterministic():
            raise BadRequest(
                "coalesce: the answer would differ each time; set request.temperature to 0 or request.seed to a number, or leave it out",
                param="coalesce",
            )
        needed = _NEEDED[self.endpoint]
        if needed not in self.request:
            raise BadRequest(f"request.{needed} is missing: {self.endpoint} needs it", param=f"request.{needed}")

    def _is_deterministic(self) -> bool:
        seed, temperature = self.request.get("seed"), self.request.get("temperature")
        return self.endpoint == "/v1/embeddings" or isinstance(seed, int) or (isinstance(temperature, int | float) and temperature == 0)

    def once(self, digest: str) -> str:
        """What jobs of one tenant that may be computed once have in common, as hex digits: adapter and lane (`digest`), and the request, in
        whatever order its fields stand; "" where that is not wanted."""
        if not self.coalesce:
            return ""
        request = {name: value for name, value in self.request.items() if value is not None and name != "user"}
        if isinstance(request.get("temperature"), int):
            request["temperature"] = float(request["temperature"])  # 0 is 0.0
        body = msgspec.json.encode((digest, self.endpoint, request), order="sorted")
        return hashlib.blake2b(body, digest_size=16).hexdigest()

    def body_hash(self) -> str:
        """Digest of what the same idempotency key must carry again: everything but the id and the key."""
        when = (self.priority, self.deadline_s, self.not_before_s)
        body: tuple[Any, ...] = (self.adapter, self.endpoint, self.request, when, self.route, self.pool, self.metadata)
        if self.max_risk is not None:  # as it was before there was such a field, where it is not used
            body += (self.max_risk,)
        if self.coalesce:
            body += ("coalesce",)
        return hashlib.blake2b(msgspec.json.encode(body, order="sorted"), digest_size=12).hexdigest()


BASE_DIGEST = "base"
"""Stands where a digest is wanted and the base model is meant."""


Lane = Literal["", "groq", "auto", "batch"]
"""Who may claim a queued job: local workers; hosted ones; either; hosted ones through a batch service."""


def laned(digest: str, lane: Lane) -> str:
    """The digest by which a job is queued: with its lane behind it, so that nobody claims what is not his."""
    return f"{digest}@{lane}" if lane else digest


def adapter_of(queued: str) -> str:
    """The adapter's digest, of a digest by which jobs are queued."""
    return queued.partition("@")[0]


def lane_of(queued: str) -> str:
    return queued.partition("@")[2]


def new_id(pool: str) -> str:
    """A fresh job id, which carries its pool; 80 bits in few characters, for each stands in three places of the ledger."""
    return f"{pool}-{base64.b32encode(secrets.token_bytes(10)).decode().lower()}"


def parse_spec(data: bytes | str) -> JobSpec:
    """Decode one JSON job object. Raises `BadRequest` that names the field at fault."""
    try:
        spec = msgspec.json.decode(data, type=JobSpec)
    except msgspec.ValidationError as error:
        raise _not_a_job(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("not a job: nested too deeply") from None
    spec.check()
    return spec


def convert_spec(data: Any) -> JobSpec:
    """As `parse_spec`, from an object decoded already."""
    try:
        spec = msgspec.convert(data, type=JobSpec)
    except msgspec.ValidationError as error:
        raise _not_a_job(str(error)) from None
    except RecursionError:
        raise BadRequest("not a job: nested too deeply") from None
    spec.check()
    return spec


def _not_a_job(reason: str) -> BadRequest:
    """msgspec's reason, with the field in `param` and what may stand there instead."""
    if unknown := re.search(r"unknown field `(.*)`", reason):
        name = unknown[1][:80]
        near = difflib.get_close_matches(name, JobSpec.__struct_fields__, 1)
        hint = f"did you mean {near[0]!r}?" if near else "the OpenAI body goes under 'request', your own notes under 'metadata'"
        return BadRequest(f"not a job: unknown field {name!r}; {hint}", param=name)
    at = re.search(r"`\$\.(\w+)", reason)
    choices = get_args(_CHOICES.get(at[1])) if at else ()
    more = f"; use {' or '.join(map(repr, choices))}" if choices else ""
    return BadRequest(f"not a job: {reason[:300]}{more}", param=at[1] if at else None)
