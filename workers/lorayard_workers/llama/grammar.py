"""Answers that must be JSON: which tokens may come next, by llama.cpp's grammars."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import llama_cpp as ll
import numpy as np
from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf
from numpy.typing import NDArray

from lorayard.errors import BadRequest
from lorayard_workers.llama.bindings import Model

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_MOST_BYTES = 100_000  # of a grammar: more takes longer to read than to compute


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The grammar of the JSON that fits a schema, or of any JSON object. Raises `BadRequest` that names the field."""
    if schema is None:
        return str(JSON_GBNF)
    try:
        grammar = str(json_schema_to_gbnf(json.dumps(schema)))
    except Exception as error:  # the converter meets arbitrary schemas, and raises whatever they lead to
        text = str(error) if isinstance(error, ValueError | AssertionError) else type(error).__name__
        raise BadRequest(f"response_format: this schema cannot be made a grammar: {text[:200]}", param="response_format") from None
    if len(grammar) > _MOST_BYTES:
        raise BadRequest(f"response_format: the schema makes a grammar of {len(grammar)} characters; simplify it", param="response_format")
    return grammar


class Grammar:
    """Where one answer stands in a grammar. Raises `BadRequest` for a grammar that llama.cpp does not take."""

    def __init__(self, model: Model, text: str) -> None:
        self._ends = model.end_tokens
        self._state: Any = ll.llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
        if not self._state:
            raise BadRequest("response_format: this schema cannot be made a grammar", param="response_format")
        self._one = np.zeros(1, _CANDIDATE)

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            ll.llama_sampler_free(self._state)
            self._state = None

    def allows(self, token: int) -> bool:
        self._one["id"], self._one["logit"] = token, 0.0
        self._apply(self._one)
        return bool(np.isfinite(self._one["logit"][0]))

    def masked(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n_vocab,) with minus infinity for all that may not come next, which may be everything."""
        candidates = np.zeros(len(row), _CANDIDATE)
        candidates["id"], candidates["logit"] = np.arange(len(row)), row
        self._apply(candidates)
        allowed: NDArray[np.float32] = candidates["logit"].copy()
        return allowed

    def _apply(self, candidates: NDArray[Any]) -> None:
        data = ctypes.cast(candidates.ctypes.data, ll.llama_token_data_p)
        array = ll.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
        ll.llama_sampler_apply(self._state, ctypes.byref(array))

    def accept(self, token: int) -> None:
        """Go on with a token that it allows: any other ends the process."""
        if token not in self._ends:
            ll.llama_sampler_accept(self._state, token)
