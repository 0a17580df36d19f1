"""Fine-tune the base model on the mixture."""

from cfsd.artifact import Artifact, Draft
from cfsd.machine import Machine
from cfsd.train import TrainSpec, train
from tasks._stage import stage


@stage("train", "model", gpu=True)
def train_model(draft: Draft, base: Artifact, mixture: Artifact, spec: TrainSpec, machine: Machine) -> None:
    """Train in a fresh process, from the draft's last whole checkpoint; see `cfsd.train`."""
    train(base, mixture, spec, draft, machine)
    draft.facts |= base.facts
