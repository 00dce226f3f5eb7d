"""The hosted backend: jobs of any adapters wait at a gate until limits, money and the service's health let them through, each is then one
call, made once. It runs in an event loop of a thread of its own; whoever is called from outside only passes word to it."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import redis
import structlog

from lorayard.errors import BadRequest, LorayardError, Unavailable
from lorayard.hosted import answer_tokens, hosted_body, price, prompt_bytes, prompt_tokens
from lorayard.jobs import BASE_DIGEST
from lorayard.ledger.keys import split_ref
from lorayard.ledger.organisation import NANO, Organisation, Refused, Reserved, Settled, State, Want
from lorayard.ledger.policies import NOTHING_LEAVES, Policies, Policy
from lorayard.settings import Settings
from lorayard_workers.groq.answers import Failure, document, limits_told
from lorayard_workers.groq.calls import Call
from lorayard_workers.groq.client import ChatClient, Reply
from lorayard_workers.groq.limiter import Breaker, Concurrency, Estimate
from lorayard_workers.runner import Event, Outcome, Progress, Ready, Started, Work

log = structlog.get_logger("lorayard.hosted")

T = TypeVar("T")
PATIENCE = 8
"""So often a job is put off at no cost because no whole answer came; then each time is an attempt: it may be the job's own doing."""
HOLD_S = 90.0
"""Who waits longer than this for a limit waits in the ledger, where somebody else may take it. Most limits are of a minute."""
BEAT_S = 1.0
SETTLE_S = 0.1
ASK_AGAIN_S = 0.25
_ASK_MOST = 64  # calls in one question about limits
_MONEY_AGAIN_MS = 60_000
_RECENT_S = 10.0


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
        self._concurrency = Concurrency(settings.hosted_calls)
        self._breaker = Breaker()
        self._estimate = Estimate()
        self._waiting: list[tuple[int, int, Call]] = []
        self._singly = 0  # so many are asked for one at a time: one of them is what the ledger will never take
        self._order = itertools.count()
        self._calls: dict[tuple[str, str], Call] = {}  # waiting, asked for, or running
        self._running: dict[tuple[str, str], Call] = {}
        self._settled: list[Settled] = []
        self._heads: dict[str, int] = {}
        self._blocked_until = self._blocked_at = self._ask_again = 0.0
        self._unanswered = False  # the last question about limits
        self._granted: deque[tuple[float, int]] = deque()
        self._hot: dict[str, float] = {}
        self._loaded: list[str] = []
        self._who_may: dict[str, Policy] = {}  # by tenant
        self._known: State | None = None
        self._counters: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._over = asyncio.Event()
        # One for what calls wait for, one for what nobody waits for.
        self._asking = ThreadPoolExecutor(1, "hosted-reserve")
        self._telling = ThreadPoolExecutor(1, "hosted-settle")
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
            self._asking.shutdown()
            self._telling.shutdown()
            self._loop.close()

    async def _main(self) -> None:
        self._client = ChatClient(self._settings)
        await self._look()
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(step) for step in (self._gate(), self._settle_loop(), self._beat_loop())]
        self._emit(Ready({}, self._settings.hosted_calls, 0, 0, os.getpid()))
        over = asyncio.create_task(self._over.wait())
        done, _ = await asyncio.wait([over, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in [*tasks, *(call.task for call in self._running.values() if call.task)]:
            task.cancel()
        await self._settle()
        await self._client.close()
        for task in done - {over}:
            task.result()

    def _admit(self, work: Work) -> None:
        digest = work.adapter.digest if work.adapter else BASE_DIGEST
        model = work.adapter.path if work.adapter else self._base
        for item in work.items:
            call = Call(work.batch, item, model, digest, work.lane)
            try:
                call.body, call.notes = hosted_body(msgspec.json.decode(item.request), self._settings, endpoint=item.endpoint)
                call.size = prompt_bytes(call.body)
            except BadRequest as error:
                self._emit(Started(work.batch, [item.ref]))
                self._end(call, error=error.document())
                continue
            self._calls[call.key] = call
            heapq.heappush(self._waiting, (item.due, next(self._order), call))
        self._wake.set()

    def _cancel(self, batch: str, refs: list[str]) -> None:
        for ref in refs:
            call = self._calls.pop((batch, ref), None)
            if call is not None:
                call.cancelled = True
                if call.task is not None:
                    call.task.cancel()
        self._waiting = [row for row in self._waiting if not row[2].cancelled]
        heapq.heapify(self._waiting)

    def _give_up(self, reason: str) -> None:
        error = {"message": f"given up: {reason}", "type": "server_error", "code": "hosted_stuck", "param": None}
        for call in list(self._calls.values()):
            self._emit(Outcome(call.batch, call.item.ref, error=error, later=True))
            self._cancel(call.batch, [call.item.ref])

    async def _in(self, pool: ThreadPoolExecutor, what: Callable[..., T], *args: Any) -> T:
        return await self._loop.run_in_executor(pool, what, *args)

    # -- the gate -----------------------------------------------------------------------------------------------------------------------

    async def _gate(self) -> None:
        while True:
            wait_s = await self._let_through()
            if wait_s > HOLD_S:
                self._put_off_all(wait_s, "rate_limited", f"the service allows no call for {wait_s:.0f} s")
                continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s or None):
                    await self._wake.wait()

    async def _let_through(self) -> float:
        """As many calls as may be made now; seconds until more may be, 0 when that depends on what happens next."""
        while self._waiting:
            now = time.monotonic()
            if (wait_s := max(self._breaker.wait_s(now), self._blocked_until - now, self._ask_again - now)) > 0:
                return wait_s
            if not self._breaker.closed:
                chosen = [self._probe()]
            elif (free := self._at_once() - len(self._running)) <= 0:
                return 0.0
            else:
                if self._singly > 0:
                    free, self._singly = 1, self._singly - 1
                chosen = [heapq.heappop(self._waiting) for _ in range(min(free, _ASK_MOST, len(self._waiting)))]
            if wait_s := await self._ask(chosen):
                return wait_s
        return 0.0

    def _probe(self) -> tuple[int, int, Call]:
        """The most due of what is least suspected of failing by its own fault."""
        row = min(self._waiting, key=lambda row: (self._breaker.suspicion(row[2].item.ref, row[2].digest), row[:2]))
        self._waiting.remove(row)
        heapq.heapify(self._waiting)
        return row

    def _at_once(self) -> int:
        known = self._settings.hosted_unlimited or bool(self._known and self._known.numbers.get("rpm"))
        return self._concurrency.limit(known=known)

    async def _ask(self, rows: list[tuple[int, int, Call]]) -> float:
        """Reserve for these calls and begin those that may be; seconds to wait before the next can be asked for, 0 for none."""
        try:
            if not all(self._has_leave(call) for _, _, call in rows):  # what was read a moment ago is not good enough to refuse
                self._who_may = await self._in(self._asking, self._policies.all)
            may = [row for row in rows if self._may_leave(row[2])]
            wants = [self._want(row[2]) for row in may]
            if not wants:
                return 0.0
            reserved = await self._reserve(wants)
        except (Unavailable, redis.RedisError) as error:
            self._unanswered = True
            log.warning("limits cannot be asked for; calls wait", reason=str(error))
            self._push_back([row for row in rows if row[2].key in self._calls])
            return 1.0
        except LorayardError as error:
            self._unanswered = True
            self._not_taken([row for row in rows if row[2].key in self._calls], error)
            return 0.0
        self._unanswered = False
        begun: dict[str, list[str]] = {}
        for (_, _, call), want, answer in zip(may, wants, reserved.answers, strict=False):
            call.want = want
            if isinstance(answer, Refused) and not call.cancelled and self._want(call).caps != want.caps:
                self._push_back([(call.item.due, next(self._order), call)])
            elif isinstance(answer, Refused):
                self._refused(call, answer)
            else:
                call.grant = answer
                if call.cancelled:
                    self._settled.append(call.settled(0, 0))
                    continue
                begun.setdefault(call.batch, []).append(call.item.ref)
        for batch, refs in begun.items():
            self._emit(Started(batch, refs))
            for ref in refs:
                self._begin(self._calls[batch, ref])
        self._granted.append((time.monotonic(), sum(map(len, begun.values()))))
        self._push_back(may[len(reserved.answers) :])
        return 0.0 if len(reserved.answers) == len(may) else self._wait_after(reserved)

    def _wait_after(self, reserved: Reserved) -> float:
        """Seconds until there is room for the next."""
        wait_s = reserved.wait_ms / 1000
        if reserved.why not in ("rpm", "tpm", "rpd", "tpd"):  # a block, which may be lifted
            self._blocked_until = max(self._blocked_until, time.monotonic() + wait_s)
            return wait_s
        # Tokens become free before their time, when calls take less than they might have: worth asking again soon.
        self._ask_again = time.monotonic() + (min(wait_s, ASK_AGAIN_S) if reserved.why == "tpm" else wait_s)
        return wait_s

    async def _reserve(self, wants: list[Want]) -> Reserved:
        reserved = await self._in(self._asking, self._org.reserve, self._base, wants)
        if any(isinstance(answer, Refused) and answer.why != "tokens" for answer in reserved.answers):
            self._who_may = await self._in(self._asking, self._policies.all)  # there may be more money by now
        return reserved

    def _not_taken(self, rows: list[tuple[int, int, Call]], error: LorayardError) -> None:
        """The ledger refuses the question itself, and would for ever: whose doing that is shows when they are asked for one at a time."""
        log.error("limits cannot be asked for", jobs=len(rows), reason=error.message)
        if len(rows) > 1:
            self._push_back(rows)
            self._singly = len(rows)
            return
        for _, _, call in rows:
            self._end(call, error=error.document(), retryable=True)

    def _push_back(self, rows: list[tuple[int, int, Call]]) -> None:
        for row in rows:
            if not row[2].cancelled:
                heapq.heappush(self._waiting, row)

    def _has_leave(self, call: Call) -> bool:
        return self._who_may.get(split_ref(call.item.ref)[0], NOTHING_LEAVES).hosted

    def _may_leave(self, call: Call) -> bool:
        """Whether the tenant still lets its data leave. If not, its job fails, or goes where it may be run at home."""
        if call.cancelled:
            return False
        if self._has_leave(call):
            return True
        message = f"tenant {split_ref(call.item.ref)[0]} no longer allows its data to leave for a hosted service"
        error = {"message": message, "type": "permission_error", "code": "hosted_not_allowed", "param": None}
        self._end(call, error=error, later=call.lane == "auto")
        return False

    def _want(self, call: Call) -> Want:
        tenant = split_ref(call.item.ref)[0]
        prompt, answer = prompt_tokens(call.body, self._estimate.tokens_per_byte), answer_tokens(call.body)
        nano = round(prompt * self._price[0] + answer * self._price[1])
        return Want(call.model, prompt + answer, tenant, nano, self._who_may[tenant].caps)

    def _refused(self, call: Call, answer: Refused) -> None:
        if answer.why == "tokens":
            message = f"prompt and answer may have {call.want and call.want.tokens} tokens; the service allows {answer.limit} a minute"
            self._emit(Started(call.batch, [call.item.ref]))
            self._end(call, error={"message": message, "type": "invalid_request_error", "code": "request_too_large", "param": "max_tokens"})
            return
        message = f"the {answer.why}'s money for hosted calls is spent; the job waits for more, or for its deadline"
        error = {"message": message, "type": "server_error", "code": "budget_exhausted", "param": None}
        self._end(call, error=error, later=True, after_ms=_MONEY_AGAIN_MS)

    def _put_off_all(self, wait_s: float, code: str, message: str) -> None:
        error = {"message": message, "type": "server_error", "code": code, "param": None}
        for _, _, call in self._waiting:
            self._end(call, error=error, later=True, after_ms=round(min(wait_s, 600) * 1000))
        self._waiting.clear()

    def _make_way(self, now: float) -> None:
        """Of an open breaker: where all that wait may be to blame themselves, most are put off, so that others come to be probed with."""
        doubted = self._breaker.doubted(now)
        if self._breaker.closed or len(self._waiting) < 2 or not all(call.digest in doubted for _, _, call in self._waiting):
            return
        probe = self._probe()
        self._put_off_all(self._breaker.wait_s(now), "over_capacity", "most calls of its adapter fail at the service")
        self._waiting.append(probe)

    # -- one call -----------------------------------------------------------------------------------------------------------------------

    def _begin(self, call: Call) -> None:
        self._running[call.key] = call
        self._hot[call.digest] = call.started = time.monotonic()
        self._breaker.calling(call.item.ref)
        call.task = self._loop.create_task(self._make(call))

    async def _make(self, call: Call) -> None:
        try:
            result = await self._client.chat(msgspec.json.encode({"model": call.model, **call.body}))
            if isinstance(result, Reply):
                self._succeeded(call, result)
            else:
                self._failed(call, result)
        except asyncio.CancelledError:
            self._breaker.released(call.item.ref)
            raise
        except Exception:  # the job would be held for ever
            log.exception("a call went wrong here", job=call.item.ref)
            self._breaker.released(call.item.ref)
            self._end(call, error=LorayardError("an internal error; the worker's log has it").document(), retryable=True)
        finally:
            self._running.pop(call.key, None)
            self._wake.set()

    def _succeeded(self, call: Call, reply: Reply) -> None:
        self._concurrency.succeeded()
        self._breaker.succeeded(call.item.ref, call.digest, time.monotonic())
        self._heads = limits_told(reply.headers) or self._heads
        prompt, tokens, nano = call.used(reply.body, self._price)
        if prompt:
            self._estimate.learn(prompt, call.size)
        self._settled.append(call.settled(tokens, nano))
        self._counters["answered"] += 1
        self._counters["tokens"] += tokens
        response = {key: value for key, value in reply.body.items() if key not in ("id", "model")}
        more = {"hosted_model": call.model, "cost_usd": nano / NANO} | ({"notes": call.notes} if call.notes else {})
        cold = call.is_cold(self._settings.hosted_idle_s)
        self._end(
            call,
            response=response,
            timings_ms=call.timings(reply, cold),
            temperature="cold" if cold else "warm",
            width=len(self._running),
            more=more,
        )

    def _failed(self, call: Call, failure: Failure) -> None:
        now = time.monotonic()
        self._counters[failure.code] += 1
        if failure.overload:
            self._concurrency.overloaded(now)
        if failure.trouble:
            self._breaker.failed(call.item.ref, call.digest, now)
            self._make_way(now)
        else:
            self._breaker.succeeded(call.item.ref, call.digest, now)
        if not failure.unknown:
            self._settled.append(call.settled(0, 0))
        if failure.blocked:
            self._block(failure)
        if failure.missing:
            self._background(self._telling, self._missing, call.digest)
        more = {"failed_generation": failure.failed_generation} if failure.failed_generation else {}
        self._end(
            call,
            error=document(failure),
            retryable=failure.how in ("attempt", "patience"),
            later=failure.how == "later",
            patience=PATIENCE if failure.how == "patience" else 0,
            after_ms=round(failure.after_s * 1000),
            more=more,
        )

    def _block(self, failure: Failure) -> None:
        """No call by anyone of the organisation for as long as the service said."""
        self._blocked_at = time.monotonic()
        self._blocked_until = max(self._blocked_until, self._blocked_at + failure.after_s)
        log.warning("the service refuses calls", reason=failure.message, seconds=failure.after_s)
        if failure.limit:
            self._background(self._asking, self._org.learn, self._base, "told", dict([failure.limit]))
        self._background(self._asking, self._org.block, self._base, failure.after_s * 1000, failure.code)  # before we ask again

    @staticmethod
    def _background(pool: ThreadPoolExecutor, what: Callable[..., Any], *args: Any) -> None:
        def tell() -> None:
            try:
                what(*args)
            except LorayardError as error:
                log.warning("not written to the ledger", reason=error.message)

        pool.submit(tell)

    def _end(self, call: Call, **what: Any) -> None:
        self._calls.pop(call.key, None)
        if not call.cancelled:
            self._emit(Outcome(call.batch, call.item.ref, **what))

    # -- beside the calls ---------------------------------------------------------------------------------------------------------------

    async def _settle_loop(self) -> None:
        while True:
            await asyncio.sleep(SETTLE_S)
            await self._settle()

    async def _settle(self) -> None:
        if not self._settled:
            return
        part, self._settled = self._settled[:500], self._settled[500:]
        try:
            await self._in(self._telling, self._org.settle, self._base, part)
        except Unavailable as error:
            log.warning("use and money not settled yet", calls=len(part), reason=error.message)
            self._settled = part + self._settled
            await asyncio.sleep(1)

    async def _beat_loop(self) -> None:
        """What others of the organisation do shows in the ledger; and a sign of life, as each call has an end of its own."""
        while True:
            await self._look()
            counters = {name: float(n) for name, n in self._counters.items()}
            counters |= {"active": float(len(self._running)), "waiting": float(len(self._waiting))}
            counters |= {name: float(n) for name, n in (self._known.numbers if self._known else {}).items()}
            counters |= {"breaker_open": float(not self._breaker.closed), "limits_unanswered": float(self._unanswered)}
            hot = [digest for digest, at in self._hot.items() if time.monotonic() - at < self._settings.hosted_idle_s]
            doubted = sorted(self._breaker.doubted(time.monotonic()))
            self._emit(Progress(self._counters["answered"], hot, self._loaded, counters, self._room(), doubted=doubted))
            await asyncio.sleep(BEAT_S)

    async def _look(self) -> None:
        heads, self._heads = self._heads, {}

        def look() -> tuple[dict[str, Policy], list[str], State]:
            if heads:
                self._org.learn(self._base, "head", heads)
            return self._policies.all(), self._served(), self._org.state(self._base)

        try:
            self._who_may, self._loaded, state = await self._in(self._telling, look)
        except Exception as error:  # the ledger is away: what was known is good enough
            log.warning("the ledger was not read", reason=str(error))
            return
        self._known = state
        told = time.monotonic() + state.blocked_ms / 1000
        ours_is_told = time.monotonic() - self._blocked_at > 2 * BEAT_S  # then the ledger is right, also where somebody has lifted a block
        self._blocked_until = told if ours_is_told else max(self._blocked_until, told)
        self._wake.set()

    def _room(self) -> int:
        """How many jobs are wanted here in all: those that can be called soon. The others stay where anybody can take them."""
        now = time.monotonic()
        while self._granted and self._granted[0][0] < now - _RECENT_S:
            self._granted.popleft()
        if max(self._blocked_until, self._ask_again) - now > HOLD_S:
            return 0
        if not self._breaker.closed:
            return 8
        room = max(2 * self._at_once(), 8, 2 * sum(n for _, n in self._granted))
        rpm = self._known.numbers.get("rpm") if self._known else None
        if rpm:
            room = min(room, max(8, rpm // 4))
        return min(room, 2 * self._settings.hosted_calls)
