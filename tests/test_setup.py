"""Set-up: what decides on a recompile, what the user is told, and that every dependency is pinned."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lorayard_setup", ROOT / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAYARD_WHEELS", str(tmp_path / "wheels"))
    for name in ("CMAKE_ARGS", "CFLAGS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "wheels"


def test_the_wheel_is_kept_by_flags_and_not_by_how_fast_it_was_built(
    setup_script: ModuleType, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = setup_script.WheelRecipe().folder()
    assert plain.parent == wheels
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "1")
    assert setup_script.WheelRecipe().folder() == plain
    others = {plain}
    for name, value in (("CFLAGS", "-O1"), ("CMAKE_ARGS", "-DGGML_NATIVE=OFF"), ("CMAKE_ARGS", "-DGGML_CUDA=ON")):
        monkeypatch.setenv(name, value)
        others.add(setup_script.WheelRecipe().folder())
    assert len(others) == 4


def test_a_users_flags_come_after_ours(setup_script: ModuleType, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DLLAVA_BUILD=ON")
    monkeypatch.setenv("CFLAGS", "-mamx-tile")
    env = setup_script.WheelRecipe().environment(tmp_path)
    assert re.search(r"-DLLAVA_BUILD=OFF .*-DLLAVA_BUILD=ON$", env["CMAKE_ARGS"])
    assert env["CFLAGS"].endswith("-mamx-tile")


def test_a_failed_compilation_shows_why_and_leaves_nothing_half_done(setup_script: ModuleType, wheels: Path, tmp_path: Path) -> None:
    failing_python = tmp_path / "python"
    failing_python.write_text("#!/bin/sh\necho '[8/9] c++ -c x.cpp'; echo 'x.cpp:1: error: no'; echo bye; touch $TMPDIR/half; exit 3\n")
    failing_python.chmod(0o755)
    recipe = setup_script.WheelRecipe()
    kept = recipe.folder()
    with pytest.raises(setup_script.SetupFailed, match=r"(?s)failed with exit code 3:\n.*x\.cpp:1: error: no\n.*whole log: .*\.log"):
        setup_script.compile_wheel(failing_python, recipe, kept)
    assert [path.name for path in wheels.iterdir()] == [f"{kept.name}.log"]


def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "setup.py", "--wheel", tmp_path / "out"],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"lorayard: no working C compiler was found.*apt install build-essential.*\n", done.stderr)
    assert not list((tmp_path / "out").glob("*.whl"))


@pytest.mark.parametrize("found", [(3, 10, 9), (3, 14, 0)])
def test_another_python_is_refused_in_one_line(setup_script: ModuleType, found: tuple[int, int, int]) -> None:
    with pytest.raises(setup_script.SetupFailed, match=r"^needs CPython 3\.11.*cpython 3\.1\d"):
        setup_script.check_python(found, "cpython")
    setup_script.check_python((3, 12, 1), "cpython")


def test_everything_that_any_extra_asks_for_is_pinned_and_fits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    wanted = [Requirement(text) for group in (project["dependencies"], *project["optional-dependencies"].values()) for text in group]
    for requirement in wanted:
        if requirement.name != "lorayard":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
    assert version("llama_cpp_python") == pins["llama-cpp-python"]
