"""What a runner tells of jobs, committed to the ledger: in order, many at a time, and kept while the ledger is away."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import redis
import structlog

from lorayard.errors import Unavailable
from lorayard.ledger.keys import split_ref
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import End
from lorayard.telemetry import JobEvents
from lorayard_workers.leases import Held, Leases
from lorayard_workers.retries import backoff_ms
from lorayard_workers.runner import Died, Event, Outcome, Progress, Ready, Runner, Started

log = structlog.get_logger()

AWAY_S = 3.0
"""A worker that leaves waits no longer than this for a ledger that is away: leases run out by themselves."""


class Commits:
    """The queue of what was heard, and the thread's work that empties it: `run`. `stored` counts ends that the ledger took.

    What is not about a job (`Progress`, `Ready`, `Died`) goes to `backend` in its turn.
    """

    def __init__(
        self,
        ledger: Ledger,
        leases: Leases,
        runner: Runner,
        events: JobEvents,
        backend: Callable[[Progress | Ready | Died], None],
        leaving: threading.Event,
    ) -> None:
        self._ledger = ledger
        self._leases = leases
        self._runner = runner
        self._events = events
        self._backend = backend
        self._leaving = leaving
        self._heard: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._over: set[tuple[str, str]] = set()  # (batch, ref) of what ended among the events being committed
        self.stored = 0

    def hear(self, event: Event) -> None:
        """To be committed; from any thread."""
        self._heard.put(event)

    def fail(self, held: Held, error: dict[str, Any], *, later: bool) -> None:
        """End every job of a batch that could not be run, or put it off at no cost of an attempt."""
        if not later:
            self.hear(Started(held.batch, list(held.jobs)))
        for ref in list(held.jobs):
            self.hear(Outcome(held.batch, ref, error=error, later=later))

    def died(self, event: Died) -> None:
        """Jobs, with their process. What had begun has used an attempt and will run alone next time; the rest goes back unharmed."""
        error = {"message": f"the model process died: {event.reason}", "type": "server_error", "code": "worker_died", "param": None}
        running = set(event.running)
        handed = set(event.waiting)
        unharmed: set[str] = set()
        if event.reading:  # what was computed beside it is not to blame, and neither an attempt nor under suspicion
            running, unharmed, handed = {event.reading}, running - {event.reading}, handed - {event.reading}
        first = next((held for held in self._leases.batches() if handed & held.jobs.keys()), None)
        if not running and first is not None:  # no job had begun: loading what the first batch needs is all it can have died of
            running = handed & first.jobs.keys()
            self._starts([Started(first.batch, list(running))])
        for held in self._leases.batches():
            mine = [ref for ref in list(held.jobs) if ref in running]
            self._starts([Started(held.batch, mine)] if mine else [])
            self._ends([Outcome(held.batch, ref, error=error, retryable=True) for ref in mine])
            self._leases.put_off(held, [ref for ref in list(held.jobs) if ref in unharmed])
            self._leases.give_back(held, list(held.jobs))

    def close(self) -> None:
        """`run` ends when it has committed what was heard until now."""
        self._heard.put(None)

    def run(self) -> None:
        """Commit what was heard, in order, until `close`; while the ledger is away, keep it and try again."""
        while True:
            events = [self._heard.get()]
            with contextlib.suppress(queue.Empty):
                while len(events) < 1000:
                    events.append(self._heard.get_nowait())
            self._over = {(event.batch, event.ref) for event in events if isinstance(event, Outcome)}
            for chunk in _runs(event for event in events if event is not None):
                self._until_stored(chunk)
            if None in events:
                return

    def _until_stored(self, events: list[Event]) -> None:
        wait, waited = 0.05, 0.0
        while True:
            try:
                return self._handle(events)
            except (Unavailable, redis.RedisError) as error:
                log.warning("ledger unavailable, results are kept", waiting=self._heard.qsize() + len(events), reason=str(error))
                if self._leaving.is_set() and waited > AWAY_S:
                    return self._leases.abandon({event.batch for event in events if isinstance(event, Started | Outcome)})
                time.sleep(wait)
                wait, waited = min(wait * 2, 2.0), waited + wait
            except Exception:  # one of them is not what it should be: the others must not suffer for it
                if len(events) == 1:
                    return self._dismiss(events[0])
                for event in events:
                    self._until_stored([event])
                return None

    def _dismiss(self, event: Event) -> None:
        """An answer that cannot be stored ends its job with an error; the batches of any other event are held no longer."""
        if isinstance(event, Outcome) and event.error is None:
            log.exception("answer cannot be stored", job=split_ref(event.ref)[1])
            error = {
                "message": "the answer was not one that can be stored",
                "type": "server_error",
                "code": "unstorable_answer",
                "param": None,
            }
            return self._until_stored([Outcome(event.batch, event.ref, error=error)])
        log.exception("event dropped; the lease of its batch will lapse", kind=type(event).__name__)
        if isinstance(event, Started | Outcome):
            self._leases.abandon({event.batch})
        return None

    def _handle(self, events: list[Event]) -> None:
        """Events of one kind."""
        self._starts([event for event in events if isinstance(event, Started)])
        self._ends([event for event in events if isinstance(event, Outcome)])
        for event in events:
            if not isinstance(event, Started | Outcome):
                self._backend(event)

    def _starts(self, events: list[Started]) -> None:
        refs: dict[str, list[str]] = defaultdict(list)
        for event in events:
            refs[event.batch] += event.refs
        for batch, started in refs.items():
            held = self._leases.held.get(batch)
            if held is None:
                self._runner.cancel(batch, started)
                continue
            held.begun |= dict.fromkeys(started, time.monotonic())  # before the ledger knows: `close` gives back what has not begun
            running = [ref for ref in started if (batch, ref) not in self._over]  # an end says that there was a start
            stop = self._ledger.start(batch, held.fence, running) if running else []
            for ref in started:
                self._events.started(split_ref(ref)[1])
            if stop:
                self._leases.drop(held, stop)

    def _ends(self, events: list[Outcome]) -> None:
        by_batch: dict[str, list[Outcome]] = defaultdict(list)
        for event in events:
            by_batch[event.batch].append(event)
        for batch, outcomes in by_batch.items():
            held = self._leases.held.get(batch)
            if held is None:
                continue
            ends = [self._end(held, outcome) for outcome in outcomes]
            answers = self._ledger.finish(batch, held.fence, ends)
            self.stored += sum(answer == "stored" for answer in answers)
            for outcome, answer in zip(outcomes, answers, strict=True):
                self._tell(held, outcome, answer)
            self._leases.forget(held, [outcome.ref for outcome in outcomes])

    def _end(self, held: Held, outcome: Outcome) -> End:
        document = {
            "response": outcome.response,
            "error": outcome.error,
            "timings_ms": {name: ms for name, ms in outcome.timings_ms.items() if math.isfinite(ms) and ms >= 0},
            "temperature": outcome.temperature,
            "width": outcome.width,
            **outcome.more,
        }
        line = msgspec.json.encode(document)
        if outcome.error is None:
            return End(outcome.ref, "succeeded", line, tokens=_tokens(outcome), hosted="hosted_model" in outcome.more)
        job = held.jobs.get(outcome.ref)
        if outcome.later or (job is not None and job.laters < outcome.patience):
            delay_ms = max(outcome.after_ms, backoff_ms("later", job.laters if job else 0))
            return End(outcome.ref, "later", line, delay_ms=delay_ms)
        if outcome.retryable:
            return End(outcome.ref, "retry", line, delay_ms=backoff_ms(str(outcome.error.get("code")), job.attempts if job else 0))
        return End(outcome.ref, "failed", line)

    def _tell(self, held: Held, outcome: Outcome, answer: str) -> None:
        job_id = split_ref(outcome.ref)[1]
        if answer == "stale":
            log.warning("result refused: the lease was lost", job=job_id, batch=held.batch)
        elif outcome.error is not None:
            tell = self._events.retried if answer == "retried" else self._events.failed
            tell(job_id, str(outcome.error.get("code")))
        else:
            runtime = time.monotonic() - held.begun.get(outcome.ref, time.monotonic())
            self._events.succeeded(job_id, runtime_s=runtime, tokens=_tokens(outcome))


def _tokens(outcome: Outcome) -> int:
    usage = (outcome.response or {}).get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and 0 <= total < 1 << 31 else 0


def _runs(events: Iterable[Event]) -> Iterable[list[Event]]:
    """Neighbours of one kind together, so that many are committed in one call and order is kept."""
    run: list[Event] = []
    for event in events:
        if run and type(run[0]) is not type(event):
            yield run
            run = []
        run.append(event)
    if run:
        yield run
