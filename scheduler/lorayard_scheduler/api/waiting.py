"""Long polls: who waits for a job's end is woken by the ledger's events, with a slow poll beneath in case one is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import redis
import structlog
from starlette.concurrency import run_in_threadpool

from lorayard.errors import Unavailable
from lorayard.jobs import TERMINAL
from lorayard.ledger.keys import ref
from lorayard.ledger.ledger import Ledger

log = structlog.get_logger()

POLL_S = 2.0


class Waiting:
    """One thread reads the events of the pool; every waiter has an asyncio event in the loop that it waits in."""

    def __init__(self, ledger: Ledger, hear: Callable[[list[str]], None]) -> None:
        """`hear` is told, in that thread, of every job that ends."""
        self._ledger = ledger
        self._hear = hear
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._thread = threading.Thread(target=self._listen, name="job-ends", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    async def show(self, tenant: str, job_id: str, wait_s: float) -> dict[str, Any] | None:
        """The document, at once if the job has ended or does not exist, else when it ends or `wait_s` are over."""
        give_up = time.monotonic() + wait_s
        name = ref(tenant, job_id)
        ended = asyncio.Event()
        if wait_s > 0:
            self._waiters[name].add(ended)
        try:
            while True:
                (document,) = await run_in_threadpool(self._ledger.show, tenant, [job_id])
                left = give_up - time.monotonic()
                if document is None or document["status"] in TERMINAL or left <= 0:
                    return document
                try:
                    async with asyncio.timeout(min(left, POLL_S)):
                        await ended.wait()
                    ended.clear()
                except TimeoutError:
                    pass
        finally:
            self._waiters[name].discard(ended)
            if not self._waiters[name]:
                del self._waiters[name]

    def _listen(self) -> None:
        after = ""
        while not self._stop.is_set():
            try:
                # From an id: nothing between two calls is missed then.
                after, refs = self._ledger.ends(after or self._ledger.last_end(), 500)
                if refs and self._loop is not None:
                    self._loop.call_soon_threadsafe(self._wake, refs)
                    self._hear(refs)
            except (Unavailable, redis.RedisError) as error:
                log.warning("ledger unavailable, long polls fall back to polling", reason=str(error))
                self._stop.wait(1)
            except RuntimeError:  # the loop is closing
                return

    def _wake(self, refs: list[str]) -> None:
        for name in refs:
            for event in self._waiters.get(name, ()):
                event.set()
