"""A fleet whose every process is at hand: store, API, schedulers and workers, each started again when it dies, unless told otherwise."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis
from benchmarks.ports import free_port
from fleet_support import until

from faults import role
from faults.child import LOG
from lorayard import embedded
from lorayard.client import Client
from lorayard.demo import EXAMPLES
from lorayard.errors import LorayardError
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import KeyRing, WorkerRegistry
from lorayard.settings import Settings
from lorayard_workers.llama import process

TESTS = Path(__file__).parents[1]
ADAPTERS = ("banking77", "snips")
QUICK: dict[str, Any] = {"lease_ms": 2000, "delivery_ms": 2000, "heartbeat_ms": 300, "leader_ttl_ms": 2000, "hang_s": 15, "width": 16}
"""Settings of a yard unless a row has others: what is seconds in the product's, so that recovery shows soon."""


class Death(NamedTuple):
    name: str
    at: float  # monotonic seconds
    status: int


class Member:
    """One process by its name, through all its lives."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.command = list(command)
        self.environment = environment
        self.log = log
        self.wanted = True  # start it again
        self.again_s = 0.1  # so long after its end
        self.process: subprocess.Popen[bytes] | None = None
        self.ended: float | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_with_us
            )
        self.ended = None


def _with_us() -> None:
    from lorayard.fleet import end_with_parent

    end_with_parent(signal.SIGKILL)


class Yard:
    """`settings` are LORAYARD_* variables without their prefix. A context; the processes are started by `open`.

    `haste`: what the product does every minute or so, and would have to be waited for, is done every few seconds.
    """

    def __init__(self, folder: Path, *, broker_db: int = 0, haste: bool = True, store_options: Sequence[str] = (), **settings: Any) -> None:
        self.folder = folder
        self.haste = haste
        self.state = folder / "state"
        self.state.mkdir(parents=True)
        self.runs = folder / "runs"
        self.runs.touch()
        model = folder / "script.gguf"
        model.touch()
        chosen: dict[str, Any] = QUICK | {"state_dir": self.state, "api_port": free_port(), "model": model} | settings
        chosen["model_names"] = process.DEMO_NAME
        self.settings = Settings(**chosen)
        store = embedded.prepare(self.settings)
        self.url = embedded.redis_url(self.settings)
        self.broker_url = self.url.removesuffix("/0") + f"/{broker_db}"
        chosen["broker_url"] = self.broker_url
        self._base = os.environ | {f"LORAYARD_{name.upper()}": str(value) for name, value in chosen.items()}
        paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._base |= {
            "LORAYARD_SUPERVISED": "1",
            "PYTHONPATH": paths,
            LOG: str(self.runs),
            role.HASTE: "1" if haste else "",
            "PYTHONWARNINGS": "ignore",
        }
        self.members: dict[str, Member] = {}
        self.deaths: list[Death] = []
        self._killed: set[int] = set()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._direct: redis.Redis = redis.Redis.from_url(self.url, socket_timeout=5, protocol=2)
        self.add("store", [*store, *store_options], start=False)

    # -- life ---------------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Yard:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._keeper.is_alive():
            self._keeper.join()
        for member in reversed(self.members.values()):
            if member.process is not None and member.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGCONT)
                    os.kill(member.pid, signal.SIGKILL)
                member.process.wait()
        self._direct.close()

    def open(self, *, workers: int = 2, schedulers: int = 1, adapters: bool = True) -> Yard:
        """Start everything and wait until jobs would be run; with `adapters`, the shipped ones are there too."""
        self.members["store"].start()
        self._keeper.start()
        embedded.wait_until_up(self.url)
        self.add("api", self.role("api"))
        for n in range(1, schedulers + 1):
            self.add(f"scheduler-{n}", self.role("scheduler"))
        for n in range(1, workers + 1):
            self.worker(f"worker-{n}")
        self.ready({f"worker-{n}" for n in range(1, workers + 1)})
        if adapters:
            self.add_adapters()
        return self

    def add_adapters(self) -> None:
        """The shipped ones, for everyone. Some worker must have been there."""
        with self.client() as client:
            for name in ADAPTERS:
                client.add_adapter(name, EXAMPLES / "adapters" / name, public=True)

    def ready(self, workers: set[str], timeout_s: float = 60.0) -> None:
        """Until these workers and no others would get work, and a scheduler leads if there is one."""
        led = any(name.startswith("scheduler") for name in self.members)

        def said() -> bool:
            try:
                with self.client() as client:
                    document = client.ready()
            except LorayardError:
                return False
            return document["scheduler"] == led and set(document["workers"]) == workers and all(map(self._is_itself, workers))

        until(said, timeout_s)

    def _is_itself(self, worker: str) -> bool:
        """Whether what is known of a worker is its process's own word, and not that of one which was killed a moment ago."""
        member, info = self.members[worker], WorkerRegistry(self._direct).find(self.settings.pool, worker)
        return info is not None and member.process is not None and member.process.poll() is None and info.pid == member.pid

    @staticmethod
    def role(*arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "faults.role", *arguments]

    def worker(self, name: str, *, before: Sequence[str] = (), **environment: str) -> Member:
        """Add a worker; `before` goes before its command."""
        return self.add(name, [*before, *self.role("worker", "llama")], {"LORAYARD_WORKER_NAME": name} | environment)

    def add(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None, *, start: bool = True) -> Member:
        own = self._base | {role.POINT: str(self.folder / f"{name}.point")} | (environment or {})
        member = Member(name, command, own, self.folder / f"{name}.log")
        if start:
            member.start()
        with self._lock:
            self.members[name] = member
        return member

    def _keep(self) -> None:
        """Start again what has ended."""
        while not self._closing.wait(0.02):
            with self._lock:
                members = list(self.members.values())
            now = time.monotonic()
            for member in members:
                if member.process is None or (status := member.process.poll()) is None:
                    continue
                if member.ended is None:
                    member.ended = now
                    self.deaths.append(Death(member.name, now, status))
                if member.wanted and now - member.ended >= member.again_s:
                    member.start()

    # -- faults -------------------------------------------------------------------------------------------------------------------------

    def send(self, name: str, number: signal.Signals) -> float:
        """Send a signal to a process that runs; when."""
        member = self.members[name]
        until(lambda: member.ended is None, 60)
        os.kill(member.pid, number)
        return time.monotonic()

    def kill(self, name: str, *, again: bool = True) -> float:
        """SIGKILL; `again`: it is started again, as always."""
        self.members[name].wanted = again
        return self.send(name, signal.SIGKILL)

    def order(self, name: str, point: str, when: str, number: signal.Signals) -> Path:
        """Let a process signal itself when it gets to a point (`faults.role`); the order's file, which is gone when that happens."""
        path = self.folder / f"{name}.point"
        part = path.with_suffix(".part")
        part.write_text(f"{point}:{when}:{number.name}")
        part.replace(path)
        return path

    def died(self, name: str, since: float, timeout_s: float = 60.0) -> float:
        """Wait for the end of a process after `since`; when it was."""
        return until(lambda: next((d.at for d in self.deaths if d.name == name and d.at >= since), 0.0), timeout_s)

    def child(self, worker: str) -> int:
        """The pid of a worker's model child."""
        return until(lambda: next(iter(_children(self.members[worker].pid)), 0), 30)

    def crashes(self) -> list[Death]:
        """Ends that no test asked for: neither SIGKILL nor the code of a process that wants to be started again."""
        return [death for death in self.deaths if death.status not in (-signal.SIGKILL, 3)]

    # -- its users ----------------------------------------------------------------------------------------------------------------------

    def client(self, tenant: str | None = None, *, url: str | None = None, timeout_s: float = 30.0) -> Client:
        """Of the operator, or with a new key of that tenant."""
        key = KeyRing(self._direct).create(tenant) if tenant else None
        return Client(url, key, settings=self.settings, timeout_s=timeout_s)

    def ledger(self) -> Ledger:
        return Ledger(self._direct, self.settings.pool, result_ttl_s=self.settings.result_ttl_s)

    @property
    def store(self) -> redis.Redis:
        return self._direct

    @property
    def store_port(self) -> int:
        return int(self.url.rpartition(":")[2].partition("/")[0])

    def url_through(self, host: str | None, port: int | None) -> str:
        """The store's address by another way."""
        login = self.url.rpartition("@")[0]
        return f"{login}@{host or '127.0.0.1'}:{port or self.store_port}/0"

    def outstanding(self, worker: str) -> set[bytes]:
        found: Any = self._direct.smembers(f"ly:{{{self.settings.pool}}}:outstanding:{worker}")
        return set(found)

    def counts(self) -> dict[str, int]:
        return self.ledger().counts()


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


@contextmanager
def repeating(every_s: float, call: Callable[[], object]) -> Iterator[list[int]]:
    """Call again and again in a thread of its own; how often so far, in a list of one."""
    done, times = threading.Event(), [0]

    def run() -> None:
        while not done.wait(every_s):
            call()
            times[0] += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        done.set()
        thread.join()
