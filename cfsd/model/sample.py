"""Sample: one sequence with the log-probabilities recorded while it was sampled."""

from typing import NamedTuple

from cfsd.model.distribution import Top


class Sample(NamedTuple):
    """One row: its tokens, the prompt's first, and log p* of each in nats; None for tokens of the prompt."""

    token_ids: list[int]
    logprobs: list[float | None]
    finish_reason: str  # eos | length
    top: Top | None = None
