"""Global batches: which rows of a mixture make one optimizer step, a function of seeds and lengths alone."""

import random
from collections import Counter, deque
from collections.abc import Iterator
from itertools import count
from typing import Literal, NamedTuple

from cfsd.errors import BadInput

Refresh = Literal["cycle", "once", "fresh"]


class GlobalBatch(NamedTuple):
    """Positions in the mixture of the rows of one optimizer step."""

    target: list[int]
    rehearsal: list[int]
    views: list[int]  # how often each rehearsal row was seen before


def plan_batches(
    sources: list[str], lengths: list[int], *, target_rows: int, rehearsal_tokens: int, epochs: int, seed: int,
    refresh: Refresh = "cycle",
) -> list[GlobalBatch]:  # fmt: skip
    """Return the global batches of a whole training, a function of its arguments alone.

    Each epoch passes over the target in a new order; rehearsal rows cycle in theirs, each batch taking
    whole rows while they fit in `rehearsal_tokens` (0: none), none of them twice: of a corpus smaller than a batch,
    all. `lengths` are supervised tokens per row.
    `refresh` once: each epoch sees the first one's rehearsal rows; fresh: no row comes twice.
    Raises BadInput when fresh rows run out.
    """
    target = [i for i, source in enumerate(sources) if source == "target"]
    rehearsal = [i for i, source in enumerate(sources) if source != "target"]
    steps_per_epoch = -(-len(target) // target_rows)
    steps = _rehearsal_of(rehearsal, lengths, rehearsal_tokens, seed)
    rehearsed = [next(steps) for _ in range(steps_per_epoch * (1 if refresh == "once" else epochs))]
    views: Counter[int] = Counter()
    plan: list[GlobalBatch] = []
    for epoch in range(epochs):
        order = _shuffled(target, f"target {seed} {epoch}")
        for first in range(0, len(order), target_rows):
            rows = rehearsed[len(plan) % len(rehearsed)]
            seen = [views[i] for i in rows]
            views.update(rows)
            plan.append(GlobalBatch(order[first : first + target_rows], rows, seen))
    if refresh == "fresh" and max(views.values(), default=1) > 1:
        raise BadInput(
            f"the corpus has {len(rehearsal)} rows, but {len(plan)} steps of {rehearsal_tokens} rehearsal tokens take "
            f"about {sum(views.values())}, and no row may come twice; raise generate.rows or lower mix.rehearsal_tokens"
        )
    return plan


def _rehearsal_of(rows: list[int], lengths: list[int], max_tokens: int, seed: int) -> Iterator[list[int]]:
    """Yield the rehearsal rows of step after step, for ever. No step has a row twice: a small corpus ends it early.

    Where one turn of the cycle ends within a step, rows that the step has had already wait for the next one.
    """
    stream, waiting = _cycle(rows, f"rehearsal {seed}"), deque[int]()
    while True:
        taken: dict[int, None] = {}
        used, passed = 0, list[int]()
        while max_tokens and len(taken) < len(rows):
            row = waiting.popleft() if waiting else next(stream)
            if row in taken or (taken and used + lengths[row] > max_tokens):
                passed.append(row)
                if row not in taken:
                    break
            else:
                taken[row] = None
                used += lengths[row]
        waiting.extendleft(reversed(passed))
        yield list(taken)


def _shuffled(rows: list[int], seed: str) -> list[int]:
    return random.Random(seed).sample(rows, len(rows))


def _cycle(rows: list[int], seed: str) -> Iterator[int]:
    for turn in count():
        yield from _shuffled(rows, f"{seed} {turn}")
