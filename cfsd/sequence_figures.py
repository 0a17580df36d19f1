"""What was kept over several targets, joined from the artifacts of their stages."""

from collections.abc import Mapping, Sequence

import numpy as np

from cfsd.artifact import Artifact, Store
from cfsd.continual import Continual, Stability, continual, stability
from cfsd.forgetting import BenchmarkForgetting, difference_per_token
from cfsd.summary import Trail, benchmark_of, table

Scored = Mapping[tuple[int, str], Artifact]  # (stage, target) -> held-out responses; stage 0 is the base


def kept_of_targets(store: Store, targets: Sequence[str], scored: Scored) -> Continual:
    """Return the R matrix of held-out losses, in nats per token, and what is read from it."""
    last = len(targets)
    losses = [[float(str(scored[stage, name].facts["loss"])) for name in targets] for stage in range(last + 1)]
    changes = []
    for stage, name in enumerate(targets[:-1], 1):
        own, final = (table(store, scored[at, name], "responses") for at in (stage, last))
        counts = own["count"].to_numpy(float)
        changes.append(difference_per_token(own["nll"].to_numpy(), final["nll"].to_numpy(), counts, seed=0))
    return continual(targets, np.array(losses), higher_is_better=False, unit="nats/token", changes=changes)


def kept_of_benchmarks(store: Store, trails: Sequence[Trail]) -> list[Stability]:
    """Return how each benchmark of the first base held through the stages that `trails` are of."""
    return [
        stability([_since_the_base(store, trails[0], trail, n) for trail in trails])
        for n in trails[0].before.benchmarks
    ]


def _since_the_base(store: Store, first: Trail, trail: Trail, name: str) -> BenchmarkForgetting:
    return benchmark_of(store, trail.model_copy(update={"before": first.before}), name)
