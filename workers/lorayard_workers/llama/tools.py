"""Calls of tools in what a model says: the form `<tool_call>{"name": …, "arguments": …}</tool_call>` of Hermes, Qwen and SmolLM3."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """What is left of the text, and the calls in it as OpenAI writes them. What cannot be read as a call stays text."""
    calls: list[dict[str, Any]] = []

    def taken(match: re.Match[str]) -> str:
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            return match[0]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return match[0]
        function = {"name": name, "arguments": json.dumps(arguments)}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        return ""

    return _CALL.sub(taken, text).strip() if "<tool_call>" in text else text, calls
