"""One job inside the engine: what it asked for, where its computation stands, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lorayard_workers.llama.contexts import Slot, Switch
from lorayard_workers.llama.requests import Request, response
from lorayard_workers.llama.sampling import Sampler
from lorayard_workers.runner import AdapterFile, Outcome, WorkItem

_LEAST_AHEAD = 64  # cells set aside for what is not generated yet


def now_ms() -> float:
    return 1000 * time.perf_counter()


@dataclass(eq=False)
class Sequence:
    """`tokens` is the prompt, then the answer; the first `computed` of them are in the KV cells of `slot` as sequence `seq`."""

    batch: str
    adapter: AdapterFile | None
    item: WorkItem
    request: Request
    received_ms: float
    company: int = field(init=False)  # as in WorkItem
    tokens: list[int] = field(init=False)
    sampler: Sampler = field(init=False)
    computed: int = 0
    slot: Slot[Sequence] | None = None
    seq: int = -1
    answer: bytearray = field(default_factory=bytearray)
    finish: str | None = None
    switch: Switch | None = None  # None until it began
    width: int = 1
    started_ms: float = 0.0
    first_token_ms: float = 0.0

    def __post_init__(self) -> None:
        self.company = self.item.company
        self.tokens = list(self.request.prompt)
        self.sampler = Sampler(self.request.sampling)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    def cells(self, share: int) -> int:
        """KV cells to set aside for it: its prompt and answer up to `share`, or some more than it has; never more than it can need."""
        return min(len(self.request.prompt) + self.request.max_tokens, max(len(self.tokens) + _LEAST_AHEAD, share))

    def join(self, slot: Slot[Sequence]) -> None:
        """Begin, or begin again, in a context that has a sequence id left."""
        self.slot, self.seq, self.computed = slot, slot.free_ids.pop(), 0
        slot.running.append(self)

    def leave(self) -> Slot[Sequence]:
        """Give cells and sequence id back to the context, which is returned."""
        slot, self.slot = self.slot, None
        assert slot is not None
        slot.context.remove(self.seq)
        slot.running.remove(self)
        slot.free_ids.append(self.seq)
        self.computed = 0
        return slot

    def take(self, token: int, pieces: list[bytes], ends: frozenset[int]) -> None:
        """Add a chosen token to the answer; sets `finish` when that ends it."""
        if not self.generated:
            self.first_token_ms = now_ms()
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

    def outcome(self, pieces: list[bytes]) -> Outcome:
        """Its success; `finish` is set."""
        assert self.finish is not None
        assert self.switch is not None
        shown, length = [], 0
        for entry in self.sampler.logprobs:  # those of a stop string, or of what follows it, are not part of the answer
            if length >= len(self.answer) and pieces[entry.token]:
                break
            shown.append(entry)
            length += len(pieces[entry.token])
        document = response(self.request, bytes(self.answer), self.finish, self.generated, shown, pieces)
        load, bind = self.switch.load_ms, self.switch.bind_ms
        timings = {
            "on_deck": max(self.started_ms - self.received_ms - load - bind, 0.0),
            "adapter_load": load,
            "adapter_switch": bind,
            "prefill": self.first_token_ms - self.started_ms,
            "decode": now_ms() - self.first_token_ms,
        }
        return Outcome(self.batch, self.item.ref, document, timings_ms=timings, temperature=self.switch.temperature, width=self.width)
