"""One job inside the engine: what it asked for, where its computation stands, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.contexts import Slot, Switch
from lorayard_workers.llama.prefixes import Strand
from lorayard_workers.llama.requests import Answer, Request, response
from lorayard_workers.llama.sampling import Sampler
from lorayard_workers.runner import AdapterFile, Outcome, WorkItem

_LEAST_AHEAD = 64  # cells set aside for what is not generated yet


def now_ms() -> float:
    return 1000 * time.perf_counter()


@dataclass(eq=False)
class Sequence:
    """One answer to one job: `tokens` is the prompt, then the answer; the cells of the first `computed` of them are those of `strand`.

    A job that asks for several answers has as many sequences, which know each other as `choices`.
    """

    batch: str
    adapter: AdapterFile | None
    item: WorkItem
    request: Request
    sampler: Sampler
    received_ms: float
    company: int = field(init=False)  # as in WorkItem
    tokens: list[int] = field(init=False)
    choices: list[Sequence] = field(default_factory=list)
    slot: Slot[Sequence] | None = None
    strand: Strand | None = None
    cached: int = 0
    answer: bytearray = field(default_factory=bytearray)
    finish: str | None = None
    switch: Switch | None = None  # None until it began
    width: int = 1
    started_ms: float = 0.0
    first_token_ms: float = 0.0

    def __post_init__(self) -> None:
        self.company = self.item.company
        self.tokens = list(self.request.prompt)

    @classmethod
    def of(cls, batch: str, adapter: AdapterFile | None, item: WorkItem, request: Request, model: Model) -> list[Sequence]:
        """All sequences of one job. Raises `BadRequest` for a grammar that cannot be."""
        received = now_ms()
        made = [cls(batch, adapter, item, request, request.sampler(choice, model), received) for choice in range(request.n)]
        for sequence in made:
            sequence.choices = made
        return made

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def computed(self) -> int:
        return self.strand.computed if self.strand else 0

    @property
    def seq(self) -> int:
        """Its id in the context."""
        assert self.strand is not None
        return self.strand.seq

    def advance(self, count: int) -> None:
        """So many more of its tokens are in cells."""
        assert self.strand is not None
        self.strand.computed += count

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def expected(self) -> int:
        """Tokens it may still take: what is longest begins first, so that a batch does not end with one long answer alone."""
        return self.request.max_tokens - self.generated

    def cells(self, share: int) -> int:
        """KV cells to set aside for it: its prompt and answer up to `share`, or some more than it has; never more than it can need."""
        return min(len(self.request.prompt) + self.request.max_tokens, max(len(self.tokens) + _LEAST_AHEAD, share))

    def join(self, slot: Slot[Sequence]) -> None:
        """Begin, or begin again, in a context that has a place left."""
        self.slot, self.strand = slot, slot.prefixes.open(self.item.tenant, self.tokens)
        slot.running.append(self)

    def leave(self, *, keep: bool = True) -> Slot[Sequence]:
        """Give its cells back to the context, which is returned; `keep` as in `Prefixes.close`."""
        slot, strand = self.slot, self.strand
        assert slot is not None
        assert strand is not None
        slot.prefixes.close(strand, keep=keep)
        slot.running.remove(self)
        self.slot = self.strand = None
        return slot

    def take(self, token: int, pieces: list[bytes], ends: frozenset[int]) -> None:
        """Add a chosen token to the answer; sets `finish` when that ends it."""
        if not self.generated:
            self.first_token_ms = now_ms()
            self.cached = self.strand.reused if self.strand else 0
        self.tokens.append(token)
        if token in ends:
            self.finish = "stop"
            return
        before = len(self.answer)
        self.answer += pieces[token]
        hits = [self.answer.find(stop, max(before - len(stop) + 1, 0)) for stop in self.request.stops]
        cut = min((hit for hit in hits if hit >= 0), default=None)
        if cut is not None:
            del self.answer[cut:]
            self.finish = "stop"
        elif self.generated >= self.request.max_tokens:
            self.finish = "length"

    def _finished(self, pieces: list[bytes]) -> Answer:
        """What it has come to; `finish` is set."""
        assert self.finish is not None
        shown, length = [], 0
        for entry in self.sampler.logprobs:  # those of a stop string, or of what follows it, are not part of the answer
            if length >= len(self.answer) and pieces[entry.token]:
                break
            shown.append(entry)
            length += len(pieces[entry.token])
        return Answer(bytes(self.answer), self.finish, self.generated, shown)

    def outcome(self, pieces: list[bytes]) -> Outcome | None:
        """The job's success, once the last of its sequences has finished."""
        if not all(sequence.finish for sequence in self.choices):
            return None
        first = min(self.choices, key=lambda sequence: sequence.first_token_ms)
        begun = min(sequence.started_ms for sequence in self.choices)
        switch = next(sequence.switch for sequence in self.choices if sequence.started_ms == begun)
        assert switch is not None
        answers = [sequence._finished(pieces) for sequence in self.choices]
        timings = {
            "on_deck": max(begun - self.received_ms - switch.load_ms - switch.bind_ms, 0.0),
            "adapter_load": switch.load_ms,
            "adapter_switch": switch.bind_ms,
            "prefill": first.first_token_ms - begun,
            "decode": now_ms() - first.first_token_ms,
        }
        document = response(self.request, answers, first.cached, pieces)
        return Outcome(self.batch, self.item.ref, document, timings_ms=timings, temperature=switch.temperature, width=self.width)
