"""The guarded figures of one run, read from its score tables document by document, so that they can be paired later."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfsd.baseline.file import Measured
from cfsd.report.run_record import RunRecord
from cfsd.report.scores import first_scores, table
from cfsd.spec import digest_of
from cfsd.statistics.figures import FRACTION, NATS
from cfsd.statistics.forgetting import Measure
from cfsd.statistics.pairing import paired_by_document
from cfsd.store.artifact import Store
from cfsd.store.tables import read_rows


def measured(store: Store, run_record: RunRecord) -> dict[str, Measured]:
    """Return the guarded figures of one run by name: target_gain, probe_kl, forgetting of every benchmark."""
    found: dict[str, Measured] = {}
    if run_record.before.target and run_record.after.target:
        base, tuned = (table(store, t, "responses") for t in (run_record.before.target, run_record.after.target))
        rows = run_record.artifacts["target"].content  # not of the scores: their last bits are another machine's
        gains = base["nll"].to_numpy(float) - tuned["nll"].to_numpy(float)
        counts = base["count"].to_numpy(float)
        found["target_gain"] = Measured(NATS, True, False, gains, counts, _digest(rows, counts))
    if run_record.after.probe:
        kl = table(store, run_record.after.probe, "divergence")
        counts, sums = (kl[column].to_numpy(float) for column in ("count", "kl"))
        probe = read_rows(
            store.path(run_record.artifacts["probe"]), "corpus", ["token_ids"]
        )  # again without its floats
        found["probe_kl"] = Measured(NATS, False, False, sums, counts, _digest(probe, counts))
    return found | {f"forgetting/{name}": _benchmark(store, run_record, name) for name in run_record.before.benchmarks}


def _benchmark(store: Store, run_record: RunRecord, name: str) -> Measured:

    before, after = run_record.before.benchmarks[name], run_record.after.benchmarks[name]
    measure = Measure(**{field: before.metadata[field] for field in Measure.model_fields})
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
