"""`lorayard up`: the whole fleet on one machine, under supervisord, which starts again what dies."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from lorayard.client import Client
from lorayard.errors import LorayardError, SetupError
from lorayard.settings import Settings

START_S = 900.0
STOP_S = 25
_PDEATHSIG = 1  # prctl(PR_SET_PDEATHSIG)
SUPERVISED = "LORAYARD_SUPERVISED"
_ROOM = 8  # so many times over the memory must hold a model of which two workers keep a copy each, beside their caches
_CPU_PARTS = ("base", "cpu", "blas")  # of ggml: any other of its libraries computes on something else


def end_with_parent(how: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel (Linux) to end this process when its parent ends, however that ends. Must be called from the main thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, how)


def usual_workers(settings: Settings) -> int:
    """How many llama workers are fastest on this machine: two, each with half of the cores.

    Threads wait for each other behind every node of a graph, and for whatever else runs on one of their cores: with half as many in a
    process they wait less. One where there is one core, where a GPU computes, where `threads` says how many cores to take, and where the
    model is too large to be held twice.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = settings.model.expanduser() if settings.model else None
    large = model is not None and model.is_file() and _ROOM * model.stat().st_size > memory
    return 1 if settings.threads or _cores() < 2 or large or (settings.n_gpu_layers and _has_gpu_backend()) else 2


def _has_gpu_backend() -> bool:
    """Whether llama.cpp was compiled for more than a CPU, by its libraries: nothing is loaded, for that may crash."""
    spec = importlib.util.find_spec("llama_cpp")
    found = (Path(spec.origin).parent / "lib").glob("*ggml-*") if spec and spec.origin else ()
    return any(not path.name.partition("ggml-")[2].startswith(_CPU_PARTS) for path in found)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Fleet:
    """The processes of one state folder. A context: started on entry, stopped at its end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = settings.state_dir.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._run_dir = tempfile.TemporaryDirectory(prefix="lorayard-")  # short: a socket's path may have 107 bytes
        self._lock: int | None = None
        self._llama_workers = settings.llama_workers or usual_workers(settings)

    def __enter__(self) -> Fleet:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- life ---------------------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._take_lock()
        for variable, host, port in (
            ("LORAYARD_API_PORT", self.settings.api_host, self.settings.api_port),
            ("LORAYARD_FLOWER_PORT", self.settings.flower_host, self.settings.flower_port),
        ):
            check_free(variable, host, port)
        (self.state / "logs").mkdir(parents=True, exist_ok=True)
        if self.settings.redis_url is None:
            from lorayard.embedded import prepare

            prepare(self.settings)
        else:
            self._check_store(self.settings.redis_url)
        config = Path(self._run_dir.name) / "supervisord.conf"
        config.write_text(self._config())
        command = [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "-c", str(config)]
        environment = os.environ | {SUPERVISED: "1", "LORAYARD_STATE_DIR": str(self.state), "PYTHONWARNINGS": "ignore"}
        # A session of its own: Ctrl-C reaches us alone, and we stop it in order.
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    @staticmethod
    def _check_store(url: str) -> None:
        """Tell at once of a store that no process could use."""
        from lorayard.embedded import check_server, wait_until_up
        from lorayard.ledger.connection import connect

        wait_until_up(url, 3)
        with connect(url) as client:
            check_server(client)

    def stop(self) -> None:
        """Stop all, in order: producers of work first, the store last. Waits until they are gone."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S * 3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._run_dir.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def wait_ready(self, timeout_s: float = START_S) -> Iterator[str]:
        """Yields what is being waited for, until jobs would be run. Raises `SetupError` with the reason when a process gives up."""
        give_up = time.monotonic() + timeout_s
        while True:
            self.check()
            try:
                with Client(settings=self.settings, timeout_s=5) as client:
                    ready = client.ready()
                if ready["workers"] and ready["scheduler"]:
                    return
                yield "the worker loads the model" if ready["scheduler"] else "the scheduler starts"
            except LorayardError:
                yield "the processes start"
            if time.monotonic() > give_up:
                raise SetupError(f"the fleet was not ready within {timeout_s:.0f} s; its logs are in {self.state / 'logs'}")
            time.sleep(0.2)

    def check(self) -> None:
        """Raises `SetupError` where a process has ended with exit code 2 (its settings are wrong) or the supervisor is gone."""
        if self._process is None or self._process.poll() is not None:
            raise SetupError(f"the supervisor ended; its log is {self.state / 'logs' / 'supervisord.log'}")
        for info in self.processes():
            # Any other exit code is started again at the supervisor's next tick.
            if info["statename"] == "FATAL" or (info["statename"] == "EXITED" and info["exitstatus"] == 2):
                raise SetupError(f"{info['name']} gave up: {self._last_words(info['name'])}")

    def processes(self) -> list[dict[str, Any]]:
        """What the supervisor says of each process: name, pid, statename; empty while it starts."""
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._run_dir.name}/supervisor.sock")
        try:
            with ServerProxy("http://127.0.0.1", transport=transport) as proxy:
                rows: Any = proxy.supervisor.getAllProcessInfo()
            return list(rows)
        except (OSError, Fault):
            return []
        finally:
            transport.close()

    def addresses(self) -> list[tuple[str, str]]:
        s = self.settings
        return [
            ("API", s.client_url),
            ("API key", "LORAYARD_API_KEY" if s.api_key else str(s.state_dir / "api_key")),
            ("Flower", f"http://{s.flower_host}:{s.flower_port}"),
            ("Redis and Celery broker", "LORAYARD_REDIS_URL" if s.redis_url else f"address in {s.state_dir / 'redis_url'}"),
            ("logs", str(s.state_dir / "logs")),
        ]

    # -- parts --------------------------------------------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.state / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(f"a fleet is already up in {self.state}: stop it, or set LORAYARD_STATE_DIR and the ports to others") from None

    def _config(self) -> str:
        """supervisord's configuration. Exit code 2 means wrong settings: starting again would not help."""
        programs = {"scheduler": "scheduler", "api": "api", "flower": "flower"}
        if self.settings.local_worker:
            programs |= dict.fromkeys(self._workers, "worker llama")
        if self.settings.hosted_model:
            programs["hosted"] = "worker groq"
        if self.settings.redis_url is None:
            programs = {"store": "store"} | programs
        run = self._run_dir.name
        user = "user=root" if os.geteuid() == 0 else ""
        parts = [
            f"[supervisord]\nnodaemon=true\npidfile={run}/supervisord.pid\nlogfile={_quoted(self.state / 'logs' / 'supervisord.log')}\n"
            f"childlogdir={run}\n{user}",
            f"[unix_http_server]\nfile={run}/supervisor.sock\nchmod=0700",
            "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        ]
        for priority, (name, arguments) in enumerate(programs.items()):
            how = "KILL" if name == "flower" else "TERM"  # Flower's threads outlive its own shutdown; it keeps nothing
            command = shlex.join([sys.executable, "-m", "lorayard", *arguments.split()]).replace("%", "%%")
            parts.append(
                f"[program:{name}]\ncommand={command}\npriority={priority}\nautorestart=unexpected\nexitcodes=2\nstartsecs=0\n"
                f"startretries=1000000\nstopsignal={how}\nstopwaitsecs={STOP_S}\nredirect_stderr=true\n"
                f"stdout_logfile={_quoted(self.state / 'logs' / (name + '.log'))}\nstdout_logfile_maxbytes=20MB\nstdout_logfile_backups=2"
                + self._environment(name)
            )
        return "\n\n".join(parts) + "\n"

    @property
    def _workers(self) -> list[str]:
        count = self._llama_workers
        return ["worker"] if count == 1 else [f"worker-{number}" for number in range(1, count + 1)]

    def _environment(self, program: str) -> str:
        """Two workers of one name would take each other for their own past; and several share the cores."""
        own: dict[str, object] = {}
        if program == "hosted" and self.settings.worker_name:
            own["LORAYARD_WORKER_NAME"] = f"{self.settings.worker_name}-hosted"
        elif program.startswith("worker-"):
            own["LORAYARD_WORKER_NAME"] = f"{self.settings.worker}-{program.removeprefix('worker-')}"
            own["LORAYARD_THREADS"] = self.settings.threads or max(1, _cores() // self._llama_workers)
        return "\nenvironment=" + ",".join(f"{name}={value}" for name, value in own.items()) if own else ""

    def _last_words(self, name: str) -> str:
        log = self.state / "logs" / f"{name}.log"
        with contextlib.suppress(OSError):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1].removeprefix("lorayard: ")
        return f"see {log}"


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%%")


def check_free(variable: str, host: str, port: int) -> None:
    """Raises `SetupError` where something listens already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(f"port {port} on {host} is not free ({error.strerror}): set {variable} to another") from None
