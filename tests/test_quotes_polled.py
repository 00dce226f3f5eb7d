"""Quotes of jobs that have waited already, and of jobs that ask for longer or shorter answers than is usual."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from api_support import job
from benchmarks import eta
from simulation_support import COSTS
from yard_support import Yard, eventually, quoted

from lorayard_scheduler import traces
from lorayard_scheduler.forecasts import Forecaster, Seen
from lorayard_scheduler.groups import Groups
from lorayard_scheduler.lengths import Lengths
from lorayard_scheduler.planner import Policy as Planning
from lorayard_scheduler.planner import View
from lorayard_scheduler.quotes import Forecast, Situation
from lorayard_scheduler.roster import Roster
from lorayard_scheduler.simulator import Fleet, WorkerSpec

# -- time that has passed ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.8, 1.1])
def test_quotes_at_polls_come_true_too_also_of_jobs_whose_first_one_has_passed(load: float) -> None:
    rate = load * 3 * 1000 / (60 + 20 * 4.0)
    mix = traces.Mix(adapters=12, tenants=3, targets_ms=((0.2, 10_000.0), (0.8, 60_000.0)))
    trace = traces.build(traces.poisson(6_000, rate), [(60, 20), (20, 5), (100, 35)], mix)
    ours = eta.Quoted()
    outcome = Fleet(trace, [WorkerSpec(COSTS)] * 3, ours).run()
    judged = eta.judge_polls(ours, outcome, trace.arrivals[-1] / 4)
    assert 0.72 <= judged["eta_poll_coverage"] <= 0.92
    assert judged["eta_late_poll_coverage"] >= 0.6
    assert judged["eta_promises_broken"] <= 3


@pytest.mark.parametrize("kind", ["own", "turn", "late", "hosted", "free"])
def test_who_waits_for_what_was_predicted_to_be_over_is_not_put_off_tick_by_tick(kind: str) -> None:
    forecast, place = Forecast(0.0), Situation(kind, 600.0)
    promise, broken = forecast.quote(place).p80, 0
    for waited in range(0, 60_000, 250):
        left = forecast.quote(place.after(waited))
        assert left.p80 >= 0.3 * waited, "what took long takes longer"
        if waited > promise:
            broken, promise = broken + 1, waited + left.p80
    assert broken <= 9


def test_early_in_its_time_a_poll_says_what_the_first_quote_said() -> None:
    forecast = Forecast(0.0)
    first, later = (forecast.quote(place) for place in (Situation("own", 30_000.0), Situation("own", 25_000.0).after(5_000.0)))
    assert later.p80 + 5_000 == pytest.approx(first.p80, rel=0.1)


@pytest.mark.parametrize("kind", ["worker", "called"])
def test_what_a_worker_has_for_long_is_not_quoted_for_now(kind: str) -> None:
    forecast, place = Forecast(0.0), Situation(kind, 1_000.0)
    for elapsed in (5_000.0, 60_000.0, 3_600_000.0):
        quote = forecast.quote(place, elapsed, elapsed)
        assert 0.1 * elapsed < quote.median < quote.p80 < 5 * elapsed
        assert 0.05 < (quote.risk or 0) < 0.6


def test_polls_learn_from_polls_and_leave_what_first_quotes_learnt_alone() -> None:
    forecaster, view = Forecaster(), View(Groups(), Roster())
    for _ in range(50):
        forecaster.saw(Seen(Situation("own", 1_000.0), "a", 1_000.0, 500.0, (1_000.0, 1_500.0)))
    before = msgspec.json.decode(msgspec.json.encode(forecaster.make(view, 0.0, Planning(), ended=0)), type=Forecast)
    waited = Situation("own", 1_000.0).after(10_000.0)
    for _ in range(50):
        forecaster.saw(Seen(waited, "a", 2_000.0, 500.0, (5_000.0, 8_000.0)))
    after = forecaster.make(view, 1.0, Planning(), ended=0)
    assert after.services == before.services
    assert after.quote(Situation("own", 1_000.0)) == before.quote(Situation("own", 1_000.0))
    assert after.quote(waited).median == pytest.approx(2_000, rel=0.2)
    assert after.quote(waited).median < before.quote(waited).median


def test_a_poll_counts_the_time_that_a_job_has_waited_in_vain(yard: Yard) -> None:
    yard.hire("w")
    quoted(yard)
    yard.enqueue(40, "a", wait_ms=3_600_000)
    eventually(lambda: yard.ledger.outstanding("w"))
    (one,) = yard.enqueue(1, "a")
    first = eventually(lambda: yard.show(one)["eta"] and yard.left(one))
    begun, broken, promise, polls = time.monotonic(), 0, first["p80"], 0
    while (waited := 1000 * (time.monotonic() - begun)) < 8_000:  # nothing ends there
        time.sleep(0.2)
        polls += 1
        if waited > promise:
            broken, promise = broken + 1, waited + yard.left(one)["p80"]
    assert broken <= 4, f"of {polls}"
    assert yard.left(one)["p80"] > 2_500


# -- lengths -----------------------------------------------------------------------------------------------------------------------------


def test_lengths_are_learnt_by_adapter_and_by_what_was_asked_for() -> None:
    lengths = Lengths()
    assert lengths.expected("a", 500) == 0, "nobody knows"
    for _ in range(100):
        lengths.learn("a", 64, 10, 200.0)  # its answers end by themselves
        lengths.learn("b", 64, 64, 640.0)  # runs on until it is stopped
        lengths.learn("b", 8, 8, 80.0)
    assert lengths.expected("a", 64) == lengths.expected("a", 2_000) == pytest.approx(10)
    assert lengths.expected("a", 4) == 4
    assert lengths.expected("b", 8) == pytest.approx(8)
    assert lengths.expected("b", 2_000) == 2_000
    assert lengths.expected("b", 0) == pytest.approx(36, abs=3), "the usual one"
    assert lengths.expected("c", 0) == lengths.usual[""], "an adapter that nobody has seen"
    assert lengths.token_ms == pytest.approx(10, abs=4)


def test_quotes_are_sharper_where_jobs_ask_for_as_many_tokens_as_they_need() -> None:
    rate = 0.6 * 3 * 1000 / (60 + 40 * 4.0)
    trace = traces.build(traces.poisson(6_000, rate), [(60, 10), (60, 10), (60, 160), (60, 20)], traces.Mix(adapters=6))
    errors = {}
    for told in (False, True):
        ours = eta.Quoted(told=told)
        found = eta.rows(ours, Fleet(trace, [WorkerSpec(COSTS)] * 3, ours).run(), trace.arrivals[-1] / 4)
        assert 0.75 <= eta.judge(found)["eta_coverage"] <= 0.85
        errors[told] = sum(abs(row.took - row.median) for row in found) / len(found)
    assert errors[True] < 0.8 * errors[False]


def test_a_job_that_asks_for_a_longer_answer_is_quoted_longer(yard: Yard) -> None:
    yard.hire("w")

    def ask(most: int) -> dict[str, Any]:
        return quoted(yard, request=job()["request"] | {"max_tokens": most})

    row = ask(40)
    assert yard.show(row["id"])["max_tokens"] == 40
    yard.drain(row["id"])
    for most in [40, 400] * 4:
        row = ask(most)
        eventually(lambda: yard.ledger.outstanding("w"))
        yard.run(ms=most, response={"usage": {"completion_tokens": most}}, timings_ms={"decode": float(most)})
        time.sleep(0.6)  # else a forecast would tell of the first ten only
    quotes = []
    for most in (40, 400, 2_000):
        row = ask(most)
        quotes.append(row["eta"]["median_ms"] - yard.show(row["id"])["enqueued_ms"])
        yard.drain(row["id"])
    assert quotes[0] + 200 < quotes[1] < quotes[2] - 800


def test_a_forecast_of_a_release_with_other_bins_is_taken_without_its_histograms() -> None:
    other, place = Forecast(0.0, counts={"": [1.0] * 54, "own": [1.0] * 54}), Situation("own", 1_000.0)
    assert other.quote(place) == Forecast(0.0).quote(place)
    forecaster = Forecaster.going_on(other)
    for _ in range(20):
        forecaster.saw(Seen(place, "a", 2_000.0, 400.0, (900.0, 1_500.0)))
    assert forecaster.make(View(Groups(), Roster()), 0.0, Planning(), ended=0).quote(place).median == pytest.approx(2_000, rel=0.2)
