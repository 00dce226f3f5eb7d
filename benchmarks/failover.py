"""What a Sentinel's fail-over loses of what was acknowledged, and how long nothing can be enqueued.

Producers enqueue single jobs through `Ledger` at full speed, on a primary with two replicas under three Sentinels (down-after 500 ms, all
servers with appendfsync always). At a random moment one of these happens, and the new primary is asked for each acknowledged job:

kill       The primary's process is killed. What it had handed to the kernel still reaches its replicas.
host N ms  Its whole machine is lost, N ms of wire away from the replicas: what was on the wire is lost with it.
revive     It stands still until another is primary, and then goes on: whoever was connected to it still is, and it takes jobs until a
           Sentinel has told it.
"""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.ports import free_port
from benchmarks.sentinels import PASSWORD, Server, Watched, until
from lorayard.errors import Unavailable
from lorayard.ledger.connection import connect
from lorayard.ledger.ledger import Ledger
from lorayard.ledger.records import Entry

MODES: dict[str, tuple[tuple[str, ...], str]] = {
    "as it is": ((), ""),
    "min-replicas-to-write 1": (("min-replicas-to-write 1", "min-replicas-max-lag 2"), ""),
    "replicas=1": ((), "&replicas=1"),
}
"""What is compared: lines of the servers' configuration, and what is added to the address."""

EVENTS: dict[str, float] = {"kill": 0, "host 1 ms": 1, "host 10 ms": 10, "revive": 0}
"""What happens to the primary, and how long the wire to its replicas is, in milliseconds one way; 0: none."""

PRODUCERS = 4
PAYLOAD = b'{"text": "%b"}' % (b"x" * 490)


class Round(NamedTuple):
    """`lost` jobs were acknowledged and are gone, `lost_ms` from the first of them to the last (of a kill: to the kill)."""

    acknowledged: int
    per_s: float
    lost: int
    lost_ms: float
    again_s: float


class Producers:
    """Threads that enqueue and note when each job was acknowledged."""

    def __init__(self, ledger: Ledger) -> None:
        self.acknowledged: list[tuple[str, float]] = []
        self._ledger = ledger
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(PRODUCERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, me: int) -> None:
        made = 0
        while not self._stop.is_set():
            made += 1
            name = f"{me}-{made}"
            entry = Entry(name, "t", "base", 1000, 0, 0, 3, "bench", "", "", b"{}", PAYLOAD)
            try:
                self._ledger.enqueue([entry], max_queued=10_000_000)
            except Unavailable:
                time.sleep(0.01)
            else:
                self.acknowledged.append((name, time.monotonic()))


def one_round(mode: str, event: str, folder: Path, rng: random.Random) -> Round:
    options, query = MODES[mode]
    with Watched(folder, replicas=2, options=options) as watched, connect(watched.url + query) as client:
        ledger = Ledger(client, "bench", result_ttl_s=3600)
        ledger.install()
        producers = Producers(ledger)
        producers.start()
        try:
            old = watched.servers[0]
            with _wire(watched, EVENTS[event]) as wire:
                began, count = time.monotonic(), len(producers.acknowledged)
                time.sleep(rng.uniform(0.5, 1.5))
                at = time.monotonic()
                per_s = (len(producers.acknowledged) - count) / (at - began)
                if wire is not None:
                    wire.kill()
                _revive(watched, old) if event == "revive" else _kill(watched, old)
            after = time.monotonic()
            until(lambda: producers.acknowledged[-1][1] > after)
            time.sleep(0.5)
        finally:
            producers.stop()
        with connect(watched.url) as asked:
            kept = _kept(Ledger(asked, "bench", result_ttl_s=3600), [name for name, _ in producers.acknowledged])
    lost = [when for name, when in producers.acknowledged if name not in kept]
    # What was on its way when the primary fell may be read a moment later.
    again = min(when for name, when in producers.acknowledged if name in kept and when > at + 0.05) - at
    end = max(lost, default=0) if event == "revive" else at
    lost_ms = max(0.0, 1000 * (end - min(lost))) if lost else 0.0
    return Round(len(producers.acknowledged), per_s, len(lost), lost_ms, again)


@contextlib.contextmanager
def _wire(watched: Watched, delay_ms: float) -> Iterator[subprocess.Popen[bytes] | None]:
    """Put a wire between the primary and its replicas. Sentinels do not like it and would take it away, after eight seconds."""
    if not delay_ms:
        yield None
        return
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.relay", str(port), str(watched.servers[0].port), str(delay_ms)]
    with subprocess.Popen(command) as process:
        try:
            time.sleep(0.5)
            for replica in watched.servers[1:]:
                with replica.client(PASSWORD) as client:
                    client.replicaof("127.0.0.1", port)
            watched.wait_replicas()
            yield process
        finally:
            process.kill()


def _kill(watched: Watched, old: Server) -> None:
    old.kill()
    until(lambda: watched.primary() is not old)


def _revive(watched: Watched, old: Server) -> None:
    old.signal(signal.SIGSTOP)
    until(lambda: watched.primary() is not old)
    old.signal(signal.SIGCONT)
    with old.client(PASSWORD) as client:
        until(lambda: client.info("replication")["role"] == "slave", 60)


def _kept(ledger: Ledger, names: list[str]) -> set[str]:
    found: set[str] = set()
    for start in range(0, len(names), 1000):
        part = names[start : start + 1000]
        found |= {name for name, document in zip(part, ledger.show("t", part), strict=True) if document is not None}
    return found


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--event", action="append", choices=EVENTS, help="only this; may be repeated")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    rng = random.Random(options.seed)
    out = Console(width=120)
    table = Table("event", "", "acked", "per s", "rounds losing", "lost", "worst", "ms", "again s", "worst")
    metrics: dict[str, Any] = {"seed": options.seed, "rounds": rounds, "producers": PRODUCERS, "fsync": "always", "replicas": 2}
    for event in options.event or EVENTS:
        for mode in MODES:
            done: list[Round] = []
            with out.status(f"{event}, {mode} …"):
                for _ in range(rounds):
                    with tempfile.TemporaryDirectory() as folder:
                        done.append(one_round(mode, event, Path(folder), rng))
            figures = _figures(done)
            metrics[f"{event}, {mode}"] = figures | {"each": [r._asdict() for r in done]}
            table.add_row(event, mode, *(f"{value:,.1f}".removesuffix(".0") for value in figures.values()))
            report.write(options.json, "failover", metrics)
    out.print(table)
    out.print(f"seed {options.seed}")


def _figures(rounds: list[Round]) -> dict[str, float]:
    return {
        "acknowledged": sum(r.acknowledged for r in rounds),
        "per_s": round(statistics.median(r.per_s for r in rounds)),
        "rounds_with_loss": sum(r.lost > 0 for r in rounds),
        "lost": sum(r.lost for r in rounds),
        "lost_worst": max(r.lost for r in rounds),
        "lost_ms_worst": round(max(r.lost_ms for r in rounds), 1),
        "again_s_median": round(statistics.median(r.again_s for r in rounds), 2),
        "again_s_worst": round(max(r.again_s for r in rounds), 2),
    }


if __name__ == "__main__":
    main()
