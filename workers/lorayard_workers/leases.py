"""What a worker has: the batches under its leases, and how their jobs leave it other than by an end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable

import structlog

from lorayard.errors import Unavailable
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import End, Taken, TakenJob
from lorayard_workers.runner import Runner

log = structlog.get_logger()


class Held:
    """A batch under our lease: its jobs that have not ended, and when those of them that have begun did (by the monotonic clock)."""

    def __init__(self, taken: Taken) -> None:
        self.batch = taken.batch
        self.fence = taken.fence
        self.digest = taken.digest
        self.jobs: dict[str, TakenJob] = {job.ref: job for job in taken.jobs}
        self.begun: dict[str, float] = {}


class Leases:
    """The batches this worker has, by name; any thread may change them. Whatever leaves is computed no longer."""

    def __init__(self, ledger: Ledger, runner: Runner, lease_ms: int) -> None:
        self._ledger = ledger
        self._runner = runner
        self._lease_ms = lease_ms
        self._lock = threading.Lock()
        self.held: dict[str, Held] = {}

    def hold(self, taken: Taken) -> Held:
        """A batch whose lease has begun."""
        held = Held(taken)
        with self._lock:
            self.held[taken.batch] = held
        return held

    def batches(self) -> list[Held]:
        """As they are at this moment."""
        with self._lock:
            return list(self.held.values())

    def renew(self) -> None:
        """Of all, begun or not; and drop what is no longer ours, or no longer wanted. Raises `Unavailable`."""
        held = {batch.batch: batch for batch in self.batches()}
        lost, stop = self._ledger.renew([(b.batch, b.fence) for b in held.values()], self._lease_ms)
        for name in lost:
            if held[name].jobs:  # else it has ended meanwhile
                log.warning("lease lost", batch=name)
            self.drop(held[name], list(held[name].jobs))
        for batch, ref in stop:
            self.stop(batch, [ref])

    def drop(self, held: Held, refs: list[str]) -> None:
        """Stop computing what is no longer ours, or no longer wanted."""
        self._runner.cancel(held.batch, refs)
        self.forget(held, refs)

    def stop(self, batch: str, refs: Iterable[str]) -> None:
        """What was cancelled, deleted or recalled while we had it."""
        held = self.held.get(batch)
        if held is not None and (mine := [ref for ref in refs if ref in held.jobs]):
            self.drop(held, mine)

    def give_back(self, held: Held, refs: list[str]) -> None:
        """Queue again what has not begun; and at no cost of an attempt what begins meanwhile."""
        if not refs:
            return
        self._runner.cancel(held.batch, refs)
        with contextlib.suppress(Unavailable):
            if self._ledger.give_back(held.batch, held.fence, refs) < len(refs):  # some began meanwhile
                self._ledger.finish(held.batch, held.fence, [End(ref, "later") for ref in refs if ref in held.begun])
        self.forget(held, refs)

    def put_off(self, held: Held, refs: list[str]) -> None:
        """Queue again, at no cost of an attempt, what has begun."""
        if not refs:
            return
        self._runner.cancel(held.batch, refs)
        with contextlib.suppress(Unavailable):
            self._ledger.finish(held.batch, held.fence, [End(ref, "later") for ref in refs])
        self.forget(held, refs)

    def forget(self, held: Held, refs: Iterable[str]) -> None:
        """They have ended, or are another's; a batch is held no longer when all of its jobs are."""
        with self._lock:
            for ref in refs:
                held.jobs.pop(ref, None)
                held.begun.pop(ref, None)
            if not held.jobs:
                self.held.pop(held.batch, None)

    def abandon(self, batches: set[str]) -> None:
        """Hold them no longer, so that their leases run out."""
        for held in [self.held[batch] for batch in batches if batch in self.held]:
            self.drop(held, list(held.jobs))
