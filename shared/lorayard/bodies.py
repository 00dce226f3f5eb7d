"""OpenAI request bodies as Lorayard understands them: the fields there are, and a refusal by name of what there is not.

Checked before a job is accepted (`Admission`) and read again by the worker, which alone knows the model's tokens and template.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from lorayard.errors import BadRequest
from lorayard.schemas import schema_grammar

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_MAX_STOPS = 4
MAX_CHOICES = 16

# Fields whose given value changes nothing, so that ordinary clients need not be rewritten. Any other field is refused by name.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "stream": (False,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}

_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_INT32, _INT64 = 2**31 - 1, 2**63 - 1  # what llama.cpp, the ledger's sums and other hosts can hold
_Tokens = Annotated[int, Meta(ge=1, le=_INT32)]


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`strict` is always kept: the grammar lets nothing else through (`schemas.py`)."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | UnsetType = UNSET


class Function(msgspec.Struct, kw_only=True):
    """A tool as the chat template shows it to the model; further fields are for the model to read."""

    name: Annotated[str, Meta(min_length=1)]
    description: str | UnsetType = UNSET
    parameters: dict[str, Any] | UnsetType = UNSET
    strict: bool | UnsetType | None = UNSET


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class Called(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"]
    function: Called


class CommonBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds have."""

    max_tokens: _Tokens | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=_INT32)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    user: str | None = None

    @property
    def stops(self) -> list[bytes]:
        """The stop strings as UTF-8. Raises `BadRequest`."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(texts) > _MAX_STOPS or not all(texts):
            raise BadRequest(f"stop: give up to {_MAX_STOPS} strings, none of them empty", param="stop")
        return [text.encode("utf-8", "replace") for text in texts]


class _Asked(msgspec.Struct):
    max_tokens: Any = None
    max_completion_tokens: Any = None


def asked_tokens(request: dict[str, Any] | bytes) -> int | None:
    """How many tokens at most a request asks for, of whatever kind it is, decoded or not; None where it does not say, or cannot be read
    because it is nested too deep."""
    try:
        found = msgspec.json.decode(request, type=_Asked) if isinstance(request, bytes) else msgspec.convert(request, _Asked)
    except (msgspec.MsgspecError, RecursionError):
        return None
    most = found.max_completion_tokens or found.max_tokens
    return int(most) if isinstance(most, int | float) and 1 <= most <= _INT32 else None


class Part(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """`refusal` is what the assistant said instead of `content`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    refusal: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET

    @property
    def plain(self) -> dict[str, Any]:
        """As chat templates know messages: text content, arguments as objects, and no role that only OpenAI has."""
        parts = self.content if isinstance(self.content, list) else []
        content = "".join(part.text for part in parts) if parts else self.content or self.refusal or ""
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for key in ("name", "tool_call_id"):
            if (value := getattr(self, key)) is not UNSET:
                plain[key] = value
        if self.tool_calls is not UNSET:
            plain["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments)
    except msgspec.DecodeError:
        arguments = call.function.arguments
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


class ChatBody(CommonBody):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] = []


class CompletionBody(CommonBody):
    """Of `/v1/completions`: one prompt, as text or token ids."""

    prompt: str | list[str | int]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class EmbeddingBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Of `/v1/embeddings`: one text or many, each as text or token ids."""

    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """Each input by itself. Raises `BadRequest`."""
        if isinstance(self.input, str):
            return [self.input]
        ids = [part for part in self.input if isinstance(part, int)]
        others = [part for part in self.input if not isinstance(part, int)]
        if ids and others:
            raise BadRequest("input: give texts, lists of token ids, or one list of token ids", param="input")
        return [ids] if ids else others


Body = ChatBody | CompletionBody | EmbeddingBody


def read_body(endpoint: str, fields: dict[str, Any]) -> Body:
    """Check a decoded body. Raises `BadRequest` that names the field at fault."""
    kinds: dict[str, type[Body]] = {CHAT: ChatBody, COMPLETION: CompletionBody, EMBEDDING: EmbeddingBody}
    if endpoint not in kinds:
        raise BadRequest(f"{endpoint}: workers answer only {', '.join(kinds)}", code="endpoint_unavailable", param="endpoint")
    kind = kinds[endpoint]
    given = {name: value for name, value in fields.items() if value is not None}
    uncalled = given.get("tool_choice") == "none"
    if uncalled:
        del given["tool_choice"]
    if isinstance(given.get("messages"), list):
        given["messages"] = [_said(message) for message in given["messages"]]
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
    if isinstance(body, EmbeddingBody):
        _ = body.texts
        return body
    _ = body.stops
    _check_format(body)
    if isinstance(body, ChatBody):
        _check_messages(body.messages)
        body.tools = [] if uncalled else body.tools
    if isinstance(body, ChatBody) and body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs: set logprobs to true with it", param="top_logprobs")
    return body


def _said(message: Any) -> Any:
    """A message without what says nothing: answers come back as history as clients' libraries write them, with all fields there are."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None and (name, value) != ("annotations", [])}


def _check_format(body: CommonBody) -> None:
    wanted = body.response_format
    if wanted is not None and (wanted.type == "json_schema") != (wanted.json_schema is not UNSET):
        raise BadRequest("response_format: json_schema goes with the type json_schema, and with no other", param="response_format")
    if wanted is not None and wanted.json_schema is not UNSET:
        schema_grammar(wanted.json_schema.schema)


def _check_messages(messages: list[Message]) -> None:
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.content is None and not (message.role == "assistant" and (message.tool_calls or message.refusal)):
            raise BadRequest(f"{where}.content: is missing", param=f"{where}.content")
        if message.tool_calls is not UNSET and message.role != "assistant":
            raise BadRequest(f"{where}.tool_calls: only the assistant calls tools", param=f"{where}.tool_calls")
        if message.refusal is not UNSET and message.role != "assistant":
            raise BadRequest(f"{where}.refusal: only the assistant refuses", param=f"{where}.refusal")
        if (message.tool_call_id is not UNSET) != (message.role == "tool"):
            raise BadRequest(f"{where}.tool_call_id: goes with the role tool, and with no other", param=f"{where}.tool_call_id")
