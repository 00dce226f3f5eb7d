"""What every backend is: takes batches of jobs of one adapter, and tells of each job what became of it.

The control process (`control.py`) owns leases, attempts and commits; a runner only computes. Everything here also crosses the pipe to the
llama child, so it is plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec


class WorkItem(msgspec.Struct, frozen=True, array_like=True):
    """One job for a runner. `company`: an attempt of it ended with a dead process, so it runs beside other such jobs only, at most so many
    at once with itself (`retries.company`); 0 for a job under no suspicion."""

    ref: str  # tenant/id: unique in the pool
    endpoint: str
    request: msgspec.Raw  # JSON of an OpenAI request body without `model`
    company: int = 0
    due: int = 0  # ms by the ledger's clock

    @property
    def tenant(self) -> str:
        return self.ref.rpartition("/")[0]


class AdapterFile(msgspec.Struct, frozen=True, array_like=True):
    """An adapter as a local file that the backend can load; for a hosted backend, `path` is the id of the model with it."""

    digest: str
    path: str


class Work(msgspec.Struct, frozen=True, tag="work"):
    """A batch: all of one adapter; None is the base model. `lane`: who else might have claimed it (`lorayard.jobs.Lane`)."""

    batch: str
    adapter: AdapterFile | None
    items: list[WorkItem]
    lane: str = ""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop these jobs of a batch within one decode step, or drop them if they have not begun; nothing is emitted for them.

    Of this batch only: the same job may have come again in another meanwhile.
    """

    batch: str
    refs: list[str]


class Started(msgspec.Struct, frozen=True, tag="started"):
    """Jobs whose computing began now: from here on an attempt counts."""

    batch: str
    refs: list[str]


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    """One job's end. `response` is an OpenAI response without `id` and `model`; or `error` is OpenAI's error object.

    `timings_ms` has `adapter_load`, `adapter_switch`, `prefill`, `decode` (each ≥ 0) and `on_deck` (from receiving the work to its start).
    `retryable`: the same job may succeed another time; `later`: it may, and this time it was not to blame; with `patience`, nor was it the
    first so many times. `after_ms`: not before that. `temperature`: hot, loaded or disk (hosted: warm or cold), what its adapter was when
    it began. A hosted backend has other timings too (`lorayard.ledger.documents`), and tells in `more` what its documents shall have too.
    """

    batch: str
    ref: str
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    retryable: bool = False
    later: bool = False
    timings_ms: dict[str, float] = {}
    temperature: str = ""
    width: int = 1  # sequences that were decoded beside it, itself included, when it began
    patience: int = 0
    after_ms: int = 0
    more: dict[str, Any] = {}


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Sign of life while there is work: at most a few a second. `hot` and `loaded` are adapter digests, most recent first. `room`: how many
    jobs a hosted backend would like to have, in all, of `doubted` adapters only when there are no others. `costs`: `prefill_tokens_per_s`,
    `step_ms` by width (as text), and `switch_ms` by an adapter's temperature, as far as they are known."""

    steps: int
    hot: list[str]
    loaded: list[str]
    counters: dict[str, float]
    room: int = 0
    costs: dict[str, Any] = {}
    doubted: list[str] = []


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The backend can take work. `base` describes the model for checks at submit (`lorayard.adapters.BaseModel` as a dict)."""

    base: dict[str, Any]
    width: int
    max_prompt_tokens: int
    max_token_bytes: int
    pid: int
    costs: dict[str, Any] = {}  # as in Progress
    fallback: str = ""  # what it does without, and why, as it would not have started with the settings as they are


class Died(msgspec.Struct, frozen=True, tag="died"):
    """The backend's process is gone; `running` had begun, `waiting` had not. It is being replaced: `Ready` follows.

    `reading` is the job whose request was being read, which takes milliseconds: then it is what the process most likely died of, or was
    killed for.
    """

    reason: str
    running: list[str]
    waiting: list[str]
    reading: str = ""


Event = Started | Outcome | Progress | Ready | Died


class Runner(Protocol):
    """A backend. `emit` is called from the runner's own thread, in the order things happened."""

    def start(self, emit: Callable[[Event], None]) -> None: ...

    def submit(self, work: Work) -> None: ...

    def cancel(self, batch: str, refs: Sequence[str]) -> None: ...

    def kill(self, reason: str) -> None:
        """Put an end to a computation that makes no progress; `Died` follows."""

    def close(self) -> None: ...
