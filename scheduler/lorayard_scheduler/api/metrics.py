"""Prometheus metrics, read from the ledger when they are asked for. No label comes from a tenant."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import WorkerRegistry


class LedgerCollector(Collector):
    """`lorayard_*` of one pool."""

    def __init__(self, pool: str, ledger: Ledger, workers: WorkerRegistry) -> None:
        self._pool = pool
        self._ledger = ledger
        self._workers = workers

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: registering must not ask the ledger."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        counts = self._ledger.counts()
        view = self._ledger.snapshot()
        for name, text, value in (
            ("queued_jobs", "Jobs that wait in queues", counts.pop("queued", 0)),
            ("groups", "Queues (adapter and tenant) that are not empty", len(view.groups)),
            ("batches_in_flight", "Batches claimed and not ended", len(view.in_flight)),
        ):
            gauge = GaugeMetricFamily(f"lorayard_{name}", text, labels=["pool"])
            gauge.add_metric([self._pool], value)
            yield gauge
        jobs = CounterMetricFamily("lorayard_jobs", "Jobs by what happened to them", labels=["pool", "event"])
        for name, value in sorted(counts.items()):
            jobs.add_metric([self._pool, name], value)
        yield jobs
        up = GaugeMetricFamily("lorayard_worker_up", "1 while the worker takes work", labels=["pool", "worker"])
        work = CounterMetricFamily("lorayard_worker_events", "What the worker's backend counts", labels=["pool", "worker", "event"])
        alive = {w.name for w in self._workers.alive(self._pool, view.now)}
        for worker in self._workers.workers(self._pool):
            up.add_metric([self._pool, worker.name], float(worker.name in alive))
            for name, number in sorted(worker.counters.items()):
                work.add_metric([self._pool, worker.name, name], number)
        yield up
        yield work
