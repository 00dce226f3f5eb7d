"""Shared beginnings of prompts: the same answers as without sharing, less computing, and never across adapters or tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_support import alike, finish, item, outcomes, work, write_adapter

from lorayard.settings import Settings
from lorayard_workers.llama.bindings import Model
from lorayard_workers.llama.decoding import Context
from lorayard_workers.llama.engine import Engine
from lorayard_workers.llama.prefixes import Prefixes, Strand
from lorayard_workers.runner import AdapterFile, Event, Outcome, WorkItem

WEIGHTS = "exact_gguf"

SYSTEM = "You answer questions of the passengers of a small railway with three lines, two of them closed in winter. " * 2
OTHER = "You name the colour that a thing has, in one word and in lower case, and you never explain what you say. " * 2


class Cells:
    """Stands for a context: who holds which cell, as llama.cpp counts it."""

    n_ctx = 4096

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}  # sequence: its cells in order
        self.made = 0

    def compute(self, seq: int, count: int) -> None:
        self.held.setdefault(seq, []).extend(range(self.made, self.made + count))
        self.made += count

    def copy(self, source: int, target: int, length: int) -> None:
        assert not self.held.get(target), "the target must be empty"
        assert length <= len(self.held[source])
        self.held[target] = self.held[source][:length]

    def cut(self, seq: int, length: int) -> None:
        self.held[seq] = self.held[seq][:length]

    def remove(self, seq: int) -> None:
        self.held.pop(seq, None)

    @property
    def taken(self) -> int:
        return len(set().union(*self.held.values())) if self.held else 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "open", "compute", "compute", "close", "drop", "room"]),
            st.integers(0, 7),
            st.lists(st.integers(0, 1), min_size=0, max_size=6),
        ),
        max_size=60,
    )
)
def test_the_books_are_those_of_the_cells(actions: list[tuple[str, int, list[int]]]) -> None:
    cells = Cells()
    prefixes = Prefixes(cast(Context, cells), width=8, keepers=3, budget=60)
    prefixes.bind("adapter")
    running: list[Strand] = []
    for action, number, bits in actions:
        if action == "open" and len(running) < 8:
            prompt = [number % 2] * 10 + [token for bit in bits for token in [bit] * 5] + [7]
            running.append(prefixes.open("ab"[number % 2], prompt))
        elif action == "room":
            prefixes.make_room(Cells.n_ctx - 10 * number)
        elif running:
            strand = running[number % len(running)]
            if action == "compute":
                prefixes.settle(strand)
                if not strand.waits:
                    count = min(len(bits) * 3, len(strand.prompt) + 4 - strand.computed)
                    cells.compute(strand.seq, count)
                    strand.computed += count
            elif action in ("close", "drop"):
                running.remove(strand)
                prefixes.close(strand, keep=action == "close")
        prefixes.check_integrity()
        assert prefixes.cells == cells.taken
        assert all(len(cells.held.get(strand.seq, [])) == strand.computed for strand in running)
        waiting = [strand for strand in running if strand.waits and strand.origin and strand.origin.computed < strand.shared]
        assert len(waiting) < max(len(running), 1), "somebody can always go on"
    for strand in running:
        prefixes.close(strand, keep=False)
    prefixes.check_integrity()
    prefixes.make_room(Cells.n_ctx)
    assert prefixes.cells == cells.taken == 0


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / f"random{seed}.gguf", seed) for seed in range(2)]


def asked(ref: str, system: str, question: str, **options: Any) -> WorkItem:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return item(ref, "", messages=messages, logprobs=True, top_logprobs=2, **options)


JOBS = [
    asked("acme/1", SYSTEM, "When does the first train leave?"),
    asked("acme/2", SYSTEM, "When does the last train leave?"),
    asked("acme/3", OTHER, "The sky."),
    asked("acme/4", SYSTEM, "May I bring a dog?"),
    asked("globex/5", SYSTEM, "May I bring a dog?"),
    asked("acme/6", OTHER, "Grass."),
    asked("acme/7", SYSTEM, "May I bring a dog?"),
]


def run(model: Model, jobs: Sequence[tuple[AdapterFile | None, list[WorkItem]]], **options: Any) -> tuple[dict[str, Outcome], Engine]:
    events: list[Event] = []
    engine = Engine(model, Settings(**({"n_ctx": 1024, "width": 3, "prefill_tokens": 64, "contexts": 1} | options)), events.append)
    for number, (adapter, items) in enumerate(jobs):
        engine.submit(work(str(number), adapter, *items))
        finish(engine)
        for slot in engine.pool.slots:
            slot.prefixes.check_integrity()
    return outcomes(events), engine


def cached(outcome: Outcome) -> int:
    assert outcome.response is not None
    return int(outcome.response["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_sharing_changes_no_answer_and_saves_most_of_the_prompts(model: Model, adapters: list[AdapterFile]) -> None:
    work_ = [(adapters[0], JOBS), (adapters[0], [asked("acme/8", SYSTEM, "Is there a dining car?")])]
    shared, engine = run(model, work_)
    engine.close()
    plain, other = run(model, work_, share_prefixes=False)
    other.close()
    assert [ref for ref in plain if not alike(plain[ref], shared[ref])] == []
    assert all(cached(outcome) == 0 for outcome in plain.values())
    assert engine.counters.prompt_tokens == other.counters.prompt_tokens
    assert engine.counters.cached_tokens > 0.4 * engine.counters.prompt_tokens
    assert cached(shared["acme/8"]) > 30, "what a batch computed serves the next one while the adapter is hot"


def test_prompts_that_begin_alike_go_together(model: Model) -> None:
    ends = ("May I bring a dog?", "Is there a dining car?", "May I smoke?", "Is it late?")
    jobs = [asked(f"acme/{number}{side}", system, end) for number, end in enumerate(ends) for side, system in enumerate((SYSTEM, OTHER))]
    done, engine = run(model, [(None, jobs)], width=2, prefixes_kept=1)
    engine.close()
    assert sum(cached(outcome) > 8 for outcome in done.values()) == 6, "with room for one beginning, each is computed once"


def test_tenants_share_nothing(model: Model) -> None:
    done, engine = run(model, [(None, [asked(f"{tenant}/1", SYSTEM, "May I bring a dog?") for tenant in ("acme", "globex", "initech")])])
    engine.close()
    assert [cached(outcome) for outcome in done.values()] == [0, 0, 0]


def test_nothing_is_shared_across_adapters(model: Model, adapters: list[AdapterFile]) -> None:
    def question(ref: str) -> list[WorkItem]:
        return [asked(ref, SYSTEM, "May I bring a dog?"), asked(f"{ref}+", SYSTEM, "Is there a dining car?")]

    turns = [(None, question("acme/base")), (adapters[0], question("acme/0")), (adapters[1], question("acme/1"))]
    done, engine = run(model, turns)
    engine.close()
    assert [cached(done[f"{ref}+"]) for ref in ("acme/base", "acme/0", "acme/1")] == [0, 0, 0], "by its prompt the first of its work"
    alone, other = run(model, turns[2:])
    other.close()
    assert alike(done["acme/1"], alone["acme/1"]), "the second adapter's answer does not depend on the first one's cells"


def test_a_planted_reuse_across_adapters_is_caught(model: Model, adapters: list[AdapterFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of one adapter are left for the next, as a bug would do."""
    questions = [asked("acme/1", SYSTEM, "May I bring a dog?"), asked("acme/2", SYSTEM, "Is there a dining car?")]
    _, engine = run(model, [(adapters[0], questions)])
    prefixes = engine.pool.slots[0].prefixes
    assert prefixes.kept_cells > 0
    monkeypatch.setattr(Context, "clear", lambda _self, data=False: None)
    monkeypatch.setattr(Prefixes, "bind", lambda self, owner: setattr(self, "owner", owner))
    engine.submit(work("next", adapters[1], asked("acme/3", SYSTEM, "May I bring a dog?")))
    with pytest.raises(RuntimeError, match="another"):
        finish(engine)
    with pytest.raises(AssertionError, match="another adapter"):
        prefixes.check_integrity()
    monkeypatch.undo()
    prefixes._kept.clear()
    prefixes._running.clear()
    engine.pool.slots[0].running.clear()
    engine.close()


def test_kept_beginnings_make_room_for_jobs(model: Model) -> None:
    small: dict[str, Any] = {"n_ctx": 256, "prefix_share": 0.9}
    pair = [asked("acme/1", SYSTEM, "May I bring a dog?"), asked("acme/2", SYSTEM, "Is there a dining car?")]
    done, engine = run(model, [(None, pair), (None, [asked("acme/3", OTHER * 3, "Snow.", max_tokens=60, logit_bias={"2": -100})])], **small)
    engine.close()
    assert done["acme/3"].response is not None
    assert engine.counters.preemptions == 0


def test_several_choices_compute_their_prompt_once(model: Model) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 6}
    done, engine = run(model, [(None, [asked("acme/1", SYSTEM, "Tell me of the weather.", **options)])])
    engine.close()
    response = done["acme/1"].response
    assert response is not None
    choices = response["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) > 1, "each draws for itself"
    assert response["usage"]["completion_tokens"] == sum(len(choice["logprobs"]["content"]) or 1 for choice in choices)
    assert engine.counters.cached_tokens >= 2 * (response["usage"]["prompt_tokens"] - 1)
    again, other = run(model, [(None, [asked("acme/1", SYSTEM, "Tell me of the weather.", **options)])])
    other.close()
    assert again["acme/1"].response is not None
    assert [c["message"] for c in again["acme/1"].response["choices"]] == [c["message"] for c in choices], "a seed repeats all of them"
