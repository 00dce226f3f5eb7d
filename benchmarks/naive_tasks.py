"""A Celery task as people write it: one `Llama` in the worker, made again whenever the next job wants another adapter."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from llama_cpp import Llama

_URL = os.environ.get("NAIVE_URL", "memory://")
app = Celery("naive", broker=_URL, backend=_URL if _URL != "memory://" else None)

_held: tuple[str, Llama] | None = None


@app.task  # type: ignore[untyped-decorator]
def infer(adapter: str, endpoint: str, request: dict[str, Any]) -> Any:
    """Answer one OpenAI request with this adapter (a GGUF file)."""
    global _held
    if _held is None or _held[0] != adapter:
        _held = None
        threads = int(os.environ["NAIVE_THREADS"])
        _held = (
            adapter,
            Llama(os.environ["NAIVE_MODEL"], lora_path=adapter, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False),
        )
    llama = _held[1]
    return llama.create_completion(**request) if "prompt" in request else llama.create_chat_completion(**request)
