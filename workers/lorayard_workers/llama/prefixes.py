"""Which KV cells of a context hold which tokens: prompts that begin alike are computed once and copied.

Every sequence of a context is a `Strand`. A new one looks for the strand of its tenant with the longest common beginning, its *origin*,
waits until that much of it is computed, and takes those cells over: llama.cpp then counts one cell for both, so that a copy costs nothing.
Strands therefore form trees, and `Prefixes` knows at any time how many cells are taken. When a strand ends whose beginning others shared,
that beginning is kept under a sequence id of its own, within a budget, until the context is bound to another adapter: what one adapter
computed is wrong under any other. No strand ever looks at one of another tenant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorayard_workers.llama.decoding import Context

LEAST_SHARED = 8  # tokens: what chat templates begin every prompt with is not worth waiting for

Tokens = NDArray[np.int32]


@dataclass(eq=False)
class Strand:
    """One llama.cpp sequence: the first `computed` tokens of it are in cells, the first `shared` of those in its origin's cells too."""

    seq: int
    scope: str  # tenant
    owner: str  # digest of the adapter it is computed with
    prompt: Tokens
    computed: int = 0
    origin: Strand | None = None
    shared: int = 0
    reused: int = 0  # tokens that were copied when it began, for the usage
    keep: int = 0  # tokens of its beginning that another strand wanted as well
    used_at: int = 0
    branches: set[Strand] = field(default_factory=set)

    @property
    def waits(self) -> bool:
        """Its origin has not computed yet what the two share."""
        return self.origin is not None and self.computed == 0


def common(left: Tokens, right: Tokens) -> int:
    """How many tokens two prompts begin with alike."""
    length = min(len(left), len(right))
    differ = left[:length] != right[:length]
    return int(differ.argmax()) if differ.any() else length


class Prefixes:
    """The strands of one context. `budget`: cells that kept beginnings may hold; `sharing` off: every prompt is computed anew."""

    def __init__(self, context: Context, *, width: int, keepers: int, budget: int, sharing: bool = True) -> None:
        self._context = context
        self._free = list(range(width + keepers))
        self._ids = len(self._free)
        self._keepers = keepers
        self._budget = budget
        self._sharing = sharing
        self._running: set[Strand] = set()
        self._kept: set[Strand] = set()
        self._clock = 0
        self.owner = ""

    @property
    def cells(self) -> int:
        """Cells that are taken."""
        return sum(strand.computed - min(strand.shared, strand.computed) for strand in self._strands())

    @property
    def held_cells(self) -> int:
        """Cells of kept beginnings that running strands share."""
        return sum(strand.computed - strand.shared for strand in self._kept if strand.branches)

    @property
    def kept_cells(self) -> int:
        """Cells taken by what is only kept."""
        return sum(strand.computed - strand.shared for strand in self._kept)

    def _strands(self) -> Sequence[Strand]:
        return [*self._running, *self._kept]

    def bind(self, owner: str) -> None:
        """All that was computed is worthless from now on: another adapter computes. The context's cells must be clear."""
        assert not self._running, "strands of another adapter still run"
        for strand in self._kept:
            self._free.append(strand.seq)
        self._kept.clear()
        self.owner = owner

    def open(self, scope: str, prompt: Sequence[int]) -> Strand:
        """A strand for a prompt. At least its last token is left to compute, because the answer begins with what follows it."""
        self._clock += 1
        strand = Strand(self._free.pop(), scope, self.owner, np.asarray(prompt, np.int32), used_at=self._clock)
        self._find_origin(strand, self._strands())
        self._running.add(strand)
        self.settle(strand)
        return strand

    def overlap(self, scope: str, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need no cells of their own."""
        return self._longest(scope, np.asarray(prompt, np.int32), self._strands())[1]

    def _longest(self, scope: str, prompt: Tokens, among: Iterable[Strand]) -> tuple[Strand | None, int]:
        best, most = None, LEAST_SHARED - 1
        if self._sharing:
            for other in among:
                if other.scope == scope and len(other.prompt) > most:
                    length = common(other.prompt, prompt[:-1])
                    if length > most or (length == most and best is not None and other.computed > best.computed):
                        best, most = other, length
        return (best, most) if best else (None, 0)

    def _find_origin(self, strand: Strand, among: Iterable[Strand]) -> None:
        best, most = self._longest(strand.scope, strand.prompt, among)
        strand.origin, strand.shared = best, most
        if best is not None:
            best.keep = max(best.keep, most)
            best.used_at = strand.used_at
            strand.keep = max(strand.keep, most)
            best.branches.add(strand)

    def settle(self, strand: Strand) -> None:
        """Take over the shared beginning as soon as it is there."""
        origin = strand.origin
        if origin is None or strand.computed or origin.computed < strand.shared:
            return
        if not origin.owner == strand.owner == self.owner:
            raise RuntimeError("cells of one adapter must not be used for another")
        self._context.copy(origin.seq, strand.seq, strand.shared)
        strand.computed = strand.reused = strand.shared

    def close(self, strand: Strand, *, keep: bool = True) -> None:
        """Give its cells back, but for the beginning that others wanted, where the budget allows to `keep` it."""
        self._running.discard(strand)
        length = min(strand.keep, strand.computed, len(strand.prompt))
        if keep and self._keepers and length >= LEAST_SHARED and not self._is_kept(strand, length):
            self._cut(strand, length)
            self._kept.add(strand)
            self._shrink()
        else:
            self._drop(strand)

    def _is_kept(self, strand: Strand, length: int) -> bool:
        beginning = strand.prompt[:length]
        alike = (other for other in self._kept if other.scope == strand.scope and common(other.prompt, beginning) == length)
        return next(alike, None) is not None

    def _cut(self, strand: Strand, length: int) -> None:
        """Let go of all but the beginning."""
        for branch in [branch for branch in strand.branches if branch.shared > length]:  # they all wait
            self._unlink(branch)
        self._context.cut(strand.seq, length)
        strand.prompt, strand.computed = strand.prompt[:length], length
        strand.shared = min(strand.shared, length)

    def _shrink(self) -> None:
        while self._kept and (self.kept_cells > self._budget or len(self._kept) > self._keepers):
            self._drop(min(self._kept, key=lambda strand: strand.used_at))

    def make_room(self, cells: int) -> None:
        """Let go of kept beginnings, least recently used first, until so many cells are free or none is kept."""
        while self._kept and self._context.n_ctx - self.cells < cells:
            self._drop(min(self._kept, key=lambda strand: strand.used_at))

    def _drop(self, strand: Strand) -> None:
        """Its cells go, but for those that its branches took over: the longest branch answers for them from now on."""
        self._running.discard(strand)
        self._kept.discard(strand)
        for waiting in [branch for branch in strand.branches if branch.waits]:
            self._unlink(waiting)
        heir = max(strand.branches, key=lambda branch: branch.shared, default=None)
        origin, shared = strand.origin, strand.shared if strand.computed else 0
        if origin is not None:
            origin.branches.discard(strand)
        for branch in strand.branches:
            if branch is heir or branch.shared <= shared:
                branch.origin, branch.shared = origin, min(shared, branch.shared)
            else:
                branch.origin = heir
            if branch.origin is not None:
                branch.origin.branches.add(branch)
        self._context.remove(strand.seq)
        self._free.append(strand.seq)

    def _unlink(self, strand: Strand) -> None:
        """Its origin goes before it was ready: find another, which must not be one that waits for it in turn, or compute all."""
        assert strand.origin is not None
        strand.origin.branches.discard(strand)
        behind = {strand}
        while more := {other for other in self._running if other.waits and other.origin in behind} - behind:
            behind |= more
        self._find_origin(strand, [other for other in self._strands() if other not in behind])

    def check_integrity(self) -> None:
        """Raise `AssertionError` if the books do not agree."""
        strands = self._strands()
        ids = [strand.seq for strand in strands]
        assert len(set(ids)) == len(ids), "one sequence id twice"
        assert not set(ids) & set(self._free), "a sequence id is taken and free"
        assert self._kept.isdisjoint(self._running), "kept and running"
        for strand in strands:
            assert strand.owner == self.owner, "a strand of another adapter"
            origin = strand.origin
            assert origin is None or (origin in strands and strand in origin.branches and origin.scope == strand.scope), "a lost origin"
            assert all(branch.origin is strand for branch in strand.branches), "a lost branch"
        assert len(ids) + len(self._free) == self._ids, "a sequence id was lost"
        assert 0 <= self.cells <= self._context.n_ctx, f"{self.cells} cells taken of {self._context.n_ctx}"
