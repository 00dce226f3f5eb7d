"""With what to go on where llama.cpp does not survive its first decode with the settings as they are.

Each suspect is left out by itself, what costs least first: ggml's repacked CPU kernels, then flash attention (and a KV cache of less than
16 bits, which needs it), then the GPU; last all of them together. One at a time, because mostly one is to blame, and the others are speed
that nobody need do without. Each try costs a load of the model, and only a worker that would not have started at all pays for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lorayard.settings import Settings


class Way(NamedTuple):
    """Settings to try. `without`: what they leave out, in words; `saying`: the environment that asks for the same without a try."""

    settings: Settings
    without: str = ""
    saying: str = ""


def ways(settings: Settings, *, gpu: bool) -> Iterator[Way]:
    """What to try after `settings` themselves, in order. `gpu`: llama.cpp was compiled for one."""
    parts: list[tuple[str, dict[str, Any]]] = []
    if settings.repack:
        parts.append(("its repacked kernels", {"repack": False}))
    if settings.flash_attn != "off":
        if settings.kv_type in ("f32", "f16"):
            parts.append(("flash attention", {"flash_attn": "off"}))
        else:
            parts.append((f"flash attention and a KV cache in {settings.kv_type}", {"flash_attn": "off", "kv_type": "f16"}))
    if gpu and settings.n_gpu_layers != 0:
        parts.append(("the GPU", {"n_gpu_layers": 0}))
    for words, change in parts:
        yield _way(settings, words, change)
    if len(parts) > 1:
        yield _way(
            settings, " or ".join(words for words, _ in parts), {name: value for _, change in parts for name, value in change.items()}
        )


def _way(settings: Settings, words: str, change: dict[str, Any]) -> Way:
    saying = " ".join(f"LORAYARD_{name.upper()}={str(value).lower()}" for name, value in change.items())
    return Way(settings.model_copy(update=change), words, saying)
