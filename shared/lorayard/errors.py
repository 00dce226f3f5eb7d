"""Every error that a user can meet, as one tree; each says what to do, and knows its HTTP status and OpenAI's error type.

LorayardError
├── BadRequest            400  the request itself is wrong; sending it again changes nothing
│   ├── AdapterRejected   400  an adapter's files are broken, unsafe or made for another base
│   └── PromptTooLong     400  more tokens than the model's context holds
├── Unauthorized          401
├── Forbidden             403  a valid key that may not do this
├── NotFound              404  no such job, adapter or pool, or another tenant's
├── Conflict              409  the same idempotency key or id with another body
├── TooLarge              413
├── DeadlineUnmet         422  it would probably end too late, and asked to be refused then
├── Unavailable           503  try again later (`retry_after` seconds)
└── SetupError                 this machine or its settings: commands end with exit code 2 and this one line
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LorayardError(Exception):
    """`message` is for people, `code` for programs, `param` names the field at fault."""

    status = 500
    type = "server_error"
    code = "internal_error"
    answers: Sequence[dict[str, Any]] = ()
    """Of `Client.submit`: what is known of each job."""

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param

    def document(self) -> dict[str, Any]:
        """The object under `error` in OpenAI's error shape."""
        return {"message": self.message, "type": self.type, "code": self.code, "param": self.param}


class BadRequest(LorayardError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class AdapterRejected(BadRequest):
    code = "adapter_rejected"


class PromptTooLong(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(LorayardError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(LorayardError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(LorayardError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(LorayardError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class TooLarge(LorayardError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class DeadlineUnmet(LorayardError):
    """`eta` is the quote that it was refused for."""

    status = 422
    type = "invalid_request_error"
    code = "deadline_unmet"

    def __init__(self, message: str, *, param: str | None = None, eta: dict[str, Any] | None = None) -> None:
        super().__init__(message, param=param)
        self.eta = eta

    def document(self) -> dict[str, Any]:
        return super().document() | {"eta": self.eta}


class Unavailable(LorayardError):
    status = 503
    type = "server_error"
    code = "unavailable"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, retry_after: float = 5.0) -> None:
        super().__init__(message, code=code, param=param)
        self.retry_after = retry_after


class SetupError(LorayardError):
    code = "setup"
