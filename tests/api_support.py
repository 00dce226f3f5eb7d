"""An API process's app on a real port, and a hand that ends jobs as a worker would; no scheduler, no model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn
from benchmarks.ports import free_port

from lorayard.celery_app import make_app
from lorayard.ledger.connection import connect
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import End, EndStatus
from lorayard.ledger.registry import KeyRing, open_ledger
from lorayard.settings import Settings
from lorayard_scheduler.api.app import make_api
from lorayard_scheduler.api.server import listen

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

ANSWER = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "seven"}, "finish_reason": "stop"}],
}


def job(text: str = "How many?", **fields: Any) -> dict[str, Any]:
    """A job object that is in order."""
    return {"request": {"messages": [{"role": "user", "content": text}], "max_tokens": 4}, **fields}


class Api:
    """One running API process's app, its ledger, and a key each of two tenants and the operator."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self.url = settings.client_url
        self.keys: dict[str, str] = {}
        self._http = httpx.Client(base_url=self.url, timeout=30)
        self._batches = 0

    def close(self) -> None:
        self._http.close()

    def new_keys(self) -> None:
        ring = KeyRing(self.ledger.client)
        self.keys = {tenant: ring.create(tenant) for tenant in ("acme", "globex")}
        self.keys["root"] = ring.create("default", operator=True)

    def call(self, method: str, path: str, who: str = "acme", **kwargs: Any) -> httpx.Response:
        """A request with that tenant's key."""
        headers = {"Authorization": f"Bearer {self.keys[who]}", **kwargs.pop("headers", {})}
        return self._http.request(method, path, headers=headers, **kwargs)

    def raw(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """A request without a key."""
        return self._http.request(method, path, **kwargs)

    def post(self, *jobs: dict[str, Any], who: str = "acme") -> list[dict[str, Any]]:
        """Enqueue; every job must be accepted or refused with 202, 4xx or 503 and an entry of its own."""
        rows: list[dict[str, Any]] = self.call("POST", "/v1/jobs", who, json={"jobs": list(jobs)}).json()["jobs"]
        return rows

    def lines(self, body: bytes, who: str = "acme") -> httpx.Response:
        return self.call("POST", "/v1/jobs", who, content=body, headers={"Content-Type": "application/jsonl"})

    def run(self, tenant: str, n: int = 1, *, digest: str = "base", finish: bool = True) -> list[str]:
        """Do a worker's part for a tenant's `n` most due jobs, up to their start, or end; their ids."""
        return run(self.ledger, tenant, n, digest=digest, finish=finish)

    def bury(self, tenant: str = "acme", **fields: Any) -> str:
        """Let a new job of the base model fail as often as attempts are allowed; its id."""
        (row,) = self.post(job(**fields), who=tenant)
        for _ in range(self.settings.max_attempts):
            assert run(self.ledger, tenant, 1, digest="base", end="retry") == [row["id"]]
        return str(row["id"])


def answers_while_writes_wait(api: Api, method: str, path: str, body: dict[str, Any], who: str = "acme") -> dict[str, Any]:
    """The answer to a request that waits for the store, during which others are answered."""
    with ThreadPoolExecutor() as pool:
        api.ledger.client.client_pause(10_000, all=False)
        try:
            waits = pool.submit(api.call, method, path, who, json=body)
            time.sleep(0.3)
            assert api.raw("GET", "/healthz", timeout=5).status_code == 200
            assert not waits.done()
        finally:
            api.ledger.client.client_unpause()
        found: dict[str, Any] = waits.result().json()
    return found


def run(ledger: Ledger, tenant: str, n: int = 1, *, digest: str = "base", finish: bool = True, end: EndStatus = "succeeded") -> list[str]:
    """Claim, take, start and (if `finish`) end a tenant's `n` most due jobs through the ledger; their ids."""
    epoch = ledger.lead("test", 60_000)
    batch = f"b{time.monotonic_ns()}"
    answer, _ = ledger.claim(
        epoch=epoch, worker=f"w-{batch}", most=9, batch=batch, digest=digest, delivery_ms=60_000, why="a test", takes=[(tenant, n)]
    )
    assert answer == "ok", answer
    taken = ledger.take(batch, f"w-{batch}", "i", 60_000)
    assert taken is not None
    refs = [taken_job.ref for taken_job in taken.jobs]
    assert ledger.start(batch, taken.fence, refs) == []
    if finish:
        error = {"message": "it died", "type": "server_error", "code": "worker_died", "param": None}
        outcome = msgspec.json.encode(
            {"response": ANSWER, "timings_ms": {"prefill": 1, "decode": 2}} if end == "succeeded" else {"error": error}
        )
        assert set(ledger.finish(batch, taken.fence, [End(ref, end, outcome, 3) for ref in refs])) <= {"stored", "retried"}
    return [ref.partition("/")[2] for ref in refs]


@contextlib.contextmanager
def serving(redis_url: str, state: Path, **settings: Any) -> Iterator[Api]:
    """The API's app under uvicorn in a thread, with these settings beside its own address."""
    made = Settings(redis_url=redis_url, state_dir=state, api_port=free_port(), **settings)
    with connect(redis_url) as client, make_app(redis_url) as app:
        ledger = open_ledger(client, made)
        config = uvicorn.Config(make_api(made, ledger, app), log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        listener = listen(made.api_host, made.api_port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        api = Api(made, ledger)
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield api
        finally:
            api.close()
            server.should_exit = True
            thread.join()
            listener.close()
