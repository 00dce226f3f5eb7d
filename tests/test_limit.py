"""The limit that the engine is measured against, worked out by hand; and the width that is taken from what was measured."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from benchmarks import limit, workloads
from hypothesis import given
from hypothesis import strategies as st

from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.costs import Costs, knee, measure


def test_shared_beginnings_count_once_and_last_tokens_each() -> None:
    assert limit.unique_tokens([[1, 2, 3]]) == 3
    assert limit.unique_tokens([[1, 2, 3], [1, 2, 4]]) == 4
    assert limit.unique_tokens([[1, 2, 3], [1, 2, 3]]) == 4, "an answer begins with what follows the last token of its own prompt"
    assert limit.unique_tokens([[1, 2], [1, 2, 3], [5]]) == 4


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12))
def test_what_is_shared_is_what_a_tree_of_the_prompts_shares(prompts: list[list[int]]) -> None:
    inner = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt))}
    ends = [tuple(prompt) for prompt in prompts]
    assert limit.unique_tokens(prompts) == len(inner) + len(ends) - len(inner & set(ends))


def test_steps_are_those_of_the_longest_first() -> None:
    assert limit.schedule([1, 1], 4) == []
    assert limit.schedule([4, 2, 3], 4) == [3, 2, 1]
    assert limit.schedule([3, 3, 5], 2) == [2, 2, 2, 2]
    assert sum(limit.schedule(range(1, 40), 7)) == sum(length - 1 for length in range(1, 40))


def test_the_limit_adds_up() -> None:
    rates = limit.Rates({256: 300.0, limit.CHUNK: 500.0}, {1: 10.0, 2: 16.0})
    assert rates.prompts(limit.CHUNK + 128) == 500 + 150
    assert rates.step(1) == 10
    prompt = list(range(256))
    assert limit.seconds([([prompt, [9] * 256], [2, 3])], rates, 8) == pytest.approx((500 + 16 + 10) / 1000)


def test_the_width_is_the_narrowest_that_is_nearly_as_fast_as_any() -> None:
    assert knee({1: 10.0, 2: 12.0, 4: 16.0, 8: 31.0, 16: 64.0}) == 8
    assert knee({1: 10.0, 2: 12.0, 4: 16.0, 8: 31.9, 16: 63.5}) == 4
    assert knee({1: 10.0}) == 1


def test_costs_follow_what_is_seen() -> None:
    costs = Costs()
    costs.saw_step(4, 0, 20.0)
    costs.saw_step(4, 0, 30.0)
    assert costs.step_ms == {4: pytest.approx(23.4, abs=0.01)}
    costs.saw_step(1, 8, 99.0)
    assert costs.prefill_tokens_per_s == 0, "a few tokens say nothing of the rate"
    costs.saw_step(2, 189, 901.0)
    assert costs.prefill_tokens_per_s == pytest.approx(200)
    costs.saw_switch("disk", 4.0)
    document = costs.document()
    assert document == {"prefill_tokens_per_s": 200.0, "step_ms": {"4": 23.4}, "switch_ms": {"hot": 0.0, "disk": 4.0}}


def test_a_stall_at_a_first_step_is_soon_forgotten() -> None:
    """A worker whose width is set has measured nothing."""
    for stalls_at in (0, 3):
        costs, random = Costs(300.0), Random(3)
        for step in range(300):
            rows = random.randint(1, 24)
            costs.saw_step(rows, 0, 3_000.0 if step == stalls_at else 10.0 + 3 * rows)
        assert len(costs.step_ms) >= 7
        assert all(ms < 1.5 * (10 + 3 * width) for width, ms in costs.step_ms.items()), costs.step_ms
        assert all(ms > (10 + 3 * width) / 1.5 for width, ms in costs.step_ms.items()), costs.step_ms


def test_a_width_that_was_not_measured_stalls_none_that_was() -> None:
    costs = Costs(300.0, {width: 10.0 + 3 * width for width in (1, 2, 4, 8, 12, 16, 24)})
    costs.saw_step(32, 0, 3_000.0)
    for _ in range(30):
        costs.saw_step(32, 0, 106.0)
    assert all(0.7 < ms / (10 + 3 * width) < 1.4 for width, ms in costs.step_ms.items()), costs.step_ms


def test_short_prompts_tell_how_fast_prompts_are_read_once_they_are_many() -> None:
    costs = Costs()
    for _ in range(5):
        assert costs.prefill_tokens_per_s == 0
        costs.saw_step(0, 15, 100.0)
    assert costs.prefill_tokens_per_s == pytest.approx(150)


def test_a_machine_that_stood_still_while_it_switched_is_not_taken_for_a_slow_one() -> None:
    costs = Costs()
    costs.saw_switch("disk", 4.0)
    costs.saw_switch("disk", 40_000.0)
    assert costs.switch_ms["disk"] == pytest.approx(5.2)


def test_calls_of_any_number_of_tokens_tell_how_fast_prompts_are_read() -> None:
    costs = Costs(100.0)
    for _ in range(5):
        costs.saw_step(0, 500_000, 100_000.0)
        assert 100 < costs.prefill_tokens_per_s <= 5_001


def test_what_was_measured_of_the_bare_model_gives_way_to_what_is_seen() -> None:
    costs = Costs(500.0, {1: 10.0, 8: 24.0, 16: 40.0})
    for _ in range(100):
        costs.saw_step(10, 0, 56.0)  # twice as long as it would be by these
    assert costs._step(10) == pytest.approx(56, rel=0.02)
    assert costs.step_ms[16] == pytest.approx(80, rel=0.05), "whatever makes one width slow makes its neighbours slow"
    assert 12 < costs.step_ms[1] < 20, "and those that are far from it less"
    for _ in range(100):
        costs.saw_step(1, 0, 12.0)
    assert costs.step_ms[1] == pytest.approx(12, rel=0.05)
    assert costs._step(10) == pytest.approx(56, rel=0.2), "a step of one says little of one of ten"
    for _ in range(50):
        costs.saw_step(0, 512, 1000.0)
        costs.saw_step(0, 64, 250.0)
    assert costs.prefill_tokens_per_s == pytest.approx(1000 * 576 / 1250, rel=0.02), "by what all of them took"
    known = costs.step_ms[1]
    costs.saw_step(1, 0, 60_000.0)
    assert costs.step_ms[1] < 1.1 * known, "a machine that stood still is not taken for a slow one"


def test_a_moment_without_cores_does_not_decide_about_the_width(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed, quiet = {1: 10.0, 2: 12.0, 4: 60.0}, {1: 11.0, 2: 12.0, 4: 16.0}
    passes = iter([disturbed, quiet])
    monkeypatch.setattr("lorayard_workers.llama.costs._pass", lambda *_: next(passes))
    model = Model(demo_gguf)
    costs, width = measure(model, Settings(n_ctx=1024), widest=16)
    model.close()
    assert costs.step_ms == {1: 10.0, 2: 12.0, 4: 16.0}
    assert width == 4


def test_what_warms_a_server_up_is_like_a_job_and_teaches_it_only_the_system_prompt() -> None:
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How far is it?"}
    for request, other in (
        ({"messages": [system, asked], "max_tokens": 4}, {"messages": [system, asked | {"content": "it? is far How"}], "max_tokens": 4}),
        ({"prompt": "one two three"}, {"prompt": "three two one"}),
    ):
        job = workloads.Job("a", request)
        assert job.warm_up == workloads.Job("a", other)


def test_costs_are_measured_before_the_first_job(demo_gguf: Path) -> None:
    model = Model(demo_gguf)
    costs, width = measure(model, Settings(n_ctx=1024), widest=16)
    model.close()
    assert width in costs.step_ms
    assert {1, 2, 4, 8} <= costs.step_ms.keys() <= {1, 2, 4, 8, 12}, "as many sequences as the cells hold at the depth that is measured"
    assert all(ms > 0 for ms in costs.step_ms.values())
    assert costs.prefill_tokens_per_s > 0
