"""A worker's files of adapters: fetched ahead where the scheduler says so, and no more of them kept than there is room for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import synthetic_adapters
from fleet_support import until
from ledger_support import make_entry

from lorayard.adapters import store as store_module
from lorayard.adapters.peft import PeftAdapter, build_adapter
from lorayard.adapters.store import ArtifactStore, GgufCache
from lorayard.celery_app import make_app
from lorayard.ledger.registry import Planned, WorkerInfo, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard_scheduler.dispatcher import Dispatcher
from lorayard_workers.llama.files import AdapterFiles

BASE: dict[str, Any] = msgspec.to_builtins(synthetic_adapters.BASE)
NOWHERE = "0" * 32


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[AdapterFiles, list[str]]]:
    """A worker's, and the digests of three adapters in its artifact store."""

    def make(**settings: Any) -> tuple[AdapterFiles, list[str]]:
        configured = Settings(state_dir=tmp_path, **settings)
        store = ArtifactStore.open(configured)
        digests = [store.put(build_adapter(synthetic_adapters.files(name))) for name in ("plain", "rslora", "patterns")]
        return AdapterFiles(configured), digests

    return make


def test_what_the_scheduler_says_is_fetched_ahead_and_nothing_else(files: Callable[..., tuple[AdapterFiles, list[str]]]) -> None:
    mine, (a, b, c) = files()
    planned = Planned([a, "base", b, c], [b, c])
    assert mine.expect(planned, {}) == [], "no model, no file"
    assert set(mine.expect(planned, BASE)) <= {a, b, c}
    until(lambda: mine.expect(planned, BASE) == [a], 20)
    until(lambda: mine._ahead is None, 5)
    assert Path(mine.fetch(a, BASE)).exists()
    assert mine.expect(planned, BASE) == []


def test_what_is_being_fetched_counts_as_here(
    files: Callable[..., tuple[AdapterFiles, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, (a, b, _) = files()
    begun, go_on, path = threading.Event(), threading.Event(), GgufCache.path

    def slow(self: GgufCache, digest: str, on_fetch: Any = None) -> Path:
        begun.set()
        assert go_on.wait(10)
        return path(self, digest, on_fetch)

    monkeypatch.setattr(GgufCache, "path", slow)
    mine.expect(Planned([a, b], [a, b]), BASE)
    assert begun.wait(10)
    assert mine.expect(Planned([a, b], [a]), BASE) == [b], "and what is no longer planned is not fetched after it"
    go_on.set()
    until(lambda: mine._ahead is None, 10)
    assert mine.expect(Planned([a, b], []), BASE) == [b]


def test_what_cannot_be_fetched_is_left_alone_for_a_while(
    files: Callable[..., tuple[AdapterFiles, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, (a, *_) = files()
    tried: list[str] = []
    get = ArtifactStore.get

    def noted(self: ArtifactStore, digest: str) -> PeftAdapter:
        tried.append(digest)
        return get(self, digest)

    monkeypatch.setattr(ArtifactStore, "get", noted)
    planned = Planned([NOWHERE, a], [NOWHERE, a])
    until(lambda: mine.expect(planned, BASE) == [NOWHERE], 20)
    for _ in range(5):
        mine.expect(planned, BASE)
        time.sleep(0.02)
    assert tried == [NOWHERE, a]


def test_no_more_is_kept_than_there_is_room_for(
    files: Callable[..., tuple[AdapterFiles, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "IN_USE_S", 0.0)
    mine, (a, b, c) = files(adapters_disk_mb=1)
    mine._most = round(2.5 * Path(mine.fetch(a, BASE)).stat().st_size)  # a MiB is more than these three take
    mine.expect(Planned([a], []), BASE)
    kept = Path(mine.fetch(b, BASE))
    time.sleep(0.01)
    mine.fetch(c, BASE)
    assert not kept.exists()
    assert mine.expect(Planned([a, b, c], []), BASE) == [b], "what is planned stays, though it was used longest ago"


def test_what_waits_and_nobody_has_comes_to_one_workers_disk(store: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """The real scheduler and two workers' heartbeats and files; nothing is computed, so all keep waiting."""
    settings = Settings(state_dir=tmp_path / "shared", delivery_ms=60_000)
    ledger, artifacts = open_ledger(store, settings), ArtifactStore.open(settings)
    digests = []
    for alpha in range(1, 13):
        made = synthetic_adapters.files("plain")
        made["adapter_config.json"] = json.dumps(synthetic_adapters.config("plain") | {"lora_alpha": alpha}).encode()
        digests.append(artifacts.put(build_adapter(made)))
    for place, digest in enumerate(digests):
        jobs = [make_entry(f"{digest}-{n}", digest=digest, wait_ms=60_000 + 1000 * place) for n in range(60)]
        ledger.enqueue(jobs, max_queued=9_999)
    folders = {name: tmp_path / name for name in ("v", "w")}
    files = {name: AdapterFiles(settings.model_copy(update={"state_dir": folder})) for name, folder in folders.items()}
    for one in files.values():
        one._store = artifacts
    infos = {
        name: WorkerInfo(name=name, pool="main", kind="llama", incarnation="i", host="h", pid=1, width=2, ready=True) for name in folders
    }
    registry = WorkerRegistry(store)

    def on_disk() -> list[str]:
        """Beat, and look; an adapter once for each disk it is on."""
        for name, info in infos.items():
            info.absent = files[name].expect(registry.beat(info), BASE)
        return [path.stem for folder in folders.values() for path in folder.rglob("*.gguf")]

    dispatcher = Dispatcher(settings, ledger, make_app(redis_url))
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    try:
        until(lambda: set(on_disk()) == set(digests), 60, every_s=0.2)
        assert sorted(on_disk()) == sorted(digests), "each on one disk"
        assert all(list(folder.rglob("*.gguf")) for folder in folders.values())
        until(lambda: on_disk() and set(infos["v"].absent).isdisjoint(infos["w"].absent) and infos["v"].absent, 10)
    finally:
        dispatcher.stop()
        thread.join()
