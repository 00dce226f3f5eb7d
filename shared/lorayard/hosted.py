"""What can be asked of a hosted service: which request bodies, in which words, for how much money; and what is known of its bases."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import msgspec

from lorayard.adapters import BaseModel
from lorayard.bodies import CHAT
from lorayard.errors import BadRequest, SetupError
from lorayard.ledger.organisation import NANO, Caps, Organisation, Rates, Spent
from lorayard.settings import Settings

_LLAMA_31 = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct")  # Hugging Face has it under both names

BASES: dict[str, BaseModel] = {
    "llama-3.1-8b-instant": BaseModel(
        architecture="llama",
        n_layer=32,
        n_embd=4096,
        n_head=32,
        n_head_kv=8,
        n_ff=14336,
        n_vocab=128256,
        n_ctx_train=131072,
        name="Llama-3.1-8B-Instruct",
        names=list(_LLAMA_31),
        digest="hosted",
    )
}
"""Bases that a pool without a local worker can check adapters against, by the host's id."""

# What Groq takes (console.groq.com/docs/api-reference). Anything else is refused by name rather than sent on trust.
_GROQ_FIELDS = {
    *("messages", "max_completion_tokens", "temperature", "top_p", "stop", "seed", "user", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "reasoning_format", "include_reasoning", "service_tier"),
}
_OPENAI_FIELDS = _GROQ_FIELDS | {
    *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "top_k", "min_p", "max_tokens"),
}
# Values that change nothing, so that a body made for local workers need not be rewritten.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "store": (False,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_k": (0,),
    "min_p": (0,),
    "modalities": (["text"],),
    "tools": ([],),
}
_TIERS = ("auto", "on_demand", "flex", "performance")
_MAX_STOPS, _MAX_TOOLS = 4, 128
_BYTES_PER_TOKEN, _MESSAGE_TOKENS = 3.0, 8
MOST_TOKENS = 10_000_000
"""Of one prompt or answer: more is no number of tokens."""


def hosted_body(request: dict[str, Any], settings: Settings, *, endpoint: str = CHAT) -> tuple[dict[str, Any], list[str]]:
    """The body as the service takes it, without `model`, and notes of what was changed. Raises `BadRequest` that names the field."""
    if endpoint != CHAT:
        raise BadRequest(f"{endpoint}: hosted services answer only {CHAT}", code="endpoint_unavailable", param="endpoint")
    groq = settings.hosted_api == "groq"
    fields, notes = _GROQ_FIELDS if groq else _OPENAI_FIELDS, []
    body: dict[str, Any] = {}
    for name, value in request.items():
        if value is None:
            continue
        if value in _NO_EFFECT.get(name, ()):
            notes.append(f"{name} left out: it is what the service does anyway")
        elif name in fields or name in ("max_tokens", "max_completion_tokens"):
            body[name] = value
        else:
            raise BadRequest(
                f"{name}: the hosted service does not take it; leave it out, or route 'local'", code="unsupported_parameter", param=name
            )
    _check(body, groq)
    most = body.pop("max_tokens", None)
    wanted = body.pop("max_completion_tokens", None) or most
    if not wanted:
        notes.append(f"answers end at {settings.hosted_max_tokens} tokens (LORAYARD_HOSTED_MAX_TOKENS): the request does not say")
    body["max_completion_tokens" if groq else "max_tokens"] = wanted or settings.hosted_max_tokens
    return body, notes


def _check(body: dict[str, Any], groq: bool) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise BadRequest("messages: give a list of messages, each with a role", param="messages")
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body and not (_is_number(body[name]) and 1 <= body[name] <= MOST_TOKENS and body[name] == int(body[name])):
            raise BadRequest(f"{name}: must be a whole number from 1 to {MOST_TOKENS}", param=name)
    for name, (low, high) in _RANGES.items():
        if name in body and not (_is_number(body[name]) and low <= body[name] <= high):
            raise BadRequest(f"{name}: must be from {low} to {high}", param=name)
    for name, (fits, words) in _SHAPES.items():
        if name in body and not fits(body[name]):
            raise BadRequest(f"{name}: {words}", param=name)
    if groq and body.get("service_tier", "auto") not in _TIERS:
        raise BadRequest(f"service_tier: use {', '.join(_TIERS)}", param="service_tier")
    if "reasoning_format" in body and "include_reasoning" in body:
        raise BadRequest("include_reasoning: cannot be given with reasoning_format", param="include_reasoning")


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_tools(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_TOOLS and all(_is_named(tool, "function") for tool in value)


def _is_format(value: object) -> bool:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind in ("text", "json_object") or (kind == "json_schema" and _is_named(value, kind))


def _is_named(value: Any, kind: str) -> bool:
    """`{"type": KIND, KIND: {"name": ...}}`"""
    inner = value.get(kind) if isinstance(value, dict) and value.get("type") == kind else None
    return isinstance(inner, dict) and isinstance(inner.get("name"), str)


# A job that would be refused there for its form alone is refused at submit.
_RANGES = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}
_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stop": (lambda v: isinstance(v, str) or (_are_strings(v) and len(v) <= _MAX_STOPS), f"give up to {_MAX_STOPS} strings"),
    "tools": (_are_tools, f'give a list of up to {_MAX_TOOLS} of {{"type": "function", "function": {{"name": ...}}}}'),
    "response_format": (_is_format, 'its type must be text, json_object, or json_schema with {"json_schema": {"name": ...}}'),
    "seed": (lambda v: isinstance(v, int) and not isinstance(v, bool), "must be a whole number"),
    "user": (lambda v: isinstance(v, str), "must be a string"),
    "parallel_tool_calls": (lambda v: isinstance(v, bool), "must be true or false"),
    "reasoning_effort": (lambda v: isinstance(v, str), "must be a string"),
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def prompt_bytes(body: dict[str, Any]) -> int:
    """Bytes of what becomes the prompt: messages, tools and schemas."""
    return len(msgspec.json.encode([body.get("messages"), body.get("tools"), body.get("response_format")]))


def prompt_tokens(body: dict[str, Any], tokens_per_byte: float = 1 / _BYTES_PER_TOKEN) -> int:
    """What the prompt is taken to have, rather more than less, until the service has counted."""
    return math.ceil(prompt_bytes(body) * tokens_per_byte) + _MESSAGE_TOKENS * len(body["messages"])


def answer_tokens(body: dict[str, Any]) -> int:
    return int(body.get("max_completion_tokens") or body["max_tokens"])


def price(settings: Settings) -> tuple[float, float]:
    """Nano-dollars for a token of a prompt, and of an answer; 0 where nobody said."""
    usd_in, usd_out = settings.hosted_prices.get(settings.hosted_model or "", (0.0, 0.0))
    return usd_in * NANO / 1e6, usd_out * NANO / 1e6


def no_money(spent: Spent) -> str:
    """Whose money it is that is not enough, and how there is more."""
    which, period = spent.which, {"day": "daily", "month": "monthly"}[spent.which]
    if spent.whose == "*":
        whose, more = "the organisation", f"LORAYARD_HOSTED_{period.upper()}_USD, set for all of the fleet's processes, gives more"
    else:
        whose, more = f"tenant {spent.whose}", f"'lorayard tenants set {spent.whose} --{period}-usd DOLLARS' gives more"
    next_one = f", and so does the next {which} (UTC)" if spent.cap else ""
    return f"{whose}'s money of the {which} is spent (${dollars(spent.cap / NANO)} for hosted calls): {more}{next_one}"


def dollars(usd: float) -> str:
    """To be read: never fewer decimals than it takes to show that it is not nothing."""
    text = f"{usd:.4f}" if usd >= 1 else f"{usd:.9f}"
    whole, _, part = text.partition(".")
    return f"{whole}.{part.rstrip('0').ljust(2, '0')}"


def base_names(settings: Settings) -> tuple[str, ...]:
    """What an adapter's `base_model_name_or_path` must be, exactly, to be served there."""
    known = BASES.get(settings.hosted_model or "")
    return settings.hosted_base_names or tuple(known.names if known else ())


def api_key(settings: Settings) -> str:
    """Raises `SetupError`. A server of one's own may need none."""
    key = settings.hosted_key.get_secret_value() if settings.hosted_key else os.environ.get("GROQ_API_KEY", "")
    if not key and settings.hosted_api == "groq":
        raise SetupError("no key of the hosted service: set LORAYARD_HOSTED_KEY or GROQ_API_KEY")
    return key.strip()


def organisation(settings: Settings, client: Any) -> Organisation:
    """Limits and money of the settings' organisation, its function library in place. Raises `SetupError`."""
    caps = Caps.of(settings.hosted_daily_usd, settings.hosted_monthly_usd)
    if max(caps) >= 0 and not any(price(settings)):
        raise SetupError(
            "a budget without prices: set LORAYARD_HOSTED_PRICES to dollars for a million tokens in and out, as"
            f' {{"{settings.hosted_model}": [0.05, 0.08]}}'
        )
    rates = Rates(settings.hosted_rpm, settings.hosted_tpm, settings.hosted_rpd, settings.hosted_tpd)
    org = Organisation(client, settings.hosted_org, rates=rates, caps=caps)
    org.install()
    return org
