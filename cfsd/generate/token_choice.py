"""One token per row, sampled with a random number from the model's probabilities or from a biased version of them.

B rows, V vocabulary, K likeliest.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsd.generate.spec import GenerateSpec
from cfsd.model.distribution import Distribution

BLOCK = 256  # tokens per partial sum; two short searches in place of a float64 sum over the whole vocabulary


def uniforms(seed: int, stream: str, row: int, length: int) -> np.ndarray[Any, Any]:
    """Return `length` numbers in [0, 1) that depend on nothing but the arguments.

    Number t of row r does not depend on the rest of the batch; `stream` differs between probe and corpus.
    """
    key = np.frombuffer(hashlib.sha256(f"{stream} {seed}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row])).random(length)


def sample_token(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return one token per row, B, by inverting the cumulative sum of `probs_BV` at `uniform_B` (float64).

    First the block, then the token in it, so that the float64 sums that rare tokens need run over BLOCK numbers:
    a float64 sum over 49,152 took a sixth of a whole decoding step.
    """
    sums_BN = _block_sums(probs_BV).double().cumsum(-1)
    point_B1 = (uniform_B * sums_BN[:, -1])[:, None]
    block_B1 = _first_above(sums_BN, point_B1)
    before_B1 = torch.where(block_B1 > 0, sums_BN.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    share_B1 = (point_B1 - before_B1) / (sums_BN.gather(1, block_B1) - before_B1)
    place_BC = block_B1 * BLOCK + torch.arange(BLOCK, device=probs_BV.device)
    inside_BC = probs_BV.gather(1, place_BC.clamp(max=probs_BV.shape[1] - 1)).double()
    inside_BC = inside_BC.masked_fill(place_BC >= probs_BV.shape[1], 0.0).cumsum(-1)
    # the block's float32 sum may differ from the float64 one in the eighth digit: a share of it never falls outside
    return (block_B1 * BLOCK + _first_above(inside_BC, share_B1 * inside_BC[:, -1:]))[:, 0]


def _block_sums(probs_BV: Tensor) -> Tensor:
    whole = probs_BV.shape[1] // BLOCK * BLOCK
    parts = [probs_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    if whole < probs_BV.shape[1]:
        parts.append(probs_BV[:, whole:].sum(-1, keepdim=True))
    return torch.cat(parts, 1)


def _first_above(cumulative_BN: Tensor, point_B1: Tensor) -> Tensor:
    """Return the first place whose sum exceeds the point, never one that adds nothing."""
    last_B1 = (cumulative_BN < cumulative_BN[:, -1:]).sum(-1, keepdim=True)  # where the sum is complete
    return torch.minimum(torch.searchsorted(cumulative_BN, point_B1, right=True), last_B1)


def sampled_probs(
    distribution: Distribution, spec: GenerateSpec, barred: Sequence[int] = (), barred_B: Tensor | None = None
) -> Tensor:
    """Return the probabilities, not normalised, that are sampled: the model's own unless `spec` is biased.

    Tokens `barred` cannot be sampled in rows where `barred_B` is true.
    """
    probs_BV = distribution.probs_BV
    if spec.temperature != 1:
        probs_BV = (distribution.logits_BV / spec.temperature).softmax(-1)
    if barred and barred_B is not None and bool(barred_B.any()):
        probs_BV = probs_BV.clone()
        probs_BV[:, list(barred)] = probs_BV[:, list(barred)].masked_fill(barred_B[:, None], 0.0)
    if spec.top_k:
        largest_BK, index_BK = probs_BV.topk(min(spec.top_k, probs_BV.shape[1]))
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, index_BK, largest_BK)
    if spec.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        outside_BV = before_BV >= spec.top_p * sorted_BV.sum(-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(-1)), 0.0)
    return probs_BV
