"""A new adapter's way in: read, check the fit, prove that it converts, keep, register."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from lorayard.adapters.conversion import write_gguf
from lorayard.adapters.files import Source
from lorayard.adapters.manifest import PUBLIC, BaseModel, Manifest
from lorayard.adapters.peft import PeftAdapter, check_fit, read_adapter
from lorayard.adapters.registry import AdapterRegistry, check_name
from lorayard.adapters.store import ArtifactStore
from lorayard.settings import Settings


def add_adapter(
    settings: Settings, registry: AdapterRegistry, store: ArtifactStore, base: BaseModel, tenant: str, name: str, source: Source
) -> Manifest:
    """Add a PEFT adapter (folder, zip's path or zip's bytes) under a tenant's name; `*` gives it to everyone.

    Nothing is kept or registered unless everything works. The returned manifest's `replaces` is the digest that the name had before.
    Raises `BadRequest` for a bad name, `AdapterRejected`, `Unavailable`.
    """
    check_name(name)
    if tenant != PUBLIC:
        check_name(tenant, "tenant")
    adapter = read_adapter(source, max_bytes=settings.max_adapter_bytes)
    check_fit(adapter, base)
    with tempfile.TemporaryDirectory(prefix="lorayard-") as folder:
        write_gguf(adapter, base, Path(folder) / "proof.gguf")
    store.put(adapter)
    return registry.add(tenant, name, describe(adapter, tenant, name))


def describe(adapter: PeftAdapter, tenant: str, name: str) -> Manifest:
    """The adapter's manifest as of now."""
    scales = [module.scale for module in adapter.modules]
    return Manifest(
        name=name,
        tenant=tenant,
        digest=adapter.digest,
        base_name=adapter.config.base_model_name_or_path,
        rank=max(module.rank for module in adapter.modules),
        alpha=adapter.config.lora_alpha,
        rslora=adapter.config.use_rslora,
        scale_min=min(scales),
        scale_max=max(scales),
        targets=adapter.targets,
        n_layers=len({module.layer for module in adapter.modules}),
        n_bytes=adapter.n_bytes,
        created_ms=time.time_ns() // 1_000_000,
        card=adapter.card,
    )
