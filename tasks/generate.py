"""Sample from the base model: the rehearsal corpus, and the probe by which forgetting is measured."""

from cfsd.artifact import Artifact, Draft
from cfsd.generate import GenerateSpec, ProbeSpec, generate, probe
from cfsd.machine import Machine
from tasks._cluster import sampler_of
from tasks._stage import stage


@stage("probe", "corpus", gpu=True)
def sample_probe(draft: Draft, base: Artifact, spec: ProbeSpec, machine: Machine) -> None:
    """Sample the held-out probe, which all variants on this base share; see `cfsd.generate`."""
    with sampler_of(machine) as sampler:
        probe(base, spec, draft, machine, sampler)


def generate_corpus(base: Artifact, target: Artifact, spec: GenerateSpec, machine: Machine) -> Artifact:
    """Sample the rehearsal corpus; the target counts only where its prompts are gone on from."""
    return _generate(base, target if "contextual" in spec.sources() else None, spec, machine)


@stage("generate", "corpus", gpu=True)
def _generate(draft: Draft, base: Artifact, target: Artifact | None, spec: GenerateSpec, machine: Machine) -> None:
    """Sample or read the rows of every source; see `cfsd.generate`."""
    with sampler_of(machine) as sampler:
        generate(base, target, spec, draft, machine, sampler)
