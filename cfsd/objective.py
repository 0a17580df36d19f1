"""The loss: token-mean over the target + weight x token-mean over the rehearsal, each over the global batch.

B rows, T tokens, V vocabulary.

Source: Bansal and Sanghavi 2025, arXiv:2505.13811. Differs: the paper sums over whole strings; a token mean with a
weight of its own does not change with lengths or batch layout, lambda_string = lambda x mean response tokens
/ mean rehearsal tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cfsd.microbatch import arrange, pad


class Pack(NamedTuple):
    """Rows that one forward pass holds. Entry t belongs to token t, which token t-1 predicts."""

    token_ids_BT: Tensor
    coefficient_BT: Tensor  # what the token's -log p is multiplied by; 0: not in the loss
    target_BT: Tensor  # bool: the token belongs to the target's loss


class Losses(NamedTuple):
    """The loss of a pack, to be differentiated, and plain sums of -log p in nats, to be looked at."""

    loss: Tensor
    target_nll: Tensor
    rehearsal_nll: Tensor


class Row(NamedTuple):
    """One row of the mixture."""

    source: str
    token_ids: list[int]
    supervised: list[bool]
    weight: float


def packs_of(rows: Sequence[Row], rehearsal_weight: float, most_tokens: int) -> list[Pack]:
    """Return the packs of one global batch. Their losses add up to the batch's loss, however they are cut."""
    counts = {True: 0, False: 0}
    for row in rows:
        counts[row.source == "target"] += sum(row.supervised)
    weights = {True: 1.0, False: rehearsal_weight}
    packs = []
    for group in arrange([len(row.token_ids) for row in rows], most_tokens):
        members = [rows[i] for i in group]
        coefficients = []
        for row in members:
            part = row.source == "target"
            scale = row.weight * weights[part] / counts[part] if counts[part] else 0.0
            coefficients.append([scale if counted else 0.0 for counted in row.supervised])
        marks = [[row.source == "target" and counted for counted in row.supervised] for row in members]
        token_ids = pad([row.token_ids for row in members])
        packs.append(Pack(token_ids, pad(coefficients, torch.float64), pad(marks, torch.bool)))
    return packs


def losses(model: nn.Module, pack: Pack) -> Losses:
    """Return the losses of `pack`; logits exist only where some row's next token counts."""
    wanted_BT = pack.coefficient_BT[:, 1:] != 0
    columns = wanted_BT.any(0).nonzero()[:, 0]
    output: Any = model(input_ids=pack.token_ids_BT, use_cache=False, logits_to_keep=columns)
    mask_BK = wanted_BT[:, columns]
    logits_NV = output.logits[mask_BK]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    next_N = pack.token_ids_BT[:, 1:][:, columns][mask_BK]
    nll_N = nn.functional.cross_entropy(logits_NV, next_N, reduction="none")
    coefficient_N = pack.coefficient_BT[:, 1:][:, columns][mask_BK].to(nll_N.dtype)
    target_N = pack.target_BT[:, 1:][:, columns][mask_BK]
    plain_N = nll_N.detach()
    return Losses((coefficient_N * nll_N).sum(), plain_N[target_N].sum(), plain_N[~target_N].sum())
