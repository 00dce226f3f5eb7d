"""llama.cpp as this project uses it: a model, its vocabulary, LoRA adapters beside it.

With `decoding.py` and `grammar.py` all that imports llama_cpp. Sizes and files are checked first, because a failed GGML_ASSERT ends the
process. One thread at a time may use what is made here, except `Model.tokenize`, which only reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp as ll
from numpy.typing import NDArray

from lorayard.adapters import BaseModel
from lorayard.errors import AdapterRejected, LorayardError, SetupError
from lorayard.settings import Settings

_MiB = 1024 * 1024
_LOG_ERROR, _LOG_CONTINUED = 4, 5  # GGML_LOG_LEVEL_ERROR and _CONT of ggml.h
FILE_TYPES = {"Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0, "F16": ll.LLAMA_FTYPE_MOSTLY_F16}

_SPLITS = {"none": ll.LLAMA_SPLIT_MODE_NONE, "layer": ll.LLAMA_SPLIT_MODE_LAYER, "row": ll.LLAMA_SPLIT_MODE_ROW}

said: deque[str] = deque(maxlen=4)  # llama.cpp's last complaints: the reason why a call returned NULL
_listening = False


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """What llama.cpp complains of meanwhile is for the caller to tell, by `complaint`, and is not printed beside that."""
    global _listening
    said.clear()
    _listening = True
    try:
        yield
    finally:
        _listening = False


def _make_log() -> Any:
    level_before = 0

    @ll.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        nonlocal level_before
        level = level_before if level == _LOG_CONTINUED else level
        level_before = level
        if level == _LOG_ERROR:
            line = text.decode("utf-8", "replace")
            said.append(line.strip())
            if not _listening:
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


def complaint() -> str:
    """What llama.cpp said last, and forget it."""
    text = "; ".join(line.split(": ", 1)[-1] for line in said)
    said.clear()
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
        raise SetupError(f"{source}: could not be converted to {file_type}: {complaint()}")


def has_gpu() -> bool:
    """Whether this build can compute on one, and there is one."""
    return bool(ll.llama_supports_gpu_offload())


class Model:
    """Weights and vocabulary of one GGUF file, placed as the settings say; `alive` is called now and then while it loads.

    Raises `SetupError`.
    """

    def __init__(self, path: Path, settings: Settings | None = None, alive: Callable[[], None] = lambda: None) -> None:
        check_gguf(path)
        settings = settings or Settings()
        self.path = path
        self.threads = settings.threads or _cores()
        params = ll.llama_model_default_params()
        params.use_extra_bufts = settings.repack
        params.n_gpu_layers = settings.n_gpu_layers
        params.main_gpu = settings.main_gpu
        params.split_mode = _SPLITS[settings.gpu_split]
        if settings.n_gpu_layers == 0:  # of no device: else each context starts all, and they compute prompts, wherever the weights lie
            params.split_mode, params.main_gpu = ll.LLAMA_SPLIT_MODE_NONE, -1
        self.on_gpu = settings.n_gpu_layers != 0 and has_gpu()
        if len(settings.gpu_shares) > int(ll.llama_max_devices()):
            raise SetupError(f"LORAYARD_GPU_SHARES: {len(settings.gpu_shares)} shares for {ll.llama_max_devices()} devices at most")
        self._shares = (ctypes.c_float * int(ll.llama_max_devices()))(*settings.gpu_shares)
        if settings.gpu_shares:
            params.tensor_split = self._shares

        def progress(_part: float, _data: ctypes.c_void_p) -> bool:
            alive()
            return True

        params.progress_callback = ll.llama_progress_callback(progress)
        with listening():
            self.handle = ll.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise SetupError(f"{path}: llama.cpp cannot load this model: {complaint()}")
        if not ll.llama_model_has_decoder(self.handle) or ll.llama_model_has_encoder(self.handle):
            raise SetupError(f"{path}: not a decoder-only language model; set LORAYARD_MODEL to one")
        if ll.llama_model_is_recurrent(self.handle) or ll.llama_model_is_hybrid(self.handle):
            raise SetupError(
                f"{path}: a recurrent model, or one with recurrent layers ({self.meta('general.architecture')}): what it has read cannot be"
                " shared between prompts or cut off; set LORAYARD_MODEL to one with attention in all layers"
            )
        self.vocab = ll.llama_model_get_vocab(self.handle)
        self.n_vocab = int(ll.llama_vocab_n_tokens(self.vocab))
        self.n_embd = int(ll.llama_model_n_embd(self.handle))
        self.n_ctx_train = int(ll.llama_model_n_ctx_train(self.handle))

    def close(self) -> None:
        """Free the weights; contexts and adapters must be gone."""
        if self.handle:
            ll.llama_model_free(self.handle)
            self.handle = None

    def meta(self, key: str) -> str | None:
        """A metadata value as text; None where the file has no such key."""
        size = ll.llama_model_meta_val_str(self.handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        ll.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
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
        for index in range(int(ll.llama_model_meta_count(self.handle))):
            if ll.llama_model_meta_key_by_index(self.handle, index, buffer, len(buffer)) >= 0:
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
        self._model = model
        with listening():
            self.handle = ll.llama_adapter_lora_init(model.handle, os.fsencode(path))
        if not self.handle:
            raise AdapterRejected(f"llama.cpp cannot load the adapter: {complaint()}")

    def tensors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A and B that are added to this weight of the model; None where there are none, or this build does not tell."""
        if _find_tensor is None or _find_pair is None:
            return None
        weight = _find_tensor(self._model.handle, name.encode())
        pair = _find_pair(self.handle, weight) if weight else None
        if not pair or not pair[0] or not pair[1]:
            return None
        return Tensor(pair[0]), Tensor(pair[1])

    def free(self) -> None:
        """No context may be bound to it."""
        if self.handle:
            ll.llama_adapter_lora_free(self.handle)
            self.handle = None
