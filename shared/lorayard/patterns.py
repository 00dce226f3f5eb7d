"""Regular expressions, as JSON Schema has them, made grammars (GBNF, llama.cpp's) of the JSON strings that match.

ECMAScript's syntax, as far as it is regular: no look-around, back-references or word boundaries. What cannot be is refused with the reason;
nothing is left out in silence.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

MOST_REPEATS = 1_999  # of one thing, as llama.cpp has it
_LONGEST = 10_000  # characters of a pattern
_DEEPEST = 50  # groups within groups
_MOST_WAYS = 1_000  # 900 took 0.8 s a token, and eight + within each other 75 s
_ENDLESS = 6  # what * and + count for among them
_LAST = 0x10FFFF
_Ranges = list[tuple[int, int]]  # of code points, both ends included

_CLASSES: dict[str, _Ranges] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [
        (9, 13),
        (0x20, 0x20),
        (0xA0, 0xA0),
        (0x1680, 0x1680),
        (0x2000, 0x200A),
        (0x2028, 0x2029),
        (0x202F, 0x202F),
        (0x205F, 0x205F),
        (0x3000, 0x3000),
        (0xFEFF, 0xFEFF),
    ],
}
_LINE_ENDS: _Ranges = [(10, 10), (13, 13), (0x2028, 0x2029)]
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 0x22: '"', 0x5C: "\\"}  # what JSON writes with a backslash
_ESCAPED: _Ranges = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)]  # what stands in no JSON string as it is
_QUANTIFIER = re.compile(r"\{(\d{1,9})(?:(,)(\d{0,9}))?\}", re.ASCII)
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")


class PatternError(ValueError):
    """What about a pattern cannot be, in words."""


class _Node(NamedTuple):
    """GBNF that can stand in a sequence; how many symbols llama.cpp makes of it; whether it may match nothing; in how many ways, about, one
    text may be at some place in it, all of which llama.cpp follows; whether it has a part that says where one ends and the next begins."""

    text: str
    size: int
    empty: bool
    ways: int = 1
    marked: bool = True


def pattern_grammar(pattern: str) -> str:
    """GBNF of what stands between the quotes of a JSON string that matches. Raises `PatternError`."""
    if len(pattern) > _LONGEST:
        raise PatternError(f"has {len(pattern):,} characters: at most {_LONGEST:,} can be")
    return _Parser(pattern).parse()


class _Parser:
    """By recursive descent; each step takes a character or raises."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> str:
        if not self._takes("^"):
            raise PatternError("must begin with ^ and end with $")
        node = self._alternatives()
        if self._peek() == ")":
            raise PatternError("a ) closes nothing: write \\) for the character")
        if self._pattern[self._at :] != "$":
            raise PatternError("must begin with ^ and end with $")
        return node.text

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _takes(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _alternatives(self) -> _Node:
        branches = [self._sequence()]
        while self._takes("|"):
            branches.append(self._sequence())
        text = " | ".join(branch.text for branch in branches)
        size, empty = sum(branch.size for branch in branches), any(branch.empty for branch in branches)
        return _Node(f"({text})", size, empty, max(branch.ways for branch in branches), all(branch.marked for branch in branches))

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        while (c := self._peek()) and c not in "|)" and not (c == "$" and self._at == len(self._pattern) - 1):
            nodes.append(self._quantified(self._atom()))
        text, size, empty = (
            " ".join(node.text for node in nodes) or '""',
            sum(node.size for node in nodes),
            all(node.empty for node in nodes),
        )
        return _Node(text, size, empty, max((node.ways for node in nodes), default=1), any(node.marked for node in nodes))

    def _quantified(self, node: _Node) -> _Node:
        low, high, mark = 1, 1, ""
        if (c := self._peek()) and c in "*+?":
            low, high, mark = {"*": (0, -1, "*"), "+": (1, -1, "+"), "?": (0, 1, "?")}[c]
            self._at += 1
        elif c == "{":
            low, high, mark = self._times()
        if not mark:
            return node
        self._takes("?")  # to match as little as possible is to match the same
        size = node.size * max(low, high, 1)
        if size > MOST_REPEATS:
            raise PatternError(f"repeats {size:,} symbols: at most {MOST_REPEATS:,} can be")
        if node.empty and high not in (0, 1):
            raise PatternError(f"repeats what may be empty, before position {self._at}: leave out the inner *, ? or {{0,")
        fixed = low == high
        times = _ENDLESS if high < 0 else high
        if high in (0, 1) or (fixed and node.ways == 1) or (high < 0 and node.ways > 1 and node.marked):
            times = 1
        if node.ways > 1 and node.ways * times >= _MOST_WAYS:
            raise PatternError("has repetitions within repetitions that fit one text in too many ways: put something between them")
        return _Node(node.text + mark, size, node.empty or low == 0, node.ways * times, node.marked and fixed and low > 0)

    def _times(self) -> tuple[int, int, str]:
        found = _QUANTIFIER.match(self._pattern, self._at)
        if found is None:
            raise PatternError(f"the {{ at position {self._at} begins no count: write \\{{ for the character")
        self._at = found.end()
        low = int(found[1])
        high = int(found[3]) if found[3] else -1 if found[2] else low
        if 0 <= high < low:
            raise PatternError(f"{found[0]} counts downwards")
        return low, high, f"{{{low},{high if high >= 0 else ''}}}"

    def _atom(self) -> _Node:
        c = self._peek()
        self._at += 1
        if c == "(":
            return self._group()
        if c == "[":
            return _Node(_in_json(self._class()), 1, False)
        if c == ".":
            return _Node(_in_json(_complement(_LINE_ENDS)), 1, False)
        if c == "\\":
            return _Node(_in_json(self._escape()), 1, False)
        if c in "^$":
            raise PatternError(f"{c} at position {self._at - 1}: stands at the ends only; write \\{c} for the character")
        if c in "*+?{":
            raise PatternError(f"{c} at position {self._at - 1} has nothing to repeat: write \\{c} for the character")
        return _Node(_itself(ord(c)), 1, False)

    def _group(self) -> _Node:
        if not self._takes("?:") and self._peek() == "?":
            raise PatternError(
                f"(? at position {self._at - 1}: look-around, names and flags are not supported; groups are (...) or (?:...)"
            )
        self._depth += 1
        if self._depth > _DEEPEST:
            raise PatternError(f"has more than {_DEEPEST} groups within each other")
        node = self._alternatives()
        self._depth -= 1
        if not self._takes(")"):
            raise PatternError("a ( is never closed: write \\( for the character")
        return node

    def _class(self) -> _Ranges:
        negated = self._takes("^")
        ranges: _Ranges = []
        while not self._takes("]"):
            low = self._member()
            if self._pattern.startswith("-", self._at) and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._member()
                if len(low) > 1 or len(high) > 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1] or low > high:
                    raise PatternError(f"the range in [...] before position {self._at} is none: write \\- for the character")
                low = [(low[0][0], high[0][1])]
            ranges += low
        return _complement(ranges) if negated else ranges

    def _member(self) -> _Ranges:
        c = self._peek()
        self._at += 1
        if not c:
            raise PatternError("a [ is never closed: write \\[ for the character")
        if c != "\\":
            return [(ord(c), ord(c))]
        return [(8, 8)] if self._takes("b") else self._escape()

    def _escape(self) -> _Ranges:
        if coded := _CODE.match(self._pattern, self._at):
            self._at = coded.end()
            code = int(coded[1] or coded[2] or coded[3], 16)
            return [(code, code)]
        c = self._peek()
        self._at += 1
        if not c:
            raise PatternError("ends in a backslash")
        if c.lower() in _CLASSES:
            return _CLASSES[c] if c.islower() else _complement(_CLASSES[c.lower()])
        if c in _CONTROLS:
            return [(_CONTROLS[c], _CONTROLS[c])]
        if c == "0" and not self._peek().isdecimal():
            return [(0, 0)]
        if c.isalnum():
            raise PatternError(f"\\{c} is not supported")
        return [(ord(c), ord(c))]


def _complement(ranges: _Ranges) -> _Ranges:
    kept: _Ranges = []
    start = 0
    for low, high in sorted(ranges):
        if low > start:
            kept.append((start, low - 1))
        start = max(start, high + 1)
    return [*kept, (start, _LAST)] if start <= _LAST else kept


def _common(left: _Ranges, right: _Ranges) -> _Ranges:
    both = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return sorted({(low, high) for low, high in both if low <= high})


def _in_json(ranges: _Ranges) -> str:
    """GBNF of one of these characters in a JSON string. Of many, those that JSON could only write by number are left out."""
    ways = [f'"\\\\{_quoted(short)}"' for code, short in _SHORT.items() if any(low <= code <= high for low, high in ranges)]
    plain = _common(ranges, _complement(_ESCAPED))
    if plain:
        ways.insert(0, "[" + "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in plain) + "]")
    if not ways:  # control characters
        coded = [code for low, high in _common(ranges, [(0, 0x1F), (0x7F, 0x7F)]) for code in range(low, high + 1)]
        ways = [f'"\\\\u{code:04x}"' for code in coded]
    if not ways:
        raise PatternError("has a [...] or an escape that no character matches")
    return ways[0] if len(ways) == 1 and plain else f"({' | '.join(ways)})"


@functools.lru_cache(maxsize=1024)
def _itself(code: int) -> str:
    return _in_json([(code, code)])


def _quoted(text: str) -> str:
    """In a literal of GBNF."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _code(code: int) -> str:
    """A character in GBNF's brackets."""
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
