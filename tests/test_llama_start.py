"""A worker's first decode: what llama.cpp does not survive is left out, as little of it as possible, and everybody is told."""

from __future__ import annotations

import os
import queue
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gguf
import llama_cpp as ll
import msgspec
import numpy as np
import pytest
from llama_support import item, text, work

from lorayard.adapters import BaseModel
from lorayard.adapters.conversion import changeable
from lorayard.errors import SetupError
from lorayard.settings import Settings
from lorayard_workers.llama import bindings, child, process
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Batch, Context
from lorayard_workers.llama.fallbacks import ways
from lorayard_workers.llama.probe import probe, trial
from lorayard_workers.llama.process import LlamaRunner
from lorayard_workers.runner import Event, Outcome, Ready

E = TypeVar("E", bound=Event)
PLANT = """
    import ctypes, os, signal, sys, threading, time
    import numpy as np
    from lorayard_workers.llama import bindings, decoding, process
    def crash(): signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)
    load, make, compute, bind = bindings.Model.__init__, decoding.Context.__init__, decoding.Context.decode, decoding.Context.bind
    def loaded(self, path, settings, alive):
        self.settings = settings
        load(self, path, settings, alive)
    def made(self, model, **options):
        self.settings, self.flash, self.adapter = model.settings, options["flash_attn"] != "off", None
        make(self, model, **options)
    def bound(self, adapter):
        self.adapter = adapter
        bind(self, adapter)
    def computed(self, batch):
        gpu = self.settings.n_gpu_layers != 0
        {plant}
        return compute(self, batch)
    if "PLANTED_GPU" in os.environ: bindings.has_gpu = lambda: True
    bindings.Model.__init__ = loaded
    decoding.Context.__init__, decoding.Context.bind, decoding.Context.decode = made, bound, computed
    process.main(sys.argv[1:])
"""


@pytest.fixture
def demo(demo_gguf: Path) -> Iterator[tuple[Model, Context, Batch, BaseModel]]:
    model, batch = Model(demo_gguf), Batch(64)
    context = Context(model, n_ctx=256, n_seq_max=1, n_batch=64)
    yield model, context, batch, model.base([])
    context.close()
    batch.free()
    model.close()


@pytest.fixture
def start(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[LlamaRunner, queue.Queue[Event]]]]:
    """A runner whose children do what is planted before each decode."""
    runners: list[LlamaRunner] = []

    def make(plant: str, **options: Any) -> tuple[LlamaRunner, queue.Queue[Event]]:
        (tmp_path / "planted_llama.py").write_text(textwrap.dedent(PLANT).replace("{plant}", plant))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(process, "_MODULE", "planted_llama")
        events: queue.Queue[Event] = queue.Queue()
        runners.append(LlamaRunner(Settings(**{"n_ctx": 512, "width": 2, "contexts": 1} | options), demo_gguf))
        runners[-1].start(events.put)
        return runners[-1], events

    yield make
    for runner in runners:
        runner.close()


def until(events: queue.Queue[Event], kind: type[E]) -> E:
    while not isinstance(event := events.get(timeout=60), kind):
        pass
    return event


def answers(runner: LlamaRunner, events: queue.Queue[Event]) -> bool:
    runner.submit(work("b", None, item("t/1", "Say hello.")))
    return bool(text(until(events, Outcome)))


def test_one_suspect_at_a_time_and_then_all() -> None:
    tried = [way.saying for way in ways(Settings(kv_type="q8_0"), gpu=True)]
    flash = "LORAYARD_FLASH_ATTN=off LORAYARD_KV_TYPE=f16"
    assert tried == ["LORAYARD_REPACK=false", flash, "LORAYARD_N_GPU_LAYERS=0", f"LORAYARD_REPACK=false {flash} LORAYARD_N_GPU_LAYERS=0"]
    assert [way.saying for way in ways(Settings(repack=False, kv_type="f32"), gpu=False)] == ["LORAYARD_FLASH_ATTN=off"]
    assert list(ways(Settings(repack=False, flash_attn="off", n_gpu_layers=0), gpu=True)) == []
    second = list(ways(Settings(n_ctx=777), gpu=False))[1].settings
    assert (second.n_ctx, second.repack, second.flash_attn, second.kv_type) == (777, True, "off", "f16")


def test_the_probes_adapter_is_on_all_that_adapters_may_change(demo: tuple[Model, Context, Batch, BaseModel]) -> None:
    base = demo[3]
    weights = trial(base)
    assert weights is not None
    assert len(weights.layout) == 14
    for pair, (a, b) in zip(weights.layout, weights.matrices, strict=True):
        outputs, inputs = changeable(base)[pair.name.split(".")[2]]
        assert (a.shape, b.shape) == ((16, inputs), (outputs, 16))


def test_a_crash_with_flash_attention_leaves_that_out_and_nothing_else(start: Any, capfd: pytest.CaptureFixture[str]) -> None:
    runner, events = start("if self.flash: crash()", kv_type="q8_0")
    ready = until(events, Ready)
    assert ready.fallback.startswith("without flash attention and a KV cache in q8_0, because")
    assert "SIGSEGV" in ready.fallback
    said = "".join(capfd.readouterr())
    assert said.count("trying again") == 2, "without repacked kernels first, which was not it"
    assert "LORAYARD_FLASH_ATTN=off LORAYARD_KV_TYPE=f16" in said
    assert answers(runner, events)
    os.kill(ready.pid, signal.SIGKILL)
    again = until(events, Ready)
    assert again.pid != ready.pid
    assert again.fallback == ready.fallback
    assert "trying again" not in "".join(capfd.readouterr()), "what was found is kept"
    assert answers(runner, events)


def test_a_hang_on_the_gpu_goes_on_without(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "START_S", 6.0)
    monkeypatch.setenv("PLANTED_GPU", "1")
    _runner, events = start("time.sleep(600 if gpu else 0)", repack=False, flash_attn="off", hang_s=6)
    assert until(events, Ready).fallback.startswith("without the GPU, because")


def test_where_two_are_to_blame_all_are_left_out(start: Any) -> None:
    runner, events = start("if self.flash or self.settings.repack: crash()")
    assert until(events, Ready).fallback.startswith("without its repacked kernels or flash attention, because")
    assert answers(runner, events)


def test_what_is_no_number_is_as_bad_as_a_crash(start: Any) -> None:
    plant = "if self.settings.repack: return np.full((batch.outputs, 8), np.nan, np.float32)"
    _runner, events = start(plant)
    fallback = until(events, Ready).fallback
    assert "without its repacked kernels" in fallback
    assert "not a number" in fallback


def test_the_probe_computes_with_an_adapter_too(start: Any) -> None:
    with pytest.raises(SetupError, match="SIGSEGV"):
        start("if self.adapter is not None: crash()")


def test_the_probe_leaves_the_context_as_it_was(demo: tuple[Model, Context, Batch, BaseModel]) -> None:
    model, context, batch, base = demo

    def first() -> Any:
        context.clear()
        batch.clear()
        batch.add(0, 0, [1, 2, 3], want_logits=True)
        return context.decode(batch).copy()

    before = first()
    probe(model, context, batch, base)
    assert np.array_equal(first(), before)


def test_a_base_that_no_adapter_fits_is_probed_alone(demo: tuple[Model, Context, Batch, BaseModel]) -> None:
    model, context, batch, base = demo
    assert trial(msgspec.structs.replace(base, architecture="mamba")) is None
    probe(model, context, batch, msgspec.structs.replace(base, architecture="mamba"))
    probe(model, context, batch, msgspec.structs.replace(base, n_ff=999))  # as where experts take the place of one network


@pytest.mark.parametrize("given", [{"n_gpu_layers": 0, "gpu_split": "row", "main_gpu": 1}, {"gpu_split": "none"}])
def test_without_the_gpu_no_device_is_as_much_as_started(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    """llama.cpp drops its devices for the main one -1 with no split, and hands no prompts to one without op_offload."""
    asked: dict[str, int] = {}
    load, make = ll.llama_model_load_from_file, ll.llama_init_from_model

    def loads(path: bytes, params: Any) -> Any:
        asked.update(split=params.split_mode, main=params.main_gpu)
        return load(path, params)

    def makes(model: Any, params: Any) -> Any:
        asked.update(offload=params.op_offload)
        return make(model, params)

    monkeypatch.setattr(ll, "llama_model_load_from_file", loads)
    monkeypatch.setattr(ll, "llama_init_from_model", makes)
    monkeypatch.setattr(bindings, "has_gpu", lambda: True)
    model = Model(demo_gguf, Settings(**given))
    Context(model, n_ctx=256, n_seq_max=1, n_batch=64).close()
    model.close()
    expected = {"split": 0, "main": -1, "offload": False} if given.get("n_gpu_layers") == 0 else {"split": 0, "main": 0, "offload": True}
    assert asked == expected


def test_a_gpu_computes_a_call_at_once(demo: tuple[Model, Context, Batch, BaseModel], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for on_gpu in (False, True):
        monkeypatch.setattr(demo[0], "on_gpu", on_gpu)
        context = Context(demo[0], n_ctx=1024, n_seq_max=1, n_batch=1024)
        parts.append(int(ll.llama_n_ubatch(context._handle)))
        context.close()
    assert parts == [512, 1024]


def _recurrent(path: Path, architecture: str, numbers: dict[str, int], heads: list[int], weights: dict[str, tuple[int, ...]]) -> Path:
    """A model of one layer, which reads and writes nothing."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("no_vocab")
    for name, number in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", number)
    writer.add_array(f"{architecture}.attention.head_count_kv", heads)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, shape in weights.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = {"context_length": 64, "vocab_size": 8, "embedding_length": 32, "block_count": 1}
NORMS = {"token_embd.weight": (8, 32), "blk.0.attn_norm.weight": (32,)}
MAMBA = {
    "output_norm.weight": (32,),
    "blk.0.ssm_in.weight": (128, 32),
    "blk.0.ssm_conv1d.weight": (64, 4),
    "blk.0.ssm_conv1d.bias": (64,),
    "blk.0.ssm_x.weight": (34, 64),
    "blk.0.ssm_dt.weight": (64, 2),
    "blk.0.ssm_dt.bias": (64,),
    "blk.0.ssm_a": (64, 16),
    "blk.0.ssm_d": (64,),
    "blk.0.ssm_out.weight": (32, 64),
}
LFM2 = {
    "token_embd_norm.weight": (32,),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (32, 32),
    "blk.0.ffn_up.weight": (32, 32),
    "blk.0.ffn_down.weight": (32, 32),
    "blk.0.shortconv.conv.weight": (32, 3),
    "blk.0.shortconv.in_proj.weight": (96, 32),
    "blk.0.shortconv.out_proj.weight": (32, 32),
}


@pytest.mark.parametrize(
    ("architecture", "numbers", "weights"),
    [
        ("mamba", {"ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16, "ssm.time_step_rank": 2}, MAMBA),
        ("lfm2", {"shortconv.l_cache": 3, "feed_forward_length": 32, "attention.head_count": 4}, LFM2),
    ],
)
def test_models_whose_state_cannot_be_shared_or_cut_are_refused(
    tmp_path: Path, architecture: str, numbers: dict[str, int], weights: dict[str, tuple[int, ...]]
) -> None:
    path = _recurrent(tmp_path / "model.gguf", architecture, SIZES | numbers, [0], NORMS | weights)
    with pytest.raises(SetupError, match=rf"recurrent.*{architecture}.*LORAYARD_MODEL"):
        Model(path)
