"""The doctor finds what is wrong with real servers that were set up wrongly, and says what to do; a healthy fleet hears no complaint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from benchmarks.ports import free_port
from benchmarks.sentinels import Server, Watched, server, until
from fleet_support import FleetProcess, chat

from lorayard.adapters.hosting import Publications
from lorayard.doctor import Check, examine
from lorayard.hosted import organisation
from lorayard.ledger.connection import connect
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.organisation import NANO, Want
from lorayard.ledger.policies import Policies, Policy
from lorayard.ledger.records import Entry
from lorayard.ledger.registry import HOSTED, WorkerInfo, WorkerRegistry, open_ledger
from lorayard.settings import Settings

GOOD = ("appendonly yes", "appendfsync always", "save ''", "maxmemory 200mb", "enable-debug-command local", "latency-monitor-threshold 100")


@pytest.fixture
def good(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "server", GOOD) as one:
        yield one


def settings_of(url: str, folder: Path, **more: Any) -> Settings:
    return Settings(redis_url=url, state_dir=folder, pool="d", **more)


def found(checks: list[Check], name: str) -> Check:
    """The worst of that name."""
    mine = [check for check in checks if check.name == name]
    assert mine, f"nothing about {name}: {checks}"
    return max(mine, key=lambda check: ("ok", "warning", "wrong").index(check.level))


def tells(checks: list[Check], name: str, level: str, *words: str) -> None:
    check = found(checks, name)
    assert check.level == level, check
    assert all(word in check.text for word in words), check


def entry(name: str) -> Entry:
    return Entry(name, "t", "base", 1000, 0, 0, 3, "test", "", "", b'{"model": "m"}', b"x" * 200)


@pytest.mark.parametrize(
    ("options", "name", "level", "words"),
    [
        (("maxmemory-policy allkeys-lru",), "eviction", "wrong", ["allkeys-lru", "throws jobs away", "noeviction"]),
        (("appendonly no",), "append-only file", "wrong", ["restart loses jobs", "appendonly yes"]),
        (("appendfsync everysec",), "append-only file", "warning", ["power cut", "second", "always"]),
        (("appendfsync no",), "append-only file", "wrong", ["half a minute"]),
        (("no-appendfsync-on-rewrite yes",), "append-only file", "warning", ["no-appendfsync-on-rewrite no"]),
        (("maxmemory 0",), "memory", "warning", ["no maxmemory", "kernel"]),
        (("min-replicas-to-write 1",), "role", "wrong", ["writes only with 1 replicas and has 0"]),
        (("maxclients 5",), "clients", "ok", ["of 5"]),
    ],
)
def test_a_setting_that_is_wrong(tmp_path: Path, options: tuple[str, ...], name: str, level: str, words: list[str]) -> None:
    with server(tmp_path / "server", (*GOOD, *options)) as one:
        tells(examine(settings_of(one.url, tmp_path)), name, level, *words)


def test_a_replica(good: Server, tmp_path: Path) -> None:
    with server(tmp_path / "replica", (*GOOD, f"replicaof 127.0.0.1 {good.port}")) as replica, good.client() as client:
        ledger = open_ledger(client, settings_of(good.url, tmp_path))
        ledger.enqueue([entry("a")], max_queued=10)
        with replica.client() as second:
            until(lambda: second.info("replication")["master_link_status"] == "up")
            until(lambda: client.wait(1, 100) == 1)
        tells(examine(settings_of(replica.url, tmp_path)), "role", "wrong", "read-only replica", str(good.port), "LORAYARD_REDIS_URL")
        tells(examine(settings_of(good.url, tmp_path)), "role", "ok", "1 replicas")


def test_a_server_that_is_full(good: Server, tmp_path: Path) -> None:
    with good.client() as client:
        client.config_set("maxmemory", "20mb")
        fill(client, 0.75)
        tells(examine(settings_of(good.url, tmp_path)), "memory", "warning", "85%", "maxmemory")
        fill(client, 0.9)
        tells(examine(settings_of(good.url, tmp_path)), "memory", "wrong", "new jobs are refused", "raise maxmemory")


def fill(client: redis.Redis, part: float) -> None:
    n = 0
    while (info := client.info("memory"))["used_memory"] < part * info["maxmemory"]:
        n += 1
        client.set(f"filler-{part}-{n}", b"x" * 100_000)


def test_a_server_that_stood_still(good: Server, tmp_path: Path) -> None:
    with good.client() as client:
        any_client: Any = client
        any_client.execute_command("DEBUG", "SLEEP", "0.4")
    tells(examine(settings_of(good.url, tmp_path)), "latency", "warning", "stood still", "command")


def test_nobody_there(tmp_path: Path) -> None:
    (check,) = examine(settings_of(f"redis://:secret@127.0.0.1:{free_port()}/0", tmp_path))
    assert (check.name, check.level) == ("server", "wrong")
    assert "LORAYARD_REDIS_URL" in check.text
    assert "secret" not in check.text


def test_a_broker_that_is_away(good: Server, tmp_path: Path) -> None:
    away = settings_of(good.url, tmp_path, broker_url=f"redis://127.0.0.1:{free_port()}/0")
    tells(examine(away), "broker", "wrong", "LORAYARD_BROKER_URL")
    tells(examine(settings_of(good.url, tmp_path)), "broker", "ok")


def test_through_sentinels(tmp_path: Path) -> None:
    with Watched(tmp_path / "w", sentinels=1, hasty=True) as watched:
        checks = examine(settings_of(watched.url, tmp_path))
    for name in ("server", "role", "append-only file", "broker", "disk"):
        tells(checks, name, "ok")
    assert "ss" not in found(checks, "server").text.split("?")[0]


def test_the_functions_of_another_version(good: Server, tmp_path: Path) -> None:
    settings = settings_of(good.url, tmp_path)
    with good.client() as client:
        tells(examine(settings), "functions", "warning", "not loaded")
        open_ledger(client, settings)
        tells(examine(settings), "functions", "ok")
        client.function_load("#!lua name=lorayard\nredis.register_function('ly_x', function() return 1 end)", replace=True)
        tells(examine(settings), "functions", "wrong", "another version")


class TestFleet:
    """A ledger with jobs; the fleet around it stands as each test says."""

    @pytest.fixture
    def settings(self, good: Server, tmp_path: Path) -> Settings:
        return settings_of(good.url, tmp_path)

    @pytest.fixture
    def ledger(self, settings: Settings) -> Iterator[Ledger]:
        assert settings.redis_url is not None
        with connect(settings.redis_url) as client:
            yield open_ledger(client, settings)

    def claim(self, ledger: Ledger, delivery_ms: int = 60_000) -> None:
        epoch = ledger.lead("test", 60_000)
        claimed = ledger.claim(epoch=epoch, worker="w", most=9, batch="b", digest="base", delivery_ms=delivery_ms, why="", takes=[("t", 2)])
        assert claimed[0] == "ok"

    def test_nobody_runs_the_jobs(self, ledger: Ledger, settings: Settings) -> None:
        tells(examine(settings), "workers", "warning", "lorayard worker llama")
        ledger.enqueue([entry("a")], max_queued=10)
        checks = examine(settings)
        tells(checks, "scheduler", "wrong", "none leads", "lorayard scheduler")
        tells(checks, "workers", "wrong", "1 jobs wait", "lorayard worker llama")
        tells(checks, "queue", "ok", "1 jobs queued")

    def test_a_worker_that_fell_silent(self, ledger: Ledger, settings: Settings) -> None:
        for name in ("well", "lost"):
            info = WorkerInfo(name=name, pool="d", kind="llama", incarnation="i", host="h", pid=1, ready=True)
            WorkerRegistry(ledger.client).beat(info)
        tells(examine(settings), "workers", "ok", "2 ready: lost, well")
        row: Any = ledger.client.hget("ly:{workers}:d", "lost")
        ledger.client.hset("ly:{workers}:d", "lost", json.dumps(json.loads(row) | {"seen_ms": info.seen_ms - 60_000}))
        tells(examine(settings), "workers", "warning", "silent", "lost")

    def test_a_worker_that_does_without_something(self, ledger: Ledger, settings: Settings) -> None:
        info = WorkerInfo(name="slow", pool="d", kind="llama", incarnation="i", host="h", pid=1, ready=True)
        WorkerRegistry(ledger.client).beat(info)
        assert all(check.level == "ok" for check in examine(settings) if check.name == "workers")
        info.fallback = "without flash attention, because llama.cpp did not survive its first decode (SIGSEGV)"
        WorkerRegistry(ledger.client).beat(info)
        tells(examine(settings), "workers", "warning", "slow", "without flash attention", "SIGSEGV", "log")

    def test_jobs_that_wait_for_too_long(self, ledger: Ledger, settings: Settings) -> None:
        ledger.enqueue([entry("late")], max_queued=10)
        ledger.client.zincrby("ly:{d}:queue:base:t", -120_000, "late")
        tells(examine(settings), "queue", "warning", "past its due time", "add workers")

    def test_what_is_paused(self, ledger: Ledger, settings: Settings) -> None:
        ledger.pause("tenant:t")
        tells(examine(settings), "paused", "warning", "tenant:t", "lorayard resume")

    def test_leases_that_nobody_reaps(self, ledger: Ledger, settings: Settings) -> None:
        ledger.enqueue([entry("a")], max_queued=10)
        self.claim(ledger)
        tells(examine(settings), "leases", "ok")
        ledger.client.zadd("ly:{d}:leases", {"b": 1}, xx=True)
        tells(examine(settings), "leases", "wrong", "scheduler's log")

    def test_a_hand_in_the_data(self, ledger: Ledger, settings: Settings) -> None:
        ledger.enqueue([entry(name) for name in ("a", "b", "c", "d")], max_queued=10)
        tells(examine(settings), "ledger", "ok", "all invariants hold")
        ledger.client.zrem("ly:{d}:queue:base:t", "a", "b")
        tells(examine(settings), "ledger", "wrong", "would never be run", "1 more", "lorayard doctor --repair")
        tells(examine(settings, repair=True), "ledger", "warning", "put right")
        tells(examine(settings), "ledger", "ok")
        assert ledger.client.zcard("ly:{d}:queue:base:t") == 4


@pytest.mark.fleet
def test_a_healthy_fleet_hears_no_complaint(tmp_path: Path, demo_gguf: Path) -> None:
    fleet = FleetProcess(tmp_path, demo_gguf, n_ctx=1024, width=2)
    try:
        fleet.start()
        fleet.ended(fleet.submit([chat("Say a word.")]))
        done = doctor(fleet.environment, "--json")
        checks = json.loads(done.stdout)
        assert done.returncode == 0, done
        assert [check for check in checks if check["level"] == "wrong"] == []
        assert {"server", "scheduler", "workers", "broker", "ledger", "functions"} <= {c["name"] for c in checks if c["level"] == "ok"}
        table = doctor(fleet.environment)
        assert table.returncode == 0
        assert "all invariants hold" in table.stdout
        with connect((fleet.state / "redis_url").read_text().strip()) as client:
            _break(client)
            assert doctor(fleet.environment).returncode == 1
    finally:
        fleet.close()


def _break(client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")


def doctor(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorayard", "doctor", *arguments]
    return subprocess.run(
        command, env=os.environ | environment | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=60, check=False
    )


def test_hosted_workers_adapters_and_limits_are_looked_at(store: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    settings = settings_of(redis_url, tmp_path)
    ledger = open_ledger(store, settings)
    ledger.enqueue([entry("a")._replace(digest="base@groq")], max_queued=9)
    tells(examine(settings), "hosted", "wrong", "LORAYARD_HOSTED_MODEL")
    settings = settings_of(redis_url, tmp_path, hosted_model="m", hosted_org="x")
    tells(examine(settings), "hosted", "wrong", "lorayard worker groq")
    publications = Publications(store, "x", "m")
    publications.tell(publications.ask("d" * 32, "t/tone"), state="refused", error="rank 12")
    organisation(settings, store).block("m", 60_000, "rate_limited")
    info = WorkerInfo(name="g", pool="d", kind=HOSTED, incarnation="i", host="h", pid=1, ready=True)
    WorkerRegistry(store).beat(info)
    checks = examine(settings)
    tells(checks, "hosted", "ok", "1 hosted")
    tells(checks, "hosted adapter", "warning", "t/tone", "rank 12")
    tells(checks, "hosted limits", "warning", "rate_limited")
    store.zadd("ly:{d}:submitted", {"b": 1})
    tells(examine(settings), "hosted batches", "warning", "five minutes")


def test_what_holds_hosted_work_back_is_said(store: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    prices: dict[str, Any] = {"hosted_model": "m", "hosted_org": "x", "hosted_prices": {"m": (1.0, 1.0)}}
    settings = settings_of(redis_url, tmp_path, **prices)
    ledger = open_ledger(store, settings)
    told: list[tuple[str, dict[str, float], list[str]]] = [
        ("g", {"breaker_open": 1.0}, []),
        ("h", {"limits_unanswered": 1.0}, []),
        ("i", {}, ["d" * 32]),
    ]
    for name, counters, doubted in told:
        info = WorkerInfo(
            name=name, pool="d", kind=HOSTED, incarnation="i", host="h", pid=1, ready=True, counters=counters, doubted=doubted
        )
        WorkerRegistry(store).beat(info)
    texts = {check.text for check in examine(settings) if check.name == "hosted calls"}
    assert {text.split(" failed at")[0] for text in texts} >= {"most of the last calls of g"}
    assert any(text.startswith("calls of dddddddddddd fail") for text in texts)
    tells(examine(settings), "hosted limits", "wrong", "h gets no answer", "see its log")
    assert not [check for check in examine(settings) if check.name in ("hosted money", "hosted batches")]

    policies, org = Policies(store), organisation(settings, store)
    policies.set("t", Policy(hosted=True, daily_usd=1.0))
    org.reserve("m", [Want("m", 1, "t", NANO)])
    tells(examine(settings), "hosted money", "warning", "t's money of the day is spent", "tenants set t --daily-usd")
    poor = settings_of(redis_url, tmp_path, **prices, hosted_monthly_usd=1.0)
    tells(examine(poor), "hosted money", "warning", "organisation's money of the month", "LORAYARD_HOSTED_MONTHLY_USD")

    ledger.enqueue([entry("a")._replace(digest="base@batch")], max_queued=9)
    epoch = ledger.lead("test", 60_000)
    ledger.claim(epoch=epoch, worker="g", most=9, batch="b", digest="base@batch", delivery_ms=9999, why="", takes=[("t", 2)])
    taken = ledger.take("b", "g", "i", 9999)
    assert taken is not None
    ledger.submit("b", taken.fence, b"{}")
    tells(examine(settings), "hosted batches", "ok", "1 jobs in 1 batches")
    assert ledger.tend("x", limit=1, hold_ms=1000)
    ledger.note("b", "x", b'{"why": "the service refuses the key"}', 1000)
    tells(examine(settings), "hosted batches", "warning", "1 get no further: the service refuses the key")
