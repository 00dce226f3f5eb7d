"""Decode calls of llama.cpp: the layout of a batch, and contexts, which compute it. As `bindings.py`, from one thread at a time."""

from __future__ import annotations

import ctypes

import llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

from lorayard.errors import LorayardError, SetupError
from lorayard_workers.llama.bindings import LoraAdapter, Model, complaint, listening

MOST_SEQUENCES = int(ll.llama_max_parallel_sequences())  # that one context can have
_FLASH = {"auto": -1, "off": 0, "on": 1}
_KV_TYPES = {"f32": ll.GGML_TYPE_F32, "f16": ll.GGML_TYPE_F16, "q8_0": ll.GGML_TYPE_Q8_0, "q4_0": ll.GGML_TYPE_Q4_0}


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
        params.n_ubatch = n_batch if model.on_gpu else min(n_batch, 512)
        params.op_offload = model.on_gpu
        params.n_outputs_max = n_seq_max  # one row of logits a sequence: otherwise room for n_batch rows is reserved
        params.n_threads = params.n_threads_batch = model.threads
        params.kv_unified = True
        params.flash_attn_type = _FLASH[flash_attn]
        params.type_k = params.type_v = _KV_TYPES[kv_type]
        if embeddings:
            params.embeddings, params.pooling_type, params.n_outputs_max = True, ll.LLAMA_POOLING_TYPE_NONE, n_batch
        params.no_perf = True
        with listening():
            self._handle = ll.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise SetupError(f"no room for a context of {n_ctx} cells ({complaint()}); lower LORAYARD_N_CTX or LORAYARD_CONTEXTS")
        self._memory = ll.llama_get_memory(self._handle)
        self._model = model
        self.n_seq_max = n_seq_max
        self._n_outputs = int(params.n_outputs_max)
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
        if not 0 < batch.size <= self.n_batch or batch.outputs > self._n_outputs:
            raise ValueError(f"a batch of {batch.size} tokens and {batch.outputs} outputs does not fit the context")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._model.n_vocab or int(sequences.max()) >= self.n_seq_max:
            raise ValueError("token or sequence id out of range")
        batch.raw.n_tokens = batch.size
        code = ll.llama_decode(self._handle, batch.raw)
        if code != 0:
            raise LorayardError(f"llama_decode returned {code}: {complaint()}", code="decode_failed")

    def embed(self, start: int, part: list[int], batch: Batch) -> NDArray[np.float64]:
        """The sum (n_embd,) of the last hidden states of a part of a text: its tokens from `start`, before which all have been computed.

        At 0 another text begins: the context is cleared.
        """
        if not start:
            self.clear()
        batch.clear()
        batch.add_steps([0] * len(part), list(range(start, start + len(part))), part)
        self._run(batch)
        rows = np.ctypeslib.as_array(ll.llama_get_embeddings(self._handle), (len(part), self._model.n_embd))
        return np.asarray(rows.sum(axis=0, dtype=np.float64))

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
            raise LorayardError(f"cells could not be restored: {complaint()}", code="decode_failed")

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
