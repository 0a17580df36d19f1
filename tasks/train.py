"""Fine-tune the base model on the mixture."""

from typing import Any, NamedTuple

from cfsd.evaluate.benchmark import Benchmark
from cfsd.machine import Machine, home
from cfsd.stages import TRAIN
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.train.spec import TrainRequest, TrainSpec, Watched
from tasks._stage import inherited, stage


class OfBase(NamedTuple):
    """What methods read of the base, where they do."""

    fisher: Artifact | None = None
    losses: Artifact | None = None  # at each token of the target's rows
    along: Artifact | None = None  # its distributions there


def train_model(
    base: Artifact, mixture: Artifact, corpus: Artifact, of_base: OfBase, watched: Watched | None, spec: TrainSpec,
    machine: Machine,
) -> Artifact:  # fmt: skip
    """Return the tuned model. Unused inputs are in no key."""
    held, inputs = spec.methods.divergence(), dict[str, Any](watched or ())
    inputs |= {"losses": of_base.losses} if spec.methods.learned() else {}
    inputs |= {"along": of_base.along} if held and held.stored else {}
    read = corpus if spec.rehearsal.reads_corpus() else None
    return _train(base=base, mixture=mixture, corpus=read, fisher=of_base.fisher, **inputs, spec=spec, machine=machine)


def check_training(base: Artifact, spec: TrainSpec, machine: Machine) -> None:
    """Raise BadInput where the base, once it is there, lacks layers that an adapter names, or has unwanted dropout."""
    adapter, sharded = spec.methods.adapter(), machine.sharding == "shard"
    if not base.content:
        return
    if adapter and (adapter.targets or adapter.parameters or adapter.kind == "osf"):
        from cfsd.train.adapters import check_layers  # PEFT takes seconds to import

        check_layers(Store(home()).path(base, weights=False), spec.methods)
    if sharded or spec.methods.divergence():
        from cfsd.train.dropout import check_layers_drop

        check_layers_drop(Store(home()).path(base, weights=False), spec, sharded=sharded)


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
