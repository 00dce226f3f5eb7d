"""Flower's Celery application, against a real broker."""

from __future__ import annotations

import importlib
import threading
import time

import pytest
import redis


def test_questions_asked_at_once_do_not_wait_for_each_other(store: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAYARD_REDIS_URL", redis_url)
    app = importlib.import_module("lorayard.flower_app").app
    at_once = threading.Barrier(12)

    def ask() -> None:
        at_once.wait(10)
        app.control.inspect(timeout=0.2).stats()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(at_once.parties)]
    for thread in threads:
        thread.start()
    give_up = time.monotonic() + 15
    for thread in threads:
        thread.join(max(0.0, give_up - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
