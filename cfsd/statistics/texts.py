"""How much a model forgot of the user's own texts, from likelihoods before and after, paired by document."""

from typing import Any

import pandas as pd

from cfsd.statistics.figures import NATS, mean_per_token
from cfsd.statistics.units import Units

NATS_PER_BYTE = "nats/byte"
UNITS = {"per_token": ("tokens", NATS), "per_byte": ("bytes", NATS_PER_BYTE)}


def text_forgetting(name: str, before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    """Return, per token and per byte, the negative log-likelihood before and after, and by how much it rose.

    One row per document: `row_id`, `nll` (a sum in nats), `tokens`, `bytes`. Positive forgetting is worse.

    Raises: ValueError for other documents, tokens or bytes after than before, or a number that is not finite.
    """
    same = ["row_id", "tokens", "bytes"]
    if not before[same].equals(after[same]):
        raise ValueError(f"text {name}: the documents before and after differ; measure both models on the same ones")
    figures: dict[str, Any] = {
        "documents": len(before),
        "tokens": int(before["tokens"].sum()),
        "bytes": int(before["bytes"].sum()),
    }
    for unit, (column, label) in UNITS.items():
        counts = before[column].to_numpy(float)
        rise = mean_per_token(after["nll"].to_numpy() - before["nll"].to_numpy(), counts, seed=0)
        figures[unit] = {
            "base": float(before["nll"].sum() / counts.sum()),
            "tuned": float(after["nll"].sum() / counts.sum()),
            "forgetting": rise.model_copy(update={"unit": label}).model_dump(),
        }
    return figures


def text_units(before: pd.DataFrame, after: pd.DataFrame) -> Units:
    """Return by how much the loss of each document rose, in nats; positive is worse."""
    names = tuple(":".join(map(str, row)) for row in before[["row_id", "tokens", "bytes"]].itertuples(index=False))
    return Units(names, (after["nll"] - before["nll"]).to_numpy(float), before["tokens"].to_numpy(float))
