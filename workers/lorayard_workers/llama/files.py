"""Adapters' files on this worker's disk: fetched out of the artifact store and converted when they are wanted, or before, where the
scheduler says so; deleted, where they may not take more, by when they are used next."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import structlog

from lorayard.adapters import BaseModel
from lorayard.adapters.store import ArtifactStore, GgufCache
from lorayard.errors import LorayardError
from lorayard.jobs import BASE_DIGEST
from lorayard.ledger.registry import Planned
from lorayard.settings import Settings

_AGAIN_S = 60.0  # what could not be fetched ahead is left alone for so long; a job that wants it tries nevertheless

log = structlog.get_logger("lorayard.llama")


class AdapterFiles:
    """GGUF files by digest, each made once for the base that is served here. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._store = ArtifactStore.open(settings)
        self._folder = settings.state_dir / "cache" / "gguf"
        self._most = None if settings.adapters_disk_mb is None else settings.adapters_disk_mb << 20  # bytes
        self._planned: list[str] = []
        self._lock = threading.Lock()
        self._wished: list[str] = []  # to be fetched ahead, the next first
        self._fetching = ""  # ahead, now
        self._failed: dict[str, float] = {}  # and when
        self._ahead: threading.Thread | None = None

    def _cache(self, base: dict[str, Any]) -> GgufCache:
        return GgufCache(self._folder, self._store, msgspec.convert(base, BaseModel))

    def fetch(self, digest: str, base: dict[str, Any]) -> str:
        """The path of its file. Raises what `GgufCache.path` raises."""
        return self._make(self._cache(base), digest)

    def _make(self, cache: GgufCache, digest: str) -> str:
        made: list[str] = []
        path = cache.path(digest, lambda: made.append(digest))
        if made and self._most is not None and (deleted := cache.trim(self._most, self._planned)):
            log.info("adapters' files deleted", count=len(deleted))
        return str(path)

    def expect(self, planned: Planned, base: dict[str, Any]) -> list[str]:
        """Fetch what the scheduler would have this worker fetch ahead, one after another on a thread of its own. Answers with those of all
        planned adapters that are neither here nor just being fetched."""
        if not base:
            return []
        self._planned = planned.digests
        cache, late = self._cache(base), time.monotonic() - _AGAIN_S
        absent = [digest for digest in planned.digests if digest != BASE_DIGEST and cache.cached(digest) is None]
        with self._lock:
            self._failed = {digest: at for digest, at in self._failed.items() if at > late}
            self._wished = [digest for digest in planned.mine if digest in absent and digest not in self._failed]
            if self._wished and self._ahead is None:
                self._ahead = threading.Thread(target=self._fetch_ahead, args=(cache,), name="fetch-ahead", daemon=True)
                self._ahead.start()
            return [digest for digest in absent if digest != self._fetching]

    def _fetch_ahead(self, cache: GgufCache) -> None:
        while True:
            with self._lock:
                self._fetching = self._wished.pop(0) if self._wished else ""
                if not self._fetching:
                    self._ahead = None
                    return
                digest = self._fetching
            try:
                self._make(cache, digest)
                log.info("adapter fetched ahead", adapter=digest[:12])
            except (LorayardError, OSError) as error:  # it was a hint: the job that wants it meets the reason, if there still is one
                log.info("adapter not fetched ahead", adapter=digest[:12], reason=str(error))
                with self._lock:
                    self._failed[digest] = time.monotonic()
