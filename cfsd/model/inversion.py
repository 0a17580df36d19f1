"""Tokens sampled by inverting cumulative probabilities at given numbers. B rows, V vocabulary, M tokens per row."""

import torch
from torch import Tensor

BLOCK = 256  # tokens per partial sum; two short searches in place of a float64 sum over the whole vocabulary


def sample_token(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return one token per row, B, by inverting the cumulative sum of `probs_BV` at `uniform_B` (float64)."""
    return sample_tokens(probs_BV, uniform_B[:, None])[:, 0]


def sample_tokens(probs_BV: Tensor, uniform_BM: Tensor) -> Tensor:
    """Return M tokens per row, by inverting the cumulative sum of `probs_BV` at `uniform_BM` (float64).

    First the block, then the token in it, so that the float64 sums that rare tokens need run over BLOCK numbers:
    a float64 sum over 49,152 took a sixth of a whole decoding step.
    """
    sums_BN = _block_sums(probs_BV).double().cumsum(-1)
    point_BM = uniform_BM * sums_BN[:, -1:]
    block_BM = _first_above(sums_BN, point_BM)
    before_BM = torch.where(block_BM > 0, sums_BN.gather(1, (block_BM - 1).clamp(min=0)), 0.0)
    share_BM = (point_BM - before_BM) / (sums_BN.gather(1, block_BM) - before_BM)
    place_BMC = block_BM[:, :, None] * BLOCK + torch.arange(BLOCK, device=probs_BV.device)
    inside_BMC = probs_BV.gather(1, place_BMC.clamp(max=probs_BV.shape[1] - 1).flatten(1)).view(place_BMC.shape)
    inside_BMC = inside_BMC.double().masked_fill(place_BMC >= probs_BV.shape[1], 0.0).cumsum(-1)
    # the block's float32 sum may differ from the float64 one in the eighth digit: a share of it never falls outside
    inner_BM1 = _first_above(inside_BMC, share_BM[:, :, None] * inside_BMC[:, :, -1:])
    return block_BM * BLOCK + inner_BM1[:, :, 0]


def _block_sums(probs_BV: Tensor) -> Tensor:
    whole = probs_BV.shape[1] // BLOCK * BLOCK
    parts = [probs_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    if whole < probs_BV.shape[1]:
        parts.append(probs_BV[:, whole:].sum(-1, keepdim=True))
    return torch.cat(parts, 1)


def _first_above(cumulative_XN: Tensor, point_XM: Tensor) -> Tensor:
    """Return the first place whose sum exceeds the point, never one that adds nothing."""
    last_X1 = (cumulative_XN < cumulative_XN[..., -1:]).sum(-1, keepdim=True)  # where the sum is complete
    return torch.minimum(torch.searchsorted(cumulative_XN, point_XM, right=True), last_X1)
