"""Every error code that has to do with hosted services: the one list. `GET /v1/hosted/errors` gives it, docs/groq.md has it as a table.

Beside these, a job may end with a code of the service's own (`json_validate_failed`, say) where it refused what the job asks for.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Where = Literal["submit", "publish", "job"]
_PLAIN = re.compile(r"[a-z][a-z0-9_]{1,63}", re.ASCII)
_KINDS = ("invalid_request_error", "internal_server_error", "server_error", "api_error", "tokens", "requests", "rate_limit_exceeded")
"""What services write for a code and is none: types of errors, and what would be taken for a refusal that passes."""


class Code(NamedTuple):
    """`where` it is told: as the answer to a submit (with its HTTP status), of an adapter that was published, of a job in its document.

    `then`: what becomes of the job, or of the adapter.
    """

    where: tuple[Where, ...]
    means: str
    then: str


_REFUSED = "refused"
_LATER = "put off; no attempt used"
_PATIENCE = "put off; no attempt used the first eight times, then one each time"
_FAILED = "failed"
_AT_HOME = "its jobs keep to local workers"

CODES: dict[str, Code] = {
    "route_unavailable": Code(("submit", "publish"), "this fleet has no hosted model", _REFUSED + " (400)"),
    "endpoint_unavailable": Code(("submit", "job"), "hosted services answer chat completions only", _REFUSED + " (400)"),
    "unsupported_parameter": Code(("submit", "job"), "a field that the service does not take; `param` names it", _REFUSED + " (400)"),
    "hosted_not_allowed": Code(
        ("submit", "publish", "job"),
        "the tenant's data may not leave",
        "refused (403); where leave was withdrawn failed, or kept at home",
    ),
    "budget_exhausted": Code(
        ("submit", "job"), "the day's or the month's money is spent", "refused (403); put off where it was spent meanwhile, no attempt used"
    ),
    "adapter_not_hosted": Code(("submit", "job"), "the adapter is not at the service", "refused (400); failed where it was taken away"),
    "not_published": Code(("publish",), "the adapter was never published", _REFUSED + " (404)"),
    "operator_only": Code(
        ("publish",), "a model's id was given, or everyone's or another tenant's adapter, without the operator's key", _REFUSED + " (403)"
    ),
    "published_otherwise": Code(
        ("publish",), "a model's id was given for content that others have published, or that this fleet brings there", _REFUSED + " (409)"
    ),
    "adapter_rank": Code(("submit", "publish"), "not one rank for all modules, of 8, 16, 32, 64", _AT_HOME),
    "adapter_base_mismatch": Code(("submit", "publish"), "trained on another base than the hosted one", _AT_HOME),
    "adapter_tensors": Code(("submit", "publish"), "numbers that float16 cannot hold", _AT_HOME),
    "adapter_refused_by_host": Code(("submit", "publish"), "the service rejected the file", _AT_HOME),
    "hosted_no_access": Code(("submit", "publish"), "the organisation may not register adapters there", _AT_HOME),
    "hosted_model_missing": Code(("submit", "publish"), "the service lists no model of the id that was given", _AT_HOME),
    "hosted_away": Code(("publish",), "the service does not answer, or with what cannot be read", "tried again"),
    "rate_limited": Code(("job",), "429, or a limit that is known", "put off for as long as the service says; no attempt used"),
    "over_capacity": Code(("job",), "498, 503; or most calls fail at the moment", _LATER),
    "hosted_error": Code(("job",), "408, 409, 425, 499, any other 5xx", _PATIENCE),
    "timeout": Code(("job",), "no answer within `LORAYARD_HOSTED_TIMEOUT_S`", _PATIENCE),
    "connection_lost": Code(("job",), "the connection ended before the answer did", _PATIENCE),
    "bad_answer": Code(("job",), "an answer that is no whole chat completion", _PATIENCE),
    "model_not_found": Code(("job",), "404: the service does not know the model", _PATIENCE + "; the adapter is looked at"),
    "hosted_key": Code(("job", "publish"), "401: the key is refused", "put off, nobody calls for a minute; no attempt used"),
    "hosted_blocked": Code(("job",), "`blocked_api_access`", "put off, nobody calls for a minute; no attempt used"),
    "hosted_payment": Code(("job",), "402: the account wants payment", "put off, nobody calls for a minute; no attempt used"),
    "hosted_redirect": Code(("job",), "3xx: `LORAYARD_HOSTED_URL` is not where the service is", "failed; nobody calls for a minute"),
    "hosted_forbidden": Code(("job",), "403: the key may not use this model", _FAILED),
    "request_too_large": Code(("job",), "413, or more tokens than a whole minute allows", _FAILED),
    "hosted_rejected": Code(("job",), "any other 4xx, where the service gives no code of its own", "failed; at 422 an attempt"),
    "hosted_stuck": Code(("job",), "the worker made no progress and gave its calls up", _LATER),
    "hosted_batch_refused": Code(("job",), "the service refused the batch as a whole", "an attempt"),
    "hosted_batch_unfinished": Code(("job",), "the batch ended (expired, cancelled) before this line was run", _LATER),
    "hosted_batch_line": Code(("job",), "the line for this job is missing or cannot be read", "an attempt"),
    "hosted_batch_lost": Code(("job",), "the service no longer knows the batch", _LATER),
    "hosted_batch_results_lost": Code(("job",), "the service lost the results; they count as paid for", "an attempt"),
    "hosted_batch_stuck": Code(("job",), "nothing could be done with the batch for too long", _LATER),
    "ledger_error": Code(("job",), "the ledger will not reserve for this job", "an attempt"),
    "internal_error": Code(("job",), "a fault of this software: the worker's log has it", "an attempt"),
}


def own_code(told: object) -> str:
    """The service's own code where it is one, else `hosted_rejected`."""
    return told if isinstance(told, str) and _PLAIN.fullmatch(told) and told not in _KINDS else "hosted_rejected"
