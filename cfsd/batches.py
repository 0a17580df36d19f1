"""Global batches: which rows of a mixture make one optimizer step, a function of seeds and lengths alone."""

import random
from collections.abc import Iterator
from typing import NamedTuple


class GlobalBatch(NamedTuple):
    """Positions in the mixture of the rows of one optimizer step."""

    target: list[int]
    rehearsal: list[int]


def plan_batches(
    sources: list[str], lengths: list[int], *, target_rows: int, rehearsal_tokens: int, epochs: int, seed: int
) -> list[GlobalBatch]:
    """Return the global batches of a whole training, a function of its arguments alone.

    Each epoch passes over the target in a new order; rehearsal rows cycle in theirs, each batch taking
    whole rows while they fit in `rehearsal_tokens` (0: none). `lengths` are supervised tokens per row.
    """
    target = [i for i, source in enumerate(sources) if source == "target"]
    rehearsal = [i for i, source in enumerate(sources) if source != "target"]
    stream = _cycle(rehearsal, f"rehearsal {seed}") if rehearsal and rehearsal_tokens else iter(())
    pending = next(stream, None)
    plan = []
    for epoch in range(epochs):
        order = _shuffled(target, f"target {seed} {epoch}")
        for first in range(0, len(order), target_rows):
            drawn: list[int] = []
            used = 0
            while pending is not None and (not drawn or used + lengths[pending] <= rehearsal_tokens):
                drawn.append(pending)
                used += lengths[pending]
                pending = next(stream)
            plan.append(GlobalBatch(order[first : first + target_rows], drawn))
    return plan


def _shuffled(rows: list[int], seed: str) -> list[int]:
    return random.Random(seed).sample(rows, len(rows))


def _cycle(rows: list[int], seed: str) -> Iterator[int]:
    turn = 0
    while True:
        yield from _shuffled(rows, f"{seed} {turn}")
        turn += 1
