"""The control process of a worker: takes batches, feeds the runner, beats while there is progress, and leaves in good order.

Computing happens elsewhere (`runner.py`); nothing here blocks on it. Threads: one hears the ledger's words, of batches to take and of jobs
to stop, and some fetch adapters; Celery's call `run_batch`, should a word be lost; the runner's call `_hear`; one thread commits what was
heard (`commits.py`); one beats, and renews leases (`leases.py`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import redis
import structlog

from lorayard.errors import LorayardError, SetupError, Unavailable
from lorayard.jobs import BASE_DIGEST, ENDPOINT, adapter_of, lane_of
from lorayard.ledger.keys import split_ref
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import Taken
from lorayard.ledger.registry import Planned, WorkerInfo, WorkerRegistry
from lorayard.settings import Settings
from lorayard.telemetry import JobEvents
from lorayard_workers.commits import AWAY_S, Commits
from lorayard_workers.leases import Held, Leases
from lorayard_workers.retries import company
from lorayard_workers.runner import AdapterFile, Died, Event, Progress, Ready, Runner, Work, WorkItem

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
        self._leases = Leases(ledger, runner, settings.lease_ms)
        self._closing = threading.Event()
        self._commits = Commits(ledger, self._leases, runner, events, self._of_backend, self._closing)
        self._lock = threading.Lock()
        self._unheard: set[str] = set()  # batches that were ours at the last heartbeat and not taken
        self._told: deque[str] = deque(maxlen=64)  # batches that were told of lately: most are told twice
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetch")
        self._ready = threading.Event()
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
        loops = {"commit": self._commits.run, "beat": self._beat_loop, "words": self._word_loop}
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
        for batch in self._leases.batches():
            self._leases.give_back(batch, [ref for ref in list(batch.jobs) if ref not in batch.begun])
        give_up = time.monotonic() + DRAIN_S
        while self._leases.held and time.monotonic() < give_up:
            time.sleep(0.05)
        for batch in self._leases.batches():
            self._leases.put_off(batch, list(batch.jobs))
        self._commits.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(AWAY_S)
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

    def _take(self, batch: str) -> Held | None:
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
        if not self.info.ready:  # the model is being loaded again, or we are leaving: others may have room
            self._ledger.give_back(batch, taken.fence, [job.ref for job in taken.jobs])
            return None
        left = taken if self._handover is None else self._handover(taken)
        if left is None:
            return None
        if not self._leases.held:
            self._moved = time.monotonic()
        held = self._leases.hold(left)
        for job in left.jobs:
            tenant, job_id = split_ref(job.ref)
            self._events.received(job_id, adapter=job.meta.get("adapter"), tenant=tenant, batch=batch, attempt=job.attempts)
        return held

    def _run(self, held: Held) -> None:
        try:
            self._submit(held, self._adapter(held.digest))
        except LorayardError as error:
            log.warning("adapter not usable", adapter=held.digest[:12], reason=error.message)
            self._commits.fail(held, error.document(), later=isinstance(error, Unavailable))
        except Exception:  # held for ever otherwise
            log.exception("batch not run", batch=held.batch)
            self._leases.give_back(held, list(held.jobs))
        if self._closing.is_set():  # it came while `close` looked at what there is to give back
            self._leases.give_back(held, [ref for ref in list(held.jobs) if ref not in held.begun])

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

    def _submit(self, held: Held, adapter: AdapterFile | None) -> None:
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

    # -- the runner tells -----------------------------------------------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        self._moved = time.monotonic()
        self._commits.hear(event)

    def _of_backend(self, event: Progress | Ready | Died) -> None:
        """In its turn among what is committed."""
        if isinstance(event, Progress):
            self.info.hot, self.info.loaded, self.info.counters, self.info.room = event.hot, event.loaded, event.counters, event.room
            self.info.doubted = event.doubted
            self._tell_costs(event.costs)
        elif isinstance(event, Ready):
            self._on_ready(event)
        else:
            self._on_died(event)

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
        """The backend's process is gone, and is being replaced."""
        log.warning("model process died", reason=event.reason, running=len(event.running), waiting=len(event.waiting))
        self.info.ready = False
        self._beat_once()
        self._ledger.hello(self.info.name, self.info.incarnation)  # the scheduler hears of it at once and sends nothing meanwhile
        self._commits.died(event)

    # -- heartbeats, and words from the ledger -------------------------------------------------------------------------------------------

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
        while self._leases.held:  # draining
            with contextlib.suppress(Unavailable):
                self._renew()
            time.sleep(self._settings.heartbeat_ms / 1000)

    def _renew(self) -> None:
        """Leases, while the runner tells of progress; one that hangs is killed."""
        now = time.monotonic()
        if now - self._looked > 3 * self._settings.heartbeat_ms / 1000:  # we stood still, or the ledger did: the model may be well
            self._moved = now
        self._looked = now
        if not self._leases.held:
            return
        silent = time.monotonic() - self._moved
        computing = self.info.ready and not self._fetching
        if computing and silent > self._settings.hang_s:
            self._moved = time.monotonic()
            self._runner.kill(f"no progress for {silent:.0f} s")
            return
        self._leases.renew()

    def _take_unheard(self) -> None:
        """Batches of ours whose wake-up has not come by the second heartbeat: lost, or refused by a broker that is full."""
        if not self.info.ready:
            return
        mine = set(self._ledger.outstanding(self.info.name))
        for batch in (mine & self._unheard) - self._leases.held.keys():
            self._take_told(batch)
        self._unheard = mine - self._leases.held.keys()

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
                        self._leases.stop(batch, refs)
            except Exception as error:  # this thread must not end: nobody else tells as fast
                log.warning("word from the ledger may be missed; listening again", reason=str(error))
                self._closing.wait(1)

    def _beat_once(self) -> None:
        self.info.ended = self._commits.stored
        with contextlib.suppress(redis.RedisError):
            planned = self._registry.beat(self.info)
            if self._expect is not None:
                self.info.absent = self._expect(planned, self._base)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
