"""The contexts of a worker: each bound to one adapter at a time, all on the same weights.

Going back to an adapter whose context is still bound to it costs nothing. Binding another writes its weights over the last one's
(`berths.py`) and loses the KV.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import structlog

from lorayard.errors import SetupError
from lorayard.jobs import BASE_DIGEST
from lorayard.settings import Settings
from lorayard_workers.llama.adapter_cache import AdapterCache
from lorayard_workers.llama.berths import Berth
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Context
from lorayard_workers.llama.prefixes import Prefixes
from lorayard_workers.llama.weights import Weights
from lorayard_workers.runner import AdapterFile

Temperature = Literal["hot", "loaded", "disk"]
S = TypeVar("S")

log = structlog.get_logger("lorayard.llama")


@dataclass(eq=False)
class Slot(Generic[S]):
    """A context with what it is bound to, who holds its cells, and the sequences that run in it, oldest first."""

    context: Context
    prefixes: Prefixes
    berth: Berth | None = None  # of this context alone
    digest: str | None = None  # None: bound to nothing yet; BASE_DIGEST: the bare base
    running: list[S] = field(default_factory=list)
    used_at: int = 0


@dataclass(frozen=True)
class Switch:
    """What it took to make a slot ready for an adapter: reading its file, where it was not in memory, and binding it."""

    temperature: Temperature
    load_ms: float = 0.0
    bind_ms: float = 0.0


class ContextPool(Generic[S]):
    """Up to `settings.contexts` slots, made when first needed; fewer where there is no memory for as many, but one.

    Each bound slot pins its adapter, so there are never more slots than adapters that may be loaded.
    """

    def __init__(self, model: Model, cache: AdapterCache, settings: Settings, *, width: int, n_batch: int) -> None:
        self._model = model
        self._cache = cache
        self._settings = settings
        self._width = width
        self._n_batch = n_batch
        self._limit = min(settings.contexts, cache.capacity)
        self.slots: list[Slot[S]] = []
        self._clock = 0

    @property
    def hot(self) -> list[str]:
        """Digests that slots are bound to, most recently used first, without the bare base."""
        by_use = sorted(self.slots, key=lambda slot: -slot.used_at)
        return [slot.digest for slot in by_use if slot.digest not in (None, BASE_DIGEST)]

    def acquire(self, adapter: AdapterFile | None) -> tuple[Slot[S], Switch] | None:
        """A slot bound to this adapter, with no other adapter's sequences in it; None while all slots run others.

        Prefers the slot that is bound to it already, running or idle, then a new one, then the idle one whose adapter is planned latest or
        not at all, and of those the one that was used longest ago.
        Raises what loading the adapter raises; the slot is then bound to nothing.
        """
        digest = adapter.digest if adapter else BASE_DIGEST
        self._clock += 1
        slot = next((slot for slot in self.slots if slot.digest == digest), None)
        switch = Switch("hot")
        if slot is None:
            slot = self._idle()
            if slot is None:
                return None
            switch = self._bind(slot, adapter, digest)
        slot.used_at = self._clock
        return slot, switch

    def _idle(self) -> Slot[S] | None:
        if len(self.slots) < self._limit:
            try:
                self.slots.append(self._new())
                return self.slots[-1]
            except SetupError as error:
                if not self.slots:
                    raise
                self._limit = len(self.slots)
                log.warning(f"no further context; set LORAYARD_CONTEXTS={self._limit}, or a smaller LORAYARD_N_CTX", reason=error.message)
        idle = sorted((slot for slot in self.slots if not slot.running), key=lambda slot: slot.used_at)
        return max(idle, key=lambda slot: self._cache.wanted(slot.digest or ""), default=None)

    def _new(self) -> Slot[S]:
        s = self._settings
        context = Context(
            self._model,
            n_ctx=s.n_ctx,
            n_seq_max=self._width + s.prefixes_kept,
            n_batch=self._n_batch,
            kv_type=s.kv_type,
            flash_attn=s.flash_attn,
        )
        budget = round(s.prefix_share * context.n_ctx)
        return Slot(context, Prefixes(context, width=self._width, keepers=s.prefixes_kept, budget=budget, sharing=s.share_prefixes))

    def _bind(self, slot: Slot[S], adapter: AdapterFile | None, digest: str) -> Switch:
        self._release(slot)
        if adapter is None:
            slot.context.bind(None)
            self._name(slot, digest)
            return Switch("loaded")
        temperature: Temperature = "loaded" if digest in self._cache else "disk"
        start = time.perf_counter()
        weights = self._cache.pin(adapter)
        loaded = time.perf_counter()
        try:
            self._put(slot, weights)
        except BaseException:
            self._cache.unpin(digest)
            raise
        self._name(slot, digest)
        return Switch(temperature, 1000 * (loaded - start) if temperature == "disk" else 0.0, 1000 * (time.perf_counter() - loaded))

    def _put(self, slot: Slot[S], weights: Weights) -> None:
        if slot.berth is not None and slot.berth.takes(weights):
            slot.berth.fill(weights)
        else:
            self._clear_berth(slot)
            slot.berth = Berth(self._model, weights)
        slot.context.bind(slot.berth.adapter)

    @staticmethod
    def _clear_berth(slot: Slot[S]) -> None:
        slot.context.bind(None)
        if slot.berth is not None:
            slot.berth.free()
            slot.berth = None

    @staticmethod
    def _name(slot: Slot[S], digest: str) -> None:
        slot.digest = digest
        slot.prefixes.bind(digest)

    def _release(self, slot: Slot[S]) -> None:
        """Leave the slot with empty KV and bound to nothing that anybody may use, and its adapter free to be evicted."""
        slot.context.clear()
        if slot.digest not in (None, BASE_DIGEST):
            self._cache.unpin(slot.digest)
        slot.digest = None
        slot.prefixes.bind("")

    def close(self) -> None:
        for slot in self.slots:
            self._release(slot)
            self._clear_berth(slot)
            slot.context.close()
        self.slots.clear()
