"""What an operator and a tenant do with jobs that are there: dead letters, deletion, pauses; over HTTP and with the commands for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from api_support import Api, answers_while_writes_wait, job, serving
from test_api import error
from test_cli import Cli, fails

from lorayard.adapters import PUBLIC, AdapterRegistry, Manifest
from lorayard.celery_app import make_app
from lorayard.client import Client
from lorayard.ledger.audit import audit


@pytest.fixture
def command(api: Api, tmp_path: Any) -> Cli:
    return Cli(api, tmp_path)


def status(api: Api, job_id: str, who: str = "acme") -> str:
    return str(api.call("GET", f"/v1/jobs/{job_id}", who).json()["status"])


def add(api: Api, name: str, tenant: str, digest: str) -> None:
    """An adapter as far as the registry knows."""
    shape = {"rank": 16, "alpha": 32.0, "rslora": False, "scale_min": 2.0, "scale_max": 2.0, "targets": ["q_proj"], "n_layers": 1}
    fields = {"name": name, "tenant": tenant, "digest": digest, "base_name": "b", "n_bytes": 1, "created_ms": 1}
    manifest = msgspec.convert(shape | fields, Manifest)
    AdapterRegistry(api.ledger.client).add(tenant, name, manifest)


# -- dead letters ------------------------------------------------------------------------------------------------------------------------


def test_dead_letters_are_listed_read_and_tried_again(api: Api) -> None:
    first, second = api.bury(), api.bury()
    api.post(job())
    page = api.call("GET", "/v1/jobs?dead=true").json()
    assert [(row["id"], row["status"], row["attempts"]) for row in page["data"]] == [(second, "failed", 3), (first, "failed", 3)]
    assert [row["id"] for row in api.call("GET", f"/v1/jobs?dead=true&limit=1&after={second}").json()["data"]] == [first]
    assert api.call("GET", "/v1/jobs?dead=true", "globex").json()["data"] == []
    assert api.call("GET", f"/v1/jobs/{first}").json()["error"]["code"] == "worker_died"
    error(api.call("POST", f"/v1/jobs/{first}/retry", "globex"), 404, "job_not_found")
    document = api.call("POST", f"/v1/jobs/{first}/retry").json()
    assert (document["status"], document["attempts"], document["error"]) == ("queued", 0, None)
    problem = error(api.call("POST", f"/v1/jobs/{first}/retry"), 409, "not_a_dead_letter")
    assert "queued" in problem["message"]
    assert first in api.run("acme", 2)
    assert status(api, first) == "succeeded"
    assert audit(api.ledger) == []


def test_the_client_and_the_command_line_do_the_same(command: Cli) -> None:
    api = command.api
    dead = [api.bury() for _ in range(4)]
    with Client(key=api.keys["acme"], settings=api.settings) as client:
        assert [row["id"] for row in client.jobs(dead=True)["data"]] == dead[::-1]
        assert client.retry(dead[0])["status"] == "queued"
        client.delete(dead[0])
    fails(command("jobs", "show", dead[0]), "does not exist")
    rows = json.loads(command("jobs", "list", "--dead", "--json").stdout)
    assert [row["id"] for row in rows] == dead[:0:-1]
    assert command("jobs", "retry", dead[1]).stdout == f"{dead[1]} queued\n"
    assert command("jobs", "retry", "--all").stdout.splitlines() == [f"{dead[3]} queued", f"{dead[2]} queued"]
    assert command("jobs", "retry", "--all").stdout == ""
    fails(command("jobs", "retry"), "list --dead")
    fails(command("jobs", "retry", dead[1]), "no dead letter")
    again = api.bury(priority="high")
    assert command("jobs", "delete", "--dead").stdout == f"{again} deleted\n"
    assert command("jobs", "delete", dead[1]).stdout == f"{dead[1]} deleted\n"
    fails(command("jobs", "delete", dead[1]), "does not exist")


# -- deleting ----------------------------------------------------------------------------------------------------------------------------


def test_a_deleted_job_is_gone_with_all_that_named_it(api: Api) -> None:
    (row,) = api.post(job("a canary", id="canary-1", idempotency_key="canary-key", metadata={"m": "canary"}))
    error(api.call("DELETE", f"/v1/jobs/{row['id']}", "globex"), 404, "job_not_found")
    assert api.call("DELETE", f"/v1/jobs/{row['id']}").json() == {"id": "canary-1", "object": "job", "deleted": True}
    error(api.call("GET", "/v1/jobs/canary-1"), 404, "job_not_found")
    error(api.call("DELETE", "/v1/jobs/canary-1"), 404, "job_not_found")
    assert not list(api.ledger.client.scan_iter("*canary*"))
    assert api.call("GET", "/v1/jobs").json()["data"] == []
    (again,) = api.post(job("another", id="canary-1", idempotency_key="canary-key"))
    assert again == {"id": "canary-1", "status": "queued"}


def test_deleting_wakes_who_waits(api: Api) -> None:
    from concurrent.futures import ThreadPoolExecutor

    (row,) = api.post(job())
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(api.call, "GET", f"/v1/jobs/{row['id']}?wait=30")
        api.call("DELETE", f"/v1/jobs/{row['id']}")
        error(waiting.result(10), 404, "job_not_found")


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's
def test_what_came_by_celery_leaves_nothing_in_its_result_backend(api: Api, redis_url: str) -> None:
    from lorayard_scheduler.admission import Admission

    Admission(api.settings, api.ledger).submit("default", [job(id="by-celery")], via="celery")
    api.run("default")
    with make_app(redis_url) as app:
        app.backend.store_result("by-celery", {"status": "succeeded"}, "SUCCESS")
    assert api.call("GET", "/v1/jobs/by-celery", "root").json()["via"] == "celery"
    assert list(api.ledger.client.scan_iter("*by-celery*"))
    assert api.call("DELETE", "/v1/jobs/by-celery", "root").status_code == 200
    assert not list(api.ledger.client.scan_iter("*by-celery*"))


# -- holding back ------------------------------------------------------------------------------------------------------------------------


def groups(api: Api) -> set[tuple[str, str]]:
    """What could be planned."""
    return {(g.digest, g.tenant) for g in api.ledger.snapshot().groups if g.jobs}


def test_the_operator_holds_back_the_pool_a_tenant_or_an_adapter(api: Api) -> None:
    add(api, "shared", PUBLIC, "d" * 64)
    for who in ("acme", "globex"):
        api.post(job(), job(adapter="shared"), who=who)
    everything = groups(api)
    assert len(everything) == 4
    for what, name, left in (
        ({"pool": True}, "pool", set()),
        ({"tenant": "acme"}, "tenant:acme", {("base", "globex"), ("d" * 64, "globex")}),
        ({"adapter": "shared"}, f"adapter:{'d' * 64}", {("base", "acme"), ("base", "globex")}),
        ({"adapter": "shared", "tenant": "acme"}, f"group:{'d' * 64}:acme", everything - {("d" * 64, "acme")}),
    ):
        assert api.call("POST", "/v1/pause", "root", json=what).json() == {"paused": name, "changed": True}
        assert api.call("POST", "/v1/pause", "root", json=what).json()["changed"] is False
        assert groups(api) == left
        assert api.call("GET", "/v1/paused", "root").json()["data"] == [name]
        assert api.raw("GET", "/readyz").json()["paused"] is (name == "pool")
        assert api.call("POST", "/v1/resume", "root", json=what).json() == {"resumed": name, "changed": True}
        assert groups(api) == everything


def test_a_tenant_holds_back_its_own_jobs_only(api: Api) -> None:
    add(api, "shared", PUBLIC, "d" * 64)
    for who in ("acme", "globex"):
        api.post(job(), job(adapter="shared"), who=who)
    for wrong in ({"pool": True}, {"tenant": "globex"}, {"tenant": "globex", "adapter": "shared"}):
        error(api.call("POST", "/v1/pause", json=wrong), 403, "operator_only")
        error(api.call("POST", "/v1/resume", json=wrong), 403, "operator_only")
    assert api.call("POST", "/v1/pause", json={"adapter": "shared"}).json()["paused"] == f"group:{'d' * 64}:acme"
    assert groups(api) == {("base", "acme"), ("base", "globex"), ("d" * 64, "globex")}
    assert api.call("POST", "/v1/pause", json={"tenant": "acme"}).status_code == 200
    assert groups(api) == {("base", "globex"), ("d" * 64, "globex")}
    assert api.call("GET", "/v1/paused").json()["data"] == [f"group:{'d' * 64}:acme", "tenant:acme"]
    assert api.call("GET", "/v1/paused", "globex").json()["data"] == []
    error(api.call("POST", "/v1/pause", json={"adapter": "none"}), 404, "adapter_not_found")


def test_a_pause_of_an_adapter_that_was_replaced_ends_by_the_name_it_is_listed_by(command: Cli) -> None:
    api = command.api
    add(api, "mine", "acme", "a" * 64)
    api.post(job(adapter="mine"))
    assert api.call("POST", "/v1/pause", json={"adapter": "mine"}).json()["changed"] is True
    add(api, "mine", "acme", "b" * 64)
    assert api.call("POST", "/v1/resume", json={"adapter": "mine"}).json()["changed"] is False
    (listed,) = api.call("GET", "/v1/paused").json()["data"]
    error(api.call("POST", "/v1/resume", "globex", json={"what": listed}), 404, "not_paused")
    assert groups(api) == set()
    assert command("resume", listed).stdout == "resumed\n"
    assert groups(api) == {("a" * 64, "acme")}
    fails(command("resume", listed), "/v1/paused")
    fails(command("resume", listed, "--tenant", "acme"), "not both")


@pytest.mark.parametrize("body", [b"", b"{}", b"{", b'{"pool": true, "tenant": "acme"}', b'{"pol": true}', b'{"adapter": 3}', b"\xff"])
def test_a_pause_of_nothing_in_particular_is_refused(api: Api, body: bytes) -> None:
    assert '"pool": true' in error(api.call("POST", "/v1/pause", "root", content=body), 400, "invalid_request")["message"]


def test_a_pause_of_a_tenant_that_does_not_exist_is_told(command: Cli) -> None:
    api = command.api
    add(api, "shared", PUBLIC, "d" * 64)
    for wrong in ({"tenant": "acmee"}, {"tenant": "acmee", "adapter": "shared"}):
        assert "acmee" in error(api.call("POST", "/v1/pause", "root", json=wrong), 404, "tenant_not_found")["message"]
    fails(command("pause", "--tenant", "acmee", who="root"), "acmee", "lorayard tenants list")
    assert api.ledger.paused() == []
    api.ledger.pause("tenant:acmee")
    assert api.call("POST", "/v1/resume", "root", json={"tenant": "acmee"}).json()["changed"] is True, "what is there can be ended"


def test_a_pause_keeps_nobody_else_waiting_for_the_store(api: Api) -> None:
    assert answers_while_writes_wait(api, "POST", "/v1/pause", {"pool": True}, "root")["changed"] is True
    assert answers_while_writes_wait(api, "POST", "/v1/resume", {"pool": True}, "root")["changed"] is True


@pytest.mark.parametrize("path", ["pause", "resume"])
def test_a_pause_of_any_size_is_refused(api: Api, path: str) -> None:
    reply = api.call("POST", f"/v1/{path}", "root", content=b'{"pool": true' + b" " * 20_000 + b"}")
    error(reply, 413, "request_too_large")


def test_pause_and_resume_as_commands(command: Cli) -> None:
    assert command("pause", who="root").stdout.startswith("paused")
    assert command("pause", who="root").stdout == "was paused already\n"
    assert command("pause", "--tenant", "acme").stdout.startswith("paused")
    assert command("resume", who="root").stdout == "resumed; still paused: tenant:acme\n"
    assert command("resume", "--tenant", "acme").stdout == "resumed\n"
    assert command("resume", "--tenant", "acme").stdout == "was not paused\n"
    fails(command("pause"), "operator")


# -- memory ------------------------------------------------------------------------------------------------------------------------------


def test_a_server_that_is_nearly_full_takes_no_more_jobs_and_says_when_to_come_again(
    store: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    with serving(redis_url, tmp_path, max_memory=0.2) as api:  # far from what the server itself would refuse, and from what it may free
        api.new_keys()
        _is_full_and_then_not(api, store)


def _is_full_and_then_not(api: Api, store: redis.Redis) -> None:
    before = str(store.config_get("maxmemory")["maxmemory"])
    store.config_set("maxmemory", 2 * int(store.info("memory")["used_memory"]))
    try:
        reply = api.call("POST", "/v1/jobs", json=job())
        assert "maxmemory" in error(reply, 503, "ledger_full")["message"]
        assert int(reply.headers["retry-after"]) >= 1
    finally:
        store.config_set("maxmemory", before)
    assert api.post(job())[0]["status"] == "queued"
