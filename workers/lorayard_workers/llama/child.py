"""The child process that holds the model, as its control process sees it: what they tell each other, and how one is started that works.

They share a socket pair; a frame is one message in JSON, as the requests in it are already. First the control sends a `Hello`, then `Work`
and `Cancel`; the child answers with `Starting` while it loads, then `Ready` (or `Unusable`), then with the other events.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import msgspec
import structlog

from lorayard.errors import SetupError
from lorayard.settings import Settings
from lorayard_workers.llama.fallbacks import ways
from lorayard_workers.runner import Cancel, Event, Ready, Work

_CLOSE_S = 5.0
START_S = 30.0
"""A starting child may be silent for so long, where LORAYARD_HANG_S is less: it imports libraries first, perhaps from a cold disk."""
SPINS = 2000  # looks of a ggml thread at a barrier before it sleeps, some 100 µs: neither none nor endless (docs/decisions.md)

log = structlog.get_logger("lorayard.llama")


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    settings: str  # JSON of Settings
    model: str
    names: list[str]  # base names that adapters may carry


class Starting(msgspec.Struct, frozen=True, tag="starting"):
    """Sign of life until `Ready`, about once a second. `gpu`: llama.cpp has one to compute on."""

    gpu: bool


class Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """The child cannot serve. A new one could not either, unless it is for its `settings` that it computes nonsense."""

    message: str
    by_settings: bool = False


class Reading(msgspec.Struct, frozen=True, tag="reading"):
    """The child looks at this job's request now; empty: at none. A job that crashes the tokenizer must not count as one that waited."""

    ref: str


class Expect(msgspec.Struct, frozen=True, tag="expect"):
    """Adapters that are planned for the pool, the next first: a hint."""

    digests: list[str]


to_child: msgspec.json.Decoder[Hello | Work | Cancel | Expect] = msgspec.json.Decoder(Hello | Work | Cancel | Expect)
_from_child: msgspec.json.Decoder[Event | Reading | Starting | Unusable] = msgspec.json.Decoder(Event | Reading | Starting | Unusable)
encode = msgspec.json.Encoder().encode


class Child:
    """One child process, `python -m MODULE serve FD`, and its end of the socket."""

    def __init__(self, module: str, hello: Hello) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "serve", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"GOMP_SPINCOUNT": str(SPINS), **os.environ},
            )
        self._connection = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="to-llama-child", daemon=True)
        self._sender.start()
        self.send(hello)

    def send(self, message: Hello | Work | Cancel | Expect) -> None:
        """Returns at once: a child that hangs reads nothing, and who waited for it could not kill it any more."""
        self._outbox.put(encode(message))

    def _send(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(frame)
            except OSError:  # a child that is gone hears nothing; that it is gone shows when its messages end
                return

    def says(self, within_s: float) -> bool:
        """Whether there is a message, or there will be no more, before so long."""
        return self._connection.poll(within_s)

    def receive(self) -> Event | Reading | Starting | Unusable | None:
        """The next message; None when there will be no more."""
        try:
            return _from_child.decode(self._connection.recv_bytes())
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
        self._connection.close()
        return status


class _Stillborn(NamedTuple):
    """Why a child did not become ready; whether that may be for its settings; whether it had a GPU."""

    reason: str
    by_settings: bool
    gpu: bool


class Launcher:
    """Starts children. `met` is told of each at once, so that it can be killed while it starts.

    The first child is the probe, and the engine where it survives. Where it does not, others are tried with less (`fallbacks.py`), and all
    later ones do as the first that was ready. One of those that dies at its start does not do so for its settings: it may come again.
    """

    def __init__(self, module: str, hello: Hello, settings: Settings, met: Callable[[Child], None]) -> None:
        self._module, self._hello, self._met = module, hello, met
        self._silence_s = max(settings.hang_s, START_S)
        self._settings = settings
        self._fallback: str | None = None  # None: no child was ready yet; "": the settings are as they were given

    def launch(self) -> tuple[Child, Ready]:
        """A child that has survived its first decode. Raises `SetupError`."""
        tried = self._attempt(self._settings)
        if isinstance(tried, _Stillborn) and tried.by_settings and self._fallback is None:
            tried = self._go_around(tried)
        if isinstance(tried, _Stillborn):
            raise SetupError(f"llama.cpp's process ended before it was ready: {tried.reason}")
        self._fallback = self._fallback or ""
        child, ready = tried
        return child, msgspec.structs.replace(ready, fallback=self._fallback)

    def _go_around(self, first: _Stillborn) -> tuple[Child, Ready] | _Stillborn:
        """With what of the settings left out a child becomes ready; `first`, if with nothing."""
        for way in ways(self._settings, gpu=first.gpu):
            log.warning("llama.cpp does not survive its first decode; trying again", without=way.without, reason=first.reason)
            tried = self._attempt(way.settings)
            if not isinstance(tried, _Stillborn):
                self._settings = way.settings
                self._fallback = f"without {way.without}, because llama.cpp did not survive its first decode ({first.reason})"
                log.warning(f"going on {self._fallback}; set {way.saying} to have that at once, or see whether another build needs it")
                return tried
        return first

    def _attempt(self, settings: Settings) -> tuple[Child, Ready] | _Stillborn:
        """Raises `SetupError` where no settings would help."""
        child = Child(self._module, msgspec.structs.replace(self._hello, settings=settings.model_dump_json()))
        self._met(child)
        began = gpu = False
        while child.says(self._silence_s):
            heard = child.receive()
            if isinstance(heard, Ready):
                return child, heard
            if isinstance(heard, Unusable):
                child.reap()
                if not heard.by_settings:
                    raise SetupError(heard.message)
                return _Stillborn(heard.message, True, gpu)
            if not isinstance(heard, Starting):
                status = child.reap()
                return _Stillborn(cause(status), began and status < 0, gpu)
            began, gpu = True, heard.gpu
        child.process.kill()
        child.reap()
        return _Stillborn(f"no sign of life for {self._silence_s:.0f} s: LORAYARD_HANG_S grants more", began, gpu)


def cause(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    return f"{name} (the system may have run out of memory)" if name == "SIGKILL" else name
