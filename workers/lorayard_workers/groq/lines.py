"""A batch's file, line by line: what is sent, and what the lines that come back mean. Pure; lenient in what it reads."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from lorayard.errors import Unavailable
from lorayard.ledger.organisation import NANO
from lorayard.ledger.records import End, EndStatus
from lorayard_workers.groq.answers import PATIENCE, Failure, complete, document, failure, tidy
from lorayard_workers.retries import backoff_ms

_NAMED = re.compile(rb'"custom_id"\s*:\s*"([0-9a-f]{20}-[0-9]{1,9}-[0-9]{1,15})"')
_NUMBER = re.compile(r"[0-9]{1,15}", re.ASCII)
_TIMES = (("remote_queue", "queue_time"), ("prefill", "prompt_time"), ("decode", "completion_time"))


def window(seconds: int) -> str:
    """As the service writes it: 24h, or days."""
    hours = seconds // 3600
    return f"{hours // 24}d" if hours > 24 and hours % 24 == 0 else f"{hours}h"


class Paid(NamedTuple):
    """Whose a line is, by the number of its tenant in its batch (-1: not told), and the nano-dollars that were set aside for it."""

    tenant: int
    nano: int


def line_of(ref: str, body: dict[str, Any], model: str, paid: Paid) -> bytes:
    """The same bytes for the same job, so that a file that is there already can be known. Its name is read again by `paid_of`."""
    name = f"{name_of(ref)}-{paid.tenant}-{paid.nano}"
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"model": model, **body}}
    return msgspec.json.encode(line) + b"\n"


def name_of(ref: str) -> str:
    """What a line's name begins with: the job's own may be another tenant's too, and the service need not know tenants."""
    return hashlib.blake2b(ref.encode(), digest_size=10).hexdigest()


def paid_of(row: dict[str, Any]) -> Paid:
    parts = [*str(row.get("custom_id")).split("-"), "", ""]
    tenant, nano = (int(part) if _NUMBER.fullmatch(part) else -1 for part in parts[1:3])
    return Paid(tenant, max(0, nano))


def rows_of(content: bytes) -> Iterator[dict[str, Any]]:
    """The lines, made safe; of one that cannot be read no more than its name, and nothing where even that cannot."""
    for line in content.splitlines():
        try:
            row = msgspec.json.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            row = {"custom_id": named[1].decode()} if (named := _NAMED.search(line)) else None
        if isinstance(row, dict):
            response = row.get("response")
            if isinstance(response, dict):
                body = response.get("body")
                refused = {"error": body.get("error")} if isinstance(body, dict) else {}
                row["response"] = {**response, "body": tidy(body) or refused}
            yield row


def rows_by_name(contents: Iterable[bytes]) -> dict[str, dict[str, Any]]:
    """The line of each job, of all files of a batch. Of several for one job, an answer, which is paid for, goes before an error."""
    found: dict[str, dict[str, Any]] = {}
    for row in itertools.chain.from_iterable(map(rows_of, contents)):
        name = str(row.get("custom_id")).partition("-")[0]
        if name not in found or (_answers(row) and not _answers(found[name])):
            found[name] = row
    return found


def _answers(row: dict[str, Any]) -> bool:
    return complete(_body(row)) and not _refused(_status(row))


def _status(row: dict[str, Any]) -> Any:
    response = row.get("response")
    return response.get("status_code") if isinstance(response, dict) else None


def _refused(status: Any) -> bool:
    return isinstance(status, int) and status >= 300


def _body(row: dict[str, Any]) -> dict[str, Any]:
    response = row.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    return body if isinstance(body, dict) else {}


def cost_of(row: dict[str, Any], prices: tuple[float, float]) -> int:
    """As of a call: by the service's own count; what was set aside for it where that is not told, or where no whole answer came."""
    if not _answers(row):
        refused = _refused(_status(row)) or (row.get("response") is None and row.get("error"))
        return 0 if refused else paid_of(row).nano
    usage = _body(row).get("usage") or {}
    prompt, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(made, int):
        return paid_of(row).nano
    return round(prompt * prices[0] + made * prices[1])


def end_of(ref: str, row: dict[str, Any], nano: int, model: str, notes: list[str], laters: int = 0, lay_ms: float = 0.0) -> End:
    """What becomes of a job. `notes`: what was changed in its request. `laters`: how often it was put off before. `lay_ms`: how long its
    batch was the service's."""
    body = _body(row)
    if _answers(row):
        usage = body.get("usage") or {}
        timings = {name: 1000 * float(usage.get(told) or 0) for name, told in _TIMES}
        timings["remote_batch"] = max(0.0, lay_ms - sum(timings.values()))
        answer = {key: value for key, value in body.items() if key not in ("id", "model")}
        done: dict[str, Any] = {"response": answer, "error": None, "timings_ms": timings, "hosted_model": model, "cost_usd": nano / NANO}
        done |= {"notes": notes} if notes else {}
        return End(ref, "succeeded", msgspec.json.encode(done), tokens=int(usage.get("total_tokens") or 0), hosted=True)
    why = _why(row, body, _status(row))
    more = {"failed_generation": why.failed_generation} if why.failed_generation else {}
    outcome = msgspec.json.encode({"response": None, "error": document(why), **more})
    if why.how == "final":
        return End(ref, "failed", outcome)
    how: EndStatus = "retry" if why.how == "attempt" or (why.how == "patience" and laters >= PATIENCE) else "later"
    return End(ref, how, outcome, delay_ms=backoff_ms(how, laters))


def _why(row: dict[str, Any], body: dict[str, Any], status: Any) -> Failure:
    error = body.get("error") or row.get("error")
    error = error if isinstance(error, dict) else {}
    if _refused(status):
        return failure(status, error, {})
    message = str(error.get("message") or "the service's line for this job could not be read")[:2000]
    if error.get("code") in ("batch_expired", "batch_cancelled"):
        return Failure("hosted_batch_unfinished", message, "later")
    return Failure("hosted_batch_line", message, "attempt")


def errors_of(batch: dict[str, Any]) -> str:
    """What a failed batch says: a list, or an object with one."""
    errors = batch.get("errors")
    rows = errors.get("data") if isinstance(errors, dict) else errors
    return "; ".join(str(row.get("message")) for row in rows[:3] if isinstance(row, dict)) if isinstance(rows, list) else ""


def error_line(message: str, code: str) -> bytes:
    return msgspec.json.encode({"error": Unavailable(message, code=code).document()})
