"""Flower: its Celery application against a real broker, and its start."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

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


@pytest.mark.parametrize(("supervised", "code"), [({}, 2), ({"LORAYARD_SUPERVISED": "1"}, 3)])
def test_an_open_address_without_a_key_ends_it_unless_the_fleet_is_about_to_write_one(
    supervised: dict[str, str], code: int, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAYARD_")}
    environment |= {"LORAYARD_STATE_DIR": str(tmp_path), "LORAYARD_FLOWER_HOST": "0.0.0.0", **supervised}
    command = [sys.executable, "-m", "lorayard", "flower"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "LORAYARD_FLOWER_BASIC_AUTH" in done.stderr) == (code, True)
