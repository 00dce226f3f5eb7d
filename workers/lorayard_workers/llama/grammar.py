"""Answers that must be JSON: which tokens may come next, by llama.cpp's grammars."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp as ll
import numpy as np
from llama_cpp.llama_grammar import JSON_GBNF
from numpy.typing import NDArray

from lorayard.errors import BadRequest
from lorayard.schemas import schema_grammar
from lorayard_workers.llama.bindings import Model

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_SLOWEST_S = 3.0  # of one core, for one token: a grammar whose readings double with every token soon takes for ever
_quiet = threading.Lock()


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """llama.cpp prints a grammar that it refuses to stderr, whatever it was told of logs: a tenant's words, in the operator's log.

    What this process writes there meanwhile comes afterwards, but where this ends in an exception: then it may be that.
    """
    with _quiet, tempfile.TemporaryFile() as aside:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BadRequest:
            aside.truncate(0)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            aside.seek(0)
            sys.stderr.write(aside.read().decode(errors="replace"))


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The grammar of the JSON that fits a schema, or of any JSON object. Raises `BadRequest` that names the keyword at fault."""
    return str(JSON_GBNF) if schema is None else schema_grammar(schema)


class Grammar:
    """Where one answer stands in a grammar. Raises `BadRequest` for a grammar that llama.cpp does not take."""

    def __init__(self, model: Model, text: str) -> None:
        self._ends = model.end_tokens
        with _unheard():
            self._state: Any = ll.llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
            if not self._state:
                raise BadRequest("response_format: llama.cpp cannot read this schema's grammar; simplify it", param="response_format")
        self._one = np.zeros(1, _CANDIDATE)
        self._slow = False

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            ll.llama_sampler_free(self._state)
            self._state = None

    def allows(self, token: int) -> bool:
        self._one["id"], self._one["logit"] = token, 0.0
        self._apply(self._one)
        return not self._slow and bool(np.isfinite(self._one["logit"][0]))

    def masked(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n_vocab,) with minus infinity for all that may not come next: everything, where none may or it took too long to see."""
        candidates = np.zeros(len(row), _CANDIDATE)
        candidates["id"], candidates["logit"] = np.arange(len(row)), row
        self._apply(candidates)
        allowed: NDArray[np.float32] = candidates["logit"].copy()
        if self._slow:
            allowed.fill(-np.inf)
        return allowed

    def _apply(self, candidates: NDArray[Any]) -> None:
        data = ctypes.cast(candidates.ctypes.data, ll.llama_token_data_p)
        array = ll.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
        began = time.thread_time()
        ll.llama_sampler_apply(self._state, ctypes.byref(array))
        self._slow = self._slow or time.thread_time() - began > _SLOWEST_S

    def accept(self, token: int) -> None:
        """Go on with a token that it allows: any other ends the process."""
        if token not in self._ends:
            began = time.thread_time()
            ll.llama_sampler_accept(self._state, token)
            self._slow = time.thread_time() - began > _SLOWEST_S
