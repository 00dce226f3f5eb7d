"""`lorayard doctor`: looks at the server, the fleet and the ledger, and says in plain words what is wrong and what to do about it."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import redis
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorayard import embedded
from lorayard.celery_app import make_app
from lorayard.errors import LorayardError
from lorayard.hosted_doctor import Level, hosted_findings
from lorayard.ledger import keys
from lorayard.ledger.audit import audit
from lorayard.ledger.connection import connect, is_sentinel, shown
from lorayard.ledger.ledger import MAX_MEMORY, Ledger
from lorayard.ledger.registry import ALIVE_MS, WorkerRegistry
from lorayard.settings import Settings
from lorayard.terminal import AsJson, print_json

_COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
_MIB = 1024 * 1024
_BROKER_S = 5


class Check(NamedTuple):
    """One thing that was looked at. `text` says what was seen and, unless it is ok, what to do."""

    name: str
    level: Level
    text: str


class _Patient(NamedTuple):
    """What the checks look at. `info` and `config` are the server's; `config` is empty where an ACL hides it."""

    settings: Settings
    client: redis.Redis
    ledger: Ledger
    info: dict[str, Any]
    config: dict[str, str]
    repair: bool


def examine(settings: Settings, *, repair: bool = False) -> list[Check]:
    """Every check there is; only the first where the server cannot be reached. With `repair`, the ledger is put right as far as that goes.

    Raises `SetupError` where there is no address to go to.
    """
    url = embedded.redis_url(settings)
    with connect(url) as client:
        try:
            reached = _reach(client, url)
            info: dict[str, Any] = client.info("everything")
            config = embedded.server_settings(client)
        except redis.RedisError as error:
            return [Check("server", "wrong", f"{shown(url)} cannot be used: {_line(error)}; start it, or correct LORAYARD_REDIS_URL")]
        ledger = Ledger(client, settings.pool, result_ttl_s=settings.result_ttl_s)
        patient = _Patient(settings, client, ledger, info, config, repair)
        return [reached, *(check for look in _LOOKS for check in _carefully(look, patient))]


def _carefully(look: Callable[[_Patient], Iterable[Check]], patient: _Patient) -> Iterator[Check]:
    """What cannot be looked at is itself a finding, and hides no other."""
    try:
        yield from look(patient)
    except (redis.RedisError, LorayardError) as error:
        name = look.__name__.strip("_").replace("_", " ")
        yield Check(name, "wrong", f"could not be looked at: {_line(error)}")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


# -- the server ----------------------------------------------------------------------------------------------------------------------------


def _reach(client: redis.Redis, url: str) -> Check:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        client.ping()
        times.append(1000 * (time.perf_counter() - began))
    median = sorted(times)[10]
    text = f"{shown(url)} answers in {median:.1f} ms (slowest of 20: {max(times):.1f} ms)"
    if median > 20:
        return Check("server", "warning", f"{text}: every step of a job waits for it; bring it nearer to the fleet")
    return Check("server", "ok", text)


def _version(p: _Patient) -> Iterator[Check]:
    product, version = ("Valkey", p.info["valkey_version"]) if "valkey_version" in p.info else ("Redis", p.info["redis_version"])
    text = f"{product} {version}"
    major, minor = (int(part) for part in str(version).split(".")[:2])
    if major < 7:
        yield Check("version", "wrong", f"{text} has no functions: use Redis >= 7.2 or Valkey")
    elif (major, minor) < (7, 2):
        yield Check("version", "warning", f"{text} is not what Lorayard is tested with: use Redis >= 7.2 or Valkey")
    else:
        yield Check("version", "ok", text)


def _role(p: _Patient) -> Iterator[Check]:
    if p.info["role"] != "master":
        primary = f"{p.info['master_host']}:{p.info['master_port']}"
        yield Check("role", "wrong", f"a read-only replica of {primary}: let LORAYARD_REDIS_URL name the primary, or the Sentinels")
        return
    replicas = [value for name, value in p.info.items() if name.startswith("slave") and isinstance(value, dict)]
    late = [r for r in replicas if r.get("state") != "online" or int(r.get("lag", 0)) > 10]
    needed = int(p.config.get("min-replicas-to-write", 0))
    if len(replicas) - len(late) < needed:
        yield Check("role", "wrong", f"primary that writes only with {needed} replicas and has {len(replicas) - len(late)}: start replicas")
    elif late:
        yield Check(
            "role", "warning", f"primary; {len(late)} of {len(replicas)} replicas lag behind or are away: a fail-over would lose jobs"
        )
    else:
        yield Check("role", "ok", f"primary, {len(replicas)} replicas")


def _memory(p: _Patient) -> Iterator[Check]:
    used, most = int(p.info["used_memory"]), int(p.info["maxmemory"])
    policy = p.info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Check("eviction", "wrong", f"maxmemory-policy {policy} throws jobs away when memory is full: set it to noeviction")
    else:
        yield Check("eviction", "ok", "noeviction")
    if not most:
        yield Check(
            "memory",
            "warning",
            f"{used // _MIB} MiB used and no maxmemory: the kernel will kill the server when the machine is full; set it",
        )
        return
    text = f"{used / most:.0%} of {most // _MIB} MiB used"
    more = "raise maxmemory, shorten LORAYARD_RESULT_TTL_S, or add workers"
    if used >= MAX_MEMORY * most:
        yield Check("memory", "wrong", f"{text}: from {MAX_MEMORY:.0%} on new jobs are refused; {more}")
    elif used >= 0.7 * most:
        yield Check("memory", "warning", f"{text}: at {MAX_MEMORY:.0%} new jobs are refused; {more}")
    else:
        yield Check("memory", "ok", text)
    machine = int(p.info.get("total_system_memory", 0))
    if machine and most > 0.75 * machine:
        text = f"maxmemory is {most / machine:.0%} of the machine's memory, and a rewrite of the append-only file needs more"
        yield Check("headroom", "warning", f"{text}: lower it, or give the machine more memory")


def _fragmentation(p: _Patient) -> Iterator[Check]:
    used, resident = int(p.info["used_memory"]), int(p.info["used_memory_rss"])
    if used > 256 * _MIB and resident > 1.5 * used:
        text = f"the server holds {resident // _MIB} MiB of memory for {used // _MIB} MiB of data"
        yield Check("fragmentation", "warning", f"{text}: set activedefrag yes, or restart it at a quiet hour")


def _append_only_file(p: _Patient) -> Iterator[Check]:
    if not p.info["aof_enabled"]:
        yield Check("append-only file", "wrong", "there is none: a restart loses jobs that were acknowledged; set appendonly yes")
        return
    doubts = [text for text in embedded.doubts(p.config) if "appendfsync" in text]
    for text in doubts:
        yield Check("append-only file", "warning" if "everysec" in text or "rewrite" in text else "wrong", text)
    if p.info["aof_last_write_status"] != "ok":
        yield Check("append-only file", "wrong", "the last write failed, and the server refuses all others: look for a full or broken disk")
    elif not doubts:
        yield Check("append-only file", "ok", f"appendfsync {p.config.get('appendfsync', 'unknown')}, last write ok")
    if p.info["aof_last_bgrewrite_status"] != "ok":
        yield Check("rewrite", "warning", "the last rewrite of the append-only file failed, so it grows: look for lack of memory or disk")
    if int(p.info.get("aof_delayed_fsync", 0)):
        yield Check(
            "fsync",
            "warning",
            f"{p.info['aof_delayed_fsync']} times the disk took so long to fsync that the server waited: use a faster disk",
        )


def _snapshots(p: _Patient) -> Iterator[Check]:
    if p.info["rdb_last_bgsave_status"] == "ok":
        return
    if p.config.get("stop-writes-on-bgsave-error", "yes") == "yes" and p.config.get("save", "") != "":
        text = "the last snapshot failed, and with stop-writes-on-bgsave-error the server refuses to write"
        yield Check(
            "snapshots", "wrong", f"{text}: look for lack of memory or disk; with an append-only file no snapshots are needed (save '')"
        )
    else:
        yield Check("snapshots", "warning", "the last snapshot failed: look for lack of memory or disk")


def _disk(p: _Patient) -> Iterator[Check]:
    """Only where the server's folder is on this machine."""
    folder = Path(p.config.get("dir", ""))
    if not p.config.get("dir") or not _is_here(p.client) or not folder.exists():
        return
    free = shutil.disk_usage(folder).free
    need = 2 * max(int(p.info["used_memory"]), int(p.info.get("aof_current_size", 0)))
    text = f"{free // _MIB} MiB free in {folder}"
    if free < 64 * _MIB:
        yield Check("disk", "wrong", f"{text}: writes are about to fail; free some")
    elif free < need:
        yield Check("disk", "warning", f"{text}: a rewrite of the append-only file may need {need // _MIB} MiB; free some")
    else:
        yield Check("disk", "ok", text)


def _is_here(client: redis.Redis) -> bool:
    pool: Any = client.connection_pool
    host = pool.get_master_address()[0] if is_sentinel(client) else pool.connection_kwargs.get("host", "localhost")
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def _latency(p: _Patient) -> Iterator[Check]:
    now = p.client.time()[0]
    rows: Any = p.client.latency_latest()
    recent = [
        (name.decode(), last)
        for name, at, last, _ in ((r[0], int(r[1]), int(r[2]), r[3]) for r in rows)
        if int(now) - at < 600 and last >= 250
    ]
    if recent:
        text = ", ".join(f"{name} {last} ms" for name, last in recent)
        yield Check(
            "latency", "warning", f"the server stood still within the last ten minutes: {text}; 'LATENCY DOCTOR' at the server says more"
        )
    else:
        yield Check("latency", "ok", "the server told of no stall in the last ten minutes")


def _clients(p: _Patient) -> Iterator[Check]:
    now, most = int(p.info["connected_clients"]), int(p.info.get("maxclients", 10_000))
    full = now > 0.8 * most
    text = f"{now} of {most} connections" + (": raise maxclients, or end some" if full else "")
    yield Check("clients", "warning" if full else "ok", text)


def _clock(p: _Patient) -> Iterator[Check]:
    before = time.time()
    seconds, micros = p.client.time()
    off = int(seconds) + int(micros) / 1e6 - (before + time.time()) / 2
    text = f"the server's is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} this machine's"
    if abs(off) > 2:
        yield Check("clock", "warning", f"{text}: jobs keep to the server's, but logs do not agree; run NTP on both")
    else:
        yield Check("clock", "ok", text)


# -- the fleet -----------------------------------------------------------------------------------------------------------------------------


def _library(p: _Patient) -> Iterator[Check]:
    if p.ledger.installed():
        yield Check("functions", "ok", "the server has this version's")
    elif p.client.function_list("lorayard"):
        yield Check(
            "functions", "wrong", "the server has another version's: bring all of the fleet to one version, and start a scheduler anew"
        )
    else:
        yield Check("functions", "warning", "not loaded yet: the first process of the fleet does that")


def _fleet(p: _Patient) -> Iterator[Check]:
    pool = p.settings.pool
    view = p.ledger.snapshot() if p.client.function_list("lorayard") else None
    seconds, micros = p.client.time()
    now = int(seconds) * 1000 + int(micros) // 1000
    queued = p.ledger.counts().get("queued", 0)
    leads = p.ledger.has_leader(now)
    yield Check(
        "scheduler", *(("ok", "one leads") if leads else ("wrong", "none leads, so nothing is run: start one with 'lorayard scheduler'"))
    )
    registry = WorkerRegistry(p.client)
    living = registry.alive(pool, now)
    alive = {w.name for w in living}
    silent = [w.name for w in registry.workers(pool) if now - w.seen_ms >= ALIVE_MS]
    if not alive:
        level: Level = "wrong" if queued else "warning"
        yield Check("workers", level, f"none is ready in pool {pool}, {queued} jobs wait: start one with 'lorayard worker llama'")
    else:
        yield Check("workers", "ok", f"{len(alive)} ready: {', '.join(sorted(alive)[:5])}{' …' if len(alive) > 5 else ''}")
    for worker in living:
        if worker.fallback:
            yield Check("workers", "warning", f"{worker.name} goes on {worker.fallback}; its log says how to have that from the start")
    if silent:
        yield Check("workers", "warning", f"silent for {ALIVE_MS // 1000} s and more: {', '.join(silent[:5])}; look at their logs")
    if paused := p.ledger.paused():
        yield Check("paused", "warning", f"{', '.join(paused)}: 'lorayard resume' lets them go on")
    if view is not None:
        yield _queue(p, queued, min(view.groups, key=lambda g: g.due, default=None), view.now)
    yield from _leases(p, now)


def _queue(p: _Patient, queued: int, first: Any, now: int) -> Check:
    """The most due job of all; those of paused groups are not among them."""
    if first is None or not first.jobs:
        return Check("queue", "ok", f"{queued} jobs queued")
    name = f"{keys.prefix(p.settings.pool)}queue:{first.digest}:{first.tenant}"
    ids: Any = p.client.zrange(name, 0, 0)
    (document,) = p.ledger.show(first.tenant, [ids[0].decode()]) if ids else (None,)
    age = (now - document["enqueued_ms"]) / 1000 if document else 0.0
    late = (now - first.due) / 1000
    text = f"{queued} jobs queued, the most due one for {age:,.0f} s"
    if late > 60:
        return Check("queue", "warning", f"{text} and {late:,.0f} s past its due time: add workers, or ask for less")
    return Check("queue", "ok", text)


def _leases(p: _Patient, now: int) -> Iterator[Check]:
    overdue: Any = p.client.zcount(keys.prefix(p.settings.pool) + "leases", "-inf", now - 5_000)
    text = "leases of batches ran out and nobody queued their jobs again: look at the scheduler's log"
    yield Check("leases", "wrong", f"{overdue} {text}") if overdue else Check("leases", "ok", "none overdue")


def _hosted(p: _Patient) -> Iterator[Check]:
    for finding in hosted_findings(p.settings, p.client):
        yield Check(*finding)


def _broker(p: _Patient) -> Iterator[Check]:
    url = embedded.broker_url(p.settings)
    try:
        with make_app(url) as app, app.connection_for_write(connect_timeout=_BROKER_S) as connection:
            connection.ensure_connection(max_retries=1, timeout=_BROKER_S)
    except Exception as error:  # whatever the broker's transport raises
        yield Check("broker", "wrong", f"{shown(url)} cannot be reached ({_line(error)}): start it, or correct LORAYARD_BROKER_URL")
    else:
        yield Check("broker", "ok", f"{shown(url)} answers")


# -- the ledger ----------------------------------------------------------------------------------------------------------------------------


def _ledger(p: _Patient) -> Iterator[Check]:
    """The invariants, by a full scan."""
    if not p.client.function_list("lorayard"):
        return
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for finding in audit(p.ledger, repair=p.repair):
        by_kind[finding.kind].append(finding)
    for findings in by_kind.values():
        first, repaired = findings[0], all(f.repaired for f in findings)
        others = f" (and {len(findings) - 1} more like it)" if len(findings) > 1 else ""
        todo = "; put right now" if repaired else "; 'lorayard doctor --repair' puts right what it can"
        yield Check("ledger", "warning" if repaired else "wrong", f"{first.text}{others}{todo}")
    if not by_kind:
        counts = p.ledger.counts()
        yield Check("ledger", "ok", f"all invariants hold, {counts.get('enqueued', 0)} jobs since it was made")


_LOOKS: tuple[Callable[[_Patient], Iterable[Check]], ...] = (
    _version,
    _role,
    _memory,
    _fragmentation,
    _append_only_file,
    _snapshots,
    _disk,
    _latency,
    _clients,
    _clock,
    _library,
    _fleet,
    _hosted,
    _broker,
    _ledger,
)


def command(
    as_json: AsJson = False,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what is wrong in the ledger, as far as that goes.")] = False,
) -> None:
    """Look at the store, the fleet and every job's record; exit code 1 if something is wrong."""
    checks = examine(Settings.load(), repair=repair)
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        table = Table("", "", "", show_header=False, box=None)
        for name, level, text in checks:
            table.add_row(name, Text(level, _COLOURS[level]), Text(text))
        Console().print(table)
    if any(check.level == "wrong" for check in checks):
        raise typer.Exit(1)
