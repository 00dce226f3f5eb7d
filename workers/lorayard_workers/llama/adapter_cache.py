"""Adapters in memory, ready to be computed with: bounded, read ahead of their use, and freed by when they are used next.

Pinned adapters stay. Of the others the one that nobody plans to use goes first, the longest unused before any, then the one that is
planned latest: what the worker has been given before what the scheduler says that the pool will be given. Reading is done by a thread of
its own, so that the adapter that is on deck is here when its turn comes.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lorayard_workers.llama.weights import Weights, read_weights
from lorayard_workers.runner import AdapterFile

EXPECTED_S = 5.0


class AdapterCache:
    """At most `capacity` adapters by content digest, and of `n_bytes` in all, but for what is pinned. May be used from any thread."""

    def __init__(self, capacity: int, n_bytes: int = 1 << 62) -> None:
        self.capacity = capacity
        self._n_bytes = n_bytes
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Weights] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}
        self._planned: dict[str, int] = {}  # digest -> place among those that this worker has been given
        self._expected: dict[str, int] = {}  # digest -> place among those that are planned for any worker
        self._expected_at = -math.inf
        self._reading: dict[str, Future[Weights]] = {}
        self._reader = ThreadPoolExecutor(1, "adapters")
        self.loads = 0
        self.evictions = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._loaded

    @property
    def digests(self) -> list[str]:
        """What is loaded, most recently used first."""
        with self._lock:
            return list(reversed(self._loaded))

    def plan(self, files: Sequence[AdapterFile]) -> None:
        """These adapters are wanted next, in this order: the first of them that is not here is read in the background."""
        with self._lock:
            self._planned = {file.digest: place for place, file in enumerate(files)}
            missing = next((file for file in files[: self.capacity] if file.digest not in self._loaded), None)
            if missing is not None and missing.digest not in self._reading:
                self._reading[missing.digest] = self._reader.submit(self._read_ahead, missing)

    def expect(self, digests: Sequence[str]) -> None:
        """These adapters are planned for the pool, the next first. A hint that counts for some seconds."""
        with self._lock:
            self._expected, self._expected_at = {digest: place for place, digest in enumerate(digests)}, time.monotonic()

    def wanted(self, digest: str) -> float:
        """Place of an adapter among those that are planned; infinite for one that is not."""
        place = self._planned.get(digest)
        if place is not None:
            return place
        fresh = time.monotonic() - self._expected_at < EXPECTED_S
        return len(self._planned) + self._expected.get(digest, math.inf) if fresh else math.inf

    def _read_ahead(self, file: AdapterFile) -> Weights:
        try:
            weights = read_weights(Path(file.path))
            self._put(file.digest, weights)
            return weights
        finally:
            with self._lock:
                self._reading.pop(file.digest, None)

    def pin(self, file: AdapterFile) -> Weights:
        """The adapter, read now if it is not here, and kept until as many `unpin`s. Raises what `read_weights` does."""
        with self._lock:
            coming = self._reading.get(file.digest)
            weights = self._loaded.get(file.digest)
        if weights is None:
            weights = coming.result() if coming else read_weights(Path(file.path))
        with self._lock:
            self._pins[file.digest] = self._pins.get(file.digest, 0) + 1
        self._put(file.digest, weights)
        return weights

    def _put(self, digest: str, weights: Weights) -> None:
        with self._lock:
            if digest not in self._loaded:
                self._loaded[digest] = weights
                self.loads += 1
            self._loaded.move_to_end(digest)
            self._make_room(digest)

    def _make_room(self, newest: str) -> None:
        while len(self._loaded) > self.capacity or sum(weights.n_bytes for weights in self._loaded.values()) > self._n_bytes:
            free = [digest for digest in self._loaded if digest not in self._pins and digest != newest]
            if not free:
                return
            del self._loaded[max(free, key=self.wanted)]  # of equals the least recently used
            self.evictions += 1

    def unpin(self, digest: str) -> None:
        with self._lock:
            left = self._pins[digest] - 1
            if left:
                self._pins[digest] = left
            else:
                del self._pins[digest]
            self._make_room(digest)

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the books do not agree."""
        with self._lock:
            over = len(self._loaded) - max(self.capacity, len(self._pins) + 1)
            assert over <= 0, f"{len(self._loaded)} loaded, {self.capacity} allowed"
            assert self._pins.keys() <= self._loaded.keys(), "a pinned adapter is not loaded"
            assert all(count > 0 for count in self._pins.values()), "a pin without an owner"
            assert self.loads - self.evictions == len(self._loaded), "an adapter was lost without being freed"

    def close(self) -> None:
        """Free all; nothing may be pinned."""
        self._reader.shutdown(cancel_futures=True)
        with self._lock:
            assert not self._pins, f"still pinned: {sorted(self._pins)}"
            self.evictions += len(self._loaded)
            self._loaded.clear()
