"""The guarded figures of one run, read from its score tables document by document, so that they can be paired later."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cfsd.artifact import Store
from cfsd.quantities import FRACTION, NATS
from cfsd.spec import digest_of
from cfsd.summary import Trail, first_scores, table


class Measured(NamedTuple):
    """One figure of one run: sum(sums)/sum(counts), document by document in a fixed order."""

    unit: str
    higher_is_better: bool
    zero_or_one: bool
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    documents: str  # digest of which documents these are
    correction: float | None = None  # 1/(1 - chance) where it counts for the mean

    @property
    def value(self) -> float:
        """Return the figure."""
        return float(self.sums.sum() / self.counts.sum())


def measured(store: Store, trail: Trail) -> dict[str, Measured]:
    """Return the guarded figures of one run by name: target_gain, probe_kl, forgetting of every benchmark."""
    from cfsd.rows import read_rows  # imports pyarrow

    found: dict[str, Measured] = {}
    if trail.before.target and trail.after.target:
        base, tuned = (table(store, t, "responses") for t in (trail.before.target, trail.after.target))
        rows = trail.artifacts["target"].content  # not of the scores: their last bits are another machine's
        gains = base["nll"].to_numpy(float) - tuned["nll"].to_numpy(float)
        counts = base["count"].to_numpy(float)
        found["target_gain"] = Measured(NATS, True, False, gains, counts, _digest(rows, counts))
    if trail.after.probe:
        kl = table(store, trail.after.probe, "divergence")
        counts, sums = (kl[column].to_numpy(float) for column in ("count", "kl"))
        probe = read_rows(store.path(trail.artifacts["probe"]), "corpus", ["token_ids"])  # again without its floats
        found["probe_kl"] = Measured(NATS, False, False, sums, counts, _digest(probe, counts))
    return found | {f"forgetting/{name}": _benchmark(store, trail, name) for name in trail.before.benchmarks}


def _benchmark(store: Store, trail: Trail, name: str) -> Measured:
    from cfsd.forgetting import Measure, paired_by_document

    before, after = trail.before.benchmarks[name], trail.after.benchmarks[name]
    measure = Measure(**{field: before.facts[field] for field in Measure.model_fields})
    pairs = paired_by_document(*(first_scores(store, artifact) for artifact in (before, after)))
    base, tuned, counts = (pairs[column].to_numpy(float) for column in ("base", "tuned", "count"))
    unit = {"binary": FRACTION, "perplexity": NATS}.get(measure.kind, measure.metric)
    within = all(scores.min() >= 0 and scores.max() <= 1 for scores in (base, tuned))
    averaged = measure.chance is not None and measure.higher_is_better and within
    return Measured(
        unit=unit,
        higher_is_better=False,  # forgetting is worse where it is more
        zero_or_one=measure.kind == "binary",
        sums=base - tuned if measure.higher_is_better else tuned - base,
        counts=counts,
        documents=_digest(pairs["doc_hash"].tolist(), counts),
        correction=1 / (1 - measure.chance) if averaged and measure.chance is not None else None,
    )


def _digest(documents: Any, counts: NDArray[np.float64]) -> str:
    return digest_of([documents, counts.tolist()])


def mean_parts(runs: Sequence[dict[str, Measured]]) -> dict[str, float]:
    """Return the weight of every benchmark in the mean of chance-corrected forgetting."""
    corrections = [
        {name: found.correction for name, found in run.items() if found.correction is not None} for run in runs
    ]
    known = set.intersection(*map(set, corrections)) if corrections else set()
    return {name: correction / len(known) for name, correction in corrections[0].items() if name in known}


def mean_value(run: dict[str, Measured], parts: dict[str, float]) -> float:
    """Return the mean forgetting of one run, as a fraction."""
    return sum(weight * run[name].value for name, weight in parts.items())
