"""Celery as Lorayard uses it: a broker that wakes workers up. A message may be lost or repeated; the ledger says what is true."""

from __future__ import annotations

from typing import Any

from celery import Celery

from lorayard.settings import Settings

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
    "socket_timeout": 30.0,
    "socket_connect_timeout": 5.0,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "retry_on_timeout": True,
}


def worker_queue(worker: str) -> str:
    return f"lorayard.worker.{worker}"


def make_app(broker_url: str) -> Celery:
    """The Celery application of every role; only JSON is accepted."""
    app = Celery("lorayard", broker=broker_url, backend=broker_url if broker_url.startswith(("redis", "rediss", "sentinel")) else None)
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
        broker_transport_options=_TRANSPORT,
        visibility_timeout=_TRANSPORT["visibility_timeout"],
        result_expires=Settings.model_fields["result_ttl_s"].default,
        broker_pool_limit=4,
    )
    return app
