"""Stage generate: text sampled from the base model given nothing but its start token; the probe likewise.

Source: Bansal and Sanghavi 2025, arXiv:2505.13811: rehearsing this text estimates KL(base || tuned) without bias,
at temperature 1 and without truncation. Any other setting estimates the divergence from another law.
"""

from typing import Any

from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt

from cfsd.artifact import Artifact, Draft
from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.spec import Spec


class ProbeSpec(Spec):
    """The held-out sample by which forgetting is measured without a benchmark; never trained on."""

    rows: PositiveInt = Field(256, description="Sequences; the interval narrows with their square root")
    length: PositiveInt = Field(128, description="Most tokens sampled per sequence, after the start token")
    seed: NonNegativeInt | None = Field(None, description="Empty: the recipe's")


class GenerateSpec(Spec):
    """The rehearsal corpus. The defaults sample the model's own law exactly."""

    rows: NonNegativeInt = Field(1024, description="Sequences to sample; 0: no rehearsal, plain fine-tuning")
    length: PositiveInt = Field(128, description="Most tokens sampled per sequence, after the start token")
    temperature: PositiveFloat = Field(1.0, description="Anything but 1 samples another law: biased")
    top_p: float = Field(1.0, gt=0, le=1, description="Below 1 the tail is never sampled: biased")
    top_k: NonNegativeInt = Field(0, description="0: off. Otherwise only the k likeliest tokens: biased")
    seed: NonNegativeInt | None = Field(None, description="Empty: the recipe's")

    def biases(self) -> list[str]:
        """Return which settings make the corpus follow another law than the base model's."""
        neutral: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return [f"{name}={getattr(self, name)}" for name, value in neutral.items() if getattr(self, name) != value]


def check_context(base: Artifact, spec: ProbeSpec | GenerateSpec, name: str) -> None:
    """Raise BadInput when a row of `recipe.<name>` would be longer than the base can attend to."""
    context = base.facts.get("context")
    if spec.rows and isinstance(context, int) and spec.length + 1 > context:
        raise BadInput(
            f"length {spec.length} and the start token do not fit the base model, which attends to {context} tokens; "
            f"set {name}.length to at most {context - 1}"
        )


def generate(base: Artifact, spec: GenerateSpec, draft: Draft, machine: Machine) -> None:
    """Write `spec.rows` rows as a `corpus` table, one shard per batch; finished shards are kept."""
    _sample_shards(base, spec, draft, machine, source="context-free")
    draft.facts["biased"] = ", ".join(spec.biases())


def probe(base: Artifact, spec: ProbeSpec, draft: Draft, machine: Machine) -> None:
    """Write the probe as a `corpus` table, from random numbers that no corpus uses."""
    law = GenerateSpec(rows=spec.rows, length=spec.length, seed=spec.seed)
    _sample_shards(base, law, draft, machine, source="probe")


def _sample_shards(base: Artifact, law: GenerateSpec, draft: Draft, machine: Machine, *, source: str) -> None:
    from cfsd.rows import shard_path

    size = machine.sampling_rows
    starts = range(0, law.rows, size)
    for shard, first in enumerate(starts):
        if not shard_path(draft.folder, "corpus", shard).exists():
            rows = list(range(first, min(first + size, law.rows)))
            _sample_one(base, law, draft, machine, source, shard, rows)
        draft.journal.progress(min(first + size, law.rows), law.rows, "rows")
    draft.facts |= _facts(draft)


def _sample_one(
    base: Artifact,
    law: GenerateSpec,
    draft: Draft,
    machine: Machine,
    source: str,
    shard: int,
    rows: list[int],
) -> None:
    from cfsd.checkpoint import end_tokens, load_for_measuring, load_tokenizer, read_start_token
    from cfsd.rows import CORPUS, table_of, write_shard
    from cfsd.sampling import sample

    machine.settle()
    folder = draft.store.path(base)
    model = load_for_measuring(draft.store, base, machine.resolved_device())

    def on_step(step: int) -> None:
        done = rows[0] + len(rows) * step / law.length
        draft.journal.progress(int(done), law.rows, "rows")

    sampled = sample(
        model, read_start_token(folder), end_tokens(folder), law, rows, stream=source, where=f"shard {shard}",
        on_step=on_step,
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    records = [
        {
            "row_id": row, "source": source, "token_ids": s.token_ids, "logprobs": [None, *s.logprobs],
            "finish_reason": s.finish_reason, "shard": shard, "seed": law.seed or 0,
            "text": tokenizer.decode(s.token_ids),
        }
        for row, s in zip(rows, sampled, strict=True)
    ]  # fmt: skip
    write_shard(draft.folder, "corpus", shard, table_of(CORPUS, records))
    tokens = sum(len(s.logprobs) for s in sampled)
    nats = sum(sum(s.logprobs) for s in sampled)
    draft.journal.metrics(rows[-1] + 1, {"generate/tokens": tokens, "generate/mean_logprob": nats / tokens})


def _facts(draft: Draft) -> dict[str, JsonValue]:
    from cfsd.rows import batches

    rows = tokens = ended = 0
    nats = 0.0
    for batch in batches(draft.folder, "corpus", ["logprobs", "finish_reason"]):
        columns = batch.to_pydict()
        rows += batch.num_rows
        tokens += sum(len(values) - 1 for values in columns["logprobs"])
        nats += sum(sum(values[1:]) for values in columns["logprobs"])
        ended += columns["finish_reason"].count("eos")
    share = {"mean_logprob": nats / tokens, "ended_fraction": ended / rows} if rows else {}
    return {"rows": rows, "tokens": tokens, **share}
