"""Routes of jobs: submit, list, show (with a long poll), cancel, delete; dead letters: list, retry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from celery import Celery
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from lorayard.errors import BadRequest, Conflict, LorayardError, NotFound, TooLarge
from lorayard.jobs import Status
from lorayard.ledger.ledger import Ledger
from lorayard.settings import Settings
from lorayard_scheduler.admission import Admission, Answer, Item
from lorayard_scheduler.api.http import Auth, Json, error_response, limited
from lorayard_scheduler.api.waiting import Waiting
from lorayard_scheduler.reasons import HostedLimits

WAIT_MOST_S = 60.0
LIST_MOST = 1000
SCAN_MOST = 5000


def routes(settings: Settings, ledger: Ledger, admission: Admission, waiting: Waiting, celery: Celery) -> APIRouter:
    """`/v1/jobs`. Whatever shows a job that has not ended says when it will have, and what it waits for."""
    router = APIRouter(prefix="/v1/jobs")
    limits = HostedLimits(settings, ledger.client)

    def tell(document: dict[str, Any], tenant: str) -> dict[str, Any]:
        return admission.quoting.tell(document, tenant, limits)

    @router.post("", status_code=202)
    async def submit(request: Request, who: Auth) -> Json:
        """One job object, `{"jobs": [...]}`, or JSON lines (`Content-Type: application/jsonl`)."""
        items, many = _items(
            await limited(request, settings.max_body_bytes, "send the jobs in several requests").body(),
            request.headers.get("content-type", ""),
        )
        if len(items) > settings.max_jobs_per_request:
            raise TooLarge(f"{len(items)} jobs in one request, more than {settings.max_jobs_per_request}: send them in several")
        answers = await run_in_threadpool(admission.submit, who.tenant, items)
        return _answers(answers, many)

    @router.get("")
    def listing(
        who: Auth,
        limit: Annotated[int, Query(ge=1, le=LIST_MOST)] = 100,
        status: Status | None = None,
        after: Annotated[str | None, Query(max_length=100)] = None,
        ids: Annotated[str | None, Query(max_length=40_000)] = None,
        dead: bool = False,
    ) -> Json:
        """The tenant's newest jobs first, without responses; `after` goes on from a page's `last_id`, while that is listed. `dead`: dead
        letters only.

        With a status, up to `SCAN_MOST` jobs are looked through for a page, so that one may be short and yet have more behind it.
        With `ids` (comma-separated, `LIST_MOST` at most), those jobs' whole documents instead; what does not exist is left out.
        """
        if ids is not None:
            wanted = list(dict.fromkeys(ids.split(",")))
            if len(wanted) > LIST_MOST:
                raise BadRequest(f"ids: {len(wanted)} in one request, more than {LIST_MOST}: ask in several", param="ids")
            found = [tell(d, who.tenant) for d in ledger.show(who.tenant, wanted) if d is not None]
            return Json({"object": "list", "data": found, "has_more": False})
        page = _page(ledger, who.tenant, limit, status, after, dead)
        return Json(page | {"data": [tell(d, who.tenant) for d in page["data"]]})

    router.include_router(_single(ledger, waiting, celery, tell))
    return router


def _single(ledger: Ledger, waiting: Waiting, celery: Celery, tell: Callable[[dict[str, Any], str], dict[str, Any]]) -> APIRouter:
    """What is done with one job."""
    router = APIRouter()

    def told(job_id: str, tenant: str) -> Json:
        (document,) = ledger.show(tenant, [job_id])
        return Json(document and tell(document, tenant))

    @router.get("/{job_id}")
    async def show(job_id: str, who: Auth, wait: Annotated[float, Query(ge=0)] = 0) -> Json:
        """The job's document; with `wait`, as soon as it has ended and at most so many seconds (60 at most) later."""
        document = await waiting.show(who.tenant, job_id, min(wait, WAIT_MOST_S))
        if document is None:
            raise _no_job(job_id)
        return Json(await run_in_threadpool(tell, document, who.tenant))

    @router.post("/{job_id}/cancel")
    def cancel(job_id: str, who: Auth) -> Json:
        """Cancel it, at any state; a job that has ended stays as it is."""
        if ledger.cancel(who.tenant, [job_id]) == ["missing"]:
            raise _no_job(job_id)
        return told(job_id, who.tenant)

    @router.post("/{job_id}/retry")
    def retry(job_id: str, who: Auth) -> Json:
        """Queue a dead letter again, with all its attempts and without the deadline it had."""
        if ledger.revive(who.tenant, [job_id]) == ["missing"]:
            (document,) = ledger.show(who.tenant, [job_id])
            if document is None:
                raise _no_job(job_id)
            raise Conflict(
                f"job {job_id} is {document['status']} and no dead letter: only a job that failed at its last attempt can be retried",
                code="not_a_dead_letter",
            )
        return told(job_id, who.tenant)

    @router.delete("/{job_id}")
    def delete(job_id: str, who: Auth) -> Json:
        """Remove it at any state, with its request, its result and its idempotency key."""
        (document,) = ledger.show(who.tenant, [job_id])
        if document is None or ledger.delete(who.tenant, [job_id]) == ["missing"]:
            raise _no_job(job_id)
        if document["via"] == "celery":
            with contextlib.suppress(NotImplementedError):  # a broker without a result backend
                celery.AsyncResult(job_id).forget()
        return Json({"id": job_id, "object": "job", "deleted": True})

    return router


def _page(ledger: Ledger, tenant: str, limit: int, status: Status | None, after: str | None, dead: bool) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    step = limit if status is None else max(limit, 200)
    last, more, scanned = after, True, 0
    while more and len(data) < limit and scanned < SCAN_MOST:
        ids = ledger.list_ids(tenant, limit=step + 1, after=last, dead=dead)
        more = len(ids) > step
        for job_id, document in zip(ids[:step], ledger.show(tenant, ids[:step]), strict=True):
            if len(data) == limit:
                more = True
                break
            last, scanned = job_id, scanned + 1
            if document is not None and status in (None, document["status"]):
                data.append(document | {"response": None})
    return {"object": "list", "data": data, "has_more": more, "last_id": last}


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"no job {job_id[:100]!r}: it does not exist, or its result has expired", code="job_not_found")


def _items(body: bytes, content_type: str) -> tuple[list[Item], bool]:
    """The jobs of a body, undecoded, and whether it is a list. Raises `BadRequest` where no job can be made out."""
    if "jsonl" in content_type or "ndjson" in content_type:
        if not body.strip():
            raise BadRequest("no jobs in the body: a line is one job object")
        return [line for line in body.split(b"\n") if line.strip()], True
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if "jobs" not in fields:
            return [body], False
        if len(fields) > 1:
            raise BadRequest(f"unknown field {next(f for f in fields if f != 'jobs')!r} beside 'jobs'")
        return [bytes(raw) for raw in msgspec.json.decode(fields["jobs"], type=list[msgspec.Raw])], True
    except msgspec.ValidationError:
        raise BadRequest('the body must be a job object or {"jobs": [job, ...]}') from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(
            f"the body is not valid JSON ({error}); JSON lines need Content-Type: application/jsonl", code="invalid_json"
        ) from None


def _answers(answers: list[Answer], many: bool) -> Json:
    """202 with an entry a job. Where every job is refused, the first error's status and, beside the entries, the error itself."""
    rows = [_row(i, answer) for i, answer in enumerate(answers)]
    errors = [a for a in answers if isinstance(a, LorayardError)]
    if not errors or len(errors) < len(answers):
        return Json({"jobs": rows}, status_code=202)
    if not many:
        raise errors[0]
    return error_response(errors[0], {"jobs": rows})


def _row(index: int, answer: Answer) -> dict[str, Any]:
    if isinstance(answer, LorayardError):
        return {"index": index, "error": answer.document()}
    row: dict[str, Any] = {"id": answer.id, "status": answer.status}
    if answer.eta is not None:
        row["eta"] = answer.eta
    return row
