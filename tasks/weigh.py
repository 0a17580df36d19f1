"""Score the target's training rows under the base, for FLOW's weights and for methods that read them."""

from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.stages import ALONG, WEIGH
from cfsd.store.artifact import Artifact, Draft
from cfsd.train.methods import Methods
from cfsd.train.methods.method import AlongSpec
from tasks._stage import stage


def weigh_target(
    base: Artifact, target: Artifact, spec: MixSpec, methods: Methods, machine: Machine
) -> Artifact | None:  # fmt: skip
    """Return the base's loss on each training row and each token of it, where FLOW or a method wants them, or None."""
    return _weigh(base, target, machine) if spec.flow != "off" or methods.learned() else None


@stage(WEIGH, "losses", gpu=True)
def _weigh(draft: Draft, base: Artifact, target: Artifact, machine: Machine) -> None:
    """Score the rows; see `cfsd.mix.weigh`."""
    from cfsd.mix.weigh import weigh

    weigh(base, target, draft, machine)


def store_target(base: Artifact, target: Artifact, methods: Methods, machine: Machine) -> Artifact | None:
    """Return the base's distributions along the responses of the training rows, where a method wants them, or None."""
    held = methods.divergence()
    return _store_target(base, target, held.stored, machine) if held and held.stored else None


@stage(ALONG, "along", gpu=True)
def _store_target(draft: Draft, base: Artifact, target: Artifact, spec: AlongSpec, machine: Machine) -> None:
    """Store them; see `cfsd.train.target_distributions`."""
    from cfsd.train.target_distributions import store_target

    store_target(base, target, spec, draft, machine)
