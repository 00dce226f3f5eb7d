"""The command `lorayard`: the fleet's processes, and what people do with it. Exit codes: 0 done, 1 some jobs did not succeed or the doctor
found something wrong, 2 an error that one line on standard error explains, 130 interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Annotated

import redis
import typer
from rich.table import Table

from lorayard import __version__, client_cli, doctor, embedded, hosted_cli, replay_cli
from lorayard.celery_app import make_app
from lorayard.client import find_key
from lorayard.errors import LorayardError, NotFound, SetupError, Unavailable
from lorayard.fleet import START_S, SUPERVISED, Fleet, end_with_parent
from lorayard.ledger.connection import connect
from lorayard.ledger.registry import KeyRing, WorkerRegistry, open_ledger
from lorayard.settings import Settings
from lorayard.telemetry import configure_logging
from lorayard.terminal import AsJson, out, print_json

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
worker_app = typer.Typer(no_args_is_help=True, help="Run a worker process.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys of tenants (talks to Redis, so only where the fleet runs).")
app.add_typer(worker_app, name="worker")
app.add_typer(client_cli.jobs_app, name="jobs")
app.add_typer(client_cli.adapters_app, name="adapters")
app.add_typer(keys_app, name="keys")
bench_app = typer.Typer(no_args_is_help=True, help="What this fleet costs.")
app.add_typer(bench_app, name="bench")
hosted_cli.add_to(app, client_cli.adapters_app)

_AGAIN = 3  # exit code of a process that its supervisor shall start again


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
    with connect(url) as client, make_app(embedded.broker_url(settings)) as app:
        embedded.check_server(client)
        serve(settings, open_ledger(client, settings), app)


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
for command in (client_cli.submit, client_cli.pause, client_cli.resume):
    app.command()(command)


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
        print_json(rows)
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
    print_json(told)
