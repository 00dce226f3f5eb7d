"""The engine on the real model: batching, adapters, memory, order, and what it does with requests and files that are no good."""

from __future__ import annotations

import base64
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from llama_support import CHAT, alike, finish, item, outcomes, text, work, write_adapter
from structlog.testing import capture_logs

from lorayard.settings import Settings
from lorayard_workers.llama import contexts, embeddings, engine
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Context
from lorayard_workers.llama.engine import Engine
from lorayard_workers.llama.requests import EmbeddingRequest, Request
from lorayard_workers.runner import AdapterFile, Event, Outcome, Progress, Started, WorkItem

WEIGHTS = "exact_gguf"

QUESTIONS = [
    "Name a colour.",
    "What is the capital of France?",
    "How many legs has a spider, and why?",
    "Say hello.",
    "What is 2 plus 2?",
    "Why?",
]


@dataclass
class Bench:
    """An engine and all that it emitted."""

    engine: Engine
    events: list[Event]

    def run(self, batch: str, adapter: AdapterFile | None, *items: WorkItem) -> dict[str, Outcome]:
        """Submit one work and run to the end."""
        self.engine.submit(work(batch, adapter, *items))
        finish(self.engine)
        return outcomes(self.events)


@pytest.fixture
def bench(model: Model) -> Iterator[Callable[..., Bench]]:
    """Makes engines with small settings, and closes them."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        events: list[Event] = []
        settings = Settings(**({"n_ctx": 512, "width": 4, "prefill_tokens": 64, "contexts": 2, "adapters_loaded": 2} | options))
        made.append(Bench(Engine(model, settings, events.append), events))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"random{seed}.gguf", seed) for seed in range(5)]


def _scored(ref: str, index: int) -> WorkItem:
    return item(ref, QUESTIONS[index], logprobs=True, top_logprobs=2)


@pytest.fixture(scope="module")
def alone(model: Model, adapters: list[AdapterFile]) -> dict[str, Outcome]:
    """What the base and the first two adapters answer to each question when nothing runs beside it, by "name index"."""
    events: list[Event] = []
    engine = Engine(model, Settings(n_ctx=512, width=1, prefill_tokens=64), events.append)
    for name, adapter in {"base": None, "a": adapters[0], "b": adapters[1]}.items():
        for index in range(len(QUESTIONS)):
            engine.submit(work("alone", adapter, _scored(f"{name} {index}", index)))
            finish(engine)
    engine.close()
    return outcomes(events)


def test_a_batch_answers_what_each_job_alone_answers(bench: Callable[..., Bench], alone: dict[str, Outcome]) -> None:
    one = bench()
    done = one.run("b", None, *(_scored(f"base {index}", index) for index in range(len(QUESTIONS))))
    assert one.engine.counters.preemptions == 0, "nothing failed and was run again"
    assert [ref for ref in done if not alike(alone[ref], done[ref])] == []
    assert max(outcome.width for outcome in done.values()) == 4


def test_what_has_been_read_begins_while_the_rest_is_read(bench: Callable[..., Bench]) -> None:
    one = bench()
    begun: list[list[str]] = []

    def slowly(ref: str) -> None:
        one.engine.step()
        begun.append([ref for event in one.events if isinstance(event, Started) for ref in event.refs])
        time.sleep(0.06)

    short = [item(f"t/{number}", "Say hello.", max_tokens=4 + number) for number in range(4)]
    one.engine.submit(work("b", None, *short), slowly)
    assert begun == [[], ["t/0"], ["t/0", "t/1"], ["t/0", "t/1", "t/2"]]
    finish(one.engine)
    assert outcomes(one.events).keys() == {waits.ref for waits in short}


def test_prompts_are_computed_ahead_of_their_places(bench: Callable[..., Bench], alone: dict[str, Outcome]) -> None:
    one = bench()
    one.engine.submit(work("b", None, *(_scored(f"base {index}", index) for index in range(len(QUESTIONS)))))
    widest = 0
    while len(outcomes(one.events)) < len(QUESTIONS):
        decoding = [(sequence, sequence.generated) for sequence in one.engine.active if sequence.generated]
        one.engine.step()
        assert sum(sequence.generated > before for sequence, before in decoding) <= 4, "no more than the width decode at once"
        widest = max(widest, len(one.engine.active))
    assert widest == 6, "two prompts more"
    assert [ref for ref, done in outcomes(one.events).items() if not alike(alone[ref], done)] == []


def test_adapters_and_base_interleaved_never_mix(
    bench: Callable[..., Bench], adapters: list[AdapterFile], alone: dict[str, Outcome]
) -> None:
    pairs = (("base", "a"), ("base", "b"), ("a", "b"))
    unmoved = [
        (left, right, i) for left, right in pairs for i in range(len(QUESTIONS)) if alike(alone[f"{left} {i}"], alone[f"{right} {i}"])
    ]
    assert len(unmoved) <= 2, "the adapters are too weak to tell"
    one = bench(width=6)
    for index in range(len(QUESTIONS)):  # works of one job each, in turn: contexts are shared, switched and rebound
        for name, adapter in (("base", None), ("a", adapters[0]), ("b", adapters[1])):
            one.engine.submit(work(f"{name} {index}", adapter, _scored(f"{name} {index}", index)))
    finish(one.engine)
    done = outcomes(one.events)
    assert done.keys() == alone.keys()
    assert one.engine.counters.preemptions == 0
    assert [ref for ref in done if not alike(alone[ref], done[ref])] == []


def test_two_adapters_run_side_by_side_when_places_are_left(bench: Callable[..., Bench], adapters: list[AdapterFile]) -> None:
    one = bench()
    one.engine.submit(work("1", adapters[0], item("a", "Tell me a story.", max_tokens=20)))
    one.engine.submit(work("2", adapters[1], item("b", "Tell me a story.", max_tokens=20)))
    one.engine.step()
    assert [sequence.item.ref for sequence in one.engine.active] == ["a", "b"]
    one.engine.step()
    assert [sequence.generated for sequence in one.engine.active] == [1, 1], "contexts step in turn"
    assert one.engine.pool.hot == ["digest-random1", "digest-random0"]


def test_the_same_adapter_fills_the_ragged_end_and_another_waits_for_a_context(
    bench: Callable[..., Bench], adapters: list[AdapterFile]
) -> None:
    one = bench(contexts=1)
    one.engine.submit(work("1", adapters[0], item("first", "Tell me a story.", max_tokens=6)))
    one.engine.submit(work("2", adapters[0], item("second", "Tell me a story.", max_tokens=6)))
    one.engine.submit(work("3", adapters[1], item("other", "Tell me a story.", max_tokens=6)))
    one.engine.submit(work("4", adapters[0], item("late", "Tell me a story.", max_tokens=6)))
    one.engine.step()
    assert [sequence.item.ref for sequence in one.engine.active] == ["first", "second"], "nobody overtakes what waits for a context"
    finish(one.engine)
    assert [ref for event in one.events if isinstance(event, Started) for ref in event.refs] == ["first", "second", "other", "late"]
    assert len(outcomes(one.events)) == 4


def test_adapters_are_loaded_and_freed_within_the_capacity(bench: Callable[..., Bench], adapters: list[AdapterFile]) -> None:
    one = bench()
    temperatures = []
    for turn in range(3):
        for number, adapter in enumerate(adapters):
            done = one.run("b", adapter, item(f"{turn} {number}", "Say hello.", max_tokens=2))
            temperatures.append(done[f"{turn} {number}"].temperature)
            assert len(one.engine.cache.digests) <= 2
    assert temperatures == ["disk"] * 15
    assert one.engine.cache.loads - one.engine.cache.evictions == 2
    assert one.run("b", adapters[4], item("again", "Say hello.", max_tokens=2))["again"].temperature == "hot"


def test_a_loaded_adapter_need_not_be_read_again(bench: Callable[..., Bench], adapters: list[AdapterFile]) -> None:
    one = bench(contexts=1)
    one.run("1", adapters[0], item("1", "Say hello.", max_tokens=2))
    one.run("2", adapters[1], item("2", "Say hello.", max_tokens=2))
    done = one.run("3", adapters[0], item("3", "Say hello.", max_tokens=2))
    assert [done[ref].temperature for ref in "123"] == ["disk", "disk", "loaded"]
    assert [done[ref].timings_ms["adapter_load"] > 0 for ref in "123"] == [True, True, False]
    assert all(done[ref].timings_ms["adapter_switch"] > 0 for ref in "123")


def _broken(folder: Path) -> dict[str, AdapterFile]:
    good = Path(write_adapter(folder / "good.gguf", 7).path).read_bytes()
    files = {"junk": b"PK\x03\x04 no gguf", "empty": b"", "truncated": good[: len(good) // 2], "header only": good[:24]}
    made = {}
    for name, content in files.items():
        path = folder / f"{name}.gguf"
        path.write_bytes(content)
        made[name] = AdapterFile(name, str(path))
    made["wrong shape"] = write_adapter(folder / "shape.gguf", 1, n_in=64)
    made["wrong layer"] = write_adapter(folder / "layer.gguf", 1, layers=[99])
    made["alpha is text"] = write_adapter(folder / "alpha.gguf", 1, alpha="8")
    made["alpha is infinite"] = write_adapter(folder / "infinite.gguf", 1, alpha=math.inf)
    made["no weights"] = write_adapter(folder / "none.gguf", 1, layers=[])
    made["a model"] = _tiny_gguf(folder / "model.gguf")
    return made


def _tiny_gguf(path: Path) -> AdapterFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AdapterFile("tiny", str(path))


def test_a_broken_adapter_fails_its_own_jobs_only(bench: Callable[..., Bench], tmp_path: Path, adapters: list[AdapterFile]) -> None:
    one = bench()
    for name, adapter in _broken(tmp_path).items():
        done = one.run(name, adapter, item(f"{name} 1", "Say hello."), item(f"{name} 2", "Say hello."))
        for number in (1, 2):
            error = done[f"{name} {number}"].error
            assert error is not None, name
            assert error["code"] == "adapter_rejected", (name, error)
            assert not done[f"{name} {number}"].retryable
    missing = one.run("m", AdapterFile("missing", str(tmp_path / "missing.gguf")), item("missing", "Say hello."))["missing"]
    assert missing.error is not None
    assert (missing.error["code"], missing.retryable) == ("adapter_missing", True)
    assert text(one.run("good", adapters[0], item("good", "Say hello."))["good"])


def test_weights_that_give_no_numbers_fail_alone_and_leave_no_trace(
    bench: Callable[..., Bench], tmp_path: Path, alone: dict[str, Outcome]
) -> None:
    one = bench(contexts=1)
    poison = write_adapter(tmp_path / "nan.gguf", 1, scale=math.nan)
    done = one.run("nan", poison, item("x", "Say hello."), item("y", "Say hello."))
    for ref in "xy":
        error = done[ref].error
        assert error is not None
        assert (error["code"], done[ref].retryable) == ("not_a_number", False)
    assert alike(one.run("base", None, _scored("0", 0))["0"], alone["base 0"]), "the same cells serve the base next"


def test_an_answer_cut_short_is_not_like_the_whole(alone: dict[str, Outcome]) -> None:
    whole = alone["base 0"]
    assert whole.response is not None
    choice = whole.response["choices"][0]
    for kept in (0, 1):
        logprobs = choice["logprobs"] | {"content": choice["logprobs"]["content"][:kept]}
        cut = msgspec.structs.replace(whole, response=whole.response | {"choices": [choice | {"logprobs": logprobs}]})
        assert not alike(whole, cut)
        assert not alike(cut, whole)
    assert alike(whole, whole)


def test_a_stuck_answer_fails_alone_and_changes_nothing_beside_it(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}}, "required": ["colour"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    asked: dict[str, Any] = {"response_format": wanted, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    mates = [item(f"t/{i}", question, **asked) for i, question in enumerate(QUESTIONS[:2])]
    alone, one = bench().run("a", None, *mates), bench()
    read = one.engine.reader.read

    def stuck(endpoint: str, body: bytes) -> Request | EmbeddingRequest:
        request = read(endpoint, body)
        if isinstance(request, Request) and request.n == 2:  # goes well until, after a word, no token is such a character
            sampling = dataclasses.replace(request.sampling, grammar='root ::= "hello" "\\x00"')
            return msgspec.structs.replace(request, sampling=sampling)
        return request

    monkeypatch.setattr(one.engine.reader, "read", stuck)
    done = one.run("b", None, item("acme/bad", "Say hello.", n=2, max_tokens=30), *mates)
    error = done["acme/bad"].error
    assert error is not None
    assert (error["code"], done["acme/bad"].retryable) == ("grammar_stuck", False)
    for mate in mates:
        assert alike(alone[mate.ref], done[mate.ref])
        response = done[mate.ref].response
        assert response is not None
        assert len(response["choices"][0]["logprobs"]["content"]) == response["usage"]["completion_tokens"]
    assert one.engine.counters.preemptions == 0, "nothing was computed twice"


def test_stop_strings_work_across_tokens(bench: Callable[..., Bench]) -> None:
    one = bench()
    whole = text(one.run("b", None, item("whole", "What is the capital of France?", max_tokens=16))["whole"])
    stop = whole[3:11]  # begins and ends within words
    cut = one.run("b", None, item("cut", "What is the capital of France?", max_tokens=16, stop=["never there", stop]))["cut"]
    assert text(cut) == whole[: whole.index(stop)]
    assert cut.response is not None
    assert cut.response["choices"][0]["finish_reason"] == "stop"
    assert text(one.run("b", None, item("single", "What is the capital of France?", stop=whole[0]))["single"]) == ""


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools"),  # this model's template knows none
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "https://x"}}}}, "response_format"),
        ({"n": 17}, "n"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1e20}, "max_tokens"),
        ({"seed": 10**30}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "friend", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
        ({"messages": None}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(bench: Callable[..., Bench], options: dict[str, Any], param: str) -> None:
    outcome = bench().run("b", None, item("x", "Say hello.", **options))["x"]
    error = outcome.error
    assert error is not None
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).startswith(param), error
    assert param.split("[")[0] in error["message"]
    assert not outcome.retryable


def test_what_changes_nothing_is_accepted(bench: Callable[..., Bench]) -> None:
    harmless: dict[str, Any] = {
        "n": 1,
        "stream": False,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "user": "u",
        "seed": None,
        "frequency_penalty": 0,
    }
    parts = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    assert bench().run("b", None, item("x", "", messages=parts, **harmless))["x"].response


def test_a_bad_request_does_not_touch_its_batch_mates(bench: Callable[..., Bench]) -> None:
    one = bench()
    done = one.run("b", None, item("1", "Say hello."), item("2", "x", tools=[1]), item("3", "x", endpoint="/v1/other"))
    assert text(done["1"])
    assert [done[ref].error is None for ref in "123"] == [True, False, False]


def test_a_prompt_that_is_too_long_is_refused_with_its_size(bench: Callable[..., Bench]) -> None:
    one = bench(max_prompt_tokens=100)
    done = one.run("b", None, item("long", "word " * 150), item("huge", "word " * 100_000), item("fits", "word"))
    for ref in ("long", "huge"):
        error = done[ref].error
        assert error is not None
        assert error["code"] == "context_length_exceeded"
        assert "100 are allowed" in error["message"]
        assert "LORAYARD_N_CTX" in error["message"]
    assert text(done["fits"]) is not None


def test_completions_and_token_prompts(bench: Callable[..., Bench], model: Model) -> None:
    one = bench()
    prompt = "The capital of France is"
    common: dict[str, Any] = {"messages": None, "endpoint": "/v1/completions", "max_tokens": 3}
    done = one.run("b", None, item("text", "", prompt=prompt, **common), item("ids", "", prompt=model.tokenize(prompt.encode()), **common))
    assert text(done["text"]) == text(done["ids"])
    assert "Paris" in text(done["text"])
    assert done["text"].response is not None
    assert done["text"].response["object"] == "text_completion"


def test_responses_carry_usage_and_latencies(bench: Callable[..., Bench], adapters: list[AdapterFile]) -> None:
    one = bench()
    outcome = one.run("b", adapters[0], item("x", "Tell me a story.", max_tokens=5))["x"]
    assert outcome.response is not None
    usage = outcome.response["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert outcome.response["choices"][0]["finish_reason"] == "length"
    assert outcome.timings_ms.keys() == {"on_deck", "adapter_load", "adapter_switch", "prefill", "decode"}
    assert all(value >= 0 for value in outcome.timings_ms.values())
    assert min(outcome.timings_ms[name] for name in ("adapter_load", "prefill", "decode")) > 0
    progress = [event for event in one.events if isinstance(event, Progress)]
    assert progress[0].hot == ["digest-random0"] == progress[0].loaded


def test_seeded_sampling_repeats_and_logprobs_agree_with_the_choice(bench: Callable[..., Bench]) -> None:
    one = bench()
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 11, "logprobs": True, "top_logprobs": 3, "presence_penalty": 0.5}
    first = one.run("b", None, item("1", "Tell me a story.", **options))["1"]
    again = one.run("b", None, item("2", "Tell me a story.", **options))["2"]
    other = one.run("b", None, item("3", "Tell me a story.", **(options | {"seed": 12})))["3"]
    assert text(first) == text(again) != text(other)
    assert first.response is not None
    content = first.response["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == text(first)
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] <= entry["top_logprobs"][0]["logprob"] <= 0 for entry in content)


def test_cancel_takes_effect_within_a_step(bench: Callable[..., Bench]) -> None:
    one = bench(width=2)
    one.engine.submit(work("b", None, *(item(str(number), "Tell me a story.", max_tokens=50) for number in range(4))))
    one.engine.step()
    one.engine.cancel("b", ["0", "3"])
    one.engine.step()
    assert [sequence.item.ref for sequence in one.engine.active] == ["1", "2"], "the place of one that ran goes to the next"
    one.engine.cancel("b", ["1", "2"])
    assert not one.engine.step()
    assert not outcomes(one.events)


def test_suspects_run_among_themselves_in_companies_no_larger_than_allowed(
    bench: Callable[..., Bench], adapters: list[AdapterFile]
) -> None:
    one = bench()
    story = "Tell me a story."
    pairs = [item(f"pair-{number}", story, company=2) for number in range(3)]
    one.engine.submit(work("1", None, item("1", story), item("alone", story, company=1), *pairs, item("3", story)))
    one.engine.submit(work("2", adapters[0], item("4", story)))
    seen = set()
    while one.engine.step():
        active = {sequence.item.ref for sequence in one.engine.active}
        seen.add(len(active & {"pair-0", "pair-1", "pair-2"}))
        assert "alone" not in active or active == {"alone"}
        assert not any(ref.startswith("pair") for ref in active) or len(active) <= 2
        assert {ref.startswith("pair") for ref in active} != {True, False}, "no innocent beside a suspect"
    assert 2 in seen
    done = outcomes(one.events)
    assert len(done) == 7
    assert done["alone"].width == 1


@pytest.mark.parametrize(("kept", "jobs"), [(0, 330), (55, 230)])
def test_the_widest_context_there_may_be_runs_full(bench: Callable[..., Bench], kept: int, jobs: int) -> None:
    """llama.cpp has 256 sequences in one, those of kept beginnings and of prompts computed ahead among them."""
    one = bench(width=200, n_ctx=4096, prefixes_kept=kept)
    short: dict[str, Any] = {"endpoint": "/v1/completions", "messages": None, "max_tokens": 3, "logit_bias": {"2": -100}}
    one.engine.submit(work("b", None, *(item(str(number), "", prompt=[number + 1000], **short) for number in range(jobs))))
    most = 0
    while one.engine.step():
        most = max(most, len(one.engine.active))
    assert 200 <= most <= 256 - kept
    assert len(outcomes(one.events)) == jobs
    assert all(outcome.response for outcome in outcomes(one.events).values())


def test_where_a_second_context_finds_no_room_the_first_serves_all(
    bench: Callable[..., Bench], adapters: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **options: Any) -> Context:
        return Context(*arguments, **options | {"n_seq_max": 1000})  # llama.cpp makes none of so many sequences

    one = bench()
    one.engine.submit(work("a", None, item("base", "Tell me a story.", max_tokens=20)))
    one.engine.step()
    monkeypatch.setattr(contexts, "Context", refused)
    with capture_logs() as said:
        assert all(map(text, one.run("b", adapters[0], item("waits", "Say hello.")).values()))
        assert text(one.run("c", adapters[1], item("idle", "Say hello."))["idle"]), "an idle context serves at once"
    assert [entry["log_level"] for entry in said] == ["warning"]
    assert "LORAYARD_CONTEXTS=1" in said[0]["event"]
    none = bench().run("d", None, item("none", "Say hello."))["none"]
    assert none.error is not None, "without any context there is nothing to go on with"
    assert "n_seq_max" in none.error["message"], "llama.cpp's own reason"


def test_answers_longer_than_the_cells_allow_all_end(bench: Callable[..., Bench]) -> None:
    one = bench(n_ctx=256, prefill_tokens=32)
    long: dict[str, Any] = {"max_tokens": 100, "logit_bias": {"2": -100}}
    done = one.run("b", None, *(item(f"{tenant}/1", "Tell me a long story.", **long) for tenant in "ab"))
    assert one.engine.counters.preemptions > 0
    assert len(done) == 2
    for outcome in done.values():
        assert outcome.response is not None
        assert outcome.response["usage"]["completion_tokens"] == 100
    assert [ref for event in one.events if isinstance(event, Started) for ref in event.refs] == ["a/1", "b/1"], "each begins once"


def test_without_max_tokens_the_room_that_is_left_is_the_limit(bench: Callable[..., Bench]) -> None:
    one = bench(n_ctx=256)
    outcome = one.run("b", None, item("x", "word " * 180, max_tokens=None, logit_bias={"2": -100}))["x"]
    assert outcome.response is not None
    assert outcome.response["usage"]["total_tokens"] == 256
    assert outcome.response["choices"][0]["finish_reason"] == "length"


def test_the_endpoint_is_the_one_asked_for(bench: Callable[..., Bench]) -> None:
    outcome = bench().run("b", None, item("x", "Say hello.", endpoint=CHAT))["x"]
    assert outcome.response is not None
    assert outcome.response["object"] == "chat.completion"
    assert not {"id", "model", "created"} & outcome.response.keys()


def test_embeddings_are_of_length_one_and_near_for_what_is_alike(bench: Callable[..., Bench], adapters: list[AdapterFile]) -> None:
    one = bench()
    texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Interest rates rose by half a point in June."]
    asked: dict[str, Any] = {"messages": None, "max_tokens": None, "temperature": None, "endpoint": "/v1/embeddings"}
    items = [item("all", "", input=texts, **asked), item("one", "", input=texts[0], encoding_format="base64", **asked)]
    one.engine.submit(work("story", None, item("story", "Tell me a story.", max_tokens=5)))
    done = one.run("b", None, *items, item("long", "", input="word " * 3000, **asked))
    assert text(done["story"])
    document = done["all"].response
    assert document is not None
    vectors = np.array([row["embedding"] for row in document["data"]])
    assert vectors.shape == (3, 576)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > far
    assert done["one"].response is not None
    packed = np.frombuffer(base64.b64decode(done["one"].response["data"][0]["embedding"]), "<f4")
    assert np.allclose(packed, vectors[0], atol=1e-5)
    assert document["usage"]["prompt_tokens"] == document["usage"]["total_tokens"] > 20
    assert done["long"].error is not None
    assert done["long"].error["param"] == "input"
    refused = one.run("c", adapters[0], item("adapter", "", input="x", **asked))["adapter"].error
    assert refused is not None
    assert refused["param"] == "adapter"


EMBEDDING: dict[str, Any] = {"messages": None, "max_tokens": None, "temperature": None, "endpoint": "/v1/embeddings"}
LONG_TEXT = "word " * 220  # of four parts


def test_a_long_text_keeps_nobody_waiting(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PROGRESS_MS", 0.0)
    one = bench()
    one.engine.submit(work("a", None, item("story", "Tell me a story.", max_tokens=30, logit_bias={"2": -100})))
    one.engine.step()
    (story,) = one.engine.active
    one.engine.submit(work("b", None, item("gone", "", input=LONG_TEXT, **EMBEDDING), item("text", "", input=LONG_TEXT, **EMBEDDING)))
    one.engine.step()
    one.engine.cancel("b", ["gone"])
    generated, told = story.generated, len([event for event in one.events if isinstance(event, Progress)])
    while "text" not in outcomes(one.events):
        one.engine.step()
    assert story.generated == generated + 4
    assert len([event for event in one.events if isinstance(event, Progress)]) == told + 4
    finish(one.engine)
    done = outcomes(one.events)
    assert text(done["story"])
    assert "gone" not in done, "a cancel takes effect between two parts"
    monkeypatch.setattr(embeddings, "_PART", 512)
    whole = bench().run("c", None, item("text", "", input=LONG_TEXT, **EMBEDDING))["text"]
    assert whole.response is not None
    assert done["text"].response is not None
    vectors = [np.array(outcome.response["data"][0]["embedding"]) for outcome in (whole, done["text"]) if outcome.response]
    assert vectors[0] @ vectors[1] > 0.9999


def test_embeddings_under_suspicion_keep_to_their_company(bench: Callable[..., Bench]) -> None:
    one = bench()
    tell, embed = "Tell me a story.", {"input": LONG_TEXT, **EMBEDDING}
    one.engine.submit(work("1", None, item("story-1", tell), item("text-1", "", **embed), item("text-alone", "", company=1, **embed)))
    one.engine.submit(work("2", None, item("alone", tell, company=1), item("story-2", tell), item("text-2", "", **embed)))
    one.engine.submit(work("3", None, item("pair", tell, company=2), item("text-pair", "", company=2, **embed), item("story-3", tell)))
    finish(one.engine)
    running: set[str] = set()
    together: set[frozenset[str]] = set()
    for event in one.events:
        if isinstance(event, Started):
            running |= set(event.refs)
            together.add(frozenset(running))
        elif isinstance(event, Outcome):
            running.remove(event.ref)
    for company in together:
        assert company == {"alone"} or "alone" not in company
        assert company == {"text-alone"} or "text-alone" not in company
        assert company <= {"pair", "text-pair"} or not company & {"pair", "text-pair"}
    assert {"story-1", "text-1"} in together
    assert {"pair", "text-pair"} in together
    assert len(outcomes(one.events)) == 9


def test_nobody_goes_on_overtaking_an_embedding_that_waits_for_company(bench: Callable[..., Bench]) -> None:
    one = bench(width=2)
    one.engine.submit(work("1", None, item("first", "Tell me a story.")))
    one.engine.step()
    one.engine.submit(work("2", None, item("text", "", input="x", company=1, **EMBEDDING)))
    one.engine.step()
    one.engine.submit(work("3", None, item("later", "Tell me a story.")))
    finish(one.engine)
    assert [event.ref for event in one.events if isinstance(event, Outcome)] == ["first", "text", "later"]
    one.engine.submit(work("4", None, item("next", "Tell me a story.")))
    one.engine.step()
    one.engine.submit(work("5", None, item("never", "", input="x", company=1, **EMBEDDING)))
    one.engine.step()
    one.engine.submit(work("6", None, item("last", "Tell me a story.")))
    one.engine.cancel("5", ["never"])
    one.engine.step()
    assert [sequence.item.ref for sequence in one.engine.active] == ["next", "last"], "a cancelled one holds nobody up"


def test_embeddings_are_computed_with_the_settings(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the worker has found to work."""
    asked: dict[str, Any] = {}

    def noted(*arguments: Any, **options: Any) -> Context:
        asked.update(options)
        return Context(*arguments, **options)

    monkeypatch.setattr(embeddings, "Context", noted)
    one = bench(flash_attn="off", kv_type="f32")
    assert one.run("b", None, item("x", "", input="x", **EMBEDDING))["x"].response
    assert (asked["flash_attn"], asked["kv_type"]) == ("off", "f32")
