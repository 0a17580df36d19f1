"""Put target and rehearsal rows into one mixture."""

from cfsd.artifact import Artifact, Draft
from cfsd.machine import Machine
from cfsd.mix import MixSpec, mix
from tasks._stage import stage


@stage("mix", "mixture")
def mix_rows(draft: Draft, target: Artifact, corpus: Artifact, spec: MixSpec, machine: Machine) -> None:
    """Make the table of target and rehearsal rows; see `cfsd.mix`."""
    mix(draft.store.path(target), draft.store.path(corpus), spec, draft)
