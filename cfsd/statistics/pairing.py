"""Pairing: scores of two models joined document by document, or refused with the documents named."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

KEY = ["filter", "doc_id"]
COLUMNS = [*KEY, "doc_hash", "value", "count"]


def paired_by_document(before: pd.DataFrame, after: pd.DataFrame, *, common: bool = False) -> pd.DataFrame:
    """Return one row per document, sorted: `filter`, `doc_id`, `doc_hash`, `count`, `base`, `tuned`.

    `common`: documents on one side only are left out, as of a metric that does not apply to every answer.

    Raises: ValueError naming the documents: missing columns, no rows, a document repeated, on one side only, or with
        another hash or count on the other side, a value that is not finite.
    """
    sides = [_checked(side, frame) for side, frame in (("base", before), ("tuned", after))]
    joined = sides[0].merge(sides[1], on=KEY, how="outer", suffixes=("_base", "_tuned"), indicator=True)
    if common and (joined["_merge"] == "both").any():
        joined = joined[joined["_merge"] == "both"]
    for side, only in (("base", "left_only"), ("tuned", "right_only")):
        refuse(joined, joined["_merge"] == only, f"scored for the {side} model only; score both on the same")
    changed = joined["doc_hash_base"] != joined["doc_hash_tuned"]
    refuse(joined, changed, "different in text (doc_hash) for base and tuned; score both on the same data")
    recounted = joined["count_base"] != joined["count_tuned"]
    refuse(joined, recounted, "of different count for base and tuned; their figures have different units")
    names = {"doc_hash_base": "doc_hash", "count_base": "count", "value_base": "base", "value_tuned": "tuned"}
    joined = joined.rename(columns=names)[[*KEY, "doc_hash", "count", "base", "tuned"]]
    return joined.sort_values(KEY, ignore_index=True)


def _checked(side: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns needed, numbers as floats."""
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing or frame.empty:
        lack = f"no column {', '.join(missing)}" if missing else "no documents"
        raise ValueError(f"the scores of the {side} model have {lack}; one row per document is needed")
    refuse(frame, frame.duplicated(KEY), f"more than once among the scores of the {side} model")
    checked = frame[COLUMNS].copy()
    for column in ("value", "count"):
        numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        refuse(frame, ~np.isfinite(numbers), f"with a {column} that is not a finite number ({side} model)")
        checked[column] = numbers
    return checked


def refuse(frame: pd.DataFrame, bad: ArrayLike, reason: str) -> None:
    """Raise if any row is `bad`, naming the first five."""
    rows = frame.loc[np.asarray(bad, dtype=bool), KEY]
    if rows.empty:
        return
    named = ", ".join(f"{doc_id} ({filter_})" for filter_, doc_id in rows.head(5).itertuples(index=False))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    raise ValueError(f"{len(rows)} of {len(frame)} documents {reason}: {named}{more}")
