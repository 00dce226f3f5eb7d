"""For producers: submit jobs and get their documents over HTTP. Needs nothing but the base install."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
import msgspec

from lorayard.errors import BadRequest, LorayardError, SetupError, Unavailable
from lorayard.jobs import TERMINAL
from lorayard.settings import Settings

CHUNK_JOBS = 1000
CHUNK_BYTES = 32 * 1024 * 1024
QUERY_IDS = 100
_POLL_S = 0.2
_POLL_MOST_S = 0.5
_AWAY_S = 30.0


class Client:
    """A connection to a Lorayard API. Address and key come from the settings unless given.

        with Client() as client:
            (job,) = client.submit([{"adapter": "banking77", "request": {"messages": [...]}}])
            print(client.result(job["id"])["response"])

    Raises `LorayardError` of the API, with its status and code; `Unavailable` when nothing answers.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, settings: Settings | None = None, timeout_s: float = 90.0
    ) -> None:
        settings = settings or Settings.load()
        self.url = (url or settings.client_url).rstrip("/")
        headers = {"Authorization": f"Bearer {_checked_key(key or find_key(settings))}"}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)
        except httpx.InvalidURL as error:
            raise SetupError(f"{self.url!r} is not a URL ({error}): correct LORAYARD_API_URL") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -- jobs ---------------------------------------------------------------------------------------------------------------------------

    def submit(
        self, jobs: Sequence[dict[str, Any] | str | bytes], *, heard: Callable[[int], object] = lambda _: None
    ) -> list[dict[str, Any]]:
        """Enqueue job objects (or their JSON). One answer a job, in order: `{"id", "status", "eta"}` or `{"index", "error"}`.

        `eta` is left out where nobody can tell, else `{"median_ms", "p80_ms", "risk"}`: half of such jobs have ended by the one moment,
        four of five by the other (ms since 1970), and `risk` is the probability of missing the deadline, None without one.
        A job that is refused harms no other. Sent in chunks; `index` counts over all of them, and `heard` is told how many jobs each
        chunk had. Where one fails, the error that is raised has as its `answers` one of each job all the same: with the code `not_known`
        where no answer came, so that it may have been accepted, and `not_sent` for what comes behind. With an `id` or `idempotency_key`
        a job can be sent again in any case: the same is not made twice.
        """
        answers: list[dict[str, Any]] = []
        for lines in _chunks(
            [job if isinstance(job, bytes) else job.encode() if isinstance(job, str) else msgspec.json.encode(job) for job in jobs]
        ):
            try:
                reply = self._http_call(
                    "POST", "/v1/jobs", content=b"\n".join(lines), headers={"Content-Type": "application/jsonl"}, refused=True
                )
            except LorayardError as error:
                error.answers = answers + _unanswered(error, len(answers), len(lines), len(jobs))
                raise
            for row in reply["jobs"]:
                answers.append(row | {"index": len(answers)} if "error" in row else row)
            heard(len(lines))
        return answers

    def job(self, job_id: str, *, wait_s: float = 0) -> dict[str, Any]:
        """The job's document; with `wait_s`, as soon as it ends and at most so much later (the API waits 60 s at most).

        `explanation` is a sentence: what it waits or waited for. Until it ends, `eta` is as in `submit`, or None.
        """
        document: dict[str, Any] = self._http_call("GET", f"/v1/jobs/{_segment(job_id)}", params={"wait": wait_s} if wait_s else None)
        return document

    def result(self, job_id: str, *, timeout_s: float = 3600.0) -> dict[str, Any]:
        """Wait for the job's end, through a restart of the API too. Raises `Unavailable` when that takes longer than `timeout_s`."""
        give_up = time.monotonic() + timeout_s
        while True:
            left = give_up - time.monotonic()
            wait_s = max(0.0, min(30.0, left))
            document: dict[str, Any] = self._poll(f"/v1/jobs/{_segment(job_id)}", {"wait": wait_s})
            if document["status"] in TERMINAL:
                return document
            if left <= 0:
                raise Unavailable(f"job {job_id} is still {document['status']} after {timeout_s:.0f} s; poll it again later")

    def results(self, job_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The documents of many jobs, each once, as they end. Ids that no longer exist are passed over.

        Asks again after a fiftieth of the time it has taken so far: a worker on the same cores has better to do than wait for polls.
        """
        pending = list(dict.fromkeys(job_ids))
        started = time.monotonic()
        while pending:
            ended, gone = [], set()
            for start in range(0, min(len(pending), 10 * QUERY_IDS), QUERY_IDS):
                part = pending[start : start + QUERY_IDS]
                found = self._poll("/v1/jobs", {"ids": ",".join(part)})["data"]
                ended += [document for document in found if document["status"] in TERMINAL]
                gone |= set(part) - {document["id"] for document in found}
            yield from ended
            done = gone | {document["id"] for document in ended}
            pending = [job_id for job_id in pending if job_id not in done]
            if pending:
                time.sleep(min(max(_POLL_S, (time.monotonic() - started) / 50), _POLL_MOST_S))

    def jobs(self, *, limit: int = 100, status: str | None = None, after: str | None = None, dead: bool = False) -> dict[str, Any]:
        """A page of the tenant's newest jobs, or dead letters, without their responses; `after` a page's `last_id` comes the next; where
        that job is gone, an error with the code `cursor_gone`."""
        params = {"limit": limit, "status": status, "after": after, "dead": "true" if dead else None}
        page: dict[str, Any] = self._http_call("GET", "/v1/jobs", params={k: v for k, v in params.items() if v is not None})
        return page

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel it at any state; one that has ended stays as it is. Its document."""
        document: dict[str, Any] = self._http_call("POST", f"/v1/jobs/{_segment(job_id)}/cancel")
        return document

    def retry(self, job_id: str) -> dict[str, Any]:
        """Queue a dead letter again. Its document."""
        document: dict[str, Any] = self._http_call("POST", f"/v1/jobs/{_segment(job_id)}/retry")
        return document

    def delete(self, job_id: str) -> None:
        """Remove a job at any state, with its request, its result and its idempotency key."""
        self._http_call("DELETE", f"/v1/jobs/{_segment(job_id)}")

    # -- holding back -------------------------------------------------------------------------------------------------------------------

    def pause(self, *, pool: bool = False, adapter: str | None = None, tenant: str | None = None) -> bool:
        """Hold back the pool's, an adapter's or a tenant's jobs. What runs goes on, and jobs are accepted. False if they were held back."""
        return bool(self._http_call("POST", "/v1/pause", json=_what(pool, adapter, tenant))["changed"])

    def resume(self, *, pool: bool = False, adapter: str | None = None, tenant: str | None = None, what: str | None = None) -> bool:
        """The end of the pause of the same name, or of `what`, as `paused` lists it. False if there was none."""
        body = {"what": what} if what else _what(pool, adapter, tenant)
        return bool(self._http_call("POST", "/v1/resume", json=body)["changed"])

    def paused(self) -> list[str]:
        """What is paused: pool, adapter:DIGEST, tenant:TENANT, group:DIGEST:TENANT."""
        data: list[str] = self._http_call("GET", "/v1/paused")["data"]
        return data

    # -- adapters -----------------------------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, path: Path, *, public: bool = False) -> dict[str, Any]:
        """Add a PEFT adapter: a folder or a zip. Returns its manifest."""
        files = {"file": (f"{name}.zip", _zip(path), "application/zip")}
        manifest: dict[str, Any] = self._http_call("POST", "/v1/adapters", data={"name": name, "public": str(public).lower()}, files=files)
        return manifest

    def adapters(self) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self._http_call("GET", "/v1/adapters")["data"]
        return data

    def remove_adapter(self, name: str, *, public: bool = False) -> None:
        """Take a name away from your own adapters; with `public` (the operator's key only) from everyone's."""
        self._http_call("DELETE", f"/v1/adapters/{_segment(name)}", params={"public": "true"} if public else None)

    def publish_adapter(self, name: str, *, to: str = "groq", model: str | None = None, tenant: str | None = None) -> dict[str, Any]:
        """Want it, and later contents of its name, at a hosted service; its publication, whose `state` becomes ready or refused.

        With `model`, it is there under that id already. That, and another `tenant`'s adapters here and below, need the operator's key.
        """
        body = {"to": to} | ({"model": model} if model else {})
        document: dict[str, Any] = self._http_call("PUT", _publication(name), json=body, params=_of(tenant))
        return document

    def publication(self, name: str, *, tenant: str | None = None) -> dict[str, Any]:
        """Of an adapter at the hosted service."""
        document: dict[str, Any] = self._http_call("GET", _publication(name), params=_of(tenant))
        return document

    def unpublish_adapter(self, name: str, *, tenant: str | None = None) -> bool:
        """Take it away from the hosted service; False if it was not there."""
        return bool(self._http_call("DELETE", _publication(name), params=_of(tenant))["deleted"])

    def hosted(self) -> dict[str, Any]:
        """What the tenant may do at the hosted service, has there (`data`) and has spent."""
        document: dict[str, Any] = self._http_call("GET", "/v1/hosted")
        return document

    def ready(self) -> dict[str, Any]:
        """What `/readyz` says: pool, live workers, whether a scheduler leads."""
        document: dict[str, Any] = self._http_call("GET", "/readyz")
        return document

    def _poll(self, path: str, params: dict[str, Any]) -> Any:
        """Ask again while the API is away: it may be starting again, and asking twice changes nothing."""
        give_up = time.monotonic() + _AWAY_S
        while True:
            try:
                return self._http_call("GET", path, params=params)
            except Unavailable:
                if time.monotonic() > give_up:
                    raise
                time.sleep(_POLL_S)

    def _http_call(self, method: str, path: str, *, refused: bool = False, **kwargs: Any) -> Any:
        """The decoded answer. `refused`: an error answer that lists every job's error is an answer too."""
        try:
            reply = self._http.request(method, path, **kwargs)
        except httpx.TransportError as error:
            never = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.UnsupportedProtocol)
            raise Unavailable(
                f"no answer from {self.url} ({error or type(error).__name__}): is the fleet up? 'lorayard up' starts it",
                code="unreachable" if never else "no_answer",
            ) from None
        try:
            body = msgspec.json.decode(reply.content)
        except msgspec.DecodeError:
            body = {}
        if reply.is_success or (refused and "jobs" in body):
            return body
        raise _error(reply, body)


def _unanswered(error: LorayardError, start: int, sent: int, total: int) -> list[dict[str, Any]]:
    """Of the jobs from `start` on, of which so many were sent with the request that failed."""
    if error.status < 500:
        told = error
    elif error.code == "unreachable":
        told = Unavailable(f"not sent: {error.message}", code="not_sent")
    else:
        told = Unavailable(f"not known whether it was accepted: {error.message}", code="not_known")
    behind = Unavailable(f"not sent: {error.message}", code="not_sent")
    return [{"index": i, "error": (told if i < start + sent else behind).document()} for i in range(start, total)]


def _what(pool: bool, adapter: str | None, tenant: str | None) -> dict[str, Any]:
    return {key: value for key, value in (("pool", pool), ("adapter", adapter), ("tenant", tenant)) if value}


def _segment(name: str) -> str:
    """A name as one segment of a path, whatever it holds."""
    return quote(name, safe="").replace(".", "%2E")


def _publication(name: str) -> str:
    return f"/v1/adapters/{_segment(name)}/publication"


def _of(tenant: str | None) -> dict[str, str] | None:
    return {"tenant": tenant} if tenant else None


def _error(reply: httpx.Response, body: Any) -> LorayardError:
    document = body.get("error") if isinstance(body, dict) else None
    if not isinstance(document, dict):
        document = {"message": f"HTTP {reply.status_code} from {reply.url}", "code": None, "param": None}
    kind = Unavailable if reply.status_code == 503 else LorayardError
    error = kind(str(document.get("message")), code=document.get("code"), param=document.get("param"))
    error.status = reply.status_code
    if isinstance(error, Unavailable):
        error.retry_after = float(reply.headers.get("retry-after", 5))
    return error


def find_key(settings: Settings) -> str:
    """The API key to use: the setting, else the one that the fleet's first start wrote to the state folder. Raises `SetupError`."""
    if settings.api_key:
        return settings.api_key
    path = settings.state_dir / "api_key"
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        raise SetupError(f"no API key: set LORAYARD_API_KEY, or run this where the fleet was started ({path} is not readable)") from None


def _checked_key(key: str) -> str:
    if not (key and key.isascii() and key.isprintable()):
        raise SetupError("the API key is empty or holds characters that no key has: correct LORAYARD_API_KEY or the file api_key")
    return key


def _chunks(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Lines in requests of a moderate size. A line break inside JSON text is only ever white space."""
    part: list[bytes] = []
    size = 0
    for line in lines:
        if part and (len(part) == CHUNK_JOBS or size + len(line) > CHUNK_BYTES):
            yield part
            part, size = [], 0
        part.append(line.replace(b"\r", b" ").replace(b"\n", b" ") if line.strip() else b"null")
        size += len(line)
    if part:
        yield part


def _zip(path: Path) -> bytes:
    """A zip as it is; of a folder, the files that make an adapter. Raises `BadRequest`."""
    if path.is_file():
        return path.read_bytes()
    if not path.is_dir():
        raise BadRequest(f"{path}: no such file or folder; give a PEFT folder or a zip of one")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in path.iterdir() if p.is_file()):
            archive.write(file, file.name)
    return buffer.getvalue()
