"""JSON Schemas made grammars (GBNF, llama.cpp's) of the JSON that fits them.

What an answer must fit is either in the grammar or refused by name: no keyword is left out in silence. The JSON that the grammar lets
through always fits; not all that fits is let through (objects have their properties in the schema's order, and no others).
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any
from urllib.parse import unquote

import msgspec

from lorayard.errors import BadRequest
from lorayard.patterns import MOST_REPEATS, PatternError, pattern_grammar

MOST_BYTES = 100_000  # of a schema, and of its grammar: more takes longer to read than to compute
_MOST_TOGETHER = 20_000  # of all repetitions: llama.cpp makes rules of each
_DEEPEST = 64  # schemas within each other
_MOST_DIGITS = 16  # of a whole number: more are no longer exact everywhere

_NOTES = {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"}
_NOTES |= {"$schema", "$id", "$comment", "$defs", "definitions"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_KEYWORDS: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": _BOUNDS,
    "integer": _BOUNDS,
    "boolean": set(),
    "null": set(),
}
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf")  # keywords that stand alone
_KNOWN = {"type", "enum", "const", *_WHOLE}.union(*_KEYWORDS.values())

_HOUR = '( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9]'
_FORMATS = {
    "date": 'date ::= [0-9]{4} "-" ( "0" [1-9] | "1" [0-2] ) "-" ( "0" [1-9] | [12] [0-9] | "3" [01] )',
    "time": f'time ::= {_HOUR} ":" [0-5] [0-9] ( "." [0-9]{{1,6}} )? ( "Z" | ( "+" | "-" ) {_HOUR} )',
    "date-time": 'date-time ::= date "T" time',
    "uuid": 'uuid ::= hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}
_BASIC = "\n".join(
    [
        r'space ::= " "?',
        r"hex ::= [0-9a-fA-F]",
        r'char ::= [^"\\\x00-\x1F\x7F] | "\\" ( ["\\/bfnrt] | "u" ( [0-9a-cA-CefEF] hex{3} | [dD] [0-7] hex{2} ) )',
        r'string ::= "\"" char* "\""',
        r'boolean ::= "true" | "false"',
        r'null ::= "null"',
        rf'whole ::= "0" | [1-9] [0-9]{{0,{_MOST_DIGITS - 1}}}',
        r'integer ::= "-"? whole',
        r'number ::= "-"? whole ( "." [0-9]{1,16} )? ( [eE] [+-]? [0-9]{1,2} )?',
        r'member ::= string ":" space value',
        r'object ::= "{" space ( member ( "," space member )* space )? "}"',
        r'array ::= "[" space ( value ( "," space value )* space )? "]"',
        r"value ::= object | array | string | number | boolean | null",
        *_FORMATS.values(),
    ]
)


def schema_grammar(schema: dict[str, Any]) -> str:
    """GBNF, with `root` as its start. Raises `BadRequest` that names the keyword at fault."""
    try:
        encoded = msgspec.json.encode(schema)
        if len(encoded) > MOST_BYTES:
            raise _refusal("schema", f"has {len(encoded):,} bytes, and at most {MOST_BYTES:,} are read; simplify it")
        return _converted(encoded)
    except RecursionError:
        raise _refusal("schema", "is nested too deep") from None
    except (ValueError, TypeError, OverflowError, msgspec.MsgspecError):  # half a surrogate pair, say
        raise _refusal("schema", "is no valid JSON") from None


@functools.lru_cache(maxsize=64)  # most jobs bring the schema that the last ones brought
def _converted(schema: bytes) -> str:
    return _Converter(msgspec.json.decode(schema)).convert()


def _refusal(where: str, why: str) -> BadRequest:
    shown = where if len(where) <= 200 else f"{where[:90]}...{where[-90:]}"
    return BadRequest(f"response_format: {shown}: {why}", param="response_format")


class _Converter:
    """One schema. Methods return GBNF that can stand in a sequence, mostly a rule's name; `where` is the way to a part of the schema."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._rules: dict[str, str] = {}
        self._named: dict[str, str] = {}  # a rule's text: its name
        self._references: dict[str, str] = {}
        self._depth = self._repeats = 0

    def convert(self) -> str:
        self._rules["root"] = self._visit(self._root, "schema")
        grammar = "\n".join([*(f"{name} ::= {text}" for name, text in self._rules.items()), _BASIC])
        if len(grammar) > MOST_BYTES:
            raise _refusal("schema", f"makes a grammar of {len(grammar):,} characters, and at most {MOST_BYTES:,} are read; simplify it")
        return grammar

    def _rule(self, text: str) -> str:
        if text not in self._named:
            self._named[text] = f"r{len(self._rules)}"
            self._rules[self._named[text]] = text
        return self._named[text]

    def _visit(self, schema: Any, where: str, through: tuple[str, ...] = ()) -> str:
        """`through`: the references that led here without a character in between."""
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise _refusal(where, "is no schema" if schema is not False else "false lets nothing through; leave it out")
        given = {name: value for name, value in schema.items() if name not in _NOTES and not name.startswith("x-")}
        for name, value in given.items():
            if name not in _KNOWN and not (name == "uniqueItems" and value is False):
                raise _refusal(f"{where}.{name}", "is not supported, and answers would not keep to it; leave it out, or put it in words")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _refusal("schema", f"is nested more than {_DEEPEST} deep")
        alone = next((name for name in _WHOLE if name in given), None)
        if alone is not None:
            made = self._whole(alone, given, where, through)
        elif "enum" in given or "const" in given:
            made = self._values(given, where)
        else:
            made = self._union([self._typed(kind, given, where) for kind in self._kinds(given, where)])
        self._depth -= 1
        return made

    def _union(self, texts: list[str]) -> str:
        return texts[0] if len(texts) == 1 else self._rule(" | ".join(dict.fromkeys(texts)))

    # What stands alone

    def _whole(self, name: str, given: dict[str, Any], where: str, through: tuple[str, ...]) -> str:
        if len(given) > 1:
            others = ", ".join(sorted(other for other in given if other != name))
            raise _refusal(where, f"{name} stands alone: put {others} into what it names")
        value = given[name]
        if name == "$ref":
            return self._reference(value, f"{where}.$ref", through)
        if not isinstance(value, list) or not value:
            raise _refusal(f"{where}.{name}", "must be a list of schemas")
        if name == "allOf" and len(value) > 1:
            raise _refusal(f"{where}.allOf", "of several schemas is not supported: write them as one")
        return self._union([self._visit(each, f"{where}.{name}[{number}]", through) for number, each in enumerate(value)])

    def _reference(self, pointer: Any, where: str, through: tuple[str, ...]) -> str:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise _refusal(where, "must point into this schema, as #/$defs/name does")
        if pointer in through:
            raise _refusal(where, "refers to itself")
        if pointer not in self._references:
            name = self._references[pointer] = f"ref{len(self._references)}"
            self._rules[name] = self._visit(self._target(pointer, where), pointer, (*through, pointer))
        return self._references[pointer]

    def _target(self, pointer: str, where: str) -> Any:
        target: Any = self._root
        for part in pointer.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isascii() and key.isdecimal() and int(key[:9]) < len(target):
                target = target[int(key[:9])]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                raise _refusal(where, f"{pointer[:100]} points to nothing")
        return target

    # Values and types

    def _values(self, given: dict[str, Any], where: str) -> str:
        others = sorted(given.keys() - {"enum", "const", "type"})
        if others or {"enum", "const"} <= given.keys():
            raise _refusal(where, f"beside enum and const only type is supported, not {', '.join(others) or 'both of them'}")
        values = [given["const"]] if "const" in given else given["enum"]
        if not isinstance(values, list):
            raise _refusal(f"{where}.enum", "must be a list")
        if "type" in given:
            kinds = self._kinds(given, where)
            values = [value for value in values if any(_is(value, kind) for kind in kinds)]
        if not values:
            raise _refusal(where, "no value is left that fits enum and type")
        return self._rule(" | ".join(dict.fromkeys(_literal(_as_json(value, where)) for value in values)))

    def _kinds(self, given: dict[str, Any], where: str) -> list[str]:
        kinds = given.get("type")
        if kinds is None:
            kinds = [kind for kind, keywords in _KEYWORDS.items() if keywords & given.keys() and kind != "integer"]
            if len(kinds) > 1:
                raise _refusal(where, "type is missing")
            return kinds or ["value"]
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not kinds or not all(isinstance(kind, str) and kind in _KEYWORDS for kind in kinds):
            raise _refusal(f"{where}.type", f"must be of {', '.join(_KEYWORDS)}")
        return kinds

    def _typed(self, kind: str, given: dict[str, Any], where: str) -> str:
        own = {name: value for name, value in given.items() if name in _KEYWORDS.get(kind, ())}
        if not own:
            return kind
        makers = {"object": self._object, "array": self._array, "string": self._string, "integer": self._integer, "number": self._number}
        return makers[kind](own, where)

    def _object(self, given: dict[str, Any], where: str) -> str:
        properties, required = given.get("properties", {}), given.get("required", [])
        if not isinstance(properties, dict):
            raise _refusal(f"{where}.properties", "must be an object of schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
            raise _refusal(f"{where}.required", "must be a list of names that are in properties")
        more = given.get("additionalProperties", not properties)
        if not properties:
            if more is False:
                return self._rule('"{" space "}"')
            member = self._rule(f'string ":" space {self._visit(more if more != {} else True, f"{where}.additionalProperties")}')
            return self._rule(f'"{{" space ( {member} ( "," space {member} )* space )? "}}"')
        if more not in (True, False, {}):
            raise _refusal(
                f"{where}.additionalProperties", "a schema beside properties is not supported; give these a property of their own"
            )
        needed = frozenset(required)
        after = first = ""  # what may follow where something was written already, and where nothing was
        for name, schema in reversed(properties.items()):
            value = self._visit(schema, f"{where}.properties.{name}")
            member = self._rule(f'{_literal(_as_json(name, where))} ":" space {value}')
            begun, begins = f'"," space {member} {after}', f"{member} {after}"
            if name in needed:
                after, first = self._rule(begun), self._rule(begins)
            else:
                after, first = self._or(begun, after), self._or(begins, first)
        return self._rule(f'"{{" space {first} space "}}"')

    def _or(self, text: str, other: str) -> str:
        return self._rule(f"{text} | {other}" if other else f"( {text} )?")

    def _array(self, given: dict[str, Any], where: str) -> str:
        items, prefix = given.get("items", True), given.get("prefixItems")
        if isinstance(items, list) and prefix is None:
            items, prefix = False, items
        low, high = self._span(given, "minItems", "maxItems", where)
        if prefix is not None:
            if not isinstance(prefix, list) or not prefix or given.get("items", False) not in (False, prefix):
                raise _refusal(f"{where}.prefixItems", "must be a list of schemas, with no items beside it but false")
            if not low <= len(prefix) <= (len(prefix) if high is None else high):
                raise _refusal(where, f"the array has as many items as prefixItems ({len(prefix)}): minItems and maxItems say otherwise")
            texts = [self._visit(each, f"{where}.prefixItems[{number}]") for number, each in enumerate(prefix)]
            return self._rule('"[" space ' + ' "," space '.join(texts) + ' space "]"')
        if high == 0:
            return self._rule('"[" space "]"')
        item = self._visit(items, f"{where}.items")
        more = self._rule(f'"," space {item}')
        filled = f"{item} {more}{self._times(max(low - 1, 0), None if high is None else high - 1, where)} space"
        return self._rule(f'"[" space {filled} "]"' if low else f'"[" space ( {filled} )? "]"')

    def _string(self, given: dict[str, Any], where: str) -> str:
        if len(given.keys() - {"minLength", "maxLength"}) + bool(given.keys() & {"minLength", "maxLength"}) > 1:
            raise _refusal(
                where, f"{', '.join(sorted(given))} together are not supported; a pattern can say its length, as ^[a-z]{{2,8}}$ does"
            )
        if "format" in given:
            if not isinstance(given["format"], str) or given["format"] not in _FORMATS:
                raise _refusal(f"{where}.format", f"only {', '.join(_FORMATS)} are supported; leave it out, or write a pattern")
            return self._rule(f'"\\"" {given["format"]} "\\""')
        if "pattern" not in given:
            low, high = self._span(given, "minLength", "maxLength", where)
            return self._rule(f'"\\"" char{self._times(low, high, where)} "\\""')
        if not isinstance(given["pattern"], str):
            raise _refusal(f"{where}.pattern", "must be text")
        try:
            return self._rule(f'"\\"" {pattern_grammar(given["pattern"])} "\\""')
        except PatternError as error:
            raise _refusal(f"{where}.pattern", str(error)) from None

    def _span(self, given: dict[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
        found: list[int | None] = []
        for name in (least, most):
            value = given.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1):
                raise _refusal(f"{where}.{name}", "must be a whole number from 0 on")
            if value is not None and value > MOST_REPEATS:
                raise _refusal(
                    f"{where}.{name}", f"is {value:,}, and no more than {MOST_REPEATS:,} can be kept to; lower it, or leave it out"
                )
            found.append(None if value is None else int(value))
        low, high = found[0] or 0, found[1]
        if high is not None and low > high:
            raise _refusal(where, f"{least} is more than {most}")
        return low, high

    def _times(self, low: int, high: int | None, where: str) -> str:
        self._repeats += max(low, high or 0)
        if self._repeats > _MOST_TOGETHER:
            raise _refusal(
                where, f"all lengths and numbers of items together are more than {_MOST_TOGETHER:,}; lower them, or leave some out"
            )
        return f"{{{low},{'' if high is None else high}}}"

    # Numbers

    def _bounds(self, given: dict[str, Any], where: str) -> dict[str, float]:
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _refusal(f"{where}.{name}", "must be a number")
        return given

    def _integer(self, given: dict[str, Any], where: str) -> str:
        bounds, limit = self._bounds(given, where), 10**_MOST_DIGITS - 1
        low = max(-limit, math.ceil(bounds.get("minimum", -limit)), math.floor(bounds.get("exclusiveMinimum", -limit - 1)) + 1)
        high = min(limit, math.floor(bounds.get("maximum", limit)), math.ceil(bounds.get("exclusiveMaximum", limit + 1)) - 1)
        if low > high:
            raise _refusal(where, f"no whole number of up to {_MOST_DIGITS} digits is left")
        ways = _digits(max(low, 0), high) if high >= 0 else []
        if low < 0:
            ways.append(f'"-" {self._rule(" | ".join(_digits(max(1, -high), -low)))}')
        return self._rule(" | ".join(ways))

    def _number(self, given: dict[str, Any], where: str) -> str:
        """Whole numbers within, with or without decimals, and the bounds themselves."""
        bounds, limit = self._bounds(given, where), 10 ** (_MOST_DIGITS - 1)
        for name, value in bounds.items():
            if value % 1 or abs(value) > limit:
                raise _refusal(f"{where}.{name}", f"must be a whole number of less than {_MOST_DIGITS} digits: others are not supported")
        low, above = max(
            (int(bounds.get("minimum", -limit)), False), (int(bounds.get("exclusiveMinimum", -limit)), "exclusiveMinimum" in bounds)
        )
        high, closed = min(
            (int(bounds.get("maximum", limit)), True), (int(bounds.get("exclusiveMaximum", limit)), "exclusiveMaximum" not in bounds)
        )
        ways = _decimals(max(low, 0), above and low >= 0, high, not closed) if high >= 0 else []
        negative = _decimals(max(-high, 0), not closed and high <= 0, -low, above) if low < 0 else []
        if negative:
            ways.append(f'"-" {self._rule(" | ".join(negative))}')
        if not ways:
            raise _refusal(where, "no number is left")
        return self._rule(" | ".join(ways))


def _decimals(low: int, above: bool, high: int, below: bool) -> list[str]:
    """GBNF of the decimals from low to high, both 0 or more; `above` and `below`: without the bounds themselves."""
    ways = [f'( {way} ) ( "." [0-9]{{1,15}} )?' for way in _digits(low + above, high - 1)]
    if above and low < high:
        ways.append(f'"{low}." [0-9]{{0,14}} [1-9]')
    if not below and low + above <= high:
        ways.append(f'"{high}"')
    return ways


def _digits(low: int, high: int) -> list[str]:
    """GBNF of each way to write a whole number from low to high, both 0 or more; none where low is more."""
    ways: list[str] = []
    for length in range(len(str(low)), len(str(high)) + 1) if low <= high else ():
        least, most = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        ways += _of_length(str(least), str(most))
    return ways


def _of_length(low: str, high: str) -> list[str]:
    """The same for numbers of as many digits, which may begin with zeros."""
    if not low:
        return [""]
    if low[0] == high[0]:
        return [f'"{low[0]}" {rest}'.rstrip() for rest in _of_length(low[1:], high[1:])]
    rest = len(low) - 1
    first, last, ways = int(low[0]), int(high[0]), list[str]()
    if low[1:].strip("0"):
        ways += [f'"{first}" {more}' for more in _of_length(low[1:], "9" * rest)]
        first += 1
    upper: list[str] = []
    if high[1:].strip("9"):
        upper = [f'"{last}" {more}' for more in _of_length("0" * rest, high[1:])]
        last -= 1
    if first <= last:
        ways.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    return ways + upper


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        return isinstance(value, int | float) and not isinstance(value, bool) and (kind == "number" or value % 1 == 0)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, kinds[kind])


def _as_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise _refusal(where, "is no valid JSON") from None


def _literal(text: str) -> str:
    """JSON as a literal of GBNF."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
