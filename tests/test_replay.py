"""`lorayard replay`: what a recording has of a fleet's jobs, what is made of it, and how the command says so."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from api_support import ANSWER, Api, job
from test_cli import Cli, fails

from lorayard.errors import BadRequest, NotFound, SetupError
from lorayard.ledger.records import End
from lorayard_scheduler import charts, recording
from lorayard_scheduler.recording import Arrival, Recording
from lorayard_scheduler.traces import Mix

COSTS = {"switch_ms": {"hot": 0, "loaded": 20, "disk": 50}, "prefill_tokens_per_s": 1000, "step_ms": {"1": 10, "4": 16}}
START = 1_700_000_000_000.0


@pytest.fixture
def command(api: Api, tmp_path: Path) -> Cli:
    return Cli(api, tmp_path)


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"w1": {"width": 4, "costs": COSTS}}))
    return path


def end(api: Api, tenant: str, count: int, *, prompt: int, cached: int, output: int) -> None:
    """As a worker would, the tenant's most due jobs: with so many tokens, of which reading took 30 ms and writing 50."""
    ids = api.run(tenant, count, finish=False)
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": {"cached_tokens": cached}}
    outcome = msgspec.json.encode({"response": ANSWER | {"usage": usage}, "timings_ms": {"prefill": 30, "decode": 50}})
    (flight,) = api.ledger.snapshot().in_flight
    fence = int(str(api.ledger.client.hget(f"ly:{{{api.ledger.pool}}}:batch:{flight.batch}", "f"), "ascii"))  # type: ignore[arg-type]
    assert api.ledger.finish(flight.batch, fence, [End(f"{tenant}/{i}", "succeeded", outcome) for i in ids]) == ["stored"] * count


def recorded(api: Api, **options: Any) -> Recording:
    return recording.of_fleet(api.ledger, ["acme", "globex"], api.settings, **{"hours": 1.0, "most": 1000} | options)


def load(jobs: int, adapters: int = 6, gap_ms: float = 30.0) -> Recording:
    rows = [Arrival(START + gap_ms * i, 40, 5 + i % 7, f"a{i * i % adapters}", f"t{i % 2}", 60_000.0, 10) for i in range(jobs)]
    return Recording(rows, [])


# -- what is recorded ---------------------------------------------------------------------------------------------------------------------


def test_what_has_ended_is_as_long_as_it_was_and_what_has_not_as_the_others(api: Api) -> None:
    api.post(*(job(priority="high") for _ in range(3)))
    end(api, "acme", 3, prompt=100, cached=60, output=7)
    api.post(job(), who="globex")
    end(api, "globex", 1, prompt=20, cached=0, output=1)
    api.post(job(deadline_s=30), job(not_before_s=0.05, deadline_s=20), job(not_before_s=86_400))
    time.sleep(0.1)  # by the server's own clock
    found = recorded(api)
    assert [(a.prompt, a.output, a.cached, a.tenant) for a in found.arrivals[:4]] == [(100, 7, 60, "acme")] * 3 + [(20, 1, 0, "globex")]
    assert [a.target for a in found.arrivals] == [10_000] * 3 + [120_000, 30_000, 19_950]
    assert [(a.prompt, a.output, a.waited) for a in found.arrivals[4:]] == [(100, 7, None)] * 2, "as its tenant's others of the base model"
    assert found.arrivals[5].at - found.arrivals[4].at >= 50, "it comes when it may be run"
    assert {a.adapter for a in found.arrivals} == {"base"}
    assert found.notes == ["left out: 1 job that may not begin yet", "not ended yet, and taken to be as long as others of their adapter: 2"]
    assert recorded(api, most=1).notes[-1].endswith(": 1"), "of those that are replayed"
    for arrival in found.arrivals[:4]:
        assert arrival.total is not None
        assert arrival.waited == pytest.approx(max(0.0, arrival.total - 80), abs=0.01)


def test_what_waits_is_as_long_as_what_is_most_like_it() -> None:
    ended = [
        Arrival(START, tokens, 1, adapter, tenant, 1.0, total=9.0)
        for tokens, adapter, tenant in ((500, "a", "t"), (20, "a", "u"), (2, "b", "u"))
    ]
    waiting = [Arrival(START, 1, 1, adapter, tenant, 1.0) for adapter, tenant in (("a", "t"), ("a", "new"), ("new", "t"))]
    assert [job.prompt for job in recording._as_the_others(waiting, ended)] == [500, 260, 174]


def test_what_was_not_computed_is_left_out(api: Api) -> None:
    rows = api.post(job(), job())
    with pytest.raises(NotFound, match="--hours"):
        recorded(api)
    api.ledger.cancel("acme", [rows[0]["id"]])
    end(api, "acme", 1, prompt=9, cached=9, output=0)
    api.bury()
    found = recorded(api)
    assert [(a.prompt, a.cached, a.output) for a in found.arrivals] == [(9, 8, 1)], "at least a token is read and one written"
    assert found.notes == ["left out: 2 jobs without an answer"]


def test_only_the_newest_are_taken(api: Api) -> None:
    for prompt in (10, 20, 30, 40):
        api.post(job())
        end(api, "acme", 1, prompt=prompt, cached=0, output=1)
    assert [a.prompt for a in recorded(api, most=3).arrivals] == [20, 30, 40]
    with pytest.raises(NotFound):
        recorded(api, hours=-1.0)


# -- as a file ----------------------------------------------------------------------------------------------------------------------------


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    ended = load(3).arrivals[0]._replace(waited=12.5, total=80.0)
    found = Recording([ended, *load(20).arrivals[1:]], [])
    recording.write(found, tmp_path / "load.csv")
    assert recording.read(tmp_path / "load.csv", Mix()) == found
    with pytest.raises(SetupError, match="cannot write"):
        recording.write(found, tmp_path / "none" / "load.csv")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_published_trace_is_read_as_it_is(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "code.csv"
    path.write_text(
        mark + "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    )
    found = recording.read(path, Mix(adapters=1, tenants=1, targets_ms=((1.0, 5000.0),)))
    assert [(a.prompt, a.output, a.adapter, a.target) for a in found.arrivals] == [
        (4808, 10, "adapter000000", 5000),
        (3180, 8, "adapter000000", 5000),
    ]
    assert found.arrivals[1].at == pytest.approx(52)
    assert "drawn" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens,Adapter\n2023-11-16 18:17:03,5,x,a\n", r"load\.csv:2"),
        ("TIMESTAMP,ContextTokens,Adapter\n2023-11-16 18:17:03,5,a\n", "GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens,Adapter\n", "no arrivals"),
        ("a,b\n1,2\n", "no column TIMESTAMP"),
        *((f"TIMESTAMP,ContextTokens,GeneratedTokens,Adapter\n2023-11-16 18:17:03,{size},1,a\n", "tokens") for size in (-1, 10**26)),
        *((f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,{size}\n", r"load\.csv:2") for size in (-1, 10**26)),
        *(
            (f"TIMESTAMP,ContextTokens,GeneratedTokens,Adapter,{name}\n2023-11-16 18:17:03,5,1,a,{value}\n", "no number")
            for name in ("WaitTargetMs", "WaitedMs", "TotalMs", "CachedTokens")
            for value in ("nan", "inf", "-1", "1e300")
        ),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "load.csv"
    path.write_text(text)
    with pytest.raises(BadRequest, match=said):
        recording.read(path, Mix())
    with pytest.raises(BadRequest, match="cannot read"):
        recording.read(tmp_path / "none.csv", Mix())


def test_what_a_recording_is_to_the_simulator() -> None:
    trace = load(8, adapters=3).trace(speed=2.0)
    assert list(trace.arrivals) == [15.0 * i for i in range(8)]
    assert [trace.adapter_names[a] for a in trace.adapters] == [f"a{i * i % 3}" for i in range(8)]
    assert [trace.tenant_names[t] for t in trace.tenants] == ["t0", "t1"] * 4
    assert trace.shared == [10, 10]


# -- the command --------------------------------------------------------------------------------------------------------------------------


def answers(command: Cli, *options: str) -> dict[str, dict[str, Any]]:
    done = command("replay", "--json", *options)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["results"]}


def test_a_fleets_jobs_are_replayed(command: Cli, costs: Path, tmp_path: Path) -> None:
    command.api.post(*(job() for _ in range(12)))
    end(command.api, "acme", 12, prompt=50, cached=10, output=5)
    fails(command("replay"), "no worker", "--costs FILE", "lorayard bench costs")
    done = command("replay", "--costs", str(costs), "--record", str(tmp_path / "load.csv"))
    assert done.returncode == 0, done.stderr
    for words in ("12 jobs in ", " seconds: 1 adapter, 1 tenant; 1 worker", "as it ran", "simulated"):
        assert words in done.stdout
    found = answers(command, "--costs", str(costs))
    again = answers(command, "--costs", str(costs), "--trace", str(tmp_path / "load.csv"))
    assert found == again
    assert found["simulated"]["switches"] == 1
    assert found["as it ran"]["switches"] is None
    assert {row["jobs"] for row in found.values()} == {12}


def test_what_is_changed_changes_what_it_should(command: Cli, costs: Path, tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    recording.write(load(300), path)
    changes = ["--workers", "1", "--workers", "3", "--adapters-cached", "2", "--policy", "fcfs", "--policy", "lorayard", "--speed", "4"]
    found = answers(command, "--costs", str(costs), "--trace", str(path), *changes)
    assert set(found) == {
        "simulated",
        *(f"{who}{'' if n == 1 else f'{n} workers, '}2 cached, 4x the jobs" for n in (1, 3) for who in ("", "first come first served, ")),
    }
    ours, more = found["2 cached, 4x the jobs"], found["3 workers, 2 cached, 4x the jobs"]
    theirs = found["first come first served, 2 cached, 4x the jobs"]
    assert more["wait_s"]["p95"] < ours["wait_s"]["p95"] < theirs["wait_s"]["p95"]
    assert ours["switches"] < theirs["switches"]
    assert ours["loads"] > found["simulated"]["loads"] == 4, "two in memory are too few for four"
    assert answers(command, "--costs", str(costs), "--trace", str(path), "--policy", "all").keys() > {"LoRAX", "S-LoRA", "dLoRA"}


@pytest.mark.parametrize("kind", charts.KINDS)
def test_a_chart_is_drawn(command: Cli, costs: Path, tmp_path: Path, kind: str) -> None:
    path, chart = tmp_path / "load.csv", tmp_path / f"chart{kind}"
    recording.write(load(50), path)
    done = command("replay", "--costs", str(costs), "--trace", str(path), "--policy", "lorax", "--chart", str(chart))
    assert done.returncode == 0, done.stderr
    assert str(chart) in done.stdout.replace("\n", "")
    data = chart.read_bytes()
    assert data.startswith(b"\x89PNG") if kind == ".png" else b"<svg" in data
    if kind == ".svg":
        assert b"LoRAX" in data


def test_what_is_wrong_is_told_in_a_line(command: Cli, costs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(command("replay", "--policy", "lorx"), "did you mean 'lorax'", "s-lora")
    fails(command("replay", "--chart", "chart.pdf"), ".svg", ".png")
    fails(command("replay", "--chart", str(tmp_path / "none" / "chart.svg")), "no folder")
    fails(command("replay", "--trace", str(tmp_path / "none.csv")), "cannot read")
    recording.write(load(5), tmp_path / "load.csv")
    given = ["--trace", str(tmp_path / "load.csv"), "--costs"]
    fails(command("replay", *given, str(tmp_path / "none.json")), "cannot read")
    for text in ("{}", "[1]", '{"w": {"width": 4, "costs": {}}}', json.dumps({"w": {"width": 0, "costs": COSTS}}), "nonsense"):
        (tmp_path / "bad.json").write_text(text)
        fails(command("replay", *given, str(tmp_path / "bad.json")), "lorayard bench costs")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(command("replay", *given, str(costs), "--chart", str(tmp_path / "c.svg")), "lorayard[chart]")
