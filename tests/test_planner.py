"""The planner's rules, on views made by hand and by Hypothesis."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard.jobs import adapter_of
from lorayard_scheduler.costs import Costs, Work
from lorayard_scheduler.groups import Groups, Scale
from lorayard_scheduler.planner import Dispatch, Policy, View, plan
from lorayard_scheduler.policy import rows
from lorayard_scheduler.roster import Held, Roster, WorkerView

NOW = 1_000_000.0
COSTS = Costs(8, {"hot": 0.0, "loaded": 25.0, "disk": 50.0, "remote": 1000.0}, 1000.0, {1: 10.0, 8: 17.0}, measured=True)
WORK = Work(prompt=50, shared=0, output=20)
POLICY = Policy(reserve_ms=6_000, batch_ms=60_000, lead_ms=2_000, rows_per_width=1.0)


def view(groups: Iterable[tuple[str, str, int, float]], workers: Iterable[WorkerView], served: dict[str, float] | None = None) -> View:
    """Groups are (adapter, tenant, jobs, due in so many ms)."""
    index = Groups(Scale(POLICY.patience_ms, POLICY.flood_ms, COSTS, WORK, 1))
    for tenant, tokens in (served or {}).items():
        index.level(tenant, tokens)
    for digest, tenant, jobs, due in groups:
        index.put(digest, tenant, jobs, NOW + due, NOW)
    index.put("base", "somebody", 1, NOW, NOW)  # who does not flood
    index.put("base", "somebody", 0, NOW, NOW)
    return View(index, Roster(workers))


def worker(
    name: str = "w", *held: tuple[str, int], hot: Iterable[str] = (), loaded: Iterable[str] = (), costs: Costs = COSTS
) -> WorkerView:
    batches = tuple(Held(f"b{i}", digest, jobs) for i, (digest, jobs) in enumerate(held))
    return WorkerView(name, costs, batches, tuple(hot), frozenset(loaded))


def chosen(dispatches: Iterable[Dispatch]) -> list[tuple[str, str, int]]:
    return [(d.worker, d.digest, d.jobs) for d in dispatches]


def test_an_idle_worker_gets_two_adapters_the_most_due_first() -> None:
    groups = [("later", "t", 8, 60_000), ("soon", "t", 8, 10_000), ("last", "t", 8, 90_000)]
    assert chosen(plan(view(groups, [worker()]), NOW, POLICY)) == [("w", "soon", 8), ("w", "later", 8)]


def test_nothing_is_planned_without_jobs_workers_or_room() -> None:
    group = ("a", "t", 9, 1000)
    assert plan(view([], [worker()]), NOW, POLICY) == []
    assert plan(view([group], []), NOW, POLICY) == []
    assert plan(view([group], [worker("w", ("b", 8), ("c", 8))]), NOW, POLICY) == []
    assert plan(view([group], [worker("w", ("a", 8))]), NOW, POLICY) == [], "its width has no place left"


def test_nothing_is_planned_twice_unless_something_changed() -> None:
    seen = view([("a", "t", 20, 1000)], [worker("w", ("a", 8))])
    seen.planned()
    assert plan(seen, NOW, POLICY) == []
    seen.roster.put(worker("w", ("a", 3)))
    assert chosen(plan(seen, NOW, POLICY)) == [("w", "a", 5)]


def test_jobs_join_their_adapter_until_something_that_waits_is_nearly_due() -> None:
    late, busy = ("a", "t", 3, 90_000), [("a", 4), ("b", 1)]
    assert chosen(plan(view([late, ("other", "t", 8, 30_000)], [worker("w", *busy)]), NOW, POLICY)) == [("w", "a", 3)]
    assert plan(view([late, ("other", "t", 8, 1_000)], [worker("w", *busy)]), NOW, POLICY) == [], "an adapter in hand must make room for it"
    assert chosen(plan(view([late], [worker("w", *busy)]), NOW + 10**6, POLICY)) == [("w", "a", 3)], "nothing else waits"
    sooner = ("a", "t", 3, 500)
    assert chosen(plan(view([sooner, ("other", "t", 8, 1_000)], [worker("w", *busy)]), NOW, POLICY)) == [("w", "a", 3)]


def test_once_something_is_overdue_what_is_due_little_later_joins() -> None:
    policy = replace(POLICY, stay_ms=5_000)
    overdue, busy = ("other", "t", 8, -5_000), [("a", 4), ("b", 1)]
    assert chosen(plan(view([("a", "t", 3, 1_000), overdue], [worker("w", *busy)]), NOW, policy)) == [("w", "a", 3)]
    assert plan(view([("a", "t", 3, 5_000), overdue], [worker("w", *busy)]), NOW, policy) == []
    assert plan(view([("a", "t", 3, 3_000), ("other", "t", 8, 1_000)], [worker("w", *busy)]), NOW, policy) == [], "it is not too late yet"
    bound_to_a = worker("w", hot=["a"])
    assert plan(view([("a", "t", 3, 1_000), overdue], [bound_to_a]), NOW, policy)[0].digest == "a"


def test_a_busy_worker_gets_a_second_adapter_shortly_before_it_runs_dry_or_when_something_is_nearly_due() -> None:
    policy = replace(POLICY, lead_ms=4 * COSTS.job_ms(WORK))
    late, soon = ("other", "t", 8, 90_000), ("other", "t", 8, 3_000)
    assert plan(view([late], [worker("w", ("a", 5))]), NOW, policy) == []
    assert chosen(plan(view([late], [worker("w", ("a", 4))]), NOW, policy)) == [("w", "other", 8)]
    assert chosen(plan(view([soon], [worker("w", ("a", 5))]), NOW, policy)) == [("w", "other", 8)]


def test_a_busy_worker_gets_no_other_adapter_while_the_last_of_its_own_wait() -> None:
    """Between the load at which it needs more and half a batch, where what joins is too little to be a batch otherwise."""
    policy, other = replace(POLICY, lead_ms=5 * COSTS.job_ms(WORK)), ("other", "t", 8, 80_000)
    last, many = ("a", "t", 11, 90_000), ("a", "t", 12, 90_000)
    assert plan(view([last, other], [worker("w", ("a", 6))]), NOW, policy) == []
    assert chosen(plan(view([last, other], [worker("w", ("a", 5))]), NOW, policy)) == [("w", "a", 3)]
    assert chosen(plan(view([many, other], [worker("w", ("a", 5))]), NOW, policy)) == [("w", "other", 8)], "it does not shut others out"


def test_a_plan_ends_where_it_would_go_by_a_due_time_that_is_not_known() -> None:
    seen = view([("a", "t", 12, 10_000), ("b", "t", 8, 11_000)], [worker("w1"), worker("w2")])
    first = plan(seen, NOW, POLICY)
    assert chosen(first) == [("w1", "a", 8)]
    assert first[-1].more
    carry_out(seen, first)
    seen.groups.put("a", "t", 4, NOW + 60_000, NOW)
    assert chosen(plan(seen, NOW, POLICY))[0] == ("w2", "b", 8)


def test_a_hot_adapter_is_withdrawn_from_a_worker_when_another_can_take_the_rest() -> None:
    workers = [worker("w1", ("a", 4)), worker("w2", hot=["a"])]
    assert chosen(plan(view([("a", "t", 3, 60_000), ("b", "t", 8, 70_000)], workers), NOW, POLICY)) == [("w2", "b", 8), ("w1", "a", 3)]


def test_batches_are_as_large_as_pays() -> None:
    assert COSTS.paying(WORK, 16) > 8, "a narrow end of a batch is paid for by a longer one"
    long = Work(2000, 0, 10)  # read one after another
    assert (COSTS.lone(WORK), COSTS.lone(long)) == (False, True)
    assert rows(COSTS, WORK, replace(POLICY, rows_per_width=4.0), busy=False) == COSTS.paying(WORK, 32)
    assert rows(COSTS, long, POLICY, busy=False) == 1


def test_batches_are_as_large_as_there_is_time_for_where_nobody_could_begin_a_job_sooner() -> None:
    """The next jobs are there when the first of them end, and no place of the width stands empty."""
    work = Work(prompt=200, shared=0, output=5)
    policy = replace(POLICY, rows_per_width=4.0, batch_ms=40 * COSTS.job_ms(work))
    paying, most = COSTS.paying(work, 32), 32

    def first(jobs: int, *workers: WorkerView) -> int:
        seen = view([("a", "t", jobs, 60_000)], workers)
        seen.groups.rescale(replace(seen.groups.scale, work=work, workers=len(workers)))
        return plan(seen, NOW, policy)[0].jobs

    assert 8 < paying < most
    assert first(200, worker("w1", ("b", 1)), worker("w2", ("c", 1))) == most
    assert first(32, worker("w1", ("b", 1)), worker("w2", ("c", 1))) == paying
    assert first(32, worker("w1", ("b", 1))) == most


def test_a_narrow_batch_ranks_later_and_no_later_than_patience_allows() -> None:
    policy = replace(POLICY, patience_ms=4_000)
    narrow, wide = ("narrow", "t", 1, 0), ("wide", "t", 8, 2_000)
    (first, *_) = plan(view([narrow, wide], [worker()]), NOW, policy)
    assert first.digest == "wide"
    (first, *_) = plan(view([narrow, ("wide", "t", 8, 20_000)], [worker()]), NOW, policy)
    assert first.digest == "narrow"


def test_a_worker_prefers_what_it_has_loaded_if_nothing_else_is_much_more_due() -> None:
    groups = [("here", "t", 2, 3_000), ("far", "t", 2, 2_900)]
    assert plan(view(groups, [worker(loaded=["here"])]), NOW, POLICY)[0].digest == "here"
    assert plan(view(groups, [worker()]), NOW, POLICY)[0].digest == "far"
    assert plan(view([groups[0], ("far", "t", 2, -60_000)], [worker(loaded=["here"])]), NOW, POLICY)[0].digest == "far"


def test_an_adapter_goes_where_it_need_not_be_fetched() -> None:
    lacks, has = WorkerView("a", COSTS, absent={"rare"}), WorkerView("b", COSTS)
    assert chosen(plan(view([("rare", "t", 1, 1000)], [lacks, has]), NOW, POLICY)) == [("b", "rare", 1)]
    assert chosen(plan(view([("rare@auto", "t", 1, 1000)], [lacks, has]), NOW, POLICY)) == [("b", "rare@auto", 1)]
    assert chosen(plan(view([("rare", "t", 1, 1000)], [lacks]), NOW, POLICY)) == [("a", "rare", 1)], "where nobody has it, it is fetched"


def test_a_rare_adapter_goes_where_it_is_warm() -> None:
    workers = [worker(f"w{i:02}") for i in range(40)] + [worker("z", loaded=["rare"])]
    assert chosen(plan(view([("rare", "t", 1, 1000)], workers), NOW, POLICY)) == [("z", "rare", 1)]


def test_what_a_worker_on_it_can_take_is_left_to_it_and_what_it_cannot_spreads() -> None:
    workers = [worker("w1", ("a", 4)), worker("w2")]
    assert chosen(plan(view([("a", "t", 4, 60_000)], workers), NOW, POLICY)) == [("w1", "a", 4)]
    spread = chosen(plan(view([("a", "t", 16, 0)], workers), NOW, POLICY))
    assert {(w, n) for w, _, n in spread} == {("w1", 4), ("w2", 8)}


def test_idle_workers_share_a_group_when_nothing_else_waits() -> None:
    dispatches = chosen(plan(view([("a", "t", 8, 0)], [worker("w1"), worker("w2")]), NOW, POLICY))
    assert sorted(dispatches) == [("w1", "a", 4), ("w2", "a", 4)]


def test_a_batch_takes_no_longer_than_it_is_meant_to() -> None:
    (first, *_) = plan(view([("a", "t", 100, 0)], [worker()]), NOW, replace(POLICY, batch_ms=4 * COSTS.job_ms(WORK), rows_per_width=2.0))
    assert first.jobs == 4
    unmeasured = WorkerView("w", Costs(8))
    (first, *_) = plan(view([("a", "t", 100, 0)], [unmeasured]), NOW, replace(POLICY, batch_ms=1, rows_per_width=2.0))
    assert first.jobs == 16, "what nothing is known of is not judged"


def test_all_lanes_of_an_adapter_are_the_same_adapter_and_a_batch_is_of_one_lane() -> None:
    busy = worker("w", ("a", 2), ("b", 1))
    seen = view([("a", "t", 8, 90_000), ("a@auto", "t", 2, 1_000), ("c", "t", 8, 1_500)], [busy])
    assert chosen(plan(seen, NOW, POLICY)) == [("w", "a@auto", 2)], "it joins what a worker has in hand, and what is due later does not"
    calm = view([("a", "t", 3, 90_000), ("a@auto", "u", 2, 60_000)], [busy])
    assert chosen(plan(calm, NOW, POLICY)) == [("w", "a@auto", 2), ("w", "a", 3)]
    idle = view([("a", "t", 2, 10_000), ("a@auto", "t", 2, 11_000), ("b", "t", 2, 12_000), ("c", "t", 2, 13_000)], [worker()])
    assert chosen(plan(idle, NOW, POLICY)) == [("w", "a", 2), ("w", "a@auto", 2), ("w", "b", 2)], "together they take one hand"
    workers = [worker(f"w{i:02}") for i in range(40)] + [worker("z", loaded=["a"])]
    assert chosen(plan(view([("a@auto", "t", 1, 1000)], workers), NOW, POLICY)) == [("z", "a@auto", 1)], "it is warm there"


SLOW = Costs(8, COSTS.switch_ms, 100.0, {1: 100.0, 8: 170.0}, measured=True)
"""All of it takes ten times as long."""


def test_of_idle_workers_the_fastest_come_first_and_the_slow_take_what_the_others_would_end_later() -> None:
    fast, slow = worker("z"), [worker(f"a{i}", costs=SLOW) for i in range(9)]
    assert chosen(plan(view([("a", "t", 1, 1_000)], [*slow, fast]), NOW, POLICY)) == [("z", "a", 1)]
    many = [(f"d{i:02}", "t", 8, 1_000.0 + i) for i in range(12)]
    taken = {digest: name for name, digest, _ in chosen(plan(view(many, [*slow, fast]), NOW, POLICY))}
    assert [taken.pop(digest) for digest in ("d00", "d01")] == ["z", "z"], "what is due first ends soonest there"
    assert sorted(taken) == [f"d{i:02}" for i in range(6, 12)], "it will have ended four more before a slow one has half a batch"


def test_a_slow_worker_leaves_alone_what_a_fast_one_will_end_sooner_and_only_that() -> None:
    slow, busy, soon = worker("s", costs=SLOW), worker("f", ("a", 4), ("b", 2)), ("rare", "t", 2, 1_000)
    assert plan(view([soon], [slow, busy]), NOW, POLICY) == [], "a hand will be free before long"
    assert chosen(plan(view([("rare", "t", 2, 60_000)], [slow, busy]), NOW, POLICY)) == [("s", "rare", 2)], "not while jobs join"
    assert chosen(plan(view([soon], [slow, worker("f", ("a", 60), ("b", 60))]), NOW, POLICY)) == [("s", "rare", 2)]
    assert chosen(plan(view([("rare", "t", 2, -60_000)], [slow, busy]), NOW, POLICY)) == [("s", "rare", 2)], "now everybody works"
    others = [(f"x{i}", "t", 8, 500.0 + i) for i in range(9)]
    assert chosen(plan(view([soon, *others], [slow, busy]), NOW, POLICY)) == [("s", "x5", 8)], "of so many it takes some"
    assert chosen(plan(view([soon], [WorkerView("s", Costs(8)), busy]), NOW, POLICY)) == [("s", "rare", 2)], "its speed is not known"


def test_jobs_do_not_join_a_slow_worker_where_a_fast_one_would_end_them_sooner() -> None:
    at_slow = worker("s", ("a", 2), costs=SLOW)
    for due in (1_000, 90_000):
        assert chosen(plan(view([("a", "t", 2, due)], [at_slow, worker("f")]), NOW, POLICY)) == [("f", "a", 2)]
        assert chosen(plan(view([("a", "t", 2, due)], [at_slow]), NOW, POLICY)) == [("s", "a", 2)]


def test_whose_jobs_of_an_adapter_are_due_first_goes_first_whatever_it_was_served() -> None:
    served = {"urgent": 1e6}
    urgent, bulk = ("a", "urgent", 3, 5_000), ("a", "bulk", 400, 3_600_000)
    (first, *_) = plan(view([bulk, urgent], [worker()], served), NOW, POLICY)
    assert first.takes == (("bulk", 5), ("urgent", 3))
    (first, *_) = plan(view([bulk, ("a", "urgent", 9, 5_000)], [worker()], served), NOW, POLICY)
    assert first.takes == (("urgent", 8),)
    (first, *_) = plan(view([bulk, ("a", "urgent", 5, 5_000)], [worker("w", ("a", 2), ("b", 2))], served), NOW, POLICY)
    assert first.takes == (("urgent", 4),), "there is room for four"
    (first, *_) = plan(view([bulk, urgent, ("b", "flood", FLOOD, 0)], [worker()], {"urgent": 1_000.0}), NOW, POLICY)
    assert first.takes == (("bulk", 5), ("urgent", 3)), "somebody else's flood changes nothing between them"


def test_tenants_of_one_adapter_that_flood_or_are_due_alike_share_a_batch_the_least_served_first() -> None:
    for groups in ([("a", "x", 9, 0.0), ("a", "y", 9, 0.0)], [("a", "x", FLOOD, 5_000.0), ("a", "y", FLOOD, 0.0)]):
        (first, *_) = plan(view(groups, [worker()]), NOW + 2 * POLICY.flood_ms, POLICY)
        assert first.takes == (("x", 4), ("y", 4))
        (first, *_) = plan(view(groups, [worker()], {"x": 4 * WORK.tokens}), NOW + 2 * POLICY.flood_ms, POLICY)
        assert first.takes == (("x", 2), ("y", 6))


FLOOD = 100_000  # jobs that take all workers far longer than Policy.flood_ms


def test_a_flood_comes_after_those_who_do_not_flood_however_urgent_it_is() -> None:
    groups = [("a", "flood", FLOOD, -60_000), ("b", "small", 1, 120_000)]
    assert chosen(plan(view(groups, [worker()]), NOW, POLICY))[0] == ("w", "b", 1)


def test_a_flood_leaves_room_for_others_and_does_not_go_with_them() -> None:
    groups = [("a", "flood", FLOOD, 0)]
    both = [*groups, ("b", "flood", FLOOD, 0)]
    beside = view(both, [worker()])
    assert [d.jobs for d in plan(beside, NOW, POLICY)] == [4], "one hand is for others, and so is most of the width"
    assert [d.jobs for d in plan(beside, NOW + POLICY.flood_ms + 1, POLICY)] == [8, 8], "nobody else has been there for long"
    seen = view([*groups, ("a", "small", 3, 60_000)], [worker("w", ("a", 2), ("b", 2))])
    assert plan(seen, NOW, POLICY)[0].takes == (("small", 3),)


@pytest.mark.parametrize("flood_due", [3_600_000, -1_000], ids=["not due for long", "overdue"])
def test_a_floods_own_jobs_of_other_adapters_get_their_turn_when_they_are_nearly_due(flood_due: int) -> None:
    """Also where nobody else is there: what floods is joined for as long as nothing of its own waits that is due."""
    now, since, policy = NOW + POLICY.flood_ms + 1, POLICY.flood_ms + 1, replace(POLICY, lead_ms=4 * COSTS.job_ms(WORK))
    for due, dispatched in ((60_000, []), (1_000, [("w", "b", 1)])):
        seen = view([("a", "t", FLOOD, flood_due + since), ("b", "t", 1, due + since)], [worker("w", ("a", 8))])
        seen.groups.take("a", "t", 1, now)  # it has just had a turn
        assert chosen(plan(seen, now, policy)) == dispatched


def test_who_grows_into_a_flood_keeps_no_room_for_what_it_was_before() -> None:
    index = Groups(Scale(POLICY.patience_ms, POLICY.flood_ms, COSTS, WORK, 1))
    index.put("a", "flood", 1, NOW, NOW)
    assert not index.alone(NOW - POLICY.flood_ms)
    index.put("a", "flood", FLOOD, NOW, NOW)
    assert index.alone(NOW - POLICY.flood_ms)
    assert [d.jobs for d in plan(View(index, Roster([worker()])), NOW, POLICY)] == [8]
    index.put("b", "small", 1, NOW, NOW)
    index.put("a", "flood", FLOOD + 1, NOW, NOW)
    assert not index.alone(NOW + 1), "it waits"
    index.put("b", "small", 0, NOW, NOW)
    assert not index.alone(NOW), "it was there"
    assert index.alone(NOW + 1)


def test_who_has_been_there_is_remembered_for_as_long_as_it_counts() -> None:
    index = Groups(Scale(POLICY.patience_ms, POLICY.flood_ms, COSTS, WORK, 1))
    for n in range(1_000):
        index.put("a", f"t{n}", 1, NOW, NOW + n * POLICY.flood_ms / 10)
        index.put("a", f"t{n}", 0, NOW, NOW + n * POLICY.flood_ms / 10)
    assert list(index._steady) == [f"t{n}" for n in range(989, 1_000)]


def test_nobody_takes_a_flooding_tenants_share() -> None:
    groups = [("a", "flood", FLOOD, 120_000), ("b", "small", 100, 0)]
    ahead = plan(view(groups, [worker()], {"small": POLICY.slack_tokens + 10_000}), NOW, POLICY)
    assert {d.digest for d in ahead} == {"a"}
    near = plan(view(groups, [worker()], {"small": POLICY.slack_tokens - 1}), NOW, POLICY)
    assert near[0].digest == "b"


def test_who_has_had_its_share_is_held_back_also_within_a_plan_and_where_it_would_join() -> None:
    flood, served = ("a", "flood", FLOOD, 120_000), {"small": POLICY.slack_tokens - 1}
    both = view([flood, ("b", "small", 8, 0), ("c", "small", 8, 1_000)], [worker("w1"), worker("w2")], served)
    assert [d.digest for d in plan(both, NOW, POLICY)] == ["b", "a"], "with these eight it has had too much"
    ahead = {"small": POLICY.slack_tokens + 10_000}
    in_hand = worker("w", ("b", 2))
    assert plan(view([flood, ("b", "small", 3, 0)], [in_hand], ahead), NOW, POLICY) == []
    assert chosen(plan(view([flood, ("b", "small", 3, 0)], [in_hand]), NOW, POLICY)) == [("w", "b", 3)]


def test_where_others_have_jobs_everywhere_only_the_slowest_of_many_workers_goes_on_with_a_flood() -> None:
    beside = Held("b0", "b", 1, tenants=("small",)), Held("b1", "a", 1, tenants=("flood",))
    for many, takes in ((8, [("w7", "a", 4)]), (4, [("w3", "a", 4)]), (2, [("w0", "a", 2), ("w1", "a", 2)])):
        seen = view([("a", "flood", FLOOD, 0)], [WorkerView(f"w{n}", COSTS, beside) for n in range(many)])
        assert sorted(chosen(plan(seen, NOW, POLICY))) == takes


def test_two_floods_share_by_tokens_and_a_deadline_buys_no_more() -> None:
    served = {"pushy": 0.0, "calm": 0.0}
    for _ in range(400):
        groups = [("a", "pushy", FLOOD, -100_000), ("b", "calm", FLOOD, 100_000)]
        (dispatch, *_) = plan(view(groups, [worker()], served), NOW, POLICY)
        for tenant, jobs in dispatch.takes:
            served[tenant] += jobs * WORK.tokens
    assert abs(served["pushy"] - served["calm"]) <= POLICY.slack_tokens + 8 * WORK.tokens


def test_without_a_flood_shares_do_not_narrow_batches() -> None:
    groups = [("a", "heavy", 8, 0), ("b", "light", 1, 60_000)]
    assert plan(view(groups, [worker()], {"heavy": 1e9}), NOW, POLICY)[0].digest == "a"


def test_a_flooded_adapter_lets_others_of_its_tenant_have_a_turn() -> None:
    seen = view([("flood", "t", FLOOD, 120_000)], [worker()])
    seen.groups.take("flood", "t", 8, NOW)
    seen.groups.put("rare", "t", 1, NOW + 110_000, NOW - 10_000)
    assert plan(seen, NOW, POLICY)[0].digest == "rare"


names = st.sampled_from("abcdef")
queued = names | st.sampled_from(["a@auto", "b@auto"])
groups_st = st.lists(
    st.tuples(queued, st.sampled_from("xyz"), st.integers(0, 40) | st.just(FLOOD), st.integers(-(10**6), 10**6)),
    max_size=18,
    unique_by=lambda g: g[:2],
)
workers_st = st.lists(
    st.builds(
        lambda name, held, warm, costs: worker(name, *held, hot=warm[:1], loaded=warm, costs=costs),
        st.sampled_from(["w1", "w2", "w3", "w4"]),
        st.lists(st.tuples(names, st.integers(1, 8)), max_size=3),
        st.lists(names, max_size=3, unique=True),
        st.sampled_from([COSTS, SLOW]),
    ),
    max_size=4,
    unique_by=lambda w: w.name,
)
served_st = st.dictionaries(st.sampled_from("xyz"), st.floats(0, 1e6))


def content(index: Groups) -> object:
    tenants = {name: (t.jobs, t.floods, t.served, t.head) for name, t in index.tenants.items()}
    return tenants, sorted((g.digest, g.tenant.name, g.jobs, g.due, g.turn, g.rank) for g in index), len(index), index.jobs


@settings(max_examples=400, deadline=None)
@given(groups_st, workers_st, served_st)
def test_any_plan_can_be_carried_out_and_leaves_no_worker_idle(
    groups: list[tuple[str, str, int, float]], workers: list[WorkerView], served: dict[str, float]
) -> None:
    seen = view(groups, workers, served)
    before = content(seen.groups)
    dispatches = plan(seen, NOW, POLICY)
    assert content(seen.groups) == before, "the view is left as it was"
    assert plan(seen, NOW, POLICY) == dispatches
    assert plan(view(reversed(groups), reversed(workers), served), NOW, POLICY) == dispatches
    taken: Counter[tuple[str, str]] = Counter()
    load = {w.name: sum(h.jobs for h in w.held) for w in workers}
    hands = {w.name: {h.digest for h in w.held} for w in workers}
    more: dict[str, set[str]] = defaultdict(set)
    while dispatches:
        for d in dispatches:
            assert 0 < d.jobs <= 8
            adapter = adapter_of(d.digest)
            if adapter in hands[d.worker] | more[d.worker]:
                assert load[d.worker] + d.jobs <= 8, "what joins has a place"
            else:
                more[d.worker].add(adapter)
            load[d.worker] += d.jobs
            for tenant, n in d.takes:
                taken[d.digest, tenant] += n
        assert not any(d.more for d in dispatches[:-1])
        carry_out(seen, dispatches)
        dispatches = plan(seen, NOW, POLICY) if dispatches[-1].more else []
    jobs = {(digest, tenant): n for digest, tenant, n, _ in groups}
    assert all(n <= jobs[key] for key, n in taken.items())
    assert all(len(hands[name] | new) <= 2 for name, new in more.items() if new)
    fastest = min((w.costs.pace for w in workers), default=0.0)
    if any(load[w.name] == 0 for w in workers if w.costs.pace == fastest):
        assert sum(taken.values()) == sum(jobs.values())


def carry_out(seen: View, dispatches: Iterable[Dispatch]) -> None:
    for d in dispatches:
        there = seen.roster.workers[d.worker]
        there.held = (*there.held, Held(f"n{len(there.held)}", adapter_of(d.digest), d.jobs))
        seen.roster.put(there)
        for tenant, n in d.takes:
            seen.groups.take(d.digest, tenant, n, NOW)
            seen.groups.charge(tenant, n * WORK.tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(queued, st.sampled_from("xyz"), st.integers(0, 40) | st.just(FLOOD), st.integers(0, 10**6)), max_size=60))
def test_the_index_is_what_it_would_be_if_made_anew(changes: list[tuple[str, str, int, int]]) -> None:
    """However groups came and went, ranks, heads and floods depend on what there is only."""
    index = view([], []).groups
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for digest, tenant, jobs, due in changes:
        index.put(digest, tenant, jobs, NOW + due, NOW)
        last[digest, tenant] = (jobs, due)
    anew = view([(d, t, jobs, due) for (d, t), (jobs, due) in last.items()], []).groups
    assert content(index) == content(anew)
    for floods in (False, True):
        ranks = [g.rank for g in index.by_rank(floods, float("inf"))]
        assert ranks == sorted(ranks)
        assert len(ranks) == sum(1 for g in index if g.tenant.floods == floods)
