"""A private fleet without a model, for benchmarks: an embedded server, real role processes around it, no-op workers, many adapters."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.ports import free_port
from lorayard import embedded
from lorayard.adapters import AdapterRegistry, Manifest
from lorayard.adapters.manifest import PUBLIC
from lorayard.jobs import new_id
from lorayard.ledger.connection import connect
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import Enqueued, Entry
from lorayard.ledger.registry import KeyRing, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard_scheduler.admission import Accepted, Admission

Fsync = Literal["always", "everysec"]
ADAPTERS = [f"adapter-{i:03d}" for i in range(100)]
TENANTS = ["acme", "globex", "initech", "umbrella"]
REQUEST_BYTES = 500
PART = 1000
"""Jobs in one call or round trip."""


def until(what: Callable[[], Any], timeout_s: float, *, every_s: float = 0.02) -> Any:
    """The first answer of `what` that is true. Raises `TimeoutError`."""
    give_up = time.monotonic() + timeout_s
    while not (answer := what()):
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain")
        time.sleep(every_s)
    return answer


def job(i: int) -> dict[str, Any]:
    """The i-th job as a producer writes it: a request of 500 bytes, adapters in turn."""
    request = {"messages": [{"role": "user", "content": f"{i:08d} "}], "max_tokens": 16, "temperature": 0}
    request["messages"][0]["content"] += "x" * (REQUEST_BYTES - len(msgspec.json.encode(request)))  # type: ignore[index]
    return {"adapter": ADAPTERS[i % len(ADAPTERS)], "request": request}


class _Keeper(Ledger):
    """Keeps what admission would enqueue."""

    def __init__(self, ledger: Ledger) -> None:
        self.client, self.pool = ledger.client, ledger.pool
        self.kept: list[Entry] = []

    def enqueue(self, entries: Sequence[Entry], **_: Any) -> list[Enqueued]:
        self.kept += entries
        return [Enqueued(entry.id, "queued") for entry in entries]


class Yard:
    """One server, its ledger and a folder of its own. A context; ends every process it started."""

    def __init__(self, fsync: Fsync) -> None:
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lorayard-")))
        self.settings = Settings(state_dir=folder, fsync=fsync, api_port=free_port(), flower_port=free_port())
        self.log = folder / "processes.log"

    def __enter__(self) -> Yard:
        self.url = self._stack.enter_context(embedded.running(self.settings))
        self.store = self._stack.enter_context(connect(self.url, timeout_s=60))
        self.ledger = open_ledger(self.store, self.settings)
        self._registry = WorkerRegistry(self.store)
        self._entries: list[Entry] = []
        registry, ring = AdapterRegistry(self.store), KeyRing(self.store)
        for name in ADAPTERS:
            registry.add(PUBLIC, name, _manifest(name))
        self.keys = {tenant: ring.create(tenant) for tenant in TENANTS}
        return self

    def __exit__(self, *error: object) -> None:
        if any(error):
            sys.stderr.write(self.log.read_text(errors="replace")[-4000:])
        self._stack.close()

    # -- processes ----------------------------------------------------------------------------------------------------------------------

    def start(self, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        """`python -m COMMAND...` in this yard's environment, until it ends by itself or the yard does."""
        with self.log.open("ab") as log:
            arguments = [sys.executable, "-m", *command]
            process = subprocess.Popen(arguments, env=self.variables(**variables), stdout=log, stderr=log, start_new_session=True)
        self._stack.callback(self.end, process)
        return process

    def variables(self, **more: str) -> dict[str, str]:
        """The environment of this yard's processes."""
        own = {f"LORAYARD_{name.upper()}": str(getattr(self.settings, name)) for name in ("state_dir", "api_port", "flower_port")}
        return os.environ | own | {"PYTHONWARNINGS": "ignore"} | more

    @contextmanager
    def fleet(self, *workers: str, arguments: Sequence[str] = ()) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The real scheduler, Flower listening, and no-op workers of these names, all ready; the workers' processes."""
        roles = [self.start("lorayard", "scheduler"), self.start("lorayard", "flower")]
        processes = [self.start("benchmarks.noop_worker", *arguments, LORAYARD_WORKER_NAME=name) for name in workers]
        try:
            until(lambda: self.ledger.has_leader(self.now()) and self._flower_listens() and set(workers) <= set(self.workers()), 60)
            yield processes
        finally:
            for process in processes + roles:
                self.end(process)

    def _flower_listens(self) -> bool:
        """Celery's events go out as publications; Flower subscribes to all of them."""
        return bool(self.store.pubsub_numpat())

    def workers(self) -> list[str]:
        return [worker.name for worker in self._registry.alive(self.settings.pool, self.now())]

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        """With all that it started: some of the others leave their own processes behind."""
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # Flower's threads outlive its own shutdown
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    # -- the ledger -----------------------------------------------------------------------------------------------------------------------

    def now(self) -> int:
        """Ms of the ledger's clock."""
        seconds, micros = self.store.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def entries(self, count: int) -> list[Entry]:
        """Jobs as admission writes them, a thousand of each tenant in turn, with fresh ids."""
        if not self._entries:
            keeper = _Keeper(self.ledger)
            admission = Admission(self.settings, keeper)
            jobs = [job(i) for i in range(PART)]
            for tenant in TENANTS:
                answers = admission.submit(tenant, list(jobs))
                refused = [answer for answer in answers if not isinstance(answer, Accepted)]
                if refused:
                    raise refused[0]
            self._entries = keeper.kept
        kept, pool = self._entries, self.settings.pool
        return [kept[i % len(kept)]._replace(id=new_id(pool)) for i in range(count)]

    def enqueue(self, entries: Sequence[Entry]) -> float:
        """Enqueue through `Ledger`, 1,000 a call, one client; the seconds it took. Every job must be accepted."""
        begun = time.perf_counter()
        for start in range(0, len(entries), PART):
            answers = self.ledger.enqueue(entries[start : start + PART], max_queued=self.settings.max_queued)
            if any(answer.status != "queued" for answer in answers):
                raise RuntimeError(f"not queued: {next(a for a in answers if a.status != 'queued')}")
        return time.perf_counter() - begun

    def empty(self) -> None:
        """Forget all jobs, keep workers, tenants and adapters."""
        batch: list[Any] = []
        for key in self.store.scan_iter(f"ly:{{{self.settings.pool}}}:*", count=5000):
            batch.append(key)
            if len(batch) == 5000:
                self.store.unlink(*batch)
                batch.clear()
        if batch:
            self.store.unlink(*batch)


def _manifest(name: str) -> Manifest:
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    shape: dict[str, Any] = {
        "rank": 16,
        "alpha": 32.0,
        "rslora": False,
        "scale_min": 2.0,
        "scale_max": 2.0,
        "n_layers": 30,
        "n_bytes": 1 << 20,
    }
    return Manifest(name=name, tenant=PUBLIC, digest=digest, base_name="base", targets=["q_proj", "v_proj"], created_ms=0, **shape)
