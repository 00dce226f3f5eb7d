"""OpenAI request bodies into tokens and sampling, generated tokens into OpenAI responses."""

from __future__ import annotations

import base64
import codecs
import json
from datetime import datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec
import numpy as np
from numpy.typing import NDArray

from lorayard.bodies import CHAT, COMPLETION, ChatBody, CommonBody, CompletionBody, EmbeddingBody, read_body
from lorayard.errors import BadRequest, PromptTooLong, SetupError
from lorayard_workers.llama.grammar import Grammar, json_grammar
from lorayard_workers.llama.sampling import COLDEST, Logprob, Sampler, SamplingParams
from lorayard_workers.llama.tools import tool_calls

if TYPE_CHECKING:
    from lorayard_workers.llama.bindings import Model


class Request(msgspec.Struct, frozen=True):
    """A body understood: tokens to compute, how many may follow, and when to stop. `stops` are UTF-8."""

    endpoint: str
    prompt: list[int]
    max_tokens: int
    stops: list[bytes]
    sampling: SamplingParams
    n: int = 1
    tools: bool = False  # calls of tools are looked for in the answer

    def sampler(self, choice: int, model: Model) -> Sampler:
        """Of one of its `n` answers: each has random numbers of its own, and a seed gives the same ones again."""
        seed, grammar = self.sampling.seed, self.sampling.grammar
        constraint = Grammar(model, grammar) if grammar is not None else None
        return Sampler(self.sampling, None if seed is None else (seed + choice) % 2**64, constraint)


class EmbeddingRequest(msgspec.Struct, frozen=True):
    """Texts as tokens, and whether their embeddings go out as base64 of little-endian float32."""

    texts: list[list[int]]
    base64: bool


class Answer(NamedTuple):
    """One generated answer: UTF-8, why it ended, its tokens, and their log-probabilities where they were asked for."""

    data: bytes
    finish: str
    tokens: int
    logprobs: list[Logprob]


class RequestReader:
    """Checks bodies against one model. `max_prompt` and `n_ctx` are tokens: the longest prompt, and prompt and answer together."""

    def __init__(self, model: Model, *, n_ctx: int, max_prompt: int) -> None:
        self._model = model
        self._n_ctx = n_ctx
        self.max_prompt = min(max_prompt, n_ctx - 1)
        self._template = _compile(model.chat_template) if model.chat_template else None

    def read(self, endpoint: str, body: bytes) -> Request | EmbeddingRequest:
        """Raises `BadRequest` that names the field at fault, or `PromptTooLong`."""
        fields = read_body(endpoint, msgspec.json.decode(body, type=dict[str, Any]))
        if isinstance(fields, EmbeddingBody):
            return EmbeddingRequest([self._embedded(text) for text in fields.texts], fields.encoding_format == "base64")
        return self._generation(endpoint, fields)

    def _embedded(self, text: str | list[int]) -> list[int]:
        tokens = self._tokens(text, "input") if isinstance(text, str) else self._checked(text, "input")
        if not tokens:
            raise BadRequest("input: a text is empty", param="input")
        if len(tokens) > self.max_prompt:
            raise self._too_long(f"{len(tokens)}", "input")
        return tokens

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if any(not 0 <= token < self._model.n_vocab for token in tokens):
            raise BadRequest(f"{param}: token ids are 0 to {self._model.n_vocab - 1}", param=param)
        return tokens

    def _generation(self, endpoint: str, fields: ChatBody | CompletionBody) -> Request:
        prompt = self._chat_prompt(fields) if isinstance(fields, ChatBody) else self._completion_prompt(fields)
        if not prompt:
            raise BadRequest("the prompt is empty", param="prompt")
        if len(prompt) > self.max_prompt:
            raise self._too_long(f"{len(prompt)}")
        limit = fields.max_tokens
        if isinstance(fields, ChatBody):
            limit = fields.max_completion_tokens or limit
        elif limit is None:
            limit = 16  # OpenAI's default for completions
        room = self._n_ctx - len(prompt)
        return Request(
            endpoint,
            prompt,
            min(limit or room, room),
            fields.stops,
            self._sampling(fields),
            fields.n,
            isinstance(fields, ChatBody) and bool(fields.tools),
        )

    def _too_long(self, count: str, param: str = "messages") -> PromptTooLong:
        return PromptTooLong(
            f"the prompt has {count} tokens, and at most {self.max_prompt} are allowed: shorten it, or give the workers a larger "
            f"LORAYARD_N_CTX (the model was trained for {self._model.n_ctx_train})",
            param=param,
        )

    def _tokens(self, text: str, param: str) -> list[int]:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise BadRequest(f"{param}: not valid Unicode", param=param) from None
        least = len(data) // self._model.max_token_bytes
        if least > self.max_prompt:  # not worth tokenizing
            raise self._too_long(f"more than {least}")
        return self._model.tokenize(data)

    def _chat_prompt(self, fields: ChatBody) -> list[int]:
        if self._template is None:
            raise BadRequest(f"this model has no chat template: use {COMPLETION}", param="messages")
        messages = [message.plain for message in fields.messages]
        tools = [msgspec.to_builtins(tool) for tool in fields.tools]
        if tools and "tools" not in (self._model.chat_template or ""):
            raise BadRequest("tools: this model's chat template knows no tools; describe them in a message", param="tools")
        try:
            text = self._template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=True,
                bos_token=self._model.special_text("bos"),
                eos_token=self._model.special_text("eos"),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise BadRequest(f"messages: the model's chat template refuses them: {error}", param="messages") from None
        return self._tokens(text, "messages")

    def _completion_prompt(self, fields: CompletionBody) -> list[int]:
        prompt = fields.prompt
        if isinstance(prompt, str):
            return self._tokens(prompt, "prompt")
        texts = [part for part in prompt if isinstance(part, str)]
        if len(texts) == 1:
            return self._tokens(texts[0], "prompt")
        if texts:
            raise BadRequest("prompt: one prompt a job; enqueue the others as jobs of their own", param="prompt")
        return self._checked([part for part in prompt if isinstance(part, int)], "prompt")

    def _sampling(self, fields: CommonBody) -> SamplingParams:
        top: int | None = None
        if isinstance(fields, ChatBody):
            top = (fields.top_logprobs or 0) if fields.logprobs else None
        elif isinstance(fields, CompletionBody):
            top = fields.logprobs
        bias: dict[int, float] = {}
        for token, value in fields.logit_bias.items():
            if not (token.isascii() and token.isdecimal() and int(token) < self._model.n_vocab):
                raise BadRequest(f"logit_bias: {token[:40]!r} is no token id of this model", param="logit_bias")
            bias[int(token)] = value
        wanted = fields.response_format
        grammar = None
        if wanted is not None and wanted.type != "text":
            grammar = json_grammar(None if wanted.json_schema is msgspec.UNSET else wanted.json_schema.schema)
        return SamplingParams(
            grammar=grammar,
            temperature=fields.temperature if fields.temperature >= COLDEST else 0.0,
            top_p=fields.top_p,
            top_k=fields.top_k,
            min_p=fields.min_p,
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            logit_bias=bias,
            seed=None if fields.seed is None else fields.seed % 2**64,
            top_logprobs=top,
        )


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks training targets in some templates; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        parser.stream.skip(1)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _compile(template: str) -> jinja2.Template:
    """A chat template, sandboxed: it comes with the weights, from whoever made them. The dialect is that of transformers."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals.update(raise_exception=refuse, strftime_now=strftime_now)
    try:
        return sandbox.from_string(template)
    except jinja2.TemplateError as error:
        raise SetupError(f"the model's chat template is broken: {error}") from None


def text_of(data: bytes) -> str:
    """Generated bytes as text: a character cut off by the end is left out, one broken within becomes U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def response(request: Request, answers: list[Answer], cached: int, pieces: list[bytes]) -> dict[str, Any]:
    """The OpenAI response without `id`, `model` and `created`. `cached`: tokens of the prompt that had been computed already."""
    prompt_tokens = len(request.prompt)
    completion_tokens = sum(answer.tokens for answer in answers)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    choices = [_choice(request, index, answer, pieces) for index, answer in enumerate(answers)]
    return {"object": "chat.completion" if request.endpoint == CHAT else "text_completion", "choices": choices, "usage": usage}


def embedding_response(request: EmbeddingRequest, vectors: list[NDArray[np.float32]]) -> dict[str, Any]:
    """The OpenAI response without `model`."""
    data: list[dict[str, Any]] = []
    for index, vector in enumerate(vectors):
        value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if request.base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = sum(map(len, request.texts))
    return {"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _choice(request: Request, index: int, answer: Answer, pieces: list[bytes]) -> dict[str, Any]:
    wanted = request.sampling.top_logprobs is not None
    choice: dict[str, Any] = {"index": index, "finish_reason": answer.finish, "logprobs": None}
    if request.endpoint == CHAT:
        text, calls = tool_calls(text_of(answer.data)) if request.tools else (text_of(answer.data), [])
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            choice["message"] |= {"content": text or None, "tool_calls": calls}
            choice["finish_reason"] = "tool_calls" if answer.finish == "stop" else answer.finish
        if wanted:
            choice["logprobs"] = {"content": [_chat_logprob(entry, pieces) for entry in answer.logprobs], "refusal": None}
        return choice
    choice["text"] = text_of(answer.data)
    if wanted:
        choice["logprobs"] = _completion_logprobs(answer.logprobs, pieces)
    return choice


def _named(token: int, logprob: float, pieces: list[bytes]) -> dict[str, Any]:
    piece = pieces[token]
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


def _chat_logprob(entry: Logprob, pieces: list[bytes]) -> dict[str, Any]:
    return {**_named(entry.token, entry.logprob, pieces), "top_logprobs": [_named(token, value, pieces) for token, value in entry.top]}


def _completion_logprobs(entries: list[Logprob], pieces: list[bytes]) -> dict[str, Any]:
    texts = [pieces[entry.token].decode("utf-8", "replace") for entry in entries]
    offsets = [0, *accumulate(map(len, texts))][: len(texts)]
    return {
        "tokens": texts,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{pieces[token].decode("utf-8", "replace"): value for token, value in entry.top} for entry in entries],
        "text_offset": offsets,
    }
