"""A role of the fleet in its own process, started by the real command, that dies or stands still where a test says.

    python -m faults.role scheduler | api | worker llama

A test writes POINT:WHEN:SIGNAL into the file LORAYARD_TEST_POINT; whoever gets there first takes the file away and sends itself the signal.
The worker's model is the script of `faults.child`; everything else is the product.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorayard import celery_app, cli
from lorayard.ledger.ledger import Ledger

POINT = "LORAYARD_TEST_POINT"
HASTE = "LORAYARD_TEST_HASTE"
"""Not empty: seconds where the product has minutes, so that a row need not wait for what Celery's broker and the reconciler do seldom."""


def reach(point: str, when: str) -> None:
    """Here is `point`, and the call there is about to be made (before) or has been made (after)."""
    order = Path(os.environ[POINT])
    try:
        name, moment, number = order.read_text().split(":")
        if (name, moment) != (point, when):
            return
        order.unlink()
    except FileNotFoundError:  # nothing ordered, or another thread was first
        return
    signal.pthread_kill(threading.get_ident(), signal.Signals[number])  # to this thread, so that it does not get a step further


def pointed(owner: Any, method: str, point: str, done: Callable[[Any], bool] = bool) -> None:
    """Make a method of a class a point. `done`: whether its answer says that it has had an effect."""
    call = getattr(owner, method)

    @functools.wraps(call)
    def with_point(*args: Any, **kwargs: Any) -> Any:
        reach(point, "before")
        answer = call(*args, **kwargs)
        if done(answer):
            reach(point, "after")
        return answer

    setattr(owner, method, with_point)


def always(_: Any) -> bool:
    return True


def hard_of_hearing(words: Callable[..., Iterator[tuple[str, str, list[str]]]]) -> Callable[..., Iterator[tuple[str, str, list[str]]]]:
    """Words to take a batch are lost while a point of the Celery message is ordered, which else would not be needed."""

    def heard(*args: Any) -> Iterator[tuple[str, str, list[str]]]:
        for word in words(*args):
            order = Path(os.environ[POINT])
            if word[0] != "take" or not (order.exists() and order.read_text().startswith("ack")):
                yield word

    return heard


def place_points() -> None:
    from celery.worker.request import Request

    pointed(Ledger, "enqueue", "enqueue")
    pointed(Ledger, "claim", "claim", lambda answer: bool(answer[0] == "ok"))
    pointed(Ledger, "reap", "reap", any)
    pointed(Ledger, "take", "take")
    pointed(Ledger, "start", "start", always)
    pointed(Ledger, "renew", "renew")
    pointed(Ledger, "finish", "finish")
    pointed(Request, "on_accepted", "ack", always)  # of the Celery message, which is off its queue by then
    Ledger.words = hard_of_hearing(Ledger.words)  # type: ignore[method-assign, assignment]


def hurry() -> None:
    celery_app._TRANSPORT["visibility_timeout"] = 6
    if sys.argv[1] == "scheduler":
        from lorayard_scheduler import reconciler

        reconciler.GONE_MS, reconciler.FORGET_EVERY_S, reconciler.AUDIT_PAUSE_S = 8_000, 2.0, 2.0


def main() -> None:
    place_points()
    if os.environ.get(HASTE):
        hurry()
    if sys.argv[1] == "worker":
        from lorayard.adapters.store import GgufCache
        from lorayard_workers.llama import process

        pointed(GgufCache, "path", "load")
        process._MODULE = "faults.child"
    cli.main()


if __name__ == "__main__":
    main()
