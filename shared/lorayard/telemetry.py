"""What people watch: logs, and a row a job in Flower. Neither ever carries a prompt or an answer, nor any correctness."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
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


ROWS_PER_S = 200
"""Jobs a second of one worker that get a row in Flower, in the long run: what Flower's one thread takes in beside everything else."""

_BURST = 1_000  # rows that may come at once after a quiet time
_MOST = 20_000  # events kept while the broker is away
_EVENTS_A_JOB = 3  # received, started, and one of succeeded, failed, retried
_GATHER_S = 0.1  # events wait so long for others to go in the same message
_GROUP = 500
_TELL_EVERY_S = 60.0


class JobEvents:
    """Celery events of single jobs, so that Flower shows a row a job.

    Costs its callers a few microseconds and never makes them wait: a thread sends the events in groups. A job gets all of its events or
    none: none above `rows_per_s` (but for a burst), or while too many wait for a broker that is away. `dropped` counts those jobs.
    """

    def __init__(self, app: Celery, hostname: str, *, rows_per_s: float = ROWS_PER_S, burst: int = _BURST, most: int = _MOST) -> None:
        self.dropped = 0
        self._app = app
        self._hostname = hostname
        self._rate, self._burst, self._most = rows_per_s, burst, most
        self._room, self._filled = float(burst), time.monotonic()  # a token bucket
        self._shown: dict[str, None] = {}  # jobs whose other events will be sent, oldest first
        self._queue: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._dropped_told, self._tell_again = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="flower-events", daemon=True)
        self._thread.start()

    def received(self, job_id: str, *, adapter: str | None, tenant: str, batch: str, attempt: int) -> None:
        if not self._admits():
            self.dropped += 1
            return
        while len(self._shown) >= self._most // (2 * _EVENTS_A_JOB):  # of a job that went elsewhere no more is heard
            self._shown.pop(next(iter(self._shown)), None)
        self._shown[job_id] = None
        kwargs = repr({"adapter": adapter or "(base)", "tenant": tenant, "batch": batch})
        self._put("task-received", uuid=job_id, name="lorayard.infer", args="()", kwargs=kwargs, retries=attempt, eta=None, expires=None)

    def started(self, job_id: str) -> None:
        if job_id in self._shown:
            self._put("task-started", uuid=job_id)

    def succeeded(self, job_id: str, *, runtime_s: float, tokens: int) -> None:
        if self._last(job_id):
            self._put("task-succeeded", uuid=job_id, result=f"{tokens} tokens", runtime=runtime_s)

    def failed(self, job_id: str, code: str) -> None:
        if self._last(job_id):
            self._put("task-failed", uuid=job_id, exception=code, traceback="")

    def retried(self, job_id: str, code: str) -> None:
        if self._last(job_id):
            self._put("task-retried", uuid=job_id, exception=code, traceback="")

    def close(self) -> None:
        """Send what waits, for at most two seconds."""
        self._queue.put(None)
        self._thread.join(2)

    def _admits(self) -> bool:
        """Whether there is room for one more job's events: in the rate, and in what may wait. Called by several threads: near enough."""
        if self._room < 1:
            now = time.monotonic()
            self._room = min(float(self._burst), self._room + (now - self._filled) * self._rate)
            self._filled = now
            if self._room < 1:
                return False
        if self._queue.qsize() >= self._most // 2:  # the other half is for the rest of the jobs that are shown
            return False
        self._room -= 1
        return True

    def _last(self, job_id: str) -> bool:
        """Whether this job's last event is to be sent, once."""
        return self._shown.pop(job_id, self) is None

    def _put(self, kind: str, **fields: Any) -> None:
        self._queue.put((kind, fields | {"timestamp": time.time()}))

    def _run(self) -> None:
        while True:
            try:
                with (
                    self._app.connection_for_write() as connection,
                    self._app.events.Dispatcher(
                        connection, hostname=self._hostname, buffer_group={"task"}, buffer_limit=_GROUP, buffer_while_offline=False
                    ) as send,
                ):
                    while self._send_group(send):
                        pass
                    return
            except Exception:  # whatever the broker's transport raises; an event lost is a row missing, nothing else
                structlog.get_logger().debug("events dropped")
                time.sleep(1)

    def _send_group(self, send: Any) -> bool:
        """What came within a moment, in one message; False at the end."""
        items = [self._queue.get()]
        if items[0] is not None and self._queue.qsize() < _GROUP:
            time.sleep(_GATHER_S)
        with contextlib.suppress(queue.Empty):
            while items[-1] is not None and len(items) < _GROUP:
                items.append(self._queue.get_nowait())
        for item in items:
            if item is not None:
                send.send(item[0], retry=False, **item[1])
        send.flush()
        self._tell_dropped()
        return items[-1] is not None

    def _tell_dropped(self) -> None:
        now = time.monotonic()
        if self.dropped > self._dropped_told and now > self._tell_again:
            structlog.get_logger().info("jobs without a row in Flower", jobs=self.dropped - self._dropped_told, since_start=self.dropped)
            self._dropped_told, self._tell_again = self.dropped, now + _TELL_EVERY_S
