"""An API and a real scheduler over the ledger, with workers that say they are there and do as they are told by a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from api_support import Api, job, serving
from ledger_support import make_entry

from lorayard.celery_app import make_app
from lorayard.ledger.records import End
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry
from lorayard_scheduler.dispatcher import Dispatcher

SLOW = {"switch_ms": {"loaded": 50.0}, "prefill_tokens_per_s": 1000.0, "step_ms": {"1": 50.0, "2": 60.0}}
"""Two places; a job of 200 and 30 tokens takes 1.1 s at best."""
HOSTED = "llama-3.1-8b-instant"


class Yard:
    """An API process's app, a real scheduler beside it, and workers."""

    def __init__(self, api: Api, redis_url: str) -> None:
        self.api, self.ledger = api, api.ledger
        self.registry = WorkerRegistry(api.ledger.client)
        self._workers: dict[str, WorkerInfo] = {}
        self._stop = threading.Event()
        self._dispatcher = Dispatcher(api.settings, api.ledger, make_app(redis_url))
        self._threads = [threading.Thread(target=self._beat), threading.Thread(target=self._dispatcher.run)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        self._dispatcher.stop()
        for thread in self._threads:
            thread.join()

    def hire(self, *names: str, costs: dict[str, Any] | None = None, **told: Any) -> None:
        """Workers of these names, and what they tell of themselves: local ones with two places, if nothing else is said."""
        for name in names:
            fields: dict[str, Any] = {"kind": "llama", "width": 2, "costs": costs or SLOW} | told
            info = WorkerInfo(name=name, pool="main", incarnation="i", host="h", pid=1, ready=True, **fields)
            self._workers = self._workers | {name: info}

    def host(self, name: str = "g", **told: Any) -> None:
        """A hosted one."""
        fields: dict[str, Any] = {"kind": "hosted", "room": 8, "loaded": ["base"], "width": 0} | told
        self.hire(name, **fields)

    def _beat(self) -> None:
        while not self._stop.wait(0.1):
            for info in self._workers.values():
                self.registry.beat(info)

    def enqueue(self, count: int, digest: str, *, tenant: str = "acme", **changes: Any) -> list[str]:
        ids = [f"{tenant}-{digest}-{time.monotonic_ns()}-{n}" for n in range(count)]
        changes = {"wait_ms": 120_000} | changes
        self.ledger.enqueue([make_entry(i, digest=digest, tenant=tenant, **changes) for i in ids], max_queued=99_999)
        return ids

    def show(self, job_id: str, who: str = "acme") -> dict[str, Any]:
        document: dict[str, Any] = self.api.call("GET", f"/v1/jobs/{job_id}", who).json()
        return document

    def until(self, job_id: str, *words: str, who: str = "acme") -> dict[str, Any]:
        """The document, once its explanation has all these words."""
        give_up = time.monotonic() + 60
        while True:
            document = self.show(job_id, who)
            if all(word in (document["explanation"] or "") for word in words):
                return document
            assert time.monotonic() < give_up, document
            time.sleep(0.05)

    def left(self, job_id: str) -> dict[str, float]:
        """Its quote from now on, ms; with the risk."""
        eta = self.show(job_id)["eta"]
        seconds, micros = self.ledger.client.time()
        now = 1000 * int(seconds) + int(micros) / 1000
        return {"median": eta["median_ms"] - now, "p80": eta["p80_ms"] - now, "risk": eta["risk"]}

    def begin(self) -> list[tuple[str, int, list[str]]]:
        """Take and start whatever the workers were given; (batch, fence, refs)."""
        begun = []
        for name in self._workers:
            for batch in self.ledger.outstanding(name):
                if (taken := self.ledger.take(batch, name, "i", 60_000)) is not None:
                    refs = [one.ref for one in taken.jobs]
                    self.ledger.start(batch, taken.fence, refs)
                    begun.append((batch, taken.fence, refs))
        return begun

    def run(self, *, ms: float = 0.0, **outcome: Any) -> None:
        """Begin, and end it so much later."""
        for batch, fence, refs in self.begin():
            time.sleep(ms / 1000)
            self.ledger.finish(batch, fence, [End(ref, "succeeded", msgspec.json.encode(outcome), 3) for ref in refs])

    def drain(self, job_id: str) -> None:
        """Run whatever is there until this job has ended."""
        give_up = time.monotonic() + 60
        while self.show(job_id)["status"] != "succeeded":
            self.run()
            assert time.monotonic() < give_up
            time.sleep(0.02)


@contextmanager
def yard_of(redis_url: str, folder: Path, **settings: Any) -> Iterator[Yard]:
    with serving(redis_url, folder, delivery_ms=60_000, **settings) as api:
        api.new_keys()
        yard = Yard(api, redis_url)
        try:
            yield yard
        finally:
            yard.close()


def eventually(what: Callable[[], Any]) -> Any:
    give_up = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return found


def quoted(yard: Yard, **fields: Any) -> dict[str, Any]:
    """A row of a submission that was quoted."""

    def row() -> dict[str, Any] | None:
        (found,) = yard.api.post(job(**fields))
        return found if "eta" in found or "error" in found else None

    found: dict[str, Any] = eventually(row)
    return found
