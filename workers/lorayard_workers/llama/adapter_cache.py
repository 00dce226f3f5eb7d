"""The set of adapters loaded beside the model's weights: bounded, least recently used out first, pinned while in use.

Every loaded adapter makes every graph reservation slower and every context larger, so the set is small; a file loads in milliseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from lorayard_workers.llama.bindings import LoraAdapter, Model
from lorayard_workers.runner import AdapterFile


class AdapterCache:
    """At most `capacity` loaded adapters, by content digest. Use it on the decoding thread only, between decode calls."""

    def __init__(self, model: Model, capacity: int) -> None:
        self._model = model
        self.capacity = capacity
        self._loaded: OrderedDict[str, LoraAdapter] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}
        self.loads = 0
        self.evictions = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._loaded

    @property
    def digests(self) -> list[str]:
        """What is loaded, most recently used first."""
        return list(reversed(self._loaded))

    def pin(self, file: AdapterFile) -> LoraAdapter:
        """The adapter, loaded now if it is not, and kept until as many `unpin`s.

        Raises what `LoraAdapter` does; `RuntimeError` when every place is pinned, which its owner must not let happen.
        """
        adapter = self._loaded.get(file.digest)
        if adapter is None:
            self._make_room()
            adapter = LoraAdapter(self._model, Path(file.path))
            self._loaded[file.digest] = adapter
            self.loads += 1
        self._loaded.move_to_end(file.digest)
        self._pins[file.digest] = self._pins.get(file.digest, 0) + 1
        return adapter

    def unpin(self, digest: str) -> None:
        left = self._pins[digest] - 1
        if left:
            self._pins[digest] = left
        else:
            del self._pins[digest]

    def _make_room(self) -> None:
        while len(self._loaded) >= self.capacity:
            victim = next((digest for digest in self._loaded if digest not in self._pins), None)
            if victim is None:
                raise RuntimeError(f"all {self.capacity} adapters are pinned")
            self._loaded.pop(victim).free()
            self.evictions += 1

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the books do not agree."""
        assert len(self._loaded) <= self.capacity, f"{len(self._loaded)} loaded, {self.capacity} allowed"
        assert self._pins.keys() <= self._loaded.keys(), "a pinned adapter is not loaded"
        assert all(count > 0 for count in self._pins.values()), "a pin without an owner"
        assert all(adapter.handle for adapter in self._loaded.values()), "a freed adapter is still listed"
        assert self.loads - self.evictions == len(self._loaded), "an adapter was lost without being freed"

    def close(self) -> None:
        """Free all; nothing may be pinned."""
        assert not self._pins, f"still pinned: {sorted(self._pins)}"
        while self._loaded:
            self._loaded.popitem()[1].free()
            self.evictions += 1
