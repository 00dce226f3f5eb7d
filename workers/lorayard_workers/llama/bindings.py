"""llama.cpp as this project uses it: a model, contexts on its weights, LoRA adapters, one batch layout.

The only module that imports llama_cpp. Sizes and files are checked here first, because a failed GGML_ASSERT ends the process.
One thread at a time may use what is made here, except `Model.tokenize`, which only reads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

from lorayard.adapters import BaseModel
from lorayard.errors import AdapterRejected, LorayardError, SetupError
from lorayard.settings import Settings

_MiB = 1024 * 1024
_LOG_ERROR, _LOG_CONTINUED = 3, 5
FILE_TYPES = {"Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0, "F16": ll.LLAMA_FTYPE_MOSTLY_F16}

_SPLITS = {"none": ll.LLAMA_SPLIT_MODE_NONE, "layer": ll.LLAMA_SPLIT_MODE_LAYER, "row": ll.LLAMA_SPLIT_MODE_ROW}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_KV_TYPES = {"f32": ll.GGML_TYPE_F32, "f16": ll.GGML_TYPE_F16, "q8_0": ll.GGML_TYPE_Q8_0, "q4_0": ll.GGML_TYPE_Q4_0}

_said: deque[str] = deque(maxlen=4)  # llama.cpp's last complaints: the reason why a call returned NULL


def _make_log() -> Any:
    level_before = 0

    @ll.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        nonlocal level_before
        level = level_before if level == _LOG_CONTINUED else level
        level_before = level
        if level == _LOG_ERROR:
            line = text.decode("utf-8", "replace")
            _said.append(line.strip())
            sys.stderr.write(line)

    return log


_log = _make_log()  # referenced for ever: llama.cpp keeps the pointer
ll.llama_log_set(_log, ctypes.c_void_p(0))
ll.llama_backend_init()


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of llama.cpp's libraries that llama_cpp has no name for; None where this build has none."""
    found = getattr(ll.llama_cpp._lib, name, None)
    if found is not None:
        found.restype, found.argtypes = result, arguments
    return found


_ggml_get_name = _function("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
_ggml_nbytes = _function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_ggml_set = _function("ggml_backend_tensor_set", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
# llama_model::get_tensor(const char *) const, and llama_adapter_lora::get_weight(ggml_tensor *), which returns a pair of pointers
_find_tensor = _function("_ZNK11llama_model10get_tensorEPKc", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_find_pair = _function(
    "_ZN18llama_adapter_lora10get_weightEP11ggml_tensor", ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_void_p
)


def _complaint() -> str:
    """What llama.cpp said last, and forget it."""
    text = "; ".join(line.split(": ", 1)[-1] for line in _said)
    _said.clear()
    return text or "llama.cpp gave no reason"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def weights_digest(path: Path) -> str:
    """`sha256:...` of a weights file's first and last MiB and its size: cheap, and as good as its content for files nobody forges."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_MiB)
        file.seek(max(size - _MiB, 0))
        digest = hashlib.sha256(head + file.read(_MiB) + str(size).encode())
    return f"sha256:{digest.hexdigest()}"


def check_gguf(path: Path) -> None:
    """Raise `SetupError` if the file is not there or is no GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SetupError(f"{path}: cannot read the model ({error.strerror}); set LORAYARD_MODEL to a GGUF file") from None
    if magic != b"GGUF":
        raise SetupError(f"{path} is not a GGUF file; set LORAYARD_MODEL to a GGUF file")


def quantize(source: Path, target: Path, file_type: str) -> None:
    """Write `source` as `file_type` (a key of FILE_TYPES) into `target`, from whatever type it has. Raises `SetupError`."""
    check_gguf(source)
    params = ll.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.allow_requantize = True
    if ll.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        raise SetupError(f"{source}: could not be converted to {file_type}: {_complaint()}")


class Model:
    """Weights and vocabulary of one GGUF file, placed as the settings say. `repack`: ggml's repacked CPU kernels. Raises `SetupError`."""

    def __init__(self, path: Path, settings: Settings | None = None, *, repack: bool | None = None) -> None:
        check_gguf(path)
        settings = settings or Settings()
        self.path = path
        self.threads = settings.threads or _cores()
        params = ll.llama_model_default_params()
        params.use_extra_bufts = settings.repack if repack is None else repack
        params.n_gpu_layers = settings.n_gpu_layers
        params.main_gpu = settings.main_gpu
        params.split_mode = _SPLITS[settings.gpu_split]
        if len(settings.gpu_shares) > int(ll.llama_max_devices()):
            raise SetupError(f"LORAYARD_GPU_SHARES: {len(settings.gpu_shares)} shares for {ll.llama_max_devices()} devices at most")
        self._shares = (ctypes.c_float * int(ll.llama_max_devices()))(*settings.gpu_shares)
        if settings.gpu_shares:
            params.tensor_split = self._shares
        _said.clear()
        self._handle = ll.llama_model_load_from_file(os.fsencode(path), params)
        if not self._handle:
            raise SetupError(f"{path}: llama.cpp cannot load this model: {_complaint()}")
        if not ll.llama_model_has_decoder(self._handle) or ll.llama_model_has_encoder(self._handle):
            raise SetupError(f"{path}: not a decoder-only language model; set LORAYARD_MODEL to one")
        self.vocab = ll.llama_model_get_vocab(self._handle)
        self.n_vocab = int(ll.llama_vocab_n_tokens(self.vocab))
        self.n_embd = int(ll.llama_model_n_embd(self._handle))
        self.n_ctx_train = int(ll.llama_model_n_ctx_train(self._handle))

    def close(self) -> None:
        """Free the weights; contexts and adapters must be gone."""
        if self._handle:
            ll.llama_model_free(self._handle)
            self._handle = None

    def meta(self, key: str) -> str | None:
        """A metadata value as text; None where the file has no such key."""
        size = ll.llama_model_meta_val_str(self._handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        ll.llama_model_meta_val_str(self._handle, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    @cached_property
    def chat_template(self) -> str | None:
        return self.meta("tokenizer.chat_template")

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each token adds to an answer; control tokens add none."""
        return [self._piece(token, special=False) for token in range(self.n_vocab)]

    @cached_property
    def max_token_bytes(self) -> int:
        return max(map(len, self.pieces))

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return frozenset(token for token in range(self.n_vocab) if ll.llama_vocab_is_eog(self.vocab, token))

    @cached_property
    def bos(self) -> int | None:
        """The token every prompt begins with, if the model wants one."""
        token = int(ll.llama_vocab_bos(self.vocab))
        return token if token >= 0 and ll.llama_vocab_get_add_bos(self.vocab) else None

    def special_text(self, kind: str) -> str:
        """Text of the `bos` or `eos` token, for chat templates; empty where the model has none."""
        token = int((ll.llama_vocab_bos if kind == "bos" else ll.llama_vocab_eos)(self.vocab))
        return self._piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written = int(ll.llama_token_to_piece(self.vocab, token, buffer, size, 0, special))
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    def tokenize(self, text: bytes) -> list[int]:
        """Tokens of UTF-8 text, begun with BOS where the model wants it; the text of special tokens becomes those tokens."""
        room = len(text) + 8
        buffer = (ll.llama_token * room)()
        count = int(ll.llama_tokenize(self.vocab, text, len(text), buffer, room, False, True))
        if count < 0:
            raise LorayardError("the text could not be tokenized", code="tokenize_failed")
        tokens = list(buffer[:count])
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]

    def base(self, names: list[str]) -> BaseModel:
        """What adapters and clients must know of this model. `names`: what adapters trained on it may call it, besides its own name."""
        metadata = {key: value for key in self._keys() if not key.startswith("tokenizer.") and (value := self.meta(key)) is not None}
        own = [name for name in (metadata.get("general.name"), self.path.stem) if name]
        accepted = list(dict.fromkeys([*names, *own]))
        return BaseModel.from_metadata(
            {"general.name": self.path.stem, **metadata}, n_vocab=self.n_vocab, names=accepted, digest=weights_digest(self.path)
        )

    def _keys(self) -> Iterator[str]:
        buffer = ctypes.create_string_buffer(512)
        for index in range(int(ll.llama_model_meta_count(self._handle))):
            if ll.llama_model_meta_key_by_index(self._handle, index, buffer, len(buffer)) >= 0:
                yield buffer.value.decode("utf-8", "replace")


class Tensor:
    """A tensor of llama.cpp's, wherever its numbers lie."""

    def __init__(self, pointer: int) -> None:
        self._pointer = ctypes.c_void_p(pointer)
        self.name = _ggml_get_name(self._pointer).decode("utf-8", "replace")
        self.n_bytes = int(_ggml_nbytes(self._pointer))

    def write(self, data: NDArray[Any]) -> None:
        """Overwrite all of it with an array of the same size."""
        if data.nbytes != self.n_bytes or not data.flags.c_contiguous:
            raise ValueError(f"{self.name}: {data.nbytes} bytes for {self.n_bytes}")
        _ggml_set(self._pointer, data.ctypes.data, 0, data.nbytes)


class LoraAdapter:
    """A LoRA adapter of a checked file, loaded beside a model's weights. Load and free between decode calls, on the decoding thread.

    Raises `AdapterRejected` when it was made for another base.
    """

    def __init__(self, model: Model, path: Path) -> None:
        _said.clear()
        self._model = model
        self.handle = ll.llama_adapter_lora_init(model._handle, os.fsencode(path))
        if not self.handle:
            raise AdapterRejected(f"llama.cpp cannot load the adapter: {_complaint()}")

    def tensors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A and B that are added to this weight of the model; None where there are none, or this build does not tell."""
        if _find_tensor is None or _find_pair is None:
            return None
        weight = _find_tensor(self._model._handle, name.encode())
        pair = _find_pair(self.handle, weight) if weight else None
        if not pair or not pair[0] or not pair[1]:
            return None
        return Tensor(pair[0]), Tensor(pair[1])

    def free(self) -> None:
        """No context may be bound to it."""
        if self.handle:
            ll.llama_adapter_lora_free(self.handle)
            self.handle = None


class Batch:
    """Input of one decode call: up to `capacity` tokens, filled through numpy views on llama.cpp's own arrays."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.raw = ll.llama_batch_init(capacity, 0, 1)
        view = np.ctypeslib.as_array
        self._token = view(self.raw.token, (capacity,))
        self._pos = view(self.raw.pos, (capacity,))
        self._logits = view(self.raw.logits, (capacity,))
        # each token's list of sequences has one entry of its own; the pointers are set once, to rows of one array
        self._seq = np.zeros(capacity, np.int32)
        row = ctypes.POINTER(ctypes.c_int32)
        self._rows_before = [ctypes.addressof(self.raw.seq_id[i].contents) for i in range(capacity)]
        for i in range(capacity):
            self.raw.seq_id[i] = ctypes.cast(self._seq.ctypes.data + 4 * i, row)
        view(self.raw.n_seq_id, (capacity,))[:] = 1
        self.clear()

    def clear(self) -> None:
        self.size = 0
        self.outputs = 0

    def add(self, seq: int, pos: int, tokens: list[int], *, want_logits: bool) -> None:
        """Append `tokens` of sequence `seq` at positions from `pos`; logits, if wanted, are those after the last token."""
        start, end = self.size, self.size + len(tokens)
        if not tokens or end > self.capacity:
            raise ValueError(f"{len(tokens)} tokens do not fit a batch with {self.capacity - start} places left")
        self._token[start:end] = tokens
        self._pos[start:end] = np.arange(pos, pos + len(tokens))
        self._seq[start:end] = seq
        self._logits[start:end] = 0
        self._logits[end - 1] = want_logits
        self.size = end
        self.outputs += want_logits

    def add_steps(self, sequences: list[int], positions: list[int], tokens: list[int]) -> None:
        """Append one token of each of these sequences, with logits."""
        start, end = self.size, self.size + len(tokens)
        if end > self.capacity:
            raise ValueError(f"{len(tokens)} tokens do not fit a batch with {self.capacity - start} places left")
        self._token[start:end] = tokens
        self._pos[start:end] = positions
        self._seq[start:end] = sequences
        self._logits[start:end] = 1
        self.size = end
        self.outputs += len(tokens)

    def used(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and sequence ids added so far."""
        return self._token[: self.size], self._seq[: self.size]

    def free(self) -> None:
        if self.capacity:
            row = ctypes.POINTER(ctypes.c_int32)
            for i, address in enumerate(self._rows_before):
                self.raw.seq_id[i] = ctypes.cast(address, row)
            ll.llama_batch_free(self.raw)
            self.capacity = 0


class Context:
    """KV cells and compute buffers on a model's weights, bound to at most one adapter. All sequences share one pool of `n_ctx` cells.

    `embeddings`: it is for `embed` alone.
    """

    EMBEDDED = 64  # tokens that `embed` computes in one call: each costs a row of logits that nobody reads

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_seq_max: int,
        n_batch: int,
        kv_type: str = "f16",
        flash_attn: str = "auto",
        embeddings: bool = False,
    ) -> None:
        params = ll.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_seq_max = n_seq_max
        params.n_batch = n_batch
        params.n_ubatch = min(n_batch, 512)
        params.n_outputs_max = n_seq_max  # one row of logits a sequence: otherwise room for n_batch rows is reserved
        params.n_threads = params.n_threads_batch = model.threads
        params.kv_unified = True
        params.flash_attn_type = _FLASH[flash_attn]
        params.type_k = params.type_v = _KV_TYPES[kv_type]
        if embeddings:
            params.embeddings, params.pooling_type, params.n_outputs_max = True, ll.LLAMA_POOLING_TYPE_NONE, n_batch
        params.no_perf = True
        _said.clear()
        self._handle = ll.llama_init_from_model(model._handle, params)
        if not self._handle:
            raise SetupError(f"no room for a context of {n_ctx} cells ({_complaint()}); lower LORAYARD_N_CTX or LORAYARD_CONTEXTS")
        self._memory = ll.llama_get_memory(self._handle)
        self._model = model
        self.n_seq_max = n_seq_max
        self.n_batch = n_batch
        self.n_ctx = int(ll.llama_n_ctx(self._handle))

    def bind(self, adapter: LoraAdapter | None) -> None:
        """Compute with this adapter, or the bare base, from now on. What the KV holds was computed with another: it is cleared."""
        self.clear()
        if adapter is None:
            ll.llama_set_adapters_lora(self._handle, None, 0, None)
        else:
            handles = (ll.llama_adapter_lora_p_ctypes * 1)(adapter.handle)
            ll.llama_set_adapters_lora(self._handle, handles, 1, (ctypes.c_float * 1)(1.0))

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Compute; returns logits (batch.outputs, n_vocab), a view that the next decode overwrites.

        Raises `LorayardError` (`decode_failed`) after which the context must be cleared.
        """
        self._run(batch)
        if not batch.outputs:
            ll.llama_synchronize(self._handle)
            return np.empty((0, self._model.n_vocab), np.float32)
        return np.ctypeslib.as_array(ll.llama_get_logits(self._handle), (batch.outputs, self._model.n_vocab))

    def _run(self, batch: Batch) -> None:
        tokens, sequences = batch.used()
        if not 0 < batch.size <= self.n_batch or batch.outputs > self.n_seq_max:
            raise ValueError(f"a batch of {batch.size} tokens and {batch.outputs} outputs does not fit the context")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._model.n_vocab or int(sequences.max()) >= self.n_seq_max:
            raise ValueError("token or sequence id out of range")
        batch.raw.n_tokens = batch.size
        code = ll.llama_decode(self._handle, batch.raw)
        if code != 0:
            raise LorayardError(f"llama_decode returned {code}: {_complaint()}", code="decode_failed")

    def embed(self, tokens: list[int], batch: Batch) -> NDArray[np.float32]:
        """The embedding of a text (n_embd,): the mean of its tokens' last hidden states, of length 1. Clears the context."""
        total = np.zeros(self._model.n_embd, np.float64)
        self.clear()
        for start in range(0, len(tokens), self.EMBEDDED):
            part = tokens[start : start + self.EMBEDDED]
            batch.clear()
            batch.add(0, start, part, want_logits=False)
            self._run(batch)
            rows = np.ctypeslib.as_array(ll.llama_get_embeddings(self._handle), (len(part), self._model.n_embd))
            total += rows.sum(axis=0, dtype=np.float64)
        self.clear()
        return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target`, which is empty, have the first `length` cells of `source` too: nothing is computed, nothing moves."""
        ll.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, seq: int, length: int) -> None:
        """Let go of all cells of a sequence but its first `length`."""
        ll.llama_memory_seq_rm(self._memory, seq, length, -1)

    def save(self, seq: int) -> bytes:
        """What a sequence's cells hold."""
        size = int(ll.llama_state_seq_get_size(self._handle, seq))
        buffer = (ctypes.c_uint8 * size)()
        ll.llama_state_seq_get_data(self._handle, buffer, size, seq)
        return bytes(buffer)

    def restore(self, seq: int, cells: bytes) -> None:
        """Give a sequence cells of its own that hold what another had. Raises `LorayardError` when too few are free."""
        buffer = (ctypes.c_uint8 * len(cells)).from_buffer_copy(cells)
        if not ll.llama_state_seq_set_data(self._handle, buffer, len(cells), seq):
            raise LorayardError(f"cells could not be restored: {_complaint()}", code="decode_failed")

    def remove(self, seq: int) -> None:
        """Free the cells of a sequence."""
        ll.llama_memory_seq_rm(self._memory, seq, -1, -1)

    def clear(self, *, data: bool = False) -> None:
        """Free all cells; `data` also overwrites them, which matters only where they hold what is not a number."""
        ll.llama_memory_clear(self._memory, data)

    def close(self) -> None:
        if self._handle:
            ll.llama_free(self._handle)
            self._handle = None
