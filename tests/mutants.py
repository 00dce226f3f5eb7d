"""Breakages on purpose, one at a time, and which test notices each: `python tests/mutants.py` (or `make mutants`) writes docs/mutants.md.

A mutant is one place of the code that is made wrong, in a copy of the packages that stands first on the path of a test run; the working
tree is not touched. The tests must pass with an unchanged copy and fail, in a test and not while they are set up, with each changed one.
A place that is no longer in the code, or is there twice, is an error.

What came of each mutant is kept in build/mutants.json as soon as it is known, so the whole can be run in parts, and the table is always of
all that have been run; of each kind it says on which day, and at which revision.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import redis
from ledger_support import serving
from mutations import MUTANTS, Mutant
from mutations_hosted import HOSTED_MUTANTS
from mutations_scheduler import SCHEDULER_MUTANTS

from lorayard.ledger.connection import connect

ROOT = Path(__file__).parent.parent
PACKAGES = ("shared/lorayard", "scheduler/lorayard_scheduler", "workers/lorayard_workers")
SUITES = {
    "ledger": ("tests/test_ledger.py", "tests/test_ledger_operations.py", "tests/test_ledger_model.py"),
    "coalesce": ("tests/test_coalesce.py", "tests/test_ledger_model.py"),
    "messages": ("tests/test_ledger.py", "tests/test_ledger_operations.py"),
    "control": ("tests/test_control_leases.py", "tests/test_control_outages.py"),
    "backlog": ("tests/test_backlog.py",),
    "recalls": ("tests/test_recall.py",),
    "planner": ("tests/test_planner.py",),
    "floods": ("tests/test_planner.py", "tests/test_simulator.py"),
    "quotes": ("tests/test_quotes.py",),
    "simulator": ("tests/test_simulator.py",),
    "schemas": ("tests/test_schemas.py",),
    "limits": ("tests/test_hosted_limits.py",),
    "hosted": ("tests/test_hosted_worker.py",),
    "gate": ("tests/test_hosted_gate.py",),
    "provisioning": ("tests/test_hosted_adapters.py", "tests/test_hosted_kills.py"),
    "batches": ("tests/test_hosted_batches.py", "tests/test_hosted_batch_money.py", "tests/test_hosted_kills.py"),
    "plans": ("tests/test_hosted_planner.py",),
    "loop": ("tests/test_ledger_loop.py",),
    "commands": ("tests/test_hosted_fleet.py",),
    "doctor": ("tests/test_doctor.py",),
}
"""What may notice a mutant of that kind; each file is run by itself until its first failure."""

ALL = [*MUTANTS, *SCHEDULER_MUTANTS, *HOSTED_MUTANTS]
KEPT = ROOT / "build" / "mutants.json"


class Caught(NamedTuple):
    """By which test of a file, and how long the run of the file took until then."""

    test: str
    seconds: float


class Outcome(NamedTuple):
    """What came of the files of tests that ran on a mutant, and when that was: the day, and the revision that was mutated."""

    mutant: Mutant
    by: dict[str, Caught | None]
    when: str


def mutate(text: str, mutant: Mutant) -> str:
    """The text with its one change. Raises `LookupError` where the place is not exactly one."""
    start, end = 0, len(text)
    if mutant.within:
        opening = re.search(
            rf"^(local function|    def|    async def|def) {re.escape(mutant.within)}\(.*?(?=^\S|^    def|^    async def|\Z)",
            text,
            re.DOTALL | re.MULTILINE,
        )
        if opening is None:
            raise LookupError(f"{mutant.name}: no function {mutant.within} in {mutant.file}")
        start, end = opening.span()
    if (found := text.count(mutant.old, start, end)) != 1:
        raise LookupError(f"{mutant.name}: {found} places in {mutant.within or mutant.file} read {mutant.old!r}, not one")
    at = text.index(mutant.old, start)
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


def source_of(mutant: Mutant) -> Path:
    """Its file in the working tree."""
    return next(ROOT / package for package in PACKAGES if package.endswith("/" + mutant.file.partition("/")[0])).parent / mutant.file


def copy_packages(folder: Path, mutant: Mutant | None) -> None:
    """The packages, one of them changed, so that `folder` can stand on the path."""
    for package in PACKAGES:
        name = Path(package).name
        shutil.copytree(ROOT / package, folder / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        if mutant and mutant.file.startswith(name + "/"):
            (folder / mutant.file).write_text(mutate(source_of(mutant).read_text(), mutant))


def run_tests(folder: Path, path: str, examples: int = 1000) -> Caught | None:
    """Run a file of tests on the packages in `folder`, to its first failure. Raises `RuntimeError` when it fails without a test failing."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(folder), "LORAYARD_MODEL_EXAMPLES": str(examples), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=hunt",
        f"--junitxml={report}",
        path,
    ]
    started = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    seconds = time.monotonic() - started
    if ended.returncode == 0:
        return None
    failed = [case for case in ET.parse(report).iter("testcase") if case.find("failure") is not None] if report.exists() else []
    if not failed:
        raise RuntimeError(f"{path} ended with {ended.returncode} and no test failed:\n{ended.stdout[-3000:]}{ended.stderr[-1000:]}")
    return Caught(str(failed[0].get("name")), round(seconds, 1))


def check_loads(client: redis.Redis, mutants: Iterable[Mutant]) -> None:
    """Every changed function library must load: what does not even compile proves nothing."""
    for mutant in mutants:
        text = mutate(source_of(mutant).read_text(), mutant)
        if mutant.file.endswith(".lua"):
            client.function_load(text, replace=True)


def hunt(
    mutants: Sequence[Mutant],
    tell: Callable[[Outcome], None],
    *,
    files: Sequence[str] | None = None,
    jobs: int = 1,
    first: bool = False,
) -> list[Outcome]:
    """Run the tests on each mutant, `jobs` at a time; `files` instead of those of its suite; of these, to the `first` that notices.

    Raises `RuntimeError` where the tests fail on what is not changed, or without a test failing; `LookupError` for a place that is gone.
    """
    with tempfile.TemporaryDirectory() as name:
        with serving(Path(name, "store")) as server, connect(server.url) as client:
            check_loads(client, mutants)
        folder = Path(name, "packages")
        copy_packages(folder, None)
        where = subprocess.run(
            [sys.executable, "-c", "import lorayard; print(lorayard.__file__)"],
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        )
        if not where.stdout.startswith(str(folder)):
            raise RuntimeError(f"the tests would not run on the copy but on {where.stdout}")
        for path in sorted({path for mutant in mutants for path in files or SUITES[mutant.suite]}):
            if failed := run_tests(folder, path, examples=20):
                raise RuntimeError(f"{failed.test} fails on unchanged code")
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(partial(_try, Path(name), tell, files, first), mutants))


def _try(folder: Path, tell: Callable[[Outcome], None], files: Sequence[str] | None, first: bool, mutant: Mutant) -> Outcome:
    outcome = Outcome(mutant, {}, _now())
    with tempfile.TemporaryDirectory(dir=folder) as name:
        copy_packages(Path(name), mutant)
        for path in files or SUITES[mutant.suite]:
            try:
                outcome.by[path] = run_tests(Path(name), path)
            except RuntimeError:  # on a machine with too much to do; of a mutant that cannot even be set up, it comes again
                outcome.by[path] = run_tests(Path(name), path)
            if first and outcome.by[path]:
                break
    tell(outcome)
    return outcome


def _now() -> str:
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return datetime.now(UTC).date().isoformat() + (f" at {revision}" if revision else "")


class Results:
    """Outcomes by mutant, kept in a file; of those only that are still on the list."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Outcome] = {}
        mutants = {(mutant.kind, mutant.name): mutant for mutant in ALL}
        for row in json.loads(file.read_text()) if file.exists() else []:
            if mutant := mutants.get((row["kind"], row["mutant"])):
                by = {path: caught and Caught(**caught) for path, caught in row["by"].items()}
                self._known[mutant.kind, mutant.name] = Outcome(mutant, by, row["when"])

    def __contains__(self, mutant: Mutant) -> bool:
        return (mutant.kind, mutant.name) in self._known

    def add(self, outcome: Outcome) -> None:
        with self._lock:
            self._known[outcome.mutant.kind, outcome.mutant.name] = outcome
            rows = [
                {"kind": o.mutant.kind, "mutant": o.mutant.name, "when": o.when, "by": {p: c and c._asdict() for p, c in o.by.items()}}
                for o in self.outcomes()
            ]
            self._file.parent.mkdir(exist_ok=True)
            self._file.write_text(json.dumps(rows, indent=1) + "\n")

    def outcomes(self) -> list[Outcome]:
        """In the order of the list."""
        return [self._known[mutant.kind, mutant.name] for mutant in ALL if mutant in self]


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """A table a kind, for docs/mutants.md."""
    caught = sum(any(outcome.by.values()) for outcome in outcomes)
    unknown = f"; {len(ALL) - len(outcomes)} more are on the list and not in these tables" if len(outcomes) < len(ALL) else ""
    lines = [
        "# Mutants",
        "",
        f"Written by `make mutants`: {len(outcomes)} breakages on purpose, one at a time; {caught} were noticed{unknown}.",
        "",
        "Each file of tests ran by itself, on a copy of the code with one place changed (`tests/mutations.py`), until its first failure;",
        "the seconds are those of its run, start included. A dash: it noticed nothing. Empty: it",
        "did not run, mostly as a file before it had noticed.",
        "",
    ]
    for kind in dict.fromkeys(outcome.mutant.kind for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.mutant.kind == kind]
        files = list(dict.fromkeys(path for row in rows for path in SUITES[row.mutant.suite]))
        lines += [
            f"## {kind.capitalize()}",
            f"Run on {' and '.join(sorted({row.when for row in rows}))}.",
            "",
            "| broken | " + " | ".join(f"`{Path(path).name}`" for path in files) + " |",
            "|---" * (len(files) + 1) + "|",
        ]
        lines += [f"| {row.mutant.name} | " + " | ".join(_cell(row, path) for path in files) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(outcome: Outcome, path: str) -> str:
    if path not in outcome.by:
        return ""
    caught = outcome.by[path]
    return f"`{caught.test.removeprefix('test_')}` {caught.seconds} s" if caught else "—"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", metavar="WORD", help="mutants whose name or kind has it")
    parser.add_argument("--rest", action="store_true", help="those only of which build/mutants.json knows nothing yet")
    parser.add_argument("--report", type=Path, metavar="PATH", help="where to write the table, of all that build/mutants.json knows")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time")
    parser.add_argument("--first", action="store_true", help="stop at the first file of tests that notices")
    options = parser.parse_args()
    results = Results(KEPT)
    chosen = [m for m in ALL if not options.only or options.only in m.name or options.only in m.kind]
    chosen = [m for m in chosen if not options.rest or m not in results]

    def tell(outcome: Outcome) -> None:
        shown = [f"{Path(path).stem}: {hit.test} {hit.seconds} s" for path, hit in outcome.by.items() if hit]
        print(
            f"{'caught' if shown else 'MISSED'}  {outcome.mutant.kind}: {outcome.mutant.name}  ({'; '.join(shown) or 'by nothing'})",
            flush=True,
        )
        results.add(outcome)

    outcomes = hunt(chosen, tell, jobs=options.jobs, first=options.first)
    if options.report:
        options.report.write_text(as_markdown(results.outcomes()))
    missed = [outcome.mutant.name for outcome in outcomes if not any(outcome.by.values())]
    print(f"{len(outcomes)} mutants, {len(missed)} missed")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
