"""Fine-tune the base model on the mixture."""

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.machine import Machine
from cfsd.store.artifact import Artifact, Draft
from cfsd.train.spec import TrainRequest, TrainSpec, Watched
from tasks._stage import stage


def train_model(
    base: Artifact, mixture: Artifact, corpus: Artifact, fisher: Artifact | None, watched: Artifact | None,
    target: Artifact, evaluate: EvaluateSpec, spec: TrainSpec, machine: Machine,
) -> Artifact:  # fmt: skip
    """Return the tuned model. What its settings make no use of is in no key."""
    read = corpus if spec.rehearsal.reads_corpus() else None
    benchmarks = tuple(b for b in evaluate.benchmarks if b.name in spec.watch.benchmarks)
    if watched is None:
        return _train(base, mixture, read, fisher, spec, machine)
    return _train_watched(base, mixture, read, fisher, watched, target, benchmarks, spec, machine)


@stage("train", "model", gpu=True)
def _train(
    draft: Draft, base: Artifact, mixture: Artifact, corpus: Artifact | None, fisher: Artifact | None,
    spec: TrainSpec, machine: Machine,
) -> None:  # fmt: skip
    """Train in a fresh process, from the draft's last whole checkpoint; see `cfsd.train.stage`."""
    _fit(draft, base, mixture, corpus, fisher, None, spec, machine)


@stage("train", "model", gpu=True)
def _train_watched(
    draft: Draft, base: Artifact, mixture: Artifact, corpus: Artifact | None, fisher: Artifact | None,
    sample: Artifact, target: Artifact, benchmarks: tuple[Benchmark, ...], spec: TrainSpec, machine: Machine,
) -> None:  # fmt: skip
    """Train likewise, and measure on the way."""
    watched = Watched(sample=sample, target=target, benchmarks=benchmarks)
    _fit(draft, base, mixture, corpus, fisher, watched, spec, machine)


def _fit(
    draft: Draft, base: Artifact, mixture: Artifact, corpus: Artifact | None, fisher: Artifact | None,
    watched: Watched | None, spec: TrainSpec, machine: Machine,
) -> None:  # fmt: skip
    from cfsd.train.stage import train

    request = TrainRequest(
        home=draft.store.home, base=base, mixture=mixture, corpus=corpus, fisher=fisher, watched=watched, spec=spec,
        machine=machine,
    )  # fmt: skip
    train(request, draft)
    draft.metadata |= base.metadata
