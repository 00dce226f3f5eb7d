"""The gate of the hosted backend: which of the calls that wait may be made now, by leave, limits, money and the service's health."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import redis
import structlog

from lorayard.errors import BadRequest, Forbidden, LorayardError, Unavailable
from lorayard.hosted import answer_tokens, no_money, price, prompt_tokens
from lorayard.ledger.keys import split_ref
from lorayard.ledger.loop import LoopCaller
from lorayard.ledger.organisation import Grant, Organisation, Refused, Reserved, State, Want
from lorayard.ledger.policies import NOTHING_LEAVES, Policies, Policy
from lorayard.settings import Settings
from lorayard_workers.groq.answers import Failure
from lorayard_workers.groq.calls import Call
from lorayard_workers.groq.limiter import Breaker, Concurrency, Estimate

log = structlog.get_logger("lorayard.hosted")

T = TypeVar("T")
HOLD_S = 90.0
"""Who waits longer than this for a limit waits in the ledger, where somebody else may take it. Most limits are of a minute."""
ASK_AGAIN_S = 0.25
_ASK_MOST = 64  # calls in one question about limits
_MONEY_AGAIN_MS = 60_000
_RECENT_S = 10.0
_FRESH_S = 2.0
"""So long a refusal that this worker has met counts for more than what the ledger was last heard to say."""
_PROBING_ROOM = 8


class Behind(Protocol):
    """What is behind the gate. `begin`: these were let through, counted and paid for at their most. `end`: this one ends before it was
    begun. `unused`: what was granted to it goes back."""

    def begin(self, calls: Sequence[Call]) -> None: ...

    def end(self, call: Call, **what: Any) -> None: ...

    def refuse(self, call: Call, error: dict[str, Any]) -> None:
        """It ends for good, and has used its attempt."""

    def unused(self, call: Call) -> None: ...


class Gate:
    """Of one worker; lives in one event loop. `running` is what was let through and has not ended."""

    def __init__(self, settings: Settings, organisation: Organisation, policies: Policies, behind: Behind, running: Sized) -> None:
        self._settings = settings
        self._base = settings.hosted_model or ""
        self._price = price(settings)
        self._org = organisation
        self._policies = policies
        self._behind = behind
        self._running = running
        self.concurrency = Concurrency(settings.hosted_calls)
        self.breaker = Breaker()
        self.estimate = Estimate()
        self.known: State | None = None
        self.unanswered = False  # the last question about limits
        self._who_may: dict[str, Policy] = {}  # by tenant
        self._waiting: list[tuple[int, int, Call]] = []
        self._order = itertools.count()
        self._singly = 0  # so many are asked for one at a time: one of them is what the ledger will never take
        self._blocked_until = self._blocked_at = self._ask_again = 0.0
        self._granted: deque[tuple[float, int]] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "hosted-gate")
        self._caller = LoopCaller(organisation.client, self._thread)
        self._written: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    # -- in -----------------------------------------------------------------------------------------------------------------------------

    def add(self, calls: Sequence[Call]) -> None:
        for call in calls:
            heapq.heappush(self._waiting, (call.item.due, next(self._order), call))
        self.wake()

    def wake(self) -> None:
        """Something has changed."""
        self._wake.set()

    def drop_cancelled(self) -> None:
        self._waiting = [row for row in self._waiting if not row[2].cancelled]
        heapq.heapify(self._waiting)

    def close(self) -> None:
        self._caller.close()
        self._thread.shutdown()

    # -- through ------------------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
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
            if (wait_s := max(self.breaker.wait_s(now), self._blocked_until - now, self._ask_again - now)) > 0:
                return wait_s
            if not self.breaker.closed:
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
        row = min(self._waiting, key=lambda row: (self.breaker.suspicion(row[2].item.ref, row[2].digest), row[:2]))
        self._waiting.remove(row)
        heapq.heapify(self._waiting)
        return row

    def _at_once(self) -> int:
        known = self._settings.hosted_unlimited or bool(self.known and self.known.numbers.get("rpm"))
        return self.concurrency.limit(known=known)

    async def _ask(self, rows: list[tuple[int, int, Call]]) -> float:
        """Reserve for these calls and begin those that may be; seconds to wait before the next can be asked for, 0 for none."""
        try:
            if not all(self._has_leave(call) for _, _, call in rows):  # what was read a moment ago is not good enough to refuse
                self._who_may = await self._in_thread(self._policies.all)
            may = [row for row in rows if self._may_leave(row[2])]
            wants = [self._want(row[2]) for row in may]
            if not wants:
                return 0.0
            reserved, changed = await self._reserve(wants)
        except (Unavailable, redis.RedisError) as error:
            self.unanswered = True
            log.warning("limits cannot be asked for; calls wait", reason=str(error))
            self._push_back([row for row in rows if not row[2].over])
            return 1.0
        except LorayardError as error:
            self.unanswered = True
            self._not_taken([row for row in rows if not row[2].over], error)
            return 0.0
        self.unanswered = False
        granted = []
        for row, want, answer in zip(may, wants, reserved.answers, strict=False):
            call = row[2]
            call.want = want
            if isinstance(answer, Grant):
                call.grant = answer
                if call.cancelled or want.tenant in changed:
                    self._behind.unused(call)
                else:
                    granted.append(call)
                    self.breaker.calling(call.item.ref)
            elif want.tenant not in changed or answer.spent is None:
                self._refused(call, answer)
            if want.tenant in changed and not call.over:
                self._push_back([row])
        self._behind.begin(granted)
        self._granted.append((time.monotonic(), len(granted)))
        self._push_back(may[len(reserved.answers) :])
        return 0.0 if len(reserved.answers) == len(may) else self._wait_after(reserved)

    async def _reserve(self, wants: list[Want]) -> tuple[Reserved, set[str]]:
        """And the tenants whose leave or caps were others by then: they are to be asked for again."""
        asked = {want.tenant: self._who_may.get(want.tenant, NOTHING_LEAVES) for want in wants}  # `look` may come meanwhile
        if self._written is not None:  # what the service told comes before what is asked
            await self._written
        tenants = list(asked)
        reserved, seen = await self._org.reserve_in(self._caller, self._base, wants, self._policies.question(tenants))
        now = self._policies.answer(tenants, seen)
        self._who_may |= now
        return reserved, {tenant for tenant in tenants if now[tenant] != asked[tenant]}

    def _wait_after(self, reserved: Reserved) -> float:
        """Seconds until there is room for the next."""
        wait_s = reserved.wait_ms / 1000
        if reserved.why not in ("rpm", "tpm", "rpd", "tpd"):  # a block, which may be lifted
            self._blocked_until = max(self._blocked_until, time.monotonic() + wait_s)
            return wait_s
        # Tokens become free before their time, when calls take less than they might have: worth asking again soon.
        self._ask_again = time.monotonic() + (min(wait_s, ASK_AGAIN_S) if reserved.why == "tpm" else wait_s)
        return wait_s

    def _want(self, call: Call) -> Want:
        tenant = split_ref(call.item.ref)[0]
        prompt, answer = prompt_tokens(call.body, self.estimate.tokens_per_byte), answer_tokens(call.body)
        nano = round(prompt * self._price[0] + answer * self._price[1])
        return Want(call.model, prompt + answer, tenant, nano, self._who_may.get(tenant, NOTHING_LEAVES).caps)

    def _has_leave(self, call: Call) -> bool:
        return self._who_may.get(split_ref(call.item.ref)[0], NOTHING_LEAVES).hosted

    def _push_back(self, rows: list[tuple[int, int, Call]]) -> None:
        for row in rows:
            if not row[2].cancelled:
                heapq.heappush(self._waiting, row)

    # -- not through --------------------------------------------------------------------------------------------------------------------

    def _may_leave(self, call: Call) -> bool:
        """Whether the tenant still lets its data leave. If not, its job fails, or goes where it may be run at home."""
        if call.cancelled:
            return False
        if self._has_leave(call):
            return True
        message = f"tenant {split_ref(call.item.ref)[0]} no longer allows its data to leave for a hosted service"
        self._behind.end(call, error=Forbidden(message, code="hosted_not_allowed").document(), later=call.lane == "auto")
        return False

    def _not_taken(self, rows: list[tuple[int, int, Call]], error: LorayardError) -> None:
        """The ledger refuses the question itself, and would for ever: whose doing that is shows when they are asked for one at a time."""
        log.error("limits cannot be asked for", jobs=len(rows), reason=error.message)
        if len(rows) > 1:
            self._push_back(rows)
            self._singly = len(rows)
            return
        for _, _, call in rows:
            self._behind.end(call, error=error.document(), retryable=True)

    def _refused(self, call: Call, answer: Refused) -> None:
        if call.cancelled:
            return
        if answer.spent is None:
            message = f"prompt and answer may have {call.want and call.want.tokens} tokens; the service allows {answer.limit} a minute"
            self._behind.refuse(call, BadRequest(message, code="request_too_large", param="max_tokens").document())
        else:
            message = f"{no_money(answer.spent)}. The job waits for that, or for its deadline"
            self._behind.end(call, error=Unavailable(message, code="budget_exhausted").document(), later=True, after_ms=_MONEY_AGAIN_MS)

    def _put_off_all(self, wait_s: float, code: str, message: str) -> None:
        error = Unavailable(message, code=code).document()
        for _, _, call in self._waiting:
            self._behind.end(call, error=error, later=True, after_ms=round(min(wait_s, 600) * 1000))
        self._waiting.clear()

    # -- what calls have shown ----------------------------------------------------------------------------------------------------------

    def succeeded(self, call: Call) -> None:
        self.concurrency.succeeded()
        self.breaker.succeeded(call.item.ref, call.digest, time.monotonic())

    def failed(self, call: Call, failure: Failure) -> None:
        """A call came to this; those that wait are held, or put off, where it would be the same with them."""
        now = time.monotonic()
        if failure.overload:
            self.concurrency.overloaded(now)
        if failure.trouble:
            self.breaker.failed(call.item.ref, call.digest, now)
            self._make_way(now)
        else:
            self.breaker.succeeded(call.item.ref, call.digest, now)
        if failure.blocked:
            self._block(failure)

    def _make_way(self, now: float) -> None:
        """Of an open breaker: where all that wait may be to blame themselves, most are put off, so that others come to be probed with."""
        doubted = self.breaker.doubted(now)
        if self.breaker.closed or len(self._waiting) < 2 or not all(call.digest in doubted for _, _, call in self._waiting):
            return
        probe = self._probe()
        self._put_off_all(self.breaker.wait_s(now), "over_capacity", "most calls of its adapter fail at the service")
        self._waiting.append(probe)

    def _block(self, failure: Failure) -> None:
        """No call by anyone of the organisation for as long as the service said."""
        self._blocked_at = time.monotonic()
        self._blocked_until = max(self._blocked_until, self._blocked_at + failure.after_s)
        log.warning("the service refuses calls", reason=failure.message, seconds=failure.after_s)

        def write() -> None:
            try:
                if failure.limit:
                    self._org.learn(self._base, "told", dict([failure.limit]))
                self._org.block(self._base, failure.after_s * 1000, failure.code)
            except LorayardError as error:
                log.warning("not written to the ledger", reason=error.message)

        self._written = self._in_thread(write)

    def look(self, who_may: dict[str, Policy], state: State) -> None:
        """What the ledger says: others of the organisation have met limits too."""
        self._who_may, self.known = who_may, state
        now = time.monotonic()
        told = now + state.blocked_ms / 1000
        # Once ours is told, the ledger is right, also where somebody has lifted a block.
        self._blocked_until = told if now - self._blocked_at > _FRESH_S else max(self._blocked_until, told)
        self.wake()

    def room(self) -> int:
        """How many jobs are wanted here in all: those that can be called soon. The others stay where anybody can take them."""
        now = time.monotonic()
        while self._granted and self._granted[0][0] < now - _RECENT_S:
            self._granted.popleft()
        if max(self._blocked_until, self._ask_again) - now > HOLD_S:
            return 0
        if not self.breaker.closed:
            return _PROBING_ROOM
        room = max(2 * self._at_once(), 8, 2 * sum(n for _, n in self._granted))
        rpm = self.known.numbers.get("rpm") if self.known else None
        if rpm:
            room = min(room, max(8, rpm // 4))
        return min(room, 2 * self._settings.hosted_calls)

    def _in_thread(self, what: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, what, *args)
