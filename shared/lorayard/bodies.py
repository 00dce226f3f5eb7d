"""OpenAI request bodies as Lorayard understands them: the fields there are, and a refusal by name of what there is not.

Checked before a job is accepted (`Admission`) and read again by the worker, which alone knows the model's tokens and template.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from lorayard.errors import BadRequest

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_MAX_STOPS = 4
MAX_CHOICES = 16

# Fields whose given value changes nothing, so that ordinary clients need not be rewritten. Any other field is refused by name.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "stream": (False,),
    "store": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "modalities": (["text"],),
}

_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class CommonBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds have."""

    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: int | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    user: str | None = None

    @property
    def stops(self) -> list[bytes]:
        """The stop strings as UTF-8. Raises `BadRequest`."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(texts) > _MAX_STOPS or not all(texts):
            raise BadRequest(f"stop: give up to {_MAX_STOPS} strings, none of them empty", param="stop")
        return [text.encode("utf-8", "replace") for text in texts]


class Part(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | UnsetType = UNSET

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates know messages: text content, and no role that only OpenAI has."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        plain = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return plain if self.name is UNSET else {**plain, "name": str(self.name)}


class ChatBody(CommonBody):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class CompletionBody(CommonBody):
    """Of `/v1/completions`: one prompt, as text or token ids."""

    prompt: str | list[str | int]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


Body = ChatBody | CompletionBody


def read_body(endpoint: str, fields: dict[str, Any]) -> Body:
    """Check a decoded body. Raises `BadRequest` that names the field at fault."""
    if endpoint not in (CHAT, COMPLETION):
        raise BadRequest(f"{endpoint}: workers answer only {CHAT} and {COMPLETION} yet", code="endpoint_unavailable", param="endpoint")
    kind: type[Body] = ChatBody if endpoint == CHAT else CompletionBody
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in list(given.items()):
        if name in kind.__struct_fields__:
            continue
        if value not in _HARMLESS.get(name, ()):
            raise BadRequest(f"{name}: workers do not support it; leave it out", code="unsupported_parameter", param=name)
        del given[name]
    try:
        body = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        param = where.rstrip("`").lstrip(".")
        if not param and "missing required field" in text:
            param = text.split("`")[1]
        raise BadRequest(f"{param or 'request'}: {text}", param=param or None) from None
    _ = body.stops
    if isinstance(body, ChatBody) and body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs: set logprobs to true with it", param="top_logprobs")
    return body
