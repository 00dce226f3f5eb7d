"""Work at a hosted service that one worker does for all: its loop, and holding on to it while it takes long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Self

import structlog

from lorayard.errors import LorayardError

log = structlog.get_logger("lorayard.hosted")


@contextlib.contextmanager
def holding(renew: Callable[[], object], every_s: float) -> Iterator[None]:
    """Call `renew` every so often, in a thread, until the end of the block."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(Exception):  # then it lapses, and another goes on from what is there
                renew()

    thread = threading.Thread(target=run, name="holding", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Loop:
    """Calls `sweep` every so often, in a thread, whatever it raises, until the end of the block."""

    def __init__(self, name: str, sweep: Callable[[], None], every_s: float) -> None:
        self._name, self._sweep, self._every_s = name, sweep, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                self._sweep()
            except LorayardError as error:
                log.warning("to be tried again", what=self._name, reason=error.message)
            except Exception:
                log.exception("to be tried again", what=self._name)
