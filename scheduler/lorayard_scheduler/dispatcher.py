"""The scheduler's loop: hear what changed, plan, claim, wake workers up; and, as the leader, put right what got lost."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import signal
import socket
import threading
import time

import redis
import structlog
from celery import Celery

from lorayard.celery_app import RUN_BATCH, worker_queue
from lorayard.errors import Unavailable
from lorayard.jobs import adapter_of
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.registry import WorkerInfo, WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler.ahead import fetchers, planned
from lorayard_scheduler.backlog import Backlog
from lorayard_scheduler.forecasts import Forecaster
from lorayard_scheduler.hosted_planner import OUTSTANDING
from lorayard_scheduler.hosted_planning import HostedPlanning
from lorayard_scheduler.planner import Dispatch, Policy, plan
from lorayard_scheduler.quoting import Board
from lorayard_scheduler.recall import recalls
from lorayard_scheduler.reconciler import Reconciler

log = structlog.get_logger()

WORKERS_EVERY_S = 0.5
AFTER_S = 0.02
"""What the worker has not taken after so long, Celery is told of: the ledger's own word, which costs no write, comes first."""
SEND_S = 5.0
FORECAST_EVERY_S, FORECAST_SHARE = 1.0, 100
"""Between two forecasts, and at least so many times what one took."""
REBUILD_EVERY_S = 10.0
"""Events are hints: however one gets lost, its group is found again after so long."""


class Dispatcher:
    """One process's scheduler. Several may run: the one that leads plans, the others wait for its lead to lapse."""

    def __init__(self, settings: Settings, ledger: Ledger, app: Celery) -> None:
        self._settings = settings
        self._ledger = ledger
        self._app = app
        self._me = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self._policy = Policy(
            reserve_ms=1000 * settings.reserve_s, batch_ms=1000 * settings.batch_s, rows_per_width=settings.batch_rows_per_width
        )
        self._backlog = Backlog(ledger, self._policy)
        self._registry = WorkerRegistry(ledger.client)
        self._reconciler = Reconciler(ledger, app)
        self._hosted = HostedPlanning(settings, ledger)
        self._board = Board(ledger)
        self._forecaster = Forecaster()
        self._told = 0.0  # when the next forecast is due
        self._workers: list[WorkerInfo] = []  # alive and ready
        self._workers_read = 0.0
        self._epoch = 0
        self._lead_until = 0.0
        self._event = "$"
        self._rebuilt = 0.0
        self._stop = threading.Event()
        self._messages: queue.SimpleQueue[tuple[str, str, float] | None] = queue.SimpleQueue()  # (batch, worker, when) for Celery

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Until `stop`. A server that cannot be reached is waited for: nothing here is lost with it."""
        sender = threading.Thread(target=self._send, name="wake-ups", daemon=True)
        sender.start()
        while not self._stop.is_set():
            try:
                if self._lead():
                    self._turn()
                else:
                    self._stop.wait(0.2)
            except (Unavailable, redis.RedisError) as error:
                log.warning("ledger unavailable, trying again", reason=str(error))
                self._epoch, self._lead_until = 0, 0.0
                self._stop.wait(0.5)
        if self._epoch:
            with contextlib.suppress(Unavailable):  # then the lead lapses
                self._ledger.resign(self._me)
        self._messages.put(None)
        sender.join(SEND_S)

    def _lead(self) -> bool:
        """Keep the lead, renewed at a third of its time; after taking it anew, everything is read anew."""
        now = time.monotonic()
        if now < self._lead_until:
            return True
        epoch = self._ledger.lead(self._me, self._settings.leader_ttl_ms)
        if epoch != self._epoch:
            self._epoch = epoch
            if epoch:
                self._rebuild()
                self._forecaster = Forecaster.going_on(self._board.read()[0])
                log.info("leads", epoch=epoch, groups=len(self._backlog.groups), in_flight=len(self._backlog.in_flight))
        if epoch:
            self._lead_until = now + self._settings.leader_ttl_ms / 3000
        return bool(epoch)

    def _rebuild(self) -> None:
        self._rebuilt = time.monotonic()
        self._event = self._backlog.rebuild()

    def _turn(self) -> None:
        """Hear, plan, dispatch; then put right what got lost, which a job that has just come need not wait for."""
        if time.monotonic() - self._rebuilt > REBUILD_EVERY_S:
            self._rebuild()
        self._event, events = self._ledger.events(self._event, 0 if self._backlog.stale else 100)
        self._backlog.hear(events)
        if self._hosted.wants(self._backlog, self._workers):
            self._backlog.stale = True
        if time.monotonic() - self._workers_read > WORKERS_EVERY_S or any(e.kind == "worker" for e in events):
            self._read_workers()
        if self._backlog.stale or self._backlog.waits:
            self._backlog.refresh()
            self._recall()
            dispatches = plan(self._backlog.view, self._backlog.now, self._policy)
            if not dispatches or not dispatches[-1].more:
                self._backlog.view.planned()
            for dispatch in [*dispatches, *self._hosted.plan(self._backlog, self._workers)]:
                self._dispatch(dispatch)
        self._tell()
        self._reconciler.sweep()

    def _tell(self) -> None:
        """Publish what quotes are made from and what workers keep adapters by, and learn what became of some quotes."""
        begun = time.monotonic()
        if begun < self._told:
            return
        for seen in self._board.collect():
            self._forecaster.saw(seen)
        ended = sum(worker.ended for worker in self._workers if not worker.hosted)
        now, paused = self._board.now(), self._ledger.paused()
        there = self._hosted.told(self._backlog, now, self._workers)
        self._board.publish(self._forecaster.make(self._backlog.view, now, self._policy, ended=ended, paused=paused, there=there))
        with contextlib.suppress(redis.RedisError):  # memory is short: workers do without
            digests, local = planned(self._backlog.groups), [worker for worker in self._workers if not worker.hosted]
            absent = {worker.name: worker.absent for worker in local}
            self._registry.announce_next(self._settings.pool, digests, fetchers(digests, absent))
        self._told = begun + max(FORECAST_EVERY_S, FORECAST_SHARE * (time.monotonic() - begun))

    def _read_workers(self) -> None:
        """A worker that appears, becomes ready or vanishes changes what can be planned."""
        self._workers_read = time.monotonic()
        seconds, micros = self._ledger.client.time()
        alive = self._registry.alive(self._settings.pool, int(seconds) * 1000 + int(micros) // 1000)
        self._backlog.meet(alive)
        if {(w.name, w.incarnation) for w in alive} != {(w.name, w.incarnation) for w in self._workers}:
            self._backlog.stale = True
            log.info("workers", alive=[w.name for w in alive])
        self._workers = alive

    def _recall(self) -> None:
        """What waits at workers that nobody hears of goes back; at others it makes room for what is urgent: so that the plan that follows
        can send it elsewhere, or the urgent there."""
        if batches := self._backlog.forsaken:
            jobs = sum(self._ledger.recall(epoch=self._epoch, batch=batch) for batch in batches)
            log.warning("jobs taken back from workers that are not heard of", jobs=jobs, batches=len(batches))
            self._hear_again()
        for recall in recalls(self._backlog.view, self._backlog.now, self._policy):
            jobs = sum(self._ledger.recall(epoch=self._epoch, batch=batch) for batch in recall.batches)
            log.info("recalled", worker=recall.worker, jobs=jobs, adapter=recall.digest[:12], why=recall.why)
            self._hear_again()

    def _hear_again(self) -> None:
        self._event, events = self._ledger.events(self._event, 0)
        self._backlog.hear(events)
        self._backlog.refresh()

    def _dispatch(self, dispatch: Dispatch) -> None:
        batch = f"{self._settings.pool}-b{secrets.token_hex(6)}"
        hosted = self._hosted.is_hosted(dispatch.worker)
        held = self._forecaster.paused(dispatch, self._backlog.now) if hosted else self._held_up(dispatch)
        answer, jobs = self._ledger.claim(
            epoch=self._epoch,
            worker=dispatch.worker,
            most=OUTSTANDING if hosted else self._policy.batches,
            batch=batch,
            digest=dispatch.digest,
            delivery_ms=self._settings.delivery_ms,
            why=f"{held}: {dispatch.why}" if held else dispatch.why,
            takes=dispatch.takes,
        )
        if answer == "epoch":
            log.warning("another scheduler leads now")
            self._epoch, self._lead_until = 0, 0.0
        if answer != "ok":
            self._backlog.missed(dispatch.digest, dispatch.takes)
            return
        self._backlog.dispatched(batch, dispatch.digest, dispatch.takes, dispatch.worker)
        self._messages.put((batch, dispatch.worker, time.monotonic()))
        log.info("dispatched", batch=batch, worker=dispatch.worker, adapter=dispatch.digest[:12], jobs=jobs, why=dispatch.why)

    def _held_up(self, dispatch: Dispatch) -> str:
        on = adapter_of(dispatch.digest) in self._backlog.roster.on
        return self._forecaster.dispatched(self._backlog.groups, dispatch, self._backlog.now, in_hand=on)

    def _send(self) -> None:
        """Celery's wake-ups, for whoever has not heard the ledger's; apart, so that no plan waits behind a broker that does not answer."""
        while (message := self._messages.get()) is not None:
            batch, worker, claimed = message
            time.sleep(max(0.0, claimed + AFTER_S - time.monotonic()))
            try:
                if self._ledger.awaits_taking(batch):
                    self._app.send_task(RUN_BATCH, args=[batch], queue=worker_queue(worker), ignore_result=True, retry=False)
            except Exception as error:  # kombu raises whatever its transport does; a worker also asks at each heartbeat what is its own
                log.warning("no wake-up sent", batch=batch, reason=str(error))


def serve(settings: Settings, ledger: Ledger, app: Celery) -> None:
    """The `lorayard scheduler` process: the loop here, the intake of Celery tasks in a thread, until SIGTERM or SIGINT."""
    from lorayard_scheduler.celery_intake import CeleryIntake

    dispatcher = Dispatcher(settings, ledger, app)
    intake = CeleryIntake(settings, ledger, app)
    threads = [threading.Thread(target=intake.run, name="celery-intake"), threading.Thread(target=intake.publish, name="celery-results")]

    def stop(*_: object) -> None:
        dispatcher.stop()
        intake.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for thread in threads:
        thread.start()
    try:
        dispatcher.run()
    finally:
        stop()
        for thread in threads:
            thread.join(10)
