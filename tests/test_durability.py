"""What survives a power cut and the loss of the primary, on real servers; and that a server which keeps less is refused or told of."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
from benchmarks.ports import free_port
from benchmarks.sentinels import PASSWORD, Server, Watched, server, until
from fleet_support import FleetProcess, chat

from lorayard import embedded
from lorayard.celery_app import RUN_BATCH, make_app, worker_queue
from lorayard.errors import SetupError, Unavailable
from lorayard.ledger.audit import audit
from lorayard.ledger.connection import connect, sentinel_address, shown
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import End, Entry
from lorayard.settings import Settings

KEEPS = ("appendonly yes", "save ''", "maxmemory-policy noeviction", "enable-debug-command local")
ALWAYS = (*KEEPS, "appendfsync always")


def ledger_of(client: redis.Redis) -> Ledger:
    ledger = Ledger(client, "d", result_ttl_s=3600)
    ledger.install()
    return ledger


def entry(name: str) -> Entry:
    return Entry(name, "t", "base", 1000, 0, 0, 3, "test", f"key-{name}", "hash", b'{"model": "m"}', b"x" * 200)


def enqueue(ledger: Ledger, *names: str) -> None:
    assert {e.status for e in ledger.enqueue([entry(name) for name in names], max_queued=1_000_000)} == {"queued"}


def missing(ledger: Ledger, names: list[str]) -> list[str]:
    return [name for name, document in zip(names, ledger.show("t", names), strict=True) if document is None]


# -- power cuts: what is left is what was fsynced ------------------------------------------------------------------------------------------


def journal(folder: Path) -> Path:
    """The append-only file that grows."""
    (path,) = (folder / "appendonlydir").glob("*.incr.aof")
    return path


@contextlib.contextmanager
def after_power_cut(folder: Path, size: int, copy: Path) -> Iterator[redis.Redis]:
    """A server started on what was on disk when the growing file had `size` bytes."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "appendonlydir", copy / "appendonlydir")
    os.truncate(journal(copy), size)
    with server(copy, KEEPS) as one, one.client() as client:
        yield client


class Producers:
    """Threads that enqueue one job a call; `acknowledged` has each with the time of its answer."""

    def __init__(self, ledger: Ledger, threads: int = 3) -> None:
        self.acknowledged: list[tuple[str, float]] = []
        self._ledger = ledger
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(threads)]

    def __enter__(self) -> Producers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, me: int) -> None:
        made = 0
        while not self._stop.is_set():
            made += 1
            with contextlib.suppress(Unavailable):
                enqueue(self._ledger, f"{me}-{made}")
                self.acknowledged.append((f"{me}-{made}", time.time()))


def test_what_is_acknowledged_is_in_the_file_by_then(tmp_path: Path) -> None:
    with server(tmp_path / "a", ALWAYS) as one, one.client() as client:
        sizes = []
        with Producers(ledger_of(client)) as producers:
            for _ in range(5):
                time.sleep(0.2)
                names = [name for name, _ in producers.acknowledged]  # first these, then the size: never the other way round
                sizes.append((names, journal(tmp_path / "a").stat().st_size))
    for names, size in sizes:
        assert names
        with after_power_cut(tmp_path / "a", size, tmp_path / "b") as client:
            assert missing(ledger_of(client), names) == []


def can_trace() -> bool:
    try:
        return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False


def fsynced(trace: str, cut: float) -> tuple[int, float]:
    """Bytes of the growing file that an fsync covers which had returned, out of what strace saw; and seconds that the longest took."""
    written = covered = 0
    longest = 0.0
    pending: dict[str, tuple[int, float]] = {}  # a thread's fsync under way: what had been written when it began, and when that was
    for line in trace.splitlines():
        row = re.match(r"(\d+) +([\d.]+) (.*?)(?: <([\d.]+)>)?$", line)
        assert row is not None, line
        thread, at, call, took = row[1], float(row[2]), row[3], float(row[4] or 0)
        if match := re.match(r"write\(\d+<[^>]*\.incr\.aof>.* = (\d+)$", call):
            written += int(match[1])
        elif match := re.match(r"fdatasync\(\d+<[^>]*\.incr\.aof>(.*)", call):
            if match[1].endswith("= 0"):
                covered, longest = written, max(longest, took)
            else:
                pending[thread] = written, at
        elif re.match(r"<\.\.\. fdatasync resumed>.* = 0$", call) and thread in pending:
            covered, longest = max(covered, pending.pop(thread)[0]), max(longest, took)
    return covered, max([longest, *(cut - at for _, at in pending.values())])


@pytest.mark.skipif(not can_trace(), reason="needs strace, and leave to trace a process")
@pytest.mark.parametrize(("policy", "most_s"), [("always", 0.0), ("everysec", 2.0)])
def test_a_power_cut_loses_no_more_than_the_policy_says(tmp_path: Path, policy: str, most_s: float, record_property: Any) -> None:
    trace = tmp_path / "trace"
    # Of each call the thread, when it began, the file's name, and how long it took; data cut to nothing, so that a line is a call.
    wrapper = ("strace", "-f", "-ttt", "-T", "-y", "-s", "0", "-o", str(trace), "-e", "trace=write,fdatasync,fsync")
    with server(tmp_path / "a", (*KEEPS, f"appendfsync {policy}"), wrapper=wrapper) as one, one.client() as client:
        with Producers(ledger_of(client)) as producers:
            time.sleep(3.7)
            until(lambda: len(producers.acknowledged) > 100, 60)
            one.kill()
            cut = time.time()
        acknowledged = dict(producers.acknowledged)
    size, longest_s = fsynced(trace.read_text(errors="replace"), cut)
    with after_power_cut(tmp_path / "a", size, tmp_path / "b") as client:
        lost = missing(ledger_of(client), list(acknowledged))
    lost_s = max((cut - acknowledged[name] for name in lost), default=0.0)
    record_property("lost", f"{len(lost)} of {len(acknowledged)}, {lost_s:.2f} s")
    print(
        f"{policy}: lost {len(lost)} of {len(acknowledged)} acknowledged jobs, the last {lost_s:.2f} s of them; an fsync {longest_s:.2f} s"
    )
    assert len(acknowledged) > 100
    assert lost_s <= (most_s and most_s + longest_s), "what a slow disk adds is no more than it took itself"
    assert len(lost) < len(acknowledged)


def test_a_torn_file_holds_each_transition_whole_or_not_at_all(tmp_path: Path) -> None:
    states: list[tuple[int, str]] = []
    with server(tmp_path / "a", ALWAYS) as one, one.client() as client:
        ledger = ledger_of(client)
        for step in (lambda: None, *_one_life(ledger)):
            step()
            states.append((journal(tmp_path / "a").stat().st_size, digest(client)))
    assert len(set(states)) == len(states), "every transition writes"
    for (start, before), (end, after) in itertools.pairwise(states):
        for cut in {start, start + 1, start + 30, (start + end) // 2, end - 25, end - 1} & set(range(start, end)):
            with after_power_cut(tmp_path / "a", cut, tmp_path / "b") as client:
                found = digest(client)
            # The very last byte is a line's end, which a reader of the file can do without.
            assert found == before or (found == after and cut == end - 1), f"cut at {cut} of {start}..{end}"


def digest(client: Any) -> str:
    """Of all keys and values there are."""
    return str(client.execute_command("DEBUG", "DIGEST"))


def _one_life(ledger: Ledger) -> list[Callable[[], object]]:
    """Transitions that each write several keys."""
    taken: list[Any] = []

    def claim() -> None:
        claimed = ledger.claim(epoch=1, worker="w", most=2, batch="b1", digest="base", delivery_ms=60_000, why="", takes=[("t", 4)])
        assert claimed[0] == "ok"

    return [
        lambda: enqueue(ledger, *(f"j{i}" for i in range(6))),
        lambda: ledger.lead("test", 60_000),
        claim,
        lambda: taken.append(ledger.take("b1", "w", "i", 60_000)),
        lambda: ledger.start("b1", taken[0].fence, ["t/j0", "t/j1", "t/j2"]),
        lambda: ledger.finish(
            "b1", taken[0].fence, [End("t/j0", "succeeded", b"{}", 5), End("t/j1", "retry", b"{}", 0, 1000), End("t/j2", "failed", b"{}")]
        ),
        lambda: ledger.give_back("b1", taken[0].fence, ["t/j3"]),
        lambda: ledger.cancel("t", ["j4", "j5"]),
    ]


# -- backups -------------------------------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_running_servers_folder_is_a_backup(tmp_path: Path) -> None:
    with server(tmp_path / "a", ALWAYS) as one, one.client() as client:
        ledger = ledger_of(client)
        enqueue(ledger, "done", "held", "waits")
        _claim(ledger, 2)
        with Producers(ledger) as producers:
            time.sleep(0.3)
            client.config_set("auto-aof-rewrite-percentage", 0)
            until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
            names = [name for name, _ in producers.acknowledged]
            shutil.copytree(tmp_path / "a" / "appendonlydir", tmp_path / "b" / "appendonlydir")
            client.config_set("auto-aof-rewrite-percentage", 100)
            time.sleep(0.3)
        ledger.finish("b1", 1, [End("t/done", "succeeded")])
    with server(tmp_path / "b", KEEPS) as one, one.client() as client:
        _restored(ledger_of(client), names)


def test_a_snapshot_is_a_backup(tmp_path: Path) -> None:
    with server(tmp_path / "a", ALWAYS) as one, one.client() as client:
        ledger = ledger_of(client)
        enqueue(ledger, "done", "held", "waits")
        _claim(ledger, 2)
        client.bgsave()
        until(lambda: not client.info("persistence")["rdb_bgsave_in_progress"])
        (tmp_path / "b").mkdir()
        shutil.copy(tmp_path / "a" / "dump.rdb", tmp_path / "b")
        ledger.finish("b1", 1, [End("t/done", "succeeded")])
    # With an append-only file to come, a server would not look at the snapshot.
    with server(tmp_path / "b", ("appendonly no", "save ''")) as one, one.client() as client:
        client.config_set("appendonly", "yes")
        until(lambda: not client.info("persistence")["aof_rewrite_in_progress"] and journal(tmp_path / "b").exists())
        _restored(ledger_of(client), [])
        one.kill()
    with server(tmp_path / "b", KEEPS) as one, one.client() as client:
        assert missing(ledger_of(client), ["done", "held", "waits"]) == []


def _claim(ledger: Ledger, jobs: int) -> None:
    assert ledger.lead("test", 60_000) == 1
    claimed = ledger.claim(epoch=1, worker="w", most=2, batch="b1", digest="base", delivery_ms=200, why="", takes=[("t", jobs)])
    assert claimed == ("ok", jobs)


def _restored(ledger: Ledger, names: list[str]) -> None:
    """All that the backup knew of is there; what was at a worker, and what has ended since, is run again."""
    assert missing(ledger, [*names, "done", "held", "waits"]) == []
    until(lambda: ledger.reap().undelivered)
    assert {document["status"] for document in ledger.show("t", ["done", "held", "waits"]) if document} == {"queued"}
    assert audit(ledger) == []


# -- addresses -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://host", "redis://"),
        ("unix:///socket", "redis://"),
        ("redis://host:99999/0", "Port"),
        ("redis://host/0?sevrice=x", "'sevrice' is no option"),
        ("sentinel://host:26379/0", "service=NAME"),
        ("sentinel://host:1;sentinel://other:2/0?service=x", "commas"),
        ("sentinel://host:port/0?service=x", "'port'"),
        ("sentinel:///0?service=x", "no HOST:PORT"),
        ("sentinel://host/zero?service=x", "number of a database"),
        ("sentinel://host/0?service=x&replicas=all", "number of replicas"),
        ("sentinel://host/0?service=x&master=y", "'master' is no option"),
    ],
)
def test_an_address_that_is_none_is_told_in_one_line(url: str, reason: str) -> None:
    with pytest.raises(SetupError) as caught:
        connect(url)
    assert reason in caught.value.message
    assert "LORAYARD_REDIS_URL" in caught.value.message
    assert "\n" not in caught.value.message


def test_an_address_has_passwords_of_both_and_shows_none() -> None:
    url = "sentinel://me:p%40ss@[::1]:5,host/3?service=yard&sentinel_username=s&sentinel_password=w%26t&replicas=1"
    address = sentinel_address(url)
    assert address[:3] == ([("::1", 5), ("host", 26379)], "yard", 3)
    assert (address.login, address.sentinel_login, address.replicas) == (
        {"username": "me", "password": "p@ss"},
        {"username": "s", "password": "w&t"},
        1,
    )
    assert shown(url) == "[::1]:5,host/3?service=yard&sentinel_username=s&replicas=1"
    app = make_app(url)
    assert app.conf.broker_url == "sentinel://me:p%40ss@[::1]:5/3;sentinel://me:p%40ss@host:26379/3"
    assert app.conf.broker_transport_options["master_name"] == "yard"
    with pytest.raises(SetupError, match="LORAYARD_BROKER_URL"):
        make_app("sentinel://host")


# -- another primary -----------------------------------------------------------------------------------------------------------------------


def test_a_server_that_became_a_replica_is_left(tmp_path: Path) -> None:
    with server(tmp_path / "a", ALWAYS) as one, server(tmp_path / "b", ALWAYS) as other, connect(one.url) as client:
        ledger = ledger_of(client)
        enqueue(ledger, "a")
        with one.client() as admin, other.client() as second:
            admin.replicaof("127.0.0.1", other.port)
            until(lambda: second.info("replication")["connected_slaves"] == 1)
            with pytest.raises(Unavailable):
                enqueue(ledger, "b")
            assert all(not c.is_connected for c in client.connection_pool._available_connections), "it would never hear of the new one"
            with pytest.raises(SetupError, match=f"replica of 127.0.0.1:{other.port}"):
                embedded.check_server(client)
            admin.replicaof("NO", "ONE")
            enqueue(ledger, "b")


WORKER = f"""
import sys
from lorayard.celery_app import make_app, worker_queue
from lorayard.ledger.audit import audit
from lorayard.ledger.connection import connect
app, client = make_app(sys.argv[1]), connect(sys.argv[1])
@app.task(name="{RUN_BATCH}", ignore_result=True)
def run_batch(batch):
    client.sadd("seen", batch)
app.Worker(hostname="w@h", queues=[worker_queue("w")], pool="threads", concurrency=2, loglevel="ERROR", quiet=True, without_gossip=True,
           without_mingle=True).start()
"""


@contextlib.contextmanager
def celery_worker(url: str) -> Iterator[None]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen([sys.executable, "-c", WORKER, url], env=environment, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.filterwarnings("ignore:.*deprecated setex.*:DeprecationWarning")  # Celery's own
def test_ledger_and_celery_go_on_with_the_new_primary(tmp_path: Path) -> None:
    with Watched(tmp_path, hasty=True) as watched, celery_worker(watched.url), connect(watched.url) as client, make_app(watched.url) as app:
        embedded.wait_until_up(watched.url)
        embedded.check_server(client)
        ledger = ledger_of(client)

        def ran(batch: str) -> bool:
            app.send_task(RUN_BATCH, args=[batch], queue=worker_queue("w"), ignore_result=True, retry=False)
            return bool(until(lambda: client.sismember("seen", batch), 20))

        assert ran("one")
        names = [f"before-{i}" for i in range(50)]
        enqueue(ledger, *names)
        with watched.servers[0].client(PASSWORD) as first:
            assert first.wait(1, 5000) == 1
        app.backend.store_result("before", {"n": 1}, "SUCCESS")

        watched.servers[0].kill()
        with pytest.raises(Unavailable):
            enqueue(ledger, "during")
        until(lambda: _accepted(ledger, "after"))
        assert missing(ledger, [*names, "after"]) == []
        assert ledger.counts()["enqueued"] == 51
        assert app.backend.get_result("before") == {"n": 1}
        assert ran("two")

        # The old one comes back as a replica, and the next fail-over goes to it.
        old, new = watched.servers
        old.start()
        until(lambda: watched.role(old) == "slave", 60)
        with new.client(PASSWORD) as primary:
            until(lambda: primary.wait(1, 100) == 1, 60)
            until(lambda: all(_sees_replica(s) for s in watched.sentinels), 60)
        new.kill()
        until(lambda: _accepted(ledger, "third"), 60)
        assert missing(ledger, [*names, "after", "third"]) == []
        assert audit(ledger) == []


@pytest.mark.fleet
def test_a_fleet_goes_on_with_the_new_primary(tmp_path: Path, demo_gguf: Path) -> None:
    with Watched(tmp_path / "watched", hasty=True) as watched:
        fleet = FleetProcess(tmp_path, demo_gguf, redis_url=watched.url, n_ctx=2048, width=4, lease_ms=3000, delivery_ms=3000)
        try:
            fleet.start()
            ids = fleet.submit([chat(f"Say a word that begins with {letter}.") for letter in "abcdefghijklmnop"])
            with watched.servers[0].client(PASSWORD) as first:
                until(lambda: int(first.hget("ly:{main}:counts", "succeeded") or 0) >= 2)
                assert first.wait(1, 5000) == 1
            watched.servers[0].kill()
            assert {document["status"] for document in fleet.ended(ids)} == {"succeeded"}
            fleet.ended(fleet.submit([chat("Say another word.")]))
            fleet.assert_settled()
        finally:
            fleet.close()


def _accepted(ledger: Ledger, name: str) -> bool:
    try:
        enqueue(ledger, name)
    except Unavailable:
        return False
    return True


def _sees_replica(sentinel: Server) -> bool:
    with sentinel.client("watch&tell") as client:
        (state,) = client.sentinel_masters().values()
        (replica,) = client.sentinel_slaves("yard")
    return bool(state["is_master"] and not replica["is_disconnected"] and not replica["is_sdown"] and replica["master-link-status"] == "ok")


def test_with_replicas_nothing_is_acknowledged_that_one_server_alone_has(tmp_path: Path) -> None:
    with Watched(tmp_path, sentinels=1, hasty=True) as watched:
        with connect(watched.url + "&replicas=1", timeout_s=2) as client:
            ledger = ledger_of(client)
            enqueue(ledger, "both")
            watched.servers[1].signal(signal.SIGSTOP)
            with pytest.raises(Unavailable):
                enqueue(ledger, "one")
            watched.servers[1].signal(signal.SIGCONT)
            until(lambda: _again(ledger, "one"))
        with connect(watched.url.replace("watch", "wrong")) as client, pytest.raises(redis.ConnectionError, match="password is wrong"):
            client.ping()


def _again(ledger: Ledger, name: str) -> bool:
    try:
        return ledger.enqueue([entry(name)], max_queued=10)[0].status == "exists"
    except Unavailable:
        return False


# -- what a server must be -----------------------------------------------------------------------------------------------------------------


def test_the_embedded_server_keeps_all_and_has_a_limit(tmp_path: Path) -> None:
    with embedded.running(Settings(state_dir=tmp_path / "a")) as url, connect(url) as client:
        found = embedded.server_settings(client)
        assert (found["appendonly"], found["appendfsync"], found["maxmemory-policy"]) == ("yes", "always", "noeviction")
        assert int(found["maxmemory"]) == embedded.machine_memory() // 2
        assert embedded.doubts(found) == []
        embedded.check_server(client)
    with embedded.running(Settings(state_dir=tmp_path / "b", maxmemory_mb=64)) as url, connect(url) as client:
        assert embedded.server_settings(client)["maxmemory"] == str(64 * 1024 * 1024)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("appendonly no", "maxmemory 100mb"), ["append-only", "appendonly yes"]),
        ((*KEEPS, "appendfsync everysec", "maxmemory 100mb"), ["everysec", "power cut", "always"]),
        ((*KEEPS, "appendfsync no", "maxmemory 100mb"), ["half a minute"]),
        (ALWAYS, ["no maxmemory"]),
    ],
)
def test_a_server_that_may_lose_jobs_is_told_of(tmp_path: Path, options: tuple[str, ...], words: list[str]) -> None:
    with server(tmp_path, options) as one, one.client() as client, structlog.testing.capture_logs() as logs:
        embedded.check_server(client)
    (warning,) = logs
    assert warning["log_level"] == "warning"
    assert all(word in warning["event"] for word in words), warning


def test_waiting_for_sentinels_ends_with_their_address_and_no_password() -> None:
    with pytest.raises(SetupError) as caught:
        embedded.wait_until_up(f"sentinel://:secret1@127.0.0.1:{free_port()}/0?service=yard&sentinel_password=secret2", 0.2)
    assert "yard" in caught.value.message
    assert "secret" not in caught.value.message
