"""Set up this checkout: `.venv` with Lorayard in it, and llama.cpp compiled once for this machine. Standard library only.

    python3 tools/setup.py [EXTRA ...]      the extras of pyproject.toml to have in .venv (default: dev)
    python3 tools/setup.py --wheel FOLDER   only put the llama-cpp-python wheel into FOLDER (deploy/Dockerfile does)

llama-cpp-python comes as source only, and pip's own cache does not know with which compiler flags a wheel was built. So the wheel is
kept in `$LORAYARD_WHEELS` (default: `~/.cache/lorayard/wheels`), in a folder named for everything that shaped it. `CC`, `CXX`, `CFLAGS`,
`CXXFLAGS`, `LDFLAGS` and `CMAKE_*` (`CMAKE_ARGS="-DGGML_CUDA=ON"`) are passed on and are part of that name.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two set-ups at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "lorayard-setup.json"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, NEWEST = (3, 11), (3, 13)

# Only libllama and ggml are used here. Leaving out the multimodal library and llama.cpp's `common` makes 83 build steps out of 193.
# llama-cpp-python forces `common` on in CMake's cache; only an ordinary variable of the same name wins over that.
CMAKE_OPTIONS = ["-DLLAVA_BUILD=OFF"]
CMAKE_INCLUDE = "set(LLAMA_BUILD_COMMON OFF)\n"
# A hypervisor may show AMX to a guest that must not use it: a native build then dies with SIGILL at its first decode.
NO_AMX = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]
COMPILE_CORE_MINUTES = 4
INSTALL_COMPILER = "apt install build-essential (Debian, Ubuntu), dnf install gcc-c++ (Fedora), xcode-select --install (macOS)"
BUILD_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "MACOSX_DEPLOYMENT_TARGET")


class SetupFailed(Exception):
    """Its message is all the user needs to read."""


def say(text: str) -> None:
    print(f"lorayard: {text}", flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_python(version: tuple[int, ...], implementation: str) -> None:
    if implementation != "cpython" or not OLDEST <= version[:2] <= NEWEST:
        found = f"{implementation} {'.'.join(map(str, version[:3]))} at {sys.executable}"
        raise SetupFailed(f"needs CPython 3.11, 3.12 or 3.13, and this is {found}; choose one with make PYTHON=/path/to/python3.12")


@contextlib.contextmanager
def locked(folder: Path):  # type: ignore[no-untyped-def]
    """Hold `folder` against a second set-up; the lock ends with the process, so nothing stale is ever left."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another set-up is at work in {folder}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Logged:
    """A long command: its output goes to a log, its progress to the terminal (one living line) or to a pipe (a line every tenth)."""

    STEP = re.compile(r"^\s*\[\s*(?:(\d+)/(\d+)|(\d+)%)\]")  # ninja's [3/83], make's [ 4%]

    def __init__(self, label: str, log: Path) -> None:
        self.label, self.log = label, log
        self.percent: int | None = None
        self.tty = sys.stdout.isatty()

    def run(self, command: list[str], env: dict[str, str]) -> None:
        """Raises `SetupFailed` with the end of the log. A signal to this process ends the command's whole process group."""
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            shown = 0
            while process.poll() is None:
                shown = self._show(time.monotonic() - started, shown)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            if self.tty:
                print("\r\033[K", end="", flush=True)
        reader.join()
        if process.returncode:
            raise SetupFailed(self._failure(process.returncode))
        say(f"{self.label}: done in {clock(time.monotonic() - started)}")

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout, self.log.open("ab") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                step = self.STEP.match(line.decode(errors="replace"))
                if step:
                    done, total, percent = step.groups()
                    self.percent = int(percent) if percent else 100 * int(done) // int(total)

    def _show(self, elapsed: float, shown: int) -> int:
        if self.tty:
            percent = "" if self.percent is None else f" {self.percent} %"
            print(f"\r\033[Klorayard: {self.label}:{percent} {clock(elapsed)}", end="", flush=True)
        elif self.percent is not None and self.percent // 10 > shown:
            shown = self.percent // 10
            say(f"{self.label}: {shown * 10} %, {clock(elapsed)}")
        return shown

    def _failure(self, code: int) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if re.search(r"\berror\b|FAILED|No space left|Killed|No module named", line, re.I)]
        tail = "\n".join("    " + line.strip()[:220] for line in (told or lines)[-12:])
        hint = ""
        if any("No space left" in line for line in lines):
            hint = " (the disk is full)"
        elif any("Killed signal" in line or line.strip() == "Killed" for line in lines):
            hint = " (out of memory? try CMAKE_BUILD_PARALLEL_LEVEL=1)"
        return f"{self.label} failed with exit code {code}{hint}:\n{tail}\n  whole log: {self.log}"


# The llama-cpp-python wheel


def build_variables() -> dict[str, str]:
    """What of the environment shapes the build (how many compilers run at once does not)."""
    names = [name for name in os.environ if name in BUILD_VARIABLES or name.startswith(("CMAKE_", "SKBUILD_"))]
    return {name: os.environ[name] for name in sorted(names) if name != "CMAKE_BUILD_PARALLEL_LEVEL"}


def compiler(language: str) -> list[str]:
    """The command CMake would choose for "c" or "c++", proved by compiling a line that needs the standard library. Raises `SetupFailed`."""
    variable, names = {"c": ("CC", ["cc", "gcc", "clang"]), "c++": ("CXX", ["c++", "g++", "clang++"])}[language]
    chosen = os.environ.get(variable)
    command = shlex.split(chosen) if chosen else next(([name] for name in names if shutil.which(name)), [])
    header = {"c": "#include <stdlib.h>\n", "c++": "#include <vector>\n"}[language]
    if not command or compile_text(command, ["-x", language, "-fsyntax-only"], header) is None:
        what = f"{chosen!r} ({variable}) does not work" if chosen else f"no working {language.upper()} compiler was found"
        raise SetupFailed(f"{what}: llama.cpp has to be compiled here; {INSTALL_COMPILER}")
    return command


def compile_text(command: list[str], options: list[str], text: str) -> str | None:
    try:
        done = subprocess.run([*command, *options, "-"], input=text, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def cpu_flags() -> str:
    """The features of this machine's processor, as the system tells them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor() or platform.machine()


class WheelRecipe:
    """All that decides what comes out of the compiler, and where its wheel is kept."""

    def __init__(self) -> None:
        pin = re.search(r"^llama[-_]cpp[-_]python==(\S+)", CONSTRAINTS.read_text(), re.M)
        if pin is None:
            raise SetupFailed(f"{CONSTRAINTS} does not pin llama_cpp_python")
        self.version = pin.group(1)
        self.variables = build_variables()

        self.c, self.cxx = compiler("c"), compiler("c++")
        self.flags = self._flags()
        self.native = not re.search(r"GGML_NATIVE(:\w+)?=(OFF|0|FALSE|NO)\b", self.variables.get("CMAKE_ARGS", ""), re.I)

    def _flags(self) -> list[str]:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return NO_AMX if x86 and compile_text(self.c, [*NO_AMX, "-x", "c", "-fsyntax-only"], "") is not None else []

    def _target(self) -> str:
        """What the compiler makes of this processor: its own macros, which carry its version as well."""
        for option in (["-march=native"], ["-mcpu=native"]) if self.native else ([],):
            macros = compile_text(self.c, [*self.flags, *option, "-x", "c", "-dM", "-E"], "")
            if macros is not None:
                return "\n".join(sorted(macros.splitlines()))
        return cpu_flags()

    def folder(self) -> Path:
        libc = " ".join(platform.libc_ver())
        parts = [self.version, sysconfig.get_platform(), libc, self._target(), json.dumps(self.variables)]
        parts += [*self.c, *self.cxx, *self.flags, *CMAKE_OPTIONS, CMAKE_INCLUDE]
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        return wheels_folder() / f"llama_cpp_python-{self.version}-{sysconfig.get_platform()}-{digest}"

    def environment(self, scratch: Path) -> dict[str, str]:
        include = scratch / "lorayard.cmake"
        include.write_text(CMAKE_INCLUDE)
        options = [*CMAKE_OPTIONS, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={include}"]
        env = pip_environment()
        env["CMAKE_ARGS"] = f"{shlex.join(options)} {env.get('CMAKE_ARGS', '')}".strip()
        for name in ("CFLAGS", "CXXFLAGS"):
            env[name] = f"{' '.join(self.flags)} {env.get(name, '')}".strip()  # ours first: what the user says wins
        env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(cores()))
        env["TMPDIR"] = str(scratch)  # the build tree goes with the scratch folder, however the build ends
        return env


def wheels_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("LORAYARD_WHEELS") or cache / "lorayard" / "wheels").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def llama_wheel(python: Path) -> Path:
    """The wheel for this machine, compiled by `python`'s pip unless it is there already. Raises `SetupFailed`."""
    recipe = WheelRecipe()
    kept = recipe.folder()
    with locked(wheels_folder()):
        for left_over in wheels_folder().glob(".building-*"):  # of a set-up that was killed: nobody else is at work here now
            shutil.rmtree(left_over, ignore_errors=True)
        if not list(kept.glob("*.whl")):
            compile_wheel(python, recipe, kept)
    return next(kept.glob("*.whl"))


def compile_wheel(python: Path, recipe: WheelRecipe, kept: Path) -> None:
    log = kept.with_name(kept.name + ".log")
    minutes = max(1, round(COMPILE_CORE_MINUTES / cores()))
    say(f"compiling llama.cpp takes about {minutes} min on {cores()} cores, once for this machine; log: {log}")
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=kept.parent))
    try:
        log.unlink(missing_ok=True)
        wheel = scratch / "wheel"
        command = [*pip(python), "wheel", "-v", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python", "--wheel-dir", str(wheel)]
        Logged("compiling llama.cpp", log).run([*command, f"llama-cpp-python=={recipe.version}"], recipe.environment(scratch))
        shutil.rmtree(kept, ignore_errors=True)
        wheel.rename(kept)  # all or nothing
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# The virtual environment


def pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]


def pip_environment() -> dict[str, str]:
    """Pins the tools that pip fetches to build with, too (two names: pip changed it)."""
    pins = str(CONSTRAINTS)
    return {**os.environ, "PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins, "PYTHONUNBUFFERED": "1"}


def wanted_digest() -> str:
    """Changes when something does that asks for another environment; the rest of pyproject.toml (linters, tests) does not."""
    import tomllib  # not in the Pythons that are only told that they are too old

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [json.dumps([project["project"], project["build-system"]]), CONSTRAINTS.read_text(), Path(__file__).read_text()]
    parts += [str(ROOT), cpu_flags(), json.dumps(build_variables())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp() -> dict[str, object]:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and stamp.get("root") == str(ROOT) else {}


def venv_python() -> Path:
    """`.venv`'s interpreter; makes `.venv` when there is none, or none that runs (moved, or its Python is gone)."""
    python = VENV / "bin" / "python"
    moved = STAMP.exists() and not read_stamp()
    probe = f"import pip, sys; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    try:
        usable = not moved and subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError:
        usable = False
    if not usable:
        say(f"making .venv with Python {platform.python_version()} ({sys.executable})")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, check=False)
        if made.returncode:
            name = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            told = (made.stdout + made.stderr).strip()
            raise SetupFailed(f"making .venv failed; on Debian and Ubuntu, apt install {name}\n{told}")
    return python


def set_up(extras: set[str]) -> None:
    """Have `.venv` hold Lorayard with `extras`, and those it had before. Does nothing, fast, when it does."""
    digest = wanted_digest()
    stamp = read_stamp()
    have = {str(extra) for extra in stamp.get("extras", [])} if isinstance(stamp.get("extras"), list) else set()  # type: ignore[attr-defined]
    if stamp.get("digest") == digest and extras <= have and (VENV / "bin" / "python").exists():
        return
    started = time.monotonic()
    python = venv_python()
    wheel = llama_wheel(python)
    extras |= have
    log = VENV / "lorayard-setup.log"
    log.unlink(missing_ok=True)
    STAMP.unlink(missing_ok=True)
    env = pip_environment()
    if stamp.get("wheel") != wheel.parent.name:
        Logged("installing llama.cpp", log).run([*pip(python), "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)], env)
    listed = ",".join(sorted(extras))
    Logged(f"installing packages ({listed})", log).run([*pip(python), "install", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{listed}]"], env)
    STAMP.write_text(json.dumps({"digest": digest, "extras": sorted(extras), "wheel": wheel.parent.name, "root": str(ROOT)}))
    say(f"set up in {clock(time.monotonic() - started)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up Lorayard in this checkout.")
    parser.add_argument("extras", nargs="*", default=["dev"], metavar="EXTRA")
    parser.add_argument("--wheel", type=Path, metavar="FOLDER", help="only build the llama-cpp-python wheel and copy it into FOLDER")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended and the scratch folder removed
    try:
        check_python(tuple(sys.version_info[:3]), sys.implementation.name)
        if options.wheel:
            options.wheel.mkdir(parents=True, exist_ok=True)
            shutil.copy2(llama_wheel(Path(sys.executable)), options.wheel)
        else:
            with locked(ROOT):
                set_up(set(options.extras))
    except SetupFailed as failure:
        print(f"lorayard: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lorayard: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
