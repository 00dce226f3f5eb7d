"""The hosted backend: jobs of any adapters wait at a gate (`gate.py`) until limits, money and the service's health let them through, each
is then one call, made once. It runs in an event loop of a thread of its own; whoever is called from outside only passes word to it."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import redis
import structlog

from lorayard.errors import BadRequest, LorayardError, Unavailable
from lorayard.hosted import hosted_body, price, prompt_bytes
from lorayard.hosted_codes import CODES
from lorayard.jobs import BASE_DIGEST
from lorayard.ledger.organisation import NANO, Organisation, Settled, State
from lorayard.ledger.policies import Policies, Policy
from lorayard.settings import Settings
from lorayard_workers.groq.answers import PATIENCE, Failure, document, limits_told
from lorayard_workers.groq.calls import Call
from lorayard_workers.groq.client import ChatClient, Reply
from lorayard_workers.groq.gate import Gate
from lorayard_workers.runner import Event, Outcome, Progress, Ready, Started, Work

log = structlog.get_logger("lorayard.hosted")

BEAT_S = 1.0
SETTLE_S = 0.1


class HostedRunner:
    """`served` tells which adapters' digests the service has; `missing` is told of one whose model it does not know any more."""

    def __init__(
        self,
        settings: Settings,
        organisation: Organisation,
        policies: Policies,
        served: Callable[[], list[str]],
        missing: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._base = settings.hosted_model or ""
        self._org = organisation
        self._policies = policies
        self._served = served
        self._missing = missing
        self._price = price(settings)
        self._calls: dict[tuple[str, str], Call] = {}  # waiting, asked for, or running
        self._running: dict[tuple[str, str], Call] = {}
        self._settled: list[Settled] = []
        self._settling: tuple[str, list[Settled]] | None = None  # by a token, until the ledger has them
        self._heads: dict[str, int] = {}
        self._hot: dict[str, float] = {}
        self._loaded: list[str] = []
        self._counters: Counter[str] = Counter()
        self._over = asyncio.Event()
        self.gate = Gate(settings, organisation, policies, self, self._running)
        self._telling = ThreadPoolExecutor(1, "hosted-settle")  # what nobody waits for
        self._thread = threading.Thread(target=self._run, name="hosted", daemon=True)

    # -- from outside -------------------------------------------------------------------------------------------------------------------

    def start(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._loop = asyncio.new_event_loop()
        self._thread.start()

    def submit(self, work: Work) -> None:
        self._loop.call_soon_threadsafe(self._admit, work)

    def cancel(self, batch: str, refs: Sequence[str]) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel, batch, list(refs))

    def kill(self, reason: str) -> None:
        """Give up all calls: the ledger gives the jobs out again."""
        self._loop.call_soon_threadsafe(self._give_up, reason)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(10)

    # -- the loop -----------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except Exception:
            log.exception("the hosted backend broke down; its process ends")
            os._exit(3)  # nothing would be computed any more while leases are renewed
        finally:
            self.gate.close()
            self._telling.shutdown()
            self._loop.close()

    async def _main(self) -> None:
        self._client = ChatClient(self._settings)
        await self._look()
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(step) for step in (self.gate.run(), self._settle_loop(), self._beat_loop())]
        self._emit(Ready({}, self._settings.hosted_calls, 0, 0, os.getpid()))
        over = asyncio.create_task(self._over.wait())
        done, _ = await asyncio.wait([over, *tasks], return_when=asyncio.FIRST_COMPLETED)
        ending = [*tasks, *(call.task for call in self._running.values() if call.task)]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        while (self._settled or self._settling) and await self._settle():
            pass
        await self._client.close()
        for task in done - {over}:
            task.result()

    def _admit(self, work: Work) -> None:
        digest = work.adapter.digest if work.adapter else BASE_DIGEST
        model = work.adapter.path if work.adapter else self._base
        calls = []
        for item in work.items:
            call = Call(work.batch, item, model, digest, work.lane)
            try:
                call.body, call.notes = hosted_body(msgspec.json.decode(item.request), self._settings, endpoint=item.endpoint)
                call.size = prompt_bytes(call.body)
            except BadRequest as error:
                self.refuse(call, error.document())
                continue
            except Exception:  # nested deeper than can be read, say: its whole batch would be held for ever
                self._broke(call)
                continue
            self._calls[call.key] = call
            calls.append(call)
        self.gate.add(calls)

    def _cancel(self, batch: str, refs: list[str]) -> None:
        for ref in refs:
            call = self._calls.pop((batch, ref), None)
            if call is not None:
                call.cancelled = call.over = True
                if call.task is not None:
                    call.task.cancel()
        self.gate.drop_cancelled()

    def _give_up(self, reason: str) -> None:
        error = Unavailable(f"given up: {reason}", code="hosted_stuck").document()
        for call in list(self._calls.values()):
            self._emit(Outcome(call.batch, call.item.ref, error=error, later=True))
            self._cancel(call.batch, [call.item.ref])

    # -- behind the gate ----------------------------------------------------------------------------------------------------------------

    def begin(self, calls: Sequence[Call]) -> None:
        by_batch: dict[str, list[str]] = {}
        for call in calls:
            by_batch.setdefault(call.batch, []).append(call.item.ref)
        for batch, refs in by_batch.items():
            self._emit(Started(batch, refs))
        for call in calls:
            self._running[call.key] = call
            self._hot[call.digest] = call.started = time.monotonic()
            call.task = self._loop.create_task(self._make(call))
            call.task.add_done_callback(partial(self._ended, call))

    def end(self, call: Call, **what: Any) -> None:
        self._calls.pop(call.key, None)
        call.over = True
        if not call.cancelled:
            self._emit(Outcome(call.batch, call.item.ref, **what))

    def refuse(self, call: Call, error: dict[str, Any]) -> None:
        self._emit(Started(call.batch, [call.item.ref]))
        self.end(call, error=error)

    def unused(self, call: Call) -> None:
        self._settled.append(call.settled(0, 0))

    # -- one call -----------------------------------------------------------------------------------------------------------------------

    async def _make(self, call: Call) -> None:
        call.sent = True
        try:
            result = await self._client.chat(msgspec.json.encode({"model": call.model, **call.body}))
            if isinstance(result, Reply):
                self._succeeded(call, result)
            else:
                self._failed(call, result)
        except Exception:  # the job would be held for ever
            self.gate.breaker.released(call.item.ref)
            self._broke(call)

    def _broke(self, call: Call) -> None:
        """To be called where an exception is handled that should not be."""
        log.exception("a call went wrong here", job=call.item.ref)
        self.end(call, error=LorayardError("an internal error; the worker's log has it").document(), retryable=True)

    def _ended(self, call: Call, task: asyncio.Task[None]) -> None:
        """However it ended; also where it was cancelled before its task could begin."""
        self._running.pop(call.key, None)
        if task.cancelled():
            self.gate.breaker.released(call.item.ref)
            if call.sent:
                self._at_its_most(call)
            else:
                self.unused(call)
        self.gate.wake()

    def _at_its_most(self, call: Call) -> None:
        """What became of it is not known: it may have been computed, and charged."""
        assert call.want is not None
        self._settled.append(call.settled(call.want.tokens, call.want.nano))

    def _succeeded(self, call: Call, reply: Reply) -> None:
        self.gate.succeeded(call)
        self._heads = limits_told(reply.headers) or self._heads
        prompt, tokens, nano = call.used(reply.body, self._price)
        if prompt:
            self.gate.estimate.learn(prompt, call.size)
        self._settled.append(call.settled(tokens, nano))
        self._counters["answered"] += 1
        self._counters["tokens"] += tokens
        response = {key: value for key, value in reply.body.items() if key not in ("id", "model")}
        more = {"hosted_model": call.model, "cost_usd": nano / NANO} | ({"notes": call.notes} if call.notes else {})
        cold = call.is_cold(self._settings.hosted_idle_s)
        self.end(
            call,
            response=response,
            timings_ms=call.timings(reply, cold),
            temperature="cold" if cold else "warm",
            width=len(self._running),
            more=more,
        )

    def _failed(self, call: Call, failure: Failure) -> None:
        self._counters[failure.code if failure.code in CODES else "hosted_rejected"] += 1
        self.gate.failed(call, failure)
        if failure.unknown:
            self._at_its_most(call)
        else:
            self.unused(call)
        if failure.missing:
            self._telling.submit(self._tell_missing, call.digest)
        more = {"failed_generation": failure.failed_generation} if failure.failed_generation else {}
        self.end(
            call,
            error=document(failure),
            retryable=failure.how in ("attempt", "patience"),
            later=failure.how == "later",
            patience=PATIENCE if failure.how == "patience" else 0,
            after_ms=round(failure.after_s * 1000),
            more=more,
        )

    def _tell_missing(self, digest: str) -> None:
        try:
            self._missing(digest)
        except (LorayardError, redis.RedisError) as error:
            log.warning("not written to the ledger", reason=str(error))

    # -- beside the calls ---------------------------------------------------------------------------------------------------------------

    async def _settle_loop(self) -> None:
        while True:
            await asyncio.sleep(SETTLE_S)
            if not await self._settle():
                await asyncio.sleep(1)

    async def _settle(self) -> bool:
        """Some of them; whether the ledger heard."""
        if self._settling is None and self._settled:
            self._settling = secrets.token_hex(8), self._settled[:500]
            del self._settled[:500]
        if self._settling is None:
            return True
        token, part = self._settling
        try:
            await self._loop.run_in_executor(self._telling, self._org.settle, self._base, part, token)
        except Unavailable as error:  # the same again: it may be that only its reply was lost
            log.warning("use and money not settled yet", calls=len(part), reason=error.message)
            return False
        except LorayardError as error:  # it would be refused for ever: they stay at their most
            log.error("use and money not settled", calls=len(part), reason=error.message)
        self._settling = None
        return True

    async def _beat_loop(self) -> None:
        """What others of the organisation do shows in the ledger; and a sign of life, as each call has an end of its own."""
        while True:
            await self._look()
            gate = self.gate
            counters = {name: float(n) for name, n in self._counters.items()}
            counters |= {"active": float(len(self._running)), "waiting": float(len(gate))}
            counters |= {name: float(n) for name, n in (gate.known.numbers if gate.known else {}).items()}
            counters |= {"breaker_open": float(not gate.breaker.closed), "limits_unanswered": float(gate.unanswered)}
            hot = [digest for digest, at in self._hot.items() if time.monotonic() - at < self._settings.hosted_idle_s]
            doubted = sorted(gate.breaker.doubted(time.monotonic()))
            self._emit(Progress(self._counters["answered"], hot, self._loaded, counters, gate.room(), doubted=doubted))
            await asyncio.sleep(BEAT_S)

    async def _look(self) -> None:
        heads, self._heads = self._heads, {}

        def look() -> tuple[dict[str, Policy], list[str], State]:
            if heads:
                self._org.learn(self._base, "head", heads)
            return self._policies.all(), self._served(), self._org.state(self._base)

        try:
            who_may, self._loaded, state = await self._loop.run_in_executor(self._telling, look)
        except Exception as error:  # the ledger is away: what was known is good enough
            log.warning("the ledger was not read", reason=str(error))
            return
        self.gate.look(who_may, state)
