"""Limits and money of an organisation: the real functions, by the clock of the test; and what a worker finds out by itself."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorayard.errors import LorayardError, Unavailable
from lorayard.hosted import dollars
from lorayard.hosted_codes import CODES
from lorayard.ledger.organisation import LIBRARY, MARGIN_MS, Caps, Grant, Organisation, Rates, Refused, Settled, Spent, Want
from lorayard_workers.groq.answers import complete, failure, limits_told, read_error, seconds
from lorayard_workers.groq.limiter import Breaker, Concurrency, Estimate

NOON = 1_795_521_600_000  # 2026-11-24 12:00 UTC
CLOCK = "ly:{org:x}:clock"
_NOW = re.search(r"local function now\(\).*?\nend", LIBRARY, re.DOTALL)
assert _NOW is not None
CLOCKED = LIBRARY.replace(_NOW.group(), f"local function now() return tonumber(redis.call('GET', '{CLOCK}')) end")
WANT = Want("m", 100, "acme", 500)


class Org(Organisation):
    """By the clock of the test."""

    def __init__(self, client: redis.Redis, **options: object) -> None:
        super().__init__(client, "x", library=CLOCKED, **options)  # type: ignore[arg-type]
        self.at = NOON
        self.go(0)

    def go(self, ms: int) -> None:
        self.at += ms
        self.client.set(CLOCK, self.at)

    def ask(self, *wants: Want) -> tuple[int, int, str]:
        """(granted, wait ms, why)"""
        reserved = self.reserve("b", wants)
        return sum(isinstance(answer, Grant) for answer in reserved.answers), reserved.wait_ms, reserved.why


@pytest.fixture
def org(store: redis.Redis) -> Iterator[Org]:
    one = Org(store, rates=Rates(rpm=10, tpm=2000))
    one.install()
    yield one
    store.function_delete("lorayard_limits")


def test_no_minute_ever_has_more_calls_than_allowed(org: Org) -> None:
    granted: list[int] = []
    for _ in range(400):
        n, wait_ms, _ = org.ask(WANT, WANT, WANT)
        granted += [org.at] * n
        assert n == 3 or 0 < wait_ms <= 60_000 + MARGIN_MS + 500
        org.go(777)
    for start in granted:
        assert sum(start <= at < start + 60_000 for at in granted) <= 10
    assert len(granted) >= 0.95 * 10 * (400 * 777 / 60_000)


def test_the_wait_that_is_told_is_long_enough_and_not_longer(org: Org) -> None:
    assert org.ask(*[WANT] * 12)[0] == 10
    _, wait_ms, why = org.ask(WANT)
    assert why == "rpm"
    org.go(wait_ms - 251)
    assert org.ask(WANT)[0] == 0
    org.go(251)
    assert org.ask(WANT)[0] == 1


def test_tokens_are_reserved_at_most_and_settled_by_what_was_used(org: Org) -> None:
    big = WANT._replace(tokens=900)
    assert org.ask(big, big, big) == (2, org.ask(big)[1], "tpm")
    granted = org.reserve("c", [big])
    grant = granted.answers[0]
    assert isinstance(grant, Grant)
    org.settle("c", [Settled(grant, big, "base", 100, 70)], "once")
    assert org.state("c").numbers["used_tokens"] == 100
    assert org.spent("2026-11-24")["acme"] == org.spent("2026-11")["*"] == 500 * 2 + 70
    assert org.costs("2026-11") == {("acme", "base"): 70}


def test_a_call_that_no_minute_has_room_for_is_refused_and_the_next_goes_on(org: Org) -> None:
    answers = org.reserve("b", [WANT._replace(tokens=2001), WANT]).answers
    assert answers[0] == Refused(None, 2000)
    assert isinstance(answers[1], Grant)


def test_a_reply_that_was_lost_counts_nothing_twice(org: Org, store: redis.Redis) -> None:
    args = ["lyl_reserve", 1, org.prefix, "token", "b", 1000, 10, 0, 0, 0, -1, -1, "m", 100, "acme", 500, -1, -1]
    first: object = store.fcall(*args)  # type: ignore[arg-type]
    assert store.fcall(*args) == first  # type: ignore[arg-type]
    assert org.state("b").numbers["used_requests"] == 1
    wants = [("a", "acme", 700, Caps()), ("b", "acme", 700, Caps(day=1500))]
    held = org.hold("hold:1", wants)
    assert (held.held, held.poor) == ({"a": ("acme", 700)}, {"b": Spent("day", "acme", 1500)})
    assert org.hold("hold:1", wants[:1]) == held
    assert org.spent("2026-11-24") == {"acme": 1200, "*": 1200}
    for _ in range(2):
        org.charge("batch:1", held.date, [("acme", "base", 5, 700)])
    assert org.costs("2026-11") == {("acme", "base"): 5}
    assert org.spent("2026-11-24") == org.spent("2026-11") == {"acme": 505, "*": 505}


def test_a_day_s_tokens_fill_up_though_headers_tell_of_its_requests(store: redis.Redis) -> None:
    org = Org(store, rates=Rates(tpd=86_400))  # one a second
    org.install()
    try:
        assert org.ask(WANT._replace(tokens=50_000))[0] == 1
        for n in range(10):
            org.go(1_000_000)
            org.learn("b", "head", {"rpd": 1000, "left_requests": 900})
            assert org.state("b").numbers["left_tokens"] == 36_400 + 1_000 * (n + 1)
    finally:
        store.function_delete("lorayard_limits")


WILD = ("1e20", "1e300", "-5", "nan", "inf", "-inf", "9223372036854775808", "no number", "")


@given(st.lists(st.sampled_from(WILD), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_number_that_reaches_the_functions_spoils_the_money(org: Org, store: redis.Redis, wild: list[str]) -> None:
    token, (a, b, c, d) = secrets.token_hex(4), wild
    store.fcall("lyl_reserve", 1, org.prefix, token, "w", 1000, 0, 0, 0, 0, -1, -1, "m", a, "acme", b, -1, -1)
    store.fcall("lyl_settle", 1, org.prefix, token + "s", "w", 1, a, b, "acme", "base", c, d, "2026-11-24")
    store.fcall("lyl_hold", 1, org.prefix, token + "h", -1, -1, "n", "acme", a, -1, -1)
    store.fcall("lyl_charge", 1, org.prefix, token + "c", "2026-11-24", "acme", "base", a, b)
    store.fcall("lyl_learn", 1, org.prefix, "w", "told", 0, 0, 0, 0, "rpm", a, "tpm", b)
    store.fcall("lyl_learn", 1, org.prefix, "w", "head", 0, 0, 0, 0, "tpm", a, "left_tokens", b, "rpd", c, "left_requests", d)
    store.fcall("lyl_block", 1, org.prefix, "x", a, "why")
    for nano in (*org.spent("2026-11").values(), *org.costs("2026-11").values()):
        assert abs(nano) < 1e17
    assert all(number >= 0 for number in org.state("w").numbers.values())
    assert len(org.reserve(token, [WANT]).answers) == 1


def test_what_the_ledger_will_never_take_is_told_apart_from_a_ledger_that_is_away(org: Org, store: redis.Redis) -> None:
    store.set(org.prefix + "called", "not a hash")
    with pytest.raises(LorayardError, match="WRONGTYPE") as told:
        org.reserve("b", [WANT])
    assert not isinstance(told.value, Unavailable)


def test_budgets_of_tenant_and_organisation_end_with_their_day_and_month(store: redis.Redis) -> None:
    org = Org(store, caps=Caps(day=2000, month=2500))
    poor = WANT._replace(caps=Caps(day=1000))
    assert [type(a) for a in org.reserve("b", [poor, poor, poor]).answers] == [Grant, Grant, Refused]
    assert org.ask(WANT, WANT, WANT)[0] == 2, "another tenant has what the organisation has left"
    assert org.over("b", "acme", Caps(day=1000)) == "day"
    assert org.short("b", "acme", Caps(day=1000)) == Spent("day", "acme", 1000)
    assert org.short("b", "zeta", Caps()) == Spent("day", "*", 2000)
    assert org.reserve("b", [poor, WANT]).answers == [Refused(Spent("day", "acme", 1000)), Refused(Spent("day", "*", 2000))]
    org.go(24 * 3_600_000)
    assert org.ask(WANT, WANT)[0] == 1, "a new day, the same month"
    assert org.over("b", "zeta", Caps()) == "month"
    held = org.hold("token", [("x", "zeta", 700, Caps()), ("y", "acme", 1, Caps(day=0)), ("z", "acme", 1, Caps())])
    assert held.poor == {"x": Spent("month", "*", 2500), "y": Spent("day", "acme", 0), "z": Spent("month", "*", 2500)}
    org.go(10 * 24 * 3_600_000)
    assert org.over("b", "acme", Caps(day=1000)) is None


@pytest.mark.parametrize(
    ("days", "date"),
    [
        (-1, "2026-11-23"),
        (0, "2026-11-24"),
        (7, "2026-12-01"),
        (38, "2027-01-01"),
        (96, "2027-02-28"),
        (461, "2028-02-28"),
        (462, "2028-02-29"),
    ],
)
def test_dates_are_right(org: Org, days: int, date: str) -> None:
    org.go(days * 86_400_000)
    assert (org.state("b").day, org.state("b").month) == (date, date[:7])


def test_the_day_s_requests_fill_up_evenly(store: redis.Redis) -> None:
    org = Org(store, rates=Rates(rpd=24))
    assert org.ask(*[WANT] * 30)[0] == 24
    assert org.ask(WANT) == (0, 3_600_000, "rpd")
    org.go(3_600_000)
    assert org.ask(WANT, WANT)[0] == 1


def test_what_the_service_says_is_better_than_settings(org: Org) -> None:
    org.learn("b", "told", {"rpm": 3})
    org.learn("b", "head", {"tpm": 250, "left_tokens": 250})
    assert org.ask(*[WANT] * 5)[0] == 2
    assert org.state("b").numbers["tpm"] == 250


def test_others_of_the_organisation_show_in_what_is_left(org: Org) -> None:
    org.learn("b", "head", {"tpm": 1000, "left_tokens": 300})
    assert org.ask(*[WANT] * 9)[0] == 4, "700 are used by others, of which a tenth of the limit may be our own calls under way"


def test_a_block_holds_for_all_and_ends_by_itself(org: Org, store: redis.Redis) -> None:
    org.block("b", 60_000, "tokens")
    org.block("b", 10, "less")
    granted, wait_ms, why = org.ask(WANT)
    assert (granted, why) == (0, "tokens")
    assert 59_000 < wait_ms <= 60_000
    store.delete(org.prefix + "blocked:b")
    assert org.ask(WANT)[0] == 1


def test_idleness_is_told_by_model(org: Org) -> None:
    def idle(model: str) -> int | None:
        answer = org.reserve("b", [WANT._replace(model=model)]).answers[0]
        assert isinstance(answer, Grant)
        return answer.idle_ms

    assert idle("m1") is None
    org.go(5000)
    assert (idle("m1"), idle("m2")) == (5000, None)


# -- one worker ----------------------------------------------------------------------------------------------------------------------------


def test_concurrency_doubles_until_the_first_trouble_and_is_small_while_limits_are_unknown() -> None:
    one = Concurrency(500)
    assert one.limit(known=False) == 4
    for _ in range(8):
        one.succeeded()
    assert one.limit(known=True) == 16
    one.overloaded(2.0)
    one.overloaded(2.1)
    assert one.limit(known=True) == 11, "once for all calls of a moment"
    for _ in range(11):
        one.succeeded()
    assert 11 <= one.limit(known=True) <= 12
    for calls in range(20, 20_000):
        one.succeeded()
        assert 4 <= one.limit(known=False) <= max(4, 0.005 * calls), "no more refusals than 1 % when the limit shows"
    assert one.limit(known=False) >= 99, "and yet it grows"


def broken(*adapters: str) -> Breaker:
    """Open at 10.0: as many jobs of these adapters as it looks at have failed."""
    one = Breaker()
    for n in range(Breaker.WINDOW):
        assert one.wait_s(0) == 0
        one.calling(f"j{n}")
        one.failed(f"j{n}", adapters[n % len(adapters)], 10.0)
    assert not one.closed
    return one


def test_the_breaker_opens_probes_and_closes() -> None:
    one = broken("a")
    assert one.wait_s(10.5) == pytest.approx(0.5)
    one.failed("before", "a", 10.6)  # one that was under way
    assert one.wait_s(11.0) == 0
    one.calling("p")
    assert one.wait_s(11.0) > 0, "one probe at a time"
    one.failed("before too", "a", 11.05)
    assert one.wait_s(11.05) > 0, "another's end is not the probe's"
    one.failed("p", "a", 11.1)
    assert one.wait_s(11.2) == pytest.approx(1.9), "longer each time"
    one.calling("q")
    one.released("q")
    assert one.wait_s(13.2) == 0, "a cancelled probe tells nothing"
    for waits in (5, 10, 30, 30):
        one.calling("q")
        one.failed("q", "a", 20.0)
        assert one.wait_s(20.0) == waits
    one.calling("q")
    one.succeeded("q", "a", 60.0)
    assert one.closed
    assert one.wait_s(60.0) == 0


def test_one_job_or_one_adapter_opens_no_breaker_for_the_others() -> None:
    one = Breaker()
    for n in range(200):
        one.failed("poison", "a", n)
        assert one.closed, "a job counts once"
    for n in range(200):
        (one.failed if n % 5 else one.succeeded)(f"j{n}", "bad" if n % 5 else f"good{n % 3}", n)
        assert one.closed, "an adapter counts as much as any other"


def test_probes_are_made_with_what_has_not_failed() -> None:
    one = broken("a", "b")
    jobs = [("j1", "a"), ("j2", "a"), ("j3", "b"), ("j4", "c")]
    tried = []
    for now in range(1000, 1400, 100):
        job = min(jobs, key=lambda job: (one.suspicion(*job), job))
        tried.append(job)
        one.calling(job[0])
        one.failed(*job, now)
    assert tried == [("j4", "c"), ("j1", "a"), ("j3", "b"), ("j4", "c")]
    assert min(jobs, key=lambda job: (one.suspicion(*job), job)) == ("j2", "a"), "and of an adapter the job that has not"
    assert one.doubted(1400) == {"a", "b", "c"}
    one.succeeded("j4", "c", 1400)
    assert one.doubted(1401) == {"a", "b"}
    for n in range(100):
        one.failed(f"k{n}", "a", 1401)
    assert one.closed, "what fails by its own fault does not count"
    for n in range(100):
        one.failed(f"l{n}", "c", 1401)
    assert not one.closed
    assert one.doubted(1500) == {"c"}, "doubts end"


def test_the_estimate_is_rather_more_than_less() -> None:
    one = Estimate()
    for tokens in (25, 24, 26, 25) * 20:
        one.learn(tokens, 100)
    assert 0.25 <= one.tokens_per_byte < 0.28


@pytest.mark.parametrize(
    ("usd", "text"), [(0, "0.00"), (0.00001, "0.00001"), (0.000111234, "0.000111234"), (0.5, "0.50"), (5, "5.00"), (12.34567, "12.3457")]
)
def test_money_is_written_so_that_little_is_not_nothing(usd: float, text: str) -> None:
    assert dollars(usd) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("2", 2), ("2.5", 2.5), ("2m59.56s", 179.56), ("185ms", 0.185), ("1h25m3.847s", 5103.847), ("1m7.391999999s", 67.391999999)),
        *(("", None), ("soon", None), ("-3", None), ("nan", None), ("5s ago", None)),
    ],
)
def test_durations_as_go_writes_them(text: str, value: float | None) -> None:
    assert seconds(text) == (None if value is None else pytest.approx(value))


def test_a_date_is_read_by_the_clock_that_wrote_it() -> None:
    assert seconds("Tue, 24 Nov 2026 10:00:07 GMT", "Tue, 24 Nov 2026 10:00:00 GMT") == 7
    assert seconds("Tue, 24 Nov 2026 10:00:07 GMT", "Tue, 24 Nov 2026 10:00:09 GMT") == 0
    assert seconds("Tue, 24 Nov 99999 10:00:07 GMT") is None
    assert seconds("Tue, 24 Nov 2000 10:00:07 GMT", "no date") == 0
    headers = {"retry-after": "Tue, 24 Nov 2026 10:00:07 GMT", "date": "Tue, 24 Nov 2026 10:00:00 GMT"}
    assert failure(429, {}, headers).after_s == 7


@given(st.text())
def test_no_header_breaks_anything(text: str) -> None:
    seconds(text)
    limits_told({"x-ratelimit-limit-tokens": text})
    failure(429, {"message": text}, {"retry-after": text})
    assert complete(read_error(text.encode("utf-8", "replace"))) is False


def test_where_a_refusal_says_when_and_which_limit() -> None:
    message = "Rate limit reached on tokens per day (TPD): Limit 500000, Used 499000, Requested 1500. Please try again in 36m25.056s."
    told = failure(429, {"message": message}, {})
    assert told.limit == ("tpd", 500000)
    assert told.after_s == pytest.approx(2185.056)
    assert told.how == "later"
    assert failure(429, {"message": message}, {"retry-after": "1.75"}).after_s == 1.75
    assert failure(503, {}, {"retry-after": "1e300"}).after_s == 86_400
    assert failure(413, {"message": message.replace("try", "")}, {}).how == "final"
    assert failure(404, {"message": "no model"}, {}).missing


@pytest.mark.parametrize(
    ("status", "error", "code", "how"),
    [
        (302, {}, "hosted_redirect", "final"),
        (400, {"code": "json_validate_failed"}, "json_validate_failed", "final"),
        (400, {"type": "invalid_request_error"}, "hosted_rejected", "final"),
        (400, {"code": 400, "type": "BadRequestError"}, "hosted_rejected", "final"),
        (400, {"code": "blocked_api_access"}, "hosted_blocked", "later"),
        (401, {"code": "invalid_api_key"}, "hosted_key", "later"),
        (402, {}, "hosted_payment", "later"),
        (403, {"code": "permission_denied"}, "hosted_forbidden", "final"),
        (404, {}, "model_not_found", "patience"),
        (408, {}, "hosted_error", "patience"),
        (409, {}, "hosted_error", "patience"),
        (413, {"code": "rate_limit_exceeded", "type": "tokens"}, "request_too_large", "final"),
        (418, {}, "hosted_rejected", "final"),
        (422, {}, "hosted_rejected", "attempt"),
        (424, {"code": "failed dependency"}, "hosted_rejected", "final"),
        (429, {"code": "rate_limit_exceeded"}, "rate_limited", "later"),
        (498, {"code": "capacity_exceeded"}, "over_capacity", "later"),
        (499, {}, "hosted_error", "patience"),
        (500, {"type": "internal_server_error"}, "hosted_error", "patience"),
        (503, {}, "over_capacity", "later"),
        (599, {}, "hosted_error", "patience"),
    ],
)
def test_every_status_has_its_code_and_its_end(status: int, error: dict[str, object], code: str, how: str) -> None:
    told = failure(status, error, {"location": "https://login.example/"})
    assert (told.code, told.how) == (code, how)
    assert told.code in CODES or told.code == error["code"]
    if status in (302, 401, 402):
        assert told.blocked
        assert {302: "LORAYARD_HOSTED_URL", 401: "refuses the key", 402: "wants payment"}[status] in told.message
        assert ("login.example" in told.message) == (status == 302)


DOCS = Path(__file__).parent.parent / "docs" / "groq.md"


def test_the_documentation_has_every_code() -> None:
    lines = [f"| `{code}` | {', '.join(one.where)} | {one.means} | {one.then} |" for code, one in CODES.items()]
    text = DOCS.read_text()
    assert "\n".join(lines) in text, "docs/groq.md wants these lines:\n" + "\n".join(lines)
