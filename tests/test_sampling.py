"""Sampling against distributions worked out by hand, and text that ends in the middle of a character."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorayard.errors import LorayardError
from lorayard_workers.llama.requests import text_of
from lorayard_workers.llama.sampling import STUCK, Row, Sampler, SamplingParams, sample

SHARES = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
LOGITS = np.log(SHARES).astype(np.float32)


def drawn(count: int = 4000, **options: Any) -> dict[int, float]:
    """Frequencies of the tokens drawn from LOGITS."""
    sampler = Sampler(SamplingParams(seed=1, **options))
    found = Counter(sample(LOGITS[None], [sampler])[0] for _ in range(count))
    return {token: number / count for token, number in found.items()}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_p": 0.45}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.88}, 3),
        ({"min_p": 0.25}, 3),
        ({"top_k": 3, "top_p": 0.8}, 2),
    ],
)
def test_truncations_keep_the_right_tokens_in_proportion(options: dict[str, Any], kept: int) -> None:
    expected = SHARES[:kept] / SHARES[:kept].sum()
    found = drawn(**options)
    assert found.keys() == set(range(kept))
    assert all(abs(found[token] - expected[token]) < 0.03 for token in range(kept))


def test_temperature_sharpens() -> None:
    squared = SHARES**2 / (SHARES**2).sum()
    assert abs(drawn(temperature=0.5)[0] - squared[0]) < 0.03
    assert drawn(50, temperature=0) == {0: 1.0}


def test_the_nucleus_of_a_large_vocabulary_is_not_cut_at_the_candidates_looked_at_first() -> None:
    flat = np.zeros((1, 50_000), np.float32)
    sampler = Sampler(SamplingParams(top_p=0.5, seed=1))
    tokens = [sample(flat, [sampler])[0] for _ in range(300)]
    assert max(tokens) > 20_000
    assert max(tokens) <= 25_000


def test_biases_and_penalties_change_the_greedy_choice() -> None:
    assert sample(LOGITS[None], [Sampler(SamplingParams(temperature=0, logit_bias={3: 100}))]) == [3]
    repeated = Sampler(SamplingParams(temperature=0, presence_penalty=1.0))
    assert [sample(LOGITS[None], [repeated])[0] for _ in range(3)] == [0, 1, 0]
    counted = Sampler(SamplingParams(temperature=0, frequency_penalty=0.5))
    assert [sample(LOGITS[None], [counted])[0] for _ in range(4)] == [0, 0, 1, 0]


def test_rows_of_a_batch_are_independent() -> None:
    rows = np.stack([LOGITS, LOGITS[::-1], LOGITS])
    samplers = [Sampler(SamplingParams(temperature=0)), Sampler(SamplingParams(temperature=0)), Sampler(SamplingParams(top_k=1))]
    assert sample(rows, samplers) == [0, 4, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_never_chosen(bad: float) -> None:
    rows = np.stack([LOGITS, LOGITS])
    rows[1, 2] = bad
    with pytest.raises(LorayardError) as raised:
        sample(rows, [Sampler(SamplingParams()), Sampler(SamplingParams())])
    assert raised.value.code == "not_a_number"


class Only:
    """Lets these tokens through, and ends the test over any other, as llama.cpp would end the process."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.accepted = tokens, list[int]()

    def allows(self, token: int) -> bool:
        return token in self.tokens

    def masked(self, row: Row) -> Row:
        kept = np.full_like(row, -np.inf)
        kept[list(self.tokens)] = row[list(self.tokens)]
        return kept

    def accept(self, token: int) -> None:
        assert token in self.tokens
        self.accepted.append(token)


def test_a_row_that_is_stuck_takes_nothing_from_the_others() -> None:
    ways: list[dict[str, Any]] = [{"seed": 7}, {"seed": 8, "top_k": 4, "frequency_penalty": 1.0}, {"temperature": 0, "top_logprobs": 1}]

    def samplers() -> list[Sampler]:
        return [Sampler(SamplingParams(**way)) for way in ways]

    alone, beside, stuck = samplers(), samplers(), Sampler(SamplingParams(grammar="root", top_logprobs=0), 1, Only())
    for _ in range(20):
        expected = sample(np.stack([LOGITS] * 3), alone)
        assert sample(np.stack([LOGITS] * 4), [*beside[:2], stuck, beside[2]]) == [*expected[:2], STUCK, expected[2]]
    assert [len(sampler.logprobs) for sampler in (*beside, stuck)] == [0, 0, 20, 0]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"temperature": 0}, {"temperature": 1e-50}])
def test_only_what_is_allowed_reaches_the_constraint(options: dict[str, Any]) -> None:
    """Whatever the numbers come to: at a temperature that is 0 in float32 no weight is one."""
    only = Only(2)
    sampler = Sampler(SamplingParams(**{"grammar": "root", **options}), 1, only)
    with np.errstate(all="ignore"):
        found = {sample(LOGITS[None], [sampler])[0] for _ in range(50)}
    assert found <= {2, STUCK}
    assert found == {2} or options == {"temperature": 1e-50}


def test_the_last_share_falls_to_the_last_that_has_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.concatenate([LOGITS, np.full(3, -np.inf, np.float32)])
    sampler = Sampler(SamplingParams(seed=1))
    monkeypatch.setattr(sampler, "random", type("", (), {"random": lambda _self: 1.0})())  # as rounding may have it
    assert sample(row[None], [sampler]) == [4]


def test_logprobs_are_of_the_bare_model() -> None:
    sampler = Sampler(SamplingParams(temperature=0, logit_bias={4: 100}, top_logprobs=2))
    sample(LOGITS[None], [sampler])
    entry = sampler.logprobs[0]
    assert entry.token == 4
    assert np.isclose(entry.logprob, np.log(0.04), atol=1e-5)
    assert [token for token, _ in entry.top] == [0, 1]


@given(st.text(), st.integers(0, 12))
def test_a_character_cut_by_the_end_is_left_out(text: str, cut: int) -> None:
    data = text.encode()
    kept = text_of(data[: max(len(data) - cut, 0)])
    assert text.startswith(kept)
    assert text_of(data) == text


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert text_of(b"a\xffb") == "a\ufffdb"
