"""Score the target's training rows under the base, for FLOW's weights."""

from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.stages import WEIGH
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


def weigh_target(base: Artifact, target: Artifact, spec: MixSpec, machine: Machine) -> Artifact | None:
    """Return the base's loss on each training row and each token of it, where FLOW wants them, else None."""
    return None if spec.flow == "off" else _weigh(base, target, machine)


@stage(WEIGH, "losses", gpu=True)
def _weigh(draft: Draft, base: Artifact, target: Artifact, machine: Machine) -> None:
    """Score the rows; see `cfsd.mix.weigh`."""
    from cfsd.mix.weigh import weigh

    weigh(base, target, draft, machine)
