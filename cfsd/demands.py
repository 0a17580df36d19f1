"""What the ways of training ask of the corpus, told before anything is sampled."""

from cfsd.errors import BadInput
from cfsd.generate import GenerateSpec
from cfsd.mix import MixSpec
from cfsd.train import TrainSpec


def check_rehearsal(generate: GenerateSpec, train: TrainSpec) -> None:
    """Raise ValueError when the corpus of `generate` does not hold what `train` reads."""
    rehearsal, ewc = train.rehearsal, train.methods.ewc
    if rehearsal.budget and not generate.rows:
        raise ValueError(
            "train.rehearsal.budget is read off rehearsal rows, and generate.rows is 0; set rows, or budget to null"
        )
    if generate.rows and rehearsal.needs_top():
        _check_stored(generate, rehearsal.tail)
    if generate.rows and rehearsal.budget and "replay" in generate.sources():
        raise ValueError(
            "train.rehearsal.budget needs text of the base's own: on source replay it is not what the probe "
            "measures; use another generate.source or set rehearsal.weight"
        )
    if ewc.is_on() and generate.rows and generate.biases():
        raise ValueError(
            f"train.methods.ewc takes its Fisher matrix from text by the base's own law, but generate has "
            f"{', '.join(generate.biases())}: leave that out, or set ewc.weight to 0"
        )
    if ewc.is_on() and (generate.rows < ewc.rows or generate.source != "context-free"):
        raise ValueError(
            f"train.methods.ewc takes its Fisher matrix from ewc.rows={ewc.rows} context-free rows; generate has "
            f"{generate.rows} of source {generate.source}: raise generate.rows or lower ewc.rows, and set "
            "generate.source to context-free (train.rehearsal.weight=0 keeps the rows out of the loss)"
        )


def _check_stored(generate: GenerateSpec, tail: str) -> None:
    if not generate.top_logprobs:
        raise ValueError(
            "train.rehearsal.loss is kl with reference stored, but the corpus keeps no laws: set generate.top_logprobs "
            "(64 is a good start), or train.rehearsal.reference to base"
        )
    if tail == "sampled" and generate.biases():
        raise ValueError(
            "train.rehearsal.tail sampled takes tokens outside the stored top as drawn by the base's own law, but "
            f"generate has {', '.join(generate.biases())}: set tail to bucket, or train.rehearsal.reference to base"
        )
    if tail == "sampled" and "replay" in generate.sources():
        raise ValueError(
            "train.rehearsal.tail sampled takes tokens outside the stored top as drawn by the base, but source replay "
            "was written by others: set tail to bucket, or train.rehearsal.reference to base"
        )


def check_supply(generate: GenerateSpec, mix: MixSpec, train: TrainSpec, train_rows: int) -> None:
    """Raise BadInput when the corpus cannot last a training that reads its budget off rows never seen before.

    Told before sampling, as if no row ended early; the training itself counts the rows that there are.
    """
    steps = train.epochs * -(-train_rows // mix.target_rows)
    least = mix.rehearsal_tokens - generate.length  # that a step takes: whole rows while they fit
    needed, most = (steps - 1) * least, generate.rows * generate.length
    if train.rehearsal.budget and most < needed:
        raise BadInput(
            f"train.rehearsal.budget reads the divergence on rows that were not seen before: {steps} steps of "
            f"{mix.rehearsal_tokens} tokens, but generate.rows={generate.rows} of at most {generate.length} tokens "
            f"hold {most:,}; raise generate.rows to {-(-needed // generate.length):,} or more, or lower "
            "mix.rehearsal_tokens or train.epochs"
        )
