"""What the workers of one organisation at a hosted service share: limits, use, money. Each method is one call into `limits.lua`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import redis

from lorayard.errors import LorayardError
from lorayard.ledger import keys
from lorayard.ledger.connection import unavailable
from lorayard.ledger.loop import LoopCaller

LIBRARY = files("lorayard.ledger").joinpath("limits.lua").read_text()
NANO = 1_000_000_000
"""Money is counted in whole nano-dollars: a token costs some fifty."""

MARGIN_MS = 1_000
"""A minute of ours is so much longer than the service's: calls take their time to reach it, some more than others."""

_PASSES = ("OOM", "LOADING", "BUSY", "READONLY", "MISCONF", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "UNBLOCKED")
_PASSING = (redis.exceptions.OutOfMemoryError, redis.exceptions.ReadOnlyError, redis.exceptions.ClusterDownError)
"""Errors of a server that will be well again."""

Limit = Literal["rpm", "tpm", "rpd", "tpd"]


class Rates(NamedTuple):
    """Requests and tokens a minute and a day that settings say; 0: not known, or none."""

    rpm: int = 0
    tpm: int = 0
    rpd: int = 0
    tpd: int = 0


class Caps(NamedTuple):
    """Money in nano-dollars that may be spent in a day and in a month (UTC); -1: any."""

    day: int = -1
    month: int = -1

    @classmethod
    def of(cls, daily_usd: float | None, monthly_usd: float | None) -> Caps:
        return cls(*(-1 if usd is None else round(usd * NANO) for usd in (daily_usd, monthly_usd)))


UNKNOWN, ANY = Rates(), Caps()


class Want(NamedTuple):
    """A call about to be made: at most so many tokens, prompt and answer, for so much money at most."""

    model: str
    tokens: int
    tenant: str
    nano: int
    caps: Caps = ANY


class Grant(NamedTuple):
    """It may be made now. `slot` and `date` say where it was counted; `idle_ms` since the model's last call by anyone, None for never."""

    slot: int
    date: str
    idle_ms: int | None


class Spent(NamedTuple):
    """There is not enough left of a day's or a month's money, which is `cap` nano-dollars: a tenant's, or that of all together ("*")."""

    which: Literal["day", "month"]
    whose: str
    cap: int


class Refused(NamedTuple):
    """It cannot be made: there is no money for it, or it has more tokens than the `limit` of a whole minute."""

    spent: Spent | None
    limit: int = 0


class Reserved(NamedTuple):
    """Answers for the first of what was asked, in order; for the next there is room in `wait_ms`, because of `why` (rpm, tpm, rpd, tpd or
    what the service said)."""

    answers: list[Grant | Refused]
    wait_ms: int
    why: str


class Settled(NamedTuple):
    """A call that has ended: what was reserved for it, and what it took."""

    grant: Grant
    want: Want
    adapter: str
    tokens: int
    nano: int


class Held(NamedTuple):
    """Money set aside at a date: (tenant, nano-dollars) by job's name; and the names for which there was none."""

    date: str
    held: dict[str, tuple[str, int]]
    poor: dict[str, Spent]


class State(NamedTuple):
    """`blocked_ms`: no call before that, because of `why`. `day` and `month` are its dates; `numbers` rpm, tpm, rpd, tpd as far as they are
    known, and used_requests, used_tokens, left_requests, left_tokens."""

    blocked_ms: int
    why: str
    day: str
    month: str
    numbers: dict[str, int]


class Organisation:
    """One organisation's limits and budgets. Thread-safe.

    Raises `Unavailable` while the server cannot be reached, and `LorayardError` where it will never take what was asked.
    """

    def __init__(self, client: redis.Redis, name: str, *, rates: Rates = UNKNOWN, caps: Caps = ANY, library: str = LIBRARY) -> None:
        self.client = client
        self.prefix = keys.organisation(name)
        self._rates = rates
        self._caps = caps
        self._library = library

    def install(self) -> None:
        """Load the function library unless the server has this very text."""
        try:
            found: Any = self.client.function_list("lorayard_limits", withcode=True)
            if not any(self._library.encode() in row for row in found):
                self.client.function_load(self._library, replace=True)
        except redis.RedisError as error:
            raise unavailable(error) from error

    def _call(self, function: str, *args: Any) -> Any:
        try:
            try:
                return self.client.fcall(function, 1, self.prefix, *args)
            except redis.ResponseError as error:
                if "Function not found" not in str(error):
                    raise
                self.client.function_load(self._library, replace=True)
                return self.client.fcall(function, 1, self.prefix, *args)
        except redis.RedisError as error:
            raise _told(function, error) from error

    # -- limits -------------------------------------------------------------------------------------------------------------------------

    def reserve(self, base: str, wants: Sequence[Want]) -> Reserved:
        """Count the first of these calls, as many as there is room for now. `base` is the model that the service limits by."""
        return _reserved(self._call("lyl_reserve", *self._question(base, wants)))

    async def reserve_in(self, caller: LoopCaller, base: str, wants: Sequence[Want], look: Sequence[Any]) -> tuple[Reserved, Any]:
        """The same in the event loop of `caller`; and the reply to the command `look`, which is run right after it."""
        question = ("FCALL", "lyl_reserve", 1, self.prefix, *self._question(base, wants))
        try:
            try:
                reply, seen = await caller.call(question, look)
            except redis.ResponseError as error:
                if "Function not found" not in str(error):
                    raise
                await caller.in_thread(self.install)
                reply, seen = await caller.call(question, look)
            except (redis.ConnectionError, redis.TimeoutError):  # it may have been counted; the same again is not
                reply, seen = await caller.call(question, look)
        except redis.RedisError as error:
            raise _told("lyl_reserve", error) from error
        return _reserved(reply), seen

    def _question(self, base: str, wants: Sequence[Want]) -> list[Any]:
        rows = [value for w in wants for value in (w.model, w.tokens, w.tenant, w.nano, *w.caps)]
        return [secrets.token_hex(8), base, MARGIN_MS, *self._rates, *self._caps, *rows]

    def settle(self, base: str, ended: Sequence[Settled], token: str) -> None:
        """Put right what was reserved for calls that have ended, and write down what they cost; once a token, for ten minutes."""
        args = [
            value
            for s in ended
            for value in (s.grant.slot, s.want.tokens, s.tokens, s.want.tenant, s.adapter, s.want.nano, s.nano, s.grant.date)
        ]
        self._call("lyl_settle", token, base, *args)

    def learn(self, base: str, source: Literal["told", "head"], numbers: dict[str, int]) -> None:
        """What the service said of its limits: `told` in a refusal, or in the headers of an answer (`head`)."""
        self._call("lyl_learn", base, source, *self._rates, *(value for pair in numbers.items() for value in pair))

    def block(self, base: str, ms: float, why: str) -> None:
        """No call by anyone for so long."""
        self._call("lyl_block", base, ms, why)

    def state(self, base: str) -> State:
        reply = self._call("lyl_state", base, MARGIN_MS, *self._rates)
        numbers = {name.decode(): int(float(value)) for name, value in zip(reply[4::2], reply[5::2], strict=True)}
        return State(int(reply[0]), reply[1].decode(), reply[2].decode(), reply[3].decode(), numbers)

    # -- money --------------------------------------------------------------------------------------------------------------------------

    def hold(self, token: str, wants: Sequence[tuple[str, str, int, Caps]]) -> Held:
        """Set money aside for jobs (name, tenant, nano-dollars, the tenant's caps) of a batch; the same token again answers the same."""
        args = [value for name, tenant, nano, caps in wants for value in (name, tenant, nano, *caps)]
        date, *rows = self._call("lyl_hold", token, *self._caps, *args)
        held = {name.decode(): (tenant.decode(), int(nano)) for name, tenant, nano, *poor in rows if not poor}
        return Held(date.decode(), held, {name.decode(): _spent(*poor) for name, _, _, *poor in rows if poor})

    def charge(self, token: str, date: str, rows: Sequence[tuple[str, str, int, int]]) -> None:
        """Put what a batch took (tenant, adapter, nano-dollars, those held) in the place of what was held at that date; once a token."""
        self._call("lyl_charge", token, date, *(value for row in rows for value in row))

    def spent(self, date: str) -> dict[str, int]:
        """Nano-dollars by tenant, `*` for all, in a day (2026-11-22) or a month (2026-11)."""
        return {tenant: int(nano) for tenant, nano in self._hash(f"spent:{date}").items()}

    def costs(self, month: str) -> dict[tuple[str, str], int]:
        """Nano-dollars of a month by tenant and adapter."""
        rows = self._hash(f"costs:{month}").items()
        return {(tenant, adapter): int(nano) for name, nano in rows for tenant, _, adapter in [name.partition("\t")]}

    def over(self, base: str, tenant: str, caps: Caps) -> str | None:
        """Whether nothing is left of a tenant's or the organisation's money: day, month or None."""
        short = self.short(base, tenant, caps)
        return short and short.which

    def short(self, base: str, tenant: str, caps: Caps) -> Spent | None:
        """Of which money nothing is left to a tenant, if so."""
        state = self.state(base)
        periods: tuple[tuple[Literal["day", "month"], str], ...] = (("day", state.day), ("month", state.month))
        for which, date in periods:
            spent = self.spent(date)
            for who, cap in ((tenant, caps), ("*", self._caps)):
                if 0 <= getattr(cap, which) <= spent.get(who, 0):
                    return Spent(which, who, getattr(cap, which))
        return None

    def _hash(self, name: str) -> dict[str, bytes]:
        try:
            raw: Any = self.client.hgetall(self.prefix + name)
        except redis.RedisError as error:
            raise unavailable(error) from error
        return {field.decode(): value for field, value in raw.items()}


def _told(function: str, error: redis.RedisError) -> LorayardError:
    """`Unavailable` where another time may go better."""
    passing = isinstance(error, _PASSING) or str(error).startswith(_PASSES)
    if passing or not isinstance(error, redis.ResponseError):
        return unavailable(error)
    return LorayardError(f"the ledger refuses {function}: {error}", code="ledger_error")


def _reserved(reply: list[Any]) -> Reserved:
    return Reserved([_answer(row) for row in reply[3:]], int(reply[1]), reply[2].decode())


def _answer(row: list[Any]) -> Grant | Refused:
    kind = row[0]
    if kind == b"g":
        return Grant(int(row[1]), row[3].decode(), None if int(row[2]) < 0 else int(row[2]))
    return Refused(None, int(row[1])) if kind == b"l" else Refused(_spent(*row[1:]))


def _spent(which: bytes, whose: bytes, cap: bytes) -> Spent:
    return Spent("day" if which == b"day" else "month", whose.decode(), int(cap))
