"""The next token's distribution under a model: log-probabilities, and the likeliest tokens with the rest's mass.

B rows, V vocabulary, K likeliest.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

NARROW = 32  # tokens per maximum when the K likeliest are sought: at most K of these blocks hold them


class Distribution(NamedTuple):
    """The next token's distribution: logits B x V, the same as probabilities, and the log of their sum, B."""

    logits_BV: Tensor
    probs_BV: Tensor
    total_B: Tensor

    def logprobs(self, tokens_BN: Tensor) -> Tensor:
        """Return log p of the tokens, B x N, in nats."""
        return self.logits_BV.gather(1, tokens_BN) - self.total_B[:, None]

    def finite(self) -> bool:
        """Return whether every row is a distribution at all."""
        return bool(torch.isfinite(self.total_B).all())


def distribution_of(logits_BV: Tensor) -> Distribution:
    """Return the distribution of `logits_BV`, at least in float32."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    probs_BV = logits_BV.softmax(-1)
    # log of the sum of exponentials, without another pass of exponentials over the vocabulary
    return Distribution(logits_BV, probs_BV, logits_BV.amax(-1) - probs_BV.amax(-1).log())


class Top(NamedTuple):
    """The K likeliest tokens of each position, likeliest first, and the log of what all others have together.

    ids [tokens, K] int32, logprobs [tokens, K] float32, rest [tokens] float32, in nats; where nothing was predicted
    ids are 0 and the others nan.
    """

    ids: Any
    logprobs: Any
    rest: Any


def likeliest(distribution: Distribution, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids B x K, their log-probabilities, and the log of the remaining mass, B. Changes `distribution.probs_BV`.

    The rest is summed up from its own members: one minus the others would be rounding noise.
    """
    ids_BK = _top_ids(distribution.logits_BV, min(count, distribution.logits_BV.shape[1]))
    rest_B = distribution.probs_BV.scatter_(1, ids_BK, 0.0).sum(-1).log()
    return ids_BK, distribution.logprobs(ids_BK), rest_B


def _top_ids(logits_BV: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` largest, sought only in the blocks with the largest maxima."""
    whole = logits_BV.shape[1] // NARROW * NARROW
    if whole < 4 * NARROW * count:
        return logits_BV.topk(count).indices
    maxima_BN = logits_BV[:, :whole].unflatten(1, (-1, NARROW)).amax(-1)
    blocks_BK = maxima_BN.topk(count, sorted=False).indices
    place_BC = (blocks_BK[:, :, None] * NARROW + torch.arange(NARROW, device=logits_BV.device)).flatten(1)
    if whole < logits_BV.shape[1]:
        left = torch.arange(whole, logits_BV.shape[1], device=logits_BV.device)
        place_BC = torch.cat([place_BC, left.expand(len(place_BC), -1)], 1)
    order_BK = logits_BV.gather(1, place_BC).topk(count).indices
    ids_BK: Tensor = place_BC.gather(1, order_BK)
    return ids_BK
