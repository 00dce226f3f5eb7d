"""Jobs that may run at home or at a hosted service, in a fleet with both: a local worker whose model is a script, and a hosted one."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.invariants import Scan
from faults.yard import Yard
from fleet_support import until
from hosted_service import BASE, KEY, Running, serving

from lorayard.ledger.policies import Policies, Policy

pytestmark = pytest.mark.fleet


@pytest.fixture
def service() -> Iterator[Running]:
    with serving(service_s=0.02) as running:
        yield running


@pytest.fixture
def yard(tmp_path: Path, service: Running) -> Iterator[Yard]:
    hosted: dict[str, Any] = {"hosted_model": BASE, "hosted_url": service.url, "hosted_key": KEY, "hosted_unlimited": True}
    with Yard(tmp_path, width=2, batch_rows_per_width=1, **hosted) as one:
        one.open(workers=1, adapters=False)
        Policies(one.store).set("acme", Policy(hosted=True))
        yield one


def hire(yard: Yard, *names: str) -> None:
    """Hosted workers, ready."""
    for name in names:
        yard.add(name, [sys.executable, "-m", "lorayard", "worker", "groq"], {"LORAYARD_WORKER_NAME": name})
    yard.ready({"worker-1", *names})


def job(n: int, route: str, ms: int = 300, **fields: Any) -> dict[str, Any]:
    return {"id": f"{route}-{n}", "route": route, "request": {"messages": [{"role": "user", "content": json.dumps({"ms": ms})}]}, **fields}


def ended(yard: Yard, ids: list[str]) -> dict[str, dict[str, Any]]:
    with yard.client("acme") as client:
        documents = {document["id"]: document for document in client.results(ids)}
    assert {document["status"] for document in documents.values()} == {"succeeded"}
    return documents


def settled(yard: Yard) -> bool:
    return not Scan(yard).live


def test_what_would_be_late_at_home_leaves_and_the_rest_stays(yard: Yard, service: Running) -> None:
    hire(yard, "g")
    with yard.client("acme") as client:
        client.submit([job(n, "auto", deadline_s=600) for n in range(20)])
        patient = ended(yard, [f"auto-{n}" for n in range(20)])
        assert {document["worker"] for document in patient.values()} == {"worker-1"}, "home has the time"
        assert not service.service.answered
        rows = (
            [job(n, "auto", deadline_s=8) for n in range(20, 140)]
            + [job(n, "local") for n in range(5)]
            + [job(n, "groq") for n in range(5)]
        )
        client.submit(rows)
    documents = ended(yard, [row["id"] for row in rows])
    where = Counter((document["route"], document["worker"]) for document in documents.values())
    assert where["local", "worker-1"] == where["groq", "g"] == 5
    assert where["auto", "g"] > 0
    assert where["auto", "worker-1"] > 0, "home goes on with what it can"
    assert set(where) == {("local", "worker-1"), ("groq", "g"), ("auto", "g"), ("auto", "worker-1")}
    assert "due time" in next(d["why"] for d in documents.values() if (d["route"], d["worker"]) == ("auto", "g"))
    assert sum(service.service.answered.values()) == where["auto", "g"] + where["groq", "g"]
    assert settled(yard)


def test_a_hosted_worker_that_is_killed_loses_nothing(yard: Yard, service: Running) -> None:
    hire(yard, "g", "h")
    service.service.service_s = 2.0
    ids = [f"groq-{n}" for n in range(200)]
    with yard.client("acme") as client:
        client.submit([job(n, "groq") for n in range(200)])
        until(lambda: "g" in {document["worker"] for document in client.jobs(limit=1000, status="running")["data"]})
    yard.members["g"].wanted = False
    os.kill(yard.members["g"].pid, signal.SIGKILL)
    service.service.service_s = 0.4
    documents = ended(yard, ids)
    assert max(document["attempts"] for document in documents.values()) == 2, "what ran there was begun again, once"
    assert {document["worker"] for document in documents.values()} <= {"g", "h"}
    assert yard.counts().get("stale", 0) == 0
    assert settled(yard)
