"""The whole fleet with the real model and the shipped adapters: what goes in comes out right, soon enough, and unseen by others."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from celery import Celery
from celery.exceptions import BackendError
from celery.result import AsyncResult
from fleet_support import FleetProcess, answer, chat, labels, questions, until
from llama_support import text

from lorayard import embedded
from lorayard.demo import EXAMPLES, STAGES, is_right, switches, switches_made
from lorayard.fleet import Fleet, usual_workers
from lorayard.settings import Settings
from lorayard_workers.llama.process import LlamaRunner
from lorayard_workers.runner import AdapterFile, Event, Outcome, Ready, Work, WorkItem

pytestmark = pytest.mark.fleet
CANARY = "xq7canary9z"
RESERVE_S = 110.0
COUNTS = {"banking77": 32, "snips": 24}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, demo_gguf: Path) -> Iterator[FleetProcess]:
    fleet = FleetProcess(tmp_path_factory.mktemp("fleet"), demo_gguf, reserve_s=RESERVE_S, llama_workers=2)
    fleet.environment["FLOWER_UNAUTHENTICATED_API"] = "true"
    try:
        fleet.start()
        with fleet.client() as client:
            for name in COUNTS:
                client.add_adapter(name, EXAMPLES / "adapters" / name, public=True)
        until(lambda: flower_tasks(fleet) is not None)
        yield fleet
        fleet.signal("up", signal.SIGINT)
        assert fleet.wait_end(40) == 0
    finally:
        fleet.close()


def flower_tasks(fleet: FleetProcess) -> dict[str, Any] | None:
    """What Flower's API says of the newest tasks, by id; None while it does not answer."""
    try:
        reply = httpx.get(f"http://127.0.0.1:{fleet.settings.flower_port}/api/tasks", params={"limit": 2000})
    except httpx.TransportError:
        return None
    tasks: dict[str, Any] = reply.raise_for_status().json()
    return tasks


@pytest.fixture(scope="module")
def served(fleet: FleetProcess) -> list[dict[str, Any]]:
    """Documents of jobs of two adapters and the base model from two tenants, in the order of submission; `_request` is what was asked."""
    rng = random.Random(5)
    jobs = [job for name, count in COUNTS.items() for job in questions(name, count, rng)]
    jobs += questions("banking77", 8, rng, with_adapter=False)
    rng.shuffle(jobs)
    found: dict[str, dict[str, Any]] = {}
    order: list[str] = []
    with fleet.client("acme") as acme, fleet.client("globex") as globex:
        ids: dict[Any, list[str]] = {acme: [], globex: []}
        for start in range(0, len(jobs), 4):
            client = (acme, globex)[start // 4 % 2]
            new = [row["id"] for row in client.submit(jobs[start : start + 4])]
            ids[client] += new
            order += new
        for client, mine in ids.items():
            found |= {document["id"]: document for document in client.results(mine)}
    return [found[job_id] | {"_request": job["request"]} for job_id, job in zip(order, jobs, strict=True)]


def of(documents: list[dict[str, Any]], adapter: str | None) -> list[dict[str, Any]]:
    return [document for document in documents if document["adapter"] == adapter]


def are_labels(answers: Iterable[str]) -> bool:
    """Whether each has the form of a banking77 label, and nearly all are one: a small model makes up one now and then."""
    texts = list(answers)
    known = labels("banking77")
    return (
        all(re.fullmatch(r"[A-Za-z_?]+_[A-Za-z_?]+", text) for text in texts) and sum(text in known for text in texts) >= len(texts) * 0.75
    )


def test_every_answer_is_its_adapters(served: list[dict[str, Any]]) -> None:
    assert are_labels(answer(document) for document in of(served, "banking77"))
    assert all(isinstance(json.loads(answer(document)), dict) for document in of(served, "snips"))
    assert not {answer(document) for document in of(served, None)} & labels("banking77")


def test_every_stage_is_measured_and_they_add_up(served: list[dict[str, Any]]) -> None:
    for document in served:
        stages = document["latencies_ms"]
        assert set(stages) == set(STAGES)
        assert all(value >= 0 for value in stages.values())
        assert stages["prefill"] > 0 < stages["decode"]
        assert sum(value for name, value in stages.items() if name != "total") == pytest.approx(stages["total"], abs=1)
        assert stages["total"] == document["ended_ms"] - document["enqueued_ms"]
        assert document["attempts"] == 1
        assert document["why"]
        assert document["batch"]
        assert document["worker"]
        assert document["response"]["usage"]["total_tokens"] > 0
        assert document["adapter_temperature"] in ("hot", "loaded", "disk")
    assert {document["adapter_temperature"] for document in of(served, "snips")} > {"hot"}, "one switched, others went on"


def test_fewer_switches_than_first_come_first_served(served: list[dict[str, Any]]) -> None:
    in_turn = switches(document["adapter_digest"] for document in served)
    made = switches_made(served)
    assert made < in_turn / 3, f"{made} switches, {in_turn} in the order of arrival"


def test_what_ran_can_be_replayed(fleet: FleetProcess, served: list[dict[str, Any]]) -> None:
    policies = ["--policy", "lorayard", "--policy", "fcfs", "--workers", "1"]  # two workers have an adapter each, whatever the policy
    command = [sys.executable, "-m", "lorayard", "replay", "--json", *policies]
    done = subprocess.run(command, env=fleet.environment, capture_output=True, text=True, check=True)
    ran, simulated, ours, fcfs = json.loads(done.stdout)["results"]
    assert [row["name"] for row in (ran, simulated)] == ["as it ran", "simulated"]
    assert [row["name"] for row in (ours, fcfs)] == ["1 worker", "first come first served, 1 worker"]
    assert simulated["jobs"] == ours["jobs"] == fcfs["jobs"] == ran["jobs"] >= len(served)
    assert ours["switches"] < fcfs["switches"]
    totals = sorted(document["latencies_ms"]["total"] / 1000 for document in served)
    assert totals[0] <= ran["total_s"]["p50"] <= totals[-1]
    assert all(row["total_s"]["p95"] > row["wait_s"]["p95"] > 0 for row in (ran, simulated, ours, fcfs))


def test_answers_equal_those_of_the_adapter_alone(fleet: FleetProcess, served: list[dict[str, Any]], demo_gguf: Path) -> None:
    documents = [document for name in COUNTS for document in of(served, name)]
    texts = alone(fleet, documents, demo_gguf)
    different = [(answer(d), t) for d, t in zip(documents, texts, strict=True) if answer(d) != t]
    assert len(different) <= len(documents) * 0.05, different  # another composition of batches may tip a near tie
    for name in COUNTS:
        mine = [(d, t) for d, t in zip(documents, texts, strict=True) if d["adapter"] == name]
        right = sum(is_right(d) for d, _ in mine)
        right_alone = sum(is_right(d | {"response": {"choices": [{"message": {"content": t}}]}}) for d, t in mine)
        assert abs(right - right_alone) <= max(1, len(mine) // 100)
        assert right > 0


def alone(fleet: FleetProcess, documents: list[dict[str, Any]], model: Path) -> list[str]:
    """The same questions asked of the backend directly, without queue, ledger or scheduler."""
    outcomes: dict[str, Outcome] = {}
    ready, done = threading.Event(), threading.Event()

    def hear(event: Event) -> None:
        if isinstance(event, Ready):
            ready.set()
        if isinstance(event, Outcome):
            outcomes[event.ref] = event
            if len(outcomes) == len(documents):
                done.set()

    runner = LlamaRunner(Settings(state_dir=fleet.state), model)
    runner.start(hear)
    try:
        assert ready.wait(60)
        for digest in dict.fromkeys(document["adapter_digest"] for document in documents):
            (path,) = (fleet.state / "cache" / "gguf").rglob(f"*{digest}*.gguf")
            mine = [d for d in documents if d["adapter_digest"] == digest]
            items = [WorkItem(d["id"], d["endpoint"], msgspec.Raw(json.dumps(d["_request"]).encode())) for d in mine]
            runner.submit(Work(digest, AdapterFile(digest, str(path)), items))
        assert done.wait(120)
    finally:
        runner.close()
    return [text(outcomes[document["id"]]) for document in documents]


def test_an_adapter_is_added_and_replaced_while_jobs_wait_for_it(fleet: FleetProcess) -> None:
    rng = random.Random(6)
    before = fleet.pid("worker"), fleet.pid("child")
    with fleet.client("initech") as client:
        first = client.add_adapter("mine", EXAMPLES / "adapters" / "banking77")
        soon = [job | {"adapter": "mine", "not_before_s": 1.5} for job in questions("banking77", 4, rng)]
        old = [row["id"] for row in client.submit(soon)]
        second = client.add_adapter("mine", EXAMPLES / "adapters" / "snips")
        assert second["replaces"] == first["digest"] != second["digest"]
        new = [row["id"] for row in client.submit([job | {"adapter": "mine"} for job in questions("snips", 4, rng)])]
        documents = {document["id"]: document for document in client.results(old + new)}
    assert {documents[i]["adapter_digest"] for i in old} == {first["digest"]}
    assert {documents[i]["adapter_digest"] for i in new} == {second["digest"]}
    assert are_labels(answer(documents[i]) for i in old)
    assert all(isinstance(json.loads(answer(documents[i])), dict) for i in new)
    assert (fleet.pid("worker"), fleet.pid("child")) == before


def test_a_rare_adapters_job_does_not_wait_for_the_end_of_a_flood(fleet: FleetProcess) -> None:
    rng = random.Random(7)
    flood = questions("banking77", 150, rng) * 8
    with fleet.client("acme") as client:
        flooded = [row["id"] for row in client.submit(flood)]
        (rare,) = client.submit(questions("snips", 1, rng))
        document = client.result(rare["id"])
        waiting = [job_id for job_id in flooded if client.job(job_id)["status"] == "queued"]
        assert answer(document)
        for job_id in waiting:
            client.cancel(job_id)
        others = list(client.results(flooded))
    assert len(waiting) >= len(flood) / 4, f"{len(waiting)} of the flood waited still, after {document['latencies_ms']}"
    # The flooded adapter is joined until the job is within the reserve of its due time, then at most the two batches that the worker has.
    width = max(d["latencies_ms"]["total"] - d["latencies_ms"]["queued"] for d in others if d["status"] == "succeeded")
    assert document["latencies_ms"]["queued"] < 10_000 + 2 * width


def test_plain_celery_is_enough_to_produce(fleet: FleetProcess) -> None:
    """What the README shows: no code of ours at the producer."""
    url = embedded.redis_url(fleet.settings)
    app = Celery(broker=url, backend=url)
    (job,) = questions("banking77", 1, random.Random(8))
    sent = app.send_task("lorayard.infer", kwargs=job, queue="lorayard.infer")
    document = AsyncResult(sent.id, app=app).get(timeout=60)
    assert document["id"] == sent.id
    assert are_labels([answer(document)])
    with fleet.client() as client:
        assert client.job(sent.id) == document

    refused = app.send_task("lorayard.infer", kwargs=chat(CANARY, adapter="nobody"), queue="lorayard.infer")
    with pytest.raises(Exception, match="nobody") as told:
        AsyncResult(refused.id, app=app).get(timeout=60)
    assert not isinstance(told.value, BackendError | TimeoutError)
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()
    app.close()


def test_flower_has_a_row_a_job_and_nothing_shows_a_prompt(fleet: FleetProcess, served: list[dict[str, Any]]) -> None:
    secret = [chat(f"Say {CANARY} to me.", adapter=adapter) | {"metadata": {"note": CANARY}} for adapter in (None, "banking77")]
    long = chat(f"{CANARY} " * 5000)  # only the worker sees that it is too long
    with fleet.client("acme") as client:
        rows = client.submit([*secret, long, chat(CANARY, adapter="none"), chat(CANARY, tools=[CANARY]), json.dumps(secret[0])[:-2]])
        ids = [row["id"] for row in rows if "id" in row]
        documents = list(client.results(ids))
    assert sorted(d["status"] for d in documents) == ["failed", "succeeded", "succeeded"]
    until(lambda: set(ids) <= set(flower_tasks(fleet) or ()), 20)
    told = flower_tasks(fleet)
    assert told is not None
    for document in served:
        row = told[document["id"]]
        assert (row["uuid"], row["name"], row["state"]) == (document["id"], "lorayard.infer", "SUCCESS")
        assert repr(document["adapter"] or "(base)") in row["kwargs"]
        page = f"http://127.0.0.1:{fleet.settings.flower_port}/task/{document['id']}"
    assert document["id"] in httpx.get(page).raise_for_status().text
    metrics = httpx.get(f"{fleet.settings.client_url}/metrics").raise_for_status().text
    assert "lorayard_jobs_total" in metrics
    assert CANARY not in metrics
    assert CANARY not in json.dumps(told)
    logs = sorted((fleet.state / "logs").iterdir())
    assert {path.stem for path in logs} >= {"api", "scheduler", "worker-1", "worker-2", "flower", "store"}
    assert not [path.name for path in logs if CANARY in path.read_text(errors="replace")]


def _programs(settings: Settings) -> str:
    fleet = Fleet(settings)
    try:
        return fleet._config()
    finally:
        fleet.stop()


def test_several_workers_have_names_of_their_own_and_share_the_cores(tmp_path: Path) -> None:
    config = _programs(Settings(state_dir=tmp_path, llama_workers=2, threads=3, worker_name="rack"))
    for number in (1, 2):
        assert f"[program:worker-{number}]" in config
        assert f"LORAYARD_WORKER_NAME=rack-{number},LORAYARD_THREADS=3" in config
    assert "[program:worker]" in _programs(Settings(state_dir=tmp_path, llama_workers=1))


def test_two_workers_are_usual_where_a_small_model_runs_on_several_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = tmp_path / "llama_cpp", tmp_path / "model.gguf"
    (folder / "lib").mkdir(parents=True)
    for name in ("libggml.so", "libggml-base.so.0", "libggml-cpu.so", "libggml-cpu-zen4.so", "libggml-blas.dylib", "libllama.so"):
        (folder / "lib" / name).touch()
    built = importlib.util.spec_from_file_location("llama_cpp", folder / "__init__.py")
    monkeypatch.setattr("lorayard.fleet.importlib.util.find_spec", lambda _name: built)
    monkeypatch.setattr("lorayard.fleet._cores", lambda: 4)
    assert usual_workers(Settings(state_dir=tmp_path)) == 2
    assert usual_workers(Settings(state_dir=tmp_path, threads=4)) == 1, "two would take eight cores"
    with model.open("wb") as file:
        file.truncate(1 << 20)
        assert usual_workers(Settings(state_dir=tmp_path, model=model)) == 2
        file.truncate(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 7)
        assert usual_workers(Settings(state_dir=tmp_path, model=model)) == 1
    (folder / "lib" / "libggml-cuda.so").touch()
    assert usual_workers(Settings(state_dir=tmp_path)) == 1
    assert usual_workers(Settings(state_dir=tmp_path, n_gpu_layers=0)) == 2
    monkeypatch.setattr("lorayard.fleet._cores", lambda: 1)
    assert usual_workers(Settings(state_dir=tmp_path, n_gpu_layers=0)) == 1
    programs = _programs(Settings(state_dir=tmp_path))
    assert "[program:worker]" in programs
    assert "LORAYARD_THREADS" not in programs, "all cores are one worker's"
