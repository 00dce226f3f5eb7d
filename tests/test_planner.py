"""The planner's rules, on views made by hand and by Hypothesis; and what follows from them over time, in a small simulation."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard_scheduler.planner import TOKENS_PER_JOB, Dispatch, GroupView, Policy, View, WorkerView, plan

NOW = 1_000_000
POLICY = Policy(quantum_ms=6_000, patience_ms=20_000, slack_tokens=4_000, rows_per_width=1.0)


def group(digest: str, tenant: str = "t", jobs: int = 100, due: int = NOW + 60_000, since: int = NOW - 1_000) -> GroupView:
    return GroupView(digest, tenant, jobs, due, since)


def worker(name: str = "w", outstanding: int = 0, digest: str | None = None, stay_since: int = NOW) -> WorkerView:
    return WorkerView(name, 8, outstanding, digest, stay_since)


def test_an_idle_worker_gets_a_batch_to_run_and_one_on_deck() -> None:
    dispatches = plan(View((group("a"),), (worker(),)), NOW, POLICY)
    assert [(d.worker, d.digest, d.takes) for d in dispatches] == [("w", "a", (("t", 8),))] * 2


def test_nothing_is_planned_without_room_jobs_or_workers() -> None:
    assert plan(View((group("a"),), (worker(outstanding=2),)), NOW, POLICY) == []
    assert plan(View((), (worker(),)), NOW, POLICY) == []
    assert plan(View((group("a"),), ()), NOW, POLICY) == []


def test_every_worker_gets_its_first_batch_before_anybody_a_second() -> None:
    dispatches = plan(View((group("a", jobs=16),), (worker("w1"), worker("w2"))), NOW, POLICY)
    assert [d.worker for d in dispatches] == ["w1", "w2"]


def test_stays_on_its_adapter_within_the_quantum_and_leaves_it_after() -> None:
    groups = (group("a", due=NOW + 90_000), group("b", due=NOW + 10_000))
    stays = plan(View(groups, (worker(outstanding=1, digest="a", stay_since=NOW - 5_999),)), NOW, POLICY)
    leaves = plan(View(groups, (worker(outstanding=1, digest="a", stay_since=NOW - 6_000),)), NOW, POLICY)
    assert [d.digest for d in stays] == ["a"]
    assert [d.digest for d in leaves] == ["b"]


def test_stays_for_ever_when_nobody_else_waits() -> None:
    (dispatch,) = plan(View((group("a"),), (worker(outstanding=1, digest="a", stay_since=0),)), NOW, POLICY)
    assert dispatch.digest == "a"


def test_the_most_due_group_is_next_and_patience_caps_a_far_due_time() -> None:
    urgent, flood = group("urgent", due=NOW + 2_000), group("flood", due=NOW + 50_000)
    (first, _) = plan(View((urgent, flood), (worker(),)), NOW, replace(POLICY, quantum_ms=1))
    assert first.digest == "urgent"
    patient = group("patient", jobs=1, due=NOW + 3_600_000, since=NOW - 25_000)
    served = replace(group("flood", due=NOW - 100_000, since=NOW - 1_000), served_before=True)
    (first, _) = plan(View((patient, served), (worker(),)), NOW, POLICY)
    assert first.digest == "patient"


def test_a_tenant_far_ahead_of_another_waits_and_one_within_the_slack_does_not() -> None:
    groups = (group("a", "greedy", due=NOW), group("b", "modest"))
    ahead = plan(View(groups, (worker(),), {"greedy": 9_000.0, "modest": 0.0}), NOW, POLICY)
    assert {d.digest for d in ahead} == {"b"}
    near = plan(View(groups, (worker(),), {"greedy": 1_000.0, "modest": 0.0}), NOW, POLICY)
    assert near[0].digest == "a"


def test_a_deadline_buys_no_more_than_the_share() -> None:
    groups = (group("a", "pushy", due=NOW + 1), group("b", "calm"))
    served = {"pushy": 0.0, "calm": 0.0}
    tokens: Counter[str] = Counter()
    for _ in range(60):
        for dispatch in plan(View(groups, (worker(outstanding=1),), served), NOW, POLICY):
            for tenant, jobs in dispatch.takes:
                served[tenant] += jobs * TOKENS_PER_JOB
                tokens[tenant] += jobs
    assert abs(tokens["pushy"] - tokens["calm"]) * TOKENS_PER_JOB <= POLICY.slack_tokens + 8 * TOKENS_PER_JOB


def test_tenants_of_one_adapter_share_a_batch() -> None:
    (dispatch, _) = plan(View((group("a", "x"), group("a", "y")), (worker(),)), NOW, POLICY)
    assert dispatch.takes == (("x", 4), ("y", 4))


def test_what_another_worker_can_finish_is_left_to_it() -> None:
    groups = (group("a", jobs=3, due=NOW), group("b", jobs=3, due=NOW + 50_000))
    workers = (worker("w1", outstanding=1, digest="a"), worker("w2"))
    dispatches = plan(View(groups, workers), NOW, POLICY)
    assert {(d.worker, d.digest) for d in dispatches} == {("w2", "b"), ("w1", "a")}


names = st.sampled_from("abcdef")
groups_st = st.lists(
    st.builds(
        GroupView,
        digest=names,
        tenant=st.sampled_from("xyz"),
        jobs=st.integers(0, 40),
        due=st.integers(NOW - 10**6, NOW + 10**6),
        since=st.integers(NOW - 10**6, NOW),
        served_before=st.booleans(),
    ),
    max_size=18,
    unique_by=lambda g: (g.digest, g.tenant),
)
workers_st = st.lists(
    st.builds(
        WorkerView,
        name=st.sampled_from(["w1", "w2", "w3", "w4"]),
        width=st.integers(1, 16),
        outstanding=st.integers(0, 3),
        digest=st.none() | names,
        stay_since=st.integers(NOW - 20_000, NOW),
    ),
    max_size=4,
    unique_by=lambda w: w.name,
)
served_st = st.dictionaries(st.sampled_from("xyz"), st.floats(0, 1e6))


@settings(max_examples=400, deadline=None)
@given(groups_st, workers_st, served_st)
def test_any_plan_can_be_carried_out_and_leaves_no_worker_idle(
    groups: list[GroupView], workers: list[WorkerView], served: dict[str, float]
) -> None:
    view = View(tuple(groups), tuple(workers), served)
    dispatches = plan(view, NOW, POLICY)
    assert plan(view, NOW, POLICY) == dispatches
    assert plan(View(tuple(reversed(groups)), tuple(reversed(workers)), served), NOW, POLICY) == dispatches
    taken: Counter[tuple[str, str]] = Counter()
    given_to: Counter[str] = Counter()
    rows = {w.name: int(-(-w.width * POLICY.rows_per_width // 1)) for w in workers}
    for d in dispatches:
        assert 0 < sum(n for _, n in d.takes) <= rows[d.worker]
        given_to[d.worker] += 1
        for tenant, n in d.takes:
            taken[d.digest, tenant] += n
    jobs = {(g.digest, g.tenant): g.jobs for g in groups}
    assert all(n <= jobs[key] for key, n in taken.items())
    for w in workers:
        assert w.outstanding + given_to[w.name] <= max(w.outstanding, POLICY.outstanding)
    if any(w.outstanding + given_to[w.name] == 0 for w in workers):
        assert sum(taken.values()) == sum(jobs.values())


class Yard:
    """One worker, batches of a fixed time, the real planner: enough to see who waits how long."""

    BATCH_MS = 1_000

    def __init__(self, jobs: dict[tuple[str, str], int]) -> None:
        self.jobs = dict(jobs)
        self.now = NOW
        self.since = dict.fromkeys(jobs, (NOW, False))
        self.enqueued = dict.fromkeys(jobs, NOW)
        self.stay: tuple[str | None, int] = (None, NOW)
        self.served: dict[str, float] = defaultdict(float)
        self.log: list[tuple[int, Dispatch]] = []

    def put(self, digest: str, tenant: str, jobs: int) -> None:
        self.jobs[digest, tenant] = jobs
        self.since[digest, tenant] = (self.now, False)
        self.enqueued[digest, tenant] = self.now

    def run(self, batches: int) -> None:
        for _ in range(batches):
            groups = tuple(
                GroupView(d, t, n, self.enqueued[d, t] + 120_000, *self.since[d, t]) for (d, t), n in sorted(self.jobs.items()) if n
            )
            view = View(groups, (WorkerView("w", 16, 1, *self.stay),), dict(self.served))
            (dispatch,) = plan(view, self.now, POLICY)
            self.log.append((self.now, dispatch))
            if dispatch.digest != self.stay[0]:
                self.stay = (dispatch.digest, self.now)
            for tenant, n in dispatch.takes:
                self.jobs[dispatch.digest, tenant] -= n
                self.since[dispatch.digest, tenant] = (self.now, True)
                self.served[tenant] += n * TOKENS_PER_JOB
            self.now += self.BATCH_MS


def test_a_rare_adapter_is_served_in_bounded_time_however_deep_the_flood() -> None:
    yard = Yard({(f"flood{i}", "t"): 10**6 for i in range(4)})
    yard.run(200)
    yard.put("rare", "t", 1)
    asked = yard.now
    yard.run(60)
    served = next(at for at, d in yard.log if d.digest == "rare")
    # Its patience, then at most one turn of each of the others that waited longer, then the stay that is going on.
    assert served - asked <= POLICY.patience_ms + 4 * (POLICY.quantum_ms + yard.BATCH_MS)


def test_a_newcomer_tenant_gets_its_half_while_another_floods() -> None:
    yard = Yard({("a", "flood"): 10**6})
    yard.run(100)
    yard.served["small"] = yard.served["flood"]  # what the ledger's lift does for a newcomer
    yard.put("b", "small", 1_000)
    before = dict(yard.served)
    yard.run(40)
    gained = {t: yard.served[t] - before.get(t, 0.0) for t in ("flood", "small")}
    assert abs(gained["flood"] - gained["small"]) <= POLICY.slack_tokens + 16 * TOKENS_PER_JOB * 7


def test_switches_are_few_while_several_adapters_flood() -> None:
    yard = Yard({(f"a{i}", "t"): 10**6 for i in range(8)})
    yard.run(240)
    digests = [d.digest for _, d in yard.log]
    switches = sum(a != b for a, b in pairwise(digests))
    assert switches <= 240 * yard.BATCH_MS / POLICY.quantum_ms + 8
    assert set(digests) == {f"a{i}" for i in range(8)}
