"""The guarded figures of one run, read from its score tables document by document, so that they can be paired later."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfsd.baseline.file import Measured
from cfsd.generate.spec import UNPROMPTED
from cfsd.report.run_record import RunRecord, role_of
from cfsd.report.scores import first_scores, loss_fall, metric_of, response_pair, table
from cfsd.spec import digest_of
from cfsd.stages import CHAT
from cfsd.statistics.figures import FRACTION, NATS
from cfsd.statistics.forgetting import chance_correction, reach_of, worsening
from cfsd.store.artifact import Store
from cfsd.store.tables import read_rows


def measured(store: Store, run_record: RunRecord) -> dict[str, Measured]:
    """Return the guarded figures of one run by name: target_gain, probe_kl, chat_kl, forgetting of every benchmark."""
    before, after, figures = run_record.before, run_record.after, {}
    if before.target and after.target:
        gains, counts = loss_fall(*response_pair(store, before.target, after.target))
        rows = run_record.artifacts["target"].content  # not of the scores: their last bits are another machine's
        figures["target_gain"] = Measured(NATS, True, 0, gains, counts, _digest(rows, counts))
    for name, scores, mode in (("probe_kl", after.probe, UNPROMPTED), ("chat_kl", after.chat, CHAT)):
        kl: Any = table(store, scores, "divergence") if scores else ()
        if len(kl):  # of chats none may have an answer
            counts, sums = (kl[column].to_numpy(float) for column in ("count", "kl"))
            place = store.path(run_record.artifacts[role_of(mode)])
            sampled = read_rows(place, "corpus", ["token_ids"])  # without its floats, for the same reason
            figures[name] = Measured(NATS, False, 0, sums, counts, _digest(sampled, counts))
    return figures | {f"forgetting/{name}": _benchmark(store, run_record, name) for name in before.benchmarks}


def _benchmark(store: Store, run_record: RunRecord, name: str) -> Measured:
    scores = [side.benchmarks[name] for side in (run_record.before, run_record.after)]
    metric, pairs = metric_of(*scores).paired(*(first_scores(store, artifact) for artifact in scores))
    base, tuned, counts = (pairs[column].to_numpy(float) for column in ("base", "tuned", "count"))
    return Measured(
        unit={"binary": FRACTION, "perplexity": NATS}.get(metric.kind, metric.metric),
        higher_is_better=False,  # forgetting is worse where it is more
        reach=reach_of(metric, base, tuned) or 0.0,
        sums=worsening(metric, base, tuned),
        counts=counts,
        documents=_digest(pairs["doc_hash"].tolist(), counts),
        correction=chance_correction(metric, base, tuned),
        metric=metric.metric,
    )


def _digest(documents: Any, counts: NDArray[np.float64]) -> str:
    return digest_of([documents, counts.tolist()])
