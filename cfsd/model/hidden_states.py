"""Hidden states: what a model gives before its head, at the tokens of rows that count.

B rows, T tokens, N tokens that count, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.model.batching import pad
from cfsd.model.decoder import decoder_of
from cfsd.model.head import Head


class Batch(NamedTuple):
    """Rows that pass a model together, and which of their tokens count; the first token of a row never does."""

    token_ids_BT: Tensor
    counted_BT: Tensor  # of tokens 1, 2, ..., so one column less

    @classmethod
    def of(cls, rows: Sequence[list[int]], masks: Sequence[list[bool]] | None = None) -> Self:
        """Return the batch of `rows`; without `masks` every token but the first counts."""
        return cls(pad(rows), pad(masks or [[True] * len(row) for row in rows], torch.bool)[:, 1:])

    def counts(self) -> list[int]:
        """Return how many tokens count in each row."""
        return [int(count) for count in self.counted_BT.sum(1)]

    def next_N(self) -> Tensor:
        """Return the tokens that count."""
        return self.token_ids_BT[:, 1:][self.counted_BT]

    def places_N2(self) -> Tensor:
        """Return the row of each token that counts, and the place of the token before it."""
        return self.counted_BT.nonzero()


class States(NamedTuple):
    """Hidden states that predict the tokens that count, and the head that makes logits of them."""

    hidden_ND: Tensor
    head: Head

    def to(self, device: str) -> "States":
        """Return the states on `device`; the head stays where it is."""
        return self._replace(hidden_ND=self.hidden_ND.to(device))

    def logits(self, part: slice, device: torch.device) -> Tensor:
        """Return the logits of some of the states, on the `device` of the head."""
        return self.head.logits(self.hidden_ND[part].to(device))


@torch.inference_mode()
def states(model: PreTrainedModel, batch: Batch, head_of: Callable[[PreTrainedModel], Any]) -> States:
    """Return the hidden states of `model`; where `head_of` gives none, its logits, and a head that leaves them so."""
    token_ids_BT, counted_BT = batch.token_ids_BT.to(model.device), batch.counted_BT.to(model.device)
    head = head_of(model)
    if head is None:
        runs: Any = model
        columns = counted_BT.any(0).nonzero()[:, 0]
        logits = runs(input_ids=token_ids_BT, use_cache=False, logits_to_keep=columns).logits
        return States(logits[counted_BT[:, columns]], Head(None))
    hidden: Tensor = decoder_of(model)(input_ids=token_ids_BT, use_cache=False).last_hidden_state
    return States(hidden[:, :-1][counted_BT], head)
