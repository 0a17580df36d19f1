"""Score the target's training rows under the base, for FLOW's weights."""

from cfsd.artifact import Artifact, Draft
from cfsd.machine import Machine
from cfsd.mix import MixSpec
from cfsd.weigh import weigh
from tasks._stage import stage


def weigh_target(base: Artifact, target: Artifact, spec: MixSpec, machine: Machine) -> Artifact | None:
    """Return the base's loss on each training row and each token of it, where FLOW wants them, else None."""
    return None if spec.flow == "off" else _weigh(base, target, machine)


@stage("weigh", "losses", gpu=True)
def _weigh(draft: Draft, base: Artifact, target: Artifact, machine: Machine) -> None:
    """Score the rows; see `cfsd.weigh`."""
    weigh(base, target, draft, machine)
