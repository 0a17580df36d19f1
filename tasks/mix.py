"""Put target and rehearsal rows into one mixture."""

from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


def mix_rows(target: Artifact, corpus: Artifact, losses: Artifact | None, spec: MixSpec, machine: Machine) -> Artifact:
    """Return the table of target and rehearsal rows; `losses` of the base on the target only with FLOW."""
    if spec.flow == "off":
        return _mix(target, corpus, spec, machine)
    assert losses is not None, "FLOW weighs rows by the base's losses"
    return _mix_weighted(target, corpus, losses, spec, machine)


@stage("mix", "mixture")
def _mix(draft: Draft, target: Artifact, corpus: Artifact, spec: MixSpec, machine: Machine) -> None:
    """Make the table of target and rehearsal rows; see `cfsd.mix.stage`."""
    from cfsd.mix.stage import mix

    mix(draft.store.path(target), draft.store.path(corpus), spec, draft)


@stage("mix", "mixture")
def _mix_weighted(
    draft: Draft, target: Artifact, corpus: Artifact, losses: Artifact, spec: MixSpec, machine: Machine
) -> None:
    """Make the same table with FLOW's weights; see `cfsd.mix.flow_weights`."""
    from cfsd.mix.stage import mix

    mix(draft.store.path(target), draft.store.path(corpus), spec, draft, draft.store.path(losses))
