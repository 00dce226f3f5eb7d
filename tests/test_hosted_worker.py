"""The hosted worker's control and runner against the stand-in, with a real ledger; the test plays the scheduler."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from fleet_support import until
from hosted_service import BASE, Running
from hosted_support import Bench, answer, bench_of, deepen

from lorayard.errors import Unavailable
from lorayard.ledger.audit import audit
from lorayard.ledger.organisation import NANO


@pytest.fixture
def bench(store: redis.Redis, redis_url: str, service: Running) -> Iterator[Bench]:
    with bench_of(store, redis_url, service) as one:
        yield one


def test_a_job_comes_back_with_the_service_s_own_times_and_its_cost(bench: Bench, service: Running) -> None:
    service.service.service_s = 0.02
    document = bench.run("j1", max_tokens=8)
    assert answer(document) == f"{BASE} says: j1"
    latencies = document["latencies_ms"]
    assert latencies["remote_queue"] == 3
    assert (latencies["prefill"], latencies["decode"]) == (1, 4)
    assert latencies["network"] > 0
    assert latencies["total"] == pytest.approx(sum(v for k, v in latencies.items() if k != "total"), abs=2)
    usage = document["response"]["usage"]
    assert document["cost_usd"] == pytest.approx((usage["prompt_tokens"] * 0.05 + usage["completion_tokens"] * 0.08) / 1e6)
    assert (document["attempts"], document["hosted_model"], document["adapter_temperature"]) == (1, BASE, "cold")
    assert bench.run("j2")["adapter_temperature"] == "warm"
    spent = bench.org.spent(bench.org.state(BASE).month)
    until(lambda: sum(bench.org.costs(bench.org.state(BASE).month).values()) > 0)
    assert spent["acme"] == spent["*"]
    view = bench.ledger.snapshot()
    assert view.hosted["acme"] >= usage["total_tokens"]
    assert view.served == {}, "it costs nothing of the tenant's share of local workers"


def test_what_changes_nothing_is_left_out_and_said(bench: Bench, service: Running) -> None:
    document = bench.run("j1", frequency_penalty=0, top_k=0, n=1, max_tokens=None)
    assert answer(document)
    sent = service.service.bodies[-1]
    assert sorted(sent) == ["max_completion_tokens", "messages", "model"]
    assert len(document["notes"]) == 4


def test_a_field_the_service_refuses_never_reaches_it(bench: Bench, service: Running) -> None:
    document = bench.run("j1", logit_bias={"1": 5})
    assert document["error"]["code"] == "unsupported_parameter"
    assert not service.service.bodies


FAULTS = {
    "429": "rate_limited",
    "498": "over_capacity",
    "503": "over_capacity",
    **dict.fromkeys(("408", "409", "425", "499", "500"), "hosted_error"),
    "timeout": "timeout",
    "drip": "timeout",
    "reset": "connection_lost",
    "truncated": "connection_lost",
    "garbage": "bad_answer",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_job_s_fault_costs_no_attempt(store: redis.Redis, redis_url: str, service: Running, fault: str) -> None:
    service.service.next_faults, service.service.hang_s = [fault], 3
    timeout_s = 1.0 if fault in ("timeout", "drip") else 5.0  # the second call must have its answer by then
    with bench_of(store, redis_url, service, hosted_timeout_s=timeout_s) as bench:
        bench.put(["j1"])
        bench.work_off()
        document = bench.job("j1")
        assert answer(document) == f"{BASE} says: j1"
        assert document["attempts"] == 1
        assert (document["postponed"], document["postponed_why"]["code"]) == (1, FAULTS[fault]), "why it waited stays in its story"
        assert service.service.answered["j1"] == 1
        assert sum(service.service.calls.values()) == 2
        assert audit(bench.ledger) == []


def test_what_never_gets_an_answer_is_a_dead_letter_in_the_end(
    store: redis.Redis, redis_url: str, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorayard_workers.groq.runner.PATIENCE", 1)
    monkeypatch.setattr("lorayard_workers.commits.backoff_ms", lambda kind, before: 0)
    service.service.faults = {"reset": 1.0}
    with bench_of(store, redis_url, service) as bench:
        bench.put(["j1"])
        bench.work_off()
        document = bench.job("j1")
        assert (document["status"], document["error"]["code"]) == ("failed", "connection_lost")
        assert bench.ledger.list_ids("acme", limit=9, dead=True) == ["j1"]


def test_a_final_refusal_ends_the_job_with_what_was_generated(bench: Bench, service: Running) -> None:
    service.service.next_faults = ["json"]
    document = bench.run("j1", response_format={"type": "json_object"})
    assert (document["status"], document["error"]["code"]) == ("failed", "json_validate_failed")
    assert document["failed_generation"] == '{"half": '
    service.service.tpm = 50
    document = bench.run("j2", max_tokens=500)
    assert (document["status"], document["error"]["type"]) == ("failed", "invalid_request_error")
    assert len(service.service.calls) == 2, "neither was sent again"


def test_calls_that_are_given_up_come_again_at_no_cost(bench: Bench, service: Running) -> None:
    service.service.service_s = 30
    bench.put(["j1"])
    bench.dispatch()
    until(lambda: bench.job("j1")["status"] == "running")
    bench.control._runner.kill("a test")
    until(lambda: bench.job("j1")["status"] == "delayed")
    assert (bench.job("j1")["attempts"], bench.job("j1")["postponed"]) == (0, 1)


def test_a_request_that_cannot_be_read_holds_none_beside_it(bench: Bench) -> None:
    bench.put(["deep", "j1"])
    deepen(bench.ledger, "deep")
    bench.dispatch()
    assert answer(bench.ended("j1"))
    until(lambda: bench.job("deep")["status"] == "delayed")
    assert (bench.job("deep")["attempts"], bench.job("deep")["postponed_why"]["code"]) == (1, "internal_error")


def test_a_cancelled_call_is_stopped_and_its_place_free(bench: Bench, service: Running) -> None:
    service.service.service_s = 5
    bench.put(["j1"])
    bench.dispatch()
    until(lambda: service.service.under_way == 1)
    assert bench.ledger.cancel("acme", ["j1"]) == ["cancelled"]
    until(lambda: not bench.control._runner._running, 3)  # type: ignore[attr-defined]
    service.service.service_s = 0.0
    assert answer(bench.run("j2"))


def test_the_first_call_of_an_adapter_after_idleness_is_a_cold_start(store: redis.Redis, redis_url: str, service: Running) -> None:
    service.service.service_s = 0.05
    with bench_of(store, redis_url, service) as bench:
        digest = "a" * 32
        bench.publications.tell(bench.publications.ask(digest, "acme/x", model=BASE), state="ready")

        def called(job_id: str) -> tuple[str, bool, bool]:
            bench.put([job_id], digest=digest)
            bench.dispatch(digest=f"{digest}@groq")
            document = bench.ended(job_id)
            stages = document["latencies_ms"]
            assert stages["total"] == pytest.approx(sum(v for k, v in stages.items() if k != "total"), abs=2)
            return document["adapter_temperature"], stages["adapter_load"] > 30, stages.get("network", 0) > 30

        assert [called("j1"), called("j2")] == [("cold", True, False), ("warm", False, True)]
        idle_ms = round(bench.settings.hosted_idle_s * 1000)
        store.hincrby(bench.org.prefix + "called", BASE, -idle_ms)  # as if that had been so long ago
        assert called("j3") == ("cold", True, False)


BAD_USAGES: list[Any] = [
    {"prompt_tokens": 9 * 10**18},
    {"prompt_tokens": -1_000_000_000},
    {"total_tokens": -5},
    {"completion_tokens": True},
    {"prompt_tokens": 10**30},
    {"queue_time": 1e308, "prompt_time": -1, "completion_time": "x"},
    {"prompt_time": 1e9},
    "abc",
    [],
]


@pytest.mark.parametrize("usage", BAD_USAGES, ids=str)
def test_a_usage_that_cannot_be_harms_nothing(bench: Bench, service: Running, usage: Any) -> None:
    service.service.usage = usage
    document = bench.run("j1")
    assert answer(document) == f"{BASE} says: j1"
    assert 0 <= document["cost_usd"] < 0.001
    assert all(0 <= value < 60_000 for value in document["latencies_ms"].values())
    assert sum(service.service.calls.values()) == 1
    service.service.usage = None
    assert answer(bench.run("j2"))
    time.sleep(0.3)  # settled by then
    assert 0 <= bench.org.spent(bench.org.state(BASE).month)["*"] < 10**6
    assert bench.ledger.snapshot().hosted["acme"] >= 0
    assert audit(bench.ledger) == []


@pytest.mark.parametrize(
    "raw",
    [
        *("[" * 5000, '{"choices": [' + "[" * 5000, "{}", '{"choices": []}', '{"choices": [{"message": 1}]}', "null", "\x00"),
        *('{"choices": [{"message": {}}]}', '{"choices": [{"message": {"role": "assistant", "content": null, "tool_calls": []}}]}'),
        '{"choices": [{"message": {"content": "he"}}, {"message": {"content": null}}]}',
        '{"choices": [{"message": {"content": "he"}, "finish_reason": "error"}]}',
        '{"choices": [{"message": {"content": "he"}}], "error": {"message": "it broke"}}',
        '{"choices": [{"message": {"content": "he"}, "error": {"message": "it broke"}}]}',
    ],
    ids=range(13),
)
def test_an_answer_that_is_none_is_put_off(bench: Bench, service: Running, raw: str) -> None:
    service.service.raw = raw
    bench.put(["j1"])
    bench.dispatch()
    until(lambda: bench.job("j1")["status"] == "delayed")
    assert bench.job("j1")["postponed_why"]["code"] == "bad_answer"
    service.service.raw = ""
    bench.work_off()
    assert bench.job("j1")["attempts"] == 1


@pytest.mark.parametrize(
    "message", [{"content": ""}, {"content": None, "tool_calls": [{"id": "t"}]}, {"reasoning": "hm"}, {"refusal": "no"}], ids=str
)
def test_an_answer_without_a_text_may_be_one(bench: Bench, service: Running, message: dict[str, Any]) -> None:
    service.service.raw = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "error": None})
    document = bench.run("j1")
    assert document["status"] == "succeeded"
    assert document["response"]["choices"][0]["message"] == message


def test_an_answer_that_never_ends_is_none(bench: Bench, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard_workers.groq.client.MOST_BYTES", 100)
    bench.put(["j1"])
    bench.dispatch()
    until(lambda: bench.job("j1")["status"] == "delayed")
    assert "longer than" in bench.job("j1")["postponed_why"]["message"]


def test_a_call_that_is_cancelled_before_it_begins_leaves_its_place(
    bench: Bench, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word may come between the moment when it is let through and its task's first step."""
    runner: Any = bench.control._runner
    begin = runner.begin

    def cancelled_at_once(calls: list[Any]) -> None:
        begin(calls)
        for call in calls:
            runner._cancel(call.batch, [call.item.ref])

    monkeypatch.setattr(runner, "begin", cancelled_at_once)
    bench.put(["j1", "j2"])
    bench.dispatch()
    until(lambda: {"j1", "j2"} & {ref.partition("/")[2] for held in bench.control._leases.held.values() for ref in held.begun})
    assert bench.ledger.cancel("acme", ["j1", "j2"]) == ["cancelled", "cancelled"]  # of which the runner has known for a while
    until(lambda: not runner._running, 3)
    until(lambda: bench.org.spent(bench.org.state(BASE).month).get("acme") == 0, 3)
    monkeypatch.setattr(runner, "begin", begin)
    assert answer(bench.run("j3"))
    assert sum(service.service.calls.values()) == 1


def test_what_was_settled_counts_once_though_nobody_heard_that_it_was(
    bench: Bench, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, asked = bench.org.settle, 0

    def unheard(*args: Any) -> None:
        nonlocal asked
        asked += 1
        settle(*args)
        if asked == 1:
            raise Unavailable("the reply was lost")

    monkeypatch.setattr(bench.org, "settle", unheard)
    document = bench.run("j1", max_tokens=500)
    until(lambda: asked == 2)
    month = bench.org.state(BASE).month
    until(lambda: not bench.control._runner._settling)  # type: ignore[attr-defined]
    assert bench.org.spent(month)["acme"] == bench.org.costs(month)["acme", "base"] == round(document["cost_usd"] * NANO) > 0


def test_what_may_have_been_charged_counts_for_its_adapter_too(store: redis.Redis, redis_url: str, service: Running) -> None:
    service.service.next_faults = ["reset"]
    with bench_of(store, redis_url, service) as bench:
        bench.put(["j1"])
        bench.dispatch()
        until(lambda: bench.job("j1")["status"] == "delayed")
        service.service.service_s = 5
        bench.put(["j2"])
        bench.dispatch()
        until(lambda: service.service.under_way == 1)
        bench.ledger.cancel("acme", ["j2"])
        month = bench.org.state(BASE).month
        until(lambda: len(bench.control._runner._running) == 0)  # type: ignore[attr-defined]
        spent = bench.org.spent(month)["acme"]
        assert spent > 0
        until(lambda: bench.org.costs(month) == {("acme", "base"): spent}, 3)


def test_what_calls_took_is_settled_before_the_worker_leaves(
    store: redis.Redis, redis_url: str, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorayard_workers.groq.runner.SETTLE_S", 60)
    with bench_of(store, redis_url, service) as bench:
        document = bench.run("j1", max_tokens=500)
        month = bench.org.state(BASE).month
        assert bench.org.costs(month) == {}
    assert bench.org.costs(month)["acme", "base"] == bench.org.spent(month)["acme"] == round(document["cost_usd"] * NANO)
