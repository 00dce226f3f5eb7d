"""Jobs for `/v1/embeddings`: by the bare base in a context of their own, a part of a text between two decode steps of the others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lorayard.errors import BadRequest, LorayardError
from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Batch, Context
from lorayard_workers.llama.requests import EmbeddingRequest, embedding_response
from lorayard_workers.llama.sequence import now_ms
from lorayard_workers.runner import Event, Outcome, Started, WorkItem

_PART = 64  # tokens that one call computes: each costs a row of logits that nobody reads, and all others wait for the call


@dataclass
class EmbeddingJob:
    """A request that waits, or is being computed: of its text number `len(vectors)` the first `computed` tokens are, and `total` is the sum
    of their last hidden states (n_embd,)."""

    batch: str
    item: WorkItem
    request: EmbeddingRequest
    received_ms: float
    started_ms: float | None = None
    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    computed: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    @classmethod
    def of(cls, batch: str, digest: str | None, item: WorkItem, request: EmbeddingRequest) -> EmbeddingJob:
        """Raises `BadRequest` for an adapter: a mean of hidden states is no thing that one was trained for."""
        if digest is not None:
            raise BadRequest("embeddings are computed by the base model: leave the adapter out", param="adapter")
        return cls(batch, item, request, now_ms())


class Embedder:
    """The jobs that wait, in order, one at a time computed, and the context, made when it is first needed."""

    def __init__(self, model: Model, settings: Settings, emit: Callable[[Event], None], *, longest: int) -> None:
        self._model = model
        self._settings = settings
        self._emit = emit
        self._longest = longest
        self._waiting: deque[EmbeddingJob] = deque()
        self._context: Context | None = None
        self._batch: Batch | None = None
        self.held_ms = math.inf
        """When the job arrived that waits for other company: what came after it must not go on starting before it."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def companies(self) -> list[int]:
        """The `company` of the job that is being computed; nothing where none is."""
        return [job.item.company for job in islice(self._waiting, 1) if job.started_ms is not None]

    def add(self, jobs: list[EmbeddingJob]) -> None:
        self._waiting.extend(jobs)

    def forget(self, batch: str, refs: set[str]) -> None:
        self.held_ms = math.inf
        self._waiting = deque(job for job in self._waiting if job.batch != batch or job.item.ref not in refs)

    def step(self, company: Callable[[EmbeddingJob], bool]) -> bool:
        """Compute a part of a text. `company`: whether a job may begin beside what runs. False if there is nothing to compute yet."""
        self.held_ms = math.inf
        if not self._waiting:
            return False
        job = self._waiting[0]
        if job.started_ms is None:
            if not company(job):
                self.held_ms = job.received_ms
                return False
            job.started_ms = now_ms()
            self._emit(Started(job.batch, [job.item.ref]))
        try:
            self._compute(job)
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

    def _compute(self, job: EmbeddingJob) -> None:
        """The next part. A text's embedding is the mean of its tokens' last hidden states, scaled to length 1."""
        context, batch = self._made()
        tokens = job.request.texts[len(job.vectors)]
        part = tokens[job.computed : job.computed + _PART]
        job.total = job.total + context.embed(job.computed, part, batch)
        job.computed += len(part)
        if job.computed == len(tokens):
            job.vectors.append((job.total / max(float(np.linalg.norm(job.total)), 1e-12)).astype(np.float32))
            job.computed, job.total = 0, np.zeros(1)

    def _made(self) -> tuple[Context, Batch]:
        if self._context is None or self._batch is None:
            s = self._settings
            self._context = Context(
                self._model,
                n_ctx=self._longest,
                n_seq_max=1,
                n_batch=_PART,
                kv_type=s.kv_type,
                flash_attn=s.flash_attn,
                embeddings=True,
            )
            self._batch = Batch(_PART)
        return self._context, self._batch

    def close(self) -> None:
        self._waiting.clear()
        if self._context is not None:
            self._context.close()
        if self._batch is not None:
            self._batch.free()
