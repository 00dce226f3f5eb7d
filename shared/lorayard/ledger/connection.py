"""The way to the ledger's server: one that is named, or the one that Sentinels name; after a fail-over, to the new one. And what a
caller is told where the server does not answer.

    redis://[[USER]:PASSWORD@]HOST[:6379][/DB]          rediss:// the same with TLS
    sentinel://[[USER]:PASSWORD@]HOST[:26379],HOST2[:26379],.../DB?service=NAME
        &sentinel_username=USER &sentinel_password=PASSWORD &replicas=N

USER and PASSWORD before the @ are the server's own; those of the Sentinels stand behind the question mark. Percent-encode what is no
letter or digit in them. With `replicas`, a call of the ledger is done only when so many replicas have what it wrote.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool, SentinelManagedConnection

from lorayard.errors import SetupError, Unavailable

SENTINEL = "sentinel://"
_FORM = "write redis://HOST:PORT/0, or sentinel://HOST:26379,HOST2:26379/0?service=NAME"
_SENTINEL_S = 2.0


class _Once(Retry):
    """Try once. It can be shown as JSON, because Celery shows all of its options to whoever asks a worker, as Flower does."""

    def __init__(self) -> None:
        super().__init__(NoBackoff(), 0)

    def __json__(self) -> str:
        return "once"


class SentinelAddress(NamedTuple):
    """What a `sentinel://` URL says. `sentinels` are (host, port); `login` and `sentinel_login` username and password, where given."""

    sentinels: list[tuple[str, int]]
    service: str
    db: int
    login: dict[str, str]
    sentinel_login: dict[str, str]
    replicas: int = 0

    def sentinel_options(self, timeout_s: float = _SENTINEL_S) -> dict[str, Any]:
        """Of the connections to the Sentinels. One that is away must not keep us from asking the next."""
        return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "retry": _Once(), **self.sentinel_login}


def shown(url: str) -> str:
    """An address as it may stand in messages and logs: without passwords."""
    rest = url.rpartition("@")[2]
    host, _, query = rest.partition("?")
    options = [f"{name}={value}" for name, value in parse_qsl(query) if "password" not in name]
    return host + ("?" + "&".join(options) if options else "")


def connect(url: str, *, timeout_s: float = 5.0) -> redis.Redis:
    """A client with the time-outs every role uses; bytes in, bytes out. Thread-safe. Raises `SetupError` for what is no address.

    It never repeats a call by itself. It leaves a server that turns out to be a read-only replica: that call fails with redis'
    `ConnectionError`, the next one looks for the primary again.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 30,
        "protocol": 2,
    }
    try:
        return _through_sentinel(sentinel_address(url), options) if url.startswith(SENTINEL) else _directly(url, options)
    except ValueError as error:
        raise SetupError(f"LORAYARD_REDIS_URL: {shown(url)!r} is no address of a Redis ({error}); {_FORM}") from None


def sentinel_address(url: str) -> SentinelAddress:
    """Raises `ValueError` with the reason."""
    parts = urlsplit(url)
    user, _, hosts = parts.netloc.rpartition("@")
    sentinels = []
    for host in hosts.split(","):
        one = urlsplit("//" + host)
        if not one.hostname or ";" in host:
            raise ValueError(f"{host!r} is no HOST:PORT of a Sentinel; separate them by commas")
        sentinels.append((one.hostname, one.port or 26379))
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    service = query.pop("service", "")
    if not service:
        raise ValueError("'?service=NAME', what the Sentinels call the server, is missing")
    login = urlsplit(f"//{user}@host")
    sentinel_login = {
        name.removeprefix("sentinel_"): query.pop(name) for name in ("sentinel_username", "sentinel_password") if name in query
    }
    replicas = query.pop("replicas", "0")
    if query:
        raise ValueError(f"{next(iter(query))!r} is no option of it")
    db = parts.path.strip("/") or "0"
    if not db.isdecimal():
        raise ValueError(f"{db!r} is no number of a database")
    if not replicas.isdecimal():
        raise ValueError(f"{replicas!r} is no number of replicas")
    given = (("username", login.username), ("password", login.password))
    return SentinelAddress(
        sentinels, service, int(db), {name: unquote(value) for name, value in given if value}, sentinel_login, int(replicas)
    )


def is_sentinel(client: redis.Redis) -> bool:
    return isinstance(client.connection_pool, SentinelConnectionPool)


def is_plain(client: redis.Redis) -> bool:
    """Whether a call is one command and its reply, readable as soon as the socket is: no TLS, no replicas to wait for."""
    kind = client.connection_pool.connection_class
    return not isinstance(client, _Confirmed) and issubclass(kind, _Primary) and not issubclass(kind, SSLConnection)


def _directly(url: str, options: dict[str, Any]) -> redis.Redis:
    if not url.startswith(("redis://", "rediss://")):
        raise ValueError("it begins with none of redis://, rediss://, sentinel://")
    client = redis.Redis.from_url(url, **options)
    pool = client.connection_pool
    pool.connection_class = _SecurePrimary if pool.connection_class is SSLConnection else _Primary
    try:
        pool.connection_class(**pool.connection_kwargs)
    except TypeError as error:  # whatever stands in the query is an argument to redis-py
        raise ValueError(f"{str(error).rpartition(' ')[2]} is no option of it") from None
    return client


class _Primary(Connection):
    """A server that was demoted, or has lost its replicas, keeps its connections: whoever stays with it can never write again.

    Where an address is moved to the new primary, as DNS names of managed services are, connecting anew leads there.
    """

    def fileno(self) -> int:
        """Of its socket, for whoever waits for a reply in an event loop."""
        sock: Any = self._sock
        return int(sock.fileno())

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.ResponseError as error:
            if not isinstance(error, redis.ReadOnlyError) and not str(error).startswith("NOREPLICAS"):
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(f"the server does not, or not any more, write as the primary: {error}") from None


class _SecurePrimary(_Primary, SSLConnection):
    pass


class _NamedPrimary(_Primary, SentinelManagedConnection):
    pass


def _through_sentinel(address: SentinelAddress, options: dict[str, Any]) -> redis.Redis:
    asking = address.sentinel_options(min(_SENTINEL_S, options["socket_timeout"])) | {"protocol": 2}
    sentinels = _Sentinels(address.sentinels, sentinel_kwargs=asking, **options)  # type: ignore[no-untyped-call]
    options |= {"db": address.db, "connection_class": _NamedPrimary, **address.login}
    pool = _Pool(address.service, sentinels, **options)  # type: ignore[no-untyped-call]
    client = _Confirmed(connection_pool=pool) if address.replicas else redis.Redis(connection_pool=pool)
    client.auto_close_connection_pool = True
    if isinstance(client, _Confirmed):
        client.replicas, client.patience_ms = address.replicas, round(options["socket_timeout"] * 500)
    return client


class _Confirmed(redis.Redis):
    """Functions have their answer when it would outlive the primary: a Sentinel's fail-over loses what no replica has."""

    replicas = 1
    patience_ms = 2500

    def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Raises redis' `TimeoutError` when too few replicas confirm in time; what was written may then be kept or lost."""
        with self.pipeline(transaction=False) as pipe:  # one connection: WAIT is about what came over the same
            pipe.fcall(function, numkeys, *keys_and_args)
            pipe.wait(self.replicas, self.patience_ms)
            answer, copies = pipe.execute(raise_on_error=False)
        for reply in (answer, copies):
            if isinstance(reply, Exception):
                raise reply
        if copies < self.replicas:  # perhaps it is the primary no more: ask the Sentinels
            self.connection_pool.disconnect(inuse_connections=False)
            raise redis.TimeoutError(f"{copies} of {self.replicas} replicas confirmed it within {self.patience_ms} ms")
        return answer


class _Sentinels(Sentinel):
    def discover_master(self, service_name: str) -> tuple[str, int]:
        """As the library's, which reorders a list in place: two threads at once may drop a Sentinel out of it."""
        asked = copy.copy(self)
        asked.sentinels = list(self.sentinels)
        try:
            found: tuple[str, int] = Sentinel.discover_master(asked, service_name)  # type: ignore[no-untyped-call]
        except MasterNotFoundError as error:  # its text has the connections' whole configuration
            names = ", ".join("{host}:{port}".format_map(s.connection_pool.connection_kwargs) for s in self.sentinels)
            why = "their password is wrong" if "Authentication" in str(error) else "they are away, or know of none"
            raise MasterNotFoundError(f"no primary of {service_name!r} from the Sentinels {names}: {why}") from None
        self.sentinels = asked.sentinels
        return found


class _Pool(SentinelConnectionPool):
    def disconnect(self, inuse_connections: bool = True) -> None:
        """With the client, the connections to the Sentinels are closed; not when only a new primary was found."""
        super().disconnect(inuse_connections)
        if inuse_connections:
            self.sentinel_manager.close()


def unavailable(error: redis.RedisError) -> Unavailable:
    """What a caller is told of the server's error: not where the server is, which is the operator's business."""
    text = str(error)
    if text.startswith("OOM") or "MISCONF" in text or "maxmemory" in text:
        return Unavailable("the ledger's Redis is out of memory or cannot write; nothing was stored, try again later", code="ledger_full")
    return Unavailable(f"the ledger's Redis does not answer ({type(error).__name__}); try again")
