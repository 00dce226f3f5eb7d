"""Servers of our own to be killed: a primary with its replica under Sentinels, each a process, all with passwords."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import redis

from benchmarks.ports import free_port
from lorayard.embedded import server_binary
from lorayard.fleet import end_with_parent
from lorayard.ledger.connection import connect

T = TypeVar("T")
PASSWORD, SENTINEL_PASSWORD, SERVICE = "p@ss/word", "watch&tell", "yard"


def until(what: Callable[[], T], timeout_s: float = 30.0, *, every_s: float = 0.02) -> T:
    """The first answer of `what` that is true; a server's error counts as false."""
    give_up = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError):
            if answer := what():
                return answer
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(every_s)


def _end_with_us() -> None:
    end_with_parent(signal.SIGKILL)


class Server:
    """One server process in a folder of its own. `options` are lines of its configuration; `wrapper` is run in front of its command."""

    def __init__(self, folder: Path, options: Iterable[str] = (), *, sentinel: bool = False, wrapper: Iterable[str] = ()) -> None:
        self.folder = folder
        self.port = free_port()
        self._sentinel = sentinel
        self._wrapper = list(wrapper)
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "server.conf"
        own = (f"port {self.port}", "bind 127.0.0.1", f'dir "{folder}"', *options)
        self.config.write_text("\n".join(own) + "\n")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Server:
        command = [*self._wrapper, server_binary(), str(self.config), *(["--sentinel"] if self._sentinel else [])]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_us)
        return self

    def client(self, password: str = "") -> redis.Redis:
        login = f":{password.replace('@', '%40').replace('/', '%2F').replace('&', '%26')}@" if password else ""
        return connect(f"redis://{login}127.0.0.1:{self.port}/0", timeout_s=10)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """At once, as a power cut would end it; the page cache stays."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def server(folder: Path, options: Iterable[str] = (), *, wrapper: Iterable[str] = ()) -> Iterator[Server]:
    """One server without a password, up when the context begins and gone when it ends."""
    one = Server(folder, options, wrapper=wrapper).start()
    try:
        with one.client() as client:
            until(client.ping)
        yield one
    finally:
        one.kill()


class Watched:
    """A primary, its replicas and Sentinels. Which of the `servers` is the primary changes; at first it is the first.

    `hasty` Sentinels look every half second where theirs is ten: for tests, not for measuring.
    """

    def __init__(
        self,
        folder: Path,
        *,
        replicas: int = 1,
        sentinels: int = 3,
        down_after_ms: int = 500,
        options: Iterable[str] = (),
        hasty: bool = False,
    ) -> None:
        shared = (
            f'requirepass "{PASSWORD}"',
            f'masterauth "{PASSWORD}"',
            "appendonly yes",
            "appendfsync always",
            "save ''",
            "maxmemory-policy noeviction",
            "repl-diskless-sync-delay 0",
            "repl-ping-replica-period 1",
            *options,
        )
        primary = Server(folder / "a", shared)
        following = (*shared, f"replicaof 127.0.0.1 {primary.port}")
        self.servers = [primary, *(Server(folder / f"b{i}", following) for i in range(replicas))]
        watch = (
            f'requirepass "{SENTINEL_PASSWORD}"',
            f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"',
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} {sentinels // 2 + 1}",
            f'sentinel auth-pass {SERVICE} "{PASSWORD}"',
            f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}",
            f"sentinel failover-timeout {SERVICE} 3000",
        )
        self._hasty = hasty
        self.sentinels = [Server(folder / f"s{i}", watch, sentinel=True) for i in range(sentinels)]

    @property
    def url(self) -> str:
        """As `LORAYARD_REDIS_URL` has it."""
        hosts = ",".join(f"127.0.0.1:{s.port}" for s in self.sentinels)
        return f"sentinel://:p%40ss%2Fword@{hosts}/0?service={SERVICE}&sentinel_password=watch%26tell"

    def __enter__(self) -> Watched:
        for one in (*self.servers, *self.sentinels):
            one.start()
        try:
            self.wait_replicas()
            for one in self.sentinels:
                if self._hasty:
                    self._hurry(one)
                until(lambda one=one: self._knows_all(one))  # type: ignore[misc]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for one in (*self.sentinels, *self.servers):
            one.kill()

    def role(self, one: Server) -> str:
        with one.client(PASSWORD) as client:
            return str(client.info("replication")["role"])

    def primary(self) -> Server:
        """The one the Sentinels name."""
        with connect(self.url) as client:
            _, port = client.connection_pool.get_master_address()
        return next(one for one in self.servers if one.port == port)

    def wait_replicas(self) -> None:
        """Until the first server's replicas have all that it has, and it knows."""
        replicas = len(self.servers) - 1
        with self.servers[0].client(PASSWORD) as first:
            until(lambda: first.wait(replicas, 100) == replicas)
        for one in self.servers[1:]:
            with one.client(PASSWORD) as other:
                until(lambda other=other: other.info("replication")["master_link_status"] == "up")  # type: ignore[misc]

    def _hurry(self, one: Server) -> None:
        with one.client(SENTINEL_PASSWORD) as client:
            asked: Any = client
            until(client.ping)
            asked.execute_command("SENTINEL", "DEBUG", "info-period", 500, "publish-period", 500)

    def _knows_all(self, one: Server) -> bool:
        with one.client(SENTINEL_PASSWORD) as client:
            state = client.sentinel_masters()[SERVICE]
        return bool(state["num-other-sentinels"] == len(self.sentinels) - 1 and state["num-slaves"] == len(self.servers) - 1)
