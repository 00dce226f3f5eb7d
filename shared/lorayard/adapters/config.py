"""`adapter_config.json`: which of PEFT's many options are understood, which are harmless, and which are refused and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from lorayard.errors import AdapterRejected

_MAX_RANK = 4_096
_MAX_PATTERNS = 2_048


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What of `adapter_config.json` has a say in the result."""

    base_model_name_or_path: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


# Options that change what the adapter computes, in ways that neither llama.cpp's LoRA nor B·A times a factor can express.
_REFUSED = {
    "use_dora": "DoRA rescales the base weights",
    "lora_bias": "a bias on B cannot be run; train with lora_bias=False",
    "modules_to_save": "whole modules were trained beside the LoRA; train without modules_to_save",
    "fan_in_fan_out": "it was made for a model with transposed weights",
    "layer_replication": "it runs on a model with repeated layers",
    "alora_invocation_tokens": "activated LoRA begins in mid-prompt",
    "invocation_string": "activated LoRA begins in mid-prompt",
    "trainable_token_indices": "embeddings were trained; train without trainable_token_indices",
    "target_parameters": "it changes parameters that are no linear modules",
    "use_qalora": "QA-LoRA groups the inputs of A",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples around the weights",
    "target_modules_to_tie": "it ties embeddings",
}
# Options that say how it was trained, or are said again by the tensors themselves.
_HARMLESS = {
    *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "velora_config"),
}
_READ = {"peft_type", "task_type", "bias", "init_lora_weights", *Config.__struct_fields__}
# These begin with the base weights as they are; the others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA, MiCA) take something out of them first.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_T = TypeVar("_T")


def parse_config(data: bytes) -> Config:
    """Raises `AdapterRejected` that names the option at fault."""
    raw = parse_object("adapter_config.json", data)
    _refuse_options(raw)
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise _bad(str(error)) from None
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    alphas = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
    if not all(0 < rank <= _MAX_RANK for rank in ranks):
        raise _bad(f"ranks must be from 1 to {_MAX_RANK}")
    if not all(math.isfinite(alpha) and abs(alpha) < 1e6 for alpha in alphas):
        raise _bad("lora_alpha is not a usable number")
    if not any(alphas):
        raise _bad("lora_alpha is 0, so the adapter would do nothing")
    if not config.base_model_name_or_path.strip():
        raise _bad("base_model_name_or_path is empty; fill in the name of the model it was trained on")
    return config


def parse_object(name: str, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises `AdapterRejected`."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterRejected(f"{name}: not a JSON object ({str(error)[:120]})", code="adapter_config") from None


def _bad(what: str) -> AdapterRejected:
    return AdapterRejected(f"adapter_config.json: {what}", code="adapter_config")


def _refuse_options(raw: dict[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise _bad(f"peft_type is {_show(raw.get('peft_type'))}; only LORA adapters can be served")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise _bad(f"task_type is {_show(raw['task_type'])}; only CAUSAL_LM adapters can be served")
    if raw.get("bias", "none") != "none":
        raise _bad(f"bias is {_show(raw['bias'])}: biases of the base were trained too; train with bias='none'")
    init = raw.get("init_lora_weights", True)
    if not any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
        raise _bad(
            f"init_lora_weights is {_show(init)}, which changes the base weights; convert it to plain LoRA with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for key, value in raw.items():
        if not value or key in _HARMLESS or key in _READ:
            continue
        if why := _REFUSED.get(key):
            raise _bad(f"{key} is set: {why}, which cannot be served exactly")
        raise _bad(
            f"the option {key[:60]!r} ({_show(value)}) is not known, so it may change what the adapter computes; remove it if it does not"
        )


def _show(value: object) -> str:
    return repr(value)[:60]


# PEFT takes keys of rank_pattern and alpha_pattern as regular expressions. A stranger's expression can take for ever, so only
# forms are accepted that cannot: plain characters, sets, one flat choice of words, and few repetitions.
_SAFE_PATTERN = re.compile(r"(?:[A-Za-z0-9_^$-]|\.[*+]?|\\[.d][*+]?|\[[A-Za-z0-9-]+\][*+]?|\([A-Za-z0-9_]+(?:\|[A-Za-z0-9_]+)*\))+")


def resolver(patterns: dict[str, _T] | None, default: _T) -> Callable[[str], _T]:
    """The value of the first pattern that matches a module's path, by PEFT's own rule, else the default. Raises `AdapterRejected`."""
    if patterns and len(patterns) > _MAX_PATTERNS:
        raise _bad(f"more than {_MAX_PATTERNS} patterns")
    compiled = [(_compile(key), value) for key, value in (patterns or {}).items()]

    def resolve(path: str) -> _T:
        return next((value for pattern, value in compiled if pattern.match(path)), default)

    return resolve


def _compile(key: str) -> re.Pattern[str]:
    if len(key) > 128 or not _SAFE_PATTERN.fullmatch(key) or len(re.findall(r"[*+]", key)) > 2 or key.count("(") > 2:
        raise _bad(f"the pattern {key[:80]!r} is too intricate to be matched safely; write the modules' plain names")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise _bad(f"the pattern {key[:80]!r} is not a regular expression ({error})") from None
