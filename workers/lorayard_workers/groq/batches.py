"""Jobs that have time, through a hosted service's batch API. The ledger owns them (`Ledger.submit`); whichever worker lives tends them.

The ledger's batch becomes one file and one batch there, whose names carry its own: each step begins by looking at what the last keeper
wrote and, where that may be less than what he did, at what is there. So a crash at any point costs no line twice and loses none.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import structlog

from lorayard.errors import BadRequest, LorayardError, NotFound, Unavailable
from lorayard.hosted import hosted_body, no_money, prompt_tokens
from lorayard.jobs import ENDPOINT, adapter_of, lane_of
from lorayard.ledger.keys import split_ref
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.organisation import Organisation, Spent
from lorayard.ledger.policies import NOTHING_LEAVES, Policies
from lorayard.ledger.records import End, EndStatus, Submitted, Taken, TakenJob
from lorayard.settings import Settings
from lorayard_workers.groq.client import ServiceClient, ServiceError
from lorayard_workers.groq.keeping import holding
from lorayard_workers.groq.lines import Paid, cost_of, end_of, error_line, errors_of, line_of, name_of, rows_by_name, window
from lorayard_workers.groq.money import BatchMoney, by_tenant
from lorayard_workers.retries import backoff_ms

log = structlog.get_logger("lorayard.hosted")

HOLD_S = 60.0
SWEEP_S = 1.0
STUCK_S = 900.0
OVERDUE_S = 86_400.0
MISSES = 120
"""So often results that are not there are looked for: an hour, as shipped."""
SLACK_S = 600
"""What a job needs beyond the service's own time: to be gathered, uploaded, read back."""
MAX_BYTES = 90 * 1024 * 1024
PURPOSE = "batch"
_CHUNK = 500
_AT_ONCE = 32  # batches in a sweep
_OVER = ("completed", "expired", "cancelled", "failed")
_CODES = {"failed": "hosted_batch_refused", "completed": "hosted_batch_line"}  # of lines that are in no file
_MONEY_AGAIN_MS = 600_000


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a batch at the service. `tried`: something may have been created there; `alone`: there is no second one.
    `lines`: how many it has; `tenants`: of them, by number. `held`: money set aside at `date`, nano-dollars by tenant. `why`: what it
    waits for, other than the service's own time."""

    tried: bool = False
    file_id: str = ""
    batch_id: str = ""
    alone: bool = False
    tenants: list[str] = []
    date: str = ""
    held: dict[str, int] = {}
    lines: int = 0
    misses: int = 0
    cancelled: bool = False
    why: str = ""


class BatchKeeper:
    """`handover` on the worker's way in; `sweep` every so often. `model_of` tells the service's model of an adapter digest, or raises."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        organisation: Organisation,
        policies: Policies,
        service: ServiceClient,
        model_of: Callable[[str], str],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._policies = policies
        self._money = BatchMoney(settings, organisation, policies)
        self._service = service
        self._model_of = model_of
        self._token = secrets.token_hex(8)
        self._written: dict[str, Note] = {}  # by batch, in this sweep

    # -- in -----------------------------------------------------------------------------------------------------------------------------

    def handover(self, taken: Taken) -> Taken | None:
        """None when the ledger has the batch from now on; else what is left to be run at once."""
        if lane_of(taken.digest) != "batch":
            return taken
        needed_ms = (self._settings.hosted_batch_window_s + SLACK_S) * 1000
        hurry = [job for job in taken.jobs if not self._settings.hosted_batches or job.due - taken.taken < needed_ms]
        if hurry:  # they have been through a batch that ran out of time
            refs = {job.ref for job in hurry}
            self._give_back(taken, [job for job in taken.jobs if job.ref not in refs])
            return taken._replace(jobs=hurry)
        size, fits = 0, 0
        for job in taken.jobs:
            size += len(job.request) + 512
            fits += size < MAX_BYTES
        self._give_back(taken, taken.jobs[max(1, fits) :])
        self._ledger.submit(taken.batch, taken.fence, msgspec.json.encode(Note()))
        return None

    def _give_back(self, taken: Taken, jobs: Sequence[TakenJob]) -> None:
        if jobs:
            self._ledger.give_back(taken.batch, taken.fence, [job.ref for job in jobs])

    # -- step by step -------------------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        self._written.clear()
        for submitted in self._to_tend():
            try:
                self._step(submitted)
            except Unavailable as error:
                self._wait(submitted, error.message)
            except LorayardError as error:
                if isinstance(error, ServiceError) and error.status == 401:
                    self._wait(submitted, error.message)
                else:
                    self._fail(submitted, error)
            except Exception:  # harms no other batch
                log.exception("batch at the service not understood", batch=submitted.batch)
                self._wait(submitted, "what the service says of it is not understood: see the worker's log")

    def _to_tend(self) -> Iterator[Submitted]:
        """One at a time: each is held from its own beginning on."""
        for _ in range(_AT_ONCE):
            yield from self._ledger.tend(self._token, limit=1, hold_ms=round(HOLD_S * 1000))

    def _wait(self, submitted: Submitted, why: str) -> None:
        """It is looked at again when our hold on it ends; what could not even be begun for long goes back to its queue."""
        log.warning("batch at the service waits", batch=submitted.batch, reason=why)
        note = self._written.get(submitted.batch) or msgspec.json.decode(submitted.note, type=Note)
        self._look_again(submitted.batch, msgspec.structs.replace(note, why=why[:500]), HOLD_S)  # the doctor reads it
        age_s = (self._now_ms() - submitted.submitted) / 1000
        if age_s > (self._settings.hosted_batch_window_s + OVERDUE_S if note.tried else STUCK_S):
            self._put_off(submitted, "hosted_batch_stuck", why)

    def _now_ms(self) -> float:
        """By the ledger's clock."""
        seconds, micros = self._ledger.client.time()
        return 1000.0 * int(seconds) + int(micros) / 1000

    def _look_again(self, batch: str, note: Note, seconds: float) -> bool:
        self._written[batch] = note
        return self._ledger.note(batch, self._token, msgspec.json.encode(note), round(seconds * 1000))

    def _step(self, submitted: Submitted) -> None:
        note = msgspec.structs.replace(msgspec.json.decode(submitted.note, type=Note), why="")
        if not note.batch_id and note.tried:
            note = self._adopt(submitted.batch, note)
        if note.batch_id:
            self._poll(submitted, note)
        elif submitted.refs:
            self._create(submitted, note)
        else:
            self._clean_up(submitted, note)

    def _adopt(self, batch: str, note: Note) -> Note:
        """What an earlier keeper created and could not write down."""
        mine = self._there(batch)
        if mine:
            return msgspec.structs.replace(note, batch_id=str(mine[0]["id"]), file_id=str(mine[0].get("input_file_id") or ""))
        return note

    def _there(self, batch: str) -> list[dict[str, Any]]:
        """Its batches at the service, oldest first."""
        mine = [row for row in self._service.batches() if (row.get("metadata") or {}).get("lorayard") == batch]
        return sorted(mine, key=lambda row: (row.get("created_at") or 0, str(row.get("id"))))

    def _be_alone(self, batch: str, note: Note) -> Note:
        """Two keepers who took each other for dead may have made two: one is kept."""
        for row in self._there(batch):
            if str(row["id"]) != note.batch_id and row.get("status") not in _OVER:
                self._service.cancel_batch(str(row["id"]))
                log.warning("a second batch at the service cancelled", batch=batch, hosted=row["id"])
        return msgspec.structs.replace(note, alone=True)

    def _create(self, submitted: Submitted, note: Note) -> None:
        jobs = self._ledger.contents(submitted.batch, self._token)
        model = self._model_of(adapter_of(submitted.digest))
        tenants = sorted({split_ref(job.ref)[0] for job in jobs})
        bodies = list(self._bodies(submitted, jobs))
        held = self._money.hold(submitted.batch, bodies)
        poor = [(ref, held.poor[name_of(ref)]) for ref, _ in bodies if name_of(ref) in held.poor]
        self._finish(submitted, [End(ref, "later", _no_money(spent), delay_ms=_MONEY_AGAIN_MS) for ref, spent in poor])
        paid = {name: Paid(tenants.index(tenant), nano) for name, (tenant, nano) in held.held.items() if tenant in tenants}
        lines = [line_of(ref, body, model, paid[name_of(ref)]) for ref, body in bodies if name_of(ref) in paid]
        if not lines:
            self._look_again(submitted.batch, note, 0)
            return
        note = msgspec.structs.replace(note, tried=True, tenants=tenants, lines=len(lines), date=held.date, held=by_tenant(held))
        if not self._look_again(submitted.batch, note, HOLD_S):  # the intent, and that it is ours
            return
        with holding(lambda: self._look_again(submitted.batch, note, HOLD_S), HOLD_S / 3):
            file_id = self._file(f"lorayard-{submitted.batch}.jsonl", b"".join(lines))
        note = msgspec.structs.replace(note, file_id=file_id)
        if not self._look_again(submitted.batch, note, HOLD_S):
            return
        made = self._service.start_batch(file_id, window(self._settings.hosted_batch_window_s), {"lorayard": submitted.batch})
        note = msgspec.structs.replace(note, batch_id=str(made["id"]))
        self._look_again(submitted.batch, note, self._settings.hosted_batch_poll_s)
        log.info("batch at the service", batch=submitted.batch, hosted=note.batch_id, jobs=len(lines))

    def _bodies(self, submitted: Submitted, jobs: Sequence[TakenJob]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ref and body of those whose tenants let their data leave, and that the service takes; the others end here."""
        policies = self._policies.all()
        for job in jobs:
            tenant = split_ref(job.ref)[0]
            if not policies.get(tenant, NOTHING_LEAVES).hosted:
                message = f"tenant {tenant} no longer allows its data to leave for a hosted service"
                self._finish(submitted, [End(job.ref, "failed", error_line(message, "hosted_not_allowed"))])
                continue
            try:
                body, _ = hosted_body(msgspec.json.decode(job.request), self._settings, endpoint=job.meta.get("endpoint", ENDPOINT))
                prompt_tokens(body)
            except BadRequest as error:
                self._finish(submitted, [End(job.ref, "failed", msgspec.json.encode({"error": error.document()}))])
            except Exception:  # nested deeper than can be read, say: all of its batch would wait for ever
                log.exception("a job of a batch cannot be read", job=job.ref)
                broken = LorayardError("an internal error; the worker's log has it")
                self._finish(submitted, [End(job.ref, "retry", msgspec.json.encode({"error": broken.document()}))])
            else:
                yield job.ref, body

    def _file(self, filename: str, data: bytes) -> str:
        there = self._service.files(filename)
        whole = [row for row in there if row.get("bytes") in (None, len(data))]
        for row in there:
            if row not in whole[:1]:
                self._service.delete_file(str(row["id"]))
        return str(whole[0]["id"] if whole else self._service.upload(filename, data, PURPOSE)["id"])

    def _poll(self, submitted: Submitted, note: Note) -> None:
        try:
            batch = self._service.batch(note.batch_id)
        except NotFound:
            self._put_off(submitted, "hosted_batch_lost", "the service no longer knows the batch")
            self._clean_up(submitted, note)
            return
        status = batch.get("status")
        if not note.alone:
            note = self._be_alone(submitted.batch, note)
        if status not in _OVER:
            if not submitted.refs and not note.cancelled:  # all were cancelled: no more is to be paid for
                self._service.cancel_batch(note.batch_id)
                note = msgspec.structs.replace(note, cancelled=True)
            self._look_again(submitted.batch, note, self._settings.hosted_batch_poll_s if submitted.refs else 1.0)
            return
        if not self._read_back(submitted, note, batch):
            return
        self._clean_up(submitted, note, [batch.get("output_file_id"), batch.get("error_file_id")])
        log.info("batch at the service is over", batch=submitted.batch, hosted=note.batch_id, status=status)

    # -- out ----------------------------------------------------------------------------------------------------------------------------

    def _read_back(self, submitted: Submitted, note: Note, batch: dict[str, Any]) -> bool:
        """Money first, once; then every job's end: by its line, where there is one. False while the results are to be waited for."""
        with holding(lambda: self._look_again(submitted.batch, note, HOLD_S), HOLD_S / 3):  # they may be large
            contents = [self._content(str(batch[name])) for name in ("output_file_id", "error_file_id") if batch.get(name)]
        if None in contents and submitted.refs:
            return self._missed(submitted, note)
        rows = rows_by_name(content for content in contents if content)
        missing = batch.get("status") == "completed" and len(rows) < note.lines  # it says that it has run those too
        self._charge(submitted, note, self._money.spent(rows.values(), note.tenants, note.held, missing=missing))
        model, before = self._model_or_nothing(submitted), self._before(submitted)
        ends, lost, lay_ms = [], [], self._now_ms() - submitted.submitted
        for ref in submitted.refs:
            row = rows.get(name_of(ref))
            if row is None:
                lost.append(ref)
            else:
                notes, laters = before.get(ref, ([], 0))
                ends.append(end_of(ref, row, cost_of(row, self._money.prices), model, notes, laters, lay_ms))
        self._finish(submitted, ends)
        if lost:
            why = errors_of(batch) or f"the batch {batch.get('status')} before this line was run"
            code = _CODES.get(str(batch.get("status")), "hosted_batch_unfinished")
            outcome = error_line(why, code)
            status: EndStatus = "later" if code == "hosted_batch_unfinished" else "retry"
            self._finish(submitted, [End(ref, status, outcome, delay_ms=backoff_ms(status, 0)) for ref in lost])
        return True

    def _content(self, file_id: str) -> bytes | None:
        """None where there is no such file: it is to come yet, or a keeper who was lost while he cleaned up has read it."""
        try:
            return self._service.content(file_id)
        except NotFound:
            return None

    def _missed(self, submitted: Submitted, note: Note) -> bool:
        """The results of a batch that is over are not there. They may come; if not, its lines count as run: paid at their most."""
        if note.misses < MISSES:
            self._look_again(submitted.batch, msgspec.structs.replace(note, misses=note.misses + 1), self._settings.hosted_batch_poll_s)
            return False
        self._charge(submitted, note, Counter(note.held))
        outcome = error_line("the service has lost the results of the batch", "hosted_batch_results_lost")
        self._finish(submitted, [End(ref, "retry", outcome, delay_ms=backoff_ms("retry", 0)) for ref in submitted.refs])
        return True

    def _model_or_nothing(self, submitted: Submitted) -> str:
        try:
            return self._model_of(adapter_of(submitted.digest))
        except LorayardError:
            return ""

    def _before(self, submitted: Submitted) -> dict[str, tuple[list[str], int]]:
        """What was changed in the jobs' requests, and how often they were put off, by ref."""
        known = {}
        for job in self._ledger.contents(submitted.batch, self._token):
            with contextlib.suppress(Exception):  # of some it could not be read when the lines were made
                known[job.ref] = hosted_body(msgspec.json.decode(job.request), self._settings)[1], job.laters
        return known

    def _charge(self, submitted: Submitted, note: Note, spent: Counter[str]) -> None:
        self._money.charge(submitted.batch, adapter_of(submitted.digest), note.date, note.held, spent)

    def _finish(self, submitted: Submitted, ends: Sequence[End]) -> None:
        for start in range(0, len(ends), _CHUNK):
            self._ledger.finish(submitted.batch, submitted.fence, ends[start : start + _CHUNK])

    def _put_off(self, submitted: Submitted, code: str, message: str) -> None:
        outcome = error_line(message, code)
        self._finish(submitted, [End(ref, "later", outcome, delay_ms=backoff_ms("later", 0)) for ref in submitted.refs])

    def _fail(self, submitted: Submitted, error: LorayardError) -> None:
        """The service refuses the batch as a whole: each job has used an attempt, and comes again while it has more; none where its adapter
        is not there."""
        log.warning("a batch cannot be run", batch=submitted.batch, reason=error.message)
        again = isinstance(error, ServiceError | NotFound)
        outcome = error_line(error.message, "hosted_batch_refused" if again else error.code)
        ends = [End(ref, "retry" if again else "failed", outcome, delay_ms=backoff_ms("retry", 0)) for ref in submitted.refs]
        self._finish(submitted, ends)
        known = self._written.get(submitted.batch) or msgspec.json.decode(submitted.note, type=Note)
        note = msgspec.structs.replace(known, tried=True)
        self._look_again(submitted.batch, note, 1.0)  # what is left of it there is cleaned up next

    def _clean_up(self, submitted: Submitted, note: Note, made: Iterable[Any] = ()) -> None:
        """Nothing of it stays there, nor of the money that was held for it; then it is closed here."""
        batch = submitted.batch
        if not note.date:  # who held money for it may not have come to write that down
            held = self._money.held(batch)
            note = msgspec.structs.replace(note, date=held.date, held=by_tenant(held))
        self._charge(submitted, note, Counter())  # nothing where that was done
        for file_id in [note.file_id, *made]:
            if file_id:
                self._service.delete_file(str(file_id))
        if note.tried:
            for row in self._service.files(f"lorayard-{batch}.jsonl"):
                self._service.delete_file(str(row["id"]))
        self._ledger.settle(batch, self._token)


def _no_money(spent: Spent) -> bytes:
    return error_line(f"{no_money(spent)}. The job waits for that, or for its deadline", "budget_exhausted")
