"""The commands for what people do through the API, from wherever they are: jobs, pauses, adapters."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import Progress
from rich.table import Column, Table

from lorayard.client import Client
from lorayard.errors import LorayardError, SetupError
from lorayard.jobs import Status
from lorayard.terminal import AsJson, err, out, print_json, progress

jobs_app = typer.Typer(no_args_is_help=True, help="Look at jobs, cancel, retry and delete them.")
adapters_app = typer.Typer(no_args_is_help=True, help="Add, list and remove adapters.")


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
    with Client() as client, progress() as bar:
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
        print_json(rows)
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
        print_json(client.job(job_id, wait_s=wait))


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


def pause(adapter: OfAdapter = None, tenant: OfTenant = None) -> None:
    """Hold back the pool's jobs, or an adapter's or a tenant's. They are accepted all the same; what runs goes on."""
    with Client() as client:
        changed = client.pause(pool=not (adapter or tenant), adapter=adapter, tenant=tenant)
    print("paused; 'lorayard resume' with the same options ends it" if changed else "was paused already")


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
        print_json(rows)
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
