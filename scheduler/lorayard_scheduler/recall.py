"""Which jobs at workers that have not begun should come back: because something that waits is due before them and would else be late, or
because their worker has become slow and another has nothing to do. Pure, as `planner.py` is.

When something urgent comes, workers may have jobs with time before them: on deck, or the second half of a batch that runs. What has not
begun costs nothing to take back; what runs is never interrupted. It pays in one case only: the urgent group cannot begin by its due time
anywhere as things are, would begin by then on a worker that gives up what it has not begun, and what is given up is due so much later that
it goes behind the urgent group, and still in time. Late either way, or in time anyway: nothing is recalled.

A worker may slow down (its cores have other work, its chip is hot) with jobs that were given to it when it was fast. What has not begun of
them comes back when nothing waits, another worker has nothing to do and is faster by a quarter or more, as both measure, and would end it
in less than half the time in which this one would end all it has. By that same rule the planner leaves it to the faster one, so nothing
goes back and forth.

It costs a look at the first groups by rank, when the first of them is near its due time, and at a few workers for each; and at a few
workers, where some are much faster than others.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter

from lorayard.jobs import adapter_of
from lorayard_scheduler.groups import TICKS, Group
from lorayard_scheduler.planner import Policy, View
from lorayard_scheduler.roster import Held, WorkerView

_GROUPS = 4
"""Looked at: those behind one for whom a batch is recalled, or that is late whatever is done, wait for the next turn."""


@dataclass(frozen=True, slots=True)
class Recall:
    """What has not begun of batches of a worker, in favour of a group of this adapter; or of this adapter, for a faster worker. `why` is
    for people."""

    worker: str
    batches: tuple[str, ...]
    digest: str
    why: str


def recalls(view: View, now: float, policy: Policy) -> list[Recall]:
    """At most one: what follows from it is planned before another is thought of."""
    if not view.roster.decks or not (view.groups.news or view.roster.news):
        return []
    if not view.groups.jobs:
        return _left_behind(view, policy)
    for group in islice(view.groups.by_rank(False, view.groups.limit(policy.slack_tokens)), _GROUPS):
        left = group.due - now
        if left <= 0 or group.rank > TICKS * (now + policy.reserve_ms):
            return []
        if any(_begins(view, worker, worker.held, group) <= left for worker in _first(view, group, policy)):
            continue
        decks = _decks(view, policy)
        if any(_begins(view, worker, worker.held, group) <= left for worker in decks):
            continue
        found = _best(view, group, now, decks)
        return [found] if found else []
    return []


def _left_behind(view: View, policy: Policy) -> list[Recall]:
    """What the slowest has of an adapter that has not begun, and a faster worker with nothing to do would end in half the time."""
    roster, work = view.roster, view.groups.scale.work
    if not roster.idle or not roster.uneven:
        return []
    idle = [roster.workers[name] for _, name in islice(roster.free, policy.workers_most) if not roster.loads[name]]
    slowest = (roster.workers[name] for _, name in reversed(roster.paces) if name in roster.decks)
    for worker in islice(slowest, policy.workers_most if idle else 0):
        here = worker.costs.batch_ms(roster.loads[worker.name], work, "hot")
        for digest in sorted({held.digest for held in worker.held if held.waiting}):
            waiting = [held for held in worker.held if held.waiting and held.digest == digest]
            jobs = sum([held.waiting for held in waiting])
            for other in idle:
                there = other.costs.batch_ms(jobs, work, other.temperature(digest))
                if other.costs.much_faster(worker.costs) and there < here / 2:
                    why = f"{other.name}, which has nothing to do, ends in {there / 1000:.1f} s what takes {here / 1000:.1f} s here by now"
                    return [Recall(worker.name, tuple([held.batch for held in waiting]), digest, why)]
    return []


def _first(view: View, group: Group, policy: Policy) -> Iterable[WorkerView]:
    """Where it would mostly begin first: workers that have a hand free and least to do, or its adapter in hand."""
    roster, most = view.roster, policy.workers_most
    names = [name for _, name in islice(roster.free, most)]
    return [roster.workers[name] for name in dict.fromkeys([*names, *islice(roster.on.get(adapter_of(group.digest), ()), most)])]


def _decks(view: View, policy: Policy) -> list[WorkerView]:
    """Those with the batches that have most time."""
    names = heapq.nlargest(policy.workers_most, view.roster.decks.items(), key=itemgetter(1))
    return [view.roster.workers[name] for name, _ in names]


def _best(view: View, group: Group, now: float, decks: Sequence[WorkerView]) -> Recall | None:
    """On the worker on which it then begins first."""
    found = []
    for worker in decks:
        given_up = _given_up(view, worker, group, now)
        if given_up is not None:
            found.append((*given_up, worker.name))
    if not found:
        return None
    begins, batches, name = min(found)
    why = f"due in {(group.due - now) / 1000:.1f} s, it begins in {begins / 1000:.1f} s where what has not begun makes room"
    return Recall(name, batches, group.digest, why)


def _given_up(view: View, worker: WorkerView, group: Group, now: float) -> tuple[float, tuple[str, ...]] | None:
    """The fewest batches, those with most time first, without whose waiting jobs the group begins in time, and in how many ms it does; None
    where that is not to be had."""
    here = group.rank + round(TICKS * _switch_ms(worker, group))
    able = sorted((held for held in worker.held if held.waiting and TICKS * held.due > here), key=lambda held: -held.due)
    kept, batches = list(worker.held), []
    for held in able:
        kept.remove(held)
        if held.jobs > held.waiting:
            kept.append(replace(held, jobs=held.jobs - held.waiting))
        batches.append(held.batch)
        begins = _begins(view, worker, kept, group)
        if begins <= group.due - now:
            jobs = min(group.jobs, 2 * worker.costs.width)
            back = begins + worker.costs.batch_ms(jobs, view.groups.scale.work, "hot")  # when there is place for what is given up
            return (begins, tuple(batches)) if now + back <= held.due else None  # the others have more time
    return None


def _begins(view: View, worker: WorkerView, held: Iterable[Held], group: Group) -> float:
    """How long, ms, until a job of the group would begin on a worker that has these batches: it needs a hand, and then a place."""
    loads: dict[str, int] = defaultdict(int)
    for batch in held:
        loads[batch.digest] += batch.jobs
    costs, work = worker.costs, view.groups.scale.work
    if adapter_of(group.digest) in loads or len(loads) < view.roster.adapters_at_once:
        hand = 0.0
    else:
        hand = min(costs.batch_ms(jobs, work, "hot") for jobs in loads.values())
    before = sum(loads.values()) - costs.width + 1
    return max(hand, before * costs.job_ms(work)) + _switch_ms(worker, group)


def _switch_ms(worker: WorkerView, group: Group) -> float:
    return worker.costs.switch_ms[worker.temperature(group.digest)]
