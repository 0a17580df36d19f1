"""The next token's distribution under a model: log-probabilities, and what of it is stored.

B rows, V vocabulary, K likeliest, M samples of the rest.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfsd.model.inversion import sample_tokens

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
    """The K likeliest tokens of each position, likeliest first, the log of what all others have together, M of those.

    ids [tokens, K] int32, logprobs [tokens, K] float32, rest [tokens] float32, in nats; `tail_ids` [tokens, M] int32
    are sampled from the rest in proportion to its probabilities, `tail_logprobs` [tokens, M] float32 are under the
    whole distribution. Where nothing was predicted, and for samples where there is no rest, ids are 0 and the others
    nan.
    """

    ids: Any
    logprobs: Any
    rest: Any
    tail_ids: Any
    tail_logprobs: Any


def likeliest(distribution: Distribution, count: int, points_BM: Tensor) -> Top:
    """Return the `count` likeliest tokens of B rows, and samples of the rest. Changes `distribution.probs_BV`.

    The samples are where the rest's cumulative probabilities reach `points_BM` (float64, in [0, 1]). The rest is
    summed up from its own members: one minus the others would be rounding noise.
    """
    ids_BK = _top_ids(distribution.logits_BV, min(count, distribution.logits_BV.shape[1]))
    outside_BV = distribution.probs_BV.scatter_(1, ids_BK, 0.0)
    rest_B = outside_BV.sum(-1).log()
    tail_BM = sample_tokens(outside_BV, points_BM) if points_BM.shape[1] else points_BM.long()
    none_B1 = (rest_B == -torch.inf)[:, None]
    tail_logprobs_BM = distribution.logprobs(tail_BM).masked_fill(none_B1, torch.nan)
    return Top(ids_BK, distribution.logprobs(ids_BK), rest_B, tail_BM.masked_fill(none_B1, 0), tail_logprobs_BM)


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
