"""Write constraints.txt: the exact version of everything that any extra brings, and of the tools pip fetches to build with.

    .venv/bin/python tools/pins.py              keep what is pinned, add and drop what pyproject.toml asks for
    .venv/bin/python tools/pins.py --upgrade    take the newest versions that go together (pins in KEEP excepted)

Nothing gets installed: pip resolves and reports. What torch pins by itself, and only on some platforms (CUDA), is left to it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import setup

KEEP = ["torch==2.13.0"]  # the version the shipped adapters were trained with
BUILD_TOOLS = ["hatchling", "editables", "scikit-build-core"]
LEFT_OUT = re.compile(r"(lorayard|pip|triton)$|nvidia-|cuda-")


def resolve(upgrade: bool) -> list[dict[str, dict[str, str]]]:
    with tempfile.TemporaryDirectory() as scratch:
        report, keep = Path(scratch, "report.json"), Path(scratch, "keep.txt")
        keep.write_text("\n".join(KEEP))
        pins = keep if upgrade else setup.CONSTRAINTS
        command = [*setup.pip(Path(sys.executable)), "install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        for folder in setup.wheels_folder().glob("llama_cpp_python-*/"):  # spares unpacking the source only to read its metadata
            command += ["--find-links", str(folder)]
        subprocess.run([*command, "-c", str(pins), "-e", f"{setup.ROOT}[dev,train,bench]", *BUILD_TOOLS], check=True)
        found: list[dict[str, dict[str, str]]] = json.loads(report.read_text())["install"]
    return found


def main() -> None:
    lines = set()
    for found in resolve("--upgrade" in sys.argv[1:]):
        name = re.sub(r"[-_.]+", "-", found["metadata"]["name"]).lower()
        if not LEFT_OUT.match(name):
            lines.add(f"{name}=={found['metadata']['version'].partition('+')[0]}")
    setup.CONSTRAINTS.write_text("# Written by tools/pins.py (make pins).\n" + "\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main()
