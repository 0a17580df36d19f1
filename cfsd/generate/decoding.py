"""The decoding loop: rows that are written together, one position at a time, until the last of them has ended.

B rows, T positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

COMPACT_BELOW = 0.75  # rows that ended are carried along until this share is left: compacting copies the cache


class Writing(Protocol):
    """Rows that are being written; `take` chooses the next token of those in `alive`, and says which have ended."""

    tokens: Tensor  # B x T
    common: int  # positions that all rows have from the start
    shared: int  # positions at the beginning whose tokens are the same in all rows, fewer than `common`
    ended: Tensor  # of each row
    alive: Tensor  # the rows that still go through the model

    def take(self, logits_BV: Tensor) -> Tensor:
        """Write and return the next token of every living row, predicted by these logits."""


def decode(
    model: PreTrainedModel, batch: Writing, cache: Cache, on_step: Callable[[int], object] = lambda step: None
) -> None:
    """Write the rows of `batch` by `model` with an empty `cache`; `on_step` gets the number of positions done."""
    new_BT, step = batch.tokens[:, : batch.common], 0
    if batch.shared:  # read once, for all rows
        model(input_ids=new_BT[:1, : batch.shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(new_BT))
        new_BT = new_BT[:, batch.shared :]
    while True:
        logits_BV = model(input_ids=new_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        last_B = batch.take(logits_BV)
        step += 1
        on_step(step)
        going_B = ~batch.ended[batch.alive]
        count = int(going_B.sum())
        if count == 0:
            return
        if count < COMPACT_BELOW * len(going_B):
            left = going_B.nonzero()[:, 0]
            cache.batch_select_indices(left)
            batch.alive, last_B = batch.alive[left], last_B[left]
        new_BT = last_B[:, None]
