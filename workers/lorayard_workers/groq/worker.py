"""The process `lorayard worker groq`: the hosted backend under the same control as any other, and what one worker does there for all."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import msgspec
import structlog
from celery import Celery

from lorayard.adapters.hosting import Publications
from lorayard.adapters.store import ArtifactStore
from lorayard.errors import LorayardError, SetupError, Unavailable
from lorayard.hosted import BASES, organisation
from lorayard.jobs import BASE_DIGEST
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.policies import Policies
from lorayard.ledger.registry import HOSTED, WorkerRegistry
from lorayard.settings import Settings
from lorayard_workers.groq import adapters, batches
from lorayard_workers.groq.client import ServiceClient, ServiceError
from lorayard_workers.groq.keeping import Loop
from lorayard_workers.groq.runner import HostedRunner
from lorayard_workers.tasks import serve

log = structlog.get_logger("lorayard.hosted")


def serve_groq(settings: Settings, ledger: Ledger, app: Celery) -> None:
    """Until SIGTERM or SIGINT. Raises `SetupError` when the settings cannot work."""
    if not settings.hosted_model:
        raise SetupError("no hosted model: set LORAYARD_HOSTED_MODEL to the service's id of this pool's base, such as llama-3.1-8b-instant")
    base = settings.hosted_model
    if settings.worker_name is None:  # not the name of this machine's local worker
        settings = settings.model_copy(update={"worker_name": f"groq-{socket.gethostname().split('.')[0]}"[:64]})
    org, policies = organisation(settings, ledger.client), Policies(ledger.client)
    hosting = Hosting(base, Publications(ledger.client, settings.hosted_org, base))
    runner = HostedRunner(settings, org, policies, hosting.served, hosting.doubt)
    with ServiceClient(settings) as service, contextlib.ExitStack() as loops:
        _check_key(settings, service)
        announce_base(settings, ledger)
        keeper = batches.BatchKeeper(settings, ledger, org, policies, service, hosting.model)
        provisioner = adapters.Provisioner(settings, hosting.publications, policies, service, ArtifactStore.open(settings).get)
        loops.enter_context(Loop("provisioning", provisioner.sweep, adapters.SWEEP_S))
        if settings.hosted_api == "groq":
            loops.enter_context(Loop("batches", keeper.sweep, batches.SWEEP_S))
        serve(settings, ledger, app, runner, hosting.fetch, kind=HOSTED, handover=keeper.handover)


class Hosting:
    """Which models of the service stand for which adapters, and for none: `base`."""

    def __init__(self, base: str, publications: Publications) -> None:
        self._base = base
        self.publications = publications

    def served(self) -> list[str]:
        return [BASE_DIGEST, *(digest for digest, one in self.publications.all().items() if one.state == "ready")]

    def model(self, digest: str) -> str:
        """Raises `Unavailable` while it is not there yet, `LorayardError` with the reason where it cannot be."""
        if digest == BASE_DIGEST:
            return self._base
        found = self.publications.get(digest)
        if found is not None and found.state == "ready":
            return found.model
        if found is not None and found.state == "wanted":
            raise Unavailable("the adapter is not at the hosted service yet", code="adapter_not_hosted")
        why = found.error if found is not None and found.error else "it was taken away"
        raise LorayardError(f"the hosted service does not have the adapter: {why}", code="adapter_not_hosted")

    def fetch(self, digest: str, _: dict[str, Any]) -> str:
        return self.model(digest)

    def doubt(self, digest: str) -> None:
        """The service says it does not know the model: to be looked at, and brought there again."""
        if digest != BASE_DIGEST and (found := self.publications.get(digest)) is not None and found.state == "ready":
            log.warning("the service has forgotten an adapter", adapter=digest[:12])
            self.publications.tell(found, state="wanted")


def _check_key(settings: Settings, service: ServiceClient) -> None:
    try:
        service.models()
    except ServiceError as error:
        if error.status in (401, 403):
            raise SetupError(f"{settings.hosted_url} refuses the key ({error.message}): correct LORAYARD_HOSTED_KEY") from None
    except LorayardError as error:  # it may come; until then jobs are put off
        if error.code == "hosted_redirect":
            raise SetupError(error.message) from None
        log.warning("the hosted service does not answer yet", reason=error.message)


def announce_base(settings: Settings, ledger: Ledger) -> None:
    """Say what adapters must fit, where no local worker does: in a pool that never had one, or has none by its settings and none lives."""
    registry, known = WorkerRegistry(ledger.client), BASES.get(settings.hosted_model or "")
    seconds, micros = ledger.client.time()
    alive = registry.alive(settings.pool, int(seconds) * 1000 + int(micros) // 1000)
    left = not settings.local_worker and all(worker.hosted for worker in alive)
    if known is not None and (left or not registry.base(settings.pool)):
        names = [*known.names, *settings.hosted_base_names, *settings.model_names]
        registry.announce_base(settings.pool, msgspec.to_builtins(msgspec.structs.replace(known, names=names)))
