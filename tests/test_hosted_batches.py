"""The batch API against the stand-in: lines that fail, windows that end, batches refused, jobs cancelled; half the price."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis
from fleet_support import until
from hosted_desk import Desk
from hosted_service import BASE, Running
from hosted_support import deepen, settings_of

from lorayard.errors import Unavailable
from lorayard.ledger.organisation import NANO
from lorayard.ledger.policies import Policy
from lorayard_workers.groq.client import ServiceClient
from lorayard_workers.groq.lines import end_of, rows_by_name


@pytest.fixture
def desk(store: redis.Redis, service: Running) -> Iterator[Desk]:
    with ServiceClient(settings_of(service)) as client:
        yield Desk(store, service, client)


def test_jobs_with_time_go_through_one_batch_at_half_the_price(desk: Desk, service: Running) -> None:
    desk.put("a", "b", "c")
    desk.put("a", tenant="zeta")
    desk.claim()
    assert desk.left is None
    assert [d["status"] for d in desk.ledger.show("acme", ["a", "b", "c"]) if d] == ["submitted"] * 3
    documents = desk.sweep_until("succeeded", "succeeded", "succeeded")
    (other,) = desk.sweep_until("succeeded", tenant="zeta", ids=("a",))
    texts = [d["response"]["choices"][0]["message"]["content"] for d in [*documents, other]]
    assert texts == [f"{BASE} says: {text}" for text in ("acme a", "acme b", "acme c", "zeta a")]
    usage = other["response"]["usage"]
    assert other["cost_usd"] == pytest.approx(0.5 * (usage["prompt_tokens"] * 0.05 + usage["completion_tokens"] * 0.08) / 1e6)
    assert (other["attempts"], other["hosted_model"]) == (1, BASE)
    view = desk.ledger.snapshot()
    assert (view.served, view.hosted["zeta"]) == ({}, usage["total_tokens"])
    month = desk.org.state(BASE).month
    assert desk.org.costs(month)["zeta", "base"] / NANO == pytest.approx(other["cost_usd"], rel=1e-6)
    assert len(service.service.batches) == 1
    assert service.service.files == {}
    assert not any("acme" in name or "zeta" in name for name in service.service.paid), "the service is told no tenant"


def test_what_was_left_out_of_a_line_is_said(desk: Desk) -> None:
    desk.put("a", frequency_penalty=0)
    desk.put("b")
    desk.claim()
    one, other = desk.sweep_until("succeeded", "succeeded", ids=("a", "b"))
    assert one["notes"] == ["frequency_penalty left out: it is what the service does anyway"]
    assert "notes" not in other
    times = one["latencies_ms"]
    assert times["remote_queue"] == 3
    assert times["remote_batch"] > 150, "as long as the stand-in lets a batch lie"
    assert times["stored"] < times["remote_batch"]
    assert times["total"] == pytest.approx(sum(v for k, v in times.items() if k != "total"), abs=2)
    assert "at the hosted service's batch API" in one["explanation"]


def test_a_request_that_cannot_be_read_keeps_no_other_out_of_its_batch(desk: Desk, service: Running) -> None:
    desk.put("a", "b")
    deepen(desk.ledger, "a")
    desk.claim()
    one, _ = desk.sweep_until("queued", "succeeded", ids=("a", "b"))
    assert (one["attempts"], one["postponed_why"]["code"]) == (1, "internal_error")
    assert sum(service.service.paid.values()) == 1


def test_a_line_that_is_in_no_file_uses_an_attempt(desk: Desk, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that the service calls complete and that has no line for a job is not run for ever."""
    content = desk.keeper._service.content
    monkeypatch.setattr(desk.keeper._service, "content", lambda file_id: content(file_id) and b"")
    desk.put("a")
    desk.use_up_attempts()
    (document,) = desk.sweep_until("failed", ids=("a",))
    assert document["error"]["code"] == document["postponed_why"]["code"] == "hosted_batch_line"
    assert desk.spent() == desk.cost() == 3 * desk.at_most("a") > 0, "the service says that it has run them"


def test_a_line_that_fails_harms_no_other(desk: Desk, service: Running) -> None:
    service.service.fail_lines = ("acme b",)
    desk.put("a", "b", "c")
    desk.claim()
    documents = desk.sweep_until("succeeded", "failed", "succeeded")
    assert documents[1]["error"]["code"] == "json_validate_failed"
    assert documents[1]["failed_generation"] == '{"half": '


def test_when_the_window_ends_what_was_run_counts_and_the_rest_comes_again(desk: Desk, service: Running) -> None:
    service.service.expire_after = 2
    desk.put("a", "b", "c")
    desk.claim()
    documents = desk.sweep_until("succeeded", "succeeded", "delayed")
    assert (documents[2]["attempts"], documents[2]["postponed"]) == (0, 1)
    assert documents[2]["postponed_why"]["code"] == "hosted_batch_unfinished"
    assert sum(service.service.paid.values()) == 2
    assert desk.spent() == round(NANO * sum(d["cost_usd"] for d in documents[:2]))
    service.service.expire_after = -1
    until(lambda: desk.ledger.reap().woken, 5)
    desk.claim()
    desk.sweep_until("succeeded", "succeeded", "succeeded")
    assert sorted(service.service.paid.values()) == [1, 1, 1], "no line is paid twice"


@pytest.mark.parametrize("as_array", [True, False])
def test_a_batch_that_is_refused_uses_attempts_and_ends(desk: Desk, service: Running, as_array: bool) -> None:
    service.service.refuse_batch, service.service.errors_as_array = True, as_array
    desk.put("a")
    desk.use_up_attempts()
    (document,) = desk.sweep_until("failed", ids=("a",))
    assert document["error"]["message"] == "a line is not valid"
    assert desk.ledger.list_ids("acme", limit=9, dead=True) == ["a"]


def test_a_cancelled_job_is_not_awaited_and_a_batch_of_such_is_cancelled(desk: Desk, service: Running) -> None:
    service.service.batch_s = 60
    desk.put("a", "b")
    desk.claim()
    desk.keeper.sweep()
    until(lambda: service.service.batches)
    assert desk.ledger.cancel("acme", ["a"]) == ["cancelled"]
    desk.keeper.sweep()
    (batch,) = service.service.batches.values()
    assert batch["status"] in ("in_progress", "validating")
    assert desk.ledger.cancel("acme", ["b"]) == ["cancelled"]
    desk.sweep_until("cancelled", "cancelled", ids=("a", "b"))
    assert batch["status"] == "cancelled"
    assert service.service.files == {}


def test_of_two_batches_one_is_cancelled(desk: Desk, service: Running) -> None:
    """A keeper stood still, another took over and made the same again."""
    service.service.batch_s = 0.5
    desk.put("a")
    name = desk.claim()
    desk.keeper.sweep()
    client = desk.keeper._service
    (first,) = service.service.batches
    twin = str(client.start_batch(next(iter(service.service.files)), "24h", {"lorayard": name})["id"])
    other = str(client.start_batch(next(iter(service.service.files)), "24h", {"lorayard": "another"})["id"])
    desk.sweep_until("succeeded", ids=("a",))
    assert {i: b["status"] for i, b in service.service.batches.items() if i != other} == {first: "completed", twin: "cancelling"}
    assert service.service.batches[other]["status"] != "cancelling"


def test_who_has_no_time_is_run_at_once_and_the_others_go_back(desk: Desk) -> None:
    desk.put("late", deadline_ms=3_600_000)
    desk.put("a", "b")
    desk.claim()
    assert desk.left is not None
    assert [job.ref for job in desk.left.jobs] == ["acme/late"]
    assert [d["status"] for d in desk.ledger.show("acme", ["late", "a", "b"]) if d] == ["claimed", "queued", "queued"]


def test_leave_and_money_are_asked_for_when_the_lines_are_made(desk: Desk, service: Running) -> None:
    desk.put("a")
    desk.put("a", tenant="zeta")
    desk.put("b", tenant="zeta", logit_bias={"1": 5})
    desk.claim()
    desk.policies.set("acme", Policy(hosted=False))
    desk.policies.set("zeta", Policy(hosted=True, daily_usd=0))
    (document,) = desk.sweep_until("failed", ids=("a",))
    assert document["error"]["code"] == "hosted_not_allowed"
    desk.sweep_until("delayed", "failed", tenant="zeta", ids=("a", "b"))
    assert service.service.made == {}


def test_a_service_that_refuses_the_key_is_waited_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard_workers.groq.batches.HOLD_S", 0.1)
    desk.put("a")
    desk.claim()
    key = desk.keeper._service._http.headers["authorization"]
    desk.keeper._service._http.headers["authorization"] = "Bearer wrong"
    desk.keeper.sweep()
    assert desk.ledger.show("acme", ["a"])[0]["status"] == "submitted"  # type: ignore[index]
    until(lambda: any(b"Invalid API Key" in one.note for one in desk.ledger.tend("x", limit=1, hold_ms=1)))  # the doctor reads it
    desk.keeper._service._http.headers["authorization"] = key
    desk.sweep_until("succeeded", ids=("a",))


def test_a_batch_whose_beginning_nobody_heard_of_is_not_begun_again(desk: Desk, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard_workers.groq.batches.HOLD_S", 0.1)
    start = desk.keeper._service.start_batch

    def unheard(*args: Any) -> dict[str, Any]:
        start(*args)
        raise Unavailable("the reply was lost", code="hosted_away")

    monkeypatch.setattr(desk.keeper._service, "start_batch", unheard)
    desk.put("a")
    desk.claim()
    desk.keeper.sweep()
    monkeypatch.setattr(desk.keeper._service, "start_batch", start)
    desk.sweep_until("succeeded", ids=("a",))
    assert len(service.service.batches) == 1
    assert sum(service.service.paid.values()) == 1


def test_what_is_not_understood_of_one_batch_harms_no_other(desk: Desk, service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard_workers.groq.batches.HOLD_S", 0.1)
    look, broken = desk.keeper._service.batch, True

    def batch(batch_id: str) -> dict[str, Any]:
        if broken and batch_id == first:
            raise ValueError("what is this?")
        return look(batch_id)

    desk.put("a")
    desk.claim()
    desk.keeper.sweep()
    (first,) = service.service.batches
    monkeypatch.setattr(desk.keeper._service, "batch", batch)
    desk.put("b")
    desk.claim()
    until(lambda: desk.settled() or desk.ledger.show("acme", ["b"])[0]["status"] == "succeeded")  # type: ignore[index]
    assert desk.ledger.show("acme", ["a"])[0]["status"] == "submitted"  # type: ignore[index]
    broken = False
    desk.sweep_until("succeeded", "succeeded", ids=("a", "b"))


@pytest.mark.parametrize("turned", [False, True])
def test_an_answer_goes_before_an_error_of_the_same_line(turned: bool) -> None:
    """It is paid for. A service, or what is between, may say both."""
    answer = {"choices": [{"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]}
    rows = [
        {"custom_id": "a-0", "response": {"status_code": 200, "body": answer}},
        {"custom_id": "a-0", "response": {"status_code": 500, "body": {"error": {"message": "no"}}}},
        {"custom_id": "b-0", "response": {"status_code": 302, "body": answer}},
    ]
    files = [b"not a line\n" + msgspec.json.encode(row) + b"\n" for row in (reversed(rows) if turned else rows)]
    found = rows_by_name(files)
    assert end_of("t/a", found["a"], 0, "m", []).status == "succeeded"
    assert end_of("t/b", found["b"], 0, "m", []).status == "failed", "as a call that is redirected"


def test_a_line_that_never_goes_well_uses_attempts_in_the_end() -> None:
    (row,) = rows_by_name([b'{"custom_id": "a-0-7", "response": {"status_code": 500, "body": {"error": {"message": "no"}}}}']).values()
    assert [end_of("t/a", row, 0, "m", [], laters).status for laters in (0, 7, 8)] == ["later", "later", "retry"], "as a call"
