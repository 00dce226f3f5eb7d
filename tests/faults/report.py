"""What each row did and what came of it, as JSON and as the table of docs/faults.md.

python -m faults.report build/faults.json > docs/faults.md     (with PYTHONPATH=tests)
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.invariants import SEVEN, check
from faults.witness import Witness
from faults.yard import Yard

ELSEWHERE = (
    ("power loss", "`tests/test_durability.py`: the append-only file cut at the last fsynced byte, both policies"),
    ("model child, worker, scheduler, API or store killed; a hang; poison; a zombie worker, with the real model", "`tests/test_faults.py`"),
)


@dataclass
class Row:
    """One row of the report. Times are seconds."""

    fault: str
    test: str
    seed: int
    quick: bool
    outcome: str = ""  # passed, failed, skipped
    jobs: int = 0
    seconds: float = 0.0
    injected: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)
    limit_s: float | None = None  # what the pass criterion gives it
    ends: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)  # stale, leases_lapsed, ...
    looks: int = 0  # samples of who holds a lease
    notes: list[str] = field(default_factory=list)
    invariants: dict[str, str] = field(default_factory=dict)

    def recovered(self, seconds: float, limit_s: float) -> None:
        """A recovery that took so long, where the criterion allows `limit_s`; in the suite, on whatever machine, some more."""
        self.recovery_s.append(round(seconds, 2))
        self.limit_s = limit_s
        assert seconds <= limit_s * (4 if self.quick else 1), f"took {seconds:.1f} s, and {limit_s:.1f} s are allowed"

    @contextmanager
    def judging(self, yard: Yard, witness: Witness, *, timeout_s: float = 120.0, may_end: str = "") -> Iterator[None]:
        """Watch meanwhile; at the end wait until all jobs have ended, and hold the seven. `may_end`: who may end by itself."""
        with witness.watching():
            yield
            witness.wait(timeout_s=timeout_s)
        self._hold(yard, witness)
        crashes = [death for death in yard.crashes() if death.name != may_end]
        assert not crashes, f"processes ended by themselves: {crashes}"

    def _hold(self, yard: Yard, witness: Witness) -> None:
        wrong = check(yard, witness)
        self._add(yard, witness)
        self.invariants = {name: self.invariants.get(name) or wrong[name] for name in SEVEN}
        broken = {name: words for name, words in wrong.items() if words}
        assert not broken, broken

    def _add(self, yard: Yard, witness: Witness) -> None:
        self.jobs += len(witness.acknowledged)
        self.ends.update(document["status"] for document in witness.documents.values())
        self.attempts.update(document["attempts"] for document in witness.documents.values())
        counts = yard.counts()
        names = ("stale", "leases_lapsed", "deliveries_lapsed", "requeued", "retried", "dead")
        self.counted.update({name: counts.get(name, 0) for name in names if counts.get(name)})
        self.looks += witness.looks


def write(rows: Sequence[Row], path: Path) -> None:
    """PATH.json and PATH.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    document = {
        "name": "faults",
        "machine": {"cores": cores, "processor": platform.processor() or platform.machine(), "system": platform.release()},
        "rows": [dict(vars(row)) for row in rows],
        "jobs": sum(row.jobs for row in rows),
        "failed": [row.test for row in rows if row.outcome != "passed"],
    }
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(document))


def markdown(document: dict[str, Any]) -> str:
    rows, machine = document["rows"], document["machine"]
    held = sum(not any(row["invariants"].values()) and bool(row["invariants"]) for row in rows)
    lines = [
        "# Faults",
        "",
        "Written by one run of `make faults`: a real fleet (store, API, scheduler, workers; the model's child process plays a script",
        "instead of computing) is hit as the row says. Afterwards the seven invariants must hold, by a full scan of the store:",
        "; ".join(f"*{name}*" for name in SEVEN) + ".",
        "",
        f"{document['jobs']:,} jobs in {len(rows)} rows; the invariants held after {held}.",
        f"{machine['cores']} cores, Linux {machine['system']}. `LORAYARD_TEST_SEED=SEED make faults ARGS='-k TEST'` repeats its choices;",
        "when exactly a process is hit depends on the machine, too.",
        "",
        "| fault | caused by | jobs | ends | attempts | recovered, s (limit) | refused as stale | seed | outcome |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rows]
    lines += ["", "| fault | tested in |", "|---|---|", *(f"| {fault} | {where} |" for fault, where in ELSEWHERE)]
    notes = [f"- {row['fault'].partition(':')[0]}: {note}" for row in rows for note in row["notes"]]
    return "\n".join([*lines, *(["", "## Seen", *notes] if notes else [])]) + "\n"


def _line(row: dict[str, Any]) -> str:
    def listed(counter: dict[str, int]) -> str:
        return ", ".join(f"{name}: {count:,}" for name, count in sorted(counter.items(), key=lambda pair: str(pair[0])))

    times = row["recovery_s"]
    took = (f"{times[0]}" if len(times) == 1 else f"{min(times)} to {max(times)}, {len(times)} times") if times else ""
    took += f" ({row['limit_s']:g})" if row["limit_s"] else ""
    cells = (
        row["fault"],
        listed(row["injected"]),
        f"{row['jobs']:,}",
        listed(row["ends"]),
        listed(row["attempts"]),
        took,
        str(row["counted"].get("stale", 0)),
        str(row["seed"]),
        row["outcome"],
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())))
