"""Jobs for `/v1/embeddings`: computed by the bare base in a context of their own, one job between two decode steps of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lorayard.errors import BadRequest, LorayardError
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Batch, Context
from lorayard_workers.llama.requests import EmbeddingRequest, embedding_response
from lorayard_workers.llama.sequence import now_ms
from lorayard_workers.runner import Event, Outcome, Started, WorkItem


@dataclass(frozen=True)
class EmbeddingJob:
    """A request that waits."""

    batch: str
    item: WorkItem
    request: EmbeddingRequest
    received_ms: float

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
        """Compute the next job, whole. False if there is none. Raises nothing that is the job's own fault."""
        if not self._waiting:
            return False
        job = self._waiting.popleft()
        started = now_ms()
        self._emit(Started(job.batch, [job.item.ref]))
        try:
            document = self._compute(job.request)
        except LorayardError as error:
            self._emit(Outcome(job.batch, job.item.ref, error=error.document(), retryable=True))
            return True
        timings = {"on_deck": started - job.received_ms, "adapter_load": 0.0, "adapter_switch": 0.0}
        timings |= {"prefill": now_ms() - started, "decode": 0.0}
        self._emit(Outcome(job.batch, job.item.ref, document, timings_ms=timings, temperature="hot"))
        return True

    def _compute(self, request: EmbeddingRequest) -> dict[str, object]:
        if self._context is None or self._batch is None:
            self._batch = Batch(Context.EMBEDDED)
            self._context = Context(self._model, n_ctx=self._longest, n_seq_max=Context.EMBEDDED, n_batch=Context.EMBEDDED, embeddings=True)
        context, batch = self._context, self._batch
        return embedding_response(request, [context.embed(tokens, batch) for tokens in request.texts])

    def close(self) -> None:
        self._waiting.clear()
        if self._context is not None:
            self._context.close()
        if self._batch is not None:
            self._batch.free()
