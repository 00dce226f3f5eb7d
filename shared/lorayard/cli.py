"""The command `lorayard`: the fleet's processes, and what people do with it. Exit codes: 0 done, 1 some jobs did not succeed or the doctor
found something wrong, 2 an error that one line on standard error explains, 130 interrupted."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import msgspec
import redis
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from lorayard import __version__, doctor, embedded, hosted_cli, replay_cli
from lorayard.celery_app import make_app
from lorayard.client import Client, find_key
from lorayard.errors import LorayardError, NotFound, SetupError, Unavailable
from lorayard.fleet import START_S, SUPERVISED, Fleet, end_with_parent
from lorayard.jobs import Status
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import KeyRing, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard.telemetry import configure_logging

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
worker_app = typer.Typer(no_args_is_help=True, help="Run a worker process.")
jobs_app = typer.Typer(no_args_is_help=True, help="Look at jobs, cancel, retry and delete them.")
adapters_app = typer.Typer(no_args_is_help=True, help="Add, list and remove adapters.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys of tenants (talks to Redis, so only where the fleet runs).")
app.add_typer(worker_app, name="worker")
app.add_typer(jobs_app, name="jobs")
app.add_typer(adapters_app, name="adapters")
app.add_typer(keys_app, name="keys")
bench_app = typer.Typer(no_args_is_help=True, help="What this fleet costs.")
app.add_typer(bench_app, name="bench")
hosted_cli.add_to(app, adapters_app)

out = Console()
err = Console(stderr=True)

_AGAIN = 3  # exit code of a process that its supervisor shall start again

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run the command; every foreseen error is one line and exit code 2.

    Of a process of the fleet, 2 says that starting it again would not help; a server that is away at the wrong moment is no such case.
    """
    supervised = bool(os.environ.get(SUPERVISED))
    try:
        if supervised:
            end_with_parent()
            if os.getppid() == 1:  # the supervisor ended before we asked
                sys.exit(_AGAIN)
        app()
    except LorayardError as error:
        print(f"lorayard: {error.message}", file=sys.stderr)
        sys.exit(_AGAIN if supervised and isinstance(error, Unavailable) else 2)
    except redis.RedisError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"lorayard: Redis: {reason}: is the fleet up? 'lorayard up' starts it; or correct LORAYARD_REDIS_URL", file=sys.stderr)
        sys.exit(_AGAIN if supervised else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        print(
            f"lorayard: this command needs {error.name}: install lorayard with the extra of its role, or 'fleet' for all", file=sys.stderr
        )
        sys.exit(2)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """An asynchronous job queue for inference with LoRA adapters. All settings are environment variables: LORAYARD_*."""


# -- processes ---------------------------------------------------------------------------------------------------------------------------


def _serve(role: str) -> None:
    """Run a long-running role, once its server answers; every role's entry point takes (settings, ledger, celery app)."""
    configure_logging(role)
    settings = Settings.load()
    (entry,) = entry_points(group="lorayard.roles", name=role)
    serve = entry.load()
    url = embedded.redis_url(settings)
    embedded.wait_until_up(url, _patience(settings))
    with connect(url) as client:
        embedded.check_server(client)
        serve(settings, open_ledger(client, settings), make_app(embedded.broker_url(settings)))


def _patience(settings: Settings) -> float:
    """Seconds to wait for the store: the fleet's own may have much to read before it answers."""
    return START_S if settings.redis_url is None else 30.0


@app.command()
def up() -> None:
    """Start the whole fleet on this machine; Ctrl-C stops it."""
    settings = Settings.load()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a script started us in its background, with SIGINT ignored
        signal.signal(number, lambda *_: stop.set())
    with Fleet(settings) as fleet:
        _wait_ready(fleet, stop)
        _print_addresses(fleet)
        out.print("The fleet is up. Ctrl-C stops it.")
        while not stop.wait(1):
            fleet.check()
        out.print("Stopping …")
    out.print("Stopped.")


def _print_addresses(fleet: Fleet) -> None:
    for name, address in fleet.addresses():
        out.print(f"{name:>24}  {address}", highlight=False, soft_wrap=True)


def _wait_ready(fleet: Fleet, stop: threading.Event | None = None) -> None:
    with out.status("Starting …") as status:
        for waiting_for in fleet.wait_ready():
            status.update(f"Starting: {waiting_for} …")
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt


@app.command()
def store() -> None:
    """Run the embedded Valkey or Redis server of the state folder."""
    settings = Settings.load()
    command = embedded.prepare(settings, restart=bool(os.environ.get(SUPERVISED)))
    os.execve(command[0], command, embedded.environment())  # noqa: S606 — our own server


@app.command()
def scheduler() -> None:
    """Run a scheduler: plans batches, wakes workers, puts right what got lost."""
    _serve("scheduler")


@app.command()
def api() -> None:
    """Run the HTTP API."""
    _serve("api")


@app.command()
def flower() -> None:
    """Run Flower, with a row for every job.

    On an address that others can reach it asks for LORAYARD_FLOWER_BASIC_AUTH, by default user lorayard with the API key.
    """
    settings = Settings.load()
    auth = settings.flower_basic_auth
    if settings.flower_host not in ("127.0.0.1", "::1", "localhost") and not auth:
        try:
            auth = f"lorayard:{find_key(settings)}"
        except SetupError:
            # In a fleet that starts for the first time the API is about to write the key.
            kind = Unavailable if os.environ.get(SUPERVISED) else SetupError
            raise kind(
                f"Flower on {settings.flower_host} would be open to everyone: set LORAYARD_FLOWER_BASIC_AUTH=user:password"
            ) from None
    embedded.wait_until_up(embedded.redis_url(settings), _patience(settings))
    if os.environ.get(SUPERVISED):
        end_with_parent(signal.SIGKILL)  # its threads outlive SIGTERM, and it keeps nothing
    import flower  # noqa: F401 — a missing extra is told here

    if auth:
        os.environ["FLOWER_BASIC_AUTH"] = auth  # not in the arguments, which everyone on the machine can read
    arguments = [f"--address={settings.flower_host}", f"--port={settings.flower_port}", "--enable-events=False"]
    os.execv(sys.executable, [sys.executable, "-m", "celery", "-A", "lorayard.flower_app", "flower", *arguments])  # noqa: S606


@worker_app.command("llama")
def worker_llama() -> None:
    """Run a worker that holds one base model in llama.cpp and a few adapters."""
    _serve("worker-llama")


@worker_app.command("groq")
def worker_groq() -> None:
    """Run a worker whose jobs are computed by Groq, or by another OpenAI-compatible host (LORAYARD_HOSTED_URL)."""
    _serve("worker-groq")


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the fleet up afterwards, until Ctrl-C.")] = False,
    jobs: Annotated[int, typer.Option(min=10, help="About how many jobs.")] = 340,
) -> None:
    """Run real questions for the shipped adapters and the base model through the whole fleet."""
    from lorayard.demo import run_demo

    settings = Settings.load()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Fleet(settings) as fleet:
        _wait_ready(fleet)
        run_demo(settings, out, jobs=jobs)
        if keep:
            _print_addresses(fleet)
            out.print("The fleet stays up. Ctrl-C stops it.")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    threading.Event().wait(1)
                    fleet.check()
        else:
            out.print(f"It ran with Flower on {settings.flower_port} and the API on {settings.api_port}; with --keep they stay up.")


app.command("doctor")(doctor.command)
app.command("replay")(replay_cli.replay)


# -- jobs --------------------------------------------------------------------------------------------------------------------------------


@app.command()
def submit(
    file: Annotated[str, typer.Argument(help="JSON lines, one job object each; - for standard input.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until all jobs have ended.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write one JSON line a job here, in the order of the input.")
    ] = None,
    again: Annotated[str | None, typer.Option("--again", help="Go on where a run was cut off: the word that it ended with.")] = None,
) -> None:
    """Submit a file of jobs. Lines that are refused are told by number; the others are submitted all the same.

    Lines without an id or idempotency_key get a key of this run, so that a run that was cut off can be gone on with: nothing is made twice.
    """
    numbered = _read_lines(file)
    if output is not None and (output.is_dir() or not os.access(output.parent, os.W_OK)):  # told before anything is submitted
        raise SetupError(f"cannot write {output}: give a file in a folder that exists and that you may write to")
    with Client() as client, _progress() as bar:
        run = again or secrets.token_hex(6)
        rows = _submit_all(client, bar, [_keyed(line, f"{run}-{number}") for number, line in numbered])
        if wait:
            ids = [row["id"] for row in rows if "id" in row]
            task = bar.add_task("answers", total=len(set(ids)))
            documents = {}
            for document in client.results(ids):
                documents[document["id"]] = document
                bar.advance(task)
            rows = [documents.get(row.get("id", ""), row) for row in rows]
    lines = [row | {"line": number} for (number, _), row in zip(numbered, rows, strict=True)]
    _write_lines(output, lines)
    _end_of_submit(file, lines, wait, run)


def _keyed(line: bytes, key: str) -> bytes:
    """The job with this idempotency key, where it has neither key nor id. What cannot be read is left as it is, for the API to refuse."""
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return line
    if any(bytes(fields.get(name, b"null")) != b"null" for name in ("id", "idempotency_key")):
        return line
    return msgspec.json.encode(fields | {"idempotency_key": key})


def _submit_all(client: Client, bar: Progress, lines: list[bytes]) -> list[dict[str, Any]]:
    """An answer a line, also where the API goes away half-way: the ids of what it has accepted are not lost with it. Raises what came
    between where nothing was, or may have been, accepted."""
    task = bar.add_task("submit", total=len(lines))
    try:
        return client.submit(lines, heard=lambda n: bar.advance(task, n))
    except LorayardError as error:
        if all("error" in row and row["error"]["code"] != "not_known" for row in error.answers):
            raise
        return list(error.answers)


def _end_of_submit(file: str, lines: list[dict[str, Any]], waited: bool, run: str) -> None:
    missing = [row for row in lines if "id" not in row]
    unsettled = [row for row in missing if row["error"]["code"] in ("not_known", "not_sent")]
    refused = [row for row in missing if row not in unsettled]
    for row in refused:
        err.print(f"lorayard: {file}:{row['line']}: {row['error']['message']}", highlight=False, soft_wrap=True, markup=False)
    if refused:
        err.print(f"lorayard: {len(refused)} of {len(lines)} lines refused", highlight=False)
    if unsettled:
        unknown = sum(row["error"]["code"] == "not_known" for row in unsettled)
        err.print(
            f"lorayard: {file}:{unsettled[0]['line']}: {unsettled[0]['error']['message']}\n"
            f"lorayard: of {unknown} lines it is not known whether they were accepted, {len(unsettled) - unknown} were not sent: 'lorayard"
            f" submit {file} --again {run}' submits what is missing, and nothing twice",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    if missing:
        raise typer.Exit(2)
    if waited and any(row["status"] != Status.SUCCEEDED for row in lines):
        raise typer.Exit(1)


def _read_lines(file: str) -> list[tuple[int, bytes]]:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise SetupError(f"cannot read {file}: {error.strerror}") from None
    lines = [(i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise SetupError(f"{file}: no jobs in it; a line is one job object, as of POST /v1/jobs")
    return lines


def _write_lines(output: Path | None, lines: list[dict[str, Any]]) -> None:
    data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    if output is None:
        sys.stdout.buffer.write(data)
        return
    part = output.with_name(output.name + ".part")
    try:
        part.write_bytes(data)
        part.replace(output)
    except OSError as error:
        raise SetupError(f"cannot write {output}: {error.strerror}") from None


@jobs_app.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    status: Annotated[Status | None, typer.Option(help="Only jobs in this status.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="Only dead letters: jobs that failed at their last attempt.")] = False,
    as_json: AsJson = False,
) -> None:
    """The newest jobs."""
    with Client() as client:
        rows = client.jobs(limit=limit, status=status.value if status else None, dead=dead)["data"]
    if as_json:
        _print_json(rows)
        return
    # Ids are to be copied: a narrow terminal shortens the other columns.
    table = Table(
        Column("id", no_wrap=True, min_width=max((len(r["id"]) for r in rows), default=2)),
        "status",
        "adapter",
        "priority",
        "attempts",
        "total ms, or when",
        "worker",
    )
    for r in rows:
        total = r["latencies_ms"].get("total")
        cells = (
            r["id"],
            r["status"],
            r["adapter"] or "(base)",
            r["priority"],
            r["attempts"],
            _when(r) if total is None else f"{total:.0f}",
            r["worker"],
        )
        table.add_row(*(str(cell or "") for cell in cells))
    out.print(table)


def _when(row: dict[str, Any]) -> str:
    """Of a job that has not ended: how long it will take, from now."""
    eta = row.get("eta")
    if not eta:
        return ""
    half, most = (max(0.0, eta[name] / 1000 - time.time()) for name in ("median_ms", "p80_ms"))
    late = f", {eta['risk']:.0%} late" if eta["risk"] is not None else ""
    return f"in {half:.0f} s (80 %: {most:.0f} s{late})"


@jobs_app.command("why")
def jobs_why(job_id: str) -> None:
    """What a job waits for, or waited for, in one sentence."""
    with Client() as client:
        document = client.job(job_id)
    when = _when(document)
    print(document["explanation"] + (f" It should end {when}." if when else ""))


@jobs_app.command("show")
def jobs_show(job_id: str, wait: Annotated[float, typer.Option(help="Seconds to wait for its end.")] = 0) -> None:
    """A job's whole document, as JSON."""
    with Client() as client:
        _print_json(client.job(job_id, wait_s=wait))


@jobs_app.command("cancel")
def jobs_cancel(job_ids: list[str]) -> None:
    """Cancel jobs, at any state."""
    with Client() as client:
        for job_id in job_ids:
            print(f"{job_id} {client.cancel(job_id)['status']}")


@jobs_app.command("retry")
def jobs_retry(
    job_ids: Annotated[list[str] | None, typer.Argument()] = None,
    every: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
) -> None:
    """Queue dead letters again, with all their attempts."""
    _each_job(job_ids, every, lambda client, job_id: str(client.retry(job_id)["status"]))


@jobs_app.command("delete")
def jobs_delete(
    job_ids: Annotated[list[str] | None, typer.Argument()] = None,
    dead: Annotated[bool, typer.Option("--dead", help="All dead letters.")] = False,
) -> None:
    """Remove jobs at any state, with requests, results and idempotency keys."""

    def delete(client: Client, job_id: str) -> str:
        client.delete(job_id)
        return "deleted"

    _each_job(job_ids, dead, delete)


def _each_job(job_ids: list[str] | None, every_dead: bool, act: Callable[[Client, str], str]) -> None:
    """Do something with the named jobs, or with all dead letters; one line each."""
    if bool(job_ids) == every_dead:
        raise SetupError("name jobs, or all dead letters with the option: 'lorayard jobs list --dead' shows them")
    with Client() as client:
        ids, after = list(job_ids or ()), None
        while every_dead:
            page = client.jobs(limit=1000, dead=True, after=after)
            ids += [row["id"] for row in page["data"]]
            after, every_dead = page["last_id"], page["has_more"]
        for job_id in ids:
            print(f"{job_id} {act(client, job_id)}")


# -- holding back ------------------------------------------------------------------------------------------------------------------------

OfAdapter = Annotated[
    str | None, typer.Option("--adapter", help="Its jobs: yours, or with a public adapter and the operator's key everyone's.")
]
OfTenant = Annotated[str | None, typer.Option("--tenant", help="Its jobs (of another tenant: the operator's key only).")]


@app.command()
def pause(adapter: OfAdapter = None, tenant: OfTenant = None) -> None:
    """Hold back the pool's jobs, or an adapter's or a tenant's. They are accepted all the same; what runs goes on."""
    with Client() as client:
        changed = client.pause(pool=not (adapter or tenant), adapter=adapter, tenant=tenant)
    print("paused; 'lorayard resume' with the same options ends it" if changed else "was paused already")


@app.command()
def resume(
    what: Annotated[str | None, typer.Argument(help="As it is listed when something stays paused.")] = None,
    adapter: OfAdapter = None,
    tenant: OfTenant = None,
) -> None:
    """End a pause of the same options, or of that name."""
    if what and (adapter or tenant):
        raise SetupError("give the name of a pause, or the options it was made with, not both")
    with Client() as client:
        changed = client.resume(pool=not (what or adapter or tenant), adapter=adapter, tenant=tenant, what=what)
        left = client.paused()
    print(("resumed" if changed else "was not paused") + (f"; still paused: {', '.join(left)}" if left else ""))


# -- adapters ----------------------------------------------------------------------------------------------------------------------------


@adapters_app.command("add")
def adapters_add(
    name: str,
    path: Annotated[Path, typer.Argument(help="A PEFT folder, or a zip of one.")],
    public: Annotated[bool, typer.Option("--public", help="For all tenants (the operator's key only).")] = False,
    to: Annotated[str | None, typer.Option("--to", help="Bring it, and what the name holds later, to a hosted service: groq.")] = None,
) -> None:
    """Add an adapter; jobs may name it from now on, without a restart."""
    with Client(timeout_s=600) as client:
        m = client.add_adapter(name, path, public=public)
        if to is not None:
            client.publish_adapter(name, to=to)
    replaced = f", instead of {m['replaces'][:12]} for new jobs" if m.get("replaces") else ""
    print(f"{m['name']}: {m['digest'][:12]}, rank {m['rank']}, {m['n_bytes'] / 1e6:.1f} MB{replaced}")


@adapters_app.command("list")
def adapters_list(as_json: AsJson = False) -> None:
    """The adapters you may use."""
    with Client() as client:
        rows = client.adapters()
    if as_json:
        _print_json(rows)
        return
    table = Table("name", "digest", "rank", "targets", "MB", "whose")
    for r in rows:
        whose = "everyone's" if r["tenant"] == "*" else r["tenant"]
        table.add_row(r["name"], r["digest"][:12], str(r["rank"]), ", ".join(r["targets"]), f"{r['n_bytes'] / 1e6:.1f}", whose)
    out.print(table)


@adapters_app.command("remove")
def adapters_remove(
    name: str,
    public: Annotated[bool, typer.Option("--public", help="One that all tenants have (the operator's key only).")] = False,
) -> None:
    """Take a name away, also from a hosted service it was published to; jobs already enqueued with it are still run by local workers."""
    with Client() as client:
        client.remove_adapter(name, public=public)
    print(f"{name} removed")


# -- keys --------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _keys() -> Iterator[KeyRing]:
    with connect(embedded.redis_url(Settings.load())) as client:
        yield KeyRing(client)


@keys_app.command("create")
def keys_create(tenant: Annotated[str, typer.Option("--tenant", help="Whose key it is; a new name is a new tenant.")]) -> None:
    """Make a key and print it; it is kept as a digest only and cannot be shown again."""
    with _keys() as ring:
        print(ring.create(tenant))


@keys_app.command("list")
def keys_list(as_json: AsJson = False) -> None:
    """The keys there are, by the first characters of their digest."""
    with _keys() as ring:
        rows = ring.entries()
    if as_json:
        _print_json(rows)
        return
    table = Table("key", "tenant", "ends with", "operator")
    for r in rows:
        table.add_row(r["key"], r["tenant"], f"…{r['tail']}", "yes" if r["operator"] else "")
    out.print(table)


@keys_app.command("revoke")
def keys_revoke(key: Annotated[str, typer.Argument(help="As 'keys list' shows it.")]) -> None:
    """Make a key invalid, at once."""
    with _keys() as ring:
        if not ring.revoke(key):
            raise NotFound(f"no single key {key!r}: 'lorayard keys list' shows them")
    print(f"{key} revoked")


@bench_app.command("costs")
def bench_costs() -> None:
    """Print what each worker has measured of itself, as JSON: switches by temperature, prompts a second, decode steps by width.

    The simulator takes it as a fleet: python -m benchmarks.simulate --costs FILE.
    """
    settings = Settings.load()
    with connect(embedded.redis_url(settings)) as client:
        told = {w.name: {"width": w.width, "costs": w.costs} for w in WorkerRegistry(client).workers(settings.pool) if w.costs}
    if not told:
        raise NotFound(f"no worker of pool {settings.pool!r} has told what its computing costs: is one up? 'lorayard up' starts the fleet")
    _print_json(told)


def _print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err, disable=not err.is_terminal
    )
