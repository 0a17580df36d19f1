"""Stage generate: text sampled from the base model after nothing but its start token; the probe likewise.

Source: Bansal and Sanghavi 2025, arXiv:2505.13811: rehearsing this text estimates KL(base || tuned) without bias,
at temperature 1 and without truncation. Any other setting estimates the divergence from another distribution.
The other sources are what the method is compared to: text after the target's prompts, after the chat template,
and documents of the user's own.
"""

from cfsd.data.corpus_table import corpus_metadata
from cfsd.generate.shard_job import Sampler, ShardJob
from cfsd.generate.shard_sampling import check_engine
from cfsd.generate.shards import sample_source
from cfsd.generate.spec import SHARDS_PER_SOURCE, GenerateSpec, ProbeSpec
from cfsd.machine import Machine
from cfsd.store.artifact import Artifact, Draft


def generate(
    base: Artifact,
    target: Artifact | None,
    spec: GenerateSpec,
    draft: Draft,
    machine: Machine,
    sampler: Sampler | None = None,
) -> None:
    """Write the `corpus` table shard by shard; finished shards are kept whatever happens.

    `target` is needed by source contextual only. `sampler` works on shards elsewhere than on this machine; those
    that it loses are asked for again.
    """
    job = ShardJob.of(draft, base, target, spec, machine)
    draft.metadata |= check_engine(job)
    for position, source in enumerate(spec.sources()):
        tokens = spec.fractions[source] * spec.rows * spec.length if spec.fractions else None
        sample_source(job, source, position * SHARDS_PER_SOURCE, tokens, draft, sampler)
    draft.metadata |= corpus_metadata(draft.folder)
    draft.metadata |= {"biased": ", ".join(spec.biases()), "source": spec.source, "top_logprobs": spec.top_logprobs}


def probe(base: Artifact, spec: ProbeSpec, draft: Draft, machine: Machine, sampler: Sampler | None = None) -> None:
    """Write the probe as a `corpus` table, from random numbers that no corpus uses."""
    job = ShardJob.of(draft, base, None, GenerateSpec(rows=spec.rows, length=spec.length, seed=spec.seed), machine)
    draft.metadata |= check_engine(job)
    sample_source(job, "probe", 0, None, draft, sampler)
    draft.metadata |= corpus_metadata(draft.folder)
