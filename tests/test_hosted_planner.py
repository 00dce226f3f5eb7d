"""The plan for hosted workers: who may claim which lane, when `auto` leaves, batches gathered, shares kept."""

from __future__ import annotations

from typing import Any

import pytest

from lorayard_scheduler.hosted_planner import (
    OUTSTANDING,
    TAKE,
    AtHome,
    GroupView,
    HostedPolicy,
    HostedWorker,
    Newcomers,
    local_groups,
    overdue_at_home,
    plan_hosted,
)
from lorayard_scheduler.hosted_planning import LocalRate
from lorayard_scheduler.planner import Dispatch

NOW = 1_000_000
HOUR = 3_600_000
WORKER = HostedWorker("g", 100, 0, 0, frozenset({"base", "d"}))


def group(digest: str, tenant: str = "acme", jobs: int = 10, due: int = NOW + HOUR, since: int = NOW) -> GroupView:
    return GroupView(digest, tenant, jobs, due, since)


def plan(*groups: GroupView, workers: tuple[HostedWorker, ...] = (WORKER,), home: AtHome = AtHome(), **more: Any) -> list[Dispatch]:  # noqa: B008
    return plan_hosted(groups, workers, more.pop("served", {}), home, NOW, HostedPolicy(), **more)


def test_each_lane_has_its_claimants() -> None:
    groups = [group("d"), group("d@groq"), group("d@auto"), group("d@batch", due=NOW + 30 * HOUR)]
    assert [g.digest for g in local_groups(groups)] == ["d", "d@auto"]
    busy = AtHome(workers=1, rate=100.0)
    assert [d.digest for d in plan(*groups, home=busy)] == ["d@groq"], "home makes it in time, and the batch is being gathered"
    assert {d.digest for d in plan(*groups)} == {"d@groq", "d@auto"}, "nobody is at home"


def test_what_the_service_does_not_have_waits() -> None:
    assert plan(group("other@groq"), pending={"other"}) == []
    assert plan(group("other@auto")) == []
    assert len(plan(group("other@groq"))) == 1, "it never will: the worker tells its jobs so"


def test_adapters_whose_calls_fail_go_last() -> None:
    worker = HostedWorker("g", TAKE, 0, 0, frozenset({"base", "d"}), doubted=frozenset({"d"}))
    bad, good = group("d@groq", jobs=99, due=NOW), group("base@groq", jobs=20)
    assert [(d.digest, d.takes[0][1]) for d in plan(bad, good, workers=(worker,))] == [("base@groq", 20), ("d@groq", TAKE - 20)]
    assert len(plan(bad, workers=(worker,))) == 1, "but they go"


def leaving(*groups: GroupView, home: AtHome, now: int = NOW) -> list[int]:
    """How many jobs of each."""
    found = overdue_at_home(reversed(groups), home, now)
    return [found[group.digest, group.tenant] for group in groups if group.digest.endswith("@auto")]


def test_auto_leaves_as_far_as_home_would_be_late() -> None:
    mine = group("d@auto", jobs=100, due=NOW + 10_000)
    home = AtHome(workers=1, rate=5.0, in_flight=10)
    assert leaving(mine, home=home) == [60], "50 in 10 s, 10 of them for what runs already"
    ahead = group("d", "zeta", jobs=30, due=NOW + 5_000)
    assert leaving(mine, ahead, home=home) == [90]
    behind = group("d", "zeta", jobs=30, due=NOW + 20_000)
    assert leaving(mine, behind, home=home) == [60]
    unseen = AtHome(workers=1)
    assert leaving(mine, home=unseen) == [0]
    assert leaving(mine, home=unseen, now=NOW + 10_000) == [100]
    (dispatch,) = plan(mine, ahead, home=home, workers=(HostedWorker("g", 20, 0, 0, WORKER.serves),))
    assert dispatch.takes == (("acme", 20),)
    assert "due time" in dispatch.why
    assert plan(mine, ahead, home=home, closed={"acme"}) == []


def test_of_groups_that_are_due_at_the_same_moment_only_those_leave_that_home_has_no_time_for() -> None:
    """As those of one call are."""
    one_call = [group(f"d{n}@auto", due=NOW + 120_000) for n in range(10)]
    assert leaving(*one_call, home=AtHome(workers=2, rate=0.5)) == [0] * 6 + [10] * 4
    assert leaving(group("d", due=NOW + 120_000), *one_call, home=AtHome(workers=2, rate=0.5)) == [0] * 5 + [10] * 5


def test_room_is_filled_and_not_more() -> None:
    groups = [group("d@groq", jobs=500)]
    assert sum(n for d in plan(*groups) for _, n in d.takes) == 100
    assert max(n for d in plan(*groups) for _, n in d.takes) <= TAKE
    assert plan(*groups, workers=(HostedWorker("g", 100, 100, 3, WORKER.serves),)) == []
    assert plan(*groups, workers=(HostedWorker("g", 0, 0, 0, WORKER.serves),)) == []
    assert plan(*groups, workers=(HostedWorker("g", 100, 0, OUTSTANDING, WORKER.serves),)) == []
    two = (HostedWorker("g", 20, 15, 1, WORKER.serves), HostedWorker("h", 20, 0, 0, WORKER.serves))
    assert [(d.worker, d.takes[0][1]) for d in plan(*groups, workers=two)] == [("h", 20), ("g", 5)]


def test_the_least_served_tenant_goes_first_then_who_is_most_due() -> None:
    groups = [group("d@groq", "acme", due=NOW), group("d@groq", "zeta"), group("base@groq", "zeta", due=NOW + 5)]
    order = [(d.digest, d.takes[0][0]) for d in plan(*groups, served={"acme": 50_000.0})]
    assert order == [("base@groq", "zeta"), ("d@groq", "zeta"), ("d@groq", "acme")]


def test_who_begins_to_wait_is_level_with_whoever_was_served_least_of_those_who_wait_or_waited_last() -> None:
    newcomers = Newcomers()
    served = {"acme": 900.0, "zeta": 500.0, "new": 10.0, "rich": 5_000.0}
    assert newcomers.settle(["acme", "zeta"], served) == {}, "nobody was there before them"
    assert newcomers.settle(["acme", "zeta", "new", "rich"], served) == {"new": 500.0}
    assert newcomers.settle(["acme"], served) == {}
    served["acme"] = 2_000.0
    assert newcomers.settle([], served) == {}
    assert newcomers.settle(["zeta", "acme"], served) == {"zeta": 2_000.0}, "it was away while the other was served"


@pytest.mark.parametrize(
    ("jobs", "waited", "due_in", "takes"),
    [(10, 1_000, 30 * HOUR, []), (10, 70_000, 30 * HOUR, [10]), (1_500, 0, 30 * HOUR, [1_000]), (10, 70_000, 20 * HOUR, [10])],
    ids=["gathering", "waited", "enough", "urgent"],
)
def test_batches_are_gathered_unless_there_is_no_time(jobs: int, waited: int, due_in: int, takes: list[int]) -> None:
    dispatches = plan(group("d@batch", jobs=jobs, due=NOW + due_in, since=NOW - waited))
    assert [d.takes[0][1] for d in dispatches] == takes


def test_a_batch_needs_no_room() -> None:
    full = HostedWorker("g", 10, 10, 1, WORKER.serves)
    (dispatch,) = plan(group("d@batch", due=NOW + 30 * HOUR, since=NOW - 100_000), workers=(full,))
    assert dispatch.takes == (("acme", 10),)


def test_the_rate_at_home_is_seen_while_there_is_work() -> None:
    rate = LocalRate()
    rate.see(1.0, 0, busy=True)
    rate.see(3.0, 20, busy=True)
    assert rate.rate is None
    rate.see(6.0, 50, busy=True)
    assert rate.rate == 10
    rate.see(100.0, 50, busy=False)
    rate.see(106.0, 170, busy=True)
    assert rate.rate == 15
    rate.see(106.1, 170, busy=False)
    rate.see(106.2, 170, busy=True)
    rate.see(111.0, 245, busy=True)
    assert rate.rate == 15, "idle for a moment between two batches is not idle"
