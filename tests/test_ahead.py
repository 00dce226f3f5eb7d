"""What is planned next reaches the workers' caches, and they keep it; where it is not known, they do as before."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import redis
from llama_support import finish, item, outcomes, work, write_adapter
from simulation_support import COSTS, simulate, trace

from lorayard.ledger import registry
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard_scheduler.ahead import fetchers, planned
from lorayard_scheduler.groups import Groups
from lorayard_scheduler.simulated import Lorayard
from lorayard_scheduler.simulator import WorkerSpec
from lorayard_workers.llama import adapter_cache
from lorayard_workers.llama.adapter_cache import AdapterCache
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.engine import Engine
from lorayard_workers.runner import AdapterFile, Event


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"a{seed}.gguf", seed, layers=[0]) for seed in range(6)]


@pytest.fixture
def cache() -> Iterator[AdapterCache]:
    made = AdapterCache(3)
    yield made
    made.check_integrity()
    made.close()


def use(cache: AdapterCache, *files: AdapterFile) -> set[str]:
    """One after another; what is loaded then."""
    for file in files:
        cache.pin(file)
        cache.unpin(file.digest)
    return {digest.removeprefix("digest-") for digest in cache.digests}


def digests(files: list[AdapterFile], *places: int) -> list[str]:
    return [files[place].digest for place in places]


def test_adapters_are_told_of_by_rank_once_each_and_floods_last() -> None:
    groups = Groups()
    for number in range(4):
        groups.put(f"d{number}", "acme", 1, 100_000.0 - 20_000 * number, 0.0)
    groups.put("d0@auto", "other", 1, 10_000.0, 0.0)
    groups.put("base", "other", 1, 90_000.0, 0.0)
    groups.put("flood", "hog", 100_000, 0.0, 0.0)
    assert "hog" in groups.floods
    assert planned(groups) == ["d0", "d3", "d2", "d1", "base", "flood"]
    assert planned(groups, 2) == ["d0", "d3"]
    assert planned(Groups()) == []


def test_what_nobody_has_is_fetched_by_one_and_always_the_same() -> None:
    names = [f"w{number}" for number in range(8)]
    digests = [f"d{number}" for number in range(200)]
    absent = dict.fromkeys(names, digests)
    who = fetchers(digests, absent)
    assert list(who) == digests
    shares = [list(who.values()).count(name) for name in names]
    assert min(shares) > 10, "each has its part"
    assert fetchers(digests, absent | {"w3": digests[5:]}) == {digest: who[digest] for digest in digests[5:]}, (
        "what w3 has is fetched by none"
    )
    del absent["w7"]
    left = fetchers(digests, absent)
    assert all(left[digest] == name for digest, name in who.items() if name != "w7"), "only what w7 would have fetched goes to others"
    assert fetchers(digests, {}) == {}


def test_what_is_planned_comes_with_a_heartbeat_and_is_forgotten(store: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    board = WorkerRegistry(open_ledger(store, Settings()).client)
    info = WorkerInfo(name="w", pool="p", kind="llama", incarnation="i", host="h", pid=1)
    assert board.beat(info) == ([], [])
    board.announce_next("p", ["d1", "d2", "d3"], {"d1": "v", "d2": "w"})
    board.announce_next("q", ["other"], {})
    assert board.beat(info) == (["d1", "d2", "d3"], ["d2"])
    assert [worker.name for worker in board.workers("p")] == ["w"], "and it was a heartbeat"
    monkeypatch.setattr(registry, "NEXT_MS", 20)
    board.announce_next("p", ["d1", "d2"], {})
    time.sleep(0.1)
    assert board.beat(info) == ([], [])
    board.announce_next("p", [], {})
    assert board.beat(info) == ([], [])


def test_what_is_planned_soonest_stays_in_memory(cache: AdapterCache, files: list[AdapterFile]) -> None:
    use(cache, *files[:3])
    cache.expect(digests(files, 0, 5, 2))
    assert use(cache, files[3]) == {"a0", "a2", "a3"}, "nobody plans to use a1"
    assert use(cache, files[4]) == {"a0", "a2", "a4"}, "nor a3, though it was the last one used"
    cache.expect(digests(files, 2, 4, 0))
    assert use(cache, files[1]) == {"a1", "a2", "a4"}, "of those planned the latest goes"


def test_what_the_worker_has_comes_before_what_the_pool_has(cache: AdapterCache, files: list[AdapterFile]) -> None:
    use(cache, *files[:3])
    cache.expect(digests(files, 0))
    cache.plan([files[1], files[2]])
    assert use(cache, files[3]) == {"a1", "a2", "a3"}


def test_an_old_plan_says_nothing(cache: AdapterCache, files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_cache, "EXPECTED_S", 0.0)
    use(cache, *files[:3])
    cache.expect(digests(files, 0, 1, 2))
    assert use(cache, files[3]) == {"a1", "a2", "a3"}, "least recently used first"


def test_a_context_stays_with_the_adapter_that_comes_back_soonest(model: Model, files: list[AdapterFile]) -> None:
    events: list[Event] = []
    engine = Engine(model, Settings(n_ctx=256, width=1, contexts=2), events.append)
    for number, place in enumerate((0, 1, 2, 0)):
        if number == 2:
            engine.cache.expect(digests(files, 0))
        engine.submit(work(str(number), files[place], item(f"t/{number}", "Say hello.", max_tokens=1)))
        finish(engine)
    assert outcomes(events)["t/3"].temperature == "hot"
    assert engine.pool.hot == digests(files, 0, 2)
    engine.close()


def test_workers_that_are_told_load_less() -> None:
    """More comes than can be done, of ten adapters in turn, and there is room for eight: what was used last comes back last."""
    rng = random.Random(1)
    jobs = trace([(20.0 * number, rng.randrange(10), 10, 20) for number in range(600)], target=5_000.0)
    spec = WorkerSpec(COSTS, adapters_loaded=8)
    told, untold = (simulate(jobs, Lorayard(tells=tells), spec=spec) for tells in (True, False))
    assert told.loads < 0.6 * untold.loads


def test_workers_that_are_told_fetch_before_they_are_asked() -> None:
    rng = random.Random(1)
    jobs = trace([(40.0 * number, rng.randrange(60), 10, 20) for number in range(400)], target=20_000.0)
    spec = WorkerSpec(COSTS, cold=True)
    told, untold = (simulate(jobs, Lorayard(tells=tells), workers=2, spec=spec).waits() for tells in (True, False))
    assert sum(told) < 0.9 * sum(untold)
