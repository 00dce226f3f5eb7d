"""The safetensors format, read strictly and without trust, and written in one canonical form.

Read here and not by the library, because the numbers of a stranger's header are to be judged before anything is allocated, bfloat16
must survive (numpy has none), and what is written must be the same bytes for the same tensors everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from lorayard.errors import AdapterRejected

_HEADER_BYTES = 4 << 20
_TENSORS = 20_000
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Tensor(msgspec.Struct, frozen=True):
    """A matrix as it lies in the file: little-endian rows."""

    dtype: str  # F32, F16 or BF16
    shape: tuple[int, int]
    data: memoryview

    def float32(self) -> NDArray[np.float32]:
        """Exactly the same numbers, shape (rows, columns)."""
        if self.dtype == "BF16":
            # A bfloat16 is the upper half of a float32.
            flat = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(self.data, "<f4" if self.dtype == "F32" else "<f2").astype(np.float32)
        return flat.reshape(self.shape)


def parse(data: bytes) -> dict[str, Tensor]:
    """All tensors by name, as views of `data`; every byte after the header belongs to exactly one. Raises `AdapterRejected`."""
    entries, start = _header(data)
    body = memoryview(data)[start:]
    found: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        found[name] = _tensor(name, entry, body, end)
        end = entry.data_offsets[1]
    if end != len(body):
        raise _broken(f"{len(body) - end:,} bytes belong to no tensor")
    return found


def _broken(what: str) -> AdapterRejected:
    return AdapterRejected(f"adapter_model.safetensors: {what}; save the adapter again", code="adapter_tensors")


def _header(data: bytes) -> tuple[dict[str, _Entry], int]:
    # A safetensors file has "{" as its ninth byte, so nothing sound is refused by these magics.
    if data[8:9] != b"{" and (data[:1] == b"\x80" or data[:4] in (b"PK\3\4", b"GGUF")):
        raise AdapterRejected(
            "adapter_model.safetensors: holds a pickle or another format under this name; save it with safe_serialization=True",
            code="adapter_pickle",
        )
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise _broken("cut short, or not safetensors")
    if size > _HEADER_BYTES:
        raise _broken(f"a header of {size:,} bytes")
    try:
        raw = msgspec.json.decode(data[8 : 8 + size], type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        if len(raw) > _TENSORS:
            raise _broken(f"{len(raw):,} tensors")
        return {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}, 8 + size
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(f"bad header ({str(error)[:120]})") from None


def _tensor(name: str, entry: _Entry, body: memoryview, end: int) -> Tensor:
    begin, stop = entry.data_offsets
    label = f"tensor {name[:100]!r}"
    width = _WIDTH.get(entry.dtype)
    if width is None:
        raise _broken(f"{label} is {entry.dtype[:20]!r}, not float32, float16 or bfloat16")
    if len(entry.shape) != 2 or not all(0 < side < 1 << 31 for side in entry.shape):
        raise _broken(f"{label} has the shape {entry.shape[:8]}, where LoRA matrices have two sides")
    rows, columns = entry.shape
    if begin != end:
        raise _broken(f"{label} begins at byte {begin:,}, where {end:,} was next: tensors overlap or leave holes")
    if stop > len(body) or stop - begin != rows * columns * width:
        raise _broken(f"{label} of shape {entry.shape} as {entry.dtype} does not have {stop - begin:,} bytes")
    return Tensor(entry.dtype, (rows, columns), body[begin:stop])


def serialize(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """A safetensors file of the tensors, in the order given."""
    header: dict[str, object] = {}
    parts = []
    end = 0
    for name, tensor in tensors:
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + len(tensor.data)]}
        end += len(tensor.data)
        parts.append(tensor.data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
