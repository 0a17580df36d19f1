"""Sample: one sequence with the log-probabilities recorded while it was sampled."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cfsd.model.distribution import Top


class Sample(NamedTuple):
    """One row: its tokens, the prompt's first, and log p* of each in nats; None for tokens of the prompt."""

    token_ids: list[int]
    logprobs: list[float | None]
    finish_reason: str  # eos | length
    top: Top | None = None

    def only(self, learned: Sequence[bool] | NDArray[Any] | None) -> "Sample":
        """Return the row with nothing at the tokens that are not `learned`, as at those of a prompt; None: all are."""
        if learned is None:
            return self
        hidden_T = ~np.asarray(learned, bool)
        for values in self.top or ():
            values[hidden_T] = 0 if values.dtype.kind == "i" else np.nan
        return self._replace(logprobs=[p if kept else None for p, kept in zip(self.logprobs, learned, strict=True)])
