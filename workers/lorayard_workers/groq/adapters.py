"""Adapters brought to a hosted service, verified there and removed: uploaded as a file, registered as a fine-tuning.

What is wanted stands in the ledger (`lorayard.adapters.hosting`). Names of files and fine-tunings carry the adapter's digest, so each step
begins by looking at what is there: whoever was interrupted, at any step, makes no second copy and leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import structlog
from redis.exceptions import LockError

from lorayard.adapters import PUBLIC
from lorayard.adapters.hosting import Publication, Publications
from lorayard.adapters.packaging import pack
from lorayard.adapters.peft import PeftAdapter
from lorayard.errors import AdapterRejected, LorayardError, NotFound, Unavailable
from lorayard.hosted import base_names
from lorayard.ledger.policies import NOTHING_LEAVES, Policies, Policy
from lorayard.settings import Settings
from lorayard_workers.groq.client import ServiceClient, ServiceError
from lorayard_workers.groq.keeping import holding

log = structlog.get_logger("lorayard.hosted")

LOCK_S = 20.0
SWEEP_S = 0.5
AGAIN_S = 15.0
CHECK_S = 600.0
"""What is ready is looked at so often: the service keeps files only while they are used, and people have hands."""
PURPOSE = "fine_tuning"


class Provisioner:
    """`sweep` does what is wanted and nobody else is doing. `load` reads an adapter from the artifact store."""

    def __init__(
        self,
        settings: Settings,
        publications: Publications,
        policies: Policies,
        service: ServiceClient,
        load: Callable[[str], PeftAdapter],
    ) -> None:
        self._settings = settings
        self._publications = publications
        self._policies = policies
        self._service = service
        self._load = load
        self._again: dict[str, float] = {}

    def sweep(self) -> None:
        policies = self._policies.all()
        for seen in self._publications.all().values():
            if not self._withdrawn(seen, policies) and self._is_due(seen):
                self._alone(seen.digest)

    def _withdrawn(self, seen: Publication, policies: Mapping[str, Policy]) -> bool:
        """Whether someone has it there whose data may not leave: all that one asked for is wanted no more, so it is to be read again."""
        owners = {title.partition("/")[0] for title in seen.titles} - {PUBLIC}
        barred = [owner for owner in sorted(owners) if not policies.get(owner, NOTHING_LEAVES).hosted]
        for owner in barred:
            log.warning("adapters are taken away: the tenant's leave was withdrawn", tenant=owner)
            self._publications.withdraw(owner)
        return bool(barred)

    def _is_due(self, seen: Publication) -> bool:
        if time.monotonic() < self._again.get(f"{seen.digest} {seen.asked_ms}", 0.0):
            return False
        return seen.state in ("wanted", "unwanted") or (
            seen.state == "ready" and self._publications.now() - seen.checked_ms > CHECK_S * 1000
        )

    def _alone(self, digest: str) -> None:
        lock = self._publications.lock(digest, LOCK_S)
        if not lock.acquire():
            return
        try:
            with holding(lock.reacquire, LOCK_S / 3):
                seen = self._publications.get(digest)
                if seen is not None and self._is_due(seen) and not self._withdrawn(seen, self._policies.all()):
                    self._work(seen)
        finally:
            try:
                lock.release()
            except LockError:
                log.warning("another worker may have worked on this adapter at the same time; duplicates are removed", adapter=digest[:12])

    def _work(self, seen: Publication) -> None:
        try:
            if seen.state == "unwanted":
                self._remove(seen)
            else:
                self._provide(seen)
        except (AdapterRejected, ServiceError) as error:
            if isinstance(error, ServiceError) and error.status == 401:
                self._later(seen, Unavailable(f"the service refuses the key: {error.message}", code="hosted_key"))
                return
            log.warning("adapter not hosted", adapter=seen.digest[:12], reason=error.message)
            self._publications.tell(seen, state="refused", error=error.message, code=error.code, model="", file_id="", tuning_id="")
        except NotFound as error:  # of our own artifact store
            self._publications.tell(seen, state="refused", error=error.message, code=error.code)
        except LorayardError as error:
            self._later(seen, error)

    def _later(self, seen: Publication, error: LorayardError) -> None:
        """Nothing is decided: what was ready goes on being used."""
        log.warning("adapter not hosted yet", adapter=seen.digest[:12], reason=error.message)
        self._again[f"{seen.digest} {seen.asked_ms}"] = time.monotonic() + getattr(error, "retry_after", AGAIN_S)
        if seen.state == "wanted":
            self._publications.tell(seen, error=error.message, code=error.code, checked_ms=seen.checked_ms)

    # -- there --------------------------------------------------------------------------------------------------------------------------

    def _provide(self, seen: Publication) -> None:
        if seen.given:
            self._verify_given(seen)
            return
        if self._settings.hosted_api != "groq":
            raise AdapterRejected(
                f"{self._settings.hosted_url} has no API to take adapters: load it there, then"
                " 'lorayard adapters publish NAME --to groq --model ID' with the id it has there",
                code="hosted_no_access",
            )
        name = _name(seen.digest)
        mine = [row for row in self._tunings() if row.get("name") == name]
        fit = [row for row in mine if row.get("base_model") == seen.base and row.get("fine_tuned_model")]
        tuning = fit[0] if fit else self._register(seen, name)
        self._discard((row for row in mine if row is not tuning), name, keep=str(tuning.get("input_file_id") or ""))
        model = str(tuning["fine_tuned_model"])
        ids = {"model": model, "tuning_id": str(tuning["id"]), "file_id": str(tuning.get("input_file_id") or "")}
        if self._publications.tell(seen, state="ready", error="", code="", **ids) and seen.state == "wanted":
            log.info("adapter hosted", adapter=seen.digest[:12], model=model)

    def _tunings(self) -> list[dict[str, Any]]:
        """Raises `ServiceError` that says so where the organisation may register no adapters."""
        try:
            return self._service.tunings()
        except NotFound as error:
            raise _no_access(404, error.message) from None
        except ServiceError as error:
            raise (_no_access(error.status, error.message) if error.status in (400, 403) else error) from None

    def _register(self, seen: Publication, name: str) -> dict[str, Any]:
        file_id = self._file(seen, f"{name}.zip")
        try:
            tuning = self._service.tune(name, file_id, seen.base)
        except NotFound as error:
            self._service.delete_file(file_id)
            raise _no_access(404, error.message) from None
        except ServiceError as error:
            self._service.delete_file(file_id)
            if error.status == 403:
                raise _no_access(403, error.message) from None
            raise AdapterRejected(f"the service rejected the adapter: {error.message}", code="adapter_refused_by_host") from None
        if not tuning.get("id") or not tuning.get("fine_tuned_model"):
            raise Unavailable("the service registered the adapter and did not say under which id; looking again", code="hosted_away")
        return tuning | {"input_file_id": tuning.get("input_file_id") or file_id}

    def _file(self, seen: Publication, filename: str) -> str:
        """Its file there: one that an earlier attempt has brought whole, else a new one."""
        data = pack(self._load(seen.digest), base_names(self._settings))
        there = self._service.files(filename)
        whole = [row for row in there if row.get("bytes") in (None, len(data))]
        for row in there:
            if row not in whole[:1]:
                self._service.delete_file(str(row["id"]))
        if whole:
            return str(whole[0]["id"])
        return str(self._service.upload(filename, data, PURPOSE)["id"])

    def _verify_given(self, seen: Publication) -> None:
        """Made by another hand: it is enough that the service lists it, where it lists anything."""
        try:
            models = self._service.models()
        except NotFound:
            models = [seen.model]
        if seen.model not in models:
            raise AdapterRejected(
                f"the hosted service lists no model {seen.model!r}: load it there under this id, or publish it with the id it has there",
                code="hosted_model_missing",
            )
        self._publications.tell(seen, state="ready", error="", code="")

    # -- gone ---------------------------------------------------------------------------------------------------------------------------

    def _remove(self, seen: Publication) -> None:
        if not seen.given and self._settings.hosted_api == "groq":
            name = _name(seen.digest)
            try:
                mine = [row for row in self._tunings() if row.get("name") == name]
            except ServiceError:  # no access (any more): only files can have been left
                mine = []
            self._discard(mine, name, keep="")
        if self._publications.forget(seen):
            log.info("adapter no longer hosted", adapter=seen.digest[:12])

    def _discard(self, tunings: Iterable[dict[str, Any]], name: str, *, keep: str) -> None:
        for row in tunings:
            self._service.delete_tuning(str(row["id"]))
        for row in self._service.files(f"{name}.zip"):
            if str(row["id"]) != keep:
                self._service.delete_file(str(row["id"]))


def _name(digest: str) -> str:
    return f"ly-{digest}"


def _no_access(status: int, message: str) -> ServiceError:
    return ServiceError(
        status,
        f"the organisation may not register LoRA adapters there (HTTP {status}: {message}): ask the service for LoRA access;"
        " until then its jobs run on local workers",
        "hosted_no_access",
    )
