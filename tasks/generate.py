"""Sample from the base model: the rehearsal corpus, and the probe by which forgetting is measured."""

from collections.abc import Sequence

from cfsd.generate.prompts import Prompts
from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.machine import Machine
from cfsd.spec import CONTROL_SEEDS, WATCHED_SEEDS, seed_of
from cfsd.stages import GENERATE, PROBE, PROMPTS
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


@stage(PROMPTS, "corpus", gpu=True)
def sample_answers(draft: Draft, base: Artifact, prompts: Prompts, machine: Machine) -> None:
    """Let the base answer the user's prompts, for measuring only; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import answers

    with sampler_of(machine) as sampler:
        answers(base, prompts, draft, machine, sampler)


def sample_along(
    base: Artifact, probe: ProbeSpec, prompts: Sequence[Prompts], machine: Machine
) -> dict[str, Artifact]:  # fmt: skip
    """Sample all that divergences are measured along, by name: the probe, and the answers to each set of prompts."""
    answers = {own.name: sample_answers(base, own, machine) for own in prompts}
    return {PROBE: sample_probe(base, probe, machine)} | answers


def sample_watched(base: Artifact, spec: ProbeSpec, watch: WatchSpec, machine: Machine) -> Artifact | None:
    """Sample what the training is watched on, if it is watched: rows like the probe's, but others.

    What is watched may stop the training, so it must not be the probe.
    """
    if not watch.every:
        return None
    other = spec.model_copy(update={"rows": watch.rows, "seed": seed_of(spec, WATCHED_SEEDS)})
    return sample_probe(base, other, machine)


def sample_control(base: Artifact, spec: ProbeSpec, budget: float | None, machine: Machine) -> Artifact | None:
    """Sample what decides which alpha keeps the budget: as many rows as the probe has, but others.

    The probe judges whether the budget was kept, so it must not decide alpha.
    """
    if budget is None:
        return None
    return sample_probe(base, spec.model_copy(update={"seed": seed_of(spec, CONTROL_SEEDS)}), machine)


def generate_corpus(
    base: Artifact, target: Artifact, spec: GenerateSpec, machine: Machine, earlier: tuple[Artifact, ...] = ()
) -> Artifact:  # fmt: skip
    """Sample the rehearsal corpus; the target is in its key only where its prompts are continued."""
    return _generate(base, target if "contextual" in spec.sources() else None, spec, machine, earlier or None)


@stage(GENERATE, "corpus", gpu=True)
def _generate(
    draft: Draft, base: Artifact, target: Artifact | None, spec: GenerateSpec, machine: Machine,
    earlier: tuple[Artifact, ...] | None = None,
) -> None:  # fmt: skip
    """Sample or read the rows of every source; see `cfsd.generate.stage`."""
    from cfsd.generate.stage import generate

    with sampler_of(machine) as sampler:
        generate(base, target, spec, draft, machine, sampler, earlier or ())
