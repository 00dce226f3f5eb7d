"""A keeper of hosted batches against the stand-in, with a real ledger; the test as scheduler and worker."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import redis
from fleet_support import until
from hosted_service import BASE, Running
from hosted_support import settings_of

from lorayard.hosted import answer_tokens, hosted_body, organisation, price, prompt_tokens
from lorayard.ledger.audit import audit
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.records import Entry
from lorayard.ledger.registry import open_ledger
from lorayard_workers.groq.batches import BatchKeeper
from lorayard_workers.groq.client import ServiceClient

DAYS_MS = 3 * 86_400_000


class Desk:
    """A keeper, and the test as scheduler and worker."""

    def __init__(self, store: redis.Redis, service: Running, client: ServiceClient) -> None:
        self.settings = settings_of(service, hosted_batch_poll_s=0.02)
        self.ledger: Ledger = open_ledger(store, self.settings)
        self.org = organisation(self.settings, store)
        self.policies = Policies(store)
        self.policies.set("acme", Policy(hosted=True))
        self.policies.set("zeta", Policy(hosted=True))
        self.keeper = BatchKeeper(self.settings, self.ledger, self.org, self.policies, client, lambda _: BASE)
        self.epoch = self.ledger.lead("test", 10**9)
        self._batches = 0

    def put(self, *ids: str, tenant: str = "acme", deadline_ms: int = DAYS_MS, **request: Any) -> None:
        entry = Entry("", tenant, "base@batch", 0, deadline_ms, 0, 3, "http", "", "", b"{}", b"")
        bodies = {i: {"messages": [{"role": "user", "content": f"{tenant} {i}"}], "max_tokens": 8} | request for i in ids}
        self.ledger.enqueue([entry._replace(id=i, request=msgspec.json.encode(body)) for i, body in bodies.items()], max_queued=9999)

    def claim(self) -> str:
        """What is queued is claimed, taken and handed over; the batch's name."""
        self._batches += 1
        name = f"b{self._batches}"
        takes = [("acme", 99), ("zeta", 99)]
        self.ledger.claim(epoch=self.epoch, worker="g", most=9, batch=name, digest="base@batch", delivery_ms=9999, why="", takes=takes)
        taken = self.ledger.take(name, "g", "i", 9999)
        assert taken is not None
        self.left = self.keeper.handover(taken)
        return name

    def spent(self) -> int:
        """Nano-dollars, by all."""
        return self.org.spent(self.org.state(BASE).month).get("*", 0)

    def cost(self) -> int:
        """The same, as it was written down by adapter."""
        return sum(self.org.costs(self.org.state(BASE).month).values())

    def at_most(self, job_id: str) -> int:
        """What is set aside for a job."""
        body, _ = hosted_body({"messages": [{"role": "user", "content": f"acme {job_id}"}], "max_tokens": 8}, self.settings)
        usd_in, usd_out = price(self.settings)
        return math.ceil(0.5 * (prompt_tokens(body) * usd_in + answer_tokens(body) * usd_out))

    def settled(self) -> bool:
        self.keeper.sweep()
        return not self.ledger.client.zcard(f"ly:{{{self.ledger.pool}}}:submitted")

    def use_up_attempts(self) -> None:
        """All three that a job has, a batch each."""
        for _ in range(3):
            until(lambda: self.ledger.reap().woken or self.ledger.counts()["queued"], 5)
            self.claim()
            until(self.settled, 10, every_s=0.02)

    def sweep_until(self, *statuses: str, tenant: str = "acme", ids: tuple[str, ...] = ("a", "b", "c")) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def as_expected() -> bool:
            over = self.settled()
            found[:] = [d for d in self.ledger.show(tenant, ids) if d is not None]
            return over and [d["status"] for d in found] == list(statuses)

        until(as_expected, 20, every_s=0.02)
        assert audit(self.ledger) == []
        return found
