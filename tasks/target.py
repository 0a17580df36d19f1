"""Tokenise the target and split it into train and held-out rows."""

from cfsd.data.target import RewriteSpec, Target
from cfsd.machine import Machine
from cfsd.stages import REWRITE, TARGET
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


@stage(TARGET, "target")
def prepare_target(draft: Draft, base: Artifact, target: Target, machine: Machine) -> None:
    """Make the `train` and `held_out` tables with the base's tokenizer; see `cfsd.data.stage`."""
    from cfsd.data.stage import prepare

    prepare(base, target, draft)


def rewrite_target(base: Artifact, target: Artifact, spec: RewriteSpec | None, machine: Machine) -> Artifact:
    """Return the target itself if nothing is rewritten, else one with the base's own words in its training rows."""
    return _rewrite_target(base, target, spec, machine) if spec else target


@stage(REWRITE, "target", gpu=True)
def _rewrite_target(draft: Draft, base: Artifact, target: Artifact, spec: RewriteSpec, machine: Machine) -> None:
    """Say the responses in the base's own words; see `cfsd.generate.rewrite`."""
    from cfsd.generate.rewrite import rewrite

    rewrite(base, target, spec, draft, machine)
