"""PEFT → what Groq takes: a zip of exactly two files, float16, one rank and one scale for all modules.

Options that a host may or may not honour (rank-stabilized scaling, alpha patterns) are worked into the numbers, so that plain alpha/r is
right for every module.
"""

from __future__ import annotations

import io
import math
import zipfile

import msgspec
import numpy as np
from numpy.typing import NDArray

from lorayard.adapters.files import CONFIG, WEIGHTS
from lorayard.adapters.peft import Module, PeftAdapter
from lorayard.adapters.tensors import Tensor
from lorayard.errors import AdapterRejected

RANKS = (8, 16, 32, 64)
_TIME = (1980, 1, 1, 0, 0, 0)  # of every entry: the same adapter is the same bytes


def pack(adapter: PeftAdapter, base_names: tuple[str, ...]) -> bytes:
    """The zip, the same bytes each time. Raises `AdapterRejected` for a base, a rank or numbers that cannot be served as they are."""
    name = adapter.config.base_model_name_or_path
    if name not in base_names:
        known = ", ".join(base_names) or "none; LORAYARD_HOSTED_BASE_NAMES says which"
        raise AdapterRejected(
            f"the adapter was trained on {name[:200]!r}; the hosted base must be exactly that, and is known as {known}",
            code="adapter_base_mismatch",
        )
    ranks = sorted({module.rank for module in adapter.modules})
    if len(ranks) > 1 or ranks[0] not in RANKS:
        raise AdapterRejected(
            f"the adapter has rank {' and '.join(map(str, ranks))}; the host takes one rank for all, of {', '.join(map(str, RANKS))}",
            code="adapter_rank",
        )
    alpha = next((module.scale for module in adapter.modules if module.scale), 1.0) * ranks[0]
    plain = msgspec.structs.replace(
        adapter.config, r=ranks[0], lora_alpha=_whole(alpha), use_rslora=False, rank_pattern=None, alpha_pattern=None
    )
    modules = tuple(_half(module, alpha / ranks[0]) for module in adapter.modules)
    packed = PeftAdapter(config=plain, modules=modules)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file, data in ((CONFIG, packed.config_file()), (WEIGHTS, packed.weights_file())):
            archive.writestr(zipfile.ZipInfo(file, _TIME), data)
    return buffer.getvalue()


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _half(module: Module, scale: float) -> Module:
    """In float16, with B making up for a scale that is not the common one."""
    b = module.b.float32()
    if not math.isclose(module.scale, scale, rel_tol=1e-9):
        with np.errstate(over="ignore"):  # looked for below
            b = b * np.float32(module.scale / scale)
    where = f"layer {module.layer} {module.kind}"
    return Module(module.layer, module.kind, scale, _tensor(module.a.float32(), where), _tensor(b, where))


def _tensor(matrix: NDArray[np.float32], where: str) -> Tensor:
    peak = float(np.abs(matrix).max())
    if peak and not float(np.finfo(np.float16).smallest_subnormal) <= peak <= float(np.finfo(np.float16).max):
        raise AdapterRejected(f"{where} has numbers too large or too small for float16", code="adapter_tensors")
    rows, columns = matrix.shape
    return Tensor("F16", (rows, columns), memoryview(np.ascontiguousarray(matrix, np.dtype("<f2")).tobytes()))
