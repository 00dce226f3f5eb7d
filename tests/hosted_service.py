"""A stand-in for Groq: a real HTTP server that behaves as its documentation says, with faults on demand. It answers with what it was asked.

    python tests/hosted_service.py PORT ['{"rpm": 100, ...}']     fields of `Service`; GET /_state tells, POST /_set changes them

Nothing here was compared with the live service; what is known of it, and how surely, stands beside each part.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import random
import socket
import sys
import threading
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from safetensors.numpy import load
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

BASE = "llama-3.1-8b-instant"
KEY = "gsk_test"
RANKS = (8, 16, 32, 64)
REFUSED = ("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "metadata", "store", "top_k", "min_p")
MINUTE = 60.0


@dataclass
class Service:
    """`faults` is kind -> probability a call; `next_faults` come first, one a call. Kinds: 429, 498, 499, 500, 502, 503, timeout, reset,
    truncated, garbage, json (400 with failed_generation)."""

    rpm: int = 0
    tpm: int = 0
    rpd: int = 0
    service_s: float = 0.0
    answer_tokens: int = 0  # 0: half of what was asked for
    hang_s: float = 30.0
    hosting: bool = True  # an enterprise, which may register adapters
    batch_s: float = 0.2
    expire_after: int = -1  # lines of a batch that are run before its window ends; -1: all
    fail_lines: tuple[str, ...] = ()  # of a batch: those whose text contains one of these fail
    refuse_batch: bool = False
    errors_as_array: bool = False
    seed: int = 1
    faults: dict[str, float] = field(default_factory=dict)
    next_faults: list[str] = field(default_factory=list)
    slow_creates_s: float = 0.0  # what is created is there so long before the answer goes out

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.files: dict[str, dict[str, Any]] = {}
        self.content: dict[str, bytes] = {}
        self.tunings: dict[str, dict[str, Any]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.window: deque[list[float]] = deque()  # [time, tokens] of calls let in
        self.started = time.monotonic()
        self.day_requests = 0
        self.calls: Counter[str] = Counter()  # by status or fault
        self.answered: Counter[str] = Counter()  # by the last message: complete answers that were sent
        self.paid: Counter[str] = Counter()  # by custom_id: lines of batches that were run
        self.made: Counter[str] = Counter()  # by name: files and fine-tunings that were ever created
        self.log: list[list[float]] = []  # [seconds, status, tokens] of each call
        self.under_way = self.most_under_way = 0
        self.bodies: deque[dict[str, Any]] = deque(maxlen=100)
        self._ids = itertools.count(1)

    def new_id(self, kind: str) -> str:
        return f"{kind}_{next(self._ids):06d}"


def error(
    status: int, message: str, kind: str = "invalid_request_error", headers: dict[str, str] | None = None, **more: Any
) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, **more}}, status, headers)


def unknown(what: str) -> JSONResponse:
    return error(404, f"{what} not found", code="not_found")


# -- chat completions ----------------------------------------------------------------------------------------------------------------------


def tokens_of(body: dict[str, Any]) -> tuple[int, int]:
    """Of the prompt, and of the answer at most."""
    return len(json.dumps(body["messages"])) // 4, int(body.get("max_completion_tokens") or body.get("max_tokens") or 1024)


def used(service: Service) -> tuple[int, float]:
    while service.window and service.window[0][0] < time.monotonic() - MINUTE:
        service.window.popleft()
    return len(service.window), sum(entry[1] for entry in service.window)


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


def bad_body(service: Service, body: dict[str, Any]) -> JSONResponse | None:
    if not body.get("messages"):
        return error(400, "'messages' : property is required")
    for name in REFUSED:
        if body.get(name) is not None:
            return error(400, f"property '{name}' is unsupported")
    if body.get("n", 1) != 1:
        return error(400, "'n' : must be 1")
    model = body.get("model")
    if model != BASE and model not in {t["data"]["fine_tuned_model"] for t in service.tunings.values()}:
        return error(404, f"The model `{model}` does not exist or you do not have access to it.", code="model_not_found")
    return None


def completion(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    prompt, most = tokens_of(body)
    made = min(most, service.answer_tokens or max(1, most // 2))
    text = f"{body['model']} says: {body['messages'][-1]['content']}"
    usage = {"queue_time": 0.003, "prompt_tokens": prompt, "prompt_time": 0.001, "completion_tokens": made, "completion_time": 0.004}
    return {
        "id": service.new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": "stop"}],
        "usage": usage | {"total_tokens": prompt + made, "total_time": 0.005},
        "system_fingerprint": "fp_1",
        "service_tier": "on_demand",
        "x_groq": {"id": service.new_id("req")},
    }


def fault(service: Service, kind: str) -> JSONResponse | None:
    if kind == "429":
        return error(429, "Too many requests. Please try again in 0.250s.", "requests", {"retry-after": "0.25"}, code="rate_limit_exceeded")
    if kind == "json":
        return error(400, "Failed to generate JSON. …", code="json_validate_failed", failed_generation='{"half": ')
    if kind.isdigit():
        said = {"498": "capacity_exceeded", "503": f"{BASE} is currently over capacity. Please try again and back off exponentially."}
        return error(int(kind), said.get(kind, f"fault {kind}"), "internal_server_error", code=said.get(kind) if kind == "498" else None)
    return None


async def chat(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await request.json()
    service.bodies.append(body)
    kind = _draw(service)
    prompt, most = tokens_of(body) if body.get("messages") else (0, 0)
    reply = (fault(service, kind) if kind else None) or bad_body(service, body) or over_limits(service, prompt + most)
    service.calls[kind or str(reply.status_code if reply else 200)] += 1
    row = [time.monotonic() - service.started, float(reply.status_code if reply else 200), float(prompt + most)]
    service.log.append(row)
    if reply:
        return reply
    entry = [time.monotonic(), float(prompt + most)]
    service.window.append(entry)
    service.day_requests += 1
    service.under_way += 1
    service.most_under_way = max(service.most_under_way, service.under_way)
    try:
        await asyncio.sleep(service.hang_s if kind == "timeout" else service.service_s)
    finally:
        service.under_way -= 1
    answer = completion(service, body)
    entry[1] = row[2] = answer["usage"]["total_tokens"]
    if kind in ("reset", "truncated", "garbage"):
        return Fault(kind, json.dumps(answer).encode())
    if not await request.is_disconnected():  # who has given up gets no answer
        service.answered[str(body["messages"][-1]["content"])] += 1
    return JSONResponse(answer, headers=limit_headers(service))


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

    def __init__(self, kind: str, body: bytes) -> None:
        super().__init__(body, media_type="application/json")
        self.kind = kind

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
        await send({"type": "http.response.body", "body": half, "more_body": True})
        transport.close()


# -- files and fine-tunings ----------------------------------------------------------------------------------------------------------------


def add_file(service: Service, name: str, purpose: str, data: bytes) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": service.new_id("file"),
        "object": "file",
        "bytes": len(data),
        "created_at": int(time.time()),
        "filename": name,
    }
    made["purpose"] = purpose
    service.files[made["id"]] = made
    service.content[made["id"]] = data
    service.made[name] += 1
    return made


async def files(request: Request) -> Response:
    service: Service = request.app.state.service
    if request.method == "GET":
        purpose = request.query_params.get("purpose")
        rows = [f for f in service.files.values() if purpose in (None, f["purpose"])]
        after = request.query_params.get("after")
        ids = [f["id"] for f in rows]
        rows = rows[ids.index(after) + 1 :] if after in ids else rows
        return JSONResponse({"object": "list", "data": rows[:100], "has_more": len(rows) > 100})
    async with request.form(max_files=1, max_fields=8) as form:
        upload, purpose = form.get("file"), str(form.get("purpose"))
        if upload is None or isinstance(upload, str):
            return error(400, "file: is required")
        made = add_file(service, upload.filename or "", purpose, await upload.read())
    await asyncio.sleep(service.slow_creates_s)
    return JSONResponse(made)


async def one_file(request: Request) -> Response:
    service: Service = request.app.state.service
    found = service.files.get(request.path_params["id"])
    if found is None:
        return unknown("file")
    if request.url.path.endswith("/content"):
        return Response(service.content[found["id"]], media_type="application/octet-stream")
    if request.method == "DELETE":
        del service.files[found["id"]], service.content[found["id"]]
        return JSONResponse({"id": found["id"], "object": "file", "deleted": True})
    return JSONResponse(found)


def bad_package(data: bytes) -> str | None:
    """The rules of the LoRA page: two files, float16, one of four ranks."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sorted(archive.namelist()) != ["adapter_config.json", "adapter_model.safetensors"]:
                return "the archive must have exactly two files"
            config = json.loads(archive.read("adapter_config.json"))
            tensors = load(archive.read("adapter_model.safetensors"))
    except (zipfile.BadZipFile, ValueError) as wrong:
        return f"not an adapter: {wrong}"
    if config.get("r") not in RANKS or not isinstance(config.get("lora_alpha"), int | float):
        return f"r must be one of {RANKS} and lora_alpha a number"
    ranks = {t.shape[0] if ".lora_A." in name else t.shape[1] for name, t in tensors.items()}
    if {t.dtype for t in tensors.values()} != {np.dtype(np.float16)} or ranks != {config["r"]}:
        return "tensors must be float16 and of rank r"
    return None


async def tunings(request: Request) -> Response:
    service: Service = request.app.state.service
    if not service.hosting:
        return error(403, "This organization does not have access to fine tuning.", code="permission_denied")
    if request.method == "GET":
        return JSONResponse({"object": "list", "data": [t["data"] | {"id": t["id"]} for t in service.tunings.values()]})
    body = await request.json()
    data = service.content.get(body.get("input_file_id", ""))
    if data is None:
        return error(400, "input_file_id: no such file")
    if wrong := bad_package(data):
        return error(400, wrong)
    if body.get("base_model") != BASE or body.get("type") != "lora":
        return error(400, f"base_model must be {BASE}")
    made_id = service.new_id("ft")
    model = f"ft:{BASE}:org_x/{body['name']}-{made_id}"
    data_part = body | {"fine_tuned_model": model, "created_at": int(time.time())}
    service.tunings[made_id] = {"id": made_id, "object": "fine_tuning", "data": data_part}
    service.made[body["name"]] += 1
    await asyncio.sleep(service.slow_creates_s)
    return JSONResponse(service.tunings[made_id])


async def one_tuning(request: Request) -> Response:
    service: Service = request.app.state.service
    found = service.tunings.get(request.path_params["id"])
    if found is None:
        return unknown("fine tuning")
    if request.method == "DELETE":
        del service.tunings[found["id"]]
        return JSONResponse({"id": found["id"], "object": "fine_tuning", "deleted": True})
    return JSONResponse(found)


# -- batches -------------------------------------------------------------------------------------------------------------------------------


async def batches(request: Request) -> Response:
    service: Service = request.app.state.service
    if request.method == "GET":
        rows = list(service.batches.values())
        start = int(request.query_params.get("cursor") or 0)
        more = start + 20 < len(rows)
        page = [progress(service, row) for row in rows[start : start + 20]]
        return JSONResponse({"object": "list", "data": page, "paging": {"next_cursor": str(start + 20) if more else None}})
    body = await request.json()
    if body.get("endpoint") != "/v1/chat/completions" or body.get("input_file_id") not in service.files:
        return error(400, "endpoint or input_file_id is wrong")
    made: dict[str, Any] = {
        "id": service.new_id("batch"),
        "object": "batch",
        "endpoint": body["endpoint"],
        "input_file_id": body["input_file_id"],
        "completion_window": body["completion_window"],
        "status": "validating",
        "created_at": int(time.time()),
        "metadata": body.get("metadata"),
        "errors": None,
        "output_file_id": None,
        "error_file_id": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
    }
    made["_at"] = time.monotonic()
    service.batches[made["id"]] = made
    await asyncio.sleep(service.slow_creates_s)
    return JSONResponse(shown(made))


def shown(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.startswith("_")}


def progress(service: Service, batch: dict[str, Any]) -> dict[str, Any]:
    """As far as it is by now."""
    passed = time.monotonic() - batch["_at"]
    if batch["status"] in ("completed", "failed", "expired", "cancelled"):
        return shown(batch)
    if batch["status"] == "cancelling":
        batch["status"] = "cancelled"
    elif service.refuse_batch:
        errors = [{"code": "invalid_line", "line": 1, "message": "a line is not valid"}]
        batch |= {"status": "failed", "errors": errors if service.errors_as_array else {"object": "list", "data": errors}}
    elif passed < service.batch_s / 2:
        batch["status"] = "validating"
    elif passed < service.batch_s:
        batch["status"] = "in_progress"
    else:
        run_lines(service, batch)
    return shown(batch)


def run_lines(service: Service, batch: dict[str, Any]) -> None:
    """Each line once; output in no order, what failed in a file of its own."""
    lines = [json.loads(line) for line in service.content[batch["input_file_id"]].splitlines() if line.strip()]
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        text = str(line["body"]["messages"][-1]["content"])
        if 0 <= service.expire_after <= n:
            expired = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}
            bad.append({"id": service.new_id("batch_req"), "custom_id": line["custom_id"], "response": None, "error": expired})
            continue
        service.paid[line["custom_id"]] += 1
        wrong = bad_body(service, line["body"])
        if wrong is None and any(word in text for word in service.fail_lines):
            wrong = error(400, "Failed to generate JSON. …", code="json_validate_failed", failed_generation='{"half": ')
        status = wrong.status_code if wrong else 200
        answer = json.loads(bytes(wrong.body)) if wrong else completion(service, line["body"])
        row = {"id": service.new_id("batch_req"), "custom_id": line["custom_id"], "error": None}
        row["response"] = {"status_code": status, "request_id": service.new_id("req"), "body": answer}
        (bad if wrong else good).append(row)
    service.random.shuffle(good)
    for name, rows in (("output_file_id", good), ("error_file_id", bad)):
        if rows:
            data = "\n".join(map(json.dumps, rows)).encode()
            batch[name] = add_file(service, f"{batch['id']}_{name}.jsonl", "batch_output", data)["id"]
    batch["status"] = "expired" if service.expire_after >= 0 else "completed"
    batch["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}


async def one_batch(request: Request) -> Response:
    service: Service = request.app.state.service
    found = service.batches.get(request.path_params["id"])
    if found is None:
        return unknown("batch")
    if request.url.path.endswith("/cancel"):
        if found["status"] in ("validating", "in_progress"):
            found["status"] = "cancelling"
        return JSONResponse(shown(found))
    return JSONResponse(progress(service, found))


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
                await error(401, "Invalid API Key", code="invalid_api_key")(scope, receive, _quiet(send))
                return
        await app(scope, receive, send)

    return keyed


def _quiet(send: Send) -> Send:
    async def pass_on(message: Message) -> None:
        await send(message)

    return pass_on


class Running:
    """A service in a thread; `url` is its OpenAI base."""

    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/openai/v1"


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Running]:
    service = Service(**options)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
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


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service), log_level="critical", access_log=False, ws="none", lifespan="off", timeout_graceful_shutdown=1, backlog=2048
    )


def main() -> None:
    service = Service(**json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=2048)
    uvicorn.Server(_config(service)).run(sockets=[listener])


if __name__ == "__main__":
    main()
