"""Adapters in memory: read, checked, padded, pinned, freed by their next use, and written over one another in a context."""

from __future__ import annotations

import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_support import finish, item, outcomes, text, work, write_adapter

from lorayard.errors import AdapterRejected, LorayardError
from lorayard.settings import Settings
from lorayard_workers.llama import bindings
from lorayard_workers.llama.adapter_cache import AdapterCache
from lorayard_workers.llama.berths import Berth
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.engine import Engine
from lorayard_workers.llama.weights import Weights, read_weights
from lorayard_workers.runner import AdapterFile, Event


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"a{seed}.gguf", seed, rank=4 + 12 * (seed % 2)) for seed in range(6)]


def until_read(cache: AdapterCache, digest: str) -> None:
    give_up = time.monotonic() + 10
    while digest not in cache:
        assert time.monotonic() < give_up, "not read ahead"
        time.sleep(0.005)


def test_what_is_read_is_what_the_library_reads(files: list[AdapterFile]) -> None:
    weights = read_weights(Path(files[0].path))
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(files[0].path).tensors}
    assert 2 * len(weights.layout) == len(theirs) == 40
    for pair, (a, b) in zip(weights.layout, weights.matrices, strict=True):
        assert (pair.rank, a.shape[0], b.shape[1]) == (16, 16, 16)
        assert np.array_equal(a[:4], theirs[f"{pair.name}.lora_a"])
        assert np.array_equal(b[:, :4], theirs[f"{pair.name}.lora_b"] * np.float32(8 / 4)), "B holds the scale, alpha over rank"
        assert not a[4:].any()
        assert not b[:, 4:].any()


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16])
def test_half_precision_is_read_too(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    numbers = (np.arange(16 * 576, dtype=np.float32).reshape(16, 576) % 64) / 8
    writer = gguf.GGUFWriter(tmp_path / "half.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    for side, matrix in (("a", numbers), ("b", numbers.T.copy())):
        packed = gguf.quants.quantize(matrix, kind)
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (a, b), *_ = read_weights(tmp_path / "half.gguf").matrices
    assert np.array_equal(a, numbers)
    assert np.array_equal(b, numbers.T)


def test_a_file_cut_off_anywhere_is_refused(files: list[AdapterFile], tmp_path: Path) -> None:
    data = Path(files[0].path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 3000, 7), len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(AdapterRejected):
            read_weights(cut)


def test_any_broken_byte_of_the_head_is_refused_or_harmless(files: list[AdapterFile], tmp_path: Path) -> None:
    data = bytearray(Path(files[0].path).read_bytes())
    broken = tmp_path / "broken.gguf"
    for place in range(0, 2000, 3):
        for flip in (0x80, 0xFF):
            data[place] ^= flip
            broken.write_bytes(data)
            data[place] ^= flip
            try:
                read_weights(broken)
            except LorayardError:
                continue


def test_the_one_used_latest_goes_first_and_pinned_ones_never(files: list[AdapterFile]) -> None:
    cache = AdapterCache(3)
    for file in files[:3]:
        cache.pin(file)
    cache.unpin(files[0].digest)
    cache.unpin(files[1].digest)
    cache.plan([files[1], files[0]])
    cache.pin(files[3])
    cache.check_integrity()
    assert set(cache.digests) == {files[1].digest, files[2].digest, files[3].digest}, "the one whose next use is latest is gone"
    cache.unpin(files[2].digest)
    cache.pin(files[4])
    assert set(cache.digests) == {files[1].digest, files[3].digest, files[4].digest}, "the one that nobody plans to use is gone"
    cache.pin(files[4])
    cache.unpin(files[4].digest)
    cache.pin(files[5])
    cache.check_integrity()
    assert files[4].digest in cache, "pins are counted"
    for file in files[3:]:
        cache.unpin(file.digest)
    cache.close()
    cache.check_integrity()


def test_memory_is_bounded_too(files: list[AdapterFile]) -> None:
    size = read_weights(Path(files[0].path)).n_bytes
    cache = AdapterCache(10, 2 * size)
    for file in files:
        cache.pin(file)
        cache.unpin(file.digest)
    assert cache.digests == [files[5].digest, files[4].digest]
    cache.check_integrity()
    cache.close()


def test_what_is_planned_is_read_ahead(files: list[AdapterFile]) -> None:
    cache = AdapterCache(2)
    cache.plan([files[0]])
    until_read(cache, files[0].digest)
    cache.plan([AdapterFile("gone", "/nowhere/gone.gguf")])
    with pytest.raises(LorayardError, match="not there"):
        cache.pin(AdapterFile("gone", "/nowhere/gone.gguf"))
    cache.check_integrity()
    cache.close()


def test_the_engine_reads_ahead_while_it_decodes(model: Model, files: list[AdapterFile]) -> None:
    events: list[Event] = []
    engine = Engine(model, Settings(n_ctx=512, width=2, contexts=1), events.append)
    engine.submit(work("1", files[0], item("t/1", "Tell me a story.", max_tokens=20)))
    engine.submit(work("2", files[2], item("t/2", "Say hello.", max_tokens=2)))
    engine.step()
    until_read(engine.cache, files[2].digest)
    finish(engine)
    done = outcomes(events)
    assert [done[ref].temperature for ref in ("t/1", "t/2")] == ["disk", "loaded"]
    assert engine.costs.switch_ms.keys() == {"hot", "disk", "loaded"}
    engine.close()


def answers(model: Model, order: list[AdapterFile | None]) -> list[str]:
    """What each adapter says, one after another in one context."""
    events: list[Event] = []
    engine = Engine(model, Settings(n_ctx=512, width=2, contexts=1, adapters_loaded=2), events.append)
    for number, adapter in enumerate(order):
        engine.submit(work(str(number), adapter, item(f"t/{number}", "Tell me a story.", max_tokens=12)))
        finish(engine)
    engine.close()
    done = outcomes(events)
    return [text(done[f"t/{number}"]) for number in range(len(order))]


def test_an_adapter_written_over_another_answers_as_one_loaded_for_itself(
    model: Model, files: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [files[0], files[1], None, files[2], files[0], None, files[3]]
    made: list[Berth] = []
    build = Berth.__init__

    def noted(self: Berth, model: Model, weights: Weights) -> None:
        made.append(self)
        build(self, model, weights)

    monkeypatch.setattr(Berth, "__init__", noted)
    written = answers(model, order)
    assert len(made) == 1, "all have the same sizes, once they are padded"
    monkeypatch.setattr(bindings, "_find_pair", None)  # a build that does not tell where the tensors are
    loaded = answers(model, order)
    assert len(made) == 1 + 5
    assert written == loaded
    assert len({written[0], written[1], written[2]}) == 3
    assert written[0] == written[4]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("loads", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_loads_leave_no_memory_behind(model: Model, tmp_path: Path, loads: int) -> None:
    """Through cache and context, as jobs do; every twentieth needs another berth, which llama.cpp frees and loads."""
    kinds = [write_adapter(tmp_path / f"k{number}.gguf", number, rank=32, layers=range(0, 30, 2)) for number in range(7)]
    other = write_adapter(tmp_path / "other.gguf", 9, rank=40)
    engine = Engine(model, Settings(n_ctx=256, width=1, contexts=1, adapters_loaded=3), lambda _event: None)
    before = 0
    for turn in range(loads):
        file = other if turn % 20 == 19 else kinds[turn % 7]
        acquired = engine.pool.acquire(file)
        assert acquired is not None
        if turn == loads // 8:
            before = resident()
        if turn % 50 == 0:
            engine.cache.check_integrity()
    grown = resident() - before
    assert grown < 0.05 * before, f"{grown / 1e6:.1f} MB more after {loads} loads"
    assert engine.cache.loads > 0.9 * loads
    engine.close()
