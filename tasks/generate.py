"""Sample from the base model: the rehearsal corpus, and the probe by which forgetting is measured."""

from cfsd.artifact import Artifact, Draft
from cfsd.generate import GenerateSpec, ProbeSpec, generate, probe
from cfsd.machine import Machine
from tasks._stage import stage


@stage("probe", "corpus", gpu=True)
def sample_probe(draft: Draft, base: Artifact, spec: ProbeSpec, machine: Machine) -> None:
    """Sample the held-out probe, which all variants on this base share; see `cfsd.generate`."""
    probe(base, spec, draft, machine)


@stage("generate", "corpus", gpu=True)
def generate_corpus(draft: Draft, base: Artifact, spec: GenerateSpec, machine: Machine) -> None:
    """Sample documents from the base given nothing but its start token; see `cfsd.generate`."""
    generate(base, spec, draft, machine)
