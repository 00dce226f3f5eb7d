"""What people watch: logs, and a row a job in Flower. Neither ever carries a prompt or an answer, nor any correctness."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
from typing import Any, TextIO, cast

import structlog
from celery import Celery


def configure_logging(role: str) -> None:
    """One line an event on standard error, in colour on a terminal; each says the role."""
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.LogfmtRenderer()
    structlog.configure(
        processors=[
            lambda _, __, event: {**event, "role": role},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Lossy())),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")


class _Lossy:
    """Standard error, for as long as somebody reads it: a log line that cannot be written must not stop who is putting things in order."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


class JobEvents:
    """Celery events of single jobs, so that Flower shows a row a job. Bounded; dropped while the broker is away."""

    def __init__(self, app: Celery, hostname: str, *, most: int = 20_000) -> None:
        self._app = app
        self._hostname = hostname
        self._queue: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(most)
        self._thread = threading.Thread(target=self._run, name="flower-events", daemon=True)
        self._thread.start()

    def received(self, job_id: str, *, adapter: str | None, tenant: str, batch: str, attempt: int) -> None:
        kwargs = repr({"adapter": adapter or "(base)", "tenant": tenant, "batch": batch})
        self._put("task-received", uuid=job_id, name="lorayard.infer", args="()", kwargs=kwargs, retries=attempt, eta=None, expires=None)

    def started(self, job_id: str) -> None:
        self._put("task-started", uuid=job_id)

    def succeeded(self, job_id: str, *, runtime_s: float, tokens: int) -> None:
        self._put("task-succeeded", uuid=job_id, result=f"{tokens} tokens", runtime=runtime_s)

    def failed(self, job_id: str, code: str) -> None:
        self._put("task-failed", uuid=job_id, exception=code, traceback="")

    def retried(self, job_id: str, code: str) -> None:
        self._put("task-retried", uuid=job_id, exception=code, traceback="")

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
            self._thread.join(2)

    def _put(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((kind, fields))

    def _run(self) -> None:
        while True:
            try:
                with (
                    self._app.connection_for_write() as connection,
                    self._app.events.Dispatcher(connection, hostname=self._hostname) as send,
                ):
                    while (item := self._queue.get()) is not None:
                        send.send(item[0], retry=False, **item[1])
                    return
            except Exception:  # whatever the broker's transport raises; an event lost is a row missing, nothing else
                structlog.get_logger().debug("event dropped")
                threading.Event().wait(1)
