"""What holds a hosted worker's calls back: limits, money, leave, a service that is not well. Against the stand-in, with a real ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from fleet_support import until
from hosted_service import BASE, Running
from hosted_support import Bench, answer, bench_of, settings_of

from lorayard.errors import LorayardError
from lorayard.ledger.policies import Policy
from lorayard_workers.groq.answers import failure


@pytest.fixture
def bench(store: redis.Redis, redis_url: str, service: Running) -> Iterator[Bench]:
    with bench_of(store, redis_url, service) as one:
        yield one


def test_a_limit_is_learned_from_one_refusal_and_then_kept(bench: Bench, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hosted_service.MINUTE", 2.0)
    service.service.rpm = 5
    bench.put([f"j{n}" for n in range(10)])
    bench.dispatch()
    until(lambda: service.service.calls["429"] >= 1)
    until(lambda: bench.org.state(BASE).numbers.get("rpm") == 5)
    until(lambda: not bench.control._runner._running)  # type: ignore[attr-defined]
    refused = service.service.calls["429"]
    assert refused <= 4
    bench.ledger.reap()
    bench.dispatch()
    time.sleep(0.5)
    assert service.service.calls["429"] == refused
    assert bench.org.state(BASE).numbers["used_requests"] >= 5


def test_headers_tell_the_limit_of_tokens(bench: Bench, service: Running) -> None:
    service.service.tpm, service.service.rpd = 10_000, 14_400
    bench.run("j1")
    numbers = until(lambda: (n := bench.org.state(BASE).numbers).get("tpm") and n)
    assert numbers
    assert (numbers["tpm"], numbers["rpd"]) == (10_000, 14_400)
    assert numbers["left_requests"] <= 14_399


def test_money_that_is_spent_puts_jobs_off_until_there_is_more(bench: Bench, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard_workers.groq.gate._MONEY_AGAIN_MS", 500)
    bench.policies.set("acme", Policy(hosted=True, daily_usd=0))
    time.sleep(1.2)  # the worker looks every second
    bench.put(["j1"])
    bench.dispatch()
    until(lambda: bench.job("j1")["status"] == "delayed")
    assert not service.service.bodies
    assert bench.job("j1")["attempts"] == 0
    bench.policies.set("acme", Policy(hosted=True, daily_usd=1))
    bench.work_off()
    document = bench.job("j1")
    assert answer(document)
    assert document["attempts"] == 1, "to wait for money has cost none"


def test_a_cap_that_is_lowered_and_leave_that_is_withdrawn_hold_at_once(
    store: redis.Redis, redis_url: str, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorayard_workers.groq.runner.BEAT_S", 60)
    with bench_of(store, redis_url, service) as bench:
        assert answer(bench.run("j0"))
        bench.policies.set("acme", Policy(hosted=True, daily_usd=0))
        bench.put(["j1"])
        bench.dispatch()
        until(lambda: bench.job("j1")["status"] == "delayed")
        why = bench.job("j1")["postponed_why"]
        assert why["code"] == "budget_exhausted"
        assert "'lorayard tenants set acme --daily-usd DOLLARS'" in why["message"]
        bench.policies.set("acme", Policy())
        assert bench.run("j2")["error"]["code"] == "hosted_not_allowed"
        assert [body["messages"][0]["content"] for body in service.service.bodies] == ["j0"]
        day = bench.org.state(BASE).day
        until(lambda: bench.org.spent(day) == dict.fromkeys(("acme", "*"), sum(bench.org.costs(day[:7]).values())), 3)


def test_a_cap_that_is_lowered_while_it_is_asked_for_holds_too(bench: Bench, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And though the worker's own look at the ledger, once a second, comes between question and answer."""
    gate: Any = bench.control._runner.gate  # type: ignore[attr-defined]
    reserve = bench.org.reserve_in

    async def lowered(*args: Any) -> Any:
        bench.policies.set("acme", Policy(hosted=True, daily_usd=0))
        gate.look(bench.policies.all(), bench.org.state(BASE))
        return await reserve(*args)

    assert answer(bench.run("j0"))
    monkeypatch.setattr(bench.org, "reserve_in", lowered)
    bench.put(["j1"])
    bench.dispatch()
    until(lambda: bench.job("j1")["status"] == "delayed")
    assert bench.job("j1")["postponed_why"]["code"] == "budget_exhausted"
    assert len(service.service.bodies) == 1


def test_leave_that_was_given_a_moment_ago_counts(bench: Bench) -> None:
    bench.policies.set("omega", Policy(hosted=True))
    bench.put(["j1"], tenant="omega")
    bench.dispatch(tenant="omega")
    until(lambda: bench.job("j1", "omega")["status"] == "succeeded")


def test_nothing_leaves_without_the_tenant_s_leave(bench: Bench, service: Running) -> None:
    bench.put(["j1"], tenant="zeta")
    bench.dispatch(tenant="zeta")
    until(lambda: bench.job("j1", "zeta")["status"] == "failed")
    assert bench.job("j1", "zeta")["error"]["code"] == "hosted_not_allowed"
    bench.put(["j2"], tenant="zeta", lane="auto")
    bench.dispatch(tenant="zeta", digest="base@auto")
    until(lambda: bench.job("j2", "zeta")["status"] == "delayed")
    assert not service.service.bodies


def test_a_service_that_is_away_opens_the_circuit_and_is_probed(store: redis.Redis, redis_url: str, service: Running) -> None:
    service.service.faults = {"503": 1.0}
    with bench_of(store, redis_url, service, hosted_unlimited=True) as bench:
        bench.put([f"j{n}" for n in range(100)])
        for _ in range(4):
            bench.dispatch()
        until(lambda: not bench.control._runner.gate.breaker.closed)  # type: ignore[attr-defined]
        tried = sum(service.service.calls.values())
        assert tried < 60, "the rest was not even tried"
        service.service.faults = {}
        bench.work_off()
        assert bench.ledger.counts()["succeeded"] == 100
        assert max(bench.job(f"j{n}")["attempts"] for n in range(100)) == 1


def test_an_adapter_that_breaks_the_service_keeps_no_other_waiting(store: redis.Redis, redis_url: str, service: Running) -> None:
    """Many jobs of an adapter whose every call is a 500 stand first in line; the fifty behind them are another's."""
    service.service.broken_models = ("ft:bad",)
    with bench_of(store, redis_url, service, hosted_unlimited=True) as bench:
        bad, good = "a" * 32, "b" * 32
        for digest, model in ((bad, "ft:bad"), (good, BASE)):
            bench.publications.tell(bench.publications.ask(digest, "acme/x", model=model), state="ready")
        bench.put([f"bad{n}" for n in range(150)], digest=bad)
        bench.put([f"good{n}" for n in range(50)], digest=good)
        bench.dispatch(90, digest=f"{bad}@groq")
        until(lambda: not bench.control._runner.gate.breaker.closed)  # type: ignore[attr-defined]
        until(lambda: len(bench.control._runner.gate) <= 1)  # type: ignore[attr-defined]
        assert bench.control._runner.gate.room() > 1, "there is room for others to be probed with"  # type: ignore[attr-defined]
        bench.dispatch(60, digest=f"{bad}@groq")
        bench.dispatch(digest=f"{good}@groq")
        until(lambda: bench.ledger.counts().get("succeeded") == 50, 10)
        assert {bench.job(f"bad{n}")["status"] for n in range(150)} <= {"delayed", "claimed", "running"}
        until(lambda: bench.control.info.doubted == [bad], 10)


def test_a_redirect_ends_one_job_and_holds_the_others(bench: Bench, service: Running) -> None:
    service.service.next_faults = ["302"]
    document = bench.run("j1")
    assert (document["status"], document["error"]["code"]) == ("failed", "hosted_redirect")
    bench.put(["j2"])
    bench.dispatch()
    time.sleep(0.5)
    assert bench.job("j2")["status"] == "claimed"
    assert sum(service.service.calls.values()) == 1
    assert 50_000 < bench.org.state(BASE).blocked_ms <= 60_000


def test_jobs_wait_while_the_account_wants_payment(bench: Bench, service: Running) -> None:
    service.service.next_faults = ["402"]
    bench.put(["j1"])
    bench.dispatch()
    until(lambda: bench.job("j1")["status"] == "delayed")
    document = bench.job("j1")
    assert (document["attempts"], document["postponed"], document["postponed_why"]["code"]) == (0, 1, "hosted_payment")
    assert 50_000 < bench.org.state(BASE).blocked_ms <= 60_000


def test_the_wait_that_a_refusal_asks_for_is_kept(bench: Bench, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.25 s, as the stand-in says in fractions; and not the next whole second."""
    block, asked = bench.org.block, []

    def noted(base: str, ms: float, why: str) -> None:
        asked.append(ms)
        block(base, ms, why)

    monkeypatch.setattr(bench.org, "block", noted)
    service.service.next_faults = ["429"]
    bench.put(["j1", "j2"])
    bench.dispatch(1)
    until(lambda: bench.job("j1")["status"] == "delayed")
    bench.dispatch(1)
    bench.ended("j2")
    (refused, _, _), (after, status, _) = service.service.log
    assert status == 200
    assert after - refused >= 0.25
    assert asked == [250]


def test_who_is_told_to_come_back_later_is_put_off_for_so_long(bench: Bench, service: Running) -> None:
    service.service.next_faults, service.service.retry_after = ["503"], "7.5"
    bench.put(["j1"])
    before = bench.ledger.snapshot().now
    bench.dispatch()
    until(lambda: bench.job("j1")["status"] == "delayed")
    assert before + 7500 <= bench.job("j1")["not_before_ms"] <= bench.ledger.snapshot().now + 7500
    assert answer(bench.run("j2")), "others are called meanwhile"


def test_two_workers_share_one_organisation_s_limits(store: redis.Redis, redis_url: str, service: Running) -> None:
    service.service.rpm = 20
    settings = {"hosted_rpm": 20}
    with bench_of(store, redis_url, service, **settings) as one:
        other = Bench(store, redis_url, settings_of(service, **settings), name="h")
        try:
            one.put([f"j{n}" for n in range(40)])
            assert one.dispatch(20) == other.dispatch(20) == 20
            until(lambda: one.ledger.counts().get("succeeded") == 20)
            time.sleep(0.5)
            assert dict(service.service.calls) == {"200": 20}
        finally:
            other.control.close()


def test_a_job_that_the_ledger_will_not_reserve_for_harms_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = bench.org.reserve_in

    async def refusing(caller: Any, base: str, wants: Any, look: Any) -> Any:
        if any(want.tokens > 5000 for want in wants):
            raise LorayardError("the ledger refuses it", code="ledger_error")
        return await reserve(caller, base, wants, look)

    monkeypatch.setattr(bench.org, "reserve_in", refusing)
    bench.put(["bad"], max_tokens=6000)
    bench.put([f"j{n}" for n in range(5)])
    bench.work_off()
    assert [bench.job(f"j{n}")["status"] for n in range(5)] == ["succeeded"] * 5
    assert (bench.job("bad")["status"], bench.job("bad")["error"]["code"]) == ("failed", "ledger_error")


@pytest.mark.parametrize("after", ["1e300", "9" * 400, "nan", "-1", "soon"])
def test_a_wait_without_bound_is_bounded_and_can_be_lifted(bench: Bench, store: redis.Redis, after: str) -> None:
    told = failure(429, {"message": f"Limit {'9' * 27}"}, {"retry-after": after})
    assert 0 <= told.after_s <= 86_400
    bench.org.block(BASE, 86_400_000, "a test")
    until(lambda: bench.org.state(BASE).blocked_ms > 0)
    until(lambda: bench.control._runner.gate.room() == 0)  # type: ignore[attr-defined]
    store.delete(bench.org.prefix + "blocked:" + BASE)
    until(lambda: bench.control._runner.gate.room() > 0)  # type: ignore[attr-defined]
    assert answer(bench.run("j1"))


def test_money_that_was_added_a_moment_ago_counts(bench: Bench) -> None:
    bench.policies.set("acme", Policy(hosted=True, daily_usd=0))
    time.sleep(1.2)  # the worker looks every second
    bench.policies.set("acme", Policy(hosted=True, daily_usd=1))
    assert answer(bench.run("j1"))
    assert "postponed" not in bench.job("j1")
