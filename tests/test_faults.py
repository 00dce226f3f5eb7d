"""What dies is started again, and every acknowledged job ends exactly once: a real fleet with the real model, hit in mid-work."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_support import WORDS, FleetProcess, answer, chat, gone, questions, until

from lorayard.demo import EXAMPLES

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(240)]
MAX_ATTEMPTS = 3


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, demo_gguf: Path) -> Iterator[FleetProcess]:
    folder = tmp_path_factory.mktemp("faults")
    fleet = FleetProcess(folder, demo_gguf, lease_ms=8000, delivery_ms=3000, hang_s=6, n_ctx=4096, width=8, max_attempts=MAX_ATTEMPTS)
    try:
        fleet.start()
        with fleet.client() as client:
            client.add_adapter("banking77", EXAMPLES / "adapters" / "banking77", public=True)
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest, record_property: Any) -> random.Random:
    """Told with the test's name in its output: the same seed gives the same jobs."""
    seed = int(os.environ.get("LORAYARD_TEST_SEED", time.time_ns() % 1_000_000))
    record_property("seed", seed)
    print(f"{request.node.name}: LORAYARD_TEST_SEED={seed}")
    return random.Random(seed)


def mixed(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Short jobs of an adapter and of the base model."""
    jobs = questions("banking77", count // 2, rng)
    jobs += [chat(f"Say a word that begins with {chr(97 + i % 26)}.") for i in range(count - len(jobs))]
    rng.shuffle(jobs)
    return jobs


def some_done(fleet: FleetProcess, before: int, more: int) -> None:
    """Wait until that many jobs have ended beyond the number before: the rest is on its way."""
    until(lambda: fleet.counts()["succeeded"] >= before + more, 60, every_s=0.02)


@pytest.mark.parametrize("role", ["child", "worker", "scheduler", "api", "store"])
def test_what_is_killed_comes_back_and_no_job_is_lost(fleet: FleetProcess, role: str, rng: random.Random) -> None:
    before = fleet.counts()
    ids = fleet.submit(mixed(rng, 60))
    some_done(fleet, before["succeeded"], rng.randrange(1, 20))
    child = fleet.pid("child")
    killed_at = time.monotonic()
    killed = fleet.signal(role, signal.SIGKILL)
    if role == "worker":
        until(lambda: gone(child), 10)
    documents = fleet.ended(ids)
    seconds = time.monotonic() - killed_at
    again = until(lambda: (pid := fleet.pid(role)) != killed and pid)
    print(f"{role} {killed} killed, now {again}: all jobs ended {seconds:.1f} s later")
    assert [d["status"] for d in documents] == ["succeeded"] * len(ids)
    assert all(1 <= d["attempts"] <= MAX_ATTEMPTS for d in documents)
    assert fleet.counts()["succeeded"] - before["succeeded"] == len(ids)
    fleet.assert_settled()


def test_a_worker_killed_in_mid_decode_takes_its_model_with_it(fleet: FleetProcess, rng: random.Random) -> None:
    (job_id,) = fleet.submit([chat("Tell me a long story.", **WORDS)])
    with fleet.client() as client:
        until(lambda: client.job(job_id)["status"] == "running")
        child = fleet.pid("child")
        fleet.signal("worker", signal.SIGKILL)
        until(lambda: gone(child), 10)
        until(lambda: client.job(job_id)["status"] != "running", 20)
        assert client.cancel(job_id)["status"] == "cancelled"
    fleet.assert_settled()


def test_a_job_that_kills_the_model_is_given_up_and_its_batch_mates_succeed(fleet: FleetProcess) -> None:
    mates = [chat(f"Count to {n}.", max_tokens=40) for n in range(7)]
    poison, *others = fleet.submit([chat("Tell me a long story.", **WORDS | {"max_tokens": 2000}), *mates])
    with fleet.client() as client:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            begun = ("running", attempt)
            until(lambda begun=begun: ((d := client.job(poison))["status"], d["attempts"]) == begun, 90, every_s=0.01)  # type: ignore[misc]
            fleet.signal("child", signal.SIGKILL)
        document = client.result(poison, timeout_s=60)
    assert (document["status"], document["attempts"], document["error"]["code"]) == ("failed", MAX_ATTEMPTS, "worker_died")
    for mate in fleet.ended(others):
        assert answer(mate)
        assert mate["attempts"] <= MAX_ATTEMPTS
    with fleet.ledger() as ledger:
        assert poison in ledger.list_ids("default", limit=9, dead=True)
    fleet.assert_settled()


def test_a_model_that_hangs_is_replaced(fleet: FleetProcess, rng: random.Random) -> None:
    before = fleet.counts()
    ids = fleet.submit(mixed(rng, 20))
    some_done(fleet, before["succeeded"], 1)
    stopped = fleet.signal("child", signal.SIGSTOP)
    stopped_at = time.monotonic()
    until(lambda: gone(stopped), 20)
    print(f"hang noticed after {time.monotonic() - stopped_at:.1f} s")
    assert all(answer(document) for document in fleet.ended(ids))
    assert fleet.counts()["leases_lapsed"] == before["leases_lapsed"], "the hang was the model's: the lease was kept"
    fleet.assert_settled()


def test_an_adapter_that_cannot_be_fetched_for_a_while(fleet: FleetProcess, rng: random.Random) -> None:
    with fleet.client() as client:
        digest = client.add_adapter("snips", EXAMPLES / "adapters" / "snips")["digest"]
        fleet.ended(fleet.submit(questions("banking77", 1, rng)))
        (folder,) = (fleet.state / "cache" / "gguf").iterdir()
        in_the_way = folder / f".{digest}.lock"
        in_the_way.mkdir()
        (job_id,) = fleet.submit(questions("snips", 1, rng))
        until(lambda: client.job(job_id).get("postponed", 0) >= 1)
        assert fleet.ended(fleet.submit(questions("banking77", 1, rng)))[0]["status"] == "succeeded", "others go on"
        in_the_way.rmdir()
        document = client.result(job_id, timeout_s=60)
    assert answer(document)
    assert document["attempts"] == 1, "to wait for it has cost nothing"
    fleet.assert_settled()


def test_a_lost_store_is_no_wrong_setting() -> None:
    """Exit code 2 makes the supervisor give a process up, and the fleet with it."""
    command = [sys.executable, "-m", "lorayard", "keys", "list"]
    environment = os.environ | {"LORAYARD_REDIS_URL": "redis://127.0.0.1:1/0"}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 2
    environment["LORAYARD_SUPERVISED"] = "1"
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 3


def test_a_log_that_nobody_reads_stops_nobody() -> None:
    """As after a kill of the supervisor, when a worker still has to give back what it holds."""
    script = "import structlog, lorayard.telemetry as t; t.configure_logging('worker'); structlog.get_logger().info('x'); print('on')"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as log:
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    assert done.stdout == "on\n"


def test_two_workers(fleet: FleetProcess, rng: random.Random) -> None:
    """A worker that stands still loses its lease, and its late results are refused; one that is told to stop gives back what it has."""
    with fleet.another_worker("second") as second:
        before = fleet.counts()
        long = [chat(f"Tell me story number {n}.", **WORDS | {"max_tokens": 40}) for n in range(24)]
        ids = fleet.submit(long)
        with fleet.client() as client:
            first = client.ready()["workers"]
            assert len(first) == 2
            until(lambda: {d["worker"] for d in client.jobs(limit=1000, status="running")["data"]} == set(first), 30)
        fleet.signal("worker", signal.SIGSTOP)
        try:
            documents = fleet.ended(ids)
            assert fleet.counts()["leases_lapsed"] > before["leases_lapsed"]
            child = fleet.pid("child")
        finally:
            fleet.signal("worker", signal.SIGCONT)
        assert all(answer(document) for document in documents)
        assert max(d["attempts"] for d in documents) == 2
        # Whichever it does first: it hears at its heartbeat that the lease is lost, or its late results are refused.
        log = fleet.state / "logs" / "worker.log"
        until(lambda: fleet.counts()["stale"] > before["stale"] or "lease lost" in log.read_text(), 20)
        assert fleet.ended(ids) == documents, "a late result changes nothing"
        assert fleet.pid("child") == child, "it was the worker that stood still, not its model"
        assert fleet.counts()["succeeded"] - before["succeeded"] == len(ids)
        fleet.assert_settled()

        with fleet.client() as client:
            until(lambda: len(client.ready()["workers"]) == 2, 20)
            before = fleet.counts()
            ids = fleet.submit(mixed(rng, 60))
            until(lambda: {d["worker"] for d in client.jobs(limit=80, status="running")["data"]} == set(first), 30)
            second.terminate()
            assert second.wait(30) == 0
            assert client.ready()["workers"] == [name for name in first if name != "second"]
        documents = fleet.ended(ids)
        assert [(d["status"], d["attempts"]) for d in documents] == [("succeeded", 1)] * len(ids)
        assert fleet.counts()["leases_lapsed"] == before["leases_lapsed"]
        fleet.assert_settled()


def test_the_fleet_ends_with_its_command_and_goes_on_where_it_was(fleet: FleetProcess, rng: random.Random) -> None:
    """Last here: it ends the fleet, each time in the middle of work, which the next start finishes."""
    ids: list[str] = []
    (long,) = fleet.submit([chat("Tell me a long story.", **WORDS | {"max_tokens": 3500})])  # longer than a stopping worker waits
    with fleet.client() as client:
        until(lambda: client.job(long)["status"] == "running")
    for role, number, code in (
        ("up", signal.SIGTERM, 0),
        ("up", signal.SIGKILL, -signal.SIGKILL),
        ("supervisord", signal.SIGKILL, 2),
    ):
        before = fleet.counts()["succeeded"]
        ids += fleet.submit(mixed(rng, 30))
        some_done(fleet, before, 2)
        fleet.signal(role, number)
        ended_at = time.monotonic()
        assert fleet.wait_end(40 if number != signal.SIGKILL else 15) == code
        print(f"{number.name} of {role}: nothing left after {time.monotonic() - ended_at:.1f} s")
        fleet.start()
        if number == signal.SIGTERM:
            with fleet.client() as client:
                until(lambda: client.job(long)["status"] in ("running", "succeeded"))
                assert client.job(long)["attempts"] == 1, "it was put off, which costs no attempt"
                client.cancel(long)
    documents = fleet.ended(ids)
    assert [d["status"] for d in documents] == ["succeeded"] * len(ids)
    assert all(1 <= d["attempts"] <= MAX_ATTEMPTS for d in documents)
    fleet.assert_settled()
