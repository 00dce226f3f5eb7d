"""What a hosted service's answers mean: a complete one, or what went wrong and what to do next. Pure; lenient in what it reads."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from lorayard.hosted import MOST_TOKENS
from lorayard.hosted_codes import own_code

How = Literal["final", "attempt", "patience", "later"]
"""What becomes of the job: failed for good · tried again, an attempt used · put off at no cost the first times · put off at no cost."""

PATIENCE = 8
"""So often a job is put off at no cost because no whole answer came; then each time is an attempt: it may be the job's own doing."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_AGAIN = re.compile(r"try again in ((?:\d+(?:\.\d+)?(?:ms|h|m|s))+)")
_LIMIT = re.compile(r"\((RPM|RPD|TPM|TPD|ITPM|OTPM)\): Limit ([1-9][0-9]{0,11})\b", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)
_LIMITED_S = 2.0  # where a refusal says neither
_BLOCKED_S = 60.0  # until it is tried again where somebody has to put something right
_KEPT = 16_384  # characters of a failed generation
_MOST_WAIT_S = 86_400.0
_MOST_S = 1e6
_INSTEAD_OF_TEXT = ("content", "tool_calls", "function_call", "refusal", "reasoning", "reasoning_content")


class Failure(NamedTuple):
    """`after_s`: the service asked for so much time. `limit`: (rpm, tpm, rpd or tpd, its value), where a refusal told.

    `code`: one of `lorayard.hosted_codes`, or the service's own. `overload`: the service has too much to do; `trouble`: it is not well, or
    not well set up, whatever was asked of it; `missing`: it does not know the model; `blocked`: no call of the organisation would do better
    now; `unknown`: the call may have been computed, and charged.
    """

    code: str
    message: str
    how: How
    after_s: float = 0.0
    limit: tuple[str, int] | None = None
    overload: bool = False
    trouble: bool = False
    missing: bool = False
    blocked: bool = False
    unknown: bool = False
    failed_generation: str = ""


def seconds(text: str, now: str = "") -> float | None:
    """Of a duration as Go writes it (`2m59.56s`, `185ms`), of a plain number of seconds, or until an HTTP date; None for anything else.

    `now`: the date by the clock that said so, as an HTTP date; ours may be wrong.
    """
    text = text.strip()
    try:
        number = float(text)
        return number if math.isfinite(number) and number >= 0 else None
    except ValueError:
        pass
    parts = _DURATION.findall(text)
    if parts and "".join(n + unit for n, unit in parts) == text:
        return sum(float(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for n, unit in parts)
    until, at = _timestamp(text), _timestamp(now)
    return None if until is None else max(0.0, until - (time.time() if at is None else at))


def _timestamp(date: str) -> float | None:
    try:
        parsed = email.utils.parsedate_tz(date)
        return None if parsed is None else email.utils.mktime_tz(parsed)
    except (ValueError, OverflowError):  # of a year that no calendar has
        return None


def limits_told(headers: Mapping[str, str]) -> dict[str, int]:
    """Of an answer's headers: tpm and rpd, and what is left of them. Requests are the day's there, tokens the minute's."""
    names = {
        "tpm": "x-ratelimit-limit-tokens",
        "left_tokens": "x-ratelimit-remaining-tokens",
        "rpd": "x-ratelimit-limit-requests",
        "left_requests": "x-ratelimit-remaining-requests",
    }
    return {name: int(value) for name, header in names.items() if _NUMBER.fullmatch(value := headers.get(header, ""))}


def complete(body: Any) -> bool:
    """Whether a decoded answer is a whole chat completion: each choice says something, and none that it went wrong."""
    choices = body.get("choices") if isinstance(body, dict) and not body.get("error") else None
    return isinstance(choices, list) and bool(choices) and all(_says_something(choice) for choice in choices)


def _says_something(choice: Any) -> bool:
    """An empty text is something: a model may have nothing to say. Reasoning alone is, where it took all tokens there were."""
    if not isinstance(choice, dict) or choice.get("error") or choice.get("finish_reason") == "error":
        return False
    message = choice.get("message")
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("content"), str) or any(message.get(name) for name in _INSTEAD_OF_TEXT)


def read_answer(content: bytes) -> dict[str, Any] | None:
    """A whole chat completion, made safe; None for anything else, however it was meant to break us."""
    try:
        return tidy(msgspec.json.decode(content))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return None


def tidy(answer: Any) -> dict[str, Any] | None:
    """A decoded answer with a `usage` in which numbers are what they should be: counts whole and not below 0, times in seconds.

    What is not, is left out. None where it is no whole completion, or cannot be written as JSON again.
    """
    if not complete(answer):
        return None
    usage = answer.get("usage")
    clean = {**answer, "usage": {}} if "usage" in answer else answer
    for name, value in usage.items() if isinstance(usage, dict) else ():
        if name.endswith("_tokens"):
            fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
        elif name.endswith("_time"):
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_S
        else:
            fits = True
        if fits:
            clean["usage"][name] = value
    try:
        msgspec.json.encode(clean)
    except (msgspec.MsgspecError, OverflowError, RecursionError, ValueError):
        return None
    return clean


def read_error(content: bytes) -> dict[str, Any]:
    """The error object of a body; {} where there is none."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return {}
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}


def failure(status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> Failure:
    """What an HTTP status other than success means."""
    message = str(error.get("message") or f"HTTP {status}")[:2000]
    after = _after(message, headers)
    if status == 429:
        told = _LIMIT.search(message)
        limit = (told[1].lower(), int(told[2])) if told and told[1] in ("RPM", "RPD", "TPM", "TPD") else None
        return Failure("rate_limited", message, "later", _LIMITED_S if after is None else after, limit, overload=True, blocked=True)
    if status in (498, 503):
        return Failure("over_capacity", message, "later", after or 0.0, overload=True, trouble=True)
    if status in (408, 409, 425, 499) or status >= 500:
        return Failure("hosted_error", message, "patience", after or 0.0, overload=status == 408, trouble=status != 409)
    if status == 404:
        return Failure("model_not_found", message, "patience", missing=True)
    return _closed(status, message, error, headers) or _refused(status, message, error)


def _closed(status: int, message: str, error: Mapping[str, Any], headers: Mapping[str, str]) -> Failure | None:
    """What concerns the account or the address, and all calls alike."""
    if status == 401:
        return Failure("hosted_key", f"the service refuses the key: {message}", "later", _BLOCKED_S, trouble=True, blocked=True)
    if error.get("code") == "blocked_api_access":
        return Failure("hosted_blocked", message, "later", _BLOCKED_S, trouble=True, blocked=True)
    if status == 402:
        return Failure("hosted_payment", f"the service wants payment: {message}", "later", _BLOCKED_S, trouble=True, blocked=True)
    if 300 <= status < 400:
        where = headers.get("location", "")[:200] or "elsewhere"
        told = f"the service redirects (HTTP {status}) to {where}, where nothing is sent: correct LORAYARD_HOSTED_URL"
        return Failure("hosted_redirect", told, "final", _BLOCKED_S, trouble=True, blocked=True)
    return None


def _refused(status: int, message: str, error: Mapping[str, Any]) -> Failure:
    """What the job asks for. Some 422s are a model's doing, and come right another time."""
    code = {403: "hosted_forbidden", 413: "request_too_large"}.get(status) or own_code(error.get("code"))
    kept = str(error.get("failed_generation") or "")[:_KEPT]
    return Failure(code, message, "attempt" if status == 422 else "final", failed_generation=kept)


def _after(message: str, headers: Mapping[str, str]) -> float | None:
    told = headers.get("retry-after")
    after = seconds(told, headers.get("date", "")) if told else None
    if after is None and (again := _AGAIN.search(message)):
        after = seconds(again[1])
    return None if after is None else min(after, _MOST_WAIT_S)


def broken(code: str, message: str) -> Failure:
    """No whole answer came: a connection lost, a time-out, half a body."""
    return Failure(code, message, "patience", overload=code == "timeout", trouble=True, unknown=True)


def document(failure: Failure) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if failure.how == "final" else "server_error"
    return {"message": failure.message, "type": kind, "code": failure.code, "param": None}
