"""The store and the way to it: killed, stalled, cut off, out of memory, out of disk, wiped of what is not the ledger's."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from fleet_support import until

from faults.net import Namespace, Proxy
from faults.report import Row
from faults.scale import fault
from faults.witness import Witness
from faults.yard import Yard, repeating
from lorayard.client import Client
from lorayard.errors import Unavailable

Fleet = Callable[..., tuple[Yard, Witness]]


def consumed(yard: Yard, since: float, ended: int, limit_s: float) -> float:
    """Seconds from `since` until more than `ended` jobs have succeeded."""
    until(lambda: _succeeded(yard) > ended, max(limit_s, 1) + 30)
    return time.monotonic() - since


def _succeeded(yard: Yard) -> int:
    try:
        return yard.counts().get("succeeded", 0)
    except Unavailable:
        return 0


@fault(quick=True)
def test_store_killed(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Redis killed and started again during submits"""
    yard, witness = fleet()
    with row.judging(yard, witness), repeating(0.1, lambda: witness.submit(witness.jobs(15, ms=(5, 30)))):
        for _ in range(2 if quick else 8):
            time.sleep(rng.uniform(1, 3))
            before = _succeeded(yard)
            yard.members["store"].again_s = rng.choice((0.1, 2.0))
            killed = yard.kill("store")
            row.injected["SIGKILL"] += 1
            time.sleep(0.5)
            row.recovered(consumed(yard, killed, before, 30), 30)


@fault(quick=False)
def test_store_stalled(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Redis stalled: SIGSTOP for 90 s"""
    yard, witness = fleet()
    with row.judging(yard, witness):
        witness.submit(witness.jobs(600, ms=(50, 200)))
        until(lambda: _succeeded(yard) > 20, 30)
        stopped = yard.send("store", signal.SIGSTOP)
        row.injected["SIGSTOP 90 s"] += 1
        refused = 0
        while time.monotonic() - stopped < 90:
            refused += not witness.submit(witness.jobs(2), tenant="default", patience_s=0)
        row.notes.append(f"{refused} submits answered 503 meanwhile, the slowest after {witness.longest_s:.1f} s")
        assert refused
        assert witness.longest_s < 30, "a submit is answered in bounded time"
        resumed = yard.send("store", signal.SIGCONT)
        before = until(lambda: _succeeded(yard), 10)
        row.recovered(consumed(yard, resumed, before, 30), 30)


@fault(quick=False)
def test_half_open(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Half-open connection: every packet between the only worker and the store is dropped, then passes again"""
    with _namespace(row) as space:
        hosts = ("--bind", f"127.0.0.1 {space.host}", "--protected-mode", "no") if space else ()
        yard, witness = fleet(workers=0, adapters=False, store_options=hosts)
        proxy = None if space else Proxy(yard.store_port)
        away = yard.url_through(space.host if space else None, proxy.port if proxy else None)
        yard.worker("worker-1", before=space.command if space else (), LORAYARD_REDIS_URL=away, LORAYARD_BROKER_URL=away)
        yard.ready({"worker-1"})
        yard.add_adapters()
        with row.judging(yard, witness):
            for cut_s, reset in ((8.0, False), (40.0, True)):
                witness.submit(witness.jobs(400, ms=(30, 80)))
                until(lambda: yard.outstanding("worker-1"), 20)
                with space.dropping() if space else _frozen(proxy):
                    row.injected[f"dropped {cut_s:g} s" + (", the server's ends closed" if reset else "")] += 1
                    time.sleep(cut_s)
                    if reset:  # the worker does not hear of it: its ends stay open
                        yard.store.client_kill_filter(_type="normal", skipme=True)
                        yard.store.client_kill_filter(_type="pubsub", skipme=True)
                    before = _succeeded(yard)
                row.recovered(consumed(yard, time.monotonic(), before, 60), 60)
                witness.wait()
        if proxy:
            proxy.close()


@contextmanager
def _namespace(row: Row) -> Iterator[Namespace | None]:
    space = Namespace()
    try:
        space.__enter__()
    except OSError as error:
        row.notes.append(f"no network namespace here ({error}); a proxy that stops forwarding stood in")
        yield None
        return
    try:
        yield space
    finally:
        space.__exit__()


@contextmanager
def _frozen(proxy: Proxy | None) -> Iterator[None]:
    assert proxy is not None
    proxy.frozen.set()
    try:
        yield
    finally:
        proxy.frozen.clear()


@fault(quick=True)
def test_connections_reset(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Connections reset: CLIENT KILL TYPE normal, 5 a second for 60 s"""
    yard, witness = fleet()
    witness.submit(witness.jobs(200))
    witness.wait()
    before = _open_files(yard), int(yard.store.info("clients")["connected_clients"])

    def reset() -> None:
        yard.store.client_kill_filter(_type="normal", skipme=True)
        row.injected["CLIENT KILL"] += 1

    with row.judging(yard, witness):
        began = time.monotonic()
        with repeating(0.2, reset):
            while time.monotonic() - began < (8 if quick else 60):
                witness.submit(witness.jobs(40, ms=(5, 30)))
                time.sleep(0.3)
        last = time.monotonic()
        row.recovered(witness.wait() - last, 30)
    after = _open_files(yard), int(yard.store.info("clients")["connected_clients"])
    row.notes.append(f"open files and the store's clients: {before} before, {after} after")
    assert all(then <= now + 12 for then, now in zip(after, before, strict=True)), "nothing leaks"


def _open_files(yard: Yard) -> int:
    return sum(len(list(Path(f"/proc/{member.pid}/fd").iterdir())) for member in yard.members.values())


@fault(quick=True)
def test_out_of_memory(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Redis out of memory: CONFIG SET maxmemory 1mb, then 0"""
    yard, witness = fleet()
    with row.judging(yard, witness):
        for _ in range(1 if quick else 3):
            backlog = witness.submit(witness.jobs(400, ms=(30, 80)))
            until(lambda backlog=backlog: len(witness.pending(backlog)) < 380, 20)  # type: ignore[misc]
            yard.store.config_set("maxmemory", "1mb")
            row.injected["maxmemory 1mb"] += 1
            running = _succeeded(yard)
            until(lambda: not witness.submit(witness.jobs(3), tenant="acme", patience_s=0), 10)
            time.sleep(5)
            stored = _succeeded(yard) - running
            row.notes.append(f"{stored} jobs that workers had already were stored while there was no memory")
            assert stored, "ends are stored in any case"
            before = _succeeded(yard)
            yard.store.config_set("maxmemory", 0)
            freed = time.monotonic()
            if witness.pending(backlog):
                row.recovered(consumed(yard, freed, before, 30), 30)
            witness.submit(witness.jobs(40))
            row.recovered(witness.wait() - freed, 60)
    assert witness.refused["ledger_full"], "refused with its reason"


@fault(quick=False)
@pytest.mark.parametrize("policy", ["always", "everysec"])
def test_disk_full(row: Row, rng: random.Random, fleet: Fleet, quick: bool, policy: str, tmp_path: Path) -> None:
    """Disk full: the store's folder on a small file system of its own"""
    row.fault += f" (fsync {policy})"
    disk = tmp_path / "disk"
    disk.mkdir()
    with _small_disk(row, disk):
        yard, witness = fleet(fsync=policy, store_options=("--dir", str(disk)))
        yard.members["store"].again_s = 1.0
        with row.judging(yard, witness, may_end="store"):
            witness.submit(witness.jobs(200))
            ballast = disk / "ballast"
            with ballast.open("wb") as file:
                file.write(bytes(max(0, shutil.disk_usage(disk).free - 600_000)))
            row.injected["disk full"] += 1
            until(lambda: not witness.submit(witness.jobs(50), tenant="default", patience_s=0), 60)
            time.sleep(3)
            assert not witness.submit(witness.jobs(5), tenant="default", patience_s=0)
            row.notes.append(
                f"fsync {policy}: {len(witness.acknowledged)} jobs acknowledged before the disk was full; the store's process "
                f"ended {sum(d.name == 'store' for d in yard.deaths)} times meanwhile"
            )
            if policy == "always":  # what was acknowledged is in the file; with everysec, a second of it may be in memory only
                yard.kill("store")
            ballast.unlink()
            freed = time.monotonic()
            witness.submit(witness.jobs(20))
            row.recovered(witness.wait() - freed, 30)


@contextmanager
def _small_disk(row: Row, folder: Path) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "lorayard", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        # The store still writes there until the fleet is gone: the name goes away now, the file system with its last file.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@fault(quick=True)
def test_functions_flushed(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """SCRIPT FLUSH and FUNCTION FLUSH in mid-run"""
    yard, witness = fleet()

    def flush() -> None:
        yard.store.script_flush()
        yard.store.function_flush()
        row.injected["flush"] += 1

    with row.judging(yard, witness), repeating(0.3, flush):
        for _ in range(10 if quick else 60):
            witness.submit(witness.jobs(30, ms=(5, 30)))
            time.sleep(0.2)
        witness.wait()
    assert not witness.refused, "no visible error"


@fault(quick=True)
def test_broker_wiped(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Broker database wiped: FLUSHDB on Celery's database"""
    yard, witness = fleet(broker_db=1)

    def wipe() -> None:
        with redis.Redis.from_url(yard.broker_url) as broker:
            broker.flushdb()
        row.injected["FLUSHDB"] += 1

    with row.judging(yard, witness):
        with repeating(0.7, wipe):
            for _ in range(8 if quick else 40):
                witness.submit(witness.jobs(50, ms=(5, 40)))
                time.sleep(0.4)
        wiped = time.monotonic()
        row.recovered(witness.wait() - wiped, 30)


MARKS: dict[str, bytes] = {"api": b"ly_enqueue", "worker-1": b"ly_", "scheduler-1": b"ly_claim"}


@fault(quick=True)
def test_reply_lost(row: Row, rng: random.Random, fleet: Fleet, quick: bool) -> None:
    """Reply lost after commit: a proxy cuts it, between client and API, and between each role and the store; who asked asks again"""
    yard, witness = fleet(workers=0, schedulers=0, adapters=False)
    proxies: dict[str, Proxy] = {}
    for name in MARKS:
        proxies[name] = Proxy(yard.store_port)
        own = {"LORAYARD_REDIS_URL": yard.url_through(None, proxies[name].port), "LORAYARD_BROKER_URL": yard.broker_url}
        if name == "api":
            yard.members[name].environment |= own
            yard.kill(name)
        elif name == "scheduler-1":
            yard.add(name, yard.role("scheduler"), own)
        else:
            yard.worker(name, **own)
    yard.ready({"worker-1"})
    yard.add_adapters()
    front = Proxy(yard.settings.api_port)
    try:
        with row.judging(yard, witness), yard.client(url=f"http://127.0.0.1:{front.port}") as client:
            _lost_between_client_and_api(row, witness, client, front, 3 if quick else 20)
            for _ in range(4 if quick else 40):
                for name, mark in MARKS.items():
                    proxies[name].cut_replies(1 if name == "scheduler-1" else 3, mark)
                witness.submit(witness.jobs(50, ms=(5, 20)))
                time.sleep(0.5)
            row.injected.update({f"cut to {name.partition('-')[0]}": proxy.cut for name, proxy in proxies.items()})
    finally:
        for proxy in (front, *proxies.values()):
            proxy.close()
    starts = [line.split(" ")[1] for line in yard.runs.read_text().splitlines() if line.startswith("start")]
    again = len(starts) - len(set(starts))
    row.notes.append(f"{again} of {len(starts)} executions were of a job that had been begun before")
    assert all(proxy.cut for proxy in proxies.values())


def _lost_between_client_and_api(row: Row, witness: Witness, client: Client, front: Proxy, times: int) -> None:
    for n in range(times):
        jobs = [job | {"idempotency_key": f"batch-{n}-{i}"} for i, job in enumerate(witness.jobs(50))]
        for job in jobs:
            del job["id"]
        front.cut_replies(1, b"POST /v1/jobs")
        with pytest.raises(Unavailable):
            client.submit(jobs)
        first = client.submit(jobs)
        again = client.submit(jobs)
        assert [answer["id"] for answer in first] == [answer["id"] for answer in again]
        witness.acknowledged |= {f"default/{answer['id']}": time.monotonic() for answer in first}
        row.injected["cut to client"] += 1
