"""A few breakages on purpose, and whether every place of the long list is still there; `make mutants` runs them all."""

from __future__ import annotations

import pytest
from mutants import ALL, hunt, mutate, source_of

FEW = (
    "all batches have one fence",
    "renewing renews nothing",
    "the body is not compared",
    "a job expires while it runs",
    "one attempt too many, by loss",
    "a cancelled job's late result is stored",
)


def test_every_place_is_there_once_and_is_changed() -> None:
    assert len({(mutant.kind, mutant.name) for mutant in ALL}) == len(ALL)
    for mutant in ALL:
        text = source_of(mutant).read_text()
        assert mutate(text, mutant) != text
    with pytest.raises(LookupError):
        mutate("local function now()\nend\n", ALL[0])


def test_what_is_broken_is_noticed() -> None:
    outcomes = hunt([mutant for mutant in ALL if mutant.name in FEW], print, files=["tests/test_ledger.py"])
    assert {outcome.mutant.name for outcome in outcomes if any(outcome.by.values())} == {*FEW}
