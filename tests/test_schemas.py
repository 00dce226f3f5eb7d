"""JSON Schemas and patterns as grammars: what llama.cpp lets through is what fits, and what cannot be kept to is refused by name."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lorayard.bodies import CHAT, read_body
from lorayard.errors import BadRequest
from lorayard.patterns import PatternError, pattern_grammar
from lorayard.schemas import schema_grammar
from lorayard_workers.llama import grammar
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.grammar import Grammar

Fits = Callable[[str, str], bool]


@pytest.fixture(scope="module")
def fits(model: Model) -> Fits:
    """Whether llama.cpp lets a text through a grammar, and an end after it."""
    end = next(iter(model.end_tokens))

    def check(grammar: str, text: str) -> bool:
        state = Grammar(model, grammar)
        for token in model.tokenize(text.encode()):
            if not state.allows(token):
                return False
            state.accept(token)
        return state.allows(end)

    return check


def thing(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required}


A = {"a": {"type": "string"}}
NODE = {"$defs": {"n": thing(["v"], v={"type": "integer"}, next={"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"}
NAMESAKES = {"$defs": {"item": {"type": "integer"}}} | thing(item={"type": "string"}, x={"$ref": "#/$defs/item"})


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": ["string", "null"], "enum": ["x", "y", None]}, ["x", "y", None], ["z", ""]),
        ({"type": ["integer", "null"], "enum": ["x", 1, 2.0, None]}, [1, 2.0, None], ["x"]),
        ({"type": ["array", "null"], "items": {"type": "string"}}, [None, [], ["a", "b"]], [[1], "a"]),
        (
            thing(b={"type": "integer"}) | {"type": ["object", "null"]},
            [None, {"b": 1}],
            [{}, {"b": "x"}, {"c": 1}],
        ),
        ({"type": ["string", "null"], "maxLength": 3}, ["", "abc", None], ["abcd"]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["1"]),
        (thing(["b"], a={"type": "integer"}, b={"const": 'é"\\'}, c={"type": "null"}), [{"b": 'é"\\'}, {"a": 1, "b": 'é"\\'}], [{"a": 1}]),
        (
            thing([], a={"type": "null"}, b={"type": "null"}),
            [{}, {"a": None}, {"b": None}, {"a": None, "b": None}],
            [{"b": None, "a": None}],
        ),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1, "y": 2}], [{"x": "1"}]),
        ({"type": "object", "properties": A, "additionalProperties": False}, [{}, {"a": ""}], [{"b": ""}]),
        ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
        ({}, [1, "a", None, [{}, {"a": [True]}]], []),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 3}, [[None] * 2, [None] * 3], [[None], [None] * 4]),
        ({"type": "array", "maxItems": 0}, [[]], [[1]]),
        ({"type": "array", "minItems": 1}, [[1], [{}, "a"]], [[]]),
        (
            {"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}], "items": False},
            [[None, 1]],
            [[None], [None, 1, 2], [1, 1]],
        ),
        ({"type": "string", "minLength": 2, "maxLength": 2}, ["ab", "é\n", '"\\'], ["a", "abc"]),
        ({"type": "string", "maxLength": 0}, [""], ["a"]),
        ({"type": "string", "maxLength": 1999}, ["", "a" * 1999], ["a" * 2000]),
        ({"type": "string", "format": "date"}, ["2026-11-22"], ["2026-13-22", "today"]),
        ({"type": "string", "format": "date-time"}, ["2026-11-22T10:00:00Z", "2026-11-22T10:00:00.25+01:00"], ["2026-11-22 10:00:00Z"]),
        ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        ({"type": "integer", "minimum": 1, "exclusiveMaximum": 6}, [1, 5], [0, 6, 10, 1.5, -1]),
        ({"type": "integer", "exclusiveMinimum": 2, "maximum": 4.5}, [3, 4], [2, 5]),
        ({"type": ["integer", "null"], "enum": [True, 1, None]}, [1, None], [True]),
        ({"type": "number", "minimum": 0, "maximum": 1}, [0, 1, 0.5], [1.5, -0.5, 2]),
        ({"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 2}, [-0.5, 0, 0.25, 1, 1.75], [-1, 2, -1.5, 2.25]),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 3}, [1.5, 1.01, 2, 2.25, 3], [1, 1.0, 3.5, 0.5]),
        ({"type": "number", "exclusiveMaximum": -1}, [-1.5, -2, -20], [-1, -0.5, 1]),
        ({"type": "number", "maximum": -1}, [-1, -1.5, -20], [-0.5, 0, 1]),
        ({"type": "number"}, [0, -1.5, 1e30, 12], ["1"]),
        (NODE, [{"v": 1}, {"v": 1, "next": {"v": 2}}], [{}, {"v": 1, "next": 2}]),
        (NAMESAKES, [{"item": "a", "x": 1}], [{"item": "a", "x": "b"}, {"item": 1, "x": 1}]),
        (
            thing(None, **{"*": {"type": "null"}, "string": {"type": "null"}}),
            [{"*": None, "string": None}],
            [{"*": None, "*b": None, "string": None}],
        ),
        ({"type": "string", "description": "d", "title": "t", "default": "", "x-order": 1, "uniqueItems": False}, ["a"], [1]),
    ],
)
def test_what_fits_and_nothing_else_is_let_through(fits: Fits, schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    grammar = schema_grammar(schema)
    assert [value for value in good if not fits(grammar, json.dumps(value, ensure_ascii=False))] == []
    assert [value for value in bad if fits(grammar, json.dumps(value, ensure_ascii=False))] == []


def test_strings_are_json(fits: Fits) -> None:
    grammar = schema_grammar({"type": "string"})
    assert [text for text in ('"a\nb"', '"\x00"', '"\\ud800"', '"a"b"', '"\\x"') if fits(grammar, text)] == []
    assert fits(grammar, '"\\u00e9 \\n"')


def test_whole_numbers_are_within_their_bounds(fits: Fits) -> None:
    draw = random.Random(1)
    for _ in range(60):
        low, high = sorted(draw.randint(-(10 ** draw.randint(1, 4)), 10 ** draw.randint(1, 4)) for _ in range(2))
        grammar = schema_grammar({"type": "integer", "minimum": low, "maximum": high})
        near = [draw.randint(low, high) for _ in range(4)] + [end + step for end in (low, high) for step in (-1, 0, 1)]
        for number in (*near, 0, 10 * low, 10 * high):
            assert fits(grammar, str(number)) == (low <= number <= high), (low, high, number)
        assert not fits(grammar, f"0{high}")


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("^\\$\\{[A-Z_]+}$", ["${A_B}", "${}", "$A"]),  # } and ] stand for themselves
        ("^a]$", ["a]", "a"]),
        ("^}$", ["}", ""]),
        ("^[a-z]{2,4}$", ["a", "ab", "abcd", "abcde"]),
        ("^(?:ab|c)+?\\d*$", ["ab", "cab12", "", "1"]),
        ("^a|b$", ["a", "b"]),
        ("^[^a-c]$", ["d", "a", '"', "\\", "\n", "é", "😀"]),
        ("^\\w+\\s\\S$", ["ab c", "ab\tc", "ab\t ", "- c"]),
        ("^.\\.\\x41\\u00e9$", ["x.Aé", "xxAé", "\n.Aé"]),
        ('^"\\\\\\/$', ['"\\/', '"/']),
        ("^[-a\\]]{0,2}$", ["", "-]", "a", "b", "aaa"]),
        ("^x{0}y{1,}$", ["y", "yy", "xy", ""]),
        ("^$", ["", "a"]),
        ("^(a|)b$", ["ab", "b", "aab"]),
    ],
)
def test_patterns_are_what_they_are_elsewhere(fits: Fits, pattern: str, texts: list[str]) -> None:
    grammar = schema_grammar({"type": "string", "pattern": pattern})
    expected = [re.fullmatch(pattern[1:-1], text) is not None for text in texts]
    assert [fits(grammar, json.dumps(text, ensure_ascii=False)) for text in texts] == expected


def test_a_character_that_json_only_writes_by_number_is_written_so(fits: Fits) -> None:
    grammar = schema_grammar({"type": "string", "pattern": "^\\x00$"})
    assert fits(grammar, '"\\u0000"')


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a", "begin with ^ and end with $"),
        ("^a", "begin with ^ and end with $"),
        ("^a\\$", "begin with ^ and end with $"),
        ("^(a$", "never closed"),
        ("^a)$", "closes nothing"),
        ("^[a$", "never closed"),
        ("^a{b}$", "begins no count"),
        ("^*a$", "nothing to repeat"),
        ("^a**$", "nothing to repeat"),
        ("^a{3,2}$", "downwards"),
        ("^a{2000}$", "at most 1,999"),
        ("^(a{100}){20}$", "at most 1,999"),
        ("^(a*)*$", "may be empty"),
        ("^((((a|b)+|c)+|d)+|e)+$", "too many ways"),
        ("^((a{1,10}){1,10}){1,10}$", "too many ways"),
        ("^(?=a)a$", "not supported"),
        ("^\\bword$", "not supported"),
        ("^(a)\\1$", "not supported"),
        ("^a^b$", "stands at the ends"),
        ("^[]$", "no character"),
        ("^[z-a]$", "is none"),
        ("^\\ud800$", "no character"),
        ("^" + "(" * 60 + "a" + ")" * 60 + "$", "groups within"),
    ],
)
def test_patterns_that_cannot_be_say_why(pattern: str, why: str) -> None:
    with pytest.raises(PatternError) as raised:
        pattern_grammar(pattern)
    assert why in str(raised.value)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels - 1):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": {"type": "null"}}, "schema.not"),
        (thing(a={"type": "integer", "multipleOf": 2}), "schema.properties.a.multipleOf"),
        ({"type": "array", "uniqueItems": True}, "schema.uniqueItems"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 5}, "maxLength, pattern together"),
        ({"type": "string", "format": "email"}, "schema.format"),
        ({"type": "string", "maxLength": 2000}, "no more than 1,999"),
        ({"type": "string", "minLength": 3e7}, "no more than 1,999"),
        ({"type": "array", "minItems": 10**9}, "no more than 1,999"),
        ({"type": "array", "minItems": -1}, "schema.minItems"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems is more than maxItems"),
        ({"type": "array", "prefixItems": [{}], "minItems": 2}, "as many items as prefixItems"),
        ({"anyOf": [{"type": "string", "maxLength": 1900 + n} for n in range(20)]}, "20,000"),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 3}, "no whole number"),
        ({"type": "integer", "minimum": True}, "schema.minimum"),
        ({"type": "number", "minimum": 0.5}, "schema.minimum"),
        ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "no number is left"),
        ({"type": "object", "properties": A, "additionalProperties": {"type": "null"}}, "schema.additionalProperties"),
        ({"type": "object", "properties": A, "required": ["b"]}, "schema.required"),
        ({"properties": A, "items": {}}, "type is missing"),
        ({"type": "string", "enum": [1]}, "no value is left"),
        ({"enum": []}, "no value is left"),
        ({"enum": ["a"], "maxLength": 3}, "maxLength"),
        ({"anyOf": []}, "schema.anyOf"),
        ({"anyOf": [{"type": "null"}], "properties": A}, "anyOf stands alone: put properties into"),
        ({"allOf": [{"type": "null"}, {"type": "null"}]}, "write them as one"),
        ({"type": "no such type"}, "schema.type"),
        ({"properties": {"a": False}}, "schema.properties.a"),
        ({"$ref": "#/nowhere"}, "points to nothing"),
        ({"$ref": "https://example.org/schema.json"}, "must point into this schema"),
        ({"$ref": "#"}, "refers to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers to itself"),
        (nested(65), "more than 64 deep"),
        (nested(2000), "nested"),
        ({"enum": ["\ud800"]}, "no valid JSON"),
        ({"enum": [f"{n:0500}" for n in range(300)]}, "bytes, and at most 100,000 are read"),
        ({"type": "string", "pattern": "^" + "a" * 90_000 + "$"}, "at most 10,000"),
        (thing([], **{f"p{n}": {} for n in range(5000)}), "simplify it"),
        (thing(None, **{f"p{n}": {} for n in range(3500)}), "simplify it"),
        ({"type": "string", "format": ["date"]}, "schema.format"),
    ],
)
def test_what_answers_would_not_keep_to_is_refused_by_name(schema: dict[str, Any], why: str) -> None:
    began = time.process_time()
    with pytest.raises(BadRequest) as raised:
        schema_grammar(schema)
    assert why in raised.value.message
    assert raised.value.param == "response_format"
    assert time.process_time() - began < 1


def test_a_job_is_refused_for_its_schema_before_it_is_accepted() -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(BadRequest, match=r"schema\.not"):
        read_body(CHAT, {"messages": [{"role": "user", "content": "x"}], "response_format": asked})


def test_llama_cpp_takes_what_is_at_the_limits(model: Model) -> None:
    widest: dict[str, Any] = thing([], **{f"p{n}": {"type": ["string", "null"], "maxLength": 1999} for n in range(10)})
    patterned, longest = {"type": "string", "pattern": "^([a-z]{43}-?){43}$"}, {"type": "array", "minItems": 1999, "maxItems": 1999}
    for schema in (widest, patterned, longest, nested(64)):
        Grammar(model, schema_grammar(schema))


@pytest.mark.parametrize(
    "pattern", ["^(((a|b)+|c)+|d)+$", "^((a+b?)+c?)+$", "^((\\w{1,100},)+;)+$", "^([a-z]{1,40} ?){1,20}$", "^(a?b?){0,1}a?a?b?$"]
)
def test_repetitions_within_each_other_stay_quick(model: Model, pattern: str) -> None:
    state, row = Grammar(model, schema_grammar({"type": "string", "pattern": pattern})), np.zeros(model.n_vocab, np.float32)
    state.accept(model.tokenize(b'"')[-1])
    began = time.process_time()
    for _ in range(8):
        row[model.tokenize(b"a")[-1]] = 1
        allowed = state.masked(row)
        if not np.isfinite(allowed.max()):
            break
        state.accept(int(allowed.argmax()))
    assert time.process_time() - began < 4


def test_a_grammar_whose_readings_double_with_every_token_is_given_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_SLOWEST_S", 0.2)
    inner = [{"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": most} for most in (5, 6)]
    state = Grammar(model, schema_grammar({"$defs": {"n": {"anyOf": inner}}, "$ref": "#/$defs/n"}))
    row, opening = np.zeros(model.n_vocab, np.float32), model.tokenize(b"[")[-1]
    for _ in range(20):
        allowed = state.masked(row)
        if not np.isfinite(allowed.max()):
            break
        state.accept(opening)
    assert not np.isfinite(allowed.max())
    assert not state.allows(opening)


def test_a_grammar_that_llama_cpp_refuses_is_not_in_the_log(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadRequest) as raised:
        Grammar(model, 'root ::= "a tenant\'s words" broken (')
    assert raised.value.param == "response_format"
    Grammar(model, 'root ::= "fine"')
    assert "tenant" not in "".join(capfd.readouterr())
