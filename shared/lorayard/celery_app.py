"""Celery as Lorayard uses it: a broker that wakes workers up. A message may be lost or repeated; the ledger says what is true."""

from __future__ import annotations

import threading
from typing import Any
from urllib.parse import quote

from celery import Celery

from lorayard.errors import SetupError
from lorayard.ledger.connection import SENTINEL, sentinel_address, shown

RUN_BATCH = "lorayard.run_batch"
INFER = "lorayard.infer"
INFER_QUEUE = "lorayard.infer"

_TRANSPORT: dict[str, Any] = {
    # A message that comes again is harmless here, so a lost one may come back soon. The keys are our own: kombu gives back every message
    # under them after this time, and must not touch those of other applications on the same broker.
    "visibility_timeout": 60,
    "unacked_key": "lorayard.unacked",
    "unacked_index_key": "lorayard.unacked_index",
    "unacked_mutex_key": "lorayard.unacked_mutex",
    # A server that does not answer any more, while its connections stay: publishing gives up after the first, consuming after the last.
    "socket_timeout": 5.0,
    "socket_connect_timeout": 5.0,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "retry_on_timeout": True,
}


def worker_queue(worker: str) -> str:
    return f"lorayard.worker.{worker}"


def infer_queue(pool: str) -> str:
    """Of the tasks for one pool; `INFER_QUEUE` is common to all that use the broker."""
    return f"{INFER_QUEUE}.{pool}"


class App(Celery):  # type: ignore[misc] # Celery has no types
    """Celery's application, whose threads share one result backend, and which closes that too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._making = threading.RLock()
        super().__init__(*args, **options)

    @property
    def backend(self) -> Any:
        """The result backend; two threads that ask first at the same time get the same one."""
        with self._making:
            return super().backend

    def close(self) -> None:
        """Release what the application holds, as `with make_app(...)` does at its end."""
        client = vars(self.backend).get("client")
        if client is not None:  # Celery leaves its sockets to the garbage collector
            self.backend.result_consumer.stop()
            client.connection_pool.disconnect()
        super().close()


def make_app(broker_url: str) -> App:
    """The Celery application of every role; only JSON is accepted. Raises `SetupError` for a `sentinel://` address that is none."""
    broker_url, options = _through_sentinel(broker_url) if broker_url.startswith(SENTINEL) else (broker_url, {})
    app = App("lorayard", broker=broker_url, backend=broker_url if broker_url.startswith(("redis", "rediss", "sentinel")) else None)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_ignore_result=True,
        task_default_queue="lorayard.none",
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_TRANSPORT | options,
        result_backend_transport_options=options,
        result_backend_thread_safe=True,
        redis_socket_timeout=_TRANSPORT["socket_timeout"],
        redis_socket_connect_timeout=_TRANSPORT["socket_connect_timeout"],
        visibility_timeout=_TRANSPORT["visibility_timeout"],
        broker_pool_limit=4,
    )
    return app


def _through_sentinel(url: str) -> tuple[str, dict[str, Any]]:
    """The ledger's form of address as Celery's: a URL for every Sentinel, the rest as options of the transport."""
    try:
        address = sentinel_address(url)
    except ValueError as error:
        raise SetupError(f"LORAYARD_BROKER_URL: {shown(url)!r} is no address of Sentinels ({error})") from None
    login = ":".join(quote(address.login.get(name, ""), safe="") for name in ("username", "password")) + "@" if address.login else ""
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in address.sentinels]
    urls = ";".join(f"{SENTINEL}{login}{host}/{address.db}" for host in hosts)
    return urls, {"master_name": address.service, "sentinel_kwargs": address.sentinel_options()}
