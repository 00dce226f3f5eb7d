"""Jobs for `/v1/embeddings`: computed by the bare base in a context of their own, one text between two decode steps of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorayard.errors import BadRequest, LorayardError
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Batch, Context
from lorayard_workers.llama.requests import EmbeddingRequest, embedding_response
from lorayard_workers.llama.sequence import now_ms
from lorayard_workers.runner import Event, Outcome, Started, WorkItem


@dataclass
class EmbeddingJob:
    """A request that waits, or is being computed."""

    batch: str
    item: WorkItem
    request: EmbeddingRequest
    received_ms: float
    started_ms: float = 0.0
    vectors: list[NDArray[np.float32]] = field(default_factory=list)

    @classmethod
    def of(cls, batch: str, digest: str | None, item: WorkItem, request: EmbeddingRequest) -> EmbeddingJob:
        """Raises `BadRequest` for an adapter: a mean of hidden states is no thing that one was trained for."""
        if digest is not None:
            raise BadRequest("embeddings are computed by the base model: leave the adapter out", param="adapter")
        return cls(batch, item, request, now_ms())


class Embedder:
    """The jobs that wait, in order, and the context, made when it is first needed."""

    def __init__(self, model: Model, emit: Callable[[Event], None], *, longest: int) -> None:
        self._model = model
        self._emit = emit
        self._longest = longest
        self._waiting: deque[EmbeddingJob] = deque()
        self._context: Context | None = None
        self._batch: Batch | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, jobs: list[EmbeddingJob]) -> None:
        self._waiting.extend(jobs)

    def forget(self, batch: str, refs: set[str]) -> None:
        self._waiting = deque(job for job in self._waiting if job.batch != batch or job.item.ref not in refs)

    def step(self) -> bool:
        """Compute the next text. False if there is none."""
        if not self._waiting:
            return False
        job = self._waiting[0]
        if not job.vectors:
            job.started_ms = now_ms()
            self._emit(Started(job.batch, [job.item.ref]))
        try:
            job.vectors.append(self._compute(job.request.texts[len(job.vectors)]))
        except LorayardError as error:
            self._end(Outcome(job.batch, job.item.ref, error=error.document(), retryable=True))
            return True
        if len(job.vectors) == len(job.request.texts):
            timings = {"on_deck": job.started_ms - job.received_ms, "adapter_load": 0.0, "adapter_switch": 0.0}
            timings |= {"prefill": now_ms() - job.started_ms, "decode": 0.0}
            document = embedding_response(job.request, job.vectors)
            self._end(Outcome(job.batch, job.item.ref, document, timings_ms=timings, temperature="hot"))
        return True

    def _end(self, outcome: Outcome) -> None:
        self._waiting.popleft()
        self._emit(outcome)

    def _compute(self, tokens: list[int]) -> NDArray[np.float32]:
        if self._context is None or self._batch is None:
            at_once = Context.EMBEDDED
            self._batch = Batch(at_once)
            self._context = Context(self._model, n_ctx=self._longest, n_seq_max=1, n_batch=at_once, embeddings=True)
        return self._context.embed(tokens, self._batch)

    def close(self) -> None:
        self._waiting.clear()
        if self._context is not None:
            self._context.close()
        if self._batch is not None:
            self._batch.free()
