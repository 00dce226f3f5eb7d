"""The way to a hosted service: chat completions for the many (async), files, fine-tunings and batches for the few (blocking)."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Iterator
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import msgspec

from lorayard.errors import LorayardError, NotFound, SetupError, Unavailable
from lorayard.hosted import api_key
from lorayard.settings import Settings
from lorayard_workers.groq.answers import Failure, broken, failure, read_answer, read_error

CONNECT_S = 10.0
UPLOAD_S = 600.0
ASK_S = 60.0
DOWNLOAD_S = 1800.0
MOST_BYTES = 64 << 20
"""Of one answer, unpacked: more is no answer."""
MOST_FILE_BYTES = 1 << 30
"""Of a file, or of a page of a listing."""
_PAGES = 1000
_CONNECTIONS = 8  # in a pool
_STREAMS = 100  # of HTTP/2, all of which one connection carries


def _checked_url(settings: Settings) -> str:
    url = settings.hosted_url.rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise SetupError(f"LORAYARD_HOSTED_URL: {url!r} is not the address of an API, such as https://api.groq.com/openai/v1")
    return url


def _headers(settings: Settings) -> dict[str, str]:
    key = api_key(settings)
    if not (key.isascii() and key.isprintable()):
        raise SetupError("the key of the hosted service holds characters that no key has: correct LORAYARD_HOSTED_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class Reply:
    """A complete answer, with its headers; `seconds` from sending the request to its last byte."""

    __slots__ = ("body", "headers", "seconds")

    def __init__(self, body: dict[str, Any], headers: httpx.Headers, seconds: float) -> None:
        self.body, self.headers, self.seconds = body, headers, seconds


class _Pool:
    """Some of the connections."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.calls = 0


class ChatClient:
    """Chat completions over pooled connections, HTTP/2 where the service has it. Use it in one event loop; `close` it there.

    For every call a pool of httpx looks at each of its connections, so there are many small pools: with 50 calls at once in one pool, that
    took most of the time.
    """

    def __init__(self, settings: Settings) -> None:
        self._url = _checked_url(settings) + "/chat/completions"
        self._headers = _headers(settings) | {"Content-Type": "application/json"}
        self._most_s = settings.hosted_timeout_s
        self._timeout = httpx.Timeout(self._most_s, connect=CONNECT_S, pool=None)
        self._tls = httpx.create_ssl_context()
        self._pools: list[_Pool] = []
        self._together = _CONNECTIONS

    async def close(self) -> None:
        for pool in self._pools:
            await pool.http.aclose()

    def _pool(self) -> _Pool:
        """The first with room: those behind it come to rest when there is less to do."""
        for pool in self._pools:
            if pool.calls < self._together:
                return pool
        limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS, keepalive_expiry=60)
        http2 = importlib.util.find_spec("h2") is not None
        http = httpx.AsyncClient(headers=self._headers, http2=http2, limits=limits, timeout=self._timeout, verify=self._tls)
        self._pools.append(_Pool(http))
        return self._pools[-1]

    async def chat(self, body: bytes) -> Reply | Failure:
        """One call, never repeated here: who repeats must have asked the limits again."""
        pool = self._pool()
        pool.calls += 1
        try:
            return await self._call(pool.http, body)
        finally:
            pool.calls -= 1

    async def _call(self, http: httpx.AsyncClient, body: bytes) -> Reply | Failure:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._most_s):  # for all of it: an answer may come a byte at a time
                reply, content = await self._post(http, body)
        except (httpx.TimeoutException, TimeoutError) as error:
            return broken("timeout", f"the hosted service did not answer in time ({type(error).__name__})")
        except httpx.TransportError as error:
            return broken("connection_lost", f"the connection to the hosted service was lost ({error or type(error).__name__})")
        except httpx.HTTPError as error:
            return broken("bad_answer", f"the hosted service's answer could not be read ({type(error).__name__})")
        if reply.http_version == "HTTP/2":
            self._together = _STREAMS
        if content is None:
            return broken("bad_answer", f"the hosted service's answer was longer than {MOST_BYTES >> 20} MiB")
        seconds = time.monotonic() - started
        if not reply.is_success:
            return failure(reply.status_code, read_error(content), reply.headers)
        answer = read_answer(content)
        if answer is None:
            why = str(read_error(content).get("message") or "")[:500]
            return broken("bad_answer", "the hosted service's answer was not a whole chat completion" + (f": {why}" if why else ""))
        return Reply(answer, reply.headers, seconds)

    async def _post(self, http: httpx.AsyncClient, body: bytes) -> tuple[httpx.Response, bytes | None]:
        """The answer and what is in it; None for more than there may be."""
        async with http.stream("POST", self._url, content=body) as reply:
            content = bytearray()
            async for chunk in reply.aiter_bytes():
                content += chunk
                if len(content) > MOST_BYTES:
                    return reply, None
            return reply, bytes(content)


class ServiceError(LorayardError):
    """The service refused a request about files, fine-tunings or batches; the same again would fare no better."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message, code=code)
        self.status = status


class ServiceClient:
    """Files, fine-tunings, batches. Blocking. Raises `ServiceError`, `NotFound`, and `Unavailable` when another time may go better."""

    def __init__(self, settings: Settings) -> None:
        self._url = _checked_url(settings)
        self._root = self._url.removesuffix("/openai/v1")
        self._http = httpx.Client(headers=_headers(settings), timeout=httpx.Timeout(ASK_S, connect=CONNECT_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _request(self, method: str, url: str, *, most_s: float = ASK_S, **kwargs: Any) -> bytes:
        """What is in the answer, all of which must be here `most_s` after its beginning."""
        content = bytearray()
        try:
            with self._http.stream(method, url, **kwargs) as reply:
                give_up = time.monotonic() + most_s
                for chunk in reply.iter_bytes():
                    content += chunk
                    if len(content) > MOST_FILE_BYTES or time.monotonic() > give_up:
                        raise Unavailable("the hosted service's answer is too long, or takes too long", code="hosted_away")
        except httpx.HTTPError as error:
            raise Unavailable(f"the hosted service does not answer ({error or type(error).__name__})", code="hosted_away") from None
        if reply.is_success:
            return bytes(content)
        told = read_error(bytes(content))
        why = failure(reply.status_code, told, reply.headers)
        if reply.status_code == 404:
            raise NotFound(why.message, code=str(told.get("code") or "not_found"))
        if (why.how != "final" or why.blocked) and reply.status_code not in (401, 422):
            raise Unavailable(f"the hosted service cannot do it now: {why.message}", code=why.code, retry_after=max(1.0, why.after_s))
        raise ServiceError(reply.status_code, why.message, why.code)

    def _json(self, method: str, url: str, **kwargs: Any) -> dict[str, Any]:
        content = self._request(method, url, **kwargs)
        try:
            return msgspec.json.decode(content, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Unavailable("the hosted service's answer could not be read", code="hosted_away") from None

    def _list(self, url: str, **params: str) -> Iterator[dict[str, Any]]:
        """All rows of a listing, whichever way it has pages; some hosts have none, and say the same again."""
        seen: set[str] = set()
        more: dict[str, str] = {}
        for _ in range(_PAGES):
            page = self._json("GET", url, params=params | more)
            data = page.get("data")
            rows = [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []
            fresh = [row for row in rows if str(row.get("id")) not in seen]
            yield from fresh
            seen |= {str(row.get("id")) for row in fresh}
            paging = page.get("paging")
            cursor = paging.get("next_cursor") if isinstance(paging, dict) else None
            more = {"cursor": str(cursor)} if cursor else {"after": str(rows[-1].get("id"))} if page.get("has_more") and rows else {}
            if not more or not fresh:
                return

    def models(self) -> list[str]:
        return [str(row.get("id")) for row in self._list(f"{self._url}/models")]

    # -- files --------------------------------------------------------------------------------------------------------------------------

    def upload(self, name: str, data: bytes, purpose: str) -> dict[str, Any]:
        kind = "application/zip" if name.endswith(".zip") else "application/octet-stream"
        return self._json(
            "POST", f"{self._url}/files", data={"purpose": purpose}, files={"file": (name, data, kind)}, timeout=httpx.Timeout(UPLOAD_S)
        )

    def files(self, name: str) -> list[dict[str, Any]]:
        """Those of that name, oldest first."""
        found = [row for row in self._list(f"{self._url}/files") if row.get("filename") == name]
        return sorted(found, key=lambda row: (row.get("created_at") or 0, str(row.get("id"))))

    def content(self, file_id: str) -> bytes:
        return self._request("GET", f"{self._url}/files/{file_id}/content", most_s=DOWNLOAD_S)

    def delete_file(self, file_id: str) -> None:
        """No error where it is gone."""
        self._delete(f"{self._url}/files/{file_id}")

    def _delete(self, url: str) -> None:
        try:
            self._request("DELETE", url)
        except NotFound:
            return

    # -- fine-tunings: not under /openai ------------------------------------------------------------------------------------------------

    def tune(self, name: str, file_id: str, base: str) -> dict[str, Any]:
        body = {"input_file_id": file_id, "name": name, "type": "lora", "base_model": base}
        return _flat(self._json("POST", f"{self._root}/v1/fine_tunings", json=body))

    def tunings(self) -> list[dict[str, Any]]:
        """Oldest first, each with id, name, base_model, input_file_id, fine_tuned_model."""
        found = [_flat(row) for row in self._list(f"{self._root}/v1/fine_tunings")]
        return sorted(found, key=lambda row: (row.get("created_at") or 0, str(row.get("id"))))

    def delete_tuning(self, tuning_id: str) -> None:
        """No error where it is gone."""
        self._delete(f"{self._root}/v1/fine_tunings/{tuning_id}")

    # -- batches ------------------------------------------------------------------------------------------------------------------------

    def start_batch(self, file_id: str, window: str, metadata: dict[str, str]) -> dict[str, Any]:
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": window, "metadata": metadata}
        return self._json("POST", f"{self._url}/batches", json=body)

    def batch(self, batch_id: str) -> dict[str, Any]:
        return self._json("GET", f"{self._url}/batches/{batch_id}")

    def batches(self) -> Iterator[dict[str, Any]]:
        return self._list(f"{self._url}/batches")

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        return self._json("POST", f"{self._url}/batches/{batch_id}/cancel")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A fine-tuning, whether its fields lie in `data` or beside it: the documentation has both."""
    data = row.get("data")
    return {**(data if isinstance(data, dict) else {}), **{key: value for key, value in row.items() if key != "data" and value}}
