"""FLOW: a target row weighs more the better the base predicts it already. R rows, N their response tokens in a row.

Source: Sanyal, Prairie, Das, Kavis and Sanghavi 2025, arXiv:2502.02797: w_i = exp(-f_i / tau), f_i the base's mean
loss on the response of row i, tau the median of f. Differs: the weights are scaled, so that the mean weight of a
response token is 1 and a step is as long as without them; and the loss is a mean over tokens unless
`average` is "row", which is the paper's mean over rows. Weights per token are our addition.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cfsd.errors import BadInput
from cfsd.store.tables import batches

Array = np.ndarray[Any, Any]


class Weights(NamedTuple):
    """Weights of the target's training rows in their order, float32; rows weigh 1 where tokens are weighed."""

    tau: float  # nats per token
    ids_R: Array
    row_R: Array
    token_N: Array | None
    ends_R: Array  # [R + 1]: tokens ends[i] to ends[i + 1] are row i's


def flow_weights(losses: Path, flow: Literal["sample", "token"], average: Literal["token", "row"]) -> Weights:
    """Return the weights that the `losses` table gives: their sum over response tokens is the number of these.

    Raises BadInput when the median loss is 0, which leaves nothing to measure the others by.
    """
    per_token = flow == "token"
    ids_R, nll_R, count_R, nll_N = _read(losses, per_token)
    ends_R = np.concatenate([np.zeros(1, np.int64), count_R.cumsum()])
    loss = nll_N if per_token else nll_R / count_R
    tau = _checked(float(np.median(loss)), flow)
    weight = np.exp(loss / -tau)
    if average == "row":  # every row has the same share, however long it is
        share_R = (1 / count_R).astype(weight.dtype)
        weight *= np.repeat(share_R, count_R) if per_token else share_R
    total = float(weight.sum(dtype=np.float64) if per_token else (weight * count_R).sum())
    weight *= ends_R[-1] / total
    scaled = weight.astype(np.float32)
    if per_token:
        return Weights(tau, ids_R, np.ones(len(ids_R), np.float32), scaled, ends_R)
    return Weights(tau, ids_R, scaled, None, ends_R)


def _read(losses: Path, per_token: bool) -> tuple[Array, Array, Array, Array]:
    """Return row ids, losses and counts per row, and losses per token if they are wanted."""
    names = ["row_id", "nll", "count"]
    parts = [
        [batch[name].to_numpy() for name in names]
        + [batch["token_nll"].flatten().to_numpy() if per_token else np.zeros(0, np.float32)]
        for batch in batches(losses, "losses", [*names, "token_nll"] if per_token else names)
    ]
    ids_R, nll_R, count_R, nll_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ids_R, nll_R, count_R, nll_N


def _checked(tau: float, flow: str) -> float:
    if np.isfinite(tau) and tau > 0:
        return tau
    unit, other = ("token", "sample or off") if flow == "token" else ("row", "off")
    raise BadInput(
        f"mix.flow={flow} divides by the base's median loss per {unit} on the target, which is {tau:g}, but must be "
        f"above 0: the base already writes at least half of them as they are; set mix.flow to {other}, or take a "
        "target that the base does not know"
    )
