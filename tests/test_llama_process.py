"""The llama.cpp backend as a process: it starts, dies, is replaced, and never outlives its control process."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from llama_support import item, text, work, write_adapter

from lorayard.errors import SetupError
from lorayard.settings import Settings
from lorayard_workers.llama import process
from lorayard_workers.llama.process import LlamaRunner, resolve_model
from lorayard_workers.runner import AdapterFile, Died, Event, Outcome, Progress, Ready, Started, Work, WorkItem

pytestmark = pytest.mark.fleet
E = TypeVar("E")
LONG: dict[str, Any] = {"max_tokens": 400, "logit_bias": {"2": -100}}


class Heard:
    """Events of a runner, as they come."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def until(self, kind: type[E], timeout: float = 30.0) -> E:
        """The next event of this kind; those before it are dropped."""
        deadline = time.monotonic() + timeout
        while True:
            event = self.events.get(timeout=max(deadline - time.monotonic(), 0.01))
            if isinstance(event, kind):
                return event
            assert not isinstance(event, Died), event.reason


@pytest.fixture
def started(demo_gguf: Path) -> Iterator[Callable[..., tuple[LlamaRunner, Heard, Ready]]]:
    runners: list[LlamaRunner] = []

    def start(model: Path = demo_gguf) -> tuple[LlamaRunner, Heard, Ready]:
        runner, heard = LlamaRunner(Settings(n_ctx=512, width=2, contexts=1), model), Heard()
        runners.append(runner)
        runner.start(heard.events.put)
        return runner, heard, heard.until(Ready)

    yield start
    for runner in runners:
        runner.close()


def long(ref: str) -> WorkItem:
    return item(ref, "Tell me a long story.", **LONG)


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_work_goes_in_and_outcomes_come_out(started: Callable[..., tuple[LlamaRunner, Heard, Ready]], tmp_path: Path) -> None:
    runner, heard, ready = started()
    assert (ready.width, ready.max_prompt_tokens) == (2, 511)
    assert ready.max_token_bytes > 10
    assert {"architecture": "llama", "n_layer": 30, "n_embd": 576, "n_head": 9, "n_head_kv": 3, "n_ff": 1536}.items() <= ready.base.items()
    assert process.DEMO_NAME in ready.base["names"]
    adapter = write_adapter(tmp_path / "a.gguf", 1)
    runner.submit(work("b", adapter, item("t/1", "Say hello."), item("t/2", "x", tools=[1])))
    assert heard.until(Outcome).error is not None
    assert heard.until(Started).refs == ["t/1"]
    assert text(heard.until(Outcome))
    runner.submit(work("c", AdapterFile("none", str(tmp_path / "none.gguf")), item("t/3", "Say hello.")))
    assert heard.until(Outcome).retryable


def test_a_killed_child_is_replaced_and_tells_what_it_had(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    runner, heard, ready = started()
    runner.submit(work("b", None, *(long(f"t/{number}") for number in range(5))))
    heard.until(Started)
    os.kill(ready.pid, signal.SIGKILL)
    died = heard.until(Died)
    assert "SIGKILL" in died.reason
    assert (died.running, died.waiting) == (["t/0", "t/1"], ["t/2", "t/3", "t/4"])
    runner.submit(work("c", None, item("t/2", "Say hello.")))  # whether or not the new one is ready
    assert heard.until(Ready).pid != ready.pid
    outcome = heard.until(Outcome)
    assert (outcome.batch, outcome.ref) == ("c", "t/2")
    assert text(outcome)


def test_cancelled_jobs_are_not_heard_of_again(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    runner, heard, _ready = started()
    runner.submit(work("b", None, long("t/1"), long("t/2"), item("t/3", "Say hello.")))
    heard.until(Started)
    runner.cancel("b", ["t/1", "t/2"])
    assert heard.until(Outcome).ref == "t/3"
    runner.kill("for the test")
    died = heard.until(Died)
    assert (died.running, died.waiting) == ([], [])
    assert "for the test" in died.reason


def test_a_cancel_is_of_one_batch_and_not_of_the_same_job_in_the_next(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    """As when a lease was lost, and the job has come again before the worker has looked."""
    runner, heard, _ready = started()
    runner.submit(work("b1", None, long("t/1")))
    heard.until(Started)
    runner.submit(work("b2", None, item("t/1", "Say hello.")))
    runner.cancel("b1", ["t/1"])
    outcome = heard.until(Outcome)
    assert (outcome.batch, outcome.ref) == ("b2", "t/1")


def test_a_job_that_came_again_waits_whatever_its_last_batch_did(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    runner, heard, ready = started()
    runner.submit(work("b1", None, long("t/1"), long("t/2")))
    heard.until(Started)
    runner.submit(work("b2", None, long("t/1")))
    os.kill(ready.pid, signal.SIGKILL)
    died = heard.until(Died)
    assert (died.running, died.waiting) == (["t/2"], ["t/1"])


def test_what_is_left_of_a_batch_is_what_it_was(demo_gguf: Path) -> None:
    """One that was cut while no child was there to take it."""
    runner = LlamaRunner(Settings(n_ctx=512, width=2, contexts=1), demo_gguf)
    runner.submit(Work("b", None, [item("t/1", "Say hello."), item("t/2", "Say hello.")], "@t"))
    runner.cancel("b", ["t/1"])
    assert [(held.lane, [kept.ref for kept in held.items]) for held in runner._held] == [("@t", ["t/2"])]


def test_a_child_that_is_stuck_and_does_not_read_can_be_killed(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    runner, heard, ready = started()
    os.kill(ready.pid, signal.SIGSTOP)
    large = work("b", None, *(item(f"t/{number}", "x" * 100_000) for number in range(50)))  # more than the socket holds

    def call() -> None:  # as Celery's and the heartbeat's threads do
        runner.submit(large)
        runner.cancel("b", ["t/0"])

    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(5)
    assert not calling.is_alive(), "who waits for a stuck child cannot kill it"
    runner.kill("no progress")
    assert len(heard.until(Died).waiting) == 49


def test_what_is_planned_reaches_the_childs_memory(demo_gguf: Path, tmp_path: Path) -> None:
    heard, runner = Heard(), LlamaRunner(Settings(n_ctx=512, width=2, contexts=1, adapters_loaded=3), demo_gguf)
    runner.expect(["too early"])
    runner.start(heard.events.put)
    heard.until(Ready)
    adapters = [write_adapter(tmp_path / f"a{number}.gguf", number, layers=[0]) for number in range(4)]
    runner.expect([adapters[0].digest, adapters[2].digest])
    for number, adapter in enumerate(adapters):
        runner.submit(work(str(number), adapter, item(f"t/{number}", "Say hello.", max_tokens=1)))
        assert text(heard.until(Outcome)) is not None
    runner.submit(work("4", None, item("t/4", "Say hello.", max_tokens=40)))
    until_told = heard.until(Progress)
    while until_told.hot:
        until_told = heard.until(Progress)
    assert set(until_told.loaded) == {adapters[0].digest, adapters[2].digest, adapters[3].digest}
    runner.close()


def test_progress_is_a_sign_of_life(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    runner, heard, _ready = started()
    runner.submit(work("b", None, long("t/1")))
    steps = [heard.until(Progress).steps for _ in range(3)]
    assert steps == sorted(set(steps))


def test_the_child_ends_with_its_control_process(demo_gguf: Path) -> None:
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from lorayard.settings import Settings
        from lorayard_workers.llama.process import LlamaRunner
        from lorayard_workers.runner import Ready, Started
        from llama_support import item, work
        def tell(event):
            if isinstance(event, Ready): print(event.pid, flush=True)
            if isinstance(event, Started): print("started", flush=True)
        runner = LlamaRunner(Settings(n_ctx=512, width=2, contexts=1), Path({str(demo_gguf)!r}))
        runner.start(tell)
        runner.submit(work("b", None, item("t/1", "Tell me a story.", **{LONG!r})))
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as control:
        assert control.stdout is not None
        pid = int(control.stdout.readline())
        assert control.stdout.readline() == "started\n"
        assert not gone(pid)
        control.kill()
        deadline = time.monotonic() + 10
        while not gone(pid):
            assert time.monotonic() < deadline, "the child outlives its control process"
            time.sleep(0.01)


def test_a_model_that_is_missing_for_a_while_is_waited_for(
    started: Callable[..., tuple[LlamaRunner, Heard, Ready]], demo_gguf: Path, tmp_path: Path
) -> None:
    link = tmp_path / "model.gguf"
    link.symlink_to(demo_gguf)
    runner, heard, ready = started(link)
    link.unlink()
    os.kill(ready.pid, signal.SIGKILL)
    heard.until(Died)
    runner.submit(work("b", None, item("t/1", "Say hello.")))
    time.sleep(0.5)
    link.symlink_to(demo_gguf)
    heard.until(Ready)
    assert text(heard.until(Outcome))


CRASHING = """
    import os, signal, sys, threading
    from lorayard_workers.llama import bindings, process
    load, tokenize = bindings.Model.__init__, bindings.Model.tokenize
    def crash_when_repacked(self, path, settings, alive):
        if settings.repack: os.kill(os.getpid(), signal.SIGILL)
        load(self, path, settings, alive)
    def crash_on_poison(self, text):
        if b"poison" in text: signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)  # on this thread, so at once: as real ones come
        while b"stall" in text: pass
        return tokenize(self, text)
    bindings.Model.__init__, bindings.Model.tokenize = crash_when_repacked, crash_on_poison
    process.main(sys.argv[1:])
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children crash as a wrong build does, and on a request that their tokenizer does not survive."""
    (tmp_path / "crashing_llama.py").write_text(textwrap.dedent(CRASHING))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process, "_MODULE", "crashing_llama")


@pytest.mark.usefixtures("crashing")
def test_a_crash_at_the_first_decode_switches_repacking_off(
    started: Callable[..., tuple[LlamaRunner, Heard, Ready]], capfd: pytest.CaptureFixture[str]
) -> None:
    runner, heard, _ready = started()
    assert "without its repacked kernels" in "".join(capfd.readouterr())
    runner.submit(work("b", None, item("t/1", "Say hello.")))
    assert text(heard.until(Outcome))


@pytest.mark.usefixtures("crashing")
def test_a_request_that_crashes_the_tokenizer_is_known(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    runner, heard, _ready = started()
    runner.submit(work("b", None, item("t/1", "Say hello."), item("t/2", "poison"), item("t/3", "Say hello.")))
    died = heard.until(Died)
    assert "SIGSEGV" in died.reason
    assert died.reading == "t/2"
    assert sorted(died.running + died.waiting) == ["t/1", "t/2", "t/3"]
    assert "t/2" not in died.running


@pytest.mark.usefixtures("crashing")
def test_a_request_that_is_never_read_to_its_end_is_known_while_others_are_computed(
    started: Callable[..., tuple[LlamaRunner, Heard, Ready]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_READ_S", 1.5)
    runner, heard, _ready = started()
    runner.submit(work("a", None, long("t/0")))
    heard.until(Started)
    runner.submit(work("b", None, item("t/1", "Say hello."), item("t/2", "stall")))
    died = heard.until(Died)
    assert died.reason.startswith("killed: it read one request for")
    assert died.reading == "t/2"
    assert sorted(died.running + died.waiting) == ["t/0", "t/1", "t/2"]


@pytest.mark.usefixtures("crashing")
def test_a_silent_child_is_killed_for_what_it_reads(started: Callable[..., tuple[LlamaRunner, Heard, Ready]]) -> None:
    runner, heard, _ready = started()
    runner.submit(work("b", None, item("t/1", "Say hello."), item("t/2", "stall")))
    time.sleep(process._SLOW_S + 0.5)
    runner.kill("no progress")
    died = heard.until(Died)
    assert (died.reason, died.reading) == ("killed: no progress", "t/2")


def test_a_build_that_always_crashes_is_a_setup_error(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing_llama.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process, "_MODULE", "crashing_llama")
    with pytest.raises(SetupError, match="SIGILL"):
        LlamaRunner(Settings(), demo_gguf).start(lambda _event: None)


def test_a_model_that_cannot_be_served_is_a_setup_error(tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGML, but older")
    with pytest.raises(SetupError, match="not a GGUF file"):
        LlamaRunner(Settings(model=junk)).start(lambda _event: None)
    with pytest.raises(SetupError, match="LORAYARD_MODEL"):
        LlamaRunner(Settings(model=tmp_path / "none.gguf")).start(lambda _event: None)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(SetupError, match="cannot load"):
        LlamaRunner(Settings(model=broken)).start(lambda _event: None)


def test_the_demo_model_is_made_once(demo_gguf: Path, tmp_path: Path) -> None:
    assert demo_gguf.name.endswith(".Q8_0.gguf")
    (tmp_path / "models").mkdir()
    kept = shutil.copy(demo_gguf, tmp_path / "models" / demo_gguf.name)
    before = Path(kept).stat().st_mtime_ns
    assert resolve_model(Settings(state_dir=tmp_path)).stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == [demo_gguf.name]
