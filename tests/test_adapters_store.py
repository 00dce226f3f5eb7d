"""The way of an adapter through registry, artifact store and a worker's GGUF cache, with a real server and real files."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import synthetic_adapters
from gguf import GGUFReader

from lorayard.adapters import AdapterRegistry, BaseModel, Manifest
from lorayard.adapters import store as store_module
from lorayard.adapters.conversion import write_gguf
from lorayard.adapters.intake import add_adapter, describe
from lorayard.adapters.peft import PeftAdapter, build_adapter
from lorayard.adapters.store import ArtifactStore, GgufCache
from lorayard.errors import AdapterRejected, BadRequest, LorayardError, NotFound, SetupError, Unavailable
from lorayard.settings import Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base(**changes: Any) -> BaseModel:
    sizes = {"n_layer": 30, "n_embd": 576, "n_head": 9, "n_head_kv": 3, "n_ff": 1536, "n_vocab": 49152, "n_ctx_train": 8192}
    words = {"architecture": "llama", "name": "demo", "names": [synthetic_adapters.BASE_NAME], "digest": "d"}
    return BaseModel(**(sizes | words | changes))


def adapter(variant: str = "plain") -> PeftAdapter:
    return build_adapter(synthetic_adapters.files(variant))


def manifest(variant: str = "plain") -> Manifest:
    return describe(adapter(variant), "acme", "tone")


@pytest.fixture
def configured(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "state")


@pytest.fixture
def artifacts(configured: Settings) -> ArtifactStore:
    return ArtifactStore.open(configured)


@pytest.fixture
def registry(store: redis.Redis) -> AdapterRegistry:
    return AdapterRegistry(store)


# ---- registry


def test_own_adapters_hide_public_ones_and_no_one_elses_are_seen(registry: AdapterRegistry) -> None:
    registry.add("*", "tone", manifest("plain"))
    registry.add("*", "everyones", manifest("plain"))
    registry.add("acme", "tone", manifest("rslora"))
    assert registry.get("acme", "tone").digest == adapter("rslora").digest
    assert registry.get("other", "tone").digest == adapter("plain").digest
    assert registry.get("other", "tone").tenant == "*"
    assert [(found.name, found.tenant) for found in registry.list("acme")] == [("everyones", "*"), ("tone", "acme")]
    assert [(found.name, found.tenant) for found in registry.list("*")] == [("everyones", "*"), ("tone", "*")]
    registry.add("acme", "secret", manifest())
    with pytest.raises(NotFound):
        registry.get("other", "secret")
    found = registry.get_many("acme", ["secret", "nope", "tone"])
    assert found["nope"] is None
    assert found["secret"] == registry.get("acme", "secret")
    assert registry.get_many("acme", []) == {}


def test_adding_a_name_again_says_what_it_replaces(registry: AdapterRegistry) -> None:
    first = registry.add("acme", "tone", manifest("plain"))
    assert first.replaces == ""
    assert registry.add("acme", "tone", manifest("plain")).replaces == ""
    second = registry.add("acme", "tone", manifest("rslora"))
    assert second.replaces == first.digest
    assert registry.get("acme", "tone") == second
    assert registry.remove("acme", "tone") == second
    for call in (registry.get, registry.remove):
        with pytest.raises(NotFound):
            call("acme", "tone")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/etc", "a\0", "a\n", "ünï", ".hidden", "x" * 65, "*", "a:b"])
def test_bad_names_are_refused(registry: AdapterRegistry, name: str) -> None:
    with pytest.raises(BadRequest, match="not a name"):
        registry.add("acme", name, manifest())
    with pytest.raises(BadRequest, match="not a name"):
        registry.get("acme", name)
    if name != "*":
        with pytest.raises(BadRequest, match="not a name"):
            registry.list(name)


def test_adding_at_once_leaves_one_and_a_true_history(registry: AdapterRegistry) -> None:
    made = [manifest(variant) for variant in ("plain", "rslora", "attention", "patterns")]
    stored: list[Manifest] = []
    threads = [threading.Thread(target=lambda one=one: stored.append(registry.add("acme", "tone", one))) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = registry.get("acme", "tone").digest
    # each replaced exactly one other, and the one that is there now was replaced by none
    assert sorted([*(one.replaces for one in stored if one.replaces), last]) == sorted(one.digest for one in made)


# ---- artifact store


def test_store_gives_back_what_was_put(artifacts: ArtifactStore, configured: Settings) -> None:
    one = adapter("patterns")
    assert not artifacts.exists(one.digest)
    with pytest.raises(NotFound):
        artifacts.get(one.digest)
    assert artifacts.put(one) == one.digest
    assert artifacts.exists(one.digest)
    assert artifacts.get(one.digest).digest == one.digest
    assert {path.name for path in (configured.state_dir / "artifacts" / one.digest).iterdir()} == {CONFIG, WEIGHTS}
    artifacts.remove(one.digest)
    artifacts.remove(one.digest)
    assert not artifacts.exists(one.digest)
    for bad in ("../../etc", "", "x" * 32):
        with pytest.raises(NotFound):
            artifacts.get(bad)


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_damaged_content_is_never_given_out(artifacts: ArtifactStore, configured: Settings, damage: str) -> None:
    digest = artifacts.put(adapter())
    path = configured.state_dir / "artifacts" / digest / WEIGHTS
    data = bytearray(path.read_bytes())
    if damage == "other":
        data = bytearray(adapter("rslora").weights_file()[:-2] + b"\1\1")
    elif damage == "flip":
        data[-1] ^= 1
    path.write_bytes(data[:-4] if damage == "cut" else data)
    with pytest.raises(LorayardError, match="damaged") as caught:
        artifacts.get(digest)
    assert caught.value.code == "artifact_damaged"
    artifacts.put(adapter())  # repairs
    assert artifacts.get(digest).digest == digest


def test_store_by_url(tmp_path: Path) -> None:
    store = ArtifactStore.open(Settings(artifacts_url=f"file://{tmp_path}/deep/er"))
    assert store.get(store.put(adapter())).digest == adapter().digest
    with pytest.raises(SetupError, match="LORAYARD_ARTIFACTS_URL"):
        ArtifactStore.open(Settings(artifacts_url="nonsense://x"))


def test_a_store_that_does_not_answer_is_unavailable() -> None:
    store = ArtifactStore.open(Settings(artifacts_url="http://127.0.0.1:9/nothing"))
    with pytest.raises(Unavailable):
        store.put(adapter())


# ---- conversion and cache


def test_gguf_has_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    write_gguf(adapter(), base(), tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    words = {key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")}
    assert words == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 6.0}
    shapes = {tensor.name: [int(side) for side in tensor.shape] for tensor in reader.tensors}
    assert shapes["blk.29.ffn_down.weight.lora_a"] == [1536, 2]
    assert shapes["blk.29.ffn_down.weight.lora_b"] == [2, 576]
    assert len(shapes) == 3 * 7 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]  # nothing half-written beside it


def test_row_order_is_that_of_the_architecture(tmp_path: Path) -> None:
    def q(architecture: str) -> Any:
        write_gguf(adapter(), base(architecture=architecture), tmp_path / "a.gguf")
        return next(np.array(t.data) for t in GGUFReader(tmp_path / "a.gguf").tensors if t.name == "blk.0.attn_q.weight.lora_b")

    original = adapter().modules[0].b.float32()
    assert np.array_equal(q("qwen2"), original)
    # of the first head of 64 rows: the first of its first half, the first of its second, and so on
    assert np.array_equal(q("llama")[:4], original[[0, 32, 1, 33]])
    with pytest.raises(AdapterRejected, match="falcon"):
        q("falcon")


@pytest.mark.parametrize(("q", "rest"), [(900_000, 0.001), (0.001, 900_000)], ids=["the rest too small", "the rest too large"])
def test_numbers_beyond_the_precision_are_refused(tmp_path: Path, q: float, rest: float) -> None:
    files = synthetic_adapters.files("plain")
    config = synthetic_adapters.config("plain") | {"lora_alpha": rest, "alpha_pattern": {"q_proj": q}}
    one = build_adapter(files | {CONFIG: json.dumps(config).encode()})
    with pytest.raises(AdapterRejected, match="float16"):
        write_gguf(one, base(), tmp_path / "a.gguf", "f16")
    assert list(tmp_path.iterdir()) == []
    write_gguf(one, base(), tmp_path / "a.gguf", "f32")


def test_cache_converts_once_and_checks(artifacts: ArtifactStore, tmp_path: Path) -> None:
    cache = GgufCache(tmp_path / "cache", artifacts, base())
    digest = artifacts.put(adapter())
    fetched: list[str] = []
    assert cache.cached(digest) is None
    path = cache.path(digest, lambda: fetched.append(digest))
    artifacts.remove(digest)
    assert cache.path(digest, lambda: fetched.append(digest)) == path == cache.cached(digest)
    assert fetched == [digest]
    with pytest.raises(NotFound):
        cache.path("0" * 32)
    with pytest.raises(NotFound):
        cache.path("../escape")
    # another base never finds this one's files
    assert GgufCache(tmp_path / "cache", artifacts, base(architecture="qwen2")).cached(digest) is None
    other = artifacts.put(adapter("rslora"))
    with pytest.raises(AdapterRejected, match="another model"):
        GgufCache(tmp_path / "cache", artifacts, base(n_ff=100)).path(artifacts.put(adapter("patterns")))
    assert cache.path(other) != path


def test_a_cache_is_trimmed_by_what_is_planned_and_then_by_use(
    artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = GgufCache(tmp_path / "cache", artifacts, base())
    names = ("plain", "rslora", "patterns", "attention")
    paths = [cache.path(artifacts.put(adapter(name))) for name in names]
    digests = [path.stem for path in paths]
    whole = sum(path.stat().st_size for path in paths)
    other = GgufCache(tmp_path / "cache", artifacts, base(architecture="qwen2")).path(digests[0])
    for age, path in enumerate(paths):
        os.utime(path, (0, 1e9 - age))  # the first was used last
    assert cache.trim(whole + other.stat().st_size) == []
    assert cache.trim(whole + other.stat().st_size - 1, planned=[digests[3], digests[2]]) == [digests[1]], (
        "not planned, and unused for longer than the first"
    )
    assert not paths[1].exists()
    cache.path(digests[0])
    assert cache.trim(0, planned=[digests[3], digests[2]]) == [digests[2], digests[3]], "the one planned latest before the next"
    assert paths[0].exists(), "just used"
    assert other.exists()
    monkeypatch.setattr(store_module, "IN_USE_S", -1.0)
    assert sorted(cache.trim(0)) == [digests[0], digests[0]], "what was made for another base counts too"
    assert cache.path(digests[1]) == paths[1], "and it comes back when it is wanted"


def convert(state: Path, cache: Path, digest: str, fetched: Any) -> None:
    def count() -> None:
        with fetched.get_lock():
            fetched.value += 1

    GgufCache(cache, ArtifactStore.open(Settings(state_dir=state)), base()).path(digest, count)


def test_processes_share_a_cache(artifacts: ArtifactStore, configured: Settings, tmp_path: Path) -> None:
    digest = artifacts.put(adapter())
    spawn = multiprocessing.get_context("spawn")
    fetched = spawn.Value("i", 0)
    arguments = (configured.state_dir, tmp_path / "cache", digest, fetched)
    processes = [spawn.Process(target=convert, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert fetched.value == 1


def test_a_process_that_stands_still_while_it_makes_a_file_holds_nobody_up(
    artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, digest = GgufCache(tmp_path / "cache", artifacts, base()), artifacts.put(adapter())
    made = cache.path(digest)
    monkeypatch.setattr(store_module, "LOCK_S", 0.1)
    with (made.parent / f".{digest}.lock").open("wb") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        try:
            made.unlink()
            assert pool.submit(cache.path, digest).result(timeout=10) == made
        finally:
            fcntl.flock(other, fcntl.LOCK_UN)
    assert made.exists()


# ---- intake


def test_add_adapter_does_it_all(configured: Settings, registry: AdapterRegistry, artifacts: ArtifactStore, tmp_path: Path) -> None:
    folder = synthetic_adapters.write("rslora-patterns", tmp_path / "it")
    (folder / "card.json").write_text('{"system_prompt": "Name it."}')
    made = add_adapter(configured, registry, artifacts, base(), "acme", "intents", folder)
    assert registry.get("acme", "intents") == made
    assert artifacts.get(made.digest).digest == made.digest
    assert (made.rank, made.alpha, made.rslora, made.n_layers, len(made.targets)) == (4, 3.0, True, 3, 7)
    assert made.scale_min < made.scale_max == 12 / 2**0.5
    assert made.card == {"system_prompt": "Name it."}
    synthetic_adapters.write("plain", folder)
    assert add_adapter(configured, registry, artifacts, base(), "acme", "intents", folder).replaces == made.digest


@pytest.mark.parametrize(
    ("facts", "name", "tenant"),
    [({"n_ff": 9}, "ok", "acme"), ({"architecture": "falcon"}, "ok", "acme"), ({}, "not ok", "acme"), ({}, "ok", "not ok")],
)
def test_a_refused_adapter_leaves_nothing(
    configured: Settings, registry: AdapterRegistry, artifacts: ArtifactStore, tmp_path: Path, facts: dict[str, Any], name: str, tenant: str
) -> None:
    folder = synthetic_adapters.write("plain", tmp_path / "it")
    with pytest.raises(BadRequest):
        add_adapter(configured, registry, artifacts, base(**facts), tenant, name, folder)
    assert registry.list("acme") == []
    assert not artifacts.exists(adapter().digest)


def test_the_size_cap_is_a_setting(registry: AdapterRegistry, artifacts: ArtifactStore, tmp_path: Path) -> None:
    small = Settings(state_dir=tmp_path, max_adapter_bytes=10_000)
    with pytest.raises(AdapterRejected, match="LORAYARD_MAX_ADAPTER_BYTES"):
        add_adapter(small, registry, artifacts, base(), "acme", "big", synthetic_adapters.write("plain", tmp_path / "it"))
