"""Micro-batches: the rows of one global batch as padded tensors that one forward pass holds each.

B rows, T tokens, M rehearsal tokens that count, K stored likeliest tokens.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cfsd.model.batching import arrange, pad
from cfsd.train.batches.stored_distributions import StoredDistributions
from cfsd.train.loss.token_loss import Stored


class Row(NamedTuple):
    """One row of the mixture."""

    source: str
    token_ids: list[int]
    supervised: list[bool]
    weight: float
    weights: Sequence[float] | None = None  # of each token, on top of the row's; None: all 1
    corpus_row: int | None = None  # the row's number in the corpus, or among the target's rows; None: not known

    def is_target(self) -> bool:
        """Say whether the row belongs to the target's loss."""
        return self.source == "target"


class MicroBatch(NamedTuple):
    """Rows that one forward pass holds. Entry t belongs to token t, which token t-1 predicts."""

    token_ids_BT: Tensor
    coefficient_BT: Tensor  # what the token's loss is multiplied by, the rehearsal's without lambda; 0: not in the loss
    target_BT: Tensor  # bool: the token belongs to the target's loss
    fresh_BT: Tensor  # bool: of a rehearsal row that is seen for the first time
    real_BT: Tensor  # bool: not padding
    stored: Stored | None = None  # the base's distribution at the rehearsal tokens that count, row by row
    stored_target: Stored | None = None  # at the target's

    def without_loss(self) -> "MicroBatch":
        """Return the micro-batch with no token that counts."""
        stored, of_target = (None if s is None else s.part(slice(0, 0)) for s in (self.stored, self.stored_target))
        return self._replace(
            coefficient_BT=torch.zeros_like(self.coefficient_BT), stored=stored, stored_target=of_target
        )


def micro_batches_of(
    rows: Sequence[Row],
    max_tokens: int,
    *,
    fresh: Sequence[bool] | None = None,
    distributions: StoredDistributions | None = None,
    of_target: StoredDistributions | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[MicroBatch]:
    """Return the micro-batches of one global batch, of `world` ranks those of one: as many as every other rank has.

    Their losses add up to the batch's loss, however they are cut: each source's loss is its mean per token over the
    global batch. `fresh` says which rows are seen for the first time; `distributions` holds the base's distribution at
    each rehearsal row, by its `corpus_row`, `of_target` that at each row of the target.
    """
    totals: Counter[bool] = Counter()
    for row in rows:
        totals[row.is_target()] += sum(row.supervised)
    seen = fresh or [False] * len(rows)
    groups = [
        [(rows[i], seen[i]) for i in group]
        for group in shared_out([len(row.token_ids) for row in rows], max_tokens, world)
    ]
    share = [_micro_batch(group, totals, distributions, of_target) for group in groups[rank::world]]
    if len(share) < -(-len(groups) // world):  # ranks wait for each other at every micro-batch
        share.append(_micro_batch(groups[-1], totals, distributions, of_target).without_loss())  # of the shortest rows
    return share


def shared_out(lengths: Sequence[int], max_tokens: int, world: int) -> list[list[int]]:
    """Return positions grouped as `arrange` does, in groups so small that each of `world` ranks has work.

    Ranks take as many turns as groups of `max_tokens` need, and the groups are as small as these turns allow: in
    groups of `max_tokens` a batch of few rows would be the first rank's alone.
    """
    groups = arrange(lengths, max_tokens)
    most = -(-len(groups) // world) * world
    if world == 1:
        return groups
    sizes = range(max(lengths), max_tokens + 1)
    smallest = bisect_left(sizes, True, key=lambda size: len(arrange(lengths, size)) <= most)
    return arrange(lengths, sizes[smallest]) if smallest < len(sizes) else groups


def _micro_batch(
    group: Sequence[tuple[Row, bool]], totals: Counter[bool], distributions: StoredDistributions | None,
    of_target: StoredDistributions | None,
) -> MicroBatch:  # fmt: skip
    """Return rows, each with whether it is seen for the first time, as one micro-batch."""
    members = [row for row, _ in group]
    coefficients = [_coefficients(row, totals[row.is_target()]) for row in members]
    target = [[row.is_target() and counted for counted in row.supervised] for row in members]
    first = [[fresh and not row.is_target()] * len(row.token_ids) for row, fresh in group]
    real = [[True] * len(row.token_ids) for row in members]
    token_ids_BT, coefficient_BT = pad([row.token_ids for row in members]), pad(coefficients, torch.float64)
    target_BT, fresh_BT, real_BT = (pad(marks, torch.bool) for marks in (target, first, real))
    stored, learned = (
        known.at([
            (row.corpus_row, row.token_ids, [c != 0 for c in coefficient])
            for row, coefficient in zip(members, coefficients, strict=True) if row.is_target() == of
        ]) if known else None
        for known, of in ((distributions, False), (of_target, True))
    )  # fmt: skip
    return MicroBatch(token_ids_BT, coefficient_BT, target_BT, fresh_BT, real_BT, stored, learned)


def _coefficients(row: Row, total: int) -> list[float]:
    weights = row.weights if row.weights is not None else [1.0] * len(row.token_ids)
    return [row.weight * w / total if counted else 0.0 for counted, w in zip(row.supervised, weights, strict=True)]
