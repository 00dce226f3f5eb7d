"""A model child that computes nothing: what each job does is written in its last message, as JSON of `Script`.

It runs under the real `LlamaRunner`, speaks its protocol, and keeps a runner's promises: `width` jobs at once, a suspect beside
suspects only, signs of life, silence about what was cancelled. Every execution is written down, so
that a test can tell what was run and how often.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import signal
import sys
import time
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from lorayard.settings import Settings
from lorayard_workers.llama import process
from lorayard_workers.llama.child import encode, to_child
from lorayard_workers.runner import Cancel, Event, Outcome, Progress, Ready, Started, Work, WorkItem

LOG = "LORAYARD_TEST_RUNS"
"""The file of executions: lines of `start|end|stop REF BATCH PID MONOTONIC_S`."""

BASE = {
    "architecture": "llama",
    "n_layer": 30,
    "n_embd": 576,
    "n_head": 9,
    "n_head_kv": 3,
    "n_ff": 1536,
    "n_vocab": 49152,
    "n_ctx_train": 8192,
    "name": "script",
    "names": [process.DEMO_NAME],
    "digest": "script",
}
_ALIVE_S = 0.2
_CHUNK = 1 << 24
_MEMORY = 1 << 30  # of one child: a job that eats ends it here, where no control group ends it before


class Script(msgspec.Struct, omit_defaults=True):
    """What a job does, `ms` milliseconds after it began. `die`, `retry` and `eat` happen at its first so many executions."""

    ms: int = 20
    die: int = 0  # the process gets SIGKILL, at once
    retry: int = 0  # it fails in a way that may pass
    eat: int = 0  # it asks for memory until the system says no
    fail: bool = False  # it fails for good
    say: str = ""


class _Running:
    def __init__(self, batch: str, item: WorkItem, script: Script, now: float, nth: int) -> None:
        self.batch, self.item, self.script, self.nth = batch, item, script, nth
        self.began = now
        self.ends = now + script.ms / 1000


class Stage:
    """Plays the scripts."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._width = settings.width or 16
        self._log = os.open(os.environ[LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._waiting: deque[tuple[str, WorkItem]] = deque()
        self._running: dict[tuple[str, str], _Running] = {}  # by batch and ref: a recalled job may come again while it is still run
        self._steps = 0
        self._shown = 0.0

    def play(self, inbox: queue.SimpleQueue[bytes]) -> None:
        while True:
            now = time.monotonic()
            pause = min((r.ends for r in self._running.values()), default=now + _ALIVE_S) - now
            with contextlib.suppress(queue.Empty):
                self._hear(inbox.get(timeout=min(max(pause, 0.0005), _ALIVE_S)))
                while True:
                    self._hear(inbox.get_nowait())
            self._end()
            self._begin()
            self._live()

    def _hear(self, frame: bytes) -> None:
        message = to_child.decode(frame)
        if isinstance(message, Work):
            self._waiting.extend((message.batch, item) for item in message.items)
        elif isinstance(message, Cancel):
            gone = {(message.batch, ref) for ref in message.refs}
            self._waiting = deque((batch, item) for batch, item in self._waiting if (batch, item.ref) not in gone)
            for job in gone & self._running.keys():
                self._write("stop", self._running.pop(job))

    def _begin(self) -> None:
        begun: dict[str, list[str]] = {}
        while self._waiting and self._room(self._waiting[0][1]):
            batch, item = self._waiting.popleft()
            script = msgspec.json.decode(msgspec.json.decode(item.request)["messages"][-1]["content"], type=Script)
            nth = _executions(item.ref) if script.die or script.retry or script.eat else 1
            self._running[batch, item.ref] = running = _Running(batch, item, script, time.monotonic(), nth)
            self._write("start", running)
            begun.setdefault(batch, []).append(item.ref)
        for batch, refs in begun.items():
            self._emit(Started(batch, refs))
        for running in list(self._running.values()):
            self._suffer(running)

    def _room(self, item: WorkItem) -> bool:
        """Whether it may begin beside what runs, as `WorkItem.company` says."""
        if not self._running:
            return True
        companies = {r.item.company for r in self._running.values()} | {item.company}
        return len(self._running) < (self._width if companies == {0} else min(companies | {self._width}))

    def _suffer(self, running: _Running) -> None:
        if running.nth <= running.script.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if running.nth <= running.script.eat:
            eaten = []
            while True:
                eaten.append(bytearray(os.urandom(4096) * (_CHUNK // 4096)))

    def _end(self) -> None:
        now = time.monotonic()
        for job, running in list(self._running.items()):
            if running.ends <= now:
                del self._running[job]
                self._write("end", running)
                self._emit(self._outcome(running.item.ref, running, now))

    def _outcome(self, ref: str, running: _Running, now: float) -> Outcome:
        timings = {"adapter_load": 0.0, "adapter_switch": 0.0, "prefill": 0.0, "decode": (now - running.began) * 1000, "on_deck": 0.0}
        if running.script.fail or running.nth <= running.script.retry:
            error = {"message": "so it was written", "type": "server_error", "code": "scripted", "param": None}
            return Outcome(running.batch, ref, error=error, retryable=not running.script.fail, timings_ms=timings)
        said = {"ref": ref, "batch": running.batch, "say": running.script.say}
        choice = {"index": 0, "message": {"role": "assistant", "content": msgspec.json.encode(said).decode()}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        response = {"object": "chat.completion", "created": int(time.time()), "choices": [choice], "usage": usage}
        return Outcome(running.batch, ref, response=response, timings_ms=timings, width=len(self._running) + 1)

    def _live(self) -> None:
        if self._running and time.monotonic() - self._shown > _ALIVE_S:
            self._shown = time.monotonic()
            self._steps += 1
            self._emit(Progress(self._steps, [], [], {}))

    def _write(self, what: str, running: _Running) -> None:
        os.write(self._log, f"{what} {running.item.ref} {running.batch} {os.getpid()} {time.monotonic():.4f}\n".encode())

    def _emit(self, event: Event) -> None:
        try:
            self._connection.send_bytes(encode(event))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def _executions(ref: str) -> int:
    """How often this job was begun before, and once."""
    return Path(os.environ[LOG]).read_text().count(f"start {ref} ") + 1


def compute(connection: Connection, hello: Any, inbox: queue.SimpleQueue[bytes]) -> None:
    """In place of loading a model."""
    settings = Settings.model_validate_json(hello.settings)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    stage = Stage(connection, settings)
    stage._emit(Ready(BASE, (settings.width or 16), 4096, 32, os.getpid()))
    stage.play(inbox)


if __name__ == "__main__":
    process._compute = compute
    process.main(sys.argv[1:])
