"""Fine-tune the base model on the mixture."""

from typing import Any

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.machine import Machine
from cfsd.stages import TRAIN
from cfsd.store.artifact import Artifact, Draft
from cfsd.train.spec import TrainRequest, TrainSpec, Watched
from tasks._stage import inherited, stage


def train_model(
    base: Artifact, mixture: Artifact, corpus: Artifact, fisher: Artifact | None, sample: Artifact | None,
    target: Artifact, evaluate: EvaluateSpec, spec: TrainSpec, machine: Machine, losses: Artifact | None = None,
    along: Artifact | None = None,
) -> Artifact:  # fmt: skip
    """Return the tuned model; `sample` is what the training is watched on.

    `losses` are the base's on the target, `along` are its distributions there.

    Unused inputs are in no key.
    """
    read = corpus if spec.rehearsal.reads_corpus() else None
    watched: dict[str, Any] = {"losses": losses} if spec.methods.learned() else {}
    held = spec.methods.divergence()
    watched |= {"along": along} if held and held.stored else {}
    if sample:
        benchmarks = tuple(b for b in evaluate.benchmarks if b.name in spec.watch.benchmarks)
        watched |= {"sample": sample, "target": target, "benchmarks": benchmarks}
    return _train(base=base, mixture=mixture, corpus=read, fisher=fisher, **watched, spec=spec, machine=machine)


@stage(TRAIN, "model", gpu=True)
def _train(
    draft: Draft, *, base: Artifact, mixture: Artifact, corpus: Artifact | None, fisher: Artifact | None,
    sample: Artifact | None = None, target: Artifact | None = None, benchmarks: tuple[Benchmark, ...] | None = None,
    losses: Artifact | None = None, along: Artifact | None = None, spec: TrainSpec, machine: Machine,
) -> None:  # fmt: skip
    """Train in a fresh process, from the draft's last whole checkpoint; see `cfsd.train.stage`."""
    from cfsd.train.stage import train

    watched = Watched(sample=sample, target=target, benchmarks=benchmarks or ()) if sample and target else None
    request = TrainRequest(
        home=draft.store.home, base=base, mixture=mixture, corpus=corpus, fisher=fisher, losses=losses, along=along,
        watched=watched, spec=spec, machine=machine,
    )  # fmt: skip
    train(request, draft)
    draft.metadata = inherited(base) | draft.metadata  # what is new counts where the base was trained, too
