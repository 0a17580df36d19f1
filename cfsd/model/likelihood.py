"""The log-probabilities that a model gives to the tokens of texts that exist. B rows, T tokens, V vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.errors import NotFinite
from cfsd.model.batching import arrange, pad
from cfsd.model.distribution import Distribution, Top, distribution_of, likeliest
from cfsd.model.sample import Sample


@torch.inference_mode()
def score_responses(
    model: PreTrainedModel, rows: list[dict[str, Any]], max_tokens: int, on_progress: Callable[[int], None],
    *, per_token: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return per row the summed -log p of its supervised tokens and how many are the model's first choice.

    All of them first choice is the same as: greedy decoding of the prompt writes exactly this response.
    `per_token` adds `token_nll`, the -log p of each supervised token. At most `max_tokens` positions have logits at a
    time: a longer row passes through the model several times, each time for a part of them.
    """
    scores: dict[int, dict[str, Any]] = {}
    for group in arrange([len(row["token_ids"]) for row in rows], max_tokens):
        token_ids_BT = pad([rows[i]["token_ids"] for i in group]).to(model.device)
        wanted_BT = pad([rows[i]["supervised"] for i in group], torch.bool)[:, 1:].to(model.device)
        columns = wanted_BT.any(0).nonzero()[:, 0]
        nll = {i: list[Tensor]() for i in group}
        correct = dict.fromkeys(group, 0)
        for part in columns.split(max(1, max_tokens // len(group))):
            output: Any = model(input_ids=token_ids_BT, use_cache=False, logits_to_keep=part)
            for place, i in enumerate(group):
                wanted_N = wanted_BT[place, part]
                logits_NV, next_N = output.logits[place][wanted_N].float(), token_ids_BT[place, part + 1][wanted_N]
                nll[i].append(torch.nn.functional.cross_entropy(logits_NV, next_N, reduction="none"))
                correct[i] += int((logits_NV.argmax(-1) == next_N).sum())
            del output
        for i in group:
            nll_N = torch.cat(nll[i])
            scores[i] = {
                **{k: rows[i][k] for k in ("row_id", "prompt", "response") if k in rows[i]},
                "nll": nll_N.double().sum().item(),
                "correct": correct[i],
                "count": len(nll_N),
                **({"token_nll": nll_N.tolist()} if per_token else {}),
            }
        on_progress(len(scores))
    return [scores[i] for i in range(len(rows))]


@torch.inference_mode()
def token_logprobs(
    model: PreTrainedModel,
    token_rows: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    *,
    top_logprobs: int = 0,
    tail_points: Sequence[NDArray[Any]] | None = None,
    max_tokens: int = 1024,
    where: str = "",
) -> list[Sample]:
    """Return each row with log p* of every token after those before it, in nats, and the K likeliest on request.

    Only the first token has no log-probability. `tail_points` has, per row, points in [0, 1] for each of its tokens:
    as many samples of what is not among the likeliest are returned. At most `max_tokens` positions have logits at a
    time: rows of like length go together, and a longer row passes through the model several times, each time for a
    part of its logits.
    Raises NotFinite naming `where` when the model gives NaN, or no probability at all to a token.
    """
    points = [torch.from_numpy(row) for row in tail_points or [np.zeros((len(row), 0)) for row in token_rows]]
    samples = {i: _blank(row, eos_ids, top_logprobs, points[i].shape[1]) for i, row in enumerate(token_rows)}
    for group in arrange([len(row) for row in token_rows], max_tokens):
        longest = len(token_rows[group[0]])
        token_ids_BT = pad([token_rows[i] for i in group]).to(model.device)
        for first in range(0, longest - 1, max_tokens):
            columns = torch.arange(first, min(first + max_tokens, longest - 1), device=model.device)
            output: Any = model(input_ids=token_ids_BT, use_cache=False, logits_to_keep=columns)
            for place, i in enumerate(group):
                next_T = token_ids_BT[place, first + 1 : len(token_rows[i])][: len(columns)]
                if len(next_T):
                    distribution = distribution_of(output.logits[place, : len(next_T)])
                    _record(samples[i], first + 1, distribution, next_T, where)
                    if (top := samples[i].top) is not None:
                        _record_top(top, first + 1, distribution, points[i])
            del output
    return [samples[i] for i in range(len(token_rows))]


def _blank(row: Sequence[int], eos_ids: Sequence[int], count: int, samples: int) -> Sample:
    shape, nan = (len(row), count), np.float32("nan")
    tail = np.zeros((len(row), samples), np.int32), np.full((len(row), samples), nan)
    top = Top(np.zeros(shape, np.int32), np.full(shape, nan), np.full(len(row), nan), *tail) if count else None
    return Sample(list(row), [None] * len(row), "eos" if len(row) > 1 and row[-1] in eos_ids else "length", top)


def _record(sample: Sample, at: int, distribution: Distribution, next_T: Tensor, where: str) -> None:
    """Fill in the tokens from position `at` on."""
    logprobs_T = distribution.logprobs(next_T[:, None])[:, 0]
    if not bool((finite_T := torch.isfinite(logprobs_T)).all()):
        token = at + int(finite_T.int().argmin())
        raise NotFinite(f"the base model's log-probability of token {token} in {where or 'a row'} is not finite")
    sample.logprobs[at : at + len(next_T)] = logprobs_T.tolist()


def _record_top(top: Top, at: int, distribution: Distribution, points_TM: Tensor) -> None:
    until = at + len(distribution.total_B)
    found = likeliest(distribution, top.ids.shape[1], points_TM[at:until].to(distribution.total_B.device))
    for kept, values in zip(top, found, strict=True):  # a small vocabulary does not fill K columns
        kept[(slice(at, until), *map(slice, values.shape[1:]))] = values.cpu()
