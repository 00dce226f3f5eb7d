"""The same no-op in other job queues, as their worker processes load it; and their producers, each in the fastest way its library has.

`main` is a producer's process: NAME COUNT. It prints ready, waits for a line, and enqueues.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import arq
import dramatiq
import redis
import redis.asyncio
import rq
import taskiq_redis
from celery import Celery
from dramatiq.brokers.redis import RedisBroker
from saq.queue.redis import RedisQueue

URL = os.environ["PEER_URL"]
RESULTS_URL = os.environ["PEER_RESULTS_URL"]
CONCURRENCY = int(os.environ.get("PEER_CONCURRENCY", "100"))
PAYLOAD = "x" * 500
AT_ONCE = 90
"""Sends that an asynchronous producer has under way, and jobs in one of rq's bulk calls: redis-py gives out 100 connections."""

THREADS = 16
"""Of a producer without bulk enqueue: many wait for the server's fsync together."""

QUIET = {"version": 1, "disable_existing_loggers": False}

dramatiq_broker = RedisBroker(url=URL)
dramatiq.set_broker(dramatiq_broker)


@dramatiq.actor  # type: ignore[untyped-decorator]
def dramatiq_noop(payload: str) -> None:
    pass


taskiq_results: Any = taskiq_redis.RedisAsyncResultBackend(RESULTS_URL, max_connection_pool_size=1000, result_ex_time=3600)
taskiq_broker = taskiq_redis.ListQueueBroker(URL, max_connection_pool_size=1000).with_result_backend(taskiq_results)


@taskiq_broker.task  # type: ignore[untyped-decorator]
async def taskiq_noop(payload: str) -> None:
    pass


saq_queue = RedisQueue(redis.asyncio.from_url(URL, max_connections=1000), max_concurrent_ops=CONCURRENCY)


async def saq_noop(context: Any, *, payload: str) -> None:
    pass


saq_settings = {"queue": saq_queue, "functions": [saq_noop], "concurrency": CONCURRENCY}


async def arq_noop(context: Any, payload: str) -> None:
    pass


class ArqSettings:
    """What `arq` reads."""

    functions = (arq_noop,)
    redis_settings = arq.connections.RedisSettings.from_dsn(URL)
    max_jobs = CONCURRENCY
    poll_delay = 0.01


def rq_noop(payload: str) -> None:
    pass


celery_app = Celery("peer", broker=URL, backend=RESULTS_URL)
celery_app.conf.update(worker_prefetch_multiplier=max(1, CONCURRENCY), broker_connection_retry_on_startup=True, broker_pool_limit=THREADS)


@celery_app.task  # type: ignore[untyped-decorator]
def celery_noop(payload: str) -> None:
    pass


def send_dramatiq(count: int) -> None:
    _in_threads(lambda: dramatiq_noop.send(PAYLOAD), count)


def send_celery(count: int) -> None:
    _in_threads(lambda: celery_noop.delay(PAYLOAD), count)


def _in_threads(send: Callable[[], Any], count: int) -> None:
    def run(share: int) -> None:
        for _ in range(share):
            send()

    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(run, count // THREADS + (i < count % THREADS)) for i in range(THREADS)]:
            done.result()


def send_rq(count: int) -> None:
    queue = rq.Queue(connection=redis.Redis.from_url(URL))
    for start in range(0, count, AT_ONCE):
        jobs = [rq.Queue.prepare_data(rq_noop, (PAYLOAD,), result_ttl=3600) for _ in range(min(AT_ONCE, count - start))]
        queue.enqueue_many(jobs)


async def _many(sends: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    waiting = []
    for send in sends:
        waiting.append(send())
        if len(waiting) == AT_ONCE:
            await asyncio.gather(*waiting)
            waiting.clear()
    await asyncio.gather(*waiting)


async def send_taskiq(count: int) -> None:
    await taskiq_broker.startup()
    await _many(lambda: taskiq_noop.kiq(PAYLOAD) for _ in range(count))
    await taskiq_broker.shutdown()


async def send_saq(count: int) -> None:
    await _many(lambda: saq_queue.enqueue("saq_noop", payload=PAYLOAD) for _ in range(count))
    await saq_queue.disconnect()


async def send_arq(count: int) -> None:
    pool = await arq.create_pool(ArqSettings.redis_settings)
    await _many(lambda: pool.enqueue_job("arq_noop", PAYLOAD) for _ in range(count))
    await pool.aclose()


def main() -> None:
    send, count = globals()[f"send_{sys.argv[1]}"], int(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    if asyncio.iscoroutinefunction(send):
        import uvloop

        uvloop.run(send(count))
    else:
        send(count)
