"""The control process of a worker: takes batches, feeds the runner, renews leases while there is progress, commits ends.

Computing happens elsewhere (`runner.py`); nothing here blocks on it. Threads: one hears the ledger's words, of batches to take and of jobs
to stop, and some fetch adapters; Celery's call `run_batch`, should a word be lost; the runner's call `_hear`; one thread commits what was
heard, in order and many at a time; one beats.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import secrets
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import redis
import structlog

from lorayard.errors import LorayardError, SetupError, Unavailable
from lorayard.jobs import BASE_DIGEST, ENDPOINT, adapter_of, lane_of
from lorayard.ledger.keys import split_ref
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import End, Taken, TakenJob
from lorayard.ledger.registry import Planned, WorkerInfo, WorkerRegistry
from lorayard.settings import Settings
from lorayard.telemetry import JobEvents
from lorayard_workers.retries import backoff_ms, company
from lorayard_workers.runner import AdapterFile, Died, Event, Outcome, Progress, Ready, Runner, Started, Work, WorkItem

log = structlog.get_logger()

FetchAdapter = Callable[[str, dict[str, Any]], str]
"""(digest, base) -> path of the adapter's file here; fetches and converts it when it is not on disk."""

Handover = Callable[[Taken], Taken | None]
"""What is left to be run here of a batch that was taken; None where the ledger has handed all of it over to others."""

Expect = Callable[[Planned, dict[str, Any]], list[str]]
"""(planned, base) at every heartbeat -> those of the planned adapters that would have to be fetched."""

FETCHERS = 4
"""More than the batches a worker may have outstanding: fetching one adapter never keeps the next batch waiting."""
DRAIN_S = 10.0
_FETCHED_MS = 5.0  # what takes less was on disk already
_FETCH_WEIGHT = 0.2  # of the newest fetch in what fetching is taken to cost
_AWAY_S = 3.0  # a worker that leaves waits no longer than this for a ledger that is away: leases run out by themselves


class _Held:
    """A batch under our lease: its jobs that have not ended, and those of them that have begun."""

    def __init__(self, taken: Taken) -> None:
        self.batch = taken.batch
        self.fence = taken.fence
        self.digest = taken.digest
        self.jobs: dict[str, TakenJob] = {job.ref: job for job in taken.jobs}
        self.begun: dict[str, float] = {}


class Control:
    """One worker. `wait_ready` after `start`; `run_batch` from then on; `close` drains."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        runner: Runner,
        fetch: FetchAdapter,
        events: JobEvents,
        *,
        kind: str = "llama",
        handover: Handover | None = None,
        expect: Expect | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._runner = runner
        self._fetch = fetch
        self._handover = handover
        self._expect = expect
        self._events = events
        self._registry = WorkerRegistry(ledger.client)
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._unheard: set[str] = set()  # batches that were ours at the last heartbeat and not taken
        self._told: deque[str] = deque(maxlen=64)  # batches that were told of lately: most are told twice
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetch")
        self._heard: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._over: set[tuple[str, str]] = set()  # (batch, ref) of what ended among the events being committed
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._fetching = 0  # adapters on their way here
        self._fetch_ms = 0.0  # what that takes, where they were not here
        self._fetched = {BASE_DIGEST}  # adapters that were here once: most likely they still are
        self._moved = self._looked = time.monotonic()  # when the runner last told something, and when we last checked that
        self._base: dict[str, Any] = {}
        self.info = WorkerInfo(
            name=settings.worker,
            pool=settings.pool,
            kind=kind,
            incarnation=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        loops = {"commit": self._commit_loop, "beat": self._beat_loop, "words": self._word_loop}
        self._threads = [threading.Thread(target=loop, name=name, daemon=True) for name, loop in loops.items()]

    # -- life ---------------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin. Raises `SetupError` where another process works under this name."""
        self._refuse_twin()
        requeued = self._ledger.hello(self.info.name, self.info.incarnation)
        if requeued:
            log.info("batches of this worker's last process queued again", batches=requeued)
        for thread in self._threads:
            thread.start()
        self._runner.start(self._hear)

    def _refuse_twin(self) -> None:
        """Two processes of one name would take each other for their own past, and each other's jobs with it."""
        give_up = time.monotonic() + 3 * self._settings.heartbeat_ms / 1000
        first = self._registry.find(self.info.pool, self.info.name)
        if first is None or (first.host == self.info.host and first.pid != self.info.pid and not _exists(first.pid)):
            return
        while time.monotonic() < give_up:
            time.sleep(self._settings.heartbeat_ms / 4000)
            now = self._registry.find(self.info.pool, self.info.name)
            if now is not None and now.seen_ms != first.seen_ms:
                raise SetupError(
                    f"a worker named {self.info.name!r} runs already (process {first.pid} on {first.host}): "
                    "give this one another name with LORAYARD_WORKER_NAME"
                )

    def wait_ready(self, timeout_s: float) -> None:
        """Until the backend can take work. Raises `SetupError`."""
        if not self._ready.wait(timeout_s):
            raise SetupError(f"the model was not ready within {timeout_s:.0f} s: see the lines above, and LORAYARD_MODEL")

    def close(self) -> None:
        """Give back what has not begun, wait a while for what has and give back the rest, leave."""
        self._closing.set()
        self.info.ready = False
        self._beat_once()
        with self._lock:
            held = list(self._held.values())
        for batch in held:
            self._give_back(batch, [ref for ref in list(batch.jobs) if ref not in batch.begun])
        give_up = time.monotonic() + DRAIN_S
        while self._held and time.monotonic() < give_up:
            time.sleep(0.05)
        with self._lock:
            held = list(self._held.values())
        for batch in held:
            self._put_off(batch, list(batch.jobs))
        self._heard.put(None)
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_AWAY_S)
        self._runner.close()
        with contextlib.suppress(redis.RedisError, Unavailable):
            self._registry.leave(self.info)
        self._events.close()

    # -- a batch comes ------------------------------------------------------------------------------------------------------------------

    def run_batch(self, batch: str) -> None:
        """Take a batch and hand it to the runner, once its adapter is here. Does nothing for a batch that is no longer current."""
        held = self._take(batch)
        if held is not None:
            self._run(held)

    def _take(self, batch: str) -> _Held | None:
        with self._lock:
            if self._closing.is_set() or batch in self._told:
                return None
            self._told.append(batch)
        try:
            taken = self._ledger.take(batch, self.info.name, self.info.incarnation, self._settings.lease_ms)
        except Unavailable:
            with self._lock, contextlib.suppress(ValueError):
                self._told.remove(batch)
            raise
        if taken is None:
            log.info("batch not current", batch=batch)
            return None
        held = _Held(taken)
        if not self.info.ready:  # the model is being loaded again, or we are leaving: others may have room
            self._ledger.give_back(batch, held.fence, list(held.jobs))
            return None
        if self._handover is not None:
            left = self._handover(taken)
            if left is None:
                return None
            taken, held = left, _Held(left)
        with self._lock:
            if not self._held:
                self._moved = time.monotonic()
            self._held[batch] = held
        for job in taken.jobs:
            tenant, job_id = split_ref(job.ref)
            self._events.received(job_id, adapter=job.meta.get("adapter"), tenant=tenant, batch=batch, attempt=job.attempts)
        return held

    def _run(self, held: _Held) -> None:
        try:
            self._submit(held, self._adapter(held.digest))
        except LorayardError as error:
            log.warning("adapter not usable", adapter=held.digest[:12], reason=error.message)
            self._fail(held, error.document(), later=isinstance(error, Unavailable))
        except Exception:  # held for ever otherwise
            log.exception("batch not run", batch=held.batch)
            self._give_back(held, list(held.jobs))
        if self._closing.is_set():  # it came while `close` looked at what there is to give back
            self._give_back(held, [ref for ref in list(held.jobs) if ref not in held.begun])

    def _adapter(self, digest: str) -> AdapterFile | None:
        """Its file here. Raises `LorayardError`: `Unavailable` when another time may go better."""
        digest = adapter_of(digest)
        if digest == BASE_DIGEST:
            return None
        with self._lock:
            self._fetching += 1
        started = time.monotonic()
        try:
            file = AdapterFile(digest, self._fetch(digest, self._base))
            self._fetched.add(digest)
            took = 1000 * (time.monotonic() - started)
            if took > _FETCHED_MS:
                self._fetch_ms += (took - self._fetch_ms) * (_FETCH_WEIGHT if self._fetch_ms else 1)
            return file
        except LorayardError:
            raise
        except Exception as error:  # a full disk, a broken store: whatever it is, the batch must not be held for ever
            log.exception("adapter not fetched", adapter=digest[:12])
            raise Unavailable(f"the adapter could not be fetched ({type(error).__name__})", code="adapter_unavailable") from error
        finally:
            self._moved = time.monotonic()
            with self._lock:
                self._fetching -= 1

    def _submit(self, held: _Held, adapter: AdapterFile | None) -> None:
        items = [
            WorkItem(
                job.ref,
                job.meta.get("endpoint", ENDPOINT),
                msgspec.Raw(job.request),
                company(job.attempts, job.most, self.info.width),
                job.due,
            )
            for job in list(held.jobs.values())
        ]
        self._runner.submit(Work(held.batch, adapter, items, lane_of(held.digest)))
        log.info("batch taken", batch=held.batch, adapter=held.digest[:12], jobs=len(items))

    def _fail(self, held: _Held, error: dict[str, Any], *, later: bool) -> None:
        """End every job of a batch that could not be run, or put it off at no cost of an attempt."""
        if not later:
            self._heard.put(Started(held.batch, list(held.jobs)))
        for ref in list(held.jobs):
            self._heard.put(Outcome(held.batch, ref, error=error, later=later))

    # -- the runner tells -----------------------------------------------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        self._moved = time.monotonic()
        self._heard.put(event)

    def _commit_loop(self) -> None:
        """Commit what was heard, in order; while the ledger is away, keep it and try again."""
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
                if self._closing.is_set() and waited > _AWAY_S:
                    return self._abandon({event.batch for event in events if isinstance(event, Started | Outcome)})
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
            self._abandon({event.batch})
        return None

    def _abandon(self, batches: set[str]) -> None:
        """Hold them no longer, so that their leases run out."""
        for held in [self._held[batch] for batch in batches if batch in self._held]:
            self._drop(held, list(held.jobs))

    def _handle(self, events: list[Event]) -> None:
        """Events of one kind."""
        first = events[0]
        if isinstance(first, Started):
            self._commit_starts([e for e in events if isinstance(e, Started)])
        elif isinstance(first, Outcome):
            self._commit_ends([e for e in events if isinstance(e, Outcome)])
        for event in events:
            if isinstance(event, Progress):
                self.info.hot, self.info.loaded, self.info.counters, self.info.room = event.hot, event.loaded, event.counters, event.room
                self.info.doubted = event.doubted
                self._tell_costs(event.costs)
            elif isinstance(event, Ready):
                self._on_ready(event)
            elif isinstance(event, Died):
                self._on_died(event)

    def _commit_starts(self, events: list[Started]) -> None:
        refs: dict[str, list[str]] = defaultdict(list)
        for event in events:
            refs[event.batch] += event.refs
        for batch, started in refs.items():
            held = self._held.get(batch)
            if held is None:
                self._runner.cancel(batch, started)
                continue
            held.begun |= dict.fromkeys(started, time.monotonic())  # before the ledger knows: `close` gives back what has not begun
            running = [ref for ref in started if (batch, ref) not in self._over]  # an end says that there was a start
            stop = self._ledger.start(batch, held.fence, running) if running else []
            for ref in started:
                self._events.started(split_ref(ref)[1])
            if stop:
                self._drop(held, stop)

    def _commit_ends(self, events: list[Outcome]) -> None:
        by_batch: dict[str, list[Outcome]] = defaultdict(list)
        for event in events:
            by_batch[event.batch].append(event)
        for batch, outcomes in by_batch.items():
            held = self._held.get(batch)
            if held is None:
                continue
            ends = [self._end(held, outcome) for outcome in outcomes]
            answers = self._ledger.finish(batch, held.fence, ends)
            self.info.ended += sum(answer == "stored" for answer in answers)
            for outcome, answer in zip(outcomes, answers, strict=True):
                self._tell(held, outcome, answer)
            self._forget(held, [outcome.ref for outcome in outcomes])

    def _end(self, held: _Held, outcome: Outcome) -> End:
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
            return End(outcome.ref, "succeeded", line, tokens=_tokens(outcome))
        job = held.jobs.get(outcome.ref)
        if outcome.later or (job is not None and job.laters < outcome.patience):
            delay_ms = max(outcome.after_ms, backoff_ms("later", job.laters if job else 0))
            return End(outcome.ref, "later", line, delay_ms=delay_ms)
        if outcome.retryable:
            return End(outcome.ref, "retry", line, delay_ms=backoff_ms(str(outcome.error.get("code")), job.attempts if job else 0))
        return End(outcome.ref, "failed", line)

    def _tell(self, held: _Held, outcome: Outcome, answer: str) -> None:
        job_id = split_ref(outcome.ref)[1]
        if answer == "stale":
            log.warning("result refused: the lease was lost", job=job_id, batch=held.batch)
        elif outcome.error is not None:
            tell = self._events.retried if answer == "retried" else self._events.failed
            tell(job_id, str(outcome.error.get("code")))
        else:
            runtime = time.monotonic() - held.begun.get(outcome.ref, time.monotonic())
            self._events.succeeded(job_id, runtime_s=runtime, tokens=_tokens(outcome))

    def _tell_costs(self, costs: dict[str, Any]) -> None:
        """What the runner measured, and what fetching an adapter takes, which only we know."""
        remote = {"remote": round(self._fetch_ms, 1)} if self._fetch_ms else {}
        self.info.costs = costs | {"switch_ms": costs.get("switch_ms", {}) | remote}

    def _on_ready(self, event: Ready) -> None:
        self._base = event.base
        self._tell_costs(event.costs)
        info = self.info
        info.width, info.max_prompt_tokens, info.max_token_bytes = event.width, event.max_prompt_tokens, event.max_token_bytes
        info.fallback = event.fallback
        info.ready = not self._closing.is_set()
        if event.base:
            self._registry.announce_base(info.pool, event.base)
        self._beat_once()
        self._ready.set()
        self._ledger.hello(info.name, info.incarnation)  # the scheduler hears of it at once
        log.info("model ready", pid=event.pid, width=event.width)

    def _on_died(self, event: Died) -> None:
        """The backend's process is gone. What had begun has used an attempt and will run alone next time; the rest goes back unharmed."""
        log.warning("model process died", reason=event.reason, running=len(event.running), waiting=len(event.waiting))
        self.info.ready = False
        self._beat_once()
        self._ledger.hello(self.info.name, self.info.incarnation)  # the scheduler hears of it at once and sends nothing meanwhile
        error = {"message": f"the model process died: {event.reason}", "type": "server_error", "code": "worker_died", "param": None}
        running = set(event.running)
        handed = set(event.waiting)
        unharmed: set[str] = set()
        if event.reading:  # what was computed beside it is not to blame, and neither an attempt nor under suspicion
            running, unharmed, handed = {event.reading}, running - {event.reading}, handed - {event.reading}
        first = next((held for held in list(self._held.values()) if handed & held.jobs.keys()), None)
        if not running and first is not None:  # no job had begun: loading what the first batch needs is all it can have died of
            running = handed & first.jobs.keys()
            self._commit_starts([Started(first.batch, list(running))])
        for held in list(self._held.values()):
            mine = [ref for ref in list(held.jobs) if ref in running]
            self._commit_starts([Started(held.batch, mine)] if mine else [])
            self._commit_ends([Outcome(held.batch, ref, error=error, retryable=True) for ref in mine])
            self._put_off(held, [ref for ref in list(held.jobs) if ref in unharmed])
            self._give_back(held, list(held.jobs))

    # -- leases ---------------------------------------------------------------------------------------------------------------------------

    def _beat_loop(self) -> None:
        while not self._closing.wait(self._settings.heartbeat_ms / 1000):
            try:
                self._renew()
                self._beat_once()
                self._take_unheard()
            except Unavailable as error:
                log.warning("ledger unavailable, leases not renewed", reason=error.message)
            except Exception:
                log.exception("heartbeat failed")
        while self._held:  # draining
            with contextlib.suppress(Unavailable):
                self._renew()
            time.sleep(self._settings.heartbeat_ms / 1000)

    def _renew(self) -> None:
        now = time.monotonic()
        if now - self._looked > 3 * self._settings.heartbeat_ms / 1000:  # we stood still, or the ledger did: the model may be well
            self._moved = now
        self._looked = now
        with self._lock:
            held = dict(self._held)
        if not held:
            return
        silent = time.monotonic() - self._moved
        computing = self.info.ready and not self._fetching
        if computing and silent > self._settings.hang_s:
            self._moved = time.monotonic()
            self._runner.kill(f"no progress for {silent:.0f} s")
            return
        lost, stop = self._ledger.renew([(b.batch, b.fence) for b in held.values()], self._settings.lease_ms)
        for name in lost:
            if held[name].jobs:  # else it has ended meanwhile
                log.warning("lease lost", batch=name)
            self._drop(held[name], list(held[name].jobs))
        for batch, ref in stop:
            self._stop(batch, [ref])

    def _take_unheard(self) -> None:
        """Batches of ours whose wake-up has not come by the second heartbeat: lost, or refused by a broker that is full."""
        if not self.info.ready:
            return
        mine = set(self._ledger.outstanding(self.info.name))
        for batch in (mine & self._unheard) - self._held.keys():
            self._take_told(batch)
        self._unheard = mine - self._held.keys()

    def _take_told(self, batch: str) -> None:
        """As `run_batch`, for a thread that must not wait for a file to be fetched."""
        held = self._take(batch)
        if held is not None and adapter_of(held.digest) in self._fetched:
            self._run(held)
        elif held is not None:
            self._fetchers.submit(self._run, held)

    def _word_loop(self) -> None:
        """A batch is taken at once, and what is cancelled stops within a decode step; should a word be lost, Celery's message and the next
        heartbeat say the same."""
        while not self._closing.is_set():
            try:
                for word, batch, refs in self._ledger.words(self.info.name, self._closing):
                    if word == "take":
                        self._take_told(batch)
                    else:
                        self._stop(batch, refs)
            except Exception as error:  # this thread must not end: nobody else tells as fast
                log.warning("word from the ledger may be missed; listening again", reason=str(error))
                self._closing.wait(1)

    def _beat_once(self) -> None:
        with contextlib.suppress(redis.RedisError):
            planned = self._registry.beat(self.info)
            if self._expect is not None:
                self.info.absent = self._expect(planned, self._base)

    def _drop(self, held: _Held, refs: list[str]) -> None:
        """Stop computing what is no longer ours, or no longer wanted."""
        self._runner.cancel(held.batch, refs)
        self._forget(held, refs)

    def _stop(self, batch: str, refs: Iterable[str]) -> None:
        """What was cancelled, deleted or recalled while we had it."""
        held = self._held.get(batch)
        if held is not None and (mine := [ref for ref in refs if ref in held.jobs]):
            self._drop(held, mine)

    def _give_back(self, held: _Held, refs: list[str]) -> None:
        if not refs:
            return
        self._runner.cancel(held.batch, refs)
        with contextlib.suppress(Unavailable):
            if self._ledger.give_back(held.batch, held.fence, refs) < len(refs):  # some began meanwhile
                self._ledger.finish(held.batch, held.fence, [End(ref, "later") for ref in refs if ref in held.begun])
        self._forget(held, refs)

    def _put_off(self, held: _Held, refs: list[str]) -> None:
        """Queue again, at no cost of an attempt, what has begun."""
        if not refs:
            return
        self._runner.cancel(held.batch, refs)
        with contextlib.suppress(Unavailable):
            self._ledger.finish(held.batch, held.fence, [End(ref, "later") for ref in refs])
        self._forget(held, refs)

    def _forget(self, held: _Held, refs: Iterable[str]) -> None:
        with self._lock:
            for ref in refs:
                held.jobs.pop(ref, None)
                held.begun.pop(ref, None)
            if not held.jobs:
                self._held.pop(held.batch, None)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
