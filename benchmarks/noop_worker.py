"""A worker that computes nothing: what is left is Lorayard itself. Its settings are `lorayard worker`'s: `LORAYARD_*`.

LORAYARD_REDIS_URL=... python -m benchmarks.noop_worker [--hold SECONDS]
"""

from __future__ import annotations

import argparse
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence

from lorayard import embedded
from lorayard.celery_app import make_app
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import open_ledger
from lorayard.settings import Settings
from lorayard.telemetry import configure_logging
from lorayard_workers.runner import Event, Outcome, Progress, Ready, Started, Work
from lorayard_workers.tasks import serve

WIDTH = 512

ANSWER = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


class NoopRunner:
    """Answers every job of a batch when the batch comes, or `hold_s` later, so that a worker can be killed in between."""

    def __init__(self, hold_s: float = 0.0) -> None:
        self._hold_s = hold_s
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._stopped: set[str] = set()
        self._done = 0

    def start(self, emit: Callable[[Event], None]) -> None:
        threading.Thread(target=self._run, args=(emit,), name="noop", daemon=True).start()

    def submit(self, work: Work) -> None:
        self._work.put(work)

    def cancel(self, batch: str, refs: Sequence[str]) -> None:
        if self._hold_s:
            self._stopped.update(refs)

    def kill(self, reason: str) -> None:
        """Nothing computes, so nothing can hang."""

    def close(self) -> None:
        self._work.put(None)

    def _run(self, emit: Callable[[Event], None]) -> None:
        emit(Ready({}, WIDTH, 1_000_000, 16, os.getpid()))
        while (work := self._work.get()) is not None:
            emit(Started(work.batch, [item.ref for item in work.items]))
            answer = ANSWER | {"started_ns": time.time_ns()}
            if self._hold_s:
                time.sleep(self._hold_s)
            for item in work.items:
                if item.ref not in self._stopped:
                    emit(Outcome(work.batch, item.ref, response=answer, temperature="hot"))
            self._done += len(work.items)
            emit(Progress(self._done, [], [], {"jobs": self._done}))
            self._stopped.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hold", type=float, default=0.0, metavar="SECONDS", help="how long a batch is kept before it is answered")
    hold = parser.parse_args().hold
    configure_logging("worker")
    settings = Settings.load()
    with connect(embedded.redis_url(settings)) as client:
        app = make_app(embedded.broker_url(settings))
        serve(settings, open_ledger(client, settings), app, NoopRunner(hold), lambda digest, _: digest, kind="noop")


if __name__ == "__main__":
    main()
