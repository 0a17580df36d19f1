"""Tokenise the target and split it into train and held-out rows."""

from cfsd.data.target import Target
from cfsd.machine import Machine
from cfsd.stages import TARGET
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


@stage(TARGET, "target")
def prepare_target(draft: Draft, base: Artifact, target: Target, machine: Machine) -> None:
    """Make the `train` and `held_out` tables with the base's tokenizer; see `cfsd.data.stage`."""
    from cfsd.data.stage import prepare

    prepare(base, target, draft)
