"""A stand-in for Groq: a real HTTP server that behaves as its documentation says, with faults on demand. It answers with what it was asked.

    python tests/hosted_service.py PORT ['{"rpm": 100, ...}']     fields of `Service`; GET /_state tells, POST /_set changes them

Nothing here was compared with the live service; what is known of it, and how surely, stands beside each part.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from hosted_files import batches, files, one_batch, one_file, one_tuning, tunings
from hosted_state import BASE, KEY, Service, bad_body, completion, distorted, error, tokens_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

__all__ = ["BASE", "KEY", "Running", "Service", "serving"]
MINUTE = 60.0


# -- chat completions ----------------------------------------------------------------------------------------------------------------------


def used(service: Service) -> tuple[int, float]:
    while service.window and service.window[0][0] < time.monotonic() - MINUTE:
        service.window_tokens -= service.window.popleft()[1]
    return len(service.window), service.window_tokens


def limited(service: Service, scope: str, limit: int, have: float, want: int, again_s: float) -> JSONResponse:
    """As several logs show: the scope stands only in the message, and retry-after may have a fraction."""
    kind = "tokens" if scope.startswith("T") else "requests"
    words = {"RPM": "requests per minute", "TPM": "tokens per minute", "RPD": "requests per day"}[scope]
    message = (
        f"Rate limit reached for model `{BASE}` in organization `org_x` service tier `on_demand` on {words} ({scope}): Limit {limit}, "
        f"Used {have:.0f}, Requested {want}. Please try again in {again_s:.3f}s."
    )
    return error(429, message, kind, {"retry-after": f"{again_s:.2f}"}, code="rate_limit_exceeded")


def over_limits(service: Service, want: int) -> JSONResponse | None:
    requests, tokens = used(service)
    now = time.monotonic()
    if service.tpm and want > service.tpm:
        message = f"Request too large for model `{BASE}` on tokens per minute (TPM): Limit {service.tpm}, Requested {want}"
        return error(413, message, "tokens", code="rate_limit_exceeded")
    if service.rpd and service.day_requests >= service.rpd:
        return limited(service, "RPD", service.rpd, service.day_requests, 1, 86400 / service.rpd)
    if service.rpm and requests >= service.rpm:
        return limited(service, "RPM", service.rpm, requests, 1, service.window[0][0] + MINUTE - now)
    if service.tpm and tokens + want > service.tpm:
        free, at = tokens, now
        for entry in service.window:
            free, at = free - entry[1], entry[0]
            if free + want <= service.tpm:
                break
        return limited(service, "TPM", service.tpm, tokens, want, at + MINUTE - now)
    return None


def limit_headers(service: Service) -> dict[str, str]:
    """Requests are the day's, tokens the minute's; of a limit that is not there nothing is said."""
    _, tokens = used(service)
    headers: dict[str, str] = {}
    if service.tpm:
        headers |= {"x-ratelimit-limit-tokens": str(service.tpm), "x-ratelimit-remaining-tokens": str(max(0, int(service.tpm - tokens)))}
        headers |= {"x-ratelimit-reset-tokens": f"{tokens * MINUTE / service.tpm:.3f}s"}
    if service.rpd:
        left = service.rpd - service.day_requests
        headers |= {"x-ratelimit-limit-requests": str(service.rpd), "x-ratelimit-remaining-requests": str(left)}
        headers |= {"x-ratelimit-reset-requests": "2m59.56s"}
    return headers


def fault(service: Service, kind: str) -> JSONResponse | None:
    if kind == "429":
        return error(429, "Too many requests. Please try again in 0.250s.", "requests", {"retry-after": "0.25"}, code="rate_limit_exceeded")
    if kind == "json":
        return error(400, "Failed to generate JSON. …", code="json_validate_failed", failed_generation='{"half": ')
    if kind.isdigit():
        said = {"498": "capacity_exceeded", "503": f"{BASE} is currently over capacity. Please try again and back off exponentially."}
        headers = {"retry-after": service.retry_after} if service.retry_after and kind in said else None
        code = said.get(kind) if kind == "498" else None
        return error(int(kind), said.get(kind, f"fault {kind}"), "internal_server_error", headers, code=code)
    return None


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await request.json()
    service.bodies.append(body)
    kind = _draw(service)
    prompt, most = tokens_of(body) if body.get("messages") else (0, 0)
    if body.get("model") in service.broken_models:
        kind = "500"
    reply = (fault(service, kind) if kind else None) or bad_body(service, body) or over_limits(service, prompt + most)
    service.calls[kind or str(reply.status_code if reply else 200)] += 1
    row = [time.monotonic() - service.started, float(reply.status_code if reply else 200), float(prompt + most)]
    service.log.append(row)
    if reply:
        return reply
    entry = [time.monotonic(), float(prompt + most)]
    service.window.append(entry)
    service.window_tokens += entry[1]
    service.day_requests += 1
    service.under_way += 1
    service.most_under_way = max(service.most_under_way, service.under_way)
    try:
        await asyncio.sleep(service.hang_s if kind == "timeout" else service.service_s)
    finally:
        service.under_way -= 1
    answer = completion(service, body)
    used(service)
    if service.window and entry[0] >= service.window[0][0]:
        service.window_tokens += answer["usage"]["total_tokens"] - entry[1]
    entry[1] = row[2] = answer["usage"]["total_tokens"]
    if kind in ("reset", "truncated", "garbage", "drip"):
        return Fault(kind, json.dumps(answer).encode(), service.hang_s)
    if not await request.is_disconnected():  # who has given up gets no answer
        service.answered[str(body["messages"][-1]["content"])] += 1
    if service.raw:
        return Response(service.raw, media_type="application/json")
    return Response(json.dumps(distorted(service, answer)), media_type="application/json", headers=limit_headers(service))


def _draw(service: Service) -> str:
    if service.next_faults:
        return service.next_faults.pop(0)
    at = service.random.random()
    for kind, probability in service.faults.items():
        at -= probability
        if at < 0:
            return kind
    return ""


class Fault(Response):
    """An answer that does not arrive whole."""

    def __init__(self, kind: str, body: bytes, hang_s: float) -> None:
        super().__init__(body, media_type="application/json")
        self.kind, self.hang_s = kind, hang_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport = scope["transport"]()
        if self.kind == "reset":
            transport.abort()
            return
        half = self.body[: len(self.body) // 2]
        if self.kind == "garbage":  # a whole answer of half a document
            await Response(half, media_type="application/json")(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if self.kind == "drip":  # a byte at a time, each in time
            for n in range(min(len(half), int(self.hang_s / 0.05))):
                await send({"type": "http.response.body", "body": half[n : n + 1], "more_body": True})
                await asyncio.sleep(0.05)
            transport.close()
            return
        await send({"type": "http.response.body", "body": half, "more_body": True})
        transport.close()


# -- the server ----------------------------------------------------------------------------------------------------------------------------


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    ids = [BASE, *(t["data"]["fine_tuned_model"] for t in service.tunings.values())]
    return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "x"} for model in ids]})


async def told(request: Request) -> Response:
    service: Service = request.app.state.service
    names = ("calls", "answered", "paid", "made", "under_way", "most_under_way", "log", "files", "tunings")
    return JSONResponse({name: getattr(service, name) for name in names})


async def change(request: Request) -> Response:
    for name, value in (await request.json()).items():
        setattr(request.app.state.service, name, value)
    return JSONResponse({})


def make_app(service: Service) -> Any:
    v1 = "/openai/v1"
    app = Starlette(
        routes=[
            Route(f"{v1}/chat/completions", chat, methods=["POST"]),
            Route(f"{v1}/models", models),
            Route(f"{v1}/files", files, methods=["GET", "POST"]),
            Route(f"{v1}/files/{{id}}", one_file, methods=["GET", "DELETE"]),
            Route(f"{v1}/files/{{id}}/content", one_file),
            Route(f"{v1}/batches", batches, methods=["GET", "POST"]),
            Route(f"{v1}/batches/{{id}}", one_batch),
            Route(f"{v1}/batches/{{id}}/cancel", one_batch, methods=["POST"]),
            Route("/v1/fine_tunings", tunings, methods=["GET", "POST"]),  # not under /openai
            Route("/v1/fine_tunings/{id}", one_tuning, methods=["GET", "DELETE"]),
            Route("/moved/{rest:path}", lambda _: RedirectResponse("https://login.example/")),
            Route("/_state", told),
            Route("/_set", change, methods=["POST"]),
        ]
    )
    app.state.service = service

    async def keyed(scope: Scope, receive: Receive, send: Send) -> None:
        """Nobody without the key; and the connection at hand for who wants to break it."""
        if scope["type"] == "http":
            scope["transport"] = lambda: send.__self__.transport  # type: ignore[attr-defined]
            key = dict(scope["headers"]).get(b"authorization", b"").decode()
            if key != f"Bearer {KEY}" and not scope["path"].startswith("/_"):
                await error(401, "Invalid API Key", code="invalid_api_key")(scope, receive, send)
                return
        await app(scope, receive, send)

    return keyed


class Running:
    """A service in a thread; `url` is its OpenAI base."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/openai/v1"


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Running]:
    service = Service(**options)
    listener = _listener(0)
    server = uvicorn.Server(_config(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(service, listener.getsockname()[1])
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


def _listener(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it only for sockets that name their protocol
    return listener


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service),
        log_level="critical",
        access_log=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,  # as a service's front does, rather than uvicorn's 5 s
        backlog=2048,
    )


def main() -> None:
    service = Service(**json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    listener = _listener(int(sys.argv[1]))
    uvicorn.Server(_config(service)).run(sockets=[listener])


if __name__ == "__main__":
    main()
