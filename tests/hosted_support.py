"""A hosted worker against the stand-in: its control with a real ledger, the test as scheduler; and whole processes that can be killed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis
from fleet_support import until
from hosted_service import BASE, KEY, Running
from safetensors.numpy import save

from lorayard.adapters.hosting import Publications
from lorayard.celery_app import make_app
from lorayard.hosted import organisation
from lorayard.jobs import laned
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.organisation import Organisation
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.records import Entry
from lorayard.ledger.registry import HOSTED, open_ledger
from lorayard.settings import Settings
from lorayard.telemetry import JobEvents
from lorayard_workers.control import Control, Handover
from lorayard_workers.groq.runner import HostedRunner
from lorayard_workers.groq.worker import Hosting

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
HEARTBEAT_MS = 200


def settings_of(service: Running, **changes: Any) -> Settings:
    chosen: dict[str, Any] = {
        "hosted_model": BASE,
        "hosted_url": service.url,
        "hosted_key": KEY,
        "hosted_prices": {BASE: (0.05, 0.08)},
        "heartbeat_ms": HEARTBEAT_MS,
        "worker_name": "g",
    }
    return Settings(**chosen | changes)


ROWS = {"v_proj": 1024, "k_proj": 1024}


def tiny_adapter(*, rank: int = 8, base: str = LLAMA, seed: int = 0, modules: tuple[str, ...] = ("v_proj",), **config: Any) -> bytes:
    """A zip as PEFT would be uploaded: two small matrices a module, in float32, that fit Llama 3.1 8B."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in modules:
        path = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{path}.lora_A.weight"] = rng.standard_normal((rank, 4096)).astype(np.float32)
        tensors[f"{path}.lora_B.weight"] = rng.standard_normal((ROWS[module], rank)).astype(np.float32)
    options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": 2 * rank}
    options |= {"target_modules": [*modules]} | config
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_config.json", json.dumps(options))
        archive.writestr("adapter_model.safetensors", save(tensors))
    return buffer.getvalue()


class Bench:
    """One hosted worker's control and its ledger, without Celery and without a scheduler."""

    def __init__(self, store: redis.Redis, url: str, settings: Settings, name: str = "g", handover: Handover | None = None) -> None:
        self.settings = settings.model_copy(update={"worker_name": name})
        self.ledger: Ledger = open_ledger(store, self.settings)
        self.org: Organisation = organisation(self.settings, store)
        self.policies = Policies(store)
        self.publications = Publications(store, self.settings.hosted_org, BASE)
        hosting = Hosting(BASE, self.publications)
        self.policies.set("acme", Policy(hosted=True))
        runner = HostedRunner(self.settings, self.org, self.policies, hosting.served, hosting.doubt)
        events = JobEvents(make_app(url), f"{name}@test")
        self.control = Control(self.settings, self.ledger, runner, hosting.fetch, events, kind=HOSTED, handover=handover)
        self.epoch = self.ledger.lead("test", 10**9)
        self.name = name
        self._batches = 0
        self.control.start()
        self.control.wait_ready(20)

    def put(self, ids: list[str], *, lane: Any = "groq", digest: str = "base", tenant: str = "acme", **request: Any) -> None:
        made = []
        for job_id in ids:
            body = {"messages": [{"role": "user", "content": job_id}], "max_tokens": 8} | request
            made.append(
                Entry(job_id, tenant, laned(digest, lane), 1000, 0, 0, 3, "http", "", "", b'{"route":"groq"}', msgspec.json.encode(body))
            )
        self.ledger.enqueue(made, max_queued=10**6)

    def dispatch(self, jobs: int = 64, *, digest: str = "base@groq", tenant: str = "acme") -> int:
        """What is queued goes to the worker, as the scheduler would send it; how many."""
        self._batches += 1
        answer, n = self.ledger.claim(
            epoch=self.epoch,
            worker=self.name,
            most=64,
            batch=f"{self.name}{self._batches}",
            digest=digest,
            delivery_ms=60_000,
            why="hosted: a test",
            takes=[(tenant, jobs)],
        )
        return n if answer == "ok" else 0

    def job(self, job_id: str, tenant: str = "acme") -> dict[str, Any]:
        document = self.ledger.show(tenant, [job_id])[0]
        assert document is not None
        return document

    def ended(self, job_id: str, timeout_s: float = 20) -> dict[str, Any]:
        until(lambda: self.job(job_id)["status"] in ("succeeded", "failed"), timeout_s, every_s=0.005)
        return self.job(job_id)

    def run(self, job_id: str, **request: Any) -> dict[str, Any]:
        self.put([job_id], **request)
        assert self.dispatch() == 1
        return self.ended(job_id)

    def work_off(self, digest: str = "base@groq") -> None:
        """Until nothing lives, waking what was put off as the reconciler does."""

        def nothing_lives() -> bool:
            self.ledger.reap()
            while self.dispatch(digest=digest):
                pass
            counts = self.ledger.counts()
            return counts["enqueued"] == sum(counts.get(end, 0) for end in ("succeeded", "failed", "cancelled", "expired"))

        until(nothing_lives, 120, every_s=0.05)


@contextmanager
def bench_of(store: redis.Redis, url: str, service: Running, **changes: Any) -> Iterator[Bench]:
    one = Bench(store, url, settings_of(service, **changes))
    try:
        yield one
    finally:
        one.control.close()


def answer(document: dict[str, Any]) -> str:
    assert document["status"] == "succeeded", document["error"]
    return str(document["response"]["choices"][0]["message"]["content"])


def write_adapter(folder: Path, data: bytes, name: str = "adapter") -> Path:
    path = folder / f"{name}.zip"
    path.write_bytes(data)
    return path


def deepen(ledger: Ledger, job_id: str) -> None:
    """The job's request becomes one that is nested deeper than can be read."""
    key = f"ly:{{{ledger.pool}}}:job:acme/{job_id}"
    raw: Any = ledger.client.get(key)
    ledger.client.set(key, raw.replace(b'"max_tokens":8', b'"max_tokens":8,"tools":' + b"[" * 90_000 + b"]" * 90_000))
