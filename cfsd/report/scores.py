"""Score tables of artifacts as data frames."""

from typing import Any

import pandas as pd

from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import shard_path


def first_scores(store: Store, artifact: Artifact) -> Any:
    """Return a benchmark's scores, with the answers as lm-eval's first filter reads them, as a pandas DataFrame."""
    metadata: dict[str, Any] = artifact.metadata
    rows = table(store, artifact, "scores")
    return rows[rows["filter"] == metadata["filters"][0]]


def table(store: Store, artifact: Artifact, name: str) -> Any:
    """Return a small table of `artifact` as a pandas DataFrame."""
    return pd.read_parquet(shard_path(store.path(artifact), name, 0))
