"""A whole fleet for tests: `lorayard up` as its own process, in a state folder and on ports of its own; and questions to ask it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.ports import free_port

from lorayard import embedded
from lorayard.client import Client
from lorayard.demo import Example, job_for, shipped
from lorayard.errors import Unavailable
from lorayard.ledger.connection import connect
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import KeyRing
from lorayard.settings import Settings

T = TypeVar("T")
ROLES = {
    "store": ("valkey-server", "redis-server"),
    "scheduler": ("-m lorayard scheduler",),
    "worker": ("-m lorayard worker llama",),
    "api": ("-m lorayard api",),
    "flower": ("flower_app flower",),
    "supervisord": ("supervisor.supervisord",),
    "child": ("llama.process serve",),
}
"""What the command line of each process of a fleet has in it."""

LEFTOVERS = (
    "tries",
    "begun:",
    "batch:",
    "members:",
    "queue:",
    "outstanding:",
    "groups",
    "leases",
    "delayed",
    "deadlines",
    "follows",
    "behind:",
)
"""Keys of a pool that must not exist when all its jobs have ended."""

WORDS: dict[str, Any] = {"max_tokens": 400, "logit_bias": {"2": -100}}  # never ends before its limit


def until(what: Callable[[], T], timeout_s: float = 60.0, *, every_s: float = 0.05) -> T:
    """The first answer of `what` that is true."""
    give_up = time.monotonic() + timeout_s
    while not (answer := what()):
        assert time.monotonic() < give_up, f"waited {timeout_s:.0f} s in vain for {what}"
        time.sleep(every_s)
    return answer


def chat(text: str, *, adapter: str | None = None, job_id: str | None = None, **options: Any) -> dict[str, Any]:
    """A greedy job of a few tokens."""
    request = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8} | options
    return {"request": request} | ({"adapter": adapter} if adapter else {}) | ({"id": job_id} if job_id else {})


def questions(name: str, count: int, rng: random.Random, *, with_adapter: bool = True) -> list[dict[str, Any]]:
    """Held-out questions of a shipped adapter as jobs."""
    example = example_of(name)
    return [job_for(example, line, with_adapter=with_adapter) for line in rng.sample(example.lines, count)]


def example_of(name: str) -> Example:
    return next(example for example in shipped() if example.name == name)


def labels(name: str) -> set[str]:
    data = Path(__file__).parents[1] / "examples" / "data" / name
    return {json.loads(line)["label"] for part in ("train", "dev") for line in (data / f"{part}.jsonl").read_text().splitlines()}


def answer(document: dict[str, Any]) -> str:
    assert document["status"] == "succeeded", document["error"]
    return str(document["response"]["choices"][0]["message"]["content"])


class FleetProcess:
    """One `lorayard up`, with one worker unless `llama_workers` says more. `settings` are LORAYARD_* variables without their prefix, in
    lower case."""

    def __init__(self, folder: Path, model: Path, **settings: Any) -> None:
        settings = {"llama_workers": 1} | settings
        self.settings = Settings(state_dir=folder / "state", api_port=free_port(), flower_port=free_port(), **settings)
        own = {name: getattr(self.settings, name) for name in ("state_dir", "api_port", "flower_port")}
        self.environment = os.environ | {f"LORAYARD_{name.upper()}": str(value) for name, value in (own | settings).items()}
        models = self.settings.state_dir / "models"
        models.mkdir(parents=True)
        (models / model.name).symlink_to(model)
        self._output = folder / "up.log"
        self._up: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, str] = {}  # every process of it that was looked at: its start time

    @property
    def state(self) -> Path:
        return self.settings.state_dir

    # -- life ---------------------------------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = 120.0) -> None:
        """Until it would run jobs."""
        with self._output.open("ab") as output:
            self._output.write_bytes(b"")
            # With SIGINT ignored, as a shell starts what runs in its background.
            command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "lorayard", "up"]
            self._up = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        until(lambda: "The fleet is up" in self._output.read_text() or self._died(), timeout_s)
        self.processes()

    def _died(self) -> bool:
        assert self._up is not None
        assert self._up.poll() is None, f"'lorayard up' ended with {self._up.returncode}: {self._output.read_text()}"
        return False

    def signal(self, role: str, number: signal.Signals) -> int:
        """Send a signal to the process of this role (`up` is `lorayard up`); its pid."""
        pid = self.pid(role)
        self.processes()
        os.kill(pid, number)
        return pid

    def wait_end(self, timeout_s: float) -> int:
        """Exit code of `lorayard up`, once no process of the fleet is left."""
        assert self._up is not None
        give_up = time.monotonic() + timeout_s
        code = self._up.wait(timeout_s)
        until(lambda: not self.left() or None, max(give_up - time.monotonic(), 0.1))
        self._up = None
        return code

    def close(self) -> None:
        """End it, however it stands."""
        if self._up is None:
            return
        self.processes()
        self._up.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._up.wait(60)
        self._up.kill()
        self._up.wait()
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @contextmanager
    def another_worker(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """A second llama worker beside the fleet's own, ready for work."""
        log = self.state / "logs" / f"{name}.log"
        command = [sys.executable, "-m", "lorayard", "worker", "llama"]
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=self.environment | {"LORAYARD_WORKER_NAME": name}, stdout=output, stderr=output)
        try:
            with self.client() as client:
                until(lambda: name in client.ready()["workers"], 90)
            yield process
        finally:
            process.kill()
            process.wait()

    # -- processes ----------------------------------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Command lines of `lorayard up` and all that descends from it, by pid."""
        assert self._up is not None
        parents = {pid: stat.parent for pid, stat in _all_processes()}
        found = [self._up.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        lines = {}
        for pid in found:
            with contextlib.suppress(OSError):
                lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                self._seen[pid] = _Stat(pid).started
        return lines

    def pid(self, role: str, timeout_s: float = 30.0) -> int:
        """Of the running process of a role; waits for one that is being started again."""
        assert self._up is not None
        if role == "up":
            return self._up.pid
        return until(
            lambda: next((pid for pid, line in self.processes().items() if any(word in line for word in ROLES[role])), 0), timeout_s
        )

    def left(self) -> list[int]:
        """Processes of this fleet that are still there: those seen, and whoever has its state folder in the environment."""
        mark = f"LORAYARD_STATE_DIR={self.state}\0".encode()
        left = []
        for pid, stat in _all_processes():
            if stat.ended:
                continue
            with contextlib.suppress(OSError):
                if self._seen.get(pid) == stat.started or mark in Path(f"/proc/{pid}/environ").read_bytes():
                    left.append(pid)
        return left

    # -- its users ----------------------------------------------------------------------------------------------------------------------

    def client(self, tenant: str | None = None) -> Client:
        """Of the operator, or with a new key of that tenant."""
        if tenant is None:
            return Client(settings=self.settings)
        with connect(embedded.redis_url(self.settings)) as store:
            return Client(key=KeyRing(store).create(tenant), settings=self.settings)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        with connect(embedded.redis_url(self.settings)) as store:
            yield Ledger(store, self.settings.pool, result_ttl_s=self.settings.result_ttl_s)

    def counts(self) -> Counter[str]:
        with self.ledger() as ledger:
            return Counter(ledger.counts())

    def submit(self, jobs: Sequence[dict[str, Any]]) -> list[str]:
        """As the operator's tenant; all must be accepted."""
        with self.client() as client:
            return [row["id"] for row in client.submit(jobs)]

    def ended(self, ids: Sequence[str], timeout_s: float = 120.0) -> list[dict[str, Any]]:
        """The documents of the operator's jobs, in order, once all have ended. An API that is away for a while is waited for."""
        give_up = time.monotonic() + timeout_s
        found: dict[str, dict[str, Any]] = {}
        with self.client() as client:
            while missing := [job_id for job_id in ids if job_id not in found]:
                assert time.monotonic() < give_up, f"{len(missing)} jobs have not ended: {[client.job(i)['status'] for i in missing[:5]]}"
                try:
                    found |= {document["id"]: document for document in client.results(missing)}
                except Unavailable:
                    time.sleep(0.1)
        return [found[job_id] for job_id in ids]

    def assert_settled(self) -> None:
        """All jobs have ended, each once, and nothing in the ledger says otherwise."""
        with self.ledger() as ledger:
            prefix = f"ly:{{{ledger.pool}}}:"

            def leftovers() -> list[str]:
                names = (key.decode().removeprefix(prefix) for key in ledger.client.scan_iter(prefix + "*", count=1000))
                return [name for name in names if name.startswith(LEFTOVERS)]

            until(lambda: not leftovers(), 10)
            counts = Counter(ledger.counts())
            ends = sum(counts[status] for status in ("succeeded", "failed", "cancelled", "expired"))
            assert (ends, counts["queued"]) == (counts["enqueued"], 0), counts
            told: Counter[str] = Counter()
            after, refs = ledger.ends("0-0", 0)
            while refs:
                told.update(refs)
                after, refs = ledger.ends(after, 0)
            assert set(told.values()) <= {1}, [ref for ref, times in told.items() if times > 1]


class _Stat:
    """Of /proc/PID/stat. Raises `OSError` when there is no such process."""

    def __init__(self, pid: int) -> None:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        self.ended = fields[0] in "ZX"
        self.parent = int(fields[1])
        self.started = fields[19]


def _all_processes() -> Iterable[tuple[int, _Stat]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                yield int(entry.name), _Stat(int(entry.name))


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return _Stat(pid).ended
    except OSError:
        return True
