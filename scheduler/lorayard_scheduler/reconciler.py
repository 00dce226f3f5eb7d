"""What the leader puts right at intervals: messages never taken, leases run out, jobs delayed or expired, stale listings."""

from __future__ import annotations

import time

import structlog

from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import KeyRing

log = structlog.get_logger()

REAP_EVERY_S = 0.25
FORGET_EVERY_S = 60.0


class Reconciler:
    """The ledger's transitions do the work; this decides when, and tells what was repaired."""

    def __init__(self, ledger: Ledger, keys: KeyRing) -> None:
        self._ledger = ledger
        self._keys = keys
        self._reaped = 0.0
        self._forgot = time.monotonic()

    def sweep(self) -> None:
        """Do what is due by now; cheap when nothing is."""
        now = time.monotonic()
        if now - self._reaped >= REAP_EVERY_S:
            self._reaped = now
            reaped = self._ledger.reap()
            if any(reaped):
                log.info("put right", batches_requeued=reaped.batches, delayed_woken=reaped.woken, expired=reaped.expired)
        if now - self._forgot >= FORGET_EVERY_S:
            self._forgot = now
            for tenant in self._keys.tenants():
                self._ledger.forget(tenant)
