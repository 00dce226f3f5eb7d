"""What the stand-in for Groq knows and remembers (`hosted_service.py`), and what is the same however a completion is asked for."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

BASE = "llama-3.1-8b-instant"
KEY = "gsk_test"
REFUSED = ("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "metadata", "store", "top_k", "min_p")


@dataclass
class Service:
    """`faults` is kind -> probability a call; `next_faults` come first, one a call. Kinds: 429, 498, 499, 500, 502, 503, timeout, reset,
    truncated, drip, garbage, json (400 with failed_generation)."""

    rpm: int = 0
    tpm: int = 0
    rpd: int = 0
    service_s: float = 0.0
    answer_tokens: int = 0  # 0: half of what was asked for
    hang_s: float = 30.0
    hosting: bool = True  # an enterprise, which may register adapters
    batch_s: float = 0.2
    expire_after: int = -1  # lines of a batch that are run before its window ends; -1: all
    retry_after: str = ""  # what a 498 or 503 says
    usage: dict[str, Any] | str | None = None  # instead of what is right, or beside it
    raw: str = ""  # instead of an answer
    broken_models: tuple[str, ...] = ()  # each call of such a one is answered with 500
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
        self.window_tokens = 0.0
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


def tokens_of(body: dict[str, Any]) -> tuple[int, int]:
    """Of the prompt, and of the answer at most."""
    return len(json.dumps(body["messages"])) // 4, int(body.get("max_completion_tokens") or body.get("max_tokens") or 1024)


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


def distorted(service: Service, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with the usage that a test wants it to have."""
    if service.usage is None:
        return answer
    return answer | {"usage": answer["usage"] | service.usage if isinstance(service.usage, dict) else service.usage}
