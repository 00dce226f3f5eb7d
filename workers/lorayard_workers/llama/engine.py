"""The step loop: receive, admit, compose one decode, decode, sample, emit.

Jobs are admitted in the order their works arrived, and within a work the longest first and then by their prompts, as long as places are
left in the context of their adapter. When one is free, the prompts of some jobs more are computed in the same call: prompts cost less in
company, and the next places that become free are filled at once. A work of another adapter starts in another context when the ones that run
leave places, and the contexts then step in turn. No later work overtakes one that waits for a context. Prompts that begin alike are
computed once (`prefixes.py`).

KV cells are set aside for each job's fair share of them, or for its longer prompt, not for all that may follow: few answers are as long as
they may be. When cells run out nevertheless, the youngest sequence of the context gives its cells back and is computed again later; the
oldest always goes on, so all end.
"""

from __future__ import annotations

import itertools
import queue
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from lorayard.adapters import BaseModel
from lorayard.errors import BadRequest, LorayardError
from lorayard.jobs import BASE_DIGEST
from lorayard.settings import Settings
from lorayard_workers.llama.adapter_cache import AdapterCache
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.contexts import ContextPool, Slot, Switch
from lorayard_workers.llama.costs import Costs, measure
from lorayard_workers.llama.decoding import MOST_SEQUENCES, Batch
from lorayard_workers.llama.embeddings import Embedder, EmbeddingJob
from lorayard_workers.llama.probe import probe
from lorayard_workers.llama.requests import EmbeddingRequest, RequestReader
from lorayard_workers.llama.sampling import STUCK, sample
from lorayard_workers.llama.sequence import Sequence, now_ms
from lorayard_workers.runner import AdapterFile, Cancel, Event, Outcome, Progress, Started, Work

_PROGRESS_MS = 500.0
_WIDEST = 128  # sequences in one context, where the width is measured
_LEAST_CHUNK = 32  # prompt tokens that a step always has room for, however many sequences are decoding
_AHEAD = 2  # for so many places one prompt more may be computed ahead, to fill the next that becomes free
_READ_MS = 50.0  # for so long requests are read before those that have been may begin
_STUCK = "no token of the model goes on with what response_format asks for, or the schema is so ambiguous that to find out takes too long"
_COMPANY = 128  # tokens of prompts in one call, from where on more of them make none cheaper


@dataclass(eq=False)
class _Queued:
    """A work's jobs that wait for their start, in order, and the outcomes of those whose requests were refused."""

    adapter: AdapterFile | None
    waiting: deque[Sequence]
    refused: list[Outcome] = field(default_factory=list)
    embeddings: list[EmbeddingJob] = field(default_factory=list)
    part_of: Work | None = None

    @property
    def digest(self) -> str:
        return self.adapter.digest if self.adapter else BASE_DIGEST


@dataclass
class Counters:
    """Since the start. `prompt_tokens` counts a prompt once, when it is done, `cached_tokens` those of
    them that were copied, `decode_ms` the time in decode calls and sampling."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    decode_ms: float = 0.0


class Engine:
    """Runs jobs on one model. `submit` and `cancel` may be called from any thread, everything else from the decoding thread."""

    def __init__(self, model: Model, settings: Settings, emit: Callable[[Event], None], alive: Callable[[], None] = lambda: None) -> None:
        """`alive` is called between the measurements, which take their time where steps do."""
        self._model = model
        self._emit = emit
        self._settings = settings
        if settings.width:
            self.costs, self.width = Costs(), settings.width
        else:
            self.costs, self.width = measure(model, settings, widest=_WIDEST, alive=alive)
        self.cache = AdapterCache(settings.adapters_loaded, settings.adapters_mb << 20)
        step_tokens = max(settings.prefill_tokens, self.width + _LEAST_CHUNK)
        # of the sequences that llama.cpp has in one context, some are kept beginnings', and one is nobody's
        self._most = min(self.width + self.width // _AHEAD, MOST_SEQUENCES - settings.prefixes_kept - 1)
        self.pool: ContextPool[Sequence] = ContextPool(model, self.cache, settings, width=self._most, n_batch=step_tokens)
        self._batch = Batch(step_tokens)
        limit = min(settings.n_ctx, model.n_ctx_train)
        self.reader = RequestReader(model, n_ctx=limit, max_prompt=settings.max_prompt_tokens or limit)
        self._embedder = Embedder(model, settings, emit, longest=limit)
        self._share = settings.n_ctx // self.width
        self._inbox: queue.SimpleQueue[_Queued | Cancel] = queue.SimpleQueue()
        self._works: deque[_Queued] = deque()
        self._planned: list[str] = []
        self._turn = 0
        self.counters = Counters()
        self._told: tuple[float, list[str], list[str]] = (0.0, [], [])  # when, hot, loaded

    # Any thread

    def submit(self, work: Work, reading: Callable[[str], None] = lambda _ref: None) -> None:
        """Check and tokenize the work's requests, on the caller's thread, and queue them behind those that are queued already.

        `reading` is told each job's ref before its request is looked at: should that crash, or never end, it is known whose fault it was.
        What takes long to read is queued in parts.
        """
        queued, since = _Queued(work.adapter, deque(), part_of=work), now_ms()
        for item in work.items:
            if now_ms() - since > _READ_MS:
                self._inbox.put(queued)
                queued, since = _Queued(work.adapter, deque(), part_of=work), now_ms()
            reading(item.ref)
            try:
                request = self.reader.read(item.endpoint, bytes(item.request))
                if isinstance(request, EmbeddingRequest):
                    digest = work.adapter.digest if work.adapter else None
                    queued.embeddings.append(EmbeddingJob.of(work.batch, digest, item, request))
                else:
                    queued.waiting += Sequence.of(work.batch, work.adapter, item, request, self._model)
            except LorayardError as error:
                queued.refused.append(_failure(work.batch, item.ref, error))
            except Exception as error:  # whatever a request leads to is its own end, not that of its batch-mates
                unexpected = LorayardError(f"the request could not be read: {type(error).__name__}", code="unreadable_request")
                queued.refused.append(_failure(work.batch, item.ref, unexpected))
        self._inbox.put(queued)

    def cancel(self, batch: str, refs: list[str]) -> None:
        """Forget these jobs of a batch within one decode step."""
        self._inbox.put(Cancel(batch, refs))

    # The loop

    def probe(self, base: BaseModel) -> None:
        """Compute a little, in the context that jobs will be computed in. Raises `LorayardError` where what comes of it is no number."""
        acquired = self.pool.acquire(None)
        assert acquired is not None
        probe(self._model, acquired[0].context, self._batch, base)

    def step(self, wait_s: float | None = 0.0) -> bool:
        """One turn of the loop. Without work, waits up to `wait_s` seconds for some (None: for ever). False if nothing was computed."""
        self._receive(wait_s)
        self._admit()
        embedded = self._embedder.step(self._may_embed)
        slot = self._next_slot()
        if slot is None:
            if embedded:
                self._tell_progress()
            return embedded
        begun = now_ms()
        steps, chunks = self._compose(slot)
        rows = steps + [sequence for sequence, count in chunks if count == sequence.pending]
        started = now_ms()
        try:
            tokens = sample(slot.context.decode(self._batch), [sequence.sampler for sequence in rows])
        except LorayardError as error:
            self._isolate(slot, error)
            return True
        self.counters.steps += 1
        self.counters.decode_ms += now_ms() - started
        for sequence in steps:
            sequence.advance(1)
        for sequence, count in chunks:
            sequence.advance(count)
        self._take(rows, tokens)
        self.costs.saw_step(len(steps), sum(count for _, count in chunks), now_ms() - begun)
        self._tell_progress()
        return True

    @property
    def active(self) -> list[Sequence]:
        """What is being computed, over all contexts."""
        return [sequence for slot in self.pool.slots for sequence in slot.running]

    def close(self) -> None:
        """Free contexts and adapters, and forget all jobs; the model stays."""
        for sequence in self.active:
            sequence.leave(keep=False)
        self._embedder.close()
        self.pool.close()
        self.cache.close()
        self._batch.free()

    # Receive

    def _receive(self, wait_s: float | None) -> None:
        idle = not self._works and not self.active and not len(self._embedder)
        try:
            message = self._inbox.get(timeout=wait_s) if idle and wait_s != 0 else self._inbox.get_nowait()
            while True:
                self._accept(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _accept(self, message: _Queued | Cancel) -> None:
        if isinstance(message, Cancel):
            self._forget(message.batch, set(message.refs))
            return
        for outcome in message.refused:
            self._emit(outcome)
        self._embedder.add(message.embeddings)
        if not message.waiting:
            return
        if self._works and self._works[-1].part_of is message.part_of:
            message.waiting += self._works.pop().waiting
        # the longest first, and of those as long the prompts that begin alike one after the other: their beginning is there still
        message.waiting = deque(sorted(message.waiting, key=lambda waits: (-waits.expected, waits.item.tenant, waits.tokens)))
        self._works.append(message)

    def _forget(self, batch: str, refs: set[str]) -> None:
        self._embedder.forget(batch, refs)
        for work in self._works:
            work.waiting = deque(sequence for sequence in work.waiting if sequence.batch != batch or sequence.item.ref not in refs)
        self._works = deque(work for work in self._works if work.waiting)
        for sequence in self.active:
            if sequence.batch == batch and sequence.item.ref in refs:
                sequence.leave()

    # Admit

    def _admit(self) -> None:
        blocked: set[str] = set()  # adapters whose context lacks cells: later works of theirs do not overtake
        for work in list(self._works):
            if work.digest in blocked:
                continue
            if not self._may_start(work.waiting[0]):
                break
            try:
                acquired = self.pool.acquire(work.adapter)
            except LorayardError as error:
                for batch, ref in dict.fromkeys((sequence.batch, sequence.item.ref) for sequence in work.waiting):
                    self._emit(_failure(batch, ref, error))
                work.waiting.clear()
                continue
            if acquired is None:
                break
            slot, switch = acquired
            if switch.temperature != "hot":
                self.costs.saw_switch(switch.temperature, switch.load_ms + switch.bind_ms)
            self._start(work, slot, switch)
            if work.waiting:
                blocked.add(work.digest)
        self._works = deque(work for work in self._works if work.waiting)
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Tell the cache what is wanted next, so that the adapter on deck is in memory when its turn comes."""
        wanted = {work.digest: work.adapter for work in itertools.islice(self._works, self.cache.capacity) if work.adapter}
        if list(wanted) != self._planned:
            self._planned = list(wanted)
            self.cache.plan([file for file in wanted.values() if file])

    def _may_start(self, sequence: Sequence) -> bool:
        """Whether a place is left beside what runs. Jobs suspected of having killed a process share the engine with such jobs only."""
        if sequence.received_ms > self._embedder.held_ms:
            return False
        active = self.active
        beside = [other.company for other in active] + self._embedder.companies
        if not any(beside) and not sequence.company:
            digest = sequence.adapter.digest if sequence.adapter else BASE_DIGEST
            own = next((slot.running for slot in self.pool.slots if slot.digest == digest and slot.running), active)
            return len(own) < self.width
        return self._suspects_fit(beside, sequence.company)

    def _may_embed(self, job: EmbeddingJob) -> bool:
        """Whether an embedding may begin beside what runs: as suspects do in `_may_start`, and not before one that came earlier."""
        first = self._works[0].waiting[0] if self._works else None
        if first is not None and first.company and first.received_ms < job.received_ms:
            return False
        beside = [other.company for other in self.active]
        return (not any(beside) and not job.item.company) or self._suspects_fit(beside, job.item.company)

    def _suspects_fit(self, beside: list[int], company: int) -> bool:
        """Whether a job may run beside jobs of these companies, where it or one of them is a suspect."""
        return not beside or len(beside) < min(*beside, company, self.width)

    def _may_prepare(self, slot: Slot[Sequence], sequence: Sequence) -> bool:
        """Whether a prompt may be computed ahead of its place: while that makes prompts cheaper, and no job is a suspect."""
        prompts = sum(len(other.tokens) - other.strand.shared for other in slot.running if other.strand and other.pending > 1)
        company = any(other.company for other in (sequence, *self.active))
        return len(slot.running) < self._most and prompts < _COMPANY and not company

    def _fits(self, slot: Slot[Sequence], sequence: Sequence) -> bool:
        """Whether the context has cells for one more. Alone, every accepted job has."""
        if not slot.running:
            return True
        own = sequence.cells(self._share) - slot.prefixes.overlap(sequence.item.tenant, sequence.tokens)
        set_aside = sum(other.cells(self._share) - other.strand.shared for other in slot.running if other.strand)
        return set_aside + slot.prefixes.held_cells + own <= slot.context.n_ctx

    def _start(self, work: _Queued, slot: Slot[Sequence], switch: Switch) -> None:
        begun: list[Sequence] = []
        first: list[str] = []  # refs of jobs of which nothing had begun
        while work.waiting and self._fits(slot, work.waiting[0]):
            if not self._may_start(work.waiting[0]) and not (begun and self._may_prepare(slot, work.waiting[0])):
                break
            sequence = work.waiting.popleft()
            sequence.join(slot)
            if sequence.switch is None:
                if not any(other.switch for other in sequence.choices):
                    first.append(sequence.item.ref)
                sequence.switch, sequence.started_ms = switch, now_ms()
                begun.append(sequence)
        for sequence in begun:
            sequence.width = min(len(slot.running), self.width)
        if first:
            self._emit(Started(begun[0].batch, first))

    # Compose

    def _next_slot(self) -> Slot[Sequence] | None:
        """The next context in turn that has something to compute."""
        slots = self.pool.slots
        for offset in range(1, len(slots) + 1):
            index = (self._turn + offset) % len(slots)
            if slots[index].running:
                self._turn = index
                return slots[index]
        return None

    def _compose(self, slot: Slot[Sequence]) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """Fill the batch: one token of every decoding sequence, then chunks of prompts, oldest first.

        Returns the decoding sequences, and those in their prompts with how many tokens of each.
        """
        for sequence in slot.running:
            if sequence.strand is not None and sequence.strand.waits:
                slot.prefixes.settle(sequence.strand)
        while True:
            steps, chunks = self._share_out(slot)
            if steps or chunks:
                break
            self._preempt(slot.running[-1])
        self._batch.clear()
        if steps:
            positions = [sequence.computed for sequence in steps]
            self._batch.add_steps([s.seq for s in steps], positions, [sequence.tokens[-1] for sequence in steps])
        for sequence, count in chunks:
            start, end = sequence.computed, sequence.computed + count
            self._batch.add(sequence.seq, start, sequence.tokens[start:end], want_logits=end == len(sequence.tokens))
        return steps, chunks

    def _share_out(self, slot: Slot[Sequence]) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """As `_compose` returns it; nothing when cells are lacking."""
        steps = [sequence for sequence in slot.running if sequence.pending == 1][: self.width]
        prompts = [s for s in slot.running if s.pending > 1 and s.strand is not None and not s.strand.waits]
        wanted = len(steps) + min(sum(s.pending for s in prompts), self._settings.prefill_tokens)
        slot.prefixes.make_room(wanted)
        cells = slot.context.n_ctx - slot.prefixes.cells
        if len(steps) > cells:
            return [], []
        budget = min(cells - len(steps), max(self._settings.prefill_tokens - len(steps), _LEAST_CHUNK))
        chunks: list[tuple[Sequence, int]] = []
        for sequence in prompts:
            if budget:
                chunks.append((sequence, min(sequence.pending, budget)))
                budget -= chunks[-1][1]
        return steps, chunks

    # Take and emit

    def _take(self, rows: list[Sequence], tokens: list[int]) -> None:
        for sequence, token in zip(rows, tokens, strict=True):
            if sequence.slot is None:  # another answer to its job got stuck in this step
                continue
            if token == STUCK:
                stuck = LorayardError(_STUCK, code="grammar_stuck")
                self._give_up(sequence, stuck)
                continue
            first = not sequence.generated
            sequence.take(token, self._model.pieces, self._model.end_tokens)
            if first:
                self.counters.prompt_tokens += len(sequence.request.prompt)
                self.counters.cached_tokens += sequence.cached
            self.counters.generated_tokens += 1
            if sequence.finish:
                sequence.leave()
                outcome = sequence.outcome(self._model.pieces)
                if outcome is not None:
                    self.counters.finished += 1
                    self._emit(outcome)

    def _give_up(self, sequence: Sequence, error: LorayardError) -> None:
        """Its job fails, with all of its answers."""
        self._forget(sequence.batch, {sequence.item.ref})
        self._emit(_failure(sequence.batch, sequence.item.ref, error))

    def _preempt(self, sequence: Sequence) -> None:
        """Give its cells to older ones; it is first in the queue, and what it generated stays."""
        sequence.leave(keep=False)
        self._works.appendleft(_Queued(sequence.adapter, deque([sequence])))
        self.counters.preemptions += 1

    def _isolate(self, slot: Slot[Sequence], error: LorayardError) -> None:
        """A decode failed, or gave what is not a number, which spreads through shared cells: run each alone to find whose fault it is."""
        suspects = list(slot.running)
        for sequence in reversed(suspects):
            self._preempt(sequence)
            sequence.company = 1
        slot.prefixes.bind(slot.prefixes.owner)
        slot.context.clear(data=True)
        if len(suspects) == 1:
            self._give_up(suspects[0], error)

    def _tell_progress(self) -> None:
        when, *known = self._told
        hot, loaded = self.pool.hot, self.cache.digests
        if now_ms() - when >= _PROGRESS_MS or known != [hot, loaded]:
            self._told = (now_ms(), hot, loaded)
            counters = asdict(self.counters) | {"adapter_loads": self.cache.loads, "adapter_evictions": self.cache.evictions}
            counters |= {"active": len(self.active), "waiting": sum(len(work.waiting) for work in self._works)}
            self._emit(Progress(self.counters.steps, hot, loaded, counters, costs=self.costs.document()))


def _failure(batch: str, ref: str, error: LorayardError) -> Outcome:
    """An error as a job's end; what is not the request's or the adapter's fault may go better another time."""
    retryable = not isinstance(error, BadRequest) and error.code not in ("not_a_number", "unreadable_request", "grammar_stuck")
    return Outcome(batch, ref, error=error.document(), retryable=retryable)
