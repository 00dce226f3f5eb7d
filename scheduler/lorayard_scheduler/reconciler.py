"""What the leader puts right at intervals: messages never taken, leases run out, jobs delayed or expired, queues of workers that are gone,
listings of jobs whose results have expired, and whatever a slow scan of the whole ledger finds."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import redis
import structlog
from celery import Celery

from lorayard.celery_app import worker_queue
from lorayard.errors import Unavailable
from lorayard.ledger.audit import Finding, pages
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import KeyRing, WorkerInfo, WorkerRegistry

log = structlog.get_logger()

REAP_EVERY_S = 0.25
REAP_LIMIT = 1_000
MOST_S = 0.05
GRACE_MS = 5_000
"""What leases get where the server was away: workers need a heartbeat and their wait between attempts to reach it again."""
AUDIT_EVERY_S = 0.25
"""A page of the scan: some 2,000 keys a second, about 2 % of one core of the server."""
AUDIT_PAUSE_S = 30.0
FORGET_EVERY_S = 60.0
GONE_MS = 60_000
"""A worker that has told nothing for so long is struck off, and its Celery queue deleted: whatever it held was queued again long ago."""


class Reconciler:
    """The ledger's transitions do the work; this decides when, and tells what was repaired."""

    def __init__(self, ledger: Ledger, app: Celery) -> None:
        self._ledger = ledger
        self._app = app
        self._keys = KeyRing(ledger.client)
        self._workers = WorkerRegistry(ledger.client)
        self._due: dict[str, float] = {"forget": time.monotonic() + FORGET_EVERY_S}
        self._pages: Iterator[list[Finding]] = iter(())
        self._striking = threading.Thread()

    def sweep(self) -> None:
        """Do what is due by now; cheap when nothing is."""
        if self._is_due("reap", REAP_EVERY_S):
            self._reap()
        if self._is_due("audit", AUDIT_EVERY_S):
            self._audit()
        if self._is_due("forget", FORGET_EVERY_S):
            for tenant in self._keys.tenants():
                self._ledger.forget(tenant)
            self._strike_off()

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every_s
        return True

    def _reap(self) -> None:
        """Until nothing is left to be put right, or something else has waited long enough."""
        give_up = time.monotonic() + MOST_S
        while time.monotonic() < give_up:
            reaped = self._ledger.reap(limit=REAP_LIMIT, grace_ms=GRACE_MS)
            if any(reaped):
                log.info("put right", **{name: number for name, number in reaped._asdict().items() if number})
            if max(reaped) < REAP_LIMIT:
                return

    def _audit(self) -> None:
        """A page of the scan on which there was something to look at; after the last, a pause."""
        page = next(self._pages, None)
        if page is None:
            self._pages = pages(self._ledger, repair=True)
            self._due["audit"] = time.monotonic() + AUDIT_PAUSE_S
            return
        kinds = Counter(finding.kind for finding in page)
        for kind, one in {finding.kind: finding for finding in page}.items():
            log.warning("ledger repaired" if one.repaired else "ledger wrong", found=one.text, kind=kind, times=kinds[kind])

    def _strike_off(self) -> None:
        """In a thread of its own: a broker that is away takes seconds to say so, and nothing would be planned meanwhile."""
        if not self._striking.is_alive() and (gone := self._workers.silent(self._ledger.pool, GONE_MS)):
            self._striking = threading.Thread(target=self._drain_all, args=(gone,), name="lost-workers", daemon=True)
            self._striking.start()

    def _drain_all(self, gone: list[WorkerInfo]) -> None:
        """Whoever is not struck off, for the broker was away, will be the next time."""
        try:
            for worker in gone:
                if self._workers.is_silent(worker):
                    dropped = self._drain(worker)
                    self._workers.strike_off(worker)
                    log.info("worker struck off", worker=worker.name, messages_dropped=dropped)
        except (Unavailable, redis.RedisError) as error:
            log.warning("a lost worker is not struck off yet", reason=str(error))

    def _drain(self, worker: WorkerInfo) -> int:
        """Delete a lost worker's Celery queue; how many messages it held, wake-ups for batches that others have by now. Raises
        `Unavailable`."""
        try:
            with self._app.connection_for_write() as connection:
                queue = self._app.amqp.queues[worker_queue(worker.name)](connection.default_channel)
                queue.declare()  # kombu deletes the bindings of what it knows only
                dropped: int = queue.purge() or 0
                queue.delete()
        except Exception as error:  # whatever the broker's transport raises; an old message is harmless
            raise Unavailable(f"the broker does not answer ({type(error).__name__})") from error
        return dropped
