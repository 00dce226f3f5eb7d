"""The command `lorayard`, run as people run it: what it prints, and exit code 2 with one line that says what to do."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import redis
import typer
from api_support import EXAMPLES, Api, job, serving
from benchmarks.ports import free_port

from lorayard import __version__, cli, embedded
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import KeyRing, WorkerInfo, WorkerRegistry
from lorayard.settings import Settings
from lorayard_scheduler.quotes import Forecast
from lorayard_scheduler.quoting import Board

ROOT = Path(__file__).resolve().parent.parent


def environment(state: Path, **variables: str) -> dict[str, str]:
    """This one's, with no setting but these (by their names in `Settings`)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAYARD_")}
    given = {f"LORAYARD_{name.upper()}": value for name, value in variables.items()}
    return kept | {"LORAYARD_STATE_DIR": str(state), "PYTHONWARNINGS": "ignore"} | given


def lorayard(*arguments: str, state: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a state folder and settings of the test's alone."""
    command = [sys.executable, "-m", "lorayard", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment(state, **variables)
    )


def until(what: Callable[[], bool]) -> bool:
    """Whether it comes true within seconds."""
    give_up = time.monotonic() + 10
    while not (found := what()) and time.monotonic() < give_up:
        time.sleep(0.1)
    return found


def fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, nothing on standard output, and one line on standard error that holds all the words."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("lorayard: ")
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""


@pytest.fixture(scope="module")
def server(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(redis_url, tmp_path_factory.mktemp("cli"), max_jobs_per_request=1000) as api:
        yield api


class Cli:
    """`lorayard` as a tenant's, talking to the test's API; in this process, for starting one takes longer than the command."""

    def __init__(self, api: Api, folder: Path) -> None:
        self.api = api
        self.folder = folder

    def __call__(self, *arguments: str, who: str = "acme", stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        mine = {"api_url": self.api.url, "api_key": self.api.keys[who], "redis_url": str(self.api.settings.redis_url)} | variables
        given, out, err = (io.TextIOWrapper(io.BytesIO(data), write_through=True) for data in (stdin.encode(), b"", b""))
        with (
            mock.patch.dict(os.environ, environment(self.folder, **mine), clear=True),
            mock.patch.object(sys, "argv", ["lorayard", *arguments]),
            mock.patch.object(sys, "stdin", given),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            cli.main()
        said = [stream.buffer.getvalue().decode() for stream in (out, err) if isinstance(stream.buffer, io.BytesIO)]
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), *said)

    def file(self, *lines: str | dict[str, Any]) -> str:
        path = self.folder / "jobs.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(path)


@pytest.fixture
def command(api: Api, tmp_path: Path) -> Cli:
    return Cli(api, tmp_path)


# -- what is wrong is said in one line ----------------------------------------------------------------------------------------------------


def test_without_a_fleet(tmp_path: Path) -> None:
    fails(lorayard("jobs", "list", state=tmp_path), "no API key", "LORAYARD_API_KEY", str(tmp_path / "api_key"))
    (tmp_path / "api_key").write_text("ly-key\n")
    fails(lorayard("jobs", "list", state=tmp_path, api_port=str(free_port())), "no answer", "is the fleet up?", "lorayard up")
    fails(lorayard("api", state=tmp_path), "no store yet", "lorayard up", "LORAYARD_REDIS_URL")


@pytest.mark.parametrize(("variable", "value"), [("api_port", "seven"), ("width", "0"), ("pool", "a b")])
def test_a_bad_setting_is_named(command: Cli, variable: str, value: str) -> None:
    fails(command("jobs", "list", **{variable: value}), f"LORAYARD_{variable.upper()}: ", repr(value))


@pytest.mark.parametrize("value", ["http://[::1", "nonsense"])
def test_a_bad_address_of_the_api_is_told(command: Cli, value: str) -> None:
    fails(command("jobs", "list", api_url=value), value)


@pytest.mark.parametrize("key", ["schlüssel", "a\nb"])
def test_a_key_that_cannot_be_one_is_told(command: Cli, key: str) -> None:
    fails(command("jobs", "list", api_key=key), "LORAYARD_API_KEY")
    (command.folder / "api_key").write_text("")
    fails(command("jobs", "list", api_key=""), "api_key")


def test_a_busy_port_is_told_with_the_setting_to_change(tmp_path: Path, redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        words = (f"port {port}", "LORAYARD_API_PORT")
        fails(lorayard("up", state=tmp_path, api_port=port), *words)
        fails(lorayard("up", state=tmp_path, api_port=str(free_port()), flower_port=port), f"port {port}", "LORAYARD_FLOWER_PORT")
        fails(lorayard("api", state=tmp_path, api_port=port, redis_url=redis_url), f":{port}", "LORAYARD_API_PORT")


def test_an_address_of_no_redis_is_told(command: Cli) -> None:
    fails(command("keys", "list", redis_url=f"redis://127.0.0.1:{free_port()}/0"), "Redis", "LORAYARD_REDIS_URL")
    for wrong in ("127.0.0.1:6379", "http://127.0.0.1", "redis://127.0.0.1:port/0"):
        fails(command("keys", "list", redis_url=wrong), "LORAYARD_REDIS_URL", "redis://HOST:PORT/0")


def test_a_redis_that_no_process_could_use_is_told_at_once(tmp_path: Path) -> None:
    ports = {"api_port": str(free_port()), "flower_port": str(free_port())}
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    fails(lorayard("up", state=tmp_path, redis_url=nobody, **ports), "no Redis at", nobody, "LORAYARD_REDIS_URL")
    with embedded.running(Settings(state_dir=tmp_path / "store")) as url:
        password = url.partition("@")[0].removeprefix("redis://:")
        refused = lorayard("api", state=tmp_path, redis_url=url.replace(password, "wrong"))
        fails(refused, "password", "LORAYARD_REDIS_URL")
        assert "wrong" not in refused.stderr.replace("WRONGPASS", "").replace("is wrong", "")
        with connect(url) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
        for role in ("api", "up"):
            fails(lorayard(role, state=tmp_path, redis_url=url, **ports), "allkeys-lru", "noeviction")


def test_a_worker_says_what_is_wrong_with_its_model(tmp_path: Path, redis_url: str, store: redis.Redis) -> None:
    missing = lorayard("worker", "llama", state=tmp_path, redis_url=redis_url, model="/nonexistent")
    fails(missing, "LORAYARD_MODEL", "/nonexistent", "does not exist")
    other = tmp_path / "model.gguf"
    for content in (b"no model at all" * 100, b"GGUF\x03\0\0\0" + b"\xff" * 64):
        other.write_bytes(content)
        done = lorayard("worker", "llama", state=tmp_path, redis_url=redis_url, model=str(other))
        fails(done, str(other))


def test_flower_is_not_opened_to_everyone_without_a_password(tmp_path: Path) -> None:
    done = lorayard("flower", state=tmp_path, flower_host="0.0.0.0")
    fails(done, "open to everyone", "LORAYARD_FLOWER_BASIC_AUTH")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["LORAYARD_HOSTED_MODEL", "llama-3.1-8b-instant"]),
        ({"hosted_model": "m", "hosted_key": ""}, ["LORAYARD_HOSTED_KEY", "GROQ_API_KEY"]),
        ({"hosted_model": "m", "hosted_key": "k", "hosted_url": "api.groq.com"}, ["LORAYARD_HOSTED_URL", "'api.groq.com'"]),
        ({"hosted_model": "m", "hosted_key": "k\u00e9y"}, ["LORAYARD_HOSTED_KEY", "characters"]),
        ({"hosted_model": "m", "hosted_prices": "0.05"}, ["LORAYARD_HOSTED_PRICES", "0.05"]),
        ({"hosted_model": "m", "hosted_prices": "m=0.05"}, ["LORAYARD_HOSTED_PRICES", "write it as JSON"]),
        *(
            ({"hosted_model": "m", "hosted_prices": wrong}, ["LORAYARD_HOSTED_PRICES:", 'as JSON, {"MODEL": [DOLLARS_IN, DOLLARS_OUT]}'])
            for wrong in ('{"a": [1]}', '{"a": 1}', "[1, 2]", '{"a": [1, "x"]}', '{"a": [true, 1]}', '{"a": {"in": 1, "out": 2}}')
        ),
        ({"hosted_model": "m", "hosted_prices": '{"a": [1, -2]}'}, ["LORAYARD_HOSTED_PRICES, at a 1:", "greater than or equal to 0"]),
        ({"hosted_model": "m", "hosted_key": "k", "hosted_daily_usd": "5"}, ["LORAYARD_HOSTED_PRICES", '{"m": [0.05, 0.08]}']),
    ],
)
def test_a_hosted_worker_that_cannot_work_says_what_to_set(
    tmp_path: Path, redis_url: str, settings: dict[str, str], words: list[str]
) -> None:
    fails(lorayard("worker", "groq", state=tmp_path, redis_url=redis_url, **settings), *words)


def test_a_file_that_cannot_be_submitted_is_told_before_anything_else(command: Cli) -> None:
    fails(command("submit", "none.jsonl"), "none.jsonl", "No such file")
    fails(command("submit", str(command.folder)), "Is a directory")
    fails(command("submit", command.file("", "  ")), "no jobs in it", "a line is one job object")
    fails(command("submit", "-"), "no jobs in it")
    good = command.file(job())
    fails(command("submit", good, "-o", str(command.folder / "none" / "out")), "cannot write", "folder that exists")
    fails(command("submit", good, "-o", str(command.folder)), "cannot write")
    fails(command("submit", good, api_key="wrong"), "no valid API key", "lorayard keys create")
    assert command.api.ledger.counts() == {}


# -- jobs ---------------------------------------------------------------------------------------------------------------------------------


def test_bad_lines_are_told_by_number_and_the_others_submitted(command: Cli) -> None:
    lines: list[str | dict[str, Any]] = [job("one"), "", '{"request": {"messa', job(adapter="nope"), job("two"), job(priority="urgent")]
    out = command.folder / "out.jsonl"
    path = command.file(*lines)
    done = command("submit", path, "-o", str(out))
    assert done.returncode == 2
    assert done.stdout == ""
    told = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in told] == [f"{path}:{n}" for n in (3, 4, 6)] + ["3 of 5 lines refused"]
    assert "not valid JSON" in told[0]
    assert "lorayard adapters add" in told[1]
    assert "'high' or 'normal' or 'low'" in told[2]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 3, 4, 5, 6]
    assert ["id" in row for row in rows] == [True, False, False, True, False]
    assert [row.get("error", {}).get("code") for row in rows] == [None, "invalid_json", "adapter_not_found", None, "invalid_request"]
    assert command.api.ledger.counts() == {"queued": 2, "enqueued": 2}
    assert [path.name for path in command.folder.glob("out*")] == ["out.jsonl"]


def test_ids_of_what_was_accepted_are_not_lost_when_the_rest_is_refused(command: Cli) -> None:
    command.api.ledger.client.flushall()
    command.api.new_keys()
    path = command.file(*(job(str(i)) for i in range(1000)), *("x" * 70_000 for _ in range(2)))
    with serving(str(command.api.settings.redis_url), command.folder / "small", max_body_bytes=130_000) as small:
        out = command.folder / "out.jsonl"
        done = command("submit", path, "-o", str(out), api_url=small.url)
    assert done.returncode == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 1002
    assert all("id" in row for row in rows[:1000])
    assert [row["error"]["code"] for row in rows[1000:]] == ["request_too_large"] * 2
    assert "2 of 1002 lines refused" in done.stderr


@contextlib.contextmanager
def losing(url: str, which: int) -> Iterator[str]:
    """Something between the command and the API that hands each request on, and keeps the answer to one of them to itself."""
    came = itertools.count(1)

    class Between(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            kept = {name: self.headers[name] for name in ("authorization", "content-type")}
            reply = httpx.post(url + self.path, content=body, headers=kept)
            if next(came) != which:
                self.send_response(reply.status_code)
                self.send_header("content-length", str(len(reply.content)))
                self.end_headers()
                self.wfile.write(reply.content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Between) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_run_whose_answer_was_lost_is_gone_on_with_and_nothing_made_twice(
    command: Cli, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Its requests are of one line each here, as they are of lines of megabytes."""
    monkeypatch.setattr("lorayard.client.CHUNK_BYTES", 1)
    path = command.file(job("a"), job("b", id="mine"), job("c", idempotency_key="k"), '{"request": {"messa')
    with losing(command.api.url, lost) as url:
        done = command("submit", path, api_url=url)
    assert done.returncode == 2
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row.get("error", {}).get("code") for row in rows] == [None, "not_known", "not_sent", "not_sent", "not_sent"][
        2 - lost : 6 - lost
    ]
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert f"of 1 lines it is not known whether they were accepted, {4 - lost} were not sent" in done.stderr
    assert command.api.ledger.counts()["enqueued"] == lost
    (again,) = re.findall(r"--again (\w+)", done.stderr)
    done = command("submit", path, "--again", again)
    assert "1 of 4 lines refused" in done.stderr
    now = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["id" in row for row in now] == [True, True, True, False]
    assert [row["id"] for row in rows if "id" in row] == [row["id"] for row in now[: lost - 1]]
    assert command.api.ledger.counts()["enqueued"] == 3
    assert command("submit", path).returncode == 2
    assert command.api.ledger.counts()["enqueued"] == 4, "another run is another run, but for what has an id or key of its own"


def test_waiting_writes_an_answer_a_line_and_the_exit_code_tells_of_failures(command: Cli) -> None:
    path = command.file(job("a", idempotency_key="a"), job("b", idempotency_key="b"), job("a", idempotency_key="a"))
    assert command("submit", path).returncode == 0
    command.api.run("acme", 2)
    done = command("submit", path, "--wait")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["status"] for row in rows] == ["succeeded"] * 3
    assert rows[0]["id"] == rows[2]["id"] != rows[1]["id"]
    assert rows[0]["response"]["choices"][0]["message"]["content"] == "seven"
    (cancelled,) = command.api.post(job("c", idempotency_key="c"))
    command.api.call("POST", f"/v1/jobs/{cancelled['id']}/cancel")
    done = command("submit", "-", "--wait", stdin=json.dumps(job("c", idempotency_key="c")))
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "cancelled"


def test_jobs_are_listed_shown_and_cancelled(command: Cli) -> None:
    first, second = (row["id"] for row in command.api.post(job("a", priority="high", adapter=None), job("b")))
    command.api.run("acme")
    listed = json.loads(command("jobs", "list", "--json").stdout)
    assert {row["id"]: row["status"] for row in listed} == {first: "succeeded", second: "queued"}
    assert [row["id"] for row in json.loads(command("jobs", "list", "--status", "queued", "--json").stdout)] == [second]
    table = command("jobs", "list").stdout
    assert first in table, "an id is never shortened"
    assert second in table
    shown = command("jobs", "show", first)
    assert json.loads(shown.stdout) == command.api.call("GET", f"/v1/jobs/{first}").json()
    done = command("jobs", "cancel", second, first)
    assert done.stdout.splitlines() == [f"{second} cancelled", f"{first} succeeded"]
    for wrong in ("none", "../../healthz", "a/b"):
        done = command("jobs", "show", wrong)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    fails(command("jobs", "show", first, who="globex"), first, "does not exist")
    assert json.loads(command("jobs", "list", "--json", who="globex").stdout) == []


def test_why_says_in_a_sentence_what_a_job_waits_for_and_when_it_should_end(command: Cli) -> None:
    ledger = command.api.ledger
    (ended, waiting) = (row["id"] for row in command.api.post(job("a", priority="high"), job("b")))
    command.api.run("acme")
    assert command("jobs", "why", ended).stdout == command.api.call("GET", f"/v1/jobs/{ended}").json()["explanation"] + "\n"
    assert "for a scheduler" in command("jobs", "why", waiting).stdout
    now = Board(ledger).now()
    Board(ledger).publish(Forecast(now, workers=1, each_ms=500.0, at_worker=2_000.0, room=4))
    # the API reads forecasts twice a second
    assert until(lambda: " It should end in " in command("jobs", "why", waiting).stdout)
    assert "(80 %: " in command("jobs", "list").stdout
    fails(command("jobs", "why", "none"), "none", "does not exist")


# -- adapters and keys --------------------------------------------------------------------------------------------------------------------


def test_adapters_without_a_worker_and_from_no_folder(command: Cli) -> None:
    assert json.loads(command("adapters", "list", "--json").stdout) == []
    fails(command("adapters", "add", "a", str(command.folder / "none")), "no such file", "PEFT folder")
    fails(command("adapters", "add", "a", str(EXAMPLES / "adapters" / "banking77")), "no worker has told", "try again")
    fails(command("adapters", "remove", "a"), "'a'")
    fails(command("adapters", "remove", "a", "--public"), "operator")


def test_keys_are_made_listed_and_revoked(command: Cli) -> None:
    made = command("keys", "create", "--tenant", "newcomer")
    assert made.returncode == 0
    key = made.stdout.strip()
    assert KeyRing(command.api.ledger.client).caller(key).tenant == "newcomer"
    assert command("jobs", "list", "--json", api_key=key).returncode == 0
    listed = command("keys", "list", "--json")
    assert key not in listed.stdout
    (name,) = [row["key"] for row in json.loads(listed.stdout) if row["tenant"] == "newcomer"]
    assert name in command("keys", "list").stdout
    assert command("keys", "revoke", name).stdout == f"{name} revoked\n"
    fails(command("jobs", "list", api_key=key), "no valid API key")
    fails(command("keys", "revoke", name), "lorayard keys list")
    fails(command("keys", "create", "--tenant", "no/name"), "tenant", "is not a name")


def test_costs_are_what_workers_told(command: Cli) -> None:
    fails(command("bench", "costs"), "no worker", "lorayard up")
    registry = WorkerRegistry(command.api.ledger.client)
    costs = {"prefill_tokens_per_s": 300.0, "step_ms": {"1": 18.5}, "switch_ms": {"loaded": 20.0}}
    told = WorkerInfo(name="w1", pool="main", kind="llama", incarnation="i", host="h", pid=1, width=16, costs=costs)
    registry.beat(told)
    try:
        assert json.loads(command("bench", "costs").stdout) == {"w1": {"width": 16, "costs": costs}}
    finally:
        registry.leave(told)


# -- the commands themselves --------------------------------------------------------------------------------------------------------------


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, one in getattr(group, "commands", {}).items():
        yield from commands(one, (*path, name))


EVERY = list(commands(typer.main.get_command(cli.app)))


def test_every_command_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ("jobs", "list") in EVERY
    for path in EVERY:  # in this process: starting one for each would take long
        with pytest.raises(SystemExit) as end:
            cli.app([*path, "--help"], prog_name="lorayard")
        assert end.value.code == 0
        shown = capsys.readouterr()
        assert "Usage: lorayard " + " ".join(path) in shown.out
        assert len(shown.out.splitlines()) > 5, path
    done = lorayard("--version", state=tmp_path)
    assert done.stdout.strip() == __version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lorayard("--help", state=tmp_path).returncode == 0


def test_every_command_that_the_documents_show_exists() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "examples").glob("**/*.md")]
    shown = set()
    for document in documents:
        text = document.read_text()
        code = re.findall(r"```.*?```", text, re.DOTALL) + re.findall(r"`[^`\n]+`", text)
        for part in code:
            for words in re.findall(r"(?:^|[`\s/$(])lorayard((?: [a-z][a-z-]*)+)", part):
                shown.add((document.name, tuple(words.split())))
    for name, words in shown:
        known = [path for path in EVERY if path and words[: len(path)] == path]
        groups = {path[:1] for path in EVERY if len(path) > 1}
        longest = max(known, key=len, default=())
        assert longest, f"{name}: lorayard {' '.join(words)}"
        assert longest not in groups or len(words) == 1, f"{name}: lorayard {' '.join(words)}"
    assert shown
