"""Score tables of artifacts as data frames, and the one way in which each is read."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cfsd.statistics.figures import FRACTION, Figure, mean_per_token, paired_share_difference
from cfsd.statistics.forgetting import Measure
from cfsd.statistics.units import Units
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import shard_path


def table(store: Store, artifact: Artifact, name: str) -> Any:
    """Return a small table of `artifact` as a pandas DataFrame."""
    return pd.read_parquet(shard_path(store.path(artifact), name, 0))


def first_scores(store: Store, artifact: Artifact) -> Any:
    """Return a benchmark's scores, with the answers as lm-eval's first filter reads them, as a pandas DataFrame."""
    filters: Any = artifact.metadata["filters"]
    rows = table(store, artifact, "scores")
    return rows[rows["filter"] == filters[0]]


def metric_of(before: Artifact, after: Artifact) -> Measure:
    """Return what is known of the metric of a benchmark's scores, which are of the models before and after."""
    known = {name: value for name, value in before.metadata.items() if name in Measure.model_fields}
    if "left_out" in after.metadata:  # a log says so only of a model with an answer to which the metric does not apply
        known.setdefault("left_out", 0)
    if known["kind"] == "perplexity":
        known["chance"] = None  # older scores may have one that was meant for another metric
    return Measure.model_validate(known)


def loss_fall(base: pd.DataFrame, tuned: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return by how many nats the loss of each held-out response fell, and how many tokens the response has."""
    return base["nll"].to_numpy(float) - tuned["nll"].to_numpy(float), base["count"].to_numpy(float)


def target_gain(base: pd.DataFrame, tuned: pd.DataFrame) -> Figure:
    """Return by how much the loss on held-out responses fell, in nats per token; positive is learned."""
    return mean_per_token(*loss_fall(base, tuned), seed=0)


def accuracy_gain(base: pd.DataFrame, tuned: pd.DataFrame) -> Figure:
    """Return by how much the share of held-out responses that greedy decoding writes exactly rose, paired by row."""
    return paired_share_difference(*((rows["correct"] == rows["count"]).to_numpy() for rows in (base, tuned)))


def gain_units(base: pd.DataFrame, tuned: pd.DataFrame) -> Units:
    """Return the target gain response by response."""
    return Units(_rows(base), *loss_fall(base, tuned))


def accuracy_units(base: pd.DataFrame, tuned: pd.DataFrame) -> Units:
    """Return the accuracy gain response by response: 1 where it is now written exactly, -1 where it was."""
    before, after = ((rows["correct"] == rows["count"]).to_numpy(float) for rows in (base, tuned))
    return Units(_rows(base), after - before, np.ones(len(base)), FRACTION, reach=1.0)


def _rows(responses: pd.DataFrame) -> tuple[str, ...]:
    return tuple(map(str, responses["row_id"]))


def response_pair(store: Store, before: Artifact, after: Artifact) -> Any:
    """Return the held-out responses as two models score them: two data frames."""
    return table(store, before, "responses"), table(store, after, "responses")
