"""Log-probabilities of given rows under a model, as the sampler records them. T tokens, V vocabulary, K likeliest."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.drawing import Law, Top, law_of, likeliest
from cfsd.errors import NotFinite
from cfsd.microbatch import arrange, pad
from cfsd.sampling import Sample


@torch.inference_mode()
def score_given(
    model: PreTrainedModel,
    token_rows: list[list[int]],
    ends: tuple[int, ...],
    *,
    top_logprobs: int = 0,
    most_tokens: int = 1024,
    where: str = "",
) -> list[Sample]:
    """Return each row with log p* of every token given those before it, in nats, and the K likeliest on request.

    Only the first token has no log-probability. At most `most_tokens` positions have logits at a time: rows of like
    length go together, and a longer row passes through the model several times, each time for a part of its logits.
    Raises NotFinite naming `where` when the model gives NaN, or no probability at all to a given token.
    """
    samples = {i: _blank(row, ends, top_logprobs) for i, row in enumerate(token_rows)}
    for group in arrange([len(row) for row in token_rows], most_tokens):
        longest = len(token_rows[group[0]])
        token_ids_BT = pad([token_rows[i] for i in group]).to(model.device)
        for first in range(0, longest - 1, most_tokens):
            columns = torch.arange(first, min(first + most_tokens, longest - 1), device=model.device)
            output: Any = model(input_ids=token_ids_BT, use_cache=False, logits_to_keep=columns)
            for place, i in enumerate(group):
                next_T = token_ids_BT[place, first + 1 : len(token_rows[i])][: len(columns)]
                if len(next_T):
                    _record(samples[i], first + 1, law_of(output.logits[place, : len(next_T)]), next_T, where)
            del output
    return [samples[i] for i in range(len(token_rows))]


def _blank(row: list[int], ends: tuple[int, ...], count: int) -> Sample:
    shape, nan = (len(row), count), np.float32("nan")
    top = Top(np.zeros(shape, np.int32), np.full(shape, nan), np.full(len(row), nan)) if count else None
    return Sample(list(row), [None] * len(row), "eos" if len(row) > 1 and row[-1] in ends else "length", top)


def _record(sample: Sample, at: int, law: Law, next_T: Tensor, where: str) -> None:
    """Fill in the tokens from position `at` on."""
    logprobs_T = law.logprobs(next_T[:, None])[:, 0]
    if not bool((finite_T := torch.isfinite(logprobs_T)).all()):
        token = at + int(finite_T.int().argmin())
        raise NotFinite(f"the base model's log-probability of token {token} in {where or 'a given row'} is not finite")
    until = at + len(next_T)
    sample.logprobs[at:until] = logprobs_T.tolist()
    if sample.top is not None:
        ids_TK, logprobs_TK, rest_T = likeliest(law, sample.top.ids.shape[1])
        width = ids_TK.shape[1]
        sample.top.ids[at:until, :width] = ids_TK.cpu()
        sample.top.logprobs[at:until, :width] = logprobs_TK.cpu()
        sample.top.rest[at:until] = rest_T.cpu()
