"""What all routes share: JSON in and out, who is calling, and every error in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, cast

import msgspec
import redis
import structlog
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Message

from lorayard.errors import BadRequest, LorayardError, NotFound, TooLarge, Unavailable
from lorayard.ledger.connection import unavailable
from lorayard.ledger.registry import Caller, KeyRing

log = structlog.get_logger("lorayard.api")


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


_bearer = Depends(HTTPBearer(auto_error=False))


def _caller(request: Request, credentials: Annotated[Any, _bearer]) -> Caller:
    keys: KeyRing = request.app.state.keys
    return keys.caller(credentials.credentials if credentials else "")


Auth = Annotated[Caller, Depends(_caller)]
"""Whom the request's API key stands for; 401 without a valid one."""


def limited(request: Request, most: int, advice: str) -> Request:
    """The request, whose body is refused (`TooLarge`) by its announced length, or as soon as more than `most` bytes of it have come."""

    def refuse(size: int) -> None:
        if size > most:
            raise TooLarge(f"the body is larger than {most} bytes: {advice}")

    announced = request.headers.get("content-length", "")
    refuse(int(announced) if announced.isdecimal() else 0)
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        refuse(size)
        return message

    return Request(request.scope, receive)


SHORT = 16 * 1024
"""Bytes of a body that has a few short fields."""


def error_response(error: LorayardError, more: dict[str, Any] | None = None) -> Json:
    headers = {"Retry-After": str(max(1, round(error.retry_after)))} if isinstance(error, Unavailable) else None
    return Json({"error": error.document(), **(more or {})}, status_code=error.status, headers=headers)


def handle_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape, whoever raised it."""

    async def ours(_: Request, error: Exception) -> Response:
        return error_response(cast("LorayardError", error))

    async def validation(_: Request, error: Exception) -> Response:
        first = cast("RequestValidationError", error).errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return error_response(BadRequest(f"{where}: {first['msg']}", param=where or None))

    async def http(_: Request, error: Exception) -> Response:
        problem = cast("HTTPException", error)
        ours = NotFound("no such address; the API is under /v1") if problem.status_code == 404 else BadRequest(str(problem.detail))
        ours.status = problem.status_code
        response = error_response(ours)
        response.headers.update(problem.headers or {})
        return response

    async def store(_: Request, error: Exception) -> Response:
        log.warning("the store did not do what a request needed", reason=str(error))
        return error_response(unavailable(cast("redis.RedisError", error)))

    async def unexpected(_: Request, error: Exception) -> Response:
        return error_response(LorayardError("an internal error; the log of the API process has it"))

    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        LorayardError: ours,
        RequestValidationError: validation,
        HTTPException: http,
        redis.RedisError: store,
        Exception: unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
