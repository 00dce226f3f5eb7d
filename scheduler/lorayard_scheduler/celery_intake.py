"""Producers without our code: the Celery task `lorayard.infer`, sent by name, becomes a job; its end goes to Celery's result backend.

A message is acknowledged to the broker only when the ledger has the job. The job's id and idempotency key are the task's id, so a message
that comes twice is one job. Pools may share a broker: a task that names another one is sent on to that pool's queue, one that names none is
of the pool that takes it, and each pool publishes the ends of its own.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import structlog
from celery import Celery, states
from kombu import Connection, Consumer, Queue
from kombu.message import Message

from lorayard.celery_app import INFER, INFER_QUEUE, infer_queue
from lorayard.errors import BadRequest, LorayardError, Unavailable
from lorayard.jobs import TERMINAL, Status
from lorayard.ledger import keys
from lorayard.ledger.ledger import Ledger
from lorayard.settings import Settings
from lorayard_scheduler.admission import Accepted, Admission, Item

log = structlog.get_logger()

_MOST = 500
SWEEP_S = 5.0
_PENDING = "ly:{celery}:pending:"  # POOL: SET of the ids of its jobs that came as Celery tasks and whose end is not published yet
_OF_ALL = "ly:{celery}:pending"  # SET: the same, where an earlier version noted the ids of all pools together
_POOLS = "lorayard.pools"  # SET of the pools that take tasks from this broker, kept there


class CeleryIntake:
    """Two loops, a thread each: `run` takes tasks in, `publish` stores ends where `AsyncResult` looks for them."""

    def __init__(self, settings: Settings, ledger: Ledger, app: Celery) -> None:
        self._settings = settings
        self._ledger = ledger
        self._app = app
        app.conf.result_expires = settings.result_ttl_s
        self._admission = Admission(settings, ledger)
        self._tenant = settings.celery_tenant
        self._queue = infer_queue(settings.pool)
        self._set = _PENDING + settings.pool
        self._stop = threading.Event()
        self._pending = threading.Event()  # jobs of this process's intake that have not ended
        self._waiting: list[Message] = []

    def stop(self) -> None:
        self._stop.set()
        self._pending.set()

    def run(self) -> None:
        """Consume until `stop`; a broker that goes away is waited for."""
        while not self._stop.is_set():
            try:
                with self._app.connection_for_read() as connection:
                    self._consume(connection)
            except Exception as error:  # whatever broker, ledger or result backend raise: what is not acknowledged comes again
                log.warning("intake interrupted, trying again", reason=str(error))
                self._waiting.clear()
                self._stop.wait(1)

    def _consume(self, connection: Connection) -> None:
        queues = [Queue(name, routing_key=name) for name in (INFER_QUEUE, self._queue)]
        # Not `callbacks`, for which kombu decodes each body and stops at one that it cannot: it would come again for ever.
        consumer = Consumer(connection, queues=queues, on_message=lambda m: self._waiting.append(m), accept=["json"], prefetch_count=_MOST)
        with consumer:
            while not self._stop.is_set():
                try:
                    connection.drain_events(timeout=0.5)
                    while len(self._waiting) < _MOST:
                        connection.drain_events(timeout=0.005)
                except (TimeoutError, socket.timeout):  # noqa: UP041 — kombu's transports raise either
                    pass
                if self._waiting:
                    self._admit(connection)

    def _admit(self, connection: Connection) -> None:
        """Enqueue what has come in; acknowledge what the ledger has or refuses for good, leave to the broker what it cannot take now."""
        came, self._waiting = [(message, _item(message)) for message in self._waiting], []
        own = self._send_on(connection, came)
        if not own:
            return
        messages = [message for message, _ in own]
        try:
            answers = self._admission.submit(self._tenant, [item for _, item in own], via="celery")
            accepted = [_task_id(m) for m, a in zip(messages, answers, strict=True) if isinstance(a, Accepted)]
            if accepted:
                self._ledger.client.sadd(keys.TENANTS, self._tenant)  # whose listings are looked after; a key may never have been made
                self._ledger.client.sadd(self._set, *accepted)
                self._pending.set()
        except Unavailable as error:
            log.warning("tasks left with the broker", tasks=len(messages), reason=error.message)
            for message in messages:
                message.requeue()
            self._stop.wait(1)
            return
        later = 0
        for message, answer in zip(messages, answers, strict=True):
            if isinstance(answer, Unavailable):
                message.requeue()
                later += 1
                continue
            if isinstance(answer, LorayardError):
                log.warning("task refused", task=_task_id(message), reason=answer.message)
                if _task_id(message):
                    self._app.backend.store_result(_task_id(message), answer, states.FAILURE)
            message.ack()
        if later:
            log.warning("tasks left with the broker", tasks=later, reason="the backlog is full")
            self._stop.wait(1)  # they come again at once

    def _send_on(self, connection: Connection, came: list[tuple[Message, Item]]) -> list[tuple[Message, Item]]:
        """Give tasks that name another pool which takes tasks from this broker to that one; the others."""
        named = [item["pool"] if isinstance(item, dict) and isinstance(item.get("pool"), str) else "" for _, item in came]
        others = self._pools() - {self._settings.pool} if set(named) - {"", self._settings.pool} else set()
        own = []
        for (message, item), pool in zip(came, named, strict=True):
            if pool not in others:
                own.append((message, item))
                continue
            connection.Producer().publish(
                message.body,
                routing_key=infer_queue(pool),
                headers={name: value for name, value in message.headers.items() if name != "compression"},  # it was unpacked here
                content_type=message.content_type,
                content_encoding=message.content_encoding,
            )
            message.ack()
        return own

    def _pools(self, *joining: str) -> set[str]:
        """The pools that take tasks from this broker, these among them from now on; none where it is no Redis and cannot tell."""
        client = getattr(self._app.backend, "client", None)
        if client is None:
            return set()
        if joining:
            client.sadd(_POOLS, *joining)
        return {pool.decode() for pool in client.smembers(_POOLS)}

    def publish(self) -> None:
        """Store the ends of pending jobs in the result backend; by events at once, by a sweep when an event was lost."""
        client = self._ledger.client
        after, sweep, swept, adopted = "0-0", True, 0.0, False
        while not self._stop.is_set():
            try:
                if not adopted:
                    self._adopt()
                    adopted = True
                # Also while ends never cease: a job may have ended before it was noted as pending.
                if sweep or time.monotonic() - swept > SWEEP_S:
                    swept = time.monotonic()
                    self._pools(self._settings.pool)
                    after = self._ledger.last_end()
                    self._pending.clear()
                    pending: Any = client.smembers(self._set)
                    self._publish([i.decode() for i in pending])
                    if not client.exists(self._set):  # what others' jobs come to need not be heard
                        self._stop.is_set() or self._pending.wait(SWEEP_S)  # `stop` sets both, and one was cleared above
                        sweep = True
                        continue
                known = after
                after, refs = self._ledger.ends(after, 1000)
                self._admission.quoting.heard(refs)
                ids = [ref.partition("/")[2] for ref in refs if ref.startswith(self._tenant + "/")]
                if ids:
                    mine: Any = client.smismember(self._set, ids)
                    self._publish([i for i, yes in zip(ids, mine, strict=True) if yes])
                sweep = after == known
            except Exception as error:  # the backend may be any broker's; what was not published stays pending
                log.warning("results not published, trying again", reason=str(error))
                self._stop.wait(1)
                sweep = True

    def _adopt(self) -> None:
        """Of the ids that an earlier version noted, those whose jobs are in this ledger are this pool's."""
        noted: Any = self._ledger.client.sscan_iter(_OF_ALL, count=200)
        ids = [job_id.decode() for job_id in noted]
        for start in range(0, len(ids), 200):
            part = ids[start : start + 200]
            documents = self._ledger.show(self._tenant, part)
            if own := [job_id for job_id, document in zip(part, documents, strict=True) if document is not None]:
                self._ledger.client.sadd(self._set, *own)
                self._ledger.client.srem(_OF_ALL, *own)

    def _publish(self, ids: list[str]) -> None:
        for start in range(0, len(ids), 200):
            part = ids[start : start + 200]
            for job_id, document in zip(part, self._ledger.show(self._tenant, part), strict=True):
                if document is not None and Status(document["status"]) not in TERMINAL:
                    continue
                if document is not None:
                    self._app.backend.store_result(job_id, document, states.SUCCESS)
                    if self._ledger.show(self._tenant, [job_id]) == [None]:  # deleted meanwhile: so is its copy
                        self._app.backend.forget(job_id)
                self._ledger.client.srem(self._set, job_id)


def _task_id(message: Message) -> str:
    return str(message.headers.get("id") or "")


def _item(message: Message) -> Item:
    """The task's kwargs as a job object that carries the task's id. Celery's message protocol 2: body is (args, kwargs, embed)."""
    task_id = _task_id(message)
    if message.headers.get("task") != INFER:
        return BadRequest(f"queue {INFER_QUEUE} takes the task {INFER} only, not {message.headers.get('task')!r}")
    try:
        args, kwargs, _ = message.payload
    except Exception as error:  # whatever the sender's serializer did
        return BadRequest(f"cannot decode the task's body: {error}; send it as JSON")
    if args or not isinstance(kwargs, dict):
        return BadRequest(f"{INFER} takes keyword arguments only: the fields of one job object")
    return {**kwargs, "id": task_id, "idempotency_key": task_id}
