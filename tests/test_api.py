"""The HTTP API on a real port over the real ledger. Where a job must end, the test does the worker's part."""

from __future__ import annotations

import io
import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import redis
from api_support import EXAMPLES, Api, job, serving
from openai.types.chat import ChatCompletionMessage

from lorayard import embedded
from lorayard.adapters import BaseModel
from lorayard.client import Client
from lorayard.errors import LorayardError, Unavailable
from lorayard.ledger.registry import KeyRing, WorkerInfo, WorkerRegistry
from lorayard.settings import Settings

BANKING = EXAMPLES / "adapters" / "banking77"


@pytest.fixture(scope="module")
def server(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    state = tmp_path_factory.mktemp("api")
    with serving(redis_url, state, max_body_bytes=200_000, max_jobs_per_request=300, max_job_bytes=20_000, max_queued=250) as api:
        yield api


@pytest.fixture(scope="module")
def base(demo_gguf: Path) -> BaseModel:
    """The demo model, as its worker tells of it."""
    from lorayard_workers.llama.bindings import Model
    from lorayard_workers.llama.process import DEMO_NAME

    model = Model(demo_gguf)
    try:
        return model.base([DEMO_NAME])
    finally:
        model.close()


def error(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error, after checking that it has OpenAI's shape and these."""
    body = reply.json()
    assert reply.status_code == status, body
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert body["error"]["code"] == code, body
    assert body["error"]["message"]
    found: dict[str, Any] = body["error"]
    return found


def zipped(folder: Path, **changes: Any) -> bytes:
    """The adapter as a zip, its adapter_config.json changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in folder.iterdir():
            data = path.read_bytes()
            if path.name == "adapter_config.json":
                data = json.dumps(json.loads(data) | changes).encode()
            archive.writestr(path.name, data)
    return out.getvalue()


# -- submitting --------------------------------------------------------------------------------------------------------------------------


def test_a_bare_job_a_list_and_json_lines_are_accepted(api: Api) -> None:
    replies = [
        api.call("POST", "/v1/jobs", json=job("one")),
        api.call("POST", "/v1/jobs", json={"jobs": [job("two"), job("three", not_before_s=60)]}),
        api.lines(json.dumps(job("four")).encode() + b"\r\n\n" + json.dumps(job("five")).encode()),
    ]
    rows = [row for reply in replies for row in reply.json()["jobs"]]
    assert [reply.status_code for reply in replies] == [202] * 3
    assert [row["status"] for row in rows] == ["queued", "queued", "delayed", "queued", "queued"]
    assert all(set(row) == {"id", "status"} for row in rows)
    assert len({row["id"] for row in rows}) == 5
    document = api.call("GET", f"/v1/jobs/{rows[2]['id']}").json()
    assert (document["status"], document["adapter"], document["response"], document["error"]) == ("delayed", None, None, None)
    assert api.call("POST", "/v1/jobs", json={"jobs": []}).json() == {"jobs": []}


def test_an_answer_is_taken_back_as_history(api: Api) -> None:
    """As OpenAI's library writes it, with every field there is."""
    answer = ChatCompletionMessage.model_validate({"role": "assistant", "content": "seven", "refusal": None}).model_dump()
    assert None in answer.values()
    messages = [{"role": "user", "content": "How many?"}, answer, {"role": "user", "content": "Why?"}]
    assert [row["status"] for row in api.post(job(request={"messages": messages, "max_tokens": 4}))] == ["queued"]


def test_a_refused_job_harms_no_other_and_says_which_and_why(api: Api) -> None:
    deep: Any = []
    for _ in range(90):
        deep = [deep]
    bad: list[tuple[dict[str, Any], str, str | None, str]] = [
        (job(adapter="nope"), "adapter_not_found", "adapter", "lorayard adapters add"),
        (job(pool="other"), "pool_not_found", "pool", "'main'"),
        (job(pool="no/name"), "invalid_request", "pool", "not a pool's name"),
        (job(route="groq"), "route_unavailable", "route", "no hosted worker"),
        (job(route="auto"), "route_unavailable", "route", "no hosted worker"),
        (job(route="moon"), "invalid_request", "route", "'local' or 'groq' or 'auto'"),
        (job(priority="urgent"), "invalid_request", "priority", "'high' or 'normal' or 'low'"),
        (job(adaptor="x"), "invalid_request", "adaptor", "did you mean 'adapter'?"),
        (job(messages=[]), "invalid_request", "messages", "goes under 'request'"),
        (job(deadline_s=-1), "invalid_request", "deadline_s", "more than 0"),
        (job(not_before_s=60, deadline_s=50), "invalid_request", "not_before_s", "the deadline would have passed"),
        (job(not_before_s="soon"), "invalid_request", "not_before_s", "Expected `float | null`"),
        (job(id="a b"), "invalid_request", "id", "1 to 100 of"),
        (job(id="a\n"), "invalid_request", "id", "1 to 100 of"),
        (job(idempotency_key="a\tb"), "invalid_request", "idempotency_key", "printable"),
        (job(idempotency_key="k" * 257), "invalid_request", "idempotency_key", "256"),
        (job(endpoint="/v1/embeddings", request={"input": []}), "invalid_request", "input", "length"),
        (job(endpoint="/v1/completions"), "invalid_request", "request.prompt", "missing"),
        ({"request": {}}, "invalid_request", "request.messages", "missing"),
        ({"adapter": None}, "invalid_request", None, "missing required field `request`"),
        (job(request={"messages": [], "model": "m"}), "invalid_request", "request.model", "leave it out"),
        (job(request={"messages": [], "stream": True}), "invalid_request", "request.stream", "poll"),
        (job("x" * 25_000), "request_too_large", "request", "LORAYARD_MAX_JOB_BYTES"),
        (job(metadata={"note": "x" * 25_000}), "request_too_large", "metadata", "LORAYARD_MAX_JOB_BYTES"),
    ]
    rows = api.post(job("first"), *(body for body, *_ in bad), job("last"))
    assert [row["status"] for row in (rows[0], rows[-1])] == ["queued"] * 2
    for i, ((_, code, param, words), row) in enumerate(zip(bad, rows[1:-1], strict=True), 1):
        assert row["index"] == i, row
        assert (row["error"]["code"], row["error"]["param"]) == (code, param), row
        assert words in row["error"]["message"]
        assert len(row["error"]["message"]) < 400
    assert api.ledger.counts() == {"queued": 2, "enqueued": 2}


def test_lines_that_are_no_jobs_are_told_by_index(api: Api) -> None:
    good = json.dumps(job()).encode()
    lines = [
        good,
        b'{"request": {"messages": [',  # half-written
        good,
        b'{"request": {"messages": ["\xff"]}}',  # not UTF-8
        b'{"request": {"messages": ["\\ud800"]}}',  # half a character
        b'{"request": {"messages": ' + b"[" * 9000 + b"]" * 9000 + b"}}",
        b"null",
        b"[]",
        good + good,
    ]
    reply = api.lines(b"\n".join(lines))
    assert reply.status_code == 202
    rows = reply.json()["jobs"]
    assert [i for i, row in enumerate(rows) if "id" in row] == [0, 2]
    assert [row["index"] for row in rows if "error" in row] == [1, 3, 4, 5, 6, 7, 8]
    assert {rows[i]["error"]["code"] for i in (1, 3, 8)} == {"invalid_json"}
    assert "truncated" in rows[1]["error"]["message"]


def test_when_all_are_refused_the_answer_is_an_error_with_every_entry(api: Api) -> None:
    reply = api.call("POST", "/v1/jobs", json={"jobs": [job(adapter="nope"), job(id="?")]})
    error(reply, 404, "adapter_not_found")
    assert [row["error"]["code"] for row in reply.json()["jobs"]] == ["adapter_not_found", "invalid_request"]
    assert error(api.call("POST", "/v1/jobs", json=job(route="auto")), 400, "route_unavailable")["param"] == "route"


@pytest.mark.parametrize(
    ("body", "kind", "code", "words"),
    [
        (b"", "application/json", "invalid_json", "JSON lines need Content-Type"),
        (b"\n\n", "application/jsonl", "invalid_request", "no jobs"),
        (b'{"jobs": [{"request": {}}, {"requ', "application/json", "invalid_json", "not valid JSON"),
        (b'{"request": {}}\n{"request": {}}', "application/json", "invalid_json", "JSON lines need Content-Type"),
        (b'{"jobs": [], "jobz": 1}', "application/json", "invalid_request", "'jobz'"),
        (b'{"jobs": {}}', "application/json", "invalid_request", "must be a job object"),
        (b"[]", "application/json", "invalid_request", "must be a job object"),
        (b'{"\xff": 1}', "application/json", "invalid_json", "not valid JSON"),
        (b'{"jobs": ' + b"[" * 9000, "application/json", "invalid_request", "nested"),
    ],
)
def test_a_body_without_jobs_is_refused_whole(api: Api, body: bytes, kind: str, code: str, words: str) -> None:
    reply = api.call("POST", "/v1/jobs", content=body, headers={"Content-Type": kind})
    assert words in error(reply, 400, code)["message"]


def test_a_body_over_the_limit_is_refused_before_it_is_read(api: Api) -> None:
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.keys['acme']}\r\n"
    for framing, sent in (
        ("Content-Length: 10000000000", b"x"),
        ("Transfer-Encoding: chunked", b"30d40\r\n" + b"x" * 200_000 + b"\r\n5\r\n"),
    ):
        with socket.create_connection(("127.0.0.1", api.settings.api_port), timeout=10) as connection:
            connection.sendall(f"{head}{framing}\r\n\r\n".encode() + sent + b"xxxxx\r\n")
            answer = b""
            while not answer.endswith(b"}") and (part := connection.recv(65536)):
                answer += part
        assert answer.startswith(b"HTTP/1.1 413 "), answer
        assert b"in several requests" in answer


def test_too_many_jobs_in_a_request_are_refused(api: Api) -> None:
    problem = error(api.lines((json.dumps(job()) + "\n").encode() * 301), 413, "request_too_large")
    assert "301" in problem["message"]
    assert "300" in problem["message"]
    assert api.ledger.counts() == {}


def test_an_unknown_adapter_is_named_with_its_nearest(api: Api, base: BaseModel) -> None:
    add(api, base, "banking77")
    problem = error(api.call("POST", "/v1/jobs", json=job(adapter="bankin77")), 404, "adapter_not_found")
    assert "did you mean 'banking77'?" in problem["message"]
    assert "there are banking77." in error(api.call("POST", "/v1/jobs", json=job(adapter="zzz")), 404, "adapter_not_found")["message"]
    other = error(api.call("POST", "/v1/jobs", "globex", json=job(adapter="bankin77")), 404, "adapter_not_found")
    assert "banking77" not in other["message"]


def test_a_prompt_that_no_context_can_hold_is_refused_at_submit(api: Api) -> None:
    WorkerRegistry(api.ledger.client).beat(worker(max_prompt_tokens=100, max_token_bytes=20))
    escaped = job("\n" * 1900)  # twice as long as JSON
    options = job(request={"messages": [{"role": "user", "content": "hi"}], "logit_bias": {str(i): 1 for i in range(400)}})
    rows = api.post(job("x" * 2001), escaped, options, job(endpoint="/v1/completions", request={"prompt": "é" * 1001}))
    assert [row.get("status") for row in rows] == [None, "queued", "queued", None]
    assert [rows[i]["error"]["code"] for i in (0, 3)] == ["context_length_exceeded"] * 2
    assert [rows[i]["error"]["param"] for i in (0, 3)] == ["messages", "prompt"]
    assert "LORAYARD_N_CTX" in rows[0]["error"]["message"]


# -- idempotency -------------------------------------------------------------------------------------------------------------------------


def test_the_same_key_and_body_give_the_same_id_and_another_body_a_conflict(api: Api) -> None:
    first, again = (api.post(job(idempotency_key="k", priority="high"))[0] for _ in range(2))
    assert first == again
    assert (
        error(api.call("POST", "/v1/jobs", json=job("other", idempotency_key="k")), 409, "idempotency_conflict")["param"]
        == "idempotency_key"
    )
    (theirs,) = api.post(job("other", idempotency_key="k"), who="globex")
    assert theirs["status"] == "queued"
    assert theirs["id"] != first["id"]
    api.run("acme")
    ended = api.post(job(idempotency_key="k", priority="high"))
    assert ended == [{"id": first["id"], "status": "succeeded"}], "a key holds beyond the job's end"
    twice = api.post(job(idempotency_key="z"), job(idempotency_key="z"))
    assert twice[0]["id"] == twice[1]["id"]


def test_an_id_of_the_clients_own_names_one_job(api: Api) -> None:
    first, again = (api.post(job(id="mine"))[0] for _ in range(2))
    assert first == again == {"id": "mine", "status": "queued"}
    problem = error(api.call("POST", "/v1/jobs", json=job("other", id="mine")), 409, "idempotency_conflict")
    assert problem["param"] == "id"
    assert "'mine'" in problem["message"]
    assert api.post(job("other", idempotency_key="id:mine"))[0]["id"] != "mine", "a key never meets an id"
    error(api.call("POST", "/v1/jobs", json=job("other", id="mine", idempotency_key="k")), 409, "idempotency_conflict")
    assert api.post(job("theirs", id="mine"), who="globex") == [{"id": "mine", "status": "queued"}]
    asked = [api.call("GET", "/v1/jobs/mine", who).json()["enqueued_ms"] for who in ("acme", "globex")]
    assert asked[0] <= asked[1]


def test_a_full_backlog_says_when_to_come_again(api: Api) -> None:
    rows = api.post(*(job(str(i)) for i in range(251)))
    assert [row.get("status") for row in rows] == ["queued"] * 250 + [None]
    assert rows[250]["error"]["code"] == "backlog_full"
    reply = api.call("POST", "/v1/jobs", json={"jobs": [job()]})
    assert "250" in error(reply, 503, "backlog_full")["message"]
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["jobs"][0]["error"]["code"] == "backlog_full"
    api.run("acme", 100)
    assert api.post(job())[0]["status"] == "queued"


# -- who is asking -----------------------------------------------------------------------------------------------------------------------

ROUTES = [
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/ID"),
    ("DELETE", "/v1/jobs/ID"),
    ("POST", "/v1/jobs/ID/cancel"),
    ("POST", "/v1/jobs/ID/retry"),
    ("POST", "/v1/pause"),
    ("POST", "/v1/resume"),
    ("GET", "/v1/paused"),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"),
    ("GET", "/v1/adapters/ID"),
    ("DELETE", "/v1/adapters/ID"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_answers_without_a_valid_key(api: Api, method: str, path: str) -> None:
    revoked = api.keys["globex"]
    ring = KeyRing(api.ledger.client)
    (name,) = [row["key"] for row in ring.entries() if row["tenant"] == "globex"]
    assert ring.revoke(name)
    for key in (None, "Bearer", "Bearer wrong", "Basic YTpi", f"Bearer {revoked}", f"Bearer {api.keys['acme']}x"):
        reply = api.raw(method, path, headers={} if key is None else {"Authorization": key})
        problem = error(reply, 401, "invalid_api_key")
        assert problem["type"] == "authentication_error"
        assert "Authorization: Bearer" in problem["message"]


def test_an_upload_without_a_key_is_refused_before_it_is_read(api: Api) -> None:
    head = "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    with socket.create_connection(("127.0.0.1", api.settings.api_port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_another_tenants_job_looks_like_none(api: Api) -> None:
    (theirs,) = api.post(job("secret"), who="globex")
    asks = [
        ("GET", f"/v1/jobs/{theirs['id']}"),
        ("GET", f"/v1/jobs/{theirs['id']}?wait=20"),
        ("DELETE", f"/v1/jobs/{theirs['id']}"),
        ("POST", f"/v1/jobs/{theirs['id']}/cancel"),
        ("POST", f"/v1/jobs/{theirs['id']}/retry"),
        ("GET", f"/v1/jobs?ids={theirs['id']},globex/{theirs['id']},../globex/{theirs['id']}"),
        ("GET", f"/v1/jobs?after={theirs['id']}"),
        ("GET", "/v1/jobs"),
        ("GET", f"/v1/jobs/globex%2F{theirs['id']}"),
    ]
    with_it = [api.call(*ask) for ask in asks]
    assert api.call("GET", f"/v1/jobs/{theirs['id']}", "globex").json()["status"] == "queued"
    api.ledger.client.flushall()
    api.keys = {**api.keys}
    ring = KeyRing(api.ledger.client)
    ring._admit(api.keys["acme"], "acme", operator=False)
    without = [api.call(*ask) for ask in asks]
    assert [(r.status_code, r.content) for r in with_it] == [(r.status_code, r.content) for r in without]
    assert [r.status_code for r in with_it] == [404, 404, 404, 404, 404, 200, 400, 200, 404]


# -- waiting, cancelling, listing --------------------------------------------------------------------------------------------------------


def test_a_long_poll_wakes_at_the_end_of_the_job(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard_scheduler.api.waiting.POLL_S", 60.0)  # the event alone must do it
    (mine, other) = (row["id"] for row in api.post(job("a"), job("b", priority="low")))
    waiting: list[tuple[dict[str, Any], float]] = []

    def wait() -> None:
        reply = api.call("GET", f"/v1/jobs/{mine}?wait=30")
        waiting.append((reply.json(), time.monotonic()))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert not waiting
    assert api.run("acme") == [mine]
    ended = time.monotonic()
    for thread in threads:
        thread.join()
    assert max(at for _, at in waiting) - ended < 10
    document = waiting[0][0]
    assert all(found == document for found, _ in waiting)
    assert (document["status"], document["attempts"], document["why"]) == ("succeeded", 1, "a test")
    assert document["response"]["choices"][0]["message"]["content"] == "seven"
    assert document["response"]["id"] == mine
    assert sum(v for k, v in document["latencies_ms"].items() if k != "total") >= document["latencies_ms"]["total"]
    short = time.monotonic()
    assert api.call("GET", f"/v1/jobs/{other}?wait=0.3").json()["status"] == "queued"
    assert time.monotonic() - short >= 0.3


def test_cancelling_wakes_who_waits_and_is_final(api: Api) -> None:
    (row,) = api.post(job())
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.append(api.call("GET", f"/v1/jobs/{row['id']}?wait=30").json()))
    thread.start()
    time.sleep(0.2)
    cancelled = api.call("POST", f"/v1/jobs/{row['id']}/cancel")
    thread.join()
    assert cancelled.status_code == 200
    assert found == [cancelled.json()]
    assert (found[0]["status"], found[0]["error"]["code"]) == ("cancelled", "cancelled")
    assert api.call("POST", f"/v1/jobs/{row['id']}/cancel").json() == found[0]
    (running,) = api.post(job())
    assert api.run("acme", finish=False) == [running["id"]]
    assert api.call("GET", f"/v1/jobs/{running['id']}").json()["status"] == "running"
    assert api.call("POST", f"/v1/jobs/{running['id']}/cancel").json()["status"] == "cancelled"


def pages(api: Api, **params: Any) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = []
    after: dict[str, str] = {}
    while True:
        page = api.call("GET", "/v1/jobs", params=params | after).json()
        found.append(page["data"])
        if not page["has_more"]:
            return found
        after = {"after": page["last_id"]}


def test_pages_hold_every_job_once_though_all_came_in_one_request(api: Api) -> None:
    ids = [row["id"] for row in api.post(*(job(str(i)) for i in range(25)))]
    (newest,) = api.post(job("newest"))
    found = pages(api, limit=10)
    assert [len(page) for page in found] == [10, 10, 6]
    listed = [row["id"] for page in found for row in page]
    assert listed[0] == newest["id"]
    assert sorted(listed) == sorted([*ids, newest["id"]])
    assert all(row["response"] is None for page in found for row in page)
    assert [len(page) for page in pages(api, limit=13)] == [13, 13]


@pytest.mark.parametrize("dead", [False, True])
def test_a_page_after_a_job_that_is_gone_is_an_error_and_no_end(api: Api, dead: bool) -> None:
    ids = [api.bury() for _ in range(3)] if dead else [row["id"] for row in api.post(*(job(str(i)) for i in range(3)))]
    what = {"limit": 1, "dead": dead}
    page = api.call("GET", "/v1/jobs", params=what).json()
    assert page["has_more"]
    assert page["last_id"] in ids
    api.call("DELETE", f"/v1/jobs/{page['last_id']}")
    for gone in (page["last_id"], "nothing"):
        problem = error(api.call("GET", "/v1/jobs", params=what | {"after": gone}), 400, "cursor_gone")
        assert problem["param"] == "after"
        assert "begin again" in problem["message"]
    assert error(api.call("GET", "/v1/jobs", "globex", params=what | {"after": ids[0]}), 400, "cursor_gone")


def test_a_status_is_looked_for_behind_the_newest_jobs(api: Api) -> None:
    first = [row["id"] for row in api.post(*(job(str(i), priority="high") for i in range(3)))]
    api.post(*(job(str(i)) for i in range(30)))
    assert sorted(api.run("acme", 3)) == sorted(first)
    found = pages(api, limit=2, status="succeeded")
    assert [len(page) for page in found] == [2, 1]
    assert sorted(row["id"] for page in found for row in page) == sorted(first)
    assert error(api.call("GET", "/v1/jobs?status=done"), 400, "invalid_request")["param"] == "status"
    assert error(api.call("GET", "/v1/jobs?limit=0"), 400, "invalid_request")["param"] == "limit"


def test_documents_by_their_ids(api: Api) -> None:
    ids = [row["id"] for row in api.post(*(job(str(i)) for i in range(3)))]
    api.run("acme", 3)
    found = api.call("GET", "/v1/jobs", params={"ids": ",".join([*ids, "none", ids[0]])}).json()["data"]
    assert [document["id"] for document in found] == ids
    assert found[0] == api.call("GET", f"/v1/jobs/{ids[0]}").json()
    many = ",".join([ids[0], *(f"n{i}" for i in range(999)), ids[0]])
    assert [d["id"] for d in api.call("GET", "/v1/jobs", params={"ids": many}).json()["data"]] == [ids[0]]
    problem = error(api.call("GET", "/v1/jobs", params={"ids": f"{many},{ids[1]}"}), 400, "invalid_request")
    assert problem["param"] == "ids"
    assert "1001" in problem["message"]


# -- adapters ----------------------------------------------------------------------------------------------------------------------------


def worker(**changes: Any) -> WorkerInfo:
    info = WorkerInfo(name="w1", pool="main", kind="llama", incarnation="i", host="h", pid=1, ready=True)
    return msgspec.structs.replace(info, **changes)


def upload(api: Api, content: bytes, who: str = "acme", **fields: str) -> httpx.Response:
    return api.call("POST", "/v1/adapters", who, data={"name": "a1"} | fields, files={"file": ("a.zip", content)})


def add(api: Api, base: BaseModel, name: str, who: str = "acme", **fields: str) -> dict[str, Any]:
    WorkerRegistry(api.ledger.client).announce_base("main", msgspec.to_builtins(base))
    reply = upload(api, zipped(BANKING), who, name=name, **fields)
    assert reply.status_code == 201, reply.json()
    manifest: dict[str, Any] = reply.json()
    return manifest


def test_an_adapter_is_added_used_and_removed_without_a_restart(api: Api, base: BaseModel) -> None:
    manifest = add(api, base, "mine")
    assert (manifest["name"], manifest["tenant"], manifest["object"]) == ("mine", "acme", "adapter")
    assert manifest["base_name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert api.call("GET", "/v1/adapters/mine").json() == manifest
    assert api.call("GET", "/v1/adapters").json() == {"object": "list", "data": [manifest]}
    (row,) = api.post(job(adapter="mine"))
    document = api.call("GET", f"/v1/jobs/{row['id']}").json()
    assert (document["adapter"], document["adapter_digest"]) == ("mine", manifest["digest"])
    assert api.call("DELETE", "/v1/adapters/mine").json() == {"name": "mine", "object": "adapter", "deleted": True}
    error(api.call("GET", "/v1/adapters/mine"), 404, "adapter_not_found")
    error(api.call("DELETE", "/v1/adapters/mine"), 404, "adapter_not_found")
    assert api.post(job(adapter="mine"))[0]["error"]["code"] == "adapter_not_found"
    assert api.run("acme", digest=manifest["digest"]) == [row["id"]]


def test_only_the_operator_gives_to_everyone_and_takes_away(api: Api, base: BaseModel) -> None:
    WorkerRegistry(api.ledger.client).announce_base("main", msgspec.to_builtins(base))
    assert "operator" in error(upload(api, zipped(BANKING), public="true"), 403, "operator_only")["message"]
    assert add(api, base, "shared", "root", public="true")["tenant"] == "*"
    assert api.post(job(adapter="shared"))[0]["status"] == "queued"
    error(api.call("DELETE", "/v1/adapters/shared"), 404, "adapter_not_found")
    error(api.call("DELETE", "/v1/adapters/shared?public=true"), 403, "operator_only")
    assert api.call("DELETE", "/v1/adapters/shared?public=true", "root").status_code == 200
    assert api.call("GET", "/v1/adapters").json()["data"] == []


def test_a_tenants_adapter_is_no_one_elses(api: Api, base: BaseModel) -> None:
    add(api, base, "mine")
    assert api.call("GET", "/v1/adapters", "globex").json()["data"] == []
    with_it = [api.call(method, "/v1/adapters/mine", "globex").content for method in ("GET", "DELETE")]
    api.call("DELETE", "/v1/adapters/mine")
    assert with_it == [api.call(method, "/v1/adapters/mine", "globex").content for method in ("GET", "DELETE")]


def test_adapters_that_cannot_be_served_are_refused_with_the_reason(api: Api, base: BaseModel) -> None:
    error(upload(api, zipped(BANKING)), 503, "no_worker")
    WorkerRegistry(api.ledger.client).announce_base("main", msgspec.to_builtins(base))
    whole = zipped(BANKING)
    assert "zip" in error(upload(api, whole[: len(whole) // 2]), 400, "adapter_archive")["message"]
    assert "zip" in error(upload(api, b""), 400, "adapter_archive")["message"]
    other = error(upload(api, zipped(BANKING, base_model_name_or_path="someone/Other-7B")), 400, "adapter_base_mismatch")
    assert "'someone/Other-7B'" in other["message"]
    assert base.name in other["message"]
    assert "LORAYARD_MODEL_NAMES" in other["message"]
    assert error(upload(api, whole, name="no/name"), 400, "invalid_request")["param"] == "adapter"
    assert "name=NAME" in error(api.call("POST", "/v1/adapters", data={"name": "x"}), 400, "invalid_request")["message"]
    assert "name=NAME" in error(upload(api, whole, public="perhaps"), 400, "invalid_request")["message"]
    broken = api.call("POST", "/v1/adapters", content=b"--b\r\nxx", headers={"Content-Type": "multipart/form-data"})
    error(broken, 400, "invalid_request")
    assert api.call("GET", "/v1/adapters").json()["data"] == []


def test_an_upload_over_the_limit_is_refused(redis_url: str, store: redis.Redis, tmp_path: Path, base: BaseModel) -> None:
    with serving(redis_url, tmp_path, max_adapter_bytes=100_000) as small:
        small.new_keys()
        WorkerRegistry(small.ledger.client).announce_base("main", msgspec.to_builtins(base))
        assert "LORAYARD_MAX_ADAPTER_BYTES" in error(upload(small, zipped(BANKING)), 400, "adapter_too_large")["message"]
        assert "LORAYARD_MAX_ADAPTER_BYTES" in error(upload(small, b"x" * 17_500_000), 413, "request_too_large")["message"]


# -- the process -------------------------------------------------------------------------------------------------------------------------


def test_health_and_metrics_need_no_key_and_tell_nothing_of_tenants(api: Api, base: BaseModel) -> None:
    WorkerRegistry(api.ledger.client).beat(worker(counters={"tokens": 7}))
    add(api, base, "tone-of-acme")
    api.post(job("a word of their own", adapter="tone-of-acme", id="ident", idempotency_key="keyed", metadata={"m": "noted"}), job("x"))
    api.run("acme")
    assert api.raw("GET", "/healthz").json() == {"status": "ok"}
    ready = api.raw("GET", "/readyz").json()
    assert ready == {"status": "ready", "pool": "main", "workers": ["w1"], "scheduler": True, "paused": False}
    metrics = api.raw("GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    samples = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert float(samples['lorayard_queued_jobs{pool="main"}']) == 1
    assert float(samples['lorayard_jobs_total{event="succeeded",pool="main"}']) == 1
    assert float(samples['lorayard_worker_up{pool="main",worker="w1"}']) == 1
    assert float(samples['lorayard_worker_events_total{event="tokens",pool="main",worker="w1"}']) == 7
    for secret in ("acme", "globex", "tone", "word", "ident", "keyed", "noted", "seven", "default"):
        assert secret not in metrics.text


def test_wrong_addresses_methods_and_parameters_have_openais_shape(api: Api) -> None:
    assert "/v1" in error(api.raw("GET", "/v2/jobs"), 404, "not_found")["message"]
    error(api.call("GET", "/v1/jobs/"), 404, "not_found")
    wrong = api.call("PUT", "/v1/jobs", json={})
    error(wrong, 405, "invalid_request")
    assert wrong.headers["allow"]
    for wait in ("soon", "-1", "nan"):
        assert error(api.call("GET", f"/v1/jobs/x?wait={wait}"), 400, "invalid_request")["param"] == "wait"


def test_openais_client_reads_the_errors(api: Api) -> None:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.keys["acme"], max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.get("/jobs/none", cast_to=object)
        assert (missing.value.code, missing.value.type) == ("job_not_found", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.post("/jobs", body=job(route="groq"), cast_to=object)
        assert (wrong.value.code, wrong.value.param) == ("route_unavailable", "route")
        api.post(job(idempotency_key="k"))
        with pytest.raises(openai.ConflictError):
            client.post("/jobs", body=job("other", idempotency_key="k"), cast_to=object)
        assert client.get("/jobs", cast_to=object)
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="wrong", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
        client.get("/jobs", cast_to=object)


def test_the_client_of_ours_tells_what_the_api_says(api: Api, tmp_path: Path) -> None:
    with Client(api.url, api.keys["acme"], settings=api.settings) as client:
        rows = client.submit([job("x"), "not json", json.dumps(job(adapter="nope", request={"messages": ["a\n"]}), indent=1), b""])
        assert [row.get("index") for row in rows] == [None, 1, 2, 3]
        api.run("acme")
        assert client.result(rows[0]["id"], timeout_s=5)["status"] == "succeeded"
        assert [document["id"] for document in client.results([rows[0]["id"], "gone"])] == [rows[0]["id"]]
        for wrong in ("none", "../../healthz", "a/b", "..", "", "?x=1"):
            with pytest.raises(LorayardError) as missing:
                client.job(wrong)
            assert missing.value.status == 404
        with pytest.raises(LorayardError, match="give a PEFT folder"):
            client.add_adapter("x", tmp_path / "none")
        (later,) = client.submit([job(not_before_s=100)])
        with pytest.raises(Unavailable, match="still delayed"):
            client.result(later["id"], timeout_s=0.2)


def test_while_redis_is_away_the_answer_is_503_soon_and_all_is_well_after(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    with embedded.running(settings) as url:
        pass
    with embedded.running(settings) as again:
        assert again == url
        context = serving(url, tmp_path)
        api = context.__enter__()
        api.new_keys()
        (row,) = api.post(job())
    try:
        began = time.monotonic()
        for method, path in (*ROUTES, ("GET", "/readyz"), ("GET", "/metrics")):
            reply = api.call(method, path, json={}) if path == "/v1/jobs" else api.call(method, path)
            problem = error(reply, 503, "unavailable")
            assert problem["message"]
            assert int(reply.headers["retry-after"]) >= 1
            assert not re.search(r"127\.0\.0\.1|localhost|/", problem["message"]), "where the server is, is the operator's business"
        assert api.raw("GET", "/healthz").status_code == 200
        assert time.monotonic() - began < 20
        with embedded.running(settings):
            document = api.call("GET", f"/v1/jobs/{row['id']}").json()
            assert document["status"] == "queued"
            found: list[dict[str, Any]] = []
            thread = threading.Thread(target=lambda: found.append(api.call("GET", f"/v1/jobs/{row['id']}?wait=20").json()))
            thread.start()
            time.sleep(0.2)
            api.run("acme")
            thread.join()
            assert found[0]["status"] == "succeeded"
    finally:
        context.__exit__(None, None, None)
