"""Room for an adapter beside a model's weights, which can be filled with one adapter after another.

llama.cpp loads an adapter from a file, and a context that is bound to another one reserves its graph anew: 10 to 25 ms, and more for every
adapter that is loaded. Neither is needed when the new adapter's matrices have the sizes of the old one's: they are written into the
tensors that are there. So each context has a berth of its own, and whatever adapter comes next goes into it.

The tensors are found by functions of libllama that are exported, but no part of its C interface (`bindings.LoraAdapter.tensors`); what is
found is checked by name and size. Where there are none (another compiler or release) each adapter gets a new berth: slower, and right.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf

from lorayard.errors import LorayardError
from lorayard_workers.llama.bindings import LoraAdapter, Model, Tensor
from lorayard_workers.llama.weights import Weights


class Berth:
    """An adapter known to llama.cpp, filled with these weights.

    Raises `AdapterRejected` when they are for another base, `LorayardError` (`no_room`) when no temporary file can be written.
    """

    def __init__(self, model: Model, weights: Weights) -> None:
        self._layout = weights.layout
        try:
            with tempfile.TemporaryDirectory(prefix="lorayard-") as folder:
                path = Path(folder) / "adapter.gguf"
                _write(path, weights)
                self.adapter = LoraAdapter(model, path)
        except OSError as error:
            raise LorayardError(f"no room for an adapter in {tempfile.gettempdir()} ({error.strerror})", code="no_room") from None
        self._tensors = self._find()

    def _find(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors of each pair; none if they are not what they should be."""
        found = []
        for pair in self._layout:
            tensors = self.adapter.tensors(pair.name)
            sizes = [4 * rows * columns for rows, columns in pair.shapes]
            names = [f"{pair.name}.lora_a", f"{pair.name}.lora_b"]
            if tensors is None or [t.name for t in tensors] != names or [t.n_bytes for t in tensors] != sizes:
                return []
            found.append(tensors)
        return found

    def takes(self, weights: Weights) -> bool:
        """Whether these can be written over what is here."""
        return bool(self._tensors) and self._layout == weights.layout

    def fill(self, weights: Weights) -> None:
        """Compute with these from now on; what the context's cells hold is worthless. Between decode calls, on the decoding thread."""
        for tensors, matrices in zip(self._tensors, weights.matrices, strict=True):
            for tensor, matrix in zip(tensors, matrices, strict=True):
                tensor.write(matrix)

    def free(self) -> None:
        """No context may be bound to it."""
        self.adapter.free()


def _write(path: Path, weights: Weights) -> None:
    """Without an alpha, which llama.cpp takes for a scale of 1: B holds it."""
    writer = gguf.GGUFWriter(path, weights.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    for pair, (a, b) in zip(weights.layout, weights.matrices, strict=True):
        writer.add_tensor(f"{pair.name}.lora_a", a)
        writer.add_tensor(f"{pair.name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
