"""The Celery side of a worker: its own queue, one task that wakes it up, and the process around them."""

from __future__ import annotations

import socket
import time
from typing import Any

import structlog
from celery import Celery
from celery.platforms import EX_FAILURE
from celery.worker import state
from celery.worker.request import Request
from kombu import Exchange, Queue

from lorayard.celery_app import RUN_BATCH, worker_queue
from lorayard.errors import LorayardError, Unavailable
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import Planned
from lorayard.settings import Settings
from lorayard.telemetry import JobEvents
from lorayard_workers.control import FETCHERS, Control, Expect, FetchAdapter, Handover
from lorayard_workers.runner import Runner

log = structlog.get_logger()

START_S = 900.0


class _WakeUp(Request):  # type: ignore[misc]
    """A message that is not acknowledged: the ledger has a batch sent again long before the broker would send a message again.

    With acknowledgements every batch would cost two more durable writes, one of them before it can begin.
    """

    def acknowledge(self) -> None:
        self.acknowledged = True


def serve_llama(settings: Settings, ledger: Ledger, app: Celery) -> None:
    """The `lorayard worker llama` process, until SIGTERM or SIGINT. Raises `SetupError` when the model cannot be served."""
    from lorayard_workers.llama.files import AdapterFiles
    from lorayard_workers.llama.process import LlamaRunner

    runner, files = LlamaRunner(settings), AdapterFiles(settings)

    def expect(planned: Planned, base: dict[str, Any]) -> list[str]:
        runner.expect(planned.digests)
        return files.expect(planned, base)

    serve(settings, ledger, app, runner, files.fetch, kind="llama", expect=expect)


def serve(
    settings: Settings,
    ledger: Ledger,
    app: Celery,
    runner: Runner,
    fetch: FetchAdapter,
    *,
    kind: str,
    handover: Handover | None = None,
    expect: Expect | None = None,
) -> None:
    """A worker process around any backend, until SIGTERM or SIGINT. Raises `SetupError` when the backend does not become ready."""
    events = JobEvents(app, node_name(settings))
    control = Control(settings, ledger, runner, fetch, events, kind=kind, handover=handover, expect=expect)

    @app.task(name=RUN_BATCH, ignore_result=True, Request=_WakeUp)  # type: ignore[untyped-decorator]
    def run_batch(batch: str) -> None:
        try:
            control.run_batch(batch)
        except Unavailable as error:
            log.warning("batch not taken; there will be word of it again", batch=batch, reason=error.message)
        except LorayardError as error:
            log.error("batch not run", batch=batch, reason=error.message)

    try:
        control.start()
        control.wait_ready(START_S)
        _consume(settings, app)
    finally:
        control.close()


def _consume(settings: Settings, app: Celery) -> None:
    """Take wake-ups until SIGTERM or SIGINT.

    Celery's consumer gives up for good where a broker is lost at a moment that kombu does not expect (it reconnects to Redis inside of
    reading, say). The model and what it computes outlive that: another consumer takes its place.
    """
    name = worker_queue(settings.worker)
    app.conf.task_queues = [Queue(name, Exchange(name), routing_key=name, no_ack=True)]
    while True:
        worker = app.Worker(
            hostname=node_name(settings),
            queues=[name],
            pool="threads",
            concurrency=FETCHERS,
            loglevel="WARNING",
            quiet=True,
            without_gossip=True,
            without_mingle=True,
        )
        worker.start()
        if worker.exitcode != EX_FAILURE or state.should_stop is not None or state.should_terminate is not None:
            return
        log.warning("Celery's consumer gave up; starting another")
        time.sleep(1)


def node_name(settings: Settings) -> str:
    """The worker's name in Celery's and Flower's sense."""
    return f"{settings.worker}@{socket.gethostname()}"
