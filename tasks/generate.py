"""Sample from the base model: the rehearsal corpus, and the probe by which forgetting is measured."""

from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.machine import Machine
from cfsd.spec import CONTROL_SEEDS, WATCHED_SEEDS, seed_of
from cfsd.stages import GENERATE, PROBE
from cfsd.store.artifact import Artifact, Draft
from cfsd.train.spec import WatchSpec
from tasks._cluster import sampler_of
from tasks._stage import stage


@stage(PROBE, "corpus", gpu=True)
def sample_probe(draft: Draft, base: Artifact, spec: ProbeSpec, machine: Machine) -> None:
    """Sample the held-out probe, which all variants on this base share; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import probe

    with sampler_of(machine) as sampler:
        probe(base, spec, draft, machine, sampler)


def sample_watched(base: Artifact, spec: ProbeSpec, watch: WatchSpec, machine: Machine) -> Artifact | None:
    """Sample what the training is watched on, where it is watched: like the probe, but other rows.

    A training may be stopped by what it shows, so that the probe must not be it.
    """
    if not watch.every:
        return None
    other = spec.model_copy(update={"rows": watch.rows, "seed": seed_of(spec, WATCHED_SEEDS)})
    return sample_probe(base, other, machine)


def sample_control(base: Artifact, spec: ProbeSpec, budget: float | None, machine: Machine) -> Artifact | None:
    """Sample what decides how much of the tuned model keeps the budget: as large as the probe, but other rows.

    The probe judges whether it was kept, so that the probe must not decide it.
    """
    if budget is None:
        return None
    return sample_probe(base, spec.model_copy(update={"seed": seed_of(spec, CONTROL_SEEDS)}), machine)


def generate_corpus(base: Artifact, target: Artifact, spec: GenerateSpec, machine: Machine) -> Artifact:
    """Sample the rehearsal corpus; the target counts only where its prompts are gone on from."""
    return _generate(base, target if "contextual" in spec.sources() else None, spec, machine)


@stage(GENERATE, "corpus", gpu=True)
def _generate(draft: Draft, base: Artifact, target: Artifact | None, spec: GenerateSpec, machine: Machine) -> None:
    """Sample or read the rows of every source; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import generate

    with sampler_of(machine) as sampler:
        generate(base, target, spec, draft, machine, sampler)
