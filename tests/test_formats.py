"""Answers that must be JSON, and tools: what the grammar lets through, and what the template and the response say of calls."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from llama_support import CHAT, finish, item, outcomes, text, work
from openai.types.chat import ChatCompletionMessage

from lorayard.bodies import read_body
from lorayard.errors import BadRequest
from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.engine import Engine
from lorayard_workers.llama.grammar import Grammar
from lorayard_workers.llama.requests import Answer, Request, RequestReader, response
from lorayard_workers.llama.sampling import Sampler, SamplingParams, sample
from lorayard_workers.llama.tools import tool_calls
from lorayard_workers.runner import Event, Outcome, WorkItem

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }} {{ tool.function.parameters | tojson }}]{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}"
    "({{ call.function.name }} {{ call.function.arguments.city }}){% endfor %}{% endfor %}<assistant>"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


def run(model: Model, *items: WorkItem) -> dict[str, Outcome]:
    events: list[Event] = []
    engine = Engine(model, Settings(n_ctx=1024, width=4), events.append)
    engine.submit(work("b", None, *items))
    finish(engine)
    engine.close()
    return outcomes(events)


def test_answers_fit_their_schema_however_they_are_drawn(model: Model) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.5, "seed": 3}, {"temperature": 1, "top_p": 0.5, "seed": 1, "n": 2}]
    items = [item(str(i), "Tell me of a thing.", response_format=wanted, max_tokens=40, **way) for i, way in enumerate(ways)]
    done = run(model, *items, item("free", "Tell me of a thing.", max_tokens=10))
    for number in range(len(ways)):
        document = done[str(number)].response
        assert document is not None
        for choice in document["choices"]:
            answer = json.loads(choice["message"]["content"])
            assert answer.keys() == {"colour", "count"}
            assert answer["colour"] in {"red", "green", "blue"}
            assert isinstance(answer["count"], int)
            assert choice["finish_reason"] == "stop"
    assert not text(done["free"]).startswith("{")


def test_json_object_is_an_object(model: Model) -> None:
    done = run(model, item("x", "Describe a cat in JSON.", response_format={"type": "json_object"}, max_tokens=100, temperature=0))
    answer = text(done["x"])
    assert answer.startswith("{")
    assert done["x"].response is not None
    if done["x"].response["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer), dict)


def test_the_grammar_keeps_the_proportions_of_what_it_allows(model: Model) -> None:
    """Drawn first and checked then is as good as masked first."""
    digits = [model.tokenize(str(number).encode())[-1] for number in (1, 2, 3)]
    row = np.full((1, model.n_vocab), -20, np.float32)
    row[0, digits] = np.log([0.2, 0.3, 0.5])
    row[0, 1000] = 1.0  # more likely than all of them, and not allowed
    grammar = 'root ::= "1" | "2"'
    found = [sample(row, [Sampler(SamplingParams(grammar=grammar), seed, Grammar(model, grammar))])[0] for seed in range(300)]
    assert set(found) == set(digits[:2])
    assert abs(found.count(digits[0]) / 300 - 0.4) < 0.1


def test_a_temperature_next_to_nothing_is_nothing(model: Model) -> None:
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1e-50}, {"temperature": 1e-6, "top_p": 0.9}]
    asking: list[dict[str, Any]] = [{}, {"response_format": {"type": "json_object"}, "max_tokens": 20}]
    for asked in asking:
        answers = {text(run(model, item("t/1", "Describe a cat in JSON.", **asked, **way))["t/1"]) for way in ways}
        assert len(answers) == 1


def test_tools_are_shown_by_the_template(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.__dict__, "chat_template", TEMPLATE)
    reader = RequestReader(model, n_ctx=512, max_prompt=400)
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "fine"},
    ]
    request = reader.read(CHAT, json.dumps({"messages": messages, "tools": [TOOL]}).encode())
    assert isinstance(request, Request)
    prompt = b"".join(model.pieces[token] for token in request.prompt).decode()
    assert prompt.startswith('[weather {"type": "object", "properties": {"city": {"type": "string"}}}]<user>How is')
    assert "<assistant>(weather Rome)<tool>fine<assistant>" in prompt
    said = b'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    choice = response(request, [Answer(said, "stop", 9, [])], 0, model.pieces)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


def test_tools_that_must_not_be_called_are_not_shown(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.__dict__, "chat_template", TEMPLATE)
    reader = RequestReader(model, n_ctx=512, max_prompt=400)
    body = {"messages": [{"role": "user", "content": "Rome?"}], "tools": [TOOL], "tool_choice": "none"}
    request = reader.read(CHAT, json.dumps(body).encode())
    assert isinstance(request, Request)
    assert b"".join(model.pieces[token] for token in request.prompt) == b"<user>Rome?<assistant>"
    said = b'<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    choice = response(request, [Answer(said, "stop", 9, [])], 0, model.pieces)["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", said.decode())
    with pytest.raises(BadRequest, match="tools"):
        reader.read(CHAT, json.dumps(body | {"tools": [{"type": "function"}]}).encode())


@pytest.mark.parametrize("library", [False, True])
def test_an_answer_is_taken_back_as_history(model: Model, monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    """As we write it, and as OpenAI's library does, with every field there is."""
    monkeypatch.setitem(model.__dict__, "chat_template", TEMPLATE)
    reader = RequestReader(model, n_ctx=512, max_prompt=400)
    history: list[dict[str, Any]] = [{"role": "user", "content": "Rome?"}]
    for said in (b'<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', b"It is fine."):
        request = reader.read(CHAT, json.dumps({"messages": history, "tools": [TOOL]}).encode())
        assert isinstance(request, Request)
        message = response(request, [Answer(said, "stop", 9, [])], 0, model.pieces)["choices"][0]["message"]
        history.append(ChatCompletionMessage.model_validate(message).model_dump() if library else message)
        if calls := message.get("tool_calls"):
            history.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": "22 degrees"})
    refusal: dict[str, Any] = {"role": "assistant", "content": None, "refusal": "I had rather not.", "annotations": []}
    history += [{"role": "user", "content": "Sing."}, refusal, {"role": "user", "content": "Why?", "name": None}]
    request = reader.read(CHAT, json.dumps({"messages": history}).encode())
    assert isinstance(request, Request)
    prompt = b"".join(model.pieces[token] for token in request.prompt).decode()
    turns = "<user>Rome?<assistant>(weather Rome)<tool>22 degrees<assistant>It is fine.<user>Sing.<assistant>I had rather not.<user>Why?"
    assert prompt == turns + "<assistant>"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "refusal": "no"}, "messages[1].refusal"),
        ({"role": "assistant", "content": None, "refusal": None}, "messages[1].content"),
        ({"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}]}, "messages[1]"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[1]"),
        ("x", "messages[1]"),
    ],
)
def test_history_that_says_what_no_template_knows_is_refused(message: Any, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        read_body(CHAT, {"messages": [{"role": "user", "content": "x"}, message]})
    assert raised.value.param == param


@pytest.mark.parametrize("broken", ["<tool_call>{}</tool_call>", '<tool_call>{"name": 1, "arguments": {}}</tool_call>', "<tool_call>{"])
def test_what_is_no_call_stays_text(broken: str) -> None:
    assert tool_calls(broken) == (broken, [])
