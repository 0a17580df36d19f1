"""FLOW: a target row weighs more the better the base predicts it already. R rows, N their response tokens in a row.

Source: Sanyal, Prairie, Das, Kavis and Sanghavi 2025, arXiv:2502.02797: w_i = exp(-f_i / tau), f_i the base's mean
loss on the response of row i, tau the median of f. Differs: the weights are scaled, so that the mean weight of a
response token is 1 and a step is as long as without them; and the loss is a mean over tokens unless
`flow_average` is "row". Then rows of one global batch have equal shares, as in the paper; the whole batch is still
divided by its number of response tokens, so that a batch of short rows takes a longer step than one of long rows.
Weights per token are our addition.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cfsd.errors import BadInput
from cfsd.mix.spec import MixSpec
from cfsd.store.tables import batches

Array = np.ndarray[Any, Any]


class Weights(NamedTuple):
    """Weights of the target's training rows in their order, float32; rows weigh 1 where tokens are weighed."""

    tau: float  # nats per token
    ids_R: Array
    row_R: Array
    token_N: Array | None
    ends_R: Array  # [R + 1]: tokens ends[i] to ends[i + 1] are row i's


def flow_weights(losses: Path, spec: MixSpec) -> Weights:
    """Return the weights that the `losses` table gives: their sum over response tokens is the number of these.

    Raises BadInput when the median loss, by which all are divided, is not above 0.
    """
    per_token = spec.flow == "token"
    columns = ["row_id", "nll", "count", *(["token_nll"] if per_token else [])]
    table = pa.Table.from_batches(batches(losses, "losses", columns))
    ids_R, nll_R, count_R = (table[name].to_numpy() for name in columns[:3])
    ends_R = np.r_[0, count_R].cumsum()
    loss = pc.list_flatten(table["token_nll"]).to_numpy() if per_token else nll_R / count_R
    tau = _checked(float(np.median(loss)), spec.flow)
    weight = np.exp(loss / -tau)
    if spec.flow_average == "row":  # rows of a batch have equal shares, however long they are
        share_R = (1 / count_R).astype(weight.dtype)
        weight *= np.repeat(share_R, count_R) if per_token else share_R
    total = float(weight.sum(dtype=np.float64) if per_token else (weight * count_R).sum())
    weight *= ends_R[-1] / total
    scaled = weight.astype(np.float32)
    if per_token:
        return Weights(tau, ids_R, np.ones(len(ids_R), np.float32), scaled, ends_R)
    return Weights(tau, ids_R, scaled, None, ends_R)


def _checked(tau: float, flow: str) -> float:
    if np.isfinite(tau) and tau > 0:
        return tau
    unit, other = ("token", "sample or off") if flow == "token" else ("row", "off")
    raise BadInput(
        f"mix.flow={flow} divides by the base's median loss per {unit} on the target, which is {tau:g}, but must be "
        f"above 0: the base already writes at least half of them as they are; set mix.flow to {other}, or take a "
        "target that the base does not know"
    )
