"""Put target and rehearsal rows into one mixture."""

from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.stages import MIX
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import BATCHES
from tasks._stage import stage


def mix_rows(target: Artifact, corpus: Artifact, losses: Artifact | None, spec: MixSpec, machine: Machine) -> Artifact:
    """Return the table of target and rehearsal rows; `losses` of the base on the target count only with FLOW."""
    used = None if spec.flow == "off" else losses
    return _mix(target=target, corpus=corpus, losses=used, spec=spec, beside=BATCHES, machine=machine)


@stage(MIX, "mixture")
def _mix(
    draft: Draft, *, target: Artifact, corpus: Artifact, losses: Artifact | None = None, spec: MixSpec, beside: str,
    machine: Machine,
) -> None:  # fmt: skip
    """Make the table of target and rehearsal rows; see `cfsd.mix.stage`.

    `beside` is the file that tells the batches: in the key, as mixtures made before have none and are made again.
    """
    from cfsd.mix.stage import mix

    at = draft.store.path
    mix(at(target), at(corpus), spec, draft, at(losses) if losses else None)
