"""Tokenise the target and part it into train and held-out rows."""

from cfsd.artifact import Artifact, Draft
from cfsd.machine import Machine
from cfsd.target import Target, prepare
from tasks._stage import stage


@stage("target", "target")
def prepare_target(draft: Draft, base: Artifact, target: Target, machine: Machine) -> None:
    """Make the `train` and `held_out` tables with the base's tokenizer; see `cfsd.target`."""
    prepare(base, target, draft)
