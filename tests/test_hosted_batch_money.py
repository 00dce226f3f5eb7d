"""What batches at a hosted service cost: reserved at the most, settled by what the service counted, free again where nothing was run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from fleet_support import until
from hosted_desk import Desk
from hosted_service import BASE, Running
from hosted_support import settings_of

from lorayard.errors import NotFound
from lorayard.ledger.organisation import NANO
from lorayard.ledger.policies import Policy
from lorayard_workers.groq.client import ServiceClient


@pytest.fixture
def desk(store: redis.Redis, service: Running) -> Iterator[Desk]:
    with ServiceClient(settings_of(service)) as client:
        yield Desk(store, service, client)


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -(10**9)}, {"completion_tokens": 10**18, "total_tokens": -5}, {"prompt_time": "abc"}, "abc"], ids=str
)
def test_a_usage_that_cannot_be_harms_nothing(desk: Desk, service: Running, usage: Any) -> None:
    service.service.usage = usage
    desk.put("a", "b")
    desk.claim()
    for document in desk.sweep_until("succeeded", "succeeded", ids=("a", "b")):
        assert 0 <= document["cost_usd"] < 0.001
    assert 0 <= desk.org.spent(desk.org.state(BASE).month).get("*", 0) < 10**6


@pytest.mark.parametrize("usage", ["abc", {"prompt_tokens": "7"}, {"completion_tokens": -1}], ids=str)
def test_a_line_whose_tokens_are_not_told_costs_what_was_set_aside_for_it(desk: Desk, service: Running, usage: Any) -> None:
    service.service.usage = usage
    desk.put("a")
    desk.claim()
    (document,) = desk.sweep_until("succeeded", ids=("a",))
    assert round(document["cost_usd"] * NANO) == desk.spent() == desk.cost() == desk.at_most("a") > 0


@pytest.mark.parametrize("broken", [(b'"body": {', b'"body": {NaN'), (b'"choices": [', b'"choices": [{"message": {}}, ')])
def test_a_line_that_cannot_be_read_costs_what_was_set_aside_for_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, broken: tuple[bytes, bytes]
) -> None:
    content = desk.keeper._service.content

    def garbled(file_id: str) -> bytes:
        return b"\n".join(line.replace(*broken) if b"acme a" in line else line for line in content(file_id).splitlines())

    monkeypatch.setattr(desk.keeper._service, "content", garbled)
    desk.put("a", "b")
    desk.claim()
    one, other = desk.sweep_until("delayed", "succeeded", ids=("a", "b"))
    assert (one["attempts"], one["postponed_why"]["code"]) == (1, "hosted_batch_line")
    assert desk.spent() == desk.cost() == desk.at_most("a") + round(other["cost_usd"] * NANO)


def test_lines_that_are_missing_from_a_batch_that_ran_out_of_time_cost_nothing(
    desk: Desk, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = desk.keeper._service.content

    def silent(file_id: str) -> bytes:
        return b"\n".join(line for line in content(file_id).splitlines() if b"batch_expired" not in line)

    monkeypatch.setattr(desk.keeper._service, "content", silent)
    service.service.expire_after = 1
    desk.put("a", "b")
    desk.claim()
    until(desk.settled, 10, every_s=0.02)
    (cost,) = [d["cost_usd"] for d in desk.ledger.show("acme", ["a", "b"]) if d and d["status"] == "succeeded"]
    assert desk.spent() == round(cost * NANO)


def test_a_line_that_fails_costs_nothing(desk: Desk, service: Running) -> None:
    service.service.fail_lines = ("acme a",)
    desk.put("a")
    desk.claim()
    desk.sweep_until("failed", ids=("a",))
    assert desk.spent() == 0


def test_money_that_was_held_is_free_again_where_its_keeper_was_lost_before_it_said_so(
    desk: Desk, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> bool:
        raise Killed

    monkeypatch.setattr("lorayard_workers.groq.batches.HOLD_S", 0.1)
    desk.put("a")
    desk.claim()
    with monkeypatch.context() as patch:
        patch.setattr(desk.keeper, "_look_again", killed)
        with pytest.raises(Killed):
            desk.keeper.sweep()
    assert desk.spent() == desk.at_most("a")
    assert desk.ledger.cancel("acme", ["a"]) == ["cancelled"]
    until(desk.settled, 10, every_s=0.02)
    assert desk.spent() == 0
    assert service.service.made == {}


def test_a_batch_spends_no_more_than_there_is(desk: Desk, service: Running) -> None:
    """Each line is reserved at its most; what they took is put in its place, and what that leaves is for the others."""
    desk.policies.set("acme", Policy(hosted=True, monthly_usd=0.001))
    ids = [f"j{n}" for n in range(90)]
    desk.put(*ids, max_tokens=1000)
    desk.claim()

    def over() -> bool:
        return desk.settled() and all(d and d["status"] in ("succeeded", "delayed") for d in desk.ledger.show("acme", ids))

    until(over, 20)
    documents = [d for d in desk.ledger.show("acme", ids) if d]
    cost = sum(d["cost_usd"] for d in documents if d["status"] == "succeeded")
    done = sum(d["status"] == "succeeded" for d in documents)
    assert 20 <= done <= 25, "of 0.001 $, at 0.00004 $ each at most"
    assert cost <= 0.001
    spent = desk.org.spent(desk.org.state(BASE).month)
    assert spent["acme"] == spent["*"]
    assert spent["acme"] / NANO == pytest.approx(cost, rel=1e-6), "what was held for the rest is free again"


def test_money_that_was_held_is_free_again_when_a_batch_is_refused(desk: Desk, service: Running) -> None:
    service.service.refuse_batch = True
    desk.put("a")
    desk.claim()
    until(desk.settled, 10)
    assert desk.org.spent(desk.org.state(BASE).month)["acme"] == 0


def test_a_batch_that_the_service_has_forgotten_is_run_again_and_its_money_is_free(desk: Desk, service: Running) -> None:
    service.service.batch_s = 60
    desk.put("a")
    desk.claim()
    until(lambda: desk.settled() or service.service.batches, 10)
    assert desk.org.spent(desk.org.state(BASE).month)["acme"] > 0
    service.service.batches.clear()
    until(desk.settled, 10, every_s=0.02)
    (document,) = desk.ledger.show("acme", ["a"])
    assert document is not None
    assert (document["status"], document["attempts"]) == ("delayed", 0)
    assert desk.org.spent(desk.org.state(BASE).month)["acme"] == 0
    assert service.service.files == {}


@pytest.mark.parametrize("lost", [False, True])
def test_results_that_are_not_there_are_waited_for(desk: Desk, service: Running, monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    monkeypatch.setattr("lorayard_workers.groq.batches.MISSES", 3)
    content = desk.keeper._service.content
    asked = 0

    def late(file_id: str) -> bytes:
        nonlocal asked
        asked += 1
        if lost or asked < 3:
            raise NotFound("no such file")
        return content(file_id)

    monkeypatch.setattr(desk.keeper._service, "content", late)
    desk.put("a")
    desk.claim()
    (document,) = desk.sweep_until("delayed" if lost else "succeeded", ids=("a",))
    assert sum(service.service.paid.values()) == 1
    assert document["attempts"] == 1
    assert desk.org.spent(desk.org.state(BASE).month)["acme"] > 0, "the line was run, and is paid for"
