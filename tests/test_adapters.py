"""Reading and checking adapters: what is accepted means the same in every form, and what is refused is refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_adapters
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from lorayard.adapters.manifest import BaseModel
from lorayard.adapters.peft import PeftAdapter, build_adapter, check_fit, read_adapter
from lorayard.adapters.tensors import Tensor
from lorayard.errors import AdapterRejected, SetupError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def base(**changes: Any) -> BaseModel:
    sizes = {"n_layer": 30, "n_embd": 576, "n_head": 9, "n_head_kv": 3, "n_ff": 1536, "n_vocab": 49152, "n_ctx_train": 8192}
    words = {"architecture": "llama", "name": "demo", "names": [synthetic_adapters.BASE_NAME], "digest": "d"}
    return BaseModel(**(sizes | words | changes))


def small_config(**options: Any) -> bytes:
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/tiny", "r": 2, "lora_alpha": 4}
    return json.dumps(plain | options).encode()


def small_tensors(rank: int = 2) -> dict[str, NDArray[Any]]:
    return {
        f"{Q0}.lora_A.weight": np.full((rank, 8), 0.5, np.float32),
        f"{Q0}.lora_B.weight": np.full((6, rank), 0.25, np.float32),
    }


def small(rank: int = 2, **options: Any) -> PeftAdapter:
    return build_adapter({CONFIG: small_config(**options), WEIGHTS: save(small_tensors(rank))})


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def rejected(source: Any, *words: str, max_bytes: int = 1 << 24) -> None:
    """It is refused, and the message has each of the words."""
    with pytest.raises(AdapterRejected) as caught:
        read_adapter(source, max_bytes=max_bytes)
    for word in words:
        assert word.lower() in caught.value.message.lower()


GOOD = {CONFIG: small_config(), WEIGHTS: save(small_tensors())}


def test_importing_needs_base_dependencies_only() -> None:
    heavy = ["numpy", "safetensors", "gguf", "obstore", "llama_cpp", "fastapi"]
    code = f"import lorayard.adapters, sys; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folder_and_zips_of_one_adapter_have_one_digest(tmp_path: Path) -> None:
    folder = synthetic_adapters.write("patterns", tmp_path / "it")
    files = synthetic_adapters.files("patterns")
    want = read_adapter(folder).digest
    (folder / "README.md").write_text("about")
    (folder / "card.json").write_text('{"score": 0.8}')
    (folder / "training_args.bin").write_bytes(b"\x80\x02}q\x00.")
    assert read_adapter(folder).digest == want
    assert read_adapter(folder).card == {"score": 0.8}
    (tmp_path / "it.zip").write_bytes(zipped(files, zipfile.ZIP_STORED))
    assert read_adapter(str(tmp_path / "it.zip")).digest == want
    assert read_adapter(zipped({f"it/{name}": data for name, data in files.items()} | {"__MACOSX/x": b""})).digest == want


def test_the_digest_is_of_the_meaning() -> None:
    want = small().digest
    assert small(peft_version="9", target_modules=["x"], revision="main", use_rslora=False, rank_pattern={}).digest == want
    assert small(alpha_pattern={"q_proj": 4}, lora_alpha=9).digest == want  # worded otherwise, the same numbers
    reordered = dict(reversed(small_tensors().items()))
    assert build_adapter({CONFIG: small_config(), WEIGHTS: save(reordered, metadata={"format": "pt"})}).digest == want
    others = [small(lora_alpha=5), small(use_rslora=True), small(base_model_name_or_path="org/other"), small(rank=1, r=1)]
    changed = small_tensors()
    changed[f"{Q0}.lora_A.weight"][0, 0] = 0.75
    others.append(build_adapter({CONFIG: small_config(), WEIGHTS: save(changed)}))
    assert len({want, *(other.digest for other in others)}) == 6


def test_what_it_writes_reads_back_the_same(tmp_path: Path) -> None:
    for variant in synthetic_adapters.VARIANTS:
        adapter = build_adapter(synthetic_adapters.files(variant))
        written = {CONFIG: adapter.config_file(), WEIGHTS: adapter.weights_file()}
        assert build_adapter(written).digest == adapter.digest
        theirs = load(written[WEIGHTS])  # the real library reads what we write
        want = synthetic_adapters.tensors(variant)
        assert theirs.keys() == want.keys()
        assert all(np.array_equal(theirs[name], want[name]) for name in want)
        assert json.loads(written[CONFIG])["lora_alpha"] == adapter.config.lora_alpha


def test_bfloat16_and_float16_are_read_exactly() -> None:
    numbers = np.array([[1.5, -0.0078125, 3e38, 0.0]], np.float32)
    upper = (numbers.view(np.uint32) >> 16).astype("<u2")
    assert np.array_equal(
        Tensor("BF16", (1, 4), memoryview(upper.tobytes())).float32(), (upper.astype(np.uint32) << 16).view(np.float32).reshape(1, 4)
    )
    half = np.array([[0.1, -2.5]], "<f2")
    assert np.array_equal(Tensor("F16", (1, 2), memoryview(half.tobytes())).float32(), half.astype(np.float32))


def test_scales_follow_peft() -> None:
    assert small().modules[0].scale == 2
    assert small(rank=4, use_rslora=True, r=4).modules[0].scale == 2
    assert small(alpha_pattern={"k_proj": 1, r"layers\.[0-3]\..*q_proj": 7, "q_proj": 9}).modules[0].scale == 3.5
    # a name must match a whole path component, as PEFT has it
    assert small(alpha_pattern={"proj": 100}).modules[0].scale == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("use_dora", True), ("lora_bias", True), ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("bias", "all")),
        *(("layer_replication", [[0, 4]]), ("alora_invocation_tokens", [1]), ("trainable_token_indices", [3]), ("use_qalora", True)),
        *(("target_parameters", ["x"]), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("peft_type", "IA3")),
        *(("task_type", "SEQ_CLS"), ("r", 0), ("r", "8"), ("r", None), ("lora_alpha", 0), ("lora_alpha", None), ("r", True)),
        *(("base_model_name_or_path", None), ("base_model_name_or_path", " "), ("rank_pattern", {"q_proj": 0}), ("kasa_config", {"a": 1})),
        *(("use_something_new", True), ("alpha_pattern", {"(a+)+": 1}), ("alpha_pattern", {"[": 1}), ("alpha_pattern", {".*.*.*.*q": 1})),
        ("rank_pattern", {"q_proj": 3}),
    ],
)
def test_options_that_would_run_wrong_are_refused(option: str, value: Any) -> None:
    with pytest.raises(AdapterRejected) as caught:
        small(**{option: value})
    assert "rank" in caught.value.message or option.split("_")[0] in caught.value.message or "pattern" in caught.value.message


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "lora_bias"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
        ("base_model.model.lm_head.lora_A.weight", "output head"),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", "q_proj"),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", "served"),
        ("base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight", "experts"),
        ("whatever", "served"),
    ],
)
def test_unknown_tensors_are_refused_by_name(name: str, word: str) -> None:
    with pytest.raises(AdapterRejected, match=word) as caught:
        build_adapter({CONFIG: small_config(), WEIGHTS: save(small_tensors() | {name: np.ones((1, 1), np.float32)})})
    assert name in caught.value.message


def test_broken_tensors_are_refused() -> None:
    def weights(tensors: dict[str, NDArray[Any]]) -> dict[str, bytes]:
        return {CONFIG: small_config(), WEIGHTS: save(tensors)}

    a, b = small_tensors().values()
    pairs = {
        "no lora_B": {f"{Q0}.lora_A.weight": a},
        "no lora_A": {f"{Q0}.lora_B.weight": b},
        "of rank 2": {f"{Q0}.lora_A.weight": a, f"{Q0}.lora_B.weight": np.ones((6, 3), np.float32)},
        "not finite": {f"{Q0}.lora_A.weight": a * np.float32("nan"), f"{Q0}.lora_B.weight": b},
        "two sides": {f"{Q0}.lora_A.weight": a.reshape(-1), f"{Q0}.lora_B.weight": b},
        "float32": {f"{Q0}.lora_A.weight": a.astype(np.int32), f"{Q0}.lora_B.weight": b},
        "no LoRA tensors": {},
    }
    for message, tensors in pairs.items():
        with pytest.raises(AdapterRejected, match=message):
            build_adapter(weights(tensors))


def raw(entries: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"\x80\x02}q\x00.",
            b"PK\3\4" + bytes(60),
            b"GGUF" + bytes(60),
            struct.pack("<Q", 1 << 62) + b"{}",
            struct.pack("<Q", 2) + b"[]",
        ),
        raw({"a": entry(0, 16, [2, 2]), "b": entry(8, 24, [2, 2])}, bytes(24)),  # overlap
        raw({"a": entry(0, 16, [2, 2]), "b": entry(20, 36, [2, 2])}, bytes(36)),  # hole
        raw({"a": entry(0, 16, [2, 2])}, bytes(20)),  # bytes of nobody
        raw({"a": entry(0, 16, [2, 2])}, bytes(12)),  # past the end
        raw({"a": entry(0, 16, [2, 3])}, bytes(16)),  # shape and bytes differ
        raw({"a": entry(0, 16, [-2, -2])}, bytes(16)),
        raw({"a": entry(0, 16, [1 << 40, 1 << 40])}, bytes(16)),
        raw({"a": entry(-16, 0, [2, 2])}, bytes(16)),
        raw({"a": entry(0, 16, [2, 2]) | {"shape": "xx"}}, bytes(16)),
        struct.pack("<Q", 5 << 20) + b"{" + b" " * (5 << 20) + b"}",
        struct.pack("<Q", 40_000) + b'{"a":' * 8_000,  # nesting
    ],
)
def test_hostile_headers_are_refused(data: bytes) -> None:
    rejected(zipped({CONFIG: small_config(), WEIGHTS: data}), "adapter_model.safetensors")


def test_missing_and_pickled_files_are_refused(tmp_path: Path) -> None:
    rejected(tmp_path, "adapter_config.json is missing")
    (tmp_path / CONFIG).write_bytes(small_config())
    rejected(tmp_path, "adapter_model.safetensors is missing")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    rejected(tmp_path, "pickled", "safe_serialization")
    rejected(tmp_path / "nothing", "no such file")
    rejected("a\0b", "zip")
    rejected(b"\x80\x02}q\x00.", "pickle")
    rejected(b"", "not a zip")


def test_links_and_pipes_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(save(small_tensors()))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / CONFIG).write_bytes(small_config())
    (folder / WEIGHTS).symlink_to(outside)
    rejected(folder, "link", "cp -L")
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    rejected(folder, "plain file")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..\\x", "C:x", "a\nb", "a\u202eb"])
def test_zip_slip_is_refused_even_in_ignored_files(name: str) -> None:
    rejected(zipped({**GOOD, name: b"x"}), "unsafe path")


def with_entry(change: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in GOOD.items():
            info = zipfile.ZipInfo(name)
            change(info)
            archive.writestr(info, data)
    return out.getvalue()


def test_hostile_archives_are_refused() -> None:
    rejected(with_entry(lambda info: setattr(info, "external_attr", (stat.S_IFLNK | 0o777) << 16)), "link")
    rejected(with_entry(lambda info: setattr(info, "compress_type", zipfile.ZIP_BZIP2)), "deflate")
    rejected(zipped({**GOOD, **{f"x{i}": b"" for i in range(300)}}), "files")
    rejected(zipped({f"x{i}": b"" for i in range(10_000)}), "too many files")
    rejected(zipped({f"{folder}/{name}": data for folder in "ab" for name, data in GOOD.items()}), "2 adapters")
    rejected(zipped({CONFIG: b'{"a":"' + b"x" * (2 << 20) + b'"}', WEIGHTS: b"x"}), "1,048,576")
    rejected(zipped(GOOD)[:-40], "zip")
    encrypted = bytearray(zipped(GOOD))
    at = encrypted.rfind(b"PK\1\2")
    encrypted[at + 8] |= 1
    rejected(bytes(encrypted), "password")


def test_bombs_are_refused_while_they_inflate() -> None:
    bomb = zipped({CONFIG: small_config(), WEIGHTS: bytes(8 << 20)})
    assert len(bomb) < 16_384
    rejected(bomb, "bomb")
    rejected(zipped({CONFIG: small_config(), WEIGHTS: os.urandom(1 << 16)}), "bytes", max_bytes=1 << 15)
    # what the directory claims is not believed
    lying = bytearray(bomb)
    at = lying.rfind(b"PK\1\2")
    lying[at + 24 : at + 28] = struct.pack("<L", 100)
    rejected(bytes(lying))


def test_zip_with_the_same_file_twice_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(CONFIG, GOOD[CONFIG])
        archive.writestr(WEIGHTS, GOOD[WEIGHTS])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(CONFIG, GOOD[CONFIG])
    rejected(out.getvalue(), "twice")


SOUND_ZIP = zipped(GOOD, zipfile.ZIP_STORED)
SOUND_WEIGHTS = GOOD[WEIGHTS]


def survives(source: bytes) -> None:
    """Accepted or refused, never anything else."""
    with contextlib.suppress(AdapterRejected):
        read_adapter(source, max_bytes=1 << 20)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND_ZIP) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 60))
def test_any_damaged_zip_is_refused_or_read(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(SOUND_ZIP)
    for at, value in changes:
        data[at] = value
    survives(bytes(data[: len(data) - cut] if cut < 20 else data))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND_WEIGHTS) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.binary(max_size=9))
def test_any_damaged_safetensors_is_refused_or_read(changes: list[tuple[int, int]], more: bytes) -> None:
    data = bytearray(SOUND_WEIGHTS)
    for at, value in changes:
        data[at] = value
    survives(zipped({CONFIG: small_config(), WEIGHTS: bytes(data) + more}, zipfile.ZIP_STORED))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NUMBER = st.sampled_from([0, 1, 2, 8, 16, 48, 64, 112, -1, 1 << 31, 1 << 63, 1 << 70]) | st.integers()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", ""]),
        "shape": st.lists(NUMBER, max_size=3),
        "data_offsets": st.lists(NUMBER, min_size=1, max_size=3),
    }
)
NAME = st.sampled_from([*small_tensors(), "__metadata__", f"{Q0}.lora_B.bias"]) | st.text(max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAME, ENTRY | JSON, max_size=4), st.binary(max_size=130))
def test_any_safetensors_header_is_refused_or_read(header: dict[str, Any], body: bytes) -> None:
    survives(zipped({CONFIG: small_config(), WEIGHTS: raw(header, body)}))


OPTION = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "bias",
        "init_lora_weights",
        "base_model_name_or_path",
        "target_modules",
    ]
)
PATTERNS = st.dictionaries(st.text("aq_proj.*+()[]|\\d^$?{}0", max_size=30), st.integers(-1, 3) | st.floats(), max_size=3)


@settings(max_examples=300, deadline=2_000)
@given(st.dictionaries(OPTION | st.text(max_size=5), JSON | PATTERNS, max_size=4))
def test_any_config_is_refused_or_read(options: dict[str, Any]) -> None:
    survives(zipped({CONFIG: small_config(**options), WEIGHTS: SOUND_WEIGHTS}))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_zip(data: bytes) -> None:
    survives(data)
    survives(data + b"PK\5\6" + bytes(18))


def test_fit_is_checked_by_name() -> None:
    adapter = build_adapter(synthetic_adapters.files("plain"))
    check_fit(adapter, base())
    check_fit(adapter, base(names=["/models/smollm2-135m-INSTRUCT/"]))  # the last component, in any case
    with pytest.raises(AdapterRejected, match="LORAYARD_MODEL_NAMES") as caught:
        check_fit(adapter, base(names=["meta-llama/Llama-3.1-8B-Instruct"]))
    assert synthetic_adapters.BASE_NAME in caught.value.message
    assert "meta-llama/Llama-3.1-8B-Instruct" in caught.value.message


@pytest.mark.parametrize("change", [{"n_layer": 29}, {"n_embd": 1024}, {"n_head_kv": 9}, {"n_ff": 1024}, {"n_embd_head": 128}])
def test_fit_is_checked_by_shape(change: dict[str, int]) -> None:
    with pytest.raises(AdapterRejected, match=r"another model|29 layers") as caught:
        check_fit(build_adapter(synthetic_adapters.files("plain")), base(**change))
    assert caught.value.code == "adapter_base_mismatch"


def test_base_model_from_metadata() -> None:
    metadata = {
        "general.architecture": "qwen3",
        "qwen3.block_count": "28",
        "qwen3.embedding_length": "1024",
        "qwen3.attention.head_count": "16",
        "qwen3.attention.head_count_kv": "8",
        "qwen3.attention.key_length": "128",
        "qwen3.feed_forward_length": "3072",
        "qwen3.context_length": "40960",
    }
    made = BaseModel.from_metadata(metadata, n_vocab=7, names=["Qwen/Qwen3-0.6B"], digest="x")
    assert (made.n_layer, made.head_dim, made.n_head_kv, made.name) == (28, 128, 8, "qwen3")
    for broken in ({"qwen3.feed_forward_length": "[1, 2]"}, {"general.architecture": "other"}):
        with pytest.raises(SetupError):
            BaseModel.from_metadata(metadata | broken, n_vocab=7, names=[], digest="x")
